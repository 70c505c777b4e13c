"""All numbers of a plan at once, refined on the end point: damped Gauss-Newton with early stopping.

A network undoes part of what a student does wrong, and more in some directions than in others, so that moves which end
each segment closest to the reference do not end the last one there. Here the final latents' mean relative error itself
is brought down, over each segment's weights of the last two predictions and of the latent, and over the timesteps that
the network is told. The Jacobian is measured by finite differences, all columns in one batch; between two measurements
it is corrected by Broyden's rank-one update (Broyden 1965, "A class of methods for solving nonlinear simultaneous
equations"). Weights see to it that the mean counts and not the mean square (iteratively reweighted least squares).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch

from sampling.fit import Indices, Walker, final_norms

# Steps of the finite differences, the first two against the held move: the newest weight alone; one moved from the last
# to the newest, which matters less as the two are alike; the weight of the clean latent that the newest one tells of.
STEP_ALONE = 0.01
STEP_BETWEEN = 0.1
STEP_CLEAN = 0.02
STEP_TIME = 4
# Against the diagonal of the normal equations: of a step, and of all that was changed since the start.
FIRST_DAMPING = 0.01
RIDGE = 1e-3
# Of a case's error in the mean error: smaller ones weigh no more.
LEAST_WEIGHED = 0.25
ROUNDS = 8
STEPS_A_ROUND = 3
# Rounds without a better validation after which it ends.
PATIENCE = 2


@dataclass(frozen=True)
class Polished:
    """What a polish found.

    Attributes
    ----------
    moves : (E, 3) float64 array
    timesteps : tuple of E ints
    fit_error, error : float
        Mean relative errors over the cases that were fitted, and over those that chose between the rounds.
    """

    moves: np.ndarray
    timesteps: Tuple[int, ...]
    fit_error: float
    error: float


def polish(
    fitted: Walker,
    chosen: Walker,
    indices: Sequence[int],
    moves: np.ndarray,
    timesteps: Optional[Sequence[int]] = None,
    rounds: int = ROUNDS,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Polished:
    """Moves and timesteps whose final latents are closer to the reference's.

    Parameters
    ----------
    fitted : Walker
        Over the cases whose error is brought down.
    chosen : Walker
        Over other cases: of the start and all rounds the best here is taken.
    moves : (E, 2) or (E, 3) array
        Where to begin.
    timesteps : sequence of E ints, optional
        Default: the indices' own.
    rounds : int
        Jacobians to measure, each about 2 E^2 evaluations a case.
    out_of_time : callable
        Asked before each round.
    """
    problem = _Problem(fitted, tuple(indices), moves, timesteps)
    place = np.zeros(len(problem.basis))
    residual = problem.residual(place)
    best = problem.found(place, residual, chosen)
    damping, idle = FIRST_DAMPING, 0
    for _ in range(rounds):
        if out_of_time() or idle == PATIENCE:
            break
        before = _mean(residual)
        place, residual, damping = _round(problem, place, residual, damping)
        found = problem.found(place, residual, chosen)
        idle = 0 if found.error < best.error else idle + 1
        best = found if found.error < best.error else best
        if _mean(residual) > 0.997 * before:
            break
    return best


def _round(
    problem: _Problem, place: np.ndarray, residual: np.ndarray, damping: float
) -> Tuple[np.ndarray, np.ndarray, float]:
    """One Jacobian, and a few steps with it."""
    jacobian = problem.jacobian(place)
    for _ in range(STEPS_A_ROUND):
        step = _solve(jacobian, residual, place, damping)
        found = problem.residual(place + step)
        change, small = (found - residual).ravel(), step.astype(np.float32)
        jacobian += np.outer(change - jacobian @ small, small / (small @ small))
        if np.isfinite(found).all() and _mean(found) < _mean(residual):
            place, residual, damping = place + step, found, damping / 3
        else:
            damping = damping * 8
    return place, residual, min(damping, 1.0)


def _solve(jacobian: np.ndarray, residual: np.ndarray, place: np.ndarray, damping: float) -> np.ndarray:
    """The damped Gauss-Newton step, each case weighed by the inverse of its error."""
    errors = np.linalg.norm(residual, axis=1)
    weights = 1 / np.maximum(errors, max(LEAST_WEIGHED * errors.mean(), 1e-30))
    rows = np.repeat(np.sqrt(weights / weights.sum()), residual.shape[1]).astype(np.float32)
    scaled = jacobian * rows[:, None]
    normal = (scaled.T @ scaled).astype(np.float64)
    diagonal = np.diag(normal) + 1e-9 * np.diag(normal).max() + 1e-30
    right = (scaled.T @ (residual.ravel() * rows)).astype(np.float64) + RIDGE * diagonal * place
    return np.asarray(np.linalg.solve(normal + (damping + RIDGE) * np.diag(diagonal), -right))


def _mean(residual: np.ndarray) -> float:
    return float(np.linalg.norm(residual.astype(np.float64), axis=1).mean())


class _Problem:
    """A plan as a point in units of the finite differences, 0 being where it began.

    Attributes
    ----------
    basis : (P, E, 4) float64 array
        What a unit of each variable adds to c_0, c_1, c_x and the timestep of the evaluations.
    """

    def __init__(
        self, walker: Walker, indices: Indices, moves: np.ndarray, timesteps: Optional[Sequence[int]] = None
    ) -> None:
        levels = walker.levels
        self._walker = walker
        self._indices = indices
        moves = np.asarray(moves, np.float64)
        told = levels.timesteps[list(indices)] if timesteps is None else np.asarray(timesteps)
        self._start = np.zeros((len(indices), 4))
        self._start[:, : moves.shape[1]] = moves
        self._start[:, 3] = told
        self.basis = _basis(walker, indices, self._start)

    def values(self, place: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Moves (E, 3) and whole timesteps (E,)."""
        values = self._start + np.tensordot(place, self.basis, 1)
        highest = self._walker.levels.config.train_steps - 1
        return values[:, :3], np.clip(np.rint(values[:, 3]), 0, highest).astype(int)

    def residual(self, place: np.ndarray, walker: Optional[Walker] = None) -> np.ndarray:
        """(K, D) float32: what the final latents miss, each case's relative to its reference."""
        walker = walker or self._walker
        moves, timesteps = self.values(place)
        return walker.relative(walker.follow(self._indices, moves, timesteps).final).astype(np.float32)

    def found(self, place: np.ndarray, residual: np.ndarray, chosen: Walker) -> Polished:
        moves, timesteps = self.values(place)
        error = _mean(self.residual(place, chosen))
        return Polished(moves, tuple(int(t) for t in timesteps), _mean(residual), error)

    def jacobian(self, place: np.ndarray) -> np.ndarray:
        """(K D, P) float32: the residual's change with a unit of each variable."""
        moves, timesteps = self.values(place)
        return _final_changes(self._walker, self._indices, moves, timesteps, self.basis)


