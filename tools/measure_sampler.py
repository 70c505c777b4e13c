#!/usr/bin/env python3
"""Measure samplers with fewer network evaluations on the tiny model: error against evaluations and milliseconds.

    python3 tools/measure_sampler.py [--cases 64] [--counts 4-12] [--device cuda --precisions fp32,fp16] [--docs]

The target is the image of 20-step DDIM in FP32 with the same noise; the cases are scenes that neither training nor
calibration has seen. Writes study.json and sampler_error.svg; with --docs the chart and the tables of docs/sampler.md
as well. Best subsets and calibrated plans come from the model's calibration (tools/calibrate_sampler.py). The same
arguments give the same errors. On one GPU everything takes minutes; on a CPU choose fewer cases, counts and methods.
With --seconds N it stops after about so many and writes what it has.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "cv2", "yaml", "transformers", "tqdm", "diffusers"])

import numpy as np  # noqa: E402

from ldm.plans import SamplingPlan, exact_plan, spread_indices, subset_plan  # noqa: E402
from sampling.calibration import Calibration, CalibrationError, find_calibration, load_calibration  # noqa: E402
from sampling.trajectory import Levels, Network, Trajectories  # noqa: E402
from scoring.metrics import psnr  # noqa: E402
from tools.sampler.bound import FREEDOMS, own_weights  # noqa: E402
from tools.sampler.cases import (  # noqa: E402
    FIRST_FITTED,
    FIRST_MEASURED,
    Case,
    at_guidance,
    kinds_of,
    photograph_cases,
    scene_cases,
)
from tools.sampler.methods import Methods, refit  # noqa: E402
from tools.sampler.network import (  # noqa: E402
    STEPS,
    CaseNetwork,
    record_all,
    relative_errors,
    run_plan,
)
from tools.sampler.report import IMAGE_COUNTS, StudyReport  # noqa: E402
from tools.sampler.savings import (  # noqa: E402
    Saving,
    SavingNetwork,
    control_share,
    high_precision_first,
    interpolated_error,
)

PHOTO_PROMPTS = ("a bird", "a red bird", "a yellow flower", "a green tree")
GUIDANCE_SCALES = (5.0, 7.0, 12.0)
TRANSFER_COUNTS = (7, 8, 10)
SAVING_COUNTS = (8, 10)
SAVINGS = (
    *(Saving(reused=n) for n in (1, 2, 3)),
    *(Saving(guessed=n, rule=rule) for rule in ("difference", "line") for n in (1, 2, 3)),
    Saving(reused=2, guessed=2),
)
DOCS = ROOT / "docs" / "sampler.md"


class OutOfTime(Exception):
    """The seconds that were allowed are over."""


SECTIONS = ("errors", "precision", "latency", "transfer", "savings", "bound")


class Study:
    """Networks on cases, their references, and what is measured with them.

    Parameters
    ----------
    args : argparse.Namespace
    calibration : Calibration or None
    """

    def __init__(self, args: argparse.Namespace, calibration: Optional[Calibration]) -> None:
        import torch

        from cldm.checkpoint import load_model
        from cldm.config import load_config
        from cldm.tokenizer import Tokenizer
        from cldm.weights import find_weights
        from scoring.measures import load_comparer

        self.args = args
        self._started = time.perf_counter()
        self.config = load_config("tiny")
        self.schedule = self.config.schedule
        self.levels = Levels(self.schedule, STEPS)
        self.methods = Methods(self.schedule, calibration)
        self.comparer = load_comparer()
        self.report = StudyReport()
        self._tokenizer = Tokenizer(self.config)
        self._model = load_model(self.config, find_weights(self.config))
        self._types = {"fp32": torch.float32, "fp16": torch.float16}
        self.cases = scene_cases(args.cases, FIRST_MEASURED)
        self.network = self.make_network(self.cases)
        self.reference = self.record(self.network, "reference")
        self.images = self.network.images(self.reference.final)

    def check_time(self) -> None:
        """Raise OutOfTime where the seconds that were allowed are over; asked before each piece of work."""
        if time.perf_counter() - self._started > self.args.seconds:
            raise OutOfTime

    def make_network(self, cases: Sequence[Case], precision: str = "fp32") -> CaseNetwork:
        device, kind = self.args.device, self._types[precision]
        return CaseNetwork(cases, self._model, self._tokenizer, device, kind, self.args.batch)

    def record(self, network: CaseNetwork, title: str) -> Trajectories:
        print(f"{title}: {len(network.cases)} cases of {STEPS} steps", file=sys.stderr, flush=True)
        return record_all(network, self.levels)

    def fitted(self, cases: Sequence[Case], title: str) -> Tuple[CaseNetwork, Trajectories]:
        """Network and reference of cases to fit on."""
        self.check_time()
        network = self.make_network(cases)
        return network, self.record(network, title)

    def measure(self, latents: np.ndarray, evaluations: int) -> Dict[str, float]:
        """Errors of final latents of `cases`, means over them; of the images too where the tables show those."""
        errors = relative_errors(latents, self.reference.final)
        found = {"latent_relative_error": float(errors.mean()), "worst": float(errors.max())}
        if self.args.no_images or evaluations not in IMAGE_COUNTS:
            return found
        measures: Dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"psnr_db": psnr}
        for key, network in (("pd", self.comparer.pd), ("lpips", self.comparer.lpips)):
            if network is not None:
                measures[key] = network.between_images
        pairs = list(zip(self.network.images(latents), self.images))
        return {**found, **{key: float(np.mean([take(*pair) for pair in pairs])) for key, take in measures.items()}}

    def error(self, plan: SamplingPlan, predict: Network, reference: Trajectories) -> float:
        """Mean relative error of a plan on recorded cases."""
        self.check_time()
        return float(relative_errors(run_plan(predict, plan, reference.initial), reference.final).mean())

    # --- sections

    def errors(self) -> None:
        """Every method at every number of evaluations in every precision."""
        for precision in self.args.precisions:
            network = self.network if precision == "fp32" else self.make_network(self.cases, precision)
            for name in self.args.methods or self.methods.names():
                for count in self.args.counts:
                    self._error(network, precision, name, count)
            exact = run_plan(network.predict, exact_plan(self.schedule, STEPS), self.reference.initial)
            self.report.add_error(precision, "exact", STEPS, self.measure(exact, STEPS))

    def _error(self, network: CaseNetwork, precision: str, name: str, count: int) -> None:
        self.check_time()
        latents = self.methods.final(name, count, network.predict, self.reference.initial)
        if latents is not None:
            values = self.measure(latents, count)
            self.report.add_error(precision, name, count, values)
            error = values["latent_relative_error"]
            print(f"{precision}, {name}, {count} evaluations: {error:.4f}", file=sys.stderr, flush=True)

    def transfer(self) -> None:
        """Calibrated plans away from what they were fitted on, beside moves fitted there, of the same indices."""
        fitting = scene_cases(self.args.fitted, FIRST_FITTED)
        for guidance in GUIDANCE_SCALES:
            measured = at_guidance(self.cases, guidance)
            self._transfer(f"guidance {guidance:g}", measured, at_guidance(fitting, guidance))
        photographs = photograph_cases(ROOT / "pictures", PHOTO_PROMPTS)
        first = len(photographs) // len(PHOTO_PROMPTS) // 2 * len(PHOTO_PROMPTS)  # no photograph on both sides
        self._transfer("photographs", photographs[first:], photographs[:first])
        self._birds()

    def _transfer(self, title: str, measured: Sequence[Case], fitting: Sequence[Case]) -> None:
        network = self.make_network(measured)
        reference = self.record(network, title)
        there, trajectories = self.fitted(fitting, f"{title}, to fit on")
        for count in TRANSFER_COUNTS:
            point = self.methods.calibrated_point(count)
            held = self.methods.plan("DDIM, best subset", count)
            if point is None or held is None:
                continue
            own = refit(there.predict, self.levels, trajectories, point.indices)
            plans = {"DDIM, best subset": held, "calibrated": point.plan(self.schedule, STEPS), "fitted there": own}
            polished = self.methods.plan("calibrated, polished", count)
            plans.update({} if polished is None else {"calibrated, polished": polished})
            self.report.add_transfer(
                title, count, {name: self.error(plan, network.predict, reference) for name, plan in plans.items()}
            )

    def _birds(self) -> None:
        """Moves fitted on birds alone, used on scenes without birds and on photographs."""
        birds = scene_cases(self.args.fitted, FIRST_FITTED, keep=lambda scene: scene.kind == "bird")
        network, trajectories = self.fitted(birds, "birds, to fit on")
        others = [k for k, case in enumerate(self.cases) if case.kind != "bird"]
        photographs = self.make_network(photograph_cases(ROOT / "pictures", PHOTO_PROMPTS))
        targets = {"photographs": (photographs, self.record(photographs, "photographs"))}
        if others:
            scenes = self.make_network([self.cases[k] for k in others])
            targets["other scenes"] = (scenes, self.reference.select(others))
        for count in TRANSFER_COUNTS:
            point = self.methods.calibrated_point(count)
            if point is None:
                continue
            own = refit(network.predict, self.levels, trajectories, point.indices)
            for title, (there, reference) in targets.items():
                values = {
                    "calibrated": self.error(point.plan(self.schedule, STEPS), there.predict, reference),
                    "fitted on birds": self.error(own, there.predict, reference),
                }
                self.report.add_transfer(f"birds, used on {title}", count, values)

    def savings(self) -> None:
        """Each saving with moves fitted under it, against whole evaluations of the same cost."""
        share = control_share(self.config)
        network, trajectories = self.fitted(scene_cases(self.args.fitted, FIRST_FITTED), "savings, to fit on")
        plans = {count: self._saving_indices(count) for count in range(4, 13)}
        curve: Dict[float, float] = {}
        for count in self.args.counts:
            if count in plans:
                plan = refit(network.predict, self.levels, trajectories, plans[count])
                curve[2.0 * count] = self.error(plan, self.network.predict, self.reference)
        for count in SAVING_COUNTS:
            for saving in SAVINGS:
                self._saving(saving, plans[count], (network, trajectories), share, curve)
        self.report.values["control_share"] = {"tiny": share, "sd15": _sd15_share()}

    def _saving_indices(self, count: int) -> Tuple[int, ...]:
        point = self.methods.calibrated_point(count)
        return spread_indices(STEPS, count) if point is None else point.indices

    def _saving(
        self,
        saving: Saving,
        indices: Tuple[int, ...],
        fitting: Tuple[CaseNetwork, Trajectories],
        share: float,
        curve: Dict[float, float],
    ) -> None:
        cost = saving.halves(len(indices), share)
        if not min(curve, default=cost + 1) <= cost <= max(curve, default=cost - 1):
            return
        network, trajectories = fitting
        saved = SavingNetwork(network, saving, indices)
        # The first index is taken from the record, so the saving's memory must be filled there.
        first = int(self.levels.timesteps[indices[0]])
        saved.predict(range(trajectories.cases), first, trajectories.initial)
        plan = refit(saved.predict, self.levels, trajectories, indices)
        error = self.error(plan, SavingNetwork(self.network, saving, indices).predict, self.reference)
        self.report.add_saving(str(saving), len(indices), cost, error, interpolated_error(curve, cost))

    def precision(self) -> None:
        """The first evaluations in FP32, the others in FP16."""
        if "fp16" not in self.args.precisions:
            print("precision: left out, as --precisions has no fp16", file=sys.stderr, flush=True)
            return
        half = self.make_network(self.cases, "fp16")
        plans = {STEPS: exact_plan(self.schedule, STEPS)}
        for count in TRANSFER_COUNTS:
            found = self.methods.plan("calibrated, polished", count) or self.methods.plan("calibrated", count)
            plans.update({} if found is None else {count: found})
        for count, plan in plans.items():
            for first in (0, 1, 2, 4, 8, count):
                if first <= count:
                    mixed = high_precision_first(self.network.predict, half.predict, plan.timesteps, first)
                    self.report.add_precision(count, first, self.error(plan, mixed, self.reference))
        self.report.values["step_ms"] = {
            "fp32": self._step_milliseconds(self.network),
            "fp16": self._step_milliseconds(half),
        }

    def bound(self) -> None:
        """How close weighted sums of earlier predictions can come at all: each case's own weights, of its own end."""
        for count in TRANSFER_COUNTS:
            for kind in ("subset", "calibrated"):
                point = self.methods.point(count, kind)
                if point is None:
                    continue
                errors = {}
                for freedom in FREEDOMS:
                    self.check_time()
                    found = own_weights(self.network.predict, self.levels, self.reference, point.indices, freedom)
                    errors[str(freedom)] = float(found.mean())
                held = subset_plan(self.schedule, STEPS, point.indices)
                errors = {"held": self.error(held, self.network.predict, self.reference), **errors}
                self.report.add_bound(point.indices, errors)

    def _step_milliseconds(self, network: CaseNetwork, repeats: int = 5) -> float:
        """Median wall time of one evaluation of all cases."""
        numbers, latents = range(len(network.cases)), self.reference.initial
        timestep = int(self.levels.timesteps[-1])
        network.predict(numbers, timestep, latents)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            network.predict(numbers, timestep, latents)
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times))

    def latency(self, repeats: int = 5) -> None:
        """Milliseconds of one picture through the product, on a line through 4 and 20 evaluations."""
        from canny2image_TRT import hackathon
        from scoring.pictures import find_pictures
        from scoring.runner import CONTEST_REQUEST

        picture = find_pictures(ROOT / "pictures", 1)[0].read()
        on_cpu = self.args.device == "cpu"
        for precision in self.args.precisions:
            self.check_time()
            product = hackathon()
            backend = "onnxruntime" if on_cpu else "torch"
            product.initialize(model="tiny", backend=backend, device=self.args.device, precision=precision)
            spent: Dict[int, float] = {}
            for count in (4, STEPS):
                plan = subset_plan(self.schedule, STEPS, spread_indices(STEPS, count))
                times = []
                for _ in range(repeats + 1):
                    start = time.perf_counter()
                    product.run(picture, CONTEST_REQUEST, plan=plan)
                    times.append(1e3 * (time.perf_counter() - start))
                spent[count] = float(np.median(times[1:]))
            product.close()
            slope = (spent[STEPS] - spent[4]) / (STEPS - 4)
            self.report.add_latency(precision, backend, spent[4] - 4 * slope, slope)


