"""From a user's picture to the canny map that steers the image. No torch here."""

from __future__ import annotations

from typing import Any, Tuple

import numpy as np

# More than this is taken for a mistake: attention grows with the square of the pixels.
MAX_PIXELS = 2048 * 2048
MAX_INPUT_PIXELS = 100_000_000


def to_three_channels(image: Any) -> np.ndarray:
    """An H x W x 3 uint8 picture from a grey, three-channel or four-channel one; alpha is laid over white.

    Channels keep their order: BGR in, BGR out.

    Raises
    ------
    TypeError
        Not an array of uint8. A path that cv2.imread could not read gives None, and the message says so.
    ValueError
        Not H x W, H x W x 1, H x W x 3 or H x W x 4; empty; or beyond 100 megapixels.
    """
    if image is None:
        raise TypeError("input_image is None; cv2.imread returns that where it cannot read the file")
    if not isinstance(image, np.ndarray):
        raise TypeError(f"input_image must be a NumPy array of uint8, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"input_image must be uint8 in 0 .. 255, got {image.dtype}; convert it first")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"input_image must be H x W x 1, 3 or 4, got shape {image.shape}")
    if image.size == 0:
        raise ValueError(f"input_image is empty: shape {image.shape}")
    if image.shape[0] * image.shape[1] > MAX_INPUT_PIXELS:
        raise ValueError(f"input_image of {image.shape[1]} x {image.shape[0]} has over {MAX_INPUT_PIXELS:,} pixels")
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 4:
        color = image[:, :, :3].astype(np.float32)
        alpha = image[:, :, 3:].astype(np.float32) / 255.0
        return (color * alpha + 255.0 * (1.0 - alpha)).clip(0, 255).astype(np.uint8)
    return image


def target_size(height: int, width: int, resolution: int) -> Tuple[int, int]:
    """Height and width that a picture is resized to: its shorter side to `resolution`, both to multiples of 64.

    Raises
    ------
    ValueError
        The result is empty (a very long strip) or beyond 4 megapixels.
    """
    k = float(resolution) / min(height, width)
    new_height = int(np.round(height * k / 64.0)) * 64
    new_width = int(np.round(width * k / 64.0)) * 64
    if min(new_height, new_width) < 64 or new_height * new_width > MAX_PIXELS:
        raise ValueError(
            f"a {width} x {height} picture at resolution {resolution} would become {new_width} x {new_height};"
            f" allowed are sides of at least 64 and {MAX_PIXELS:,} pixels: crop it or change image_resolution"
        )
    return new_height, new_width


def resize_image(image: np.ndarray, resolution: int) -> np.ndarray:
    """Resize an H x W x 3 uint8 picture to `target_size`, by Lanczos upwards and by area downwards."""
    import cv2

    height, width = image.shape[:2]
    new_height, new_width = target_size(height, width, resolution)
    grows = resolution > min(height, width)
    method = cv2.INTER_LANCZOS4 if grows else cv2.INTER_AREA
    return cv2.resize(image, (new_width, new_height), interpolation=method)


def canny_map(image: Any, resolution: int, low_threshold: float, high_threshold: float) -> np.ndarray:
    """The H' x W' uint8 edge map (0 or 255) of a picture, resized as `resize_image` does."""
    import cv2

    return cv2.Canny(resize_image(to_three_channels(image), resolution), low_threshold, high_threshold)
