"""The colour words of captions and the paints they stand for.

A word keeps its hue whatever the shade: light and shadow move value and saturation only, so that the hue of a picture
can be held against the word.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

import numpy as np

# The words of the colour test, and the hue in degrees (HSV) that each stands for.
COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
HUES: Dict[str, float] = {
    "red": 0.0,
    "orange": 28.0,
    "yellow": 54.0,
    "green": 120.0,
    "turquoise": 176.0,
    "blue": 220.0,
    "purple": 275.0,
    "pink": 328.0,
}
NEUTRALS = ("brown", "white", "black", "grey")
WORDS = COLOURS + NEUTRALS
# How a word may be changed in a background's name.
TONES = ("pale", "dark", "light", "deep")

# Hue in degrees, saturation and value of each word in full light.
_HSV: Dict[str, Tuple[float, float, float]] = {
    "red": (0.0, 0.86, 0.86),
    "orange": (28.0, 0.88, 0.94),
    "yellow": (54.0, 0.84, 0.96),
    "green": (120.0, 0.70, 0.72),
    "turquoise": (176.0, 0.74, 0.82),
    "blue": (220.0, 0.78, 0.86),
    "purple": (275.0, 0.66, 0.78),
    "pink": (328.0, 0.54, 0.96),
    "brown": (24.0, 0.58, 0.50),
    "white": (45.0, 0.03, 0.95),
    "black": (230.0, 0.12, 0.15),
    "grey": (215.0, 0.05, 0.56),
}
_HUE_JITTER = 5.0


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float32 RGB in 0..255 of a hue in degrees and a saturation and value in 0..1."""
    rgb = colorsys.hsv_to_rgb((hue % 360.0) / 360.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return np.array(rgb, np.float32) * 255.0


@dataclass(frozen=True)
class Paint:
    """One colour as it is painted: hue in degrees, saturation and value in 0..1 in full light."""

    hue: float
    saturation: float
    value: float

    @property
    def rgb(self) -> np.ndarray:
        """(3,) float32 RGB in 0..255."""
        return hsv_to_rgb(self.hue, self.saturation, self.value)

    def darker(self, factor: float) -> Paint:
        """The same hue with its value times `factor`."""
        return Paint(self.hue, self.saturation, self.value * factor)

    def duller(self, factor: float) -> Paint:
        """The same hue with its saturation times `factor`."""
        return Paint(self.hue, self.saturation * factor, self.value)

    def line(self) -> Paint:
        """A paint for lines drawn upon this one: darker, or on a very dark paint lighter."""
        return self.darker(0.42) if self.value > 0.3 else self.paler(0.3)

    def paler(self, amount: float) -> Paint:
        """The same hue mixed with white; amount 0 is the paint itself and 1 is white."""
        value = self.value + (1.0 - self.value) * amount
        return Paint(self.hue, self.saturation * (1.0 - amount), value)


def paint(word: str, jitter: Optional[Sequence[float]] = None, tone: str = "") -> Paint:
    """The paint of a colour word.

    Parameters
    ----------
    word : one of WORDS
    jitter : three numbers in -1..1 that move hue, saturation and value a little within the word; None for the centre
    tone : "" or one of TONES

    Raises
    ------
    ValueError
        For a word or tone outside the palette.
    """
    if word not in _HSV:
        raise ValueError(f"unknown colour {word!r}: use one of {', '.join(WORDS)}")
    hue, saturation, value = _HSV[word]
    if jitter is not None:
        hue += _HUE_JITTER * float(jitter[0])
        saturation *= 1.0 + 0.1 * float(jitter[1])
        value *= 1.0 + 0.07 * float(jitter[2])
    if tone == "pale":
        saturation, value = saturation * 0.30, value + (1.0 - value) * 0.72
    elif tone == "light":
        saturation, value = saturation * 0.48, value + (1.0 - value) * 0.5
    elif tone == "dark":
        saturation, value = saturation * 0.75, value * 0.36
    elif tone == "deep":
        saturation, value = saturation * 0.62, value * 0.6
    elif tone:
        raise ValueError(f"unknown tone {tone!r}: use one of {', '.join(TONES)}")
    return Paint(hue, min(saturation, 1.0), min(value, 1.0))


def hue_distance(first: float, second: float) -> float:
    """Degrees between two hues the short way round, 0..180."""
    return abs((first - second + 180.0) % 360.0 - 180.0)
