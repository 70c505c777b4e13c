"""One image request: every argument of `process`, checked before any work is done. No torch here."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, List

MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_SAMPLES = 64
MAX_RESOLUTION = 2048


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {number}")
    return number


def _real(value: Any, name: str, low: float, high: float) -> float:
    try:
        # float() would read a number out of text, and out of a bool.
        number = float(None if isinstance(value, (str, bytes, bytearray, bool)) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got a far larger integer") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {number:g}")
    return number


def _flag(value: Any, name: str) -> bool:
    # NumPy's own bool is told by its type's name: it need not be imported for that.
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__} {value!r}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__} {value!r}")
    return value


@dataclass(frozen=True)
class Request:
    """What to paint.

    Attributes
    ----------
    prompt, added_prompt, negative_prompt : str
        The conditional text is `prompt + ", " + added_prompt`, as in the original; the unconditional one is
        `negative_prompt`. Any of them may be empty.
    num_samples : int
        Images to make, 1 .. 64.
    image_resolution : int
        Length of the shorter side before both are rounded to multiples of 64, 64 .. 2048.
    ddim_steps : int
        1 .. 1000.
    guess_mode : bool
        Fade the control out towards the shallow layers, and do not apply it to the unconditional half.
    strength : float
        Factor of the control, 0 .. 10; at 0 the picture is plain Stable Diffusion's.
    guidance_scale : float
        Classifier-free guidance, -100 .. 100; 1 is no guidance.
    seed : int
        0 .. 2**32 - 1, or -1 to draw one from 0 .. 65535.
    eta : float
        0 .. 1; 0 is deterministic DDIM, 1 is DDPM's variance.
    low_threshold, high_threshold : float
        Canny's hysteresis thresholds on the gradient, 0 .. 255, low at most high.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of its range; the message names it.
    """

    prompt: str
    added_prompt: str = ""
    negative_prompt: str = ""
    num_samples: int = 1
    image_resolution: int = 256
    ddim_steps: int = 20
    guess_mode: bool = False
    strength: float = 1.0
    guidance_scale: float = 9.0
    seed: int = -1
    eta: float = 0.0
    low_threshold: float = 100
    high_threshold: float = 200

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("prompt", "added_prompt", "negative_prompt"):
            put(name, _text(getattr(self, name), name))
        put("num_samples", _integer(self.num_samples, "num_samples", 1, MAX_SAMPLES))
        put("image_resolution", _integer(self.image_resolution, "image_resolution", 64, MAX_RESOLUTION))
        put("ddim_steps", _integer(self.ddim_steps, "ddim_steps", 1, MAX_STEPS))
        put("guess_mode", _flag(self.guess_mode, "guess_mode"))
        put("strength", _real(self.strength, "strength", 0, 10))
        put("guidance_scale", _real(self.guidance_scale, "guidance_scale", -100, 100))
        put("seed", _integer(self.seed, "seed", -1, MAX_SEED))
        put("eta", _real(self.eta, "eta", 0, 1))
        put("low_threshold", _real(self.low_threshold, "low_threshold", 0, 255))
        put("high_threshold", _real(self.high_threshold, "high_threshold", 0, 255))
        if self.low_threshold > self.high_threshold:
            raise ValueError(
                f"low_threshold {self.low_threshold:g} is above high_threshold {self.high_threshold:g}; swap them"
            )

    @property
    def conditional_text(self) -> str:
        return f"{self.prompt}, {self.added_prompt}"

    def control_scales(self, num_controls: int) -> List[List[float]]:
        """Factors of the control residuals for the conditional and the unconditional half, shallow to deep."""
        if not self.guess_mode:
            return [[self.strength] * num_controls, [self.strength] * num_controls]
        faded = [self.strength * 0.825 ** (num_controls - 1 - i) for i in range(num_controls)]
        return [faded, [0.0] * num_controls]
