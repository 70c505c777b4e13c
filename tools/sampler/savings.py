"""Savings inside an evaluation: less work at a plan's last evaluations, and higher precision at its first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch

from ldm.schedule import ddim_timesteps
from sampling.trajectory import Network
from tools.sampler.network import STEPS, CaseNetwork

# How the unconditional half is guessed where it is not run.
RULES = ("difference", "line")


@dataclass(frozen=True)
class Saving:
    """What the last evaluations of a plan leave out.

    Attributes
    ----------
    reused : int
        So many last evaluations take the ControlNet's residuals of the last one that ran it.
    guessed : int
        So many last evaluations do not run the unconditional half.
    rule : {"difference", "line"}
        The guess: the conditional noise less the last known difference of the two, or the line in t through the last
        two unconditional ones.
    """

    reused: int = 0
    guessed: int = 0
    rule: str = "difference"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")

    def __str__(self) -> str:
        parts = []
        if self.reused:
            parts.append(f"residuals of the last {self.reused} reused")
        if self.guessed:
            parts.append(f"unconditional half of the last {self.guessed} guessed ({self.rule})")
        return ", ".join(parts) or "none"

    def halves(self, evaluations: int, control_share: float) -> float:
        """Cost of a plan in network halves; a plain evaluation costs two.

        Parameters
        ----------
        control_share : float
            The ControlNet's part of a half's work.
        """
        cost = 0.0
        for left in range(evaluations, 0, -1):
            work = 1 - control_share if left <= self.reused else 1.0
            cost += work * (1 if left <= self.guessed else 2)
        return cost


@dataclass
class _Memory:
    """What one group of cases remembers between evaluations."""

    controls: Any = None
    difference: Any = None
    unconditional: Tuple[Tuple[int, np.ndarray], ...] = ()


class SavingNetwork:
    """The networks with a saving, at the evaluations of one plan in their order.

    Parameters
    ----------
    indices : the plan's evaluated indices
    """

    def __init__(self, network: CaseNetwork, saving: Saving, indices: Sequence[int]) -> None:
        steps = ddim_timesteps(STEPS, network.config.schedule.train_steps)
        self._network = network
        self._saving = saving
        self._reused = {int(steps[index]) for index in indices[len(indices) - saving.reused :]}
        self._guessed = {int(steps[index]) for index in indices[len(indices) - saving.guessed :]}
        self._memories: Dict[Tuple[int, ...], _Memory] = {}

    def predict(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        """(N, D) guided noise; the same cases must come together at every evaluation."""
        memory = self._memories.setdefault(tuple(cases), _Memory())
        guess = timestep in self._guessed
        controls = memory.controls if timestep in self._reused else None
        cond, uncond, ran = self._network.halves(cases, timestep, latents, guess, controls)
        if self._saving.reused:
            memory.controls = ran
        if guess:
            uncond = self._guess(memory, timestep, cond)
        elif self._saving.guessed:
            memory.difference = cond - uncond
            memory.unconditional = (*memory.unconditional, (timestep, uncond))[-2:]
        return self._network.guide(cases, cond, uncond)

    def _guess(self, memory: _Memory, timestep: int, cond: np.ndarray) -> np.ndarray:
        if self._saving.rule == "difference":
            return cond - memory.difference
        (before, first), (last, second) = memory.unconditional
        return second + (timestep - last) / (last - before) * (second - first)


def high_precision_first(high: Network, low: Network, timesteps: Sequence[int], count: int) -> Network:
    """The first `count` evaluations at `timesteps` by one network, the others by another."""
    first = {int(timestep) for timestep in timesteps[:count]}

    def predict(cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        return (high if timestep in first else low)(cases, timestep, latents)

    return predict


def control_share(config: Any, height: int = 256, width: int = 384) -> float:
    """The ControlNet's part of the multiplications of ControlNet and UNet, text, time and hint left out."""
    from torch.utils.flop_counter import FlopCounterMode

    from cldm.model import ControlLDM

    with torch.device("meta"), torch.no_grad():
        model = ControlLDM(config)
        x = torch.zeros(1, config.autoencoder.latent_channels, height // 8, width // 8)
        context = torch.zeros(1, 77, config.unet.context_dim)
        t = torch.zeros(1, dtype=torch.long)
        hint = model.control_model.encode_hint(torch.zeros(1, 3, height, width))
        conditions = [network.condition(t, context) for network in (model.unet, model.control_model)]
        counts: List[int] = []
        for run in (
            lambda: model.control_model.residuals(x, conditions[1], hint),
            lambda: model.unet.denoise(x, conditions[0]),
        ):
            with FlopCounterMode(display=False) as counter:
                run()
            counts.append(counter.get_total_flops())
    return counts[0] / sum(counts)


def interpolated_error(curve: Dict[float, float], cost: float) -> float:
    """The error that a curve of errors by cost has at a cost between its ends, on a line in the error's logarithm.

    Raises
    ------
    ValueError
        The cost is outside the curve.
    """
    costs = sorted(curve)
    if not costs or not costs[0] <= cost <= costs[-1]:
        raise ValueError(f"cost {cost:g} is outside the curve's {costs}")
    return float(np.exp(np.interp(cost, costs, np.log([curve[c] for c in costs]))))
