"""Measures that need no trained network. NumPy and OpenCV only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III-C.
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


@dataclass(frozen=True)
class ErrorStats:
    """How far one array is from another.

    Attributes
    ----------
    relative : float
        L2 norm of the difference over the L2 norm of the reference; 0 for equal arrays, infinite where only the
        reference is zero.
    max_abs, mean_abs : float
        Largest and mean absolute difference.
    """

    relative: float
    max_abs: float
    mean_abs: float


def _check_shapes(array: np.ndarray, reference: np.ndarray) -> None:
    if array.shape != reference.shape:
        raise ValueError(f"cannot compare shape {array.shape} with the reference's {reference.shape}")
    if array.size == 0:
        raise ValueError(f"cannot compare empty arrays of shape {array.shape}")


def _check_images(image: np.ndarray, reference: np.ndarray) -> None:
    for array in (image, reference):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"expected an H x W x 3 uint8 image, got {array.dtype} of shape {array.shape}")
    _check_shapes(image, reference)


def error_stats(array: np.ndarray, reference: np.ndarray) -> ErrorStats:
    """Error statistics of an array of any shape and real dtype, computed in double precision.

    Raises
    ------
    ValueError
        The shapes differ, the arrays are empty, or one of them holds NaN or infinity.
    """
    _check_shapes(array, reference)
    a = np.asarray(array, dtype=np.float64)
    b = np.asarray(reference, dtype=np.float64)
    for name, values in (("array", a), ("reference", b)):
        if not np.isfinite(values).all():
            raise ValueError(f"the {name} holds NaN or infinity, so its error means nothing")
    difference = np.abs(a - b)
    error, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(b))
    relative = 0.0 if error == 0 else error / norm if norm > 0 else float("inf")
    return ErrorStats(relative, float(difference.max()), float(difference.mean()))


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two H x W x 3 uint8 images in dB, infinite for equal ones.

    Raises
    ------
    ValueError
        Not two uint8 images of one shape.
    """
    _check_images(image, reference)
    mse = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity (Wang et al. 2004, eq. 13) of two H x W x 3 uint8 images, at most 1.

    Moments are weighted by an 11 x 11 Gaussian window of sigma 1.5; the map is taken where the window lies inside
    the image, and averaged over pixels and channels.

    Raises
    ------
    ValueError
        Not two uint8 images of one shape, or smaller than the window.
    """
    import cv2

    _check_images(image, reference)
    if min(image.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {image.shape[:2]}")
    kernel = cv2.getGaussianKernel(SSIM_WINDOW, SSIM_SIGMA, cv2.CV_64F)
    margin = SSIM_WINDOW // 2

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)[margin:-margin, margin:-margin]

    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))
