"""How close each case comes with weights of its own, fitted to its own reference, segment by segment."""

from __future__ import annotations

from typing import List, NamedTuple, Sequence

import numpy as np

from sampling.trajectory import Levels, Network, Trajectories
from tools.sampler.network import relative_errors


class Freedom(NamedTuple):
    """What a segment's move is made of: the newest predictions, and with `latent` the latent itself."""

    predictions: int
    latent: bool

    def __str__(self) -> str:
        of = "the newest" if self.predictions == 1 else f"the last {self.predictions}"
        return f"{of} and the latent" if self.latent else of


# The first is DDIM but for the weight; a plan of the step graph has the third; the last keeps all that is worth it.
FREEDOMS = (Freedom(1, False), Freedom(2, False), Freedom(2, True), Freedom(4, True))


def own_weights(
    predict: Network, levels: Levels, reference: Trajectories, indices: Sequence[int], freedom: Freedom
) -> np.ndarray:
    """(N,) relative errors of students whose weights only they have.

    At the end of each segment a student is as close to its reference's latent as a weighted sum can bring it from where
    it is. No plan knows the reference, and a plan's weights are one set for all cases. It is no bound: a segment that
    goes past the reference may leave the network at a better place for the next.

    Parameters
    ----------
    predict : callable
        Knows the reference's cases by their places.
    indices : sequence of int
        Evaluated, from the noisiest down.
    """
    cases = range(reference.cases)
    y = reference.initial.astype(np.float64) / levels.scale(indices[0])
    newest: List[np.ndarray] = []
    for index, end in zip(indices, [*indices[1:], -1]):
        latents = (levels.scale(index) * y).astype(np.float32)
        newest = [predict(cases, int(levels.timesteps[index]), latents).astype(np.float64), *newest]
        parts = [*newest[: freedom.predictions], *([y] if freedom.latent else [])]
        missing = reference.latents[:, end + 1].astype(np.float64) / levels.scale(end) - y
        y = y + np.stack([_closest([part[case] for part in parts], missing[case]) for case in cases])
    return relative_errors(levels.scale(-1) * y, reference.final)


def _closest(parts: Sequence[np.ndarray], target: np.ndarray) -> np.ndarray:
    """The weighted sum of some vectors that is closest to another one."""
    basis = np.stack(parts, axis=1)
    weights = np.linalg.lstsq(basis, target, rcond=None)[0]
    return np.asarray(basis @ weights)
