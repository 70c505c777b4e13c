"""An estimate of the 2023 contest's score from latency and PD, fitted to what its teams published.

The contest's formula was not published. Its rules say that the score falls with the time and with PD, and that a PD
above 12 fails (NVIDIA/trt-samples-for-hackathon-cn, Hackathon2023/preliminary_round.md); teams noticed that it falls
much faster above a PD of 8. So the estimate is

    log score = c_0 + c_1 ms + c_2 PD + c_3 max(0, PD - 8)

by least squares. It is about the contest's A10; on another GPU it says what an A10 as fast would have scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy as np

from scoring.pd import PD_LIMIT

PD_KNEE = 8.0
SOURCE = "published by teams of the TensorRT Hackathon 2023, one A10, PD against PyTorch FP32"


@dataclass(frozen=True)
class PublishedPoint:
    """A submission: what it ran, milliseconds an image, mean PD and the contest's score.

    Attributes
    ----------
    fitted : bool
        False for a point that the formula does not describe; it is shown with its error all the same.
    """

    name: str
    milliseconds: float
    pd: float
    score: float
    fitted: bool = True


PUBLISHED: Tuple[PublishedPoint, ...] = (
    PublishedPoint("FP32 engine, 20 steps", 1374, 1.09, 2625, fitted=False),
    PublishedPoint("FP16, batch 2, 20 steps", 633, 4.05, 2834),
    PublishedPoint("14 of 20 steps evaluated", 353, 4.89, 5788),
    PublishedPoint("12 of 20", 293, 5.47, 6718),
    PublishedPoint("12 of 20, GroupNorm plugin, FP32 pins off", 240, 6.83, 7391),
    PublishedPoint("10 of 20", 201, 7.55, 7885),
    PublishedPoint("9 of 20", 186, 8.00, 8041),
    PublishedPoint("8 of 20", 168, 8.95, 6349),
)


@dataclass(frozen=True)
class ScoreFit:
    """The formula above, fitted.

    Attributes
    ----------
    coefficients : tuple of float
        c_0 .. c_3.
    span_ms : (float, float)
        Lowest and highest latency of the fitted points; beyond them an estimate is an extrapolation.
    """

    coefficients: Tuple[float, ...]
    span_ms: Tuple[float, float] = (0.0, math.inf)

    def covers(self, milliseconds: float) -> bool:
        """Whether a latency is within those of the fitted points."""
        return self.span_ms[0] <= milliseconds <= self.span_ms[1]

    def estimate(self, milliseconds: float, pd: float) -> float:
        """Estimated score; 0 where PD fails."""
        if pd > PD_LIMIT:
            return 0.0
        return math.exp(float(np.dot(_terms(milliseconds, pd), self.coefficients)))


def _terms(milliseconds: float, pd: float) -> List[float]:
    return [1.0, milliseconds, pd, max(0.0, pd - PD_KNEE)]


def fit_score(points: Sequence[PublishedPoint] = PUBLISHED) -> ScoreFit:
    """Least squares of the logarithm over the points that are `fitted`.

    Raises
    ------
    ValueError
        The points do not determine the coefficients, as with fewer than four or none above a PD of 8.
    """
    used = [point for point in points if point.fitted]
    terms = np.asarray([_terms(point.milliseconds, point.pd) for point in used])
    solved, _, rank, _ = np.linalg.lstsq(terms, np.log([point.score for point in used]), rcond=None)
    if rank < terms.shape[1]:
        raise ValueError(f"{len(used)} published points do not determine {terms.shape[1]} coefficients")
    latencies = [point.milliseconds for point in used]
    return ScoreFit(tuple(float(value) for value in solved), (min(latencies), max(latencies)))


def left_out_error(points: Sequence[PublishedPoint] = PUBLISHED) -> float:
    """Largest relative error at a fitted point that the fit has not seen; points above the knee are always seen."""
    errors = []
    for point in points:
        if point.fitted and point.pd <= PD_KNEE:
            fit = fit_score([other for other in points if other is not point])
            errors.append(abs(fit.estimate(point.milliseconds, point.pd) / point.score - 1))
    return max(errors)


def describe_fit(fit: ScoreFit, points: Sequence[PublishedPoint] = PUBLISHED) -> str:
    """The formula with its numbers, every published point with the fit's error, and how far to trust it."""
    c0, c1, c2, c3 = fit.coefficients
    width = max(len(point.name) for point in points)
    lines = [
        "The contest's score, an estimate: its formula was not published.",
        f"  score = {math.exp(c0):.0f} x exp(-ms / {-1 / c1:.0f} - {-c2:.4f} PD - {-c3:.4f} max(0, PD - {PD_KNEE:g})),"
        f" 0 above PD {PD_LIMIT:g}",
        f"  fitted to points {SOURCE}:",
        f"  {'':{width}}  {'ms':>6}  {'PD':>5}  {'score':>6}  {'fit':>6}  error",
    ]
    for point in points:
        found = fit.estimate(point.milliseconds, point.pd)
        note = "" if point.fitted else "  not described by the formula, left out of the fit"
        lines.append(
            f"  {point.name:{width}}  {point.milliseconds:6.0f}  {point.pd:5.2f}  {point.score:6.0f}  {found:6.0f}"
            f"  {100 * (found / point.score - 1):+.1f} %{note}"
        )
    lines.append(
        f"  A fitted point up to PD {PD_KNEE:g} that is left out is missed by at most"
        f" {100 * left_out_error(points):.0f} %. Above it one point alone decides."
    )
    low, high = fit.span_ms
    lines.append(f"  The fitted points span {low:g} to {high:g} ms; outside it an estimate is an extrapolation.")
    return "\n".join(lines)
