"""All moves of a plan at once, refined on the end point: damped Gauss-Newton with few evaluations.

A network undoes part of what a student does wrong, and more in some directions than in others, so that moves which end
each segment closest to the reference do not end the last one there. Here the final latent's error itself is brought
down. Its Jacobian is measured once by finite differences, each column from its segment on; after every step that helps
it is corrected by Broyden's rank-one update (Broyden 1965, "A class of methods for solving nonlinear simultaneous
equations") instead of being measured again.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np

from sampling.fit import Walker

# Steps of the finite differences against the held move: of the newest weight alone, and of one moved from the last to
# the newest, which matters less as the two predictions are alike.
STEP_ALONE = 0.01
STEP_BETWEEN = 0.1
# Against the diagonal of the normal equations.
FIRST_DAMPING = 0.03
TRIALS = 8


def polish(walker: Walker, indices: Sequence[int], moves: np.ndarray, trials: int = TRIALS) -> Tuple[np.ndarray, float]:
    """Moves whose final latents are closer to the reference's, over the walker's cases.

    Parameters
    ----------
    moves : (E, 2) array
        Where to begin.
    trials : int
        Steps to try, each E - 1 evaluations a case; the Jacobian costs about E (E - 1).

    Returns
    -------
    moves : (E, 2) float64 array
        The best found, which may be the given ones.
    error : float
        Root-mean-square relative error with them.
    """
    indices = tuple(indices)
    moves = np.array(moves, np.float64)
    basis = _basis(moves, indices, walker)
    residual = _residual(walker, walker.follow(indices, moves).final)
    jacobian = _jacobian(walker, indices, moves, basis, residual)
    damping = FIRST_DAMPING
    for _ in range(trials):
        step = _solve(jacobian, residual, damping)
        trial = moves + np.tensordot(step, basis, 1)
        found = _residual(walker, walker.follow(indices, trial).final)
        change = found - residual
        jacobian += np.outer(change - jacobian @ step, step / (step @ step)).astype(np.float32)
        if np.isfinite(found).all() and found @ found < residual @ residual:
            small = found @ found > 0.995 * (residual @ residual)
            moves, residual = trial, found
            damping = damping / 3
            if small:
                break
        else:
            damping = damping * 10
    return moves, float(np.linalg.norm(residual) / np.sqrt(walker.trajectories.cases))


def _basis(moves: np.ndarray, indices: Sequence[int], walker: Walker) -> np.ndarray:
    """(P, E, 2): the directions in which moves are varied, each as long as a finite difference."""
    directions: List[np.ndarray] = []
    ends = [*indices[1:], -1]
    for k, (first, end) in enumerate(zip(indices, ends)):
        size = abs(float(walker.levels.steps[end + 1 : first + 1].sum()))
        choices = [(STEP_ALONE, 0.0)] if k == 0 else [(STEP_ALONE, 0.0), (STEP_BETWEEN, -STEP_BETWEEN)]
        for choice in choices:
            direction = np.zeros_like(moves)
            direction[k] = size * np.asarray(choice)
            directions.append(direction)
    return np.asarray(directions)


def _residual(walker: Walker, final: np.ndarray) -> np.ndarray:
    """(K D,) float64: the final latents' errors, each case's relative to its reference."""
    return walker.relative(final).ravel()


def _jacobian(
    walker: Walker, indices: Tuple[int, ...], moves: np.ndarray, basis: np.ndarray, residual: np.ndarray
) -> np.ndarray:
    """(K D, P) float32: the residual's change with a unit of each direction."""
    states = walker.states(indices, moves)
    jacobian = np.empty((residual.size, len(basis)), np.float32)
    for column, direction in enumerate(basis):
        segment = int(np.flatnonzero(direction.any(axis=1))[0])
        changed = moves + direction
        last = walker.advance(states[segment], indices, changed, segment)
        final = walker.finish(last, (float(changed[-1, 0]), float(changed[-1, 1])))
        jacobian[:, column] = _residual(walker, final) - residual
    return jacobian


def _solve(jacobian: np.ndarray, residual: np.ndarray, damping: float) -> np.ndarray:
    """The damped Gauss-Newton step."""
    normal = (jacobian.T @ jacobian).astype(np.float64)
    diagonal = np.diag(normal)
    right = jacobian.T @ residual.astype(np.float32)
    return np.asarray(np.linalg.solve(normal + damping * np.diag(diagonal + 1e-12 * diagonal.max()), -right))
