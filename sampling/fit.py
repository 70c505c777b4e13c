"""The moves of a plan's segments, and the deployed student that makes them.

The student starts where the reference does and goes from evaluation to evaluation. Its segments' weights are those of a
held or a linearly extrapolated noise, or are fitted, in one of two ways. `SegmentFits` takes the two weights that come
closest to what the reference itself gains in the segment. A walker without them fits as it goes: the weights that bring
the student, from where it is, closest to the reference at the segment's end, so that what it did wrong before is
corrected as far as the last two predictions can. Where a network undoes such deviations by itself, as the trained tiny
model does, the second corrects twice and is the worse of the two.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, Optional, Sequence, Tuple

import numpy as np

from ldm.plans import held_moves, linear_moves
from ldm.schedule import ScheduleConfig
from sampling.trajectory import Levels, Network, Trajectories

KINDS = ("subset", "linear", "calibrated")
# Of the fit, against the size of the normal equations' diagonal: it matters only where two predictions are all but
# parallel, where it keeps the weights near the linear ones.
RIDGE = 1e-4
# Trial plans that begin alike share their evaluations while these fit here.
CACHE_BYTES = 512 << 20

Indices = Tuple[int, ...]
# c_0 and c_1; a third number, where there is one, is the correction c_x of the latent's weight.
Move = Tuple[float, ...]


@lru_cache(maxsize=65536)
def rule_move(config: ScheduleConfig, num_steps: int, evaluated: Indices, end: int, linear: bool) -> Move:
    """c_0 and c_1 of the segment from the last of `evaluated` down to `end`, held or linear in the timestep.

    Of `evaluated` the last two decide; the noisiest index of the schedule is put before them where it is missing.
    """
    moves = linear_moves if linear else held_moves
    indices = evaluated if evaluated[0] == num_steps - 1 else (num_steps - 1, *evaluated)
    place = len(indices) - 1
    newest, last = moves(config, num_steps, indices if end < 0 else (*indices, end))[place]
    return float(newest), float(last)


def fit_move(target: np.ndarray, noise: np.ndarray, last: Optional[np.ndarray], prior: Move, ridge: float) -> Move:
    """The weights with which two predictions come closest to a target, drawn towards a prior.

    Minimises |target - c_0 noise - c_1 last|^2 + ridge (|noise|^2 (c_0 - prior_0)^2 + |last|^2 (c_1 - prior_1)^2).

    Parameters
    ----------
    target, noise, last : arrays of one shape
        Without `last`, c_1 is 0.
    """
    found = fit_moves(
        *(np.asarray([value]) for value in _products(target, noise, last)), np.asarray([prior], np.float64), ridge
    )[0]
    return float(found[0]), float(found[1])


def _products(
    target: np.ndarray, noise: np.ndarray, last: Optional[np.ndarray]
) -> Tuple[float, float, float, float, float]:
    """<t, n>, <t, l>, <n, n>, <n, l>, <l, l>; those of an absent `last` are 0."""
    t, n = (np.asarray(array, np.float64).ravel() for array in (target, noise))
    if last is None:
        return float(t @ n), 0.0, float(n @ n), 0.0, 0.0
    m = np.asarray(last, np.float64).ravel()
    return float(t @ n), float(t @ m), float(n @ n), float(n @ m), float(m @ m)


def fit_moves(
    tn: np.ndarray, tl: np.ndarray, nn: np.ndarray, nl: np.ndarray, ll: np.ndarray, prior: np.ndarray, ridge: float
) -> np.ndarray:
    """`fit_move` from inner products, for N fits at once.

    Parameters
    ----------
    tn, tl, nn, nl, ll : (N,) arrays
        Products of target, noise and last; where `ll` is 0 there is no last prediction.
    prior : (N, 2) array

    Returns
    -------
    (N, 2) float64 array
    """
    first = tn + ridge * nn * prior[:, 0]
    second = tl + ridge * ll * prior[:, 1]
    left, right = (1 + ridge) * nn, (1 + ridge) * ll
    alone = ll == 0
    determinant = np.where(alone, left, left * right - nl * nl)
    newest = np.where(alone, first, right * first - nl * second) / determinant
    earlier = np.where(alone, 0.0, (left * second - nl * first) / determinant)
    return np.stack([newest, earlier], axis=1)


@dataclass(frozen=True)
class Outcome:
    """Where a student ended.

    Attributes
    ----------
    moves : (E, 2) or (E, 3) float64 array
    final : (K, D) float32 array
        Final latents.
    errors : (K,) float64 array
        Relative error of each against the reference's.
    """

    moves: np.ndarray
    final: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class State:
    """A student at an evaluated index: where it is, and what the network said there and one evaluation before."""

    y: np.ndarray
    noise: np.ndarray
    last: Optional[np.ndarray]
    moves: Tuple[Move, ...]

    @property
    def num_bytes(self) -> int:
        return self.y.nbytes + self.noise.nbytes


class SegmentFits:
    """Moves fitted to what the reference gains in a segment, from the recorded noises at the two evaluations.

    Parameters
    ----------
    gram : (S, S) array
        `sampling.gram.gram_matrix` of the trajectories to fit to.
    """

    def __init__(self, gram: np.ndarray, levels: Levels, ridge: float = RIDGE) -> None:
        self._gram = gram
        self._levels = levels
        self._ridge = ridge
        self._known: Dict[Tuple[Indices, int], Move] = {}

    def __call__(self, evaluated: Indices, end: int) -> Move:
        """c_0 and c_1 of the segment from the last of `evaluated` down to `end`."""
        pair = evaluated[-2:]
        if (pair, end) not in self._known:
            newest, last = pair[-1], pair[0]
            prior = rule_move(self._levels.config, self._levels.num_steps, pair, end, True)
            gained = self._levels.steps[end + 1 : newest + 1] @ self._gram[end + 1 : newest + 1]
            first = len(pair) == 1
            products = (
                gained[newest],
                0.0 if first else gained[last],
                self._gram[newest, newest],
                0.0 if first else self._gram[newest, last],
                0.0 if first else self._gram[last, last],
            )
            found = fit_moves(*(np.asarray([value]) for value in products), np.asarray([prior]), self._ridge)[0]
            self._known[pair, end] = (float(found[0]), float(found[1]))
        return self._known[pair, end]


class Walker:
    """Walks students along recorded trajectories, and remembers where they were at each index.

    Two plans whose first indices agree, and the index after them, have the same student until there.

    Parameters
    ----------
    network : callable
        Knows the trajectories' cases by the numbers in `cases`.
    kind : {"subset", "linear", "calibrated"}
        What gives the moves.
    cases : sequence of int, optional
        Default 0 .. K - 1.
    fits : SegmentFits, optional
        For "calibrated": moves fitted before; default: fitted to the student as it goes.
    """

    def __init__(
        self,
        network: Network,
        levels: Levels,
        trajectories: Trajectories,
        kind: str,
        cases: Optional[Sequence[int]] = None,
        fits: Optional[SegmentFits] = None,
        ridge: float = RIDGE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if trajectories.num_steps != levels.num_steps:
            raise ValueError(f"trajectories of {trajectories.num_steps} steps on a schedule of {levels.num_steps}")
        self.levels = levels
        self.trajectories = trajectories
        self.kind = kind
        self.evaluations = 0
        self._network = network
        self._cases = list(range(trajectories.cases) if cases is None else cases)
        self._fits = fits
        self._ridge = ridge
        self._room = cache_bytes
        self._norms = final_norms(trajectories)
        self._states: OrderedDict[Indices, State] = OrderedDict()

    def walk(self, indices: Sequence[int]) -> Outcome:
        """The student of a plan: the moves that the kind gives it, and where it ends."""
        indices = tuple(indices)
        return self._finish(self.state(indices), indices)

    def follow(self, indices: Sequence[int], moves: np.ndarray, timesteps: Optional[Sequence[int]] = None) -> Outcome:
        """The student of given moves, and of given timesteps where they are not the indices' own; not remembered."""
        indices = tuple(indices)
        told = self.levels.timesteps[list(indices)] if timesteps is None else timesteps
        state = self._start(int(told[0]))
        for k in range(1, len(indices)):
            state = self._step(state, _as_move(moves[k - 1]), indices[k], int(told[k]))
        return self._finish(state, indices, np.asarray(moves))

    def noise(self, timestep: int, latents: np.ndarray) -> np.ndarray:
        """The noise of (N K, D) latents, N times all cases in turn."""
        self.evaluations += len(latents)
        return self._network(self._cases * (len(latents) // len(self._cases)), timestep, latents)

    def finish(self, state: State, move: Move) -> np.ndarray:
        """The (K, D) final latents, from the last evaluation's state and its move."""
        return (self.levels.scale(-1) * _moved(state, move)).astype(np.float32)

    def errors(self, final: np.ndarray) -> np.ndarray:
        """Relative error of each final latent."""
        return np.linalg.norm(self.relative(final), axis=1)

    def relative(self, final: np.ndarray) -> np.ndarray:
        """(K, D) float64: what the final latents miss, over the norm of each case's reference."""
        return (final.astype(np.float64) - self.trajectories.final) / self._norms[:, None]

    def _finish(self, state: State, indices: Indices, moves: Optional[np.ndarray] = None) -> Outcome:
        move = self._move(state, indices, -1) if moves is None else _as_move(moves[-1])
        final = self.finish(state, move)
        done = np.asarray([*state.moves, move]) if moves is None else moves
        return Outcome(done, final, self.errors(final))

    def state(self, evaluated: Indices) -> State:
        """The student at the last of `evaluated`, with the prediction made there."""
        found = self._states.get(evaluated)
        if found is not None:
            self._states.move_to_end(evaluated)
            return found
        if len(evaluated) == 1:
            found = self._start()
        else:
            before = self.state(evaluated[:-1])
            found = self._step(before, self._move(before, evaluated[:-1], evaluated[-1]), evaluated[-1])
        self._states[evaluated] = found
        while len(self._states) > 1 and len(self._states) * found.num_bytes > self._room:
            self._states.popitem(last=False)
        return found

    def _start(self, timestep: Optional[int] = None) -> State:
        """Student and reference begin at one latent: nothing is evaluated unless the network is told another time."""
        index = self.levels.num_steps - 1
        y = (self.trajectories.initial / self.levels.scale(index)).astype(np.float32)
        own = timestep is None or timestep == self.levels.timesteps[index]
        noise = self.trajectories.noises[:, index] if own else self.noise(int(timestep or 0), self.trajectories.initial)
        return State(y, noise, None, ())

    def _step(self, state: State, move: Move, index: int, timestep: Optional[int] = None) -> State:
        y = _moved(state, move)
        told = int(self.levels.timesteps[index]) if timestep is None else timestep
        noise = self.noise(told, (self.levels.scale(index) * y).astype(np.float32))
        return State(y.astype(np.float32), noise, state.noise, (*state.moves, move))

    def _move(self, state: State, evaluated: Indices, end: int) -> Move:
        if self.kind == "calibrated" and self._fits is not None:
            return self._fits(evaluated, end)
        config, num_steps = self.levels.config, self.levels.num_steps
        rule = rule_move(config, num_steps, evaluated, end, self.kind != "subset")
        if self.kind != "calibrated":
            return rule
        target = self.trajectories.latents[:, end + 1] / self.levels.scale(end) - state.y
        # Relative errors are what counts in the end, so each case is weighed by its final latent's norm.
        weighed = [None if a is None else a / self._norms[:, None] for a in (target, state.noise, state.last)]
        return fit_move(weighed[0], weighed[1], weighed[2], rule, self._ridge)


def final_norms(trajectories: Trajectories) -> np.ndarray:
    """(K,) norms of the final latents.

    Raises
    ------
    ValueError
        One is zero or not finite, and no error could be relative to it.
    """
    norms = np.linalg.norm(trajectories.final.astype(np.float64), axis=1)
    if not (np.isfinite(norms).all() and norms.min() > 0):
        raise ValueError("a reference's final latent is zero or not finite")
    return norms


def _as_move(values: Sequence[float]) -> Move:
    return tuple(float(value) for value in values)


def _moved(state: State, move: Move) -> np.ndarray:
    y = state.y.astype(np.float64) + move[0] * state.noise.astype(np.float64)
    if len(move) == 3:
        y += move[2] * state.y
    return y if state.last is None else y + move[1] * state.last.astype(np.float64)
