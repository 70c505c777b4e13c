"""The list of measures, and taking all of them that this machine can."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from cldm.weights import ALEXNET_WEIGHTS, INCEPTION_WEIGHTS
from scoring.backbones import NotMeasured, find_backbone
from scoring.lpips_distance import LpipsDistance
from scoring.metrics import error_stats, psnr, ssim
from scoring.pd import PerceptualDistance


@dataclass(frozen=True)
class Measure:
    """One column of the report: its key in JSON and CSV, its title with the unit, and its number format."""

    key: str
    title: str
    form: str


LATENCY = Measure("latency_ms", "latency ms", ".2f")
COMPARISONS: Tuple[Measure, ...] = (
    Measure("pd", "PD", ".3f"),
    Measure("lpips", "LPIPS", ".5f"),
    Measure("psnr_db", "PSNR dB", ".2f"),
    Measure("ssim", "SSIM", ".5f"),
    Measure("latent_relative_error", "latent rel. err.", ".1e"),
    Measure("pixel_max_abs", "pixel max", ".0f"),
    Measure("pixel_mean_abs", "pixel mean", ".4f"),
)


@dataclass(frozen=True)
class Comparer:
    """Compares an image with its reference.

    Attributes
    ----------
    pd : PerceptualDistance or None
    lpips : LpipsDistance or None
    not_measured : dict of str to str
        For the key of each measure that cannot be taken, what is not there and what to do.
    """

    pd: Optional[PerceptualDistance] = None
    lpips: Optional[LpipsDistance] = None
    not_measured: Dict[str, str] = field(default_factory=dict)

    def compare(
        self, image: np.ndarray, reference: np.ndarray, latent: np.ndarray, reference_latent: np.ndarray
    ) -> Dict[str, float]:
        """Every measure that can be taken, by key.

        Parameters
        ----------
        image, reference : (H, W, 3) uint8 arrays
            As `process` returns them: RGB, whatever order the picture's channels came in.
        latent, reference_latent : (N, 4, h, w) float32 arrays

        Raises
        ------
        ValueError
            Shapes differ, or a latent is not finite.
        """
        pixels = error_stats(image, reference)
        values = {
            "psnr_db": psnr(image, reference),
            "ssim": ssim(image, reference),
            "latent_relative_error": error_stats(latent, reference_latent).relative,
            "pixel_max_abs": pixels.max_abs,
            "pixel_mean_abs": pixels.mean_abs,
        }
        if self.pd is not None:
            values["pd"] = self.pd.between_images(image, reference)
        if self.lpips is not None:
            values["lpips"] = self.lpips.between_images(image, reference)
        return values


def load_comparer(folders: Optional[Sequence[Path]] = None) -> Comparer:
    """A comparer with every backbone that is on the machine.

    Raises
    ------
    ValueError
        A backbone's file is truncated or another one.
    """
    pd: Optional[PerceptualDistance] = None
    lpips: Optional[LpipsDistance] = None
    not_measured: Dict[str, str] = {}
    try:
        pd = PerceptualDistance(find_backbone(INCEPTION_WEIGHTS, "pytorch_fid", folders))
    except NotMeasured as reason:
        not_measured["pd"] = f"not measured: {reason}"
    try:
        lpips = LpipsDistance(find_backbone(ALEXNET_WEIGHTS, "lpips", folders))
    except NotMeasured as reason:
        not_measured["lpips"] = f"not measured: {reason}"
    return Comparer(pd, lpips, not_measured)


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile by linear interpolation, also where some values are infinite (the PSNR of equal images)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low if low == high or position == math.floor(position) else low + (high - low) * (position % 1)


def summarise(values: Sequence[float]) -> Dict[str, float]:
    """Mean, p50, p95 and max of a non-empty list, in the order of the report's rows."""
    numbers: List[float] = [float(value) for value in values]
    return {
        "mean": sum(numbers) / len(numbers),
        "p50": percentile(numbers, 50),
        "p95": percentile(numbers, 95),
        "max": max(numbers),
    }
