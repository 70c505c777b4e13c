"""The samplers that are compared, each at a number of evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

from ldm.plans import SamplingPlan, calibrated_plan, exact_plan, linear_plan, spread_indices, subset_plan
from ldm.schedule import ScheduleConfig
from runtime.speed import early_indices
from sampling.calibration import Calibration, Point
from sampling.stages import fit_segments
from sampling.trajectory import Levels, Network, Trajectories
from tools.sampler.network import STEPS, run_plan, run_scheduler

# Lists of evaluated steps that a team of 2023 tried on the real model (xiatwhu/trt2023, canny2image_TRT.py), the one
# of each length to which its comments give the lowest PD. All steps between hold the last prediction.
TEAM_LISTS: Dict[str, Tuple[int, ...]] = {
    "trt2023, 12 steps": (19, 18, 17, 16, 15, 14, 13, 12, 10, 8, 6, 3),
    "trt2023, 11 steps": (19, 18, 17, 16, 15, 14, 13, 11, 9, 6, 3),
    "trt2023, 10 steps": (19, 18, 17, 16, 15, 14, 13, 11, 8, 4),
    "trt2023, 9 steps": (19, 18, 17, 16, 15, 14, 12, 8, 4),
}
SPACINGS = ("linspace", "leading")


@dataclass(frozen=True)
class Methods:
    """What the methods need beside the network.

    Attributes
    ----------
    schedule : ScheduleConfig
    calibration : Calibration or None
        Without one there are neither best subsets nor calibrated plans.
    """

    schedule: ScheduleConfig
    calibration: Optional[Calibration] = None

    def names(self) -> List[str]:
        """Every method, in the order of the tables."""
        return list(self._makers())

    def final(self, name: str, evaluations: int, predict: Network, initial: np.ndarray) -> Optional[np.ndarray]:
        """(N, D) final latents of a method; None where it does not come with so many evaluations."""
        made = self._makers()[name](evaluations)
        if made is None:
            return None
        if isinstance(made, SamplingPlan):
            return run_plan(predict, made, initial)
        return run_scheduler(predict, made, evaluations, initial)

    def plan(self, name: str, evaluations: int) -> Optional[SamplingPlan]:
        """The plan of a method that has one."""
        made = self._makers()[name](evaluations)
        return made if isinstance(made, SamplingPlan) else None

    def _makers(self) -> Dict[str, Callable[[int], Any]]:
        """A plan or a scheduler for a number of evaluations, by the method's name."""
        makers: Dict[str, Callable[[int], Any]] = {
            "DDIM of N steps": lambda n: exact_plan(self.schedule, n),
            "DDIM, spread subset": lambda n: subset_plan(self.schedule, STEPS, spread_indices(STEPS, n)),
            "DDIM, early subset": lambda n: subset_plan(self.schedule, STEPS, early_indices(STEPS, n)),
            "DDIM, 2023 list": self._team,
            "DDIM, best subset": lambda n: self._calibrated(n, "subset"),
        }
        for spacing in SPACINGS:
            makers[f"DPM-Solver++(2M), {spacing}"] = lambda n, s=spacing: dpm_solver(self.schedule, s)
            makers[f"UniPC, {spacing}"] = lambda n, s=spacing: unipc(self.schedule, s)
        makers["linear, spread subset"] = lambda n: linear_plan(self.schedule, STEPS, spread_indices(STEPS, n))
        makers["linear, best subset"] = lambda n: self._calibrated(n, "linear")
        makers["calibrated"] = lambda n: self._calibrated(n, "calibrated")
        makers["calibrated, polished"] = lambda n: self._calibrated(n, "calibrated", polished=True)
        return makers

    def _team(self, evaluations: int) -> Optional[SamplingPlan]:
        lists = [indices for indices in TEAM_LISTS.values() if len(indices) == evaluations]
        return subset_plan(self.schedule, STEPS, lists[0]) if lists else None

    def _calibrated(self, evaluations: int, kind: str, polished: bool = False) -> Optional[SamplingPlan]:
        if evaluations == STEPS:
            return exact_plan(self.schedule, STEPS)
        point = self.point(evaluations, kind, polished)
        return None if point is None else point.plan(self.schedule, STEPS)

    def calibrated_point(self, evaluations: int) -> Optional[Point]:
        """The calibrated point, rather the one that is not polished; or None."""
        return self.point(evaluations, "calibrated") or self.point(evaluations, "calibrated", polished=True)

    def point(self, evaluations: int, kind: str, polished: bool = False) -> Optional[Point]:
        """The calibration's point of a kind, or None."""
        if self.calibration is None:
            return None
        of_kind = [
            point
            for point in self.calibration.points
            if (point.evaluations, point.kind, point.polished) == (evaluations, kind, polished)
        ]
        measure = self.calibration.selected_by
        return min(of_kind, key=lambda point: point.errors[measure].mean, default=None)


def refit(network: Network, levels: Levels, trajectories: Trajectories, indices: Tuple[int, ...]) -> SamplingPlan:
    """A calibrated plan of given indices, its moves fitted on other trajectories as a calibration fits them."""
    outcome = fit_segments(network, levels, trajectories, indices)
    return calibrated_plan(levels.config, STEPS, indices, outcome.moves)


def _betas(schedule: ScheduleConfig, spacing: str) -> Dict[str, Any]:
    """What diffusers' schedulers are told of the noise schedule; "leading" with the offset of SD1.5's own config."""
    return {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.linear_start,
        "beta_end": schedule.linear_end,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": spacing,
        "steps_offset": 1,
    }


def dpm_solver(schedule: ScheduleConfig, spacing: str) -> Any:
    """diffusers' DPM-Solver++(2M) with its other defaults."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**_betas(schedule, spacing))


def unipc(schedule: ScheduleConfig, spacing: str) -> Any:
    """diffusers' UniPC of order 2 with its other defaults."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(**_betas(schedule, spacing))
