"""How many network evaluations a request gets: the user's choice, and the plan that it comes to. No torch here.

A choice is one of

    exact               every step evaluated (the default)
    7                   so many evaluations
    pd:5                the fewest whose mean error, when they were calibrated, was measured to be within a budget:
                        PD here, or lpips, pixel_mean_abs (levels of 255) or latent_relative_error

Evaluations are left out by a calibration of the same checkpoint and number of steps: for each number of evaluations the
user's own where it has that number, else the shipped one. Without one a number becomes an uncalibrated plan, and a
budget every step; every step is also what eta above 0 and fewer than four evaluations come to. What a request came to
stands in its plan, and so in its receipt.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple, Union

from cldm.config import ModelConfig
from cldm.image import target_size
from cldm.request import MAX_STEPS, Request
from cldm.weights import ALEXNET_WEIGHTS, INCEPTION_WEIGHTS, METRICS_DIR, Weights
from ldm.plans import SamplingPlan, exact_plan, subset_plan
from sampling.calibration import (
    BUDGET_MEASURES,
    FEWEST_EVALUATIONS,
    Calibration,
    CalibrationError,
    NotInCalibration,
    Running,
    by_count,
    calibrate_command,
    find_calibrations,
    plan_for,
    plan_within,
)

# Without a calibration a list of plans to choose from has these numbers of evaluations.
USUAL_COUNTS = range(FEWEST_EVALUATIONS, 13)
# Plans that are kept ready; a request of another schedule or guidance scale has another plan.
KEPT_PLANS = 64

EXACT = "exact"
HOW = (
    f'a speed is "{EXACT}", a number of network evaluations such as "7", or a measure and a budget such as "pd:5";'
    f" measures are {', '.join(BUDGET_MEASURES)}"
)

Report = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """A choice: exact where nothing is set, else a number of evaluations, or a measure with its budget.

    Attributes
    ----------
    evaluations : int, optional
        1 .. 1000.
    measure : str, optional
        One of `sampling.calibration.BUDGET_MEASURES`.
    budget : float
        In the measure's unit, 0 or more.
    """

    evaluations: Optional[int] = None
    measure: Optional[str] = None
    budget: float = 0.0

    @property
    def exact(self) -> bool:
        return self.evaluations is None and self.measure is None

    def __str__(self) -> str:
        if self.measure is not None:
            return f"{self.measure}:{self.budget:g}"
        return EXACT if self.evaluations is None else str(self.evaluations)


def parse_speed(choice: Union[str, int, None]) -> Speed:
    """The choice that a text or a number stands for; None and an empty text are exact.

    Raises
    ------
    TypeError, ValueError
        It is none of the forms, or out of range; the message says which there are.
    """
    if choice is None:
        return Speed()
    if isinstance(choice, bool) or not isinstance(choice, (str, int)):
        raise TypeError(f"speed must be a text or an integer, got {type(choice).__name__} {choice!r}: {HOW}")
    text = str(choice).strip()
    if text.lower() in ("", EXACT):
        return Speed()
    measure, colon, number = (part.strip() for part in text.partition(":"))
    if colon:
        return _parse_budget(text, measure, number)
    try:
        evaluations = int(text)
    except ValueError:
        raise ValueError(f"speed {text!r} is not understood: {HOW}") from None
    if not 1 <= evaluations <= MAX_STEPS:
        raise ValueError(f"speed: evaluations must be between 1 and {MAX_STEPS}, got {evaluations}")
    return Speed(evaluations=evaluations)


def _parse_budget(text: str, measure: str, number: str) -> Speed:
    if measure not in BUDGET_MEASURES:
        raise ValueError(f"speed {text!r}: unknown measure {measure!r}; {HOW}")
    try:
        budget = float(number)
    except ValueError:
        raise ValueError(f"speed {text!r}: the budget {number!r} is not a number; {HOW}") from None
    if not math.isfinite(budget) or budget < 0:
        raise ValueError(f"speed {text!r}: the budget must be a finite number of 0 or more")
    return Speed(measure=measure, budget=budget)


def early_indices(num_steps: int, evaluations: int) -> Tuple[int, ...]:
    """Indices whose distance from the noisiest grows with the square of their number: most of them are early.

    Lists that were searched on real models look so, as (19, 18, 17, 16, 15, 14, 13, 11, 8, 4) of a team of 2023: the
    predictions change most in the noisy steps.

    Raises
    ------
    ValueError
        There are fewer indices than evaluations, or none is asked for.
    """
    if not 1 <= evaluations <= num_steps:
        raise ValueError(f"evaluations must be between 1 and the schedule's {num_steps} steps, got {evaluations}")
    found = [num_steps - 1]
    for k in range(1, evaluations):
        wanted = round(num_steps - 1 - num_steps * (k / evaluations) ** 2)
        found.append(max(min(wanted, found[-1] - 1), evaluations - 1 - k))
    return tuple(found)


class Planner:
    """Finds the plan of each request.

    Parameters
    ----------
    speed : Speed
    config : ModelConfig
    weights : Weights
    build_dir : path
        Where calibrations made on this machine are sought; the model's shipped one comes after them, for the numbers
        of evaluations that they lack.
    backend, precision : str
        What runs, to be compared with what was calibrated.
    report : callable
        Takes a line about each plan that is not exact DDIM, or had to be: once, when it is first made.
    """

    def __init__(
        self,
        speed: Speed,
        config: ModelConfig,
        weights: Weights,
        build_dir: Union[str, Path],
        backend: str,
        precision: str,
        report: Report,
    ) -> None:
        self.speed = speed
        self._config = config
        self._weights = weights
        self._build_dir = Path(build_dir)
        self._backend = backend
        self._precision = precision
        self._report = report
        self._plans: Dict[Tuple[int, float, float, int], SamplingPlan] = {}

    def plan(self, request: Request) -> SamplingPlan:
        """The plan for a request's steps, eta, guidance scale and resolution; the last only for what its detail says.

        Raises
        ------
        CalibrationError
            The budget is in a measure that no calibration was made with; the message says how to make one with it.
        """
        key = (request.ddim_steps, request.eta, request.guidance_scale, _shorter_side(request))
        found = self._plans.get(key)
        if found is None:
            found = self._make(request)
            if len(self._plans) >= KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = found
        return found

    def choices(self, request: Request) -> List[SamplingPlan]:
        """Every plan that a request can be given, whatever the speed: fewest evaluations first, exact DDIM last."""
        plans: List[SamplingPlan] = []
        if request.eta == 0:
            try:
                found = by_count(self._find(request))
            except CalibrationError as reason:
                self._report(f"no calibrated plans to choose from: {reason}")
                counts = [count for count in USUAL_COUNTS if count < request.ddim_steps]
                plans = [self._uncalibrated(request, count, "not calibrated") for count in counts]
            else:
                counts = [count for count in found if FEWEST_EVALUATIONS <= count < request.ddim_steps]
                running = self._running(request)
                plans = [plan_for(found[count], self._config.schedule, count, running=running) for count in counts]
        return [*plans, exact_plan(self._config.schedule, request.ddim_steps, request.eta)]

    def _make(self, request: Request) -> SamplingPlan:
        exact = exact_plan(self._config.schedule, request.ddim_steps, request.eta)
        wanted = self.speed.evaluations
        if self.speed.exact or (wanted is not None and wanted >= request.ddim_steps):
            return exact
        if request.eta > 0:
            return self._fall_back(exact, f"as eta is {request.eta:g}")
        if min(wanted or request.ddim_steps, request.ddim_steps) < FEWEST_EVALUATIONS:
            return self._fall_back(exact, f"as fewer than {FEWEST_EVALUATIONS} evaluations are plain DDIM")
        try:
            calibrations = self._find(request)
        except CalibrationError as reason:
            return self._without_calibration(request, exact, str(reason))
        return self._calibrated(request, calibrations)

    def _calibrated(self, request: Request, calibrations: List[Calibration]) -> SamplingPlan:
        if self.speed.evaluations is None:
            plan = self._within_budget(request, calibrations)
        else:
            plan = self._of_number(request, calibrations, self.speed.evaluations)
        self._report(f"speed {self.speed} of {request.ddim_steps} steps: {plan}")
        return plan

    def _of_number(self, request: Request, calibrations: List[Calibration], evaluations: int) -> SamplingPlan:
        found = by_count(calibrations)
        if evaluations in found:
            return plan_for(found[evaluations], self._config.schedule, evaluations, running=self._running(request))
        return self._uncalibrated(request, evaluations, f"not calibrated, as only {', '.join(map(str, found))} are")

    def _within_budget(self, request: Request, calibrations: List[Calibration]) -> SamplingPlan:
        running, measure = self._running(request), self.speed.measure
        try:
            plan = plan_within(calibrations, self._config.schedule, self.speed.budget, measure, running)
        except NotInCalibration as reason:
            command = calibrate_command(self._config, self._weights, self._build_dir, running)
            needs = _weights_of_measure(str(measure))
            raise NotInCalibration(f"speed {self.speed}: {reason}. To have it, {needs}run: {command}") from None
        return dataclasses.replace(plan, detail=", ".join(filter(None, [plan.detail, f"for {self.speed}"])))

    def _without_calibration(self, request: Request, exact: SamplingPlan, reason: str) -> SamplingPlan:
        self._report(reason)
        short = f"no calibration of {request.ddim_steps} steps fits"
        if self.speed.evaluations is None:
            return self._fall_back(exact, f"as {short}")
        plan = self._uncalibrated(request, self.speed.evaluations, f"not calibrated, as {short}")
        self._report(f"speed {self.speed} of {request.ddim_steps} steps: {plan}")
        return plan

    def _fall_back(self, exact: SamplingPlan, reason: str) -> SamplingPlan:
        plan = dataclasses.replace(exact, detail=f"not speed {self.speed}, {reason}")
        self._report(f"speed {self.speed} of {exact.num_steps} steps: {plan}")
        return plan

    def _uncalibrated(self, request: Request, evaluations: int, detail: str) -> SamplingPlan:
        """DDIM on early steps mostly, for no model in particular."""
        indices = early_indices(request.ddim_steps, evaluations)
        plan = subset_plan(self._config.schedule, request.ddim_steps, indices)
        return dataclasses.replace(plan, detail=detail)

    def _find(self, request: Request) -> List[Calibration]:
        return find_calibrations(self._config, self._weights, self._build_dir, self._running(request))

    def _running(self, request: Request) -> Running:
        return Running(
            self._config.name,
            self._weights.digest,
            request.ddim_steps,
            self._backend,
            self._precision,
            request.guidance_scale,
            _shorter_side(request),
        )


def _shorter_side(request: Request) -> int:
    """Of the pictures that a request makes, whatever their proportions."""
    return target_size(request.image_resolution, request.image_resolution, request.image_resolution)[0]


def _weights_of_measure(measure: str) -> str:
    """What a measure's network needs on this machine, as the beginning of a sentence; nothing for one without any."""
    name = {"pd": INCEPTION_WEIGHTS, "lpips": ALEXNET_WEIGHTS}.get(measure)
    return "" if name is None else f"see that its weights are at {METRICS_DIR / name}, and "
