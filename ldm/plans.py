"""Sampling plans: which indices of a DDIM schedule are evaluated, and how each evaluation moves the latent.

A schedule of S steps has the indices S - 1 (noisiest) to 0. A plan evaluates the network at some of them,
i_0 = S - 1 > i_1 > ..., and takes every DDIM step between two evaluations with an estimate of the noise that the
network would have predicted there. With y = x / sqrt(a) and s = sqrt((1 - a) / a), a the alpha-bar of an index, a DDIM
step without fresh noise is y_{l-1} = y_l + D_l e_l with D_l = s_{l-1} - s_l (eq. 13 of arXiv:2010.02502). Where the
estimate is a weighted sum of the last two predictions, e_l = w_0(l) e_i + w_1(l) e_p, the steps of a segment from i
down to j collect to

    x_j = sqrt(a_j / a_i) x_i + sqrt(a_j) (c_0 e_i + c_1 e_p),    c_m = sum of D_l w_m(l) over l = j + 1 .. i

which is one row `x_next = A x + B e + C e_last` of the step graph. A calibrated plan may correct the weight of x as
well, y_j = (1 + c_x) y_i + c_0 e_i + c_1 e_p, and tell the network another timestep than its index's own: both cost
nothing. All of it is float64 NumPy on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Optional, Sequence, Tuple

import numpy as np

from ldm.schedule import ScheduleConfig, alpha_bars, ddim_coefficients, ddim_timesteps

# What the estimate of `linear` is linear in: the timestep, s, or half the logarithm of the signal-to-noise ratio.
VARIABLES = ("t", "s", "log-snr")


@dataclass(frozen=True)
class SamplingPlan:
    """Evaluations and their rows, in the order in which they run (noisiest first).

    Attributes
    ----------
    kind : {"exact", "subset", "linear", "calibrated"}
    num_steps : int
        S, of the schedule that is followed.
    indices : tuple of int
        The evaluated indices, falling from S - 1.
    timesteps : (E,) int64 array
    rows : (E, 3) float64 array
        A, B, C of `x_next = A x + B e + C n`; n is the last evaluation's noise, or fresh noise where `fresh_noise`.
    fresh_noise : bool
        An exact plan with eta above 0.
    detail : str
        What a receipt should add, such as the variable or what the plan was calibrated on.
    """

    kind: str
    num_steps: int
    indices: Tuple[int, ...]
    timesteps: np.ndarray
    rows: np.ndarray
    fresh_noise: bool = False
    detail: str = ""

    def __post_init__(self) -> None:
        if not np.isfinite(self.rows).all():
            raise ValueError(f"plan {self}: a coefficient is not finite")

    def __str__(self) -> str:
        count = f"{len(self.indices)} of {self.num_steps} evaluations"
        kind, detail = self.kind, self.detail
        if detail.startswith("on "):  # "calibrated on 32 cases"
            kind, detail = f"{kind} {detail}", ""
        return ", ".join(part for part in (count, kind, detail) if part)


def exact_plan(config: ScheduleConfig, num_steps: int, eta: float = 0.0) -> SamplingPlan:
    """Plain DDIM: every index evaluated.

    Raises
    ------
    ValueError
        `num_steps` is not in 1 .. train_steps.
    """
    timesteps, rows = ddim_coefficients(config, num_steps, eta)
    return SamplingPlan("exact", num_steps, tuple(range(num_steps - 1, -1, -1)), timesteps, rows, eta > 0)


def subset_plan(config: ScheduleConfig, num_steps: int, indices: Sequence[int]) -> SamplingPlan:
    """Each prediction is held until the next: DDIM on the chosen indices.

    Raises
    ------
    ValueError
        The indices do not fall from num_steps - 1 to 0 or more.
    """
    trail = _Trail(config, num_steps, indices)
    return trail.plan("subset", trail.held_moves())


def linear_plan(
    config: ScheduleConfig, num_steps: int, indices: Sequence[int], variable: str = "t", hold_last: bool = False
) -> SamplingPlan:
    """The noise between two evaluations lies on the line through the last two predictions, in `variable`.

    The first segment has one prediction only and holds it; `hold_last` does the same in the last.

    Raises
    ------
    ValueError
        As `subset_plan`, or the variable is not one of `VARIABLES`.
    """
    trail = _Trail(config, num_steps, indices)
    moves = trail.linear_moves(variable)
    if hold_last:
        moves[-1] = trail.held_moves()[-1]
    detail = f"in {variable}" + (", last held" if hold_last else "")
    return trail.plan("linear", moves, detail)


def calibrated_plan(
    config: ScheduleConfig,
    num_steps: int,
    indices: Sequence[int],
    moves: Any,
    detail: str = "",
    timesteps: Optional[Sequence[int]] = None,
) -> SamplingPlan:
    """Each segment's weights of the last two predictions, and of the latent, as they were fitted.

    Parameters
    ----------
    moves : (E, 2) or (E, 3) array of floats
        c_0 and c_1 of each segment, and c_x where there is a third column; the first segment has no earlier
        prediction, so its c_1 is 0.
    timesteps : sequence of E ints, optional
        What the network is told at each evaluation, 0 .. train_steps - 1; default: the indices' own.

    Raises
    ------
    ValueError
        As `subset_plan`, or the moves or timesteps are not of that form or not finite.
    """
    trail = _Trail(config, num_steps, indices)
    moves = np.asarray(moves, np.float64)
    count = len(trail.indices)
    if moves.shape not in ((count, 2), (count, 3)):
        raise ValueError(f"{count} evaluations need moves of shape ({count}, 2) or ({count}, 3), got {moves.shape}")
    if moves[0, 1] != 0:
        raise ValueError(f"the first segment has no earlier prediction, but its weight is {moves[0, 1]}")
    plan = trail.plan("calibrated", moves, detail)
    if timesteps is None:
        return plan
    told = np.asarray(timesteps)
    if told.shape != (count,) or told.dtype.kind not in "iu" or told.min() < 0 or told.max() >= config.train_steps:
        raise ValueError(
            f"{count} evaluations need as many whole timesteps of 0 .. {config.train_steps - 1}, got {list(timesteps)}"
        )
    return replace(plan, timesteps=told.astype(np.int64))


def held_moves(config: ScheduleConfig, num_steps: int, indices: Sequence[int]) -> np.ndarray:
    """c_0 and c_1 of `subset_plan`, (E, 2): what a calibration may start from."""
    return _Trail(config, num_steps, indices).held_moves()


def linear_moves(config: ScheduleConfig, num_steps: int, indices: Sequence[int], variable: str = "t") -> np.ndarray:
    """c_0 and c_1 of `linear_plan`, (E, 2)."""
    return _Trail(config, num_steps, indices).linear_moves(variable)


def spread_indices(num_steps: int, evaluations: int) -> Tuple[int, ...]:
    """`evaluations` indices from num_steps - 1 down to 0, spaced as evenly as whole numbers allow.

    Raises
    ------
    ValueError
        There are fewer indices than evaluations, or none is asked for.
    """
    if not 1 <= evaluations <= num_steps:
        raise ValueError(f"evaluations must be between 1 and the schedule's {num_steps} steps, got {evaluations}")
    if evaluations == 1:
        return (num_steps - 1,)
    places = np.rint(np.linspace(num_steps - 1, 0, evaluations)).astype(int)
    return tuple(int(place) for place in places)


class _Trail:
    """A schedule with the indices chosen from it; `a` and `s` have index -1's value in front, at place 0."""

    def __init__(self, config: ScheduleConfig, num_steps: int, indices: Sequence[int]) -> None:
        self.num_steps = num_steps
        self.steps = ddim_timesteps(num_steps, config.train_steps)
        self.indices = _check_indices(num_steps, indices)
        table = alpha_bars(config)
        self._a = np.concatenate([table[:1], table[self.steps]])
        self._s = np.sqrt((1 - self._a) / self._a)
        ends = np.asarray([*self.indices[1:], -1]) + 1
        self._scales = np.sqrt(self._a[ends])
        self._shrinks = np.sqrt(self._a[ends] / self._a[np.asarray(self.indices) + 1])

    def substeps(self, segment: int) -> np.ndarray:
        """D_l of the segment's DDIM steps, from its evaluated index downwards."""
        first = self.indices[segment]
        last = self.indices[segment + 1] if segment + 1 < len(self.indices) else -1
        places = np.arange(first, last, -1) + 1
        return self._s[places - 1] - self._s[places]

    def variable(self, name: str) -> np.ndarray:
        """The variable's value at each index."""
        if name not in VARIABLES:
            raise ValueError(f"variable must be one of {', '.join(VARIABLES)}, got {name!r}")
        if name == "t":
            return self.steps.astype(np.float64)
        return self._s[1:] if name == "s" else -np.log(self._s[1:])

    def held_moves(self) -> np.ndarray:
        """c_0 and c_1 of each segment where a prediction is held, (E, 2)."""
        return np.asarray([(self.substeps(k).sum(), 0.0) for k in range(len(self.indices))])

    def linear_moves(self, name: str) -> np.ndarray:
        """The same on the line through the last two predictions; the first segment has one, and holds it."""
        u, moves = self.variable(name), self.held_moves()
        for k, (before, i) in enumerate(zip(self.indices, self.indices[1:]), start=1):
            span = u[i] - u[before]
            if span != 0:  # 1,000 steps of 1,000 have their noisiest timestep twice, with no line through the two
                steps = self.substeps(k)
                slope = float((steps * (u[i - np.arange(len(steps))] - u[i])).sum() / span)
                moves[k] += (slope, -slope)
        return moves

    def plan(self, kind: str, moves: np.ndarray, detail: str = "") -> SamplingPlan:
        """The rows of (E, 2) moves, or of (E, 3) with corrections of the latent's weight."""
        shrinks = self._shrinks if moves.shape[1] == 2 else self._shrinks * (1 + moves[:, 2])
        rows = np.column_stack([shrinks, self._scales[:, None] * moves[:, :2]])
        return SamplingPlan(kind, self.num_steps, self.indices, self.steps[list(self.indices)], rows, detail=detail)


def _check_indices(num_steps: int, indices: Sequence[int]) -> Tuple[int, ...]:
    found = tuple(int(index) for index in indices)
    if not found or found[0] != num_steps - 1 or found[-1] < 0 or any(b >= a for a, b in zip(found, found[1:])):
        raise ValueError(
            f"evaluated indices must fall from {num_steps - 1}, where a schedule of {num_steps} steps begins, to 0 or"
            f" more, each once; got {list(found)}"
        )
    return found