def _sd15_share() -> float:
    from cldm.config import load_config

    return control_share(load_config("sd15"))


def parse_counts(text: str) -> List[int]:
    """ "4-8,12" to [4, 5, 6, 7, 8, 12]."""
    counts: List[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            counts += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range such as 4-12") from None
    if not counts or not all(2 <= count <= STEPS for count in counts):
        raise argparse.ArgumentTypeError(f"numbers of evaluations must be 2 .. {STEPS}, got {text!r}")
    return sorted(set(counts))


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", type=int, default=64, metavar="N", help="held-out scenes (default 64)")
    add("--fitted", type=int, default=16, metavar="N", help="scenes that moves are fitted on again (default 16)")
    add("--counts", type=parse_counts, default=list(range(4, 13)), metavar="LIST", help="evaluations (default 4-12)")
    add("--methods", metavar="A;B", help="some of the methods, with semicolons between (default all)")
    add("--only", default=",".join(SECTIONS), metavar="LIST", help=f"some of {','.join(SECTIONS)}")
    add("--device", help="cuda or cpu; default: cuda where there is one")
    add("--precisions", help="fp32, fp16 or both (default both on a GPU, fp32 on a CPU)")
    add("--batch", type=int, metavar="N", help="cases at a time (default 64, on a CPU 4)")
    add("--calibration", type=Path, metavar="FILE", help="default: the one that the product would use")
    add(
        "--seconds", type=float, default=math.inf, metavar="N", help="stop after about so many, and write what there is"
    )
    add("--no-images", action="store_true", help="latent errors only, nothing decoded")
    add("--docs", action="store_true", help=f"also put tables and chart into {DOCS.parent.name}/")
    add("--output", type=Path, default=ROOT / "build" / "sampler_study", metavar="DIR")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on the machine, and refuse what cannot be run."""
    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no CUDA device here")
    args.precisions = (args.precisions or ("fp32" if args.device == "cpu" else "fp32,fp16")).split(",")
    if not set(args.precisions) <= {"fp32", "fp16"}:
        parser.error(f"--precisions: fp32 and fp16 are known, got {','.join(args.precisions)}")
    args.batch = args.batch or (4 if args.device == "cpu" else 64)
    args.only = [name.strip() for name in args.only.split(",")]
    if not set(args.only) <= set(SECTIONS):
        parser.error(f"--only: known are {', '.join(SECTIONS)}, got {','.join(args.only)}")
    if min(args.cases, args.batch, args.fitted) < 1:
        parser.error("--cases, --fitted and --batch must be 1 or more")
    args.methods = [name.strip() for name in args.methods.split(";")] if args.methods else []
    known = Methods(_schedule()).names()
    if not set(args.methods) <= set(known):
        parser.error(f"--methods: known are {'; '.join(known)}")


def _schedule() -> Any:
    from cldm.config import load_config

    return load_config("tiny").schedule


def the_calibration(args: argparse.Namespace) -> Optional[Calibration]:
    """The calibration asked for or found; None, with a line that says so, where there is none."""
    from cldm.config import load_config
    from cldm.weights import find_weights

    if args.calibration is not None:
        return load_calibration(args.calibration)
    config = load_config("tiny")
    try:
        return find_calibration(config, find_weights(config), ROOT / "build", STEPS, precision="fp32", guidance=9.0)
    except CalibrationError as reason:
        print(f"best subsets and calibrated plans are left out: {reason}", file=sys.stderr, flush=True)
        return None


def main(argv: Optional[Sequence[str]] = None) -> int:
    import torch

    from cldm.files import require_room
    from cldm.machine import available_cores

    args = parse_arguments(argv)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    start = time.perf_counter()
    try:
        require_room(args.output, 1 << 20)
        study = Study(args, the_calibration(args))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"measure_sampler: {error}", file=sys.stderr)
        return 2
    sections: Dict[str, Callable[[], None]] = {name: getattr(study, name) for name in SECTIONS}
    for name in args.only:
        try:
            sections[name]()
        except OutOfTime:
            print(f"{name}: not finished in {args.seconds:g} s", file=sys.stderr, flush=True)
            break
        study.report.settings = settings(args, study, time.perf_counter() - start)
        study.report.write(args.output)  # a run that is stopped keeps what it has
        print(f"{name}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    study.report.settings = settings(args, study, time.perf_counter() - start)
    study.report.write(args.output, DOCS if args.docs else None)
    print(study.report.text())
    return 0


def settings(args: argparse.Namespace, study: Study, seconds: float) -> Dict[str, Any]:
    """What was run, on what."""
    import diffusers
    import torch

    from cldm.machine import processor_name

    calibration = study.methods.calibration
    cpu = args.device == "cpu"
    return {
        "model": study.config.name,
        "cases": len(study.cases),
        "kinds": kinds_of(study.cases),
        "device": processor_name() if cpu else torch.cuda.get_device_name(args.device),
        "precisions": args.precisions,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "calibration": None if calibration is None else {**calibration.made, "number": calibration.cases},
        "not_measured": study.comparer.not_measured,
        "seconds": seconds,
    }


if __name__ == "__main__":
    raise SystemExit(main())
