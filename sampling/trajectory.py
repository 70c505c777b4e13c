"""Reference trajectories: the latent and the guided noise at every step of the full schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np

from ldm.schedule import ScheduleConfig, alpha_bars, ddim_timesteps

# (N case numbers, timestep, (N, D) float32 latents) to the (N, D) float32 guided noise; a case may come repeatedly.
Network = Callable[[Sequence[int], int, np.ndarray], np.ndarray]


class Levels:
    """The noise levels of a schedule in the variables in which a DDIM step is a sum (`ldm.plans`).

    With y = x / sqrt(a) and s = sqrt((1 - a) / a), a step is y_{l-1} = y_l + D_l e_l. Index -1 is the end.

    Attributes
    ----------
    num_steps : int
    timesteps : (S,) int64
        What the network is told at each index.
    scales : (S + 1,) float64
        sqrt(a_l) at place l + 1: what y is multiplied by to give the latent.
    steps : (S,) float64
        D_l = s_{l-1} - s_l, below 0.
    """

    def __init__(self, config: ScheduleConfig, num_steps: int) -> None:
        table = alpha_bars(config)
        self.timesteps = ddim_timesteps(num_steps, config.train_steps)
        a = np.concatenate([table[:1], table[self.timesteps]])
        s = np.sqrt((1 - a) / a)
        self.config = config
        self.num_steps = num_steps
        self.scales = np.sqrt(a)
        self.steps = s[:-1] - s[1:]

    def scale(self, index: int) -> float:
        """sqrt(a) at an index, or at the end for -1."""
        return float(self.scales[index + 1])


@dataclass(frozen=True)
class Trajectories:
    """What plain DDIM did, for K cases of D numbers each.

    Attributes
    ----------
    latents : (K, S + 1, D) float32
        x_l at place l + 1, so the final latent is at place 0 and the initial one at place S.
    noises : (K, S, D) float32
        e_l at place l.
    """

    latents: np.ndarray
    noises: np.ndarray

    def __post_init__(self) -> None:
        cases, steps, size = self.noises.shape
        if self.latents.shape != (cases, steps + 1, size):
            raise ValueError(f"noises of shape {self.noises.shape} do not go with latents of {self.latents.shape}")

    @property
    def cases(self) -> int:
        return int(self.noises.shape[0])

    @property
    def num_steps(self) -> int:
        return int(self.noises.shape[1])

    @property
    def final(self) -> np.ndarray:
        """(K, D): the final latents, which are the target."""
        return self.latents[:, 0]

    @property
    def initial(self) -> np.ndarray:
        return self.latents[:, -1]

    def select(self, cases: Sequence[int]) -> Trajectories:
        """Those of some cases."""
        return Trajectories(self.latents[list(cases)], self.noises[list(cases)])


def record(
    network: Network,
    levels: Levels,
    initial: np.ndarray,
    cases: Optional[Sequence[int]] = None,
) -> Trajectories:
    """Run plain DDIM from all initial latents at once and keep everything.

    Parameters
    ----------
    initial : (K, D) array
    cases : sequence of int, optional
        The case numbers that `network` knows them by; default 0 .. K - 1.

    Raises
    ------
    ValueError
        The network gave NaN or infinity; the message says in which case and at which index.
    """
    numbers = list(range(len(initial)) if cases is None else cases)
    count, size = initial.shape
    latents = np.empty((count, levels.num_steps + 1, size), np.float32)
    noises = np.empty((count, levels.num_steps, size), np.float32)
    y = np.asarray(initial, np.float64) / levels.scale(levels.num_steps - 1)
    for index in range(levels.num_steps - 1, -1, -1):
        latents[:, index + 1] = levels.scale(index) * y
        noises[:, index] = network(numbers, int(levels.timesteps[index]), latents[:, index + 1])
        finite = np.isfinite(noises[:, index]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"case {numbers[int(np.argmin(finite))]}: the network gives NaN or infinity at index {index}"
            )
        y = y + levels.steps[index] * noises[:, index]
    latents[:, 0] = levels.scale(-1) * y
    return Trajectories(latents, noises)