def _basis(walker: Walker, indices: Indices, start: np.ndarray) -> np.ndarray:
    levels = walker.levels
    directions: List[np.ndarray] = []
    for k, (first, end) in enumerate(zip(indices, [*indices[1:], -1])):
        size = abs(float(levels.steps[end + 1 : first + 1].sum()))
        noise = float(np.sqrt(1 / levels.scale(first) ** 2 - 1))
        clean = STEP_CLEAN * min(size, 1.0)
        time = STEP_TIME if start[k, 3] + STEP_TIME < levels.config.train_steps else -STEP_TIME
        choices = [(size * STEP_ALONE, 0.0, 0.0, 0), (-clean * noise, 0.0, clean, 0), (0.0, 0.0, 0.0, time)]
        if k > 0:
            choices.append((size * STEP_BETWEEN, -size * STEP_BETWEEN, 0.0, 0))
        for choice in choices:
            direction = np.zeros_like(start)
            direction[k] = choice
            directions.append(direction)
    return np.asarray(directions)


def _final_changes(
    walker: Walker,
    indices: Indices,
    moves: np.ndarray,
    timesteps: np.ndarray,
    basis: np.ndarray,
) -> np.ndarray:
    """All students that differ in one variable, walked together from the evaluation at which they begin to differ."""
    levels, cases, size = walker.levels, *walker.trajectories.initial.shape
    evaluated = [int(np.flatnonzero(direction.any(axis=1))[0]) for direction in basis]
    order: List[int] = []  # of the students after the plain one, which is the first
    y = torch.from_numpy((walker.trajectories.initial / levels.scale(indices[0])).astype(np.float32))[None]
    last = torch.zeros_like(y)
    for k, index in enumerate(indices):
        own = [p for p, place in enumerate(evaluated) if place == k]
        latents = (levels.scale(index) * y).reshape(-1, size).numpy()
        noise = torch.from_numpy(walker.noise(int(timesteps[k]), latents)).reshape(y.shape)
        fresh = noise[:1].repeat(len(own), 1, 1)
        for row, p in enumerate(own):
            if basis[p, k, 3]:
                fresh[row] = torch.from_numpy(walker.noise(int(timesteps[k] + basis[p, k, 3]), latents[:cases]))
        weights = np.concatenate([np.repeat(moves[k][None], len(y), axis=0), moves[k] + basis[own, k, :3]])
        newest, before, stays = torch.from_numpy(weights.astype(np.float32).T.copy())[:, :, None, None]
        noise = torch.cat([noise, fresh])
        y, last = (torch.cat([array, array[:1].expand(len(own), -1, -1)]) for array in (y, last))
        y = ((1 + stays) * y).addcmul_(newest, noise).addcmul_(before, last)
        last = noise
        order += own
    # Against the plain student of the same batch, whose rounding is the same.
    norms = torch.from_numpy(final_norms(walker.trajectories).astype(np.float32))[:, None]
    changes = levels.scale(-1) * (y[1:] - y[:1]) / norms
    jacobian = np.empty((cases * size, len(basis)), np.float32)
    jacobian[:, order] = changes.reshape(len(basis), -1).numpy().T
    return jacobian
