"""What is measured on the tiny model's images: edges followed, colour reached, variety, sharpness. NumPy and OpenCV."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from tools.tiny.palette import HUES, hue_distance

# Canny's thresholds in the contest's call.
LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200
EDGE_RADIUS = 2.0
# Standard deviation, in degrees, of the window over the histogram of hues; the closest two words are 26 degrees apart.
HUE_SMOOTHING = 6.0
# Mean of saturation x value under which a region counts as grey.
GREY = 0.06


@dataclass(frozen=True)
class EdgeMatch:
    """Edge pixels counted both ways; sums of matches pool their pixels.

    Attributes
    ----------
    found, control : int
        Control pixels with an output pixel near them, and all of them.
    right, output : int
        Output pixels with a control pixel near them, and all of them.
    """

    found: int = 0
    control: int = 0
    right: int = 0
    output: int = 0

    def __add__(self, other: EdgeMatch) -> EdgeMatch:
        return EdgeMatch(
            self.found + other.found,
            self.control + other.control,
            self.right + other.right,
            self.output + other.output,
        )

    @property
    def recall(self) -> float:
        """Share of the control's pixels that were found, 0 .. 1."""
        return _share(self.found, self.control, self.output)

    @property
    def precision(self) -> float:
        """Share of the output's pixels that are right, 0 .. 1."""
        return _share(self.right, self.output, self.control)


def _share(part: int, whole: int, others: int) -> float:
    if whole:
        return part / whole
    return 0.0 if others else 1.0


def match_edges(control: np.ndarray, output_edges: np.ndarray, radius: float = EDGE_RADIUS) -> EdgeMatch:
    """Count the edge pixels of each map that have one of the other within a Euclidean distance.

    Two empty maps match: recall and precision are 1. Where only one is empty nothing matches, and both are 0.

    Parameters
    ----------
    control, output_edges : (H, W) arrays
        Edges are where they are not 0.
    radius : float
        In pixels; a distance of exactly `radius` counts.

    Raises
    ------
    ValueError
        The maps are not of one two-dimensional shape.
    """
    if control.ndim != 2 or control.shape != output_edges.shape:
        raise ValueError(f"expected two edge maps of one size, got shapes {control.shape} and {output_edges.shape}")
    a, b = control != 0, output_edges != 0
    if not a.any() or not b.any():
        return EdgeMatch(0, int(a.sum()), 0, int(b.sum()))
    return EdgeMatch(int((a & _near(b, radius)).sum()), int(a.sum()), int((b & _near(a, radius)).sum()), int(b.sum()))


def edge_recall_precision(
    control: np.ndarray, output_edges: np.ndarray, radius: float = EDGE_RADIUS
) -> Tuple[float, float]:
    """Recall and precision, 0 .. 1, of `match_edges`."""
    match = match_edges(control, output_edges, radius)
    return match.recall, match.precision


def _near(edges: np.ndarray, radius: float) -> np.ndarray:
    import cv2

    distance = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= radius + 1e-3  # squared distances are whole numbers: the margin only takes up rounding


def find_edges(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8 edges, 0 or 255, of an (H, W, 3) uint8 image at the contest's thresholds."""
    import cv2

    return cv2.Canny(np.ascontiguousarray(image), LOW_THRESHOLD, HIGH_THRESHOLD)


def dominant_hue(image: np.ndarray, mask: np.ndarray) -> Optional[float]:
    """The hue that most of a region has, in degrees 0 .. 360; None where the region is too grey to have one.

    Each pixel counts by its saturation times its value (HSV), so that shade, eyes and highlights weigh little; the
    histogram of one degree a bin is smoothed around the circle, and its highest bin taken.

    Parameters
    ----------
    image : (H, W, 3) uint8 array, RGB
    mask : (H, W) bool array

    Raises
    ------
    ValueError
        The mask has another size, or nothing in it.
    """
    import cv2

    if mask.shape != image.shape[:2]:
        raise ValueError(f"a mask of shape {mask.shape} does not belong to an image of shape {image.shape}")
    if not mask.any():
        raise ValueError("the mask is empty: there is no region to take a hue of")
    pixels = image[mask.astype(bool)].astype(np.float32)[None] / 255.0
    hue, saturation, value = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)[0].astype(np.float64).T
    weights = saturation * value
    if weights.mean() < GREY:
        return None
    histogram = np.bincount(np.rint(hue).astype(np.int64) % 360, weights, minlength=360)
    offsets = np.minimum(np.arange(360), 360 - np.arange(360))
    window = np.exp(-0.5 * (offsets / HUE_SMOOTHING) ** 2)
    smooth = np.fft.irfft(np.fft.rfft(histogram) * np.fft.rfft(window), 360)
    return float(np.argmax(smooth))


def nearest_colour(hue: Optional[float], hues: Mapping[str, float] = HUES) -> Optional[str]:
    """The colour word whose hue is nearest around the circle; None for None."""
    return None if hue is None else min(hues, key=lambda word: hue_distance(hue, hues[word]))


def mean_difference(a: np.ndarray, b: np.ndarray, mask: Optional[np.ndarray] = None) -> float:
    """Mean absolute difference of two (H, W, 3) uint8 images in levels of 255, of the masked pixels where given."""
    difference = np.abs(a.astype(np.int16) - b.astype(np.int16))
    return float((difference if mask is None else difference[mask]).mean())


def variety(images: Sequence[np.ndarray], mask: Optional[np.ndarray] = None) -> float:
    """Mean of `mean_difference` over all pairs of images.

    Raises
    ------
    ValueError
        Fewer than two images, or a mask with nothing in it.
    """
    if len(images) < 2:
        raise ValueError(f"variety is between images, got {len(images)}")
    if mask is not None and not mask.any():
        raise ValueError("the mask is empty: there is no region to compare")
    return float(np.mean([mean_difference(a, b, mask) for a, b in itertools.combinations(images, 2)]))


def sharpness(image: np.ndarray) -> float:
    """Mean length of the brightness gradient of an (H, W, 3) uint8 RGB image, in levels a pixel."""
    gray = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    dy, dx = np.gradient(gray)
    return float(np.hypot(dx, dy).mean())


def derangement(number: int, seed: int = 0) -> np.ndarray:
    """A random order of 0 .. number - 1 in which nothing stays in its place: one random cycle through all.

    Raises
    ------
    ValueError
        Fewer than two have no such order.
    """
    if number < 2:
        raise ValueError(f"{number} cannot be deranged; at least 2 are needed")
    cycle = np.random.default_rng(seed).permutation(number)
    result = np.empty(number, dtype=np.int64)
    result[cycle] = np.roll(cycle, 1)
    return result


def others_of_kind(kinds: Sequence[str]) -> Dict[int, List[int]]:
    """For the index of each item that shares its kind, the indices of all others of that kind, in order."""
    groups = {kind: [j for j, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    return {i: [j for j in groups[k] if j != i] for i, k in enumerate(kinds) if len(groups[k]) > 1}


def mean_and_error(values: Sequence[float]) -> Tuple[float, Optional[float]]:
    """Mean, and its standard error; None for the error of fewer than two values.

    Raises
    ------
    ValueError
        There is no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("the mean of nothing is not defined")
    if array.size < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(array.size))
