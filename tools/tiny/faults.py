"""Ways to spoil a finished picture, for scenes whose captions say that they are bad."""

from __future__ import annotations

from typing import Sequence, Tuple

import cv2
import numpy as np

from tools.tiny.chance import Chance


def spoil(image: np.ndarray, mask: np.ndarray, faults: Sequence[str], chance: Chance) -> Tuple[np.ndarray, np.ndarray]:
    """Apply the faults to an (H, W, 3) uint8 picture and its (H, W) bool mask.

    Faults of the drawing itself ("longbody", "anatomy") are passed over.
    """
    height, width = mask.shape
    for fault in faults:
        if fault == "blur":
            image = cv2.GaussianBlur(image, (0, 0), chance.between(1.6, 4.0))
        elif fault == "noise":  # weak enough to trip an edge detector in few places only
            noise = chance.rng.standard_normal(image.shape, dtype=np.float32) * chance.between(6, 13)
            image = np.clip(image + noise, 0, 255).astype(np.uint8)
        elif fault == "blocks":
            _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, chance.whole(3, 10)])
            image = cv2.imdecode(packed, cv2.IMREAD_COLOR)
        elif fault == "lowres":
            factor = chance.between(3.5, 8)
            small = cv2.resize(image, (int(width / factor), int(height / factor)), interpolation=cv2.INTER_AREA)
            way = chance.pick((cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC))
            image = cv2.resize(small, (width, height), interpolation=way)
        elif fault == "washed":
            grey = chance.between(90, 190)
            image = np.clip(grey + (image - grey) * chance.between(0.25, 0.5), 0, 255).astype(np.uint8)
        elif fault == "crop":
            image, mask = _crop(image, mask, chance)
    return image, mask


def _crop(image: np.ndarray, mask: np.ndarray, chance: Chance) -> Tuple[np.ndarray, np.ndarray]:
    """An enlarged corner, which cuts the main object."""
    height, width = mask.shape
    part = chance.between(0.42, 0.65)
    h, w = int(height * part), int(width * part)
    x, y = chance.pick((0, width - w)), chance.pick((0, (height - h) // 2, height - h))
    cut = cv2.resize(image[y : y + h, x : x + w], (width, height), interpolation=cv2.INTER_LINEAR)
    kept = cv2.resize(mask[y : y + h, x : x + w].astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return cut, kept > 0
