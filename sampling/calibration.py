"""A calibration: sampling plans fitted to one checkpoint, with the errors that they were measured to have. No torch.

One JSON file holds the plans of all numbers of evaluations for one model, checkpoint, backend, precision, guidance
scale and number of steps. `tools/calibrate_sampler.py` writes it under build/sampler/; the one of the tiny model ships
as models/tiny_sampler.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from cldm.config import MODELS_DIR
from cldm.files import write_json
from ldm.plans import SamplingPlan, calibrated_plan, exact_plan, linear_plan, subset_plan

if TYPE_CHECKING:
    from cldm.config import ModelConfig
    from cldm.weights import Weights
    from ldm.schedule import ScheduleConfig

FORMAT = 2
# Further from being the one looked for than a file that differs in all that matters.
UNREADABLE = 9
KINDS = ("subset", "linear", "calibrated")
# Below this a plan is plain DDIM: so few predictions say next to nothing about those between them.
FEWEST_EVALUATIONS = 4
# With fewer fitted cases than this a plan may follow those cases and no others.
FEW_CASES = 8
# What a plan can be chosen or limited by: keys of `scoring.measures`, of which less is better. The first that was
# measured is what a calibration is selected by.
BUDGET_MEASURES = ("pd", "pixel_mean_abs", "lpips", "latent_relative_error")
# More is better for these, so the worst of several is the lowest.
HIGHER_IS_BETTER = ("psnr_db", "ssim")


class CalibrationError(ValueError):
    """There is no calibration for what runs, or it cannot be used; the message says how to make one."""


class NotInCalibration(CalibrationError):
    """A budget is in a measure that no calibration at hand was made with."""


class Spread(NamedTuple):
    """A measure over the held-out cases: its mean, and its worst case."""

    mean: float
    worst: float


@dataclass(frozen=True)
class Setting:
    """What a calibration was made for.

    Attributes
    ----------
    model, weights : str
        Config name, and `Weights.digest`.
    num_steps : int
        S of the schedule that is followed.
    backend, precision : str, optional
        None where it does not matter to the one who asks.
    guidance : float, optional
        Guidance scale; None likewise.
    """

    model: str
    weights: str
    num_steps: int = 20
    backend: Optional[str] = None
    precision: Optional[str] = None
    guidance: Optional[float] = None

    @property
    def file_name(self) -> str:
        """The name of this setting's file; all of its fields are in it."""
        guidance = f"g{self.guidance:g}" if self.guidance is not None else "gany"
        return f"{self.model}-{self.weights}-s{self.num_steps}-{self.backend}-{self.precision}-{guidance}.json"


@dataclass(frozen=True)
class Running(Setting):
    """What is about to run: a setting, and the size of its pictures.

    Attributes
    ----------
    shorter_side : int, optional
        Of the pictures that are made, in pixels; None where it does not matter to the one who asks.
    """

    shorter_side: Optional[int] = None


