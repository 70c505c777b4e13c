"""Open-loop errors of very many plans at once, from inner products of the recorded noises, without any evaluation.

Open loop means: with the noises that the network predicted along the reference, as if it predicted the same along the
student's path. Then every latent on the way is the initial one plus a weighted sum of the S recorded noises, and the
student's distance to the reference a quadratic form in their S x S Gram matrix.
"""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np

from ldm.schedule import ddim_timesteps
from sampling.fit import RIDGE, final_norms, fit_moves
from sampling.trajectory import Levels, Trajectories

# Plans scored at a time: some 100 MB of temporaries for 20 steps.
CHUNK = 32768


def gram_matrix(trajectories: Trajectories, levels: Levels) -> np.ndarray:
    """(S, S) float64: v^T G v is the mean squared relative error of a final latent that misses sum_l v_l e_l in y."""
    weight = levels.scale(-1) / final_norms(trajectories)
    total = np.zeros((levels.num_steps, levels.num_steps))
    for noises, factor in zip(trajectories.noises, weight):
        scaled = factor * noises.astype(np.float64)
        total += scaled @ scaled.T
    return total / trajectories.cases


def open_loop(
    gram: np.ndarray, levels: Levels, subsets: np.ndarray, kind: str, ridge: float = RIDGE
) -> Tuple[np.ndarray, np.ndarray]:
    """Moves and root-mean-square relative errors of N plans of E evaluations.

    Parameters
    ----------
    subsets : (N, E) int array
        Evaluated indices of each, falling from S - 1.
    kind : {"subset", "linear", "calibrated"}
        The last with the moves of `sampling.fit.SegmentFits`.

    Returns
    -------
    moves : (N, E, 2) float64
    errors : (N,) float64
    """
    parts = [
        _open_loop(gram, levels, subsets[first : first + CHUNK], kind, ridge) for first in range(0, len(subsets), CHUNK)
    ]
    return np.concatenate([moves for moves, _ in parts]), np.concatenate([errors for _, errors in parts])


def _open_loop(
    gram: np.ndarray, levels: Levels, subsets: np.ndarray, kind: str, ridge: float
) -> Tuple[np.ndarray, np.ndarray]:
    count, evaluations = subsets.shape
    rows = np.arange(count)
    # What the reference has gained over the student so far, as weights of the recorded noises.
    ahead = np.zeros((count, levels.num_steps))
    moves = np.zeros((count, evaluations, 2))
    ends = np.concatenate([subsets[:, 1:], np.full((count, 1), -1)], axis=1)
    for k in range(evaluations):
        newest, last = subsets[:, k], subsets[:, k - 1] if k else None
        steps = segment_steps(levels, newest, ends[:, k])
        moves[:, k] = rule_moves(levels, steps, newest, last, kind != "subset")
        ahead += steps
        if kind == "calibrated":
            products = steps @ gram
            other = newest if last is None else last
            none = 0.0 if last is None else 1.0
            moves[:, k] = fit_moves(
                products[rows, newest],
                none * products[rows, other],
                gram[newest, newest],
                none * gram[newest, other],
                none * gram[other, other],
                moves[:, k],
                ridge,
            )
        ahead[rows, newest] -= moves[:, k, 0]
        if last is not None:
            ahead[rows, last] -= moves[:, k, 1]
    return moves, np.sqrt(np.maximum(np.einsum("ns,st,nt->n", ahead, gram, ahead, optimize=True), 0.0))


def segment_steps(levels: Levels, newest: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(N, S): D_l where l is one of the segment's steps, from `newest` down to the one above `ends`; else 0."""
    index = np.arange(levels.num_steps)
    inside = (index <= newest[:, None]) & (index > ends[:, None])
    return np.where(inside, levels.steps, 0.0)


def rule_moves(
    levels: Levels, steps: np.ndarray, newest: np.ndarray, last: Optional[np.ndarray], linear: bool
) -> np.ndarray:
    """(N, 2): held moves of segments, or those linear in the timestep, from their `segment_steps`."""
    held = steps.sum(axis=1)
    moves = np.stack([held, np.zeros_like(held)], axis=1)
    if last is None or not linear:
        return moves
    t = ddim_timesteps(levels.num_steps, levels.config.train_steps).astype(np.float64)
    span = t[newest] - t[last]
    slope = np.divide(steps @ t - held * t[newest], span, out=np.zeros_like(span), where=span != 0)
    return moves + np.stack([slope, -slope], axis=1)


def follow_open_loop(gram: np.ndarray, levels: Levels, indices: np.ndarray, moves: np.ndarray) -> float:
    """The root-mean-square relative error of one plan with given moves."""
    ahead = levels.steps.copy()
    ahead[indices] -= moves[:, 0]
    ahead[indices[:-1]] -= moves[1:, 1]
    return float(np.sqrt(max(ahead @ gram @ ahead, 0.0)))