@dataclass(frozen=True)
class Point:
    """One plan, and what it was measured to give.

    Attributes
    ----------
    kind : {"subset", "linear", "calibrated"}
    indices : tuple of int
        Evaluated indices, falling from S - 1.
    moves : tuple of (float, float) or of (float, float, float)
        c_0, c_1 and, where it was polished, c_x of each segment (`ldm.plans.calibrated_plan`), for "calibrated"; empty
        for the others, whose moves follow from the indices.
    polished : bool
        The moves were refined on the end point after they had been fitted segment by segment.
    errors : dict of str to Spread
        By the keys of `scoring.measures`, against the full schedule, over the held-out cases.
    timesteps : tuple of int
        What the network is told at each evaluation; empty where it is the indices' own.
    """

    kind: str
    indices: Tuple[int, ...]
    moves: Tuple[Tuple[float, ...], ...]
    polished: bool
    errors: Mapping[str, Spread]
    timesteps: Tuple[int, ...] = ()

    @property
    def evaluations(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        """The kind, and whether it is polished."""
        return f"{self.kind}, polished" if self.polished else self.kind

    def plan(self, config: ScheduleConfig, num_steps: int, detail: str = "") -> SamplingPlan:
        """The rows of the step graph; raises ValueError where indices and moves do not fit together."""
        if self.kind == "calibrated":
            return calibrated_plan(config, num_steps, self.indices, self.moves, detail, self.timesteps or None)
        make = subset_plan if self.kind == "subset" else linear_plan
        return dataclasses.replace(make(config, num_steps, self.indices), detail=detail)


@dataclass(frozen=True)
class Calibration:
    """Plans of several numbers of evaluations, and how they came about.

    Attributes
    ----------
    setting : Setting
    cases : int
        Cases that were fitted to; others were held out, and measured.
    points : tuple of Point
        By number of evaluations, of each number all that were measured.
    selected_by : str
        The measure that decides between points of one number of evaluations: the first of `BUDGET_MEASURES` that could
        be taken.
    made : dict
        How: date, pictures, prompts' digest, seeds, effort, and "height" and "width" in pixels.
    """

    setting: Setting
    cases: int
    points: Tuple[Point, ...]
    selected_by: str
    made: Mapping[str, Any]

    @property
    def counts(self) -> Tuple[int, ...]:
        """Numbers of evaluations that there are plans for, rising."""
        return tuple(sorted({point.evaluations for point in self.points}))

    @property
    def shorter_side(self) -> Optional[int]:
        """Of the pictures that it was made with, in pixels; None where the file does not say."""
        sides = [self.made[name] for name in ("height", "width") if name in self.made]
        return min(sides) if len(sides) == 2 else None

    def point(self, evaluations: int, kind: Optional[str] = None) -> Point:
        """The best point of so many evaluations, of all kinds or of one.

        Raises
        ------
        CalibrationError
            There is none; the message names the numbers that there are.
        """
        found = [p for p in self.points if p.evaluations == evaluations and kind in (None, p.kind)]
        if not found:
            of_kind = f" of kind {kind}" if kind is not None else ""
            raise CalibrationError(
                f"no plan of {evaluations} evaluations{of_kind} in this calibration of {self.setting.model}; it has"
                f" {', '.join(map(str, self.counts))}, and {self.setting.num_steps} is the full schedule"
            )
        return min(found, key=lambda p: p.errors[self.selected_by].mean)

    def error(self, evaluations: int, measure: Optional[str] = None) -> Spread:
        """What the best point of so many evaluations was measured to have; 0 for the full schedule.

        Parameters
        ----------
        measure : str, optional
            One of `BUDGET_MEASURES`; default `selected_by`.

        Raises
        ------
        CalibrationError
            No such number of evaluations.
        NotInCalibration
            The measure was not taken.
        """
        if evaluations == self.setting.num_steps:
            return Spread(0.0, 0.0)
        return self._measured(self.point(evaluations), measure or self.selected_by)

    def _measured(self, point: Point, measure: str) -> Spread:
        if measure not in BUDGET_MEASURES or measure not in point.errors:
            there = [key for key in BUDGET_MEASURES if key in point.errors]
            raise NotInCalibration(f"{measure} was not measured in this calibration; there are {', '.join(there)}")
        return point.errors[measure]


def plan_for(
    calibration: Calibration,
    schedule: ScheduleConfig,
    evaluations: int,
    kind: Optional[str] = None,
    running: Optional[Running] = None,
) -> SamplingPlan:
    """The calibrated plan of so many evaluations; plain DDIM where that is the full schedule.

    Parameters
    ----------
    kind : {"subset", "linear", "calibrated"}, optional
        Default: whichever was measured to be best.
    running : Running, optional
        What is about to run: where that leaves the measured errors in doubt, as `warnings_of` has it, the plan's detail
        says so.

    Raises
    ------
    CalibrationError
        No plan of so many evaluations, or `running` is another model, checkpoint or number of steps.
    """
    setting = calibration.setting
    if running is not None:
        refused = refusals(setting, running)
        if refused:
            raise CalibrationError(f"this calibration was made for something else: {'; '.join(refused)}")
    if evaluations == setting.num_steps:
        return exact_plan(schedule, setting.num_steps)
    point = calibration.point(evaluations, kind)
    parts = [f"on {calibration.cases} cases of {setting.model}"]
    if point.kind != "calibrated":
        parts = [f"chosen {parts[0]}"]
    if running is not None:
        parts += warnings_of(calibration, running)
    return point.plan(schedule, setting.num_steps, ", ".join(parts))


def by_count(calibrations: Sequence[Calibration], measure: Optional[str] = None) -> Dict[int, Calibration]:
    """The calibration to use for each number of evaluations that any has, rising: the first that has it.

    Parameters
    ----------
    calibrations : sequence of Calibration
        In the order in which they are preferred.
    measure : str, optional
        Leave out numbers for which this was not measured.
    """
    found: Dict[int, Calibration] = {}
    for calibration in calibrations:
        for count in calibration.counts:
            if measure is None or measure in calibration.point(count).errors:
                found.setdefault(count, calibration)
    return {count: found[count] for count in sorted(found)}


def plan_within(
    calibrations: Sequence[Calibration],
    schedule: ScheduleConfig,
    budget: float,
    measure: Optional[str] = None,
    running: Optional[Running] = None,
) -> SamplingPlan:
    """The plan of the fewest evaluations whose measured held-out mean error is within a budget, else plain DDIM.

    Plans of fewer than `FEWEST_EVALUATIONS` are none to choose from.

    Parameters
    ----------
    calibrations : sequence of Calibration
        At least one, all of one schedule, in the order in which they are preferred.
    budget : float
        In the measure's unit, 0 or more.
    measure : str, optional
        One of `BUDGET_MEASURES`; default what each calibration was selected by.
    running : Running, optional
        As in `plan_for`.

    Raises
    ------
    CalibrationError
        The budget is no number of 0 or more, or as in `plan_for`.
    NotInCalibration
        The measure was taken for no number of evaluations.
    """
    if not math.isfinite(budget) or budget < 0:
        raise CalibrationError(f"a budget must be a number of 0 or more, got {budget}")
    counts = by_count(calibrations, measure if measure in BUDGET_MEASURES else None)
    for count, calibration in (counts or by_count(calibrations)).items():  # without a count that has it: the error
        error = calibration.error(count, measure)
        if count >= FEWEST_EVALUATIONS and error.mean <= budget:
            return plan_for(calibration, schedule, count, running=running)
    return plan_for(calibrations[0], schedule, calibrations[0].setting.num_steps, running=running)


def warnings_of(calibration: Calibration, running: Running) -> List[str]:
    """In what that leaves a calibration usable, but its measured errors in doubt, it differs from what runs."""
    made = calibration.setting
    found = []
    for name, unit in (("backend", ""), ("precision", ""), ("guidance", "guidance ")):
        one, other = getattr(made, name), getattr(running, name)
        if other is not None and one != other:
            one, other = (f"{value:g}" if isinstance(value, float) else value for value in (one, other))
            found.append(f"calibrated at {unit}{one} but run at {other}")
    side = calibration.shorter_side
    if None not in (side, running.shorter_side) and side != running.shorter_side:
        found.append(f"calibrated on pictures of shorter side {side} but run at {running.shorter_side}")
    if calibration.cases < FEW_CASES:
        found.append(f"only {calibration.cases} cases were fitted to, {FEW_CASES} or more make its errors dependable")
    return found


def refusals(made: Setting, running: Setting) -> List[str]:
    """In what that rules a calibration out it differs from what runs."""
    names = {"model": "model", "weights": "checkpoint", "num_steps": "number of steps"}
    return [
        f"{title} is {getattr(made, name)}, wanted {getattr(running, name)}"
        for name, title in names.items()
        if getattr(made, name) != getattr(running, name)
    ]


def calibrate_command(config: ModelConfig, weights: Weights, build_dir: Union[str, Path], running: Setting) -> str:
    """The command that makes a calibration for what runs, to be given in the repository's own folder."""
    file = Path(config.folder).resolve() / f"{config.name}.yaml"
    model = config.name if file.parent == MODELS_DIR else str(file)
    words = ["python3", "tools/calibrate_sampler.py", "--model", model, "--steps", str(running.num_steps)]
    own = config.checkpoint_path()
    if weights.path is not None and weights.path != own:
        words += ["--checkpoint", str(weights.path.resolve())]
    elif weights.path is None and (own is not None or weights.seed != config.seed):
        words += ["--random-weights", str(weights.seed)]
    for option, value in (("--backend", running.backend), ("--precision", running.precision)):
        if value is not None:
            words += [option, value]
    if running.guidance is not None:
        words += ["--guidance", f"{running.guidance:g}"]
    default = MODELS_DIR.parent / "build"  # where the variable is not set, as in another shell
    if os.environ.get("HACKATHON_BUILD_DIR") or Path(build_dir).resolve() != default.resolve():
        words += ["--build-dir", str(Path(build_dir).resolve())]
    return " ".join(shlex.quote(word) for word in words)


def calibration_folder(build_dir: Union[str, Path]) -> Path:
    """Where calibrations made on this machine are."""
    return Path(build_dir) / "sampler"


def shipped_path(config: ModelConfig) -> Path:
    """Where a model's shipped calibration would be: beside its checkpoint."""
    return Path(config.folder) / f"{config.name}_sampler.json"


def find_calibration(
    config: ModelConfig,
    weights: Weights,
    build_dir: Union[str, Path],
    num_steps: int = 20,
    backend: Optional[str] = None,
    precision: Optional[str] = None,
    guidance: Optional[float] = None,
) -> Calibration:
    """The first of `find_calibrations`; raises as that does."""
    running = Running(config.name, weights.digest, num_steps, backend, precision, guidance)
    return find_calibrations(config, weights, build_dir, running)[0]


def find_calibrations(
    config: ModelConfig, weights: Weights, build_dir: Union[str, Path], running: Running
) -> List[Calibration]:
    """All that can be used for what is about to run, in the order in which they are preferred.

    Those made on this machine under build/ come before the model's shipped one. Of several the one with the fewest
    `warnings_of` comes first; of equals the newest.

    Raises
    ------
    CalibrationError
        None is for this model, checkpoint and number of steps: what the nearest differs in, or why a file cannot be
        read, and the command that makes one.
    """
    folder = calibration_folder(build_dir)
    own = sorted(folder.glob("*.json"), key=lambda path: -path.stat().st_mtime) if folder.is_dir() else []
    shipped = [path for path in (shipped_path(config),) if path.is_file()]
    problems: List[Tuple[int, str]] = []  # with how far each file is from being the one
    usable: List[Calibration] = []
    for paths in (own, shipped):
        found = [calibration for path in paths for calibration in _usable(path, running, problems)]
        usable += sorted(found, key=lambda calibration: len(warnings_of(calibration, running)))  # keeps equals in order
    if usable:
        return usable
    reason = min(problems)[1] if problems else "none was made"
    raise CalibrationError(
        f"no calibration for {config.name} ({weights}) at {running.num_steps} steps: {reason}. Make one with:"
        f" {calibrate_command(config, weights, build_dir, running)}"
    )


def _usable(path: Path, running: Setting, problems: List[Tuple[int, str]]) -> List[Calibration]:
    """The file's calibration where it can be used; else none, and one problem more."""
    try:
        found = load_calibration(path)
    except CalibrationError as error:
        problems.append((UNREADABLE, str(error)))
        return []
    refused = refusals(found.setting, running)
    if refused:
        problems.append((len(refused), f"{path} was made for something else: {'; '.join(refused)}"))
        return []
    return [found]


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file, whole or not at all."""
    value = dataclasses.asdict(calibration)
    value["format"] = FORMAT
    value["points"] = [_point_to_json(point) for point in calibration.points]
    write_json(path, value)


def _point_to_json(point: Point) -> Dict[str, Any]:
    return {
        "kind": point.kind,
        "evaluations": point.evaluations,
        "indices": list(point.indices),
        "moves": [list(move) for move in point.moves],
        "timesteps": list(point.timesteps),
        "polished": point.polished,
        "errors": {key: {"mean": s.mean, "worst": s.worst} for key, s in point.errors.items()},
    }


def load_calibration(path: Path) -> Calibration:
    """Read and check a file.

    Raises
    ------
    CalibrationError
        It is not there, damaged, or of another format; the message names it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CalibrationError(f"there is no calibration {path}") from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} is damaged ({error}); remove it") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise CalibrationError(f"{path} is not a calibration of format {FORMAT}; remove it, or make it anew")
    try:
        setting = Setting(**value["setting"])
        points = tuple(_point_from_json(point) for point in value["points"])
        found = Calibration(setting, int(value["cases"]), points, str(value["selected_by"]), dict(value["made"]))
        _check(found)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CalibrationError(f"{path} is damaged ({type(error).__name__}: {error}); remove it") from error
    return found


def _point_from_json(value: Mapping[str, Any]) -> Point:
    return Point(
        kind=str(value["kind"]),
        indices=tuple(int(index) for index in value["indices"]),
        moves=tuple(tuple(float(weight) for weight in move) for move in value["moves"]),
        polished=bool(value["polished"]),
        errors={str(key): Spread(float(s["mean"]), float(s["worst"])) for key, s in value["errors"].items()},
        timesteps=tuple(int(timestep) for timestep in value["timesteps"]),
    )


def _check(calibration: Calibration) -> None:
    """Raise ValueError or KeyError where a plan could not be made of each point."""
    from ldm.schedule import ScheduleConfig

    if not calibration.points:
        raise ValueError("it holds no plan")
    side = calibration.shorter_side
    if side is not None and not isinstance(side, int):
        raise ValueError(f"height or width {side!r} is not an integer")
    for point in calibration.points:
        if point.kind not in KINDS:
            raise ValueError(f"unknown kind {point.kind!r}")
        point.errors[calibration.selected_by]
        point.plan(ScheduleConfig(), calibration.setting.num_steps)
