#!/usr/bin/env python3
"""Calibrate fewer network evaluations on your own weights and backend: one command, one small JSON file.

    python3 tools/calibrate_sampler.py                  # the model, backend and precision that run here
    python3 tools/calibrate_sampler.py --model sd15 --pictures my/photos --prompts my/prompts.txt --polish
    python3 tools/calibrate_sampler.py --batched --device cuda --polish --seconds 150     # many cases at a time

Records the full schedule's trajectories of some pictures, prompts and seeds, searches which steps to evaluate and fits
how each evaluation moves the latent on half of the cases, and measures the result on the other half: by PD where its
weights are here, else by the image's mean error. A run that was stopped goes on where it was. With --batched plain
PyTorch evaluates many cases at a time in place of the deployed backend, which is far quicker where one picture does not
fill the GPU; the file says so. A file of the same cases keeps the numbers of evaluations that are not made anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "cv2", "yaml", "transformers"])

import numpy as np  # noqa: E402

from compute_score import build_folder  # noqa: E402
from sampling.calibration import (  # noqa: E402
    BUDGET_MEASURES,
    FEWEST_EVALUATIONS,
    HIGHER_IS_BETTER,
    Calibration,
    CalibrationError,
    Setting,
    Spread,
    calibration_folder,
    load_calibration,
    refusals,
    save_calibration,
)
from sampling.fit import KINDS  # noqa: E402
from sampling.search import Effort  # noqa: E402
from sampling.stages import Found, Stages, selected  # noqa: E402
from sampling.trajectory import Levels  # noqa: E402

# Room for a file of some hundred cases' names and a few dozen plans.
FILE_BYTES = 1 << 20
# Room for the recorded trajectories of some hundred cases.
STATE_BYTES = 512 << 20
FIRST_SEED = 7_100_000
# Scenes of a seed of their own: neither the tiny model's training nor its tests have drawn them.
SCENE_SEED = 20270707
# The contest's prompt, and others for what people paint.
PROMPTS = (
    "a bird",
    "a small red bird on a branch",
    "an eagle in front of a blue sky",
    "a cat sitting on a sofa",
    "a portrait of an old man",
    "a house by a lake in autumn",
    "a cup of coffee on a wooden table",
    "a bird, oil painting",
    "a city street at night, rain",
    "a bowl of fruit, still life",
    "a yellow flower in a green meadow",
    "a parrot in the jungle",
    "a snowy mountain under a clear sky",
    "a wooden boat on a calm sea",
    "a bird, watercolour",
    "an astronaut on the moon",
)
# The tiny model's world, for pictures whose own captions are not known.
TINY_PROMPTS = ("a bird", "a red bird", "a blue flower", "a yellow house", "a green tree", "an orange cat")


@dataclass(frozen=True)
class Case:
    """One recorded image: a picture of (H, W, 3) uint8 in BGR, its name, a prompt and a seed."""

    name: str
    image: np.ndarray
    prompt: str
    seed: int

    def describe(self) -> List[Any]:
        content = hashlib.sha256(np.ascontiguousarray(self.image).tobytes()).hexdigest()[:16]
        return [self.name, content, self.prompt, self.seed]


def parse_counts(text: str) -> Tuple[int, ...]:
    """ "4-12" or "7,8,10" as rising numbers."""
    try:
        counts = set()
        for part in text.split(","):
            first, dash, last = part.partition("-")
            counts |= set(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a range as 4-12 nor a list as 7,8,10") from None
    if not counts or min(counts) < FEWEST_EVALUATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {FEWEST_EVALUATIONS} evaluations or more can be calibrated, as fewer always run as plain DDIM"
        )
    return tuple(sorted(counts))


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="sd15, tiny, or a YAML file; default: sd15 where its checkpoint is, else tiny")
    add("--checkpoint", metavar="FILE", help="default: the model's own under models/")
    add("--random-weights", type=int, metavar="SEED", help="seeded random weights, to try the command out")
    add("--backend", help="such as onnxruntime or torch; default: the first that can run here")
    add("--precision", help="such as fp32 or fp16; default: the backend's own")
    add("--device", help="such as cpu or cuda:1; default: the backend's own")
    add(
        "--build-dir", type=Path, default=build_folder(), metavar="DIR", help="default: HACKATHON_BUILD_DIR, else build"
    )
    add("--height", type=int, default=256)
    add("--width", type=int, default=384)
    add("--evaluations", type=parse_counts, default=parse_counts("4-12"), metavar="N-M", help="default: 4-12")
    add("--steps", type=int, default=20, metavar="S", help="steps of the full schedule (default: 20)")
    add("--guidance", type=float, default=9.0, metavar="SCALE", help="default: 9")
    add("--cases", type=int, default=32, metavar="N", help="cases, half of them held out (default: 32)")
    add("--pictures", type=Path, metavar="DIR", help="default: pictures/, and for tiny scenes of its own as well")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line; default: a list built in")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is searched (default: all)")
    add(
        "--polish",
        action="store_true",
        help="refine the best of each number on the end point; takes much longer than the rest",
    )
    effort = Effort()
    add("--starts", type=int, default=effort.starts, metavar="N", help=f"of each search (default: {effort.starts})")
    add("--trials", type=int, default=effort.trials, metavar="N", help=f"of each search (default: {effort.trials})")
    add("--cases-searched", type=int, default=effort.last_cases, metavar="N", help="cases at the end of each search")
    add("--batched", action="store_true", help="many cases at a time through plain PyTorch, not the deployed backend")
    add("--batch", type=int, default=256, metavar="N", help="with --batched: cases at a time (default: 256)")
    add(
        "--seconds", type=float, default=math.inf, metavar="N", help="stop after about so many, and write what there is"
    )
    add("--output", type=Path, metavar="FILE", help="default: build/sampler/<what it is for>.json")
    args = parser.parse_args(argv)
    if args.cases < 4 or args.cases % 2:
        parser.error(f"--cases must be an even number of 4 or more, got {args.cases}")
    if args.evaluations[-1] >= args.steps:
        parser.error(f"--evaluations: {args.evaluations[-1]} is not fewer than the {args.steps} of --steps")
    if args.starts < 1 or args.trials < 0 or args.cases_searched < 1 or args.batch < 1:
        parser.error("--starts, --cases-searched and --batch must be at least 1, and --trials at least 0")
    if not args.seconds > 0:
        parser.error(f"--seconds must be above 0, got {args.seconds:g}")
    if args.batched and args.backend not in (None, "torch"):
        parser.error(f"--batched runs plain PyTorch, not --backend {args.backend}")
    return args


def read_prompts(path: Path) -> List[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def make_cases(args: argparse.Namespace, model: str) -> List[Case]:
    """Pictures, prompts and seeds. Neighbours have different pictures, so what is held out was not fitted to.

    Raises
    ------
    ValueError
        There are fewer than two pictures.
    """
    from scoring.pictures import OWN_FOLDER, find_pictures

    found = find_pictures(args.pictures or OWN_FOLDER, None, min(args.height, args.width))
    pictures = [(picture.name, fit_picture(picture.read(), args.height, args.width)) for picture in found]
    prompts = read_prompts(args.prompts) if args.prompts else list(TINY_PROMPTS if model == "tiny" else PROMPTS)
    captions: Dict[str, str] = {}
    if model == "tiny" and args.pictures is None:
        for name, image, caption in _scenes(args.cases - len(pictures)):
            pictures.append((name, fit_picture(image, args.height, args.width)))
            captions[name] = caption
    if len(pictures) < 2:
        raise ValueError("one picture is not enough: half of the cases are held out; add one to --pictures")
    halves = [pictures[0::2], pictures[1::2]]
    cases = []
    for number in range(args.cases):
        half = halves[number % 2]
        name, image = half[number // 2 % len(half)]
        own = captions if args.prompts is None else {}
        cases.append(Case(name, image, own.get(name, prompts[number % len(prompts)]), FIRST_SEED + number))
    return cases


def _scenes(count: int) -> List[Tuple[str, np.ndarray, str]]:
    """Name, picture in BGR and one of the captions of scenes that no one else has drawn."""
    from tools.tiny.scenes import make_scene

    found = []
    for index in range(max(count, 0)):
        scene = make_scene(index, "train", seed=SCENE_SEED)
        caption = scene.captions[index % len(scene.captions)]
        found.append((f"scene {index}", np.ascontiguousarray(scene.image[:, :, ::-1]), caption))
    return found


def fit_picture(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture in the proportions of height and width, in that size."""
    import cv2

    if image.shape[:2] == (height, width):
        return image
    rows, columns = image.shape[:2]
    scale = max(height / rows, width / columns)
    high, wide = min(rows, round(height / scale)), min(columns, round(width / scale))
    top, left = (rows - high) // 2, (columns - wide) // 2
    part = image[top : top + high, left : left + wide]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(part, (width, height), interpolation=method)


class Deployed:
    """The deployed networks of a model on a backend, with the cases prepared."""

    group = 1

    def __init__(self, args: argparse.Namespace) -> None:
        from cldm.checkpoint import load_model
        from cldm.tokenizer import Tokenizer
        from cldm.weights import find_weights
        from deploy.spec import Build
        from runtime.backends import BackendError, choose_backend
        from runtime.choose import choose_model

        config = choose_model(args.model, args.checkpoint)
        weights = find_weights(config, args.checkpoint, args.random_weights, args.build_dir / ".hashes.json")
        self.backend, reason = choose_backend(
            args.backend, args.device, weights, lambda: load_model(config, weights), args.build_dir, True, say
        )
        precision = args.precision or self.backend.precisions[0]
        if precision not in self.backend.precisions:
            known = ", ".join(self.backend.precisions)
            raise BackendError(f"{self.backend.name} on {self.backend.device} runs {known}, not {precision!r}")
        self.config = config
        self.setting = Setting(config.name, weights.digest, args.steps, self.backend.name, precision, args.guidance)
        build = Build(config, args.height, args.width, 1, precision)
        self.shape = build.latent_shape
        say(f"model {config.name} ({weights}), {self.backend.name} on {self.backend.device} in {precision} ({reason})")
        self._build, self._tokenizer = build, Tokenizer(config)
        self._sessions: Mapping[str, Any] = {}
        self.evaluator: Any = None  # made with the sessions
        self._conditions: List[Any] = []

    def prepare(self, cases: Sequence[Case], args: argparse.Namespace) -> np.ndarray:
        """Make the graphs ready and run text and hint of all cases; their first latents, (K, D) float32."""
        from cldm.noise import draw_noise
        from runtime.evaluator import StepEvaluator
        from scoring.runner import CONTEST_REQUEST

        self._sessions = self.backend.sessions(self._build)
        self.evaluator = StepEvaluator(self._build, self._sessions, self._tokenizer, self.backend.device)
        initial = []
        for case in cases:
            request = dataclasses.replace(
                CONTEST_REQUEST,
                prompt=case.prompt,
                seed=case.seed,
                ddim_steps=args.steps,
                guidance_scale=args.guidance,
                image_resolution=min(args.height, args.width),
            )
            self._conditions.append(self.evaluator.prepare(case.image, request))
            noise, _ = draw_noise(case.seed, self.shape, args.steps, 0.0, self.backend.device)
            initial.append(noise.cpu().numpy().reshape(-1))
        return np.stack(initial)

    def network(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        """A `sampling.trajectory.Network`."""
        shaped = latents.reshape(-1, *self.shape[1:])
        noises = [self.evaluator.noise(self._conditions[case], timestep, x) for case, x in zip(cases, shaped)]
        return np.stack(noises).reshape(latents.shape)

    def images(self, latents: np.ndarray) -> List[np.ndarray]:
        """(K, D) final latents to images."""
        return [self.evaluator.decode(latent.reshape(self.shape[1:])) for latent in latents]

    def close(self) -> None:
        if self.evaluator is not None:
            self.evaluator.close()
        for session in self._sessions.values():
            session.close()
        self.backend.close()


class Batched:
    """The networks of a model in plain PyTorch, for many cases at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from cldm.checkpoint import load_model
        from cldm.weights import find_weights
        from runtime.choose import choose_model

        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: PyTorch finds no CUDA device here")
        types = {"fp32": torch.float32, "fp16": torch.float16}
        precision = args.precision or "fp32"
        if precision not in types:
            raise ValueError(f"--batched runs {', '.join(types)}, not {precision!r}")
        self.config = choose_model(args.model, args.checkpoint)
        weights = find_weights(self.config, args.checkpoint, args.random_weights, args.build_dir / ".hashes.json")
        self.setting = Setting(self.config.name, weights.digest, args.steps, "torch", precision, args.guidance)
        say(f"model {self.config.name} ({weights}), batches of PyTorch on {device} in {precision}")
        self.group = args.batch
        self._make = (load_model(self.config, weights), device, types[precision])
        self._cases: Any = None

    def prepare(self, cases: Sequence[Case], args: argparse.Namespace) -> np.ndarray:
        """Run text and hint of all cases; their first latents, (K, D) float32."""
        from cldm.image import canny_map
        from cldm.tokenizer import Tokenizer
        from scoring.runner import CONTEST_REQUEST
        from tools.sampler.cases import Case as NetworkCase
        from tools.sampler.network import CaseNetwork

        low, high = CONTEST_REQUEST.low_threshold, CONTEST_REQUEST.high_threshold
        size = min(args.height, args.width)
        made = [
            NetworkCase(case.name, "", canny_map(case.image, size, low, high), case.prompt, case.seed, args.guidance)
            for case in cases
        ]
        model, device, kind = self._make
        self._cases = CaseNetwork(made, model, Tokenizer(self.config), device, kind, batch=self.group)
        initial: np.ndarray = self._cases.initial()
        return initial

    def network(self, cases: Sequence[int], timestep: int, latents: np.ndarray) -> np.ndarray:
        """A `sampling.trajectory.Network`."""
        noise: np.ndarray = self._cases.predict(cases, timestep, latents)
        return noise

    def images(self, latents: np.ndarray) -> List[np.ndarray]:
        """(K, D) final latents to images."""
        return list(self._cases.images(latents))

    def close(self) -> None:
        """Nothing is held beside PyTorch's own memory."""


class ImageMeasure:
    """Every measure that this machine can take, of the held-out cases' final latents against the reference's."""

    def __init__(self, networks: Union[Deployed, Batched], comparer: Any, reference: np.ndarray) -> None:
        self._networks = networks
        self._comparer = comparer
        self._latents = reference
        self._images = networks.images(reference)

    def __call__(self, final: np.ndarray) -> Dict[str, Spread]:
        rows = [
            self._comparer.compare(image, wanted, latent, target)
            for image, wanted, latent, target in zip(self._networks.images(final), self._images, final, self._latents)
        ]
        found = {}
        for key in rows[0]:
            # Two equal images have no PSNR that JSON could hold.
            values = [min(row[key], 100.0) if key == "psnr_db" else row[key] for row in rows]
            worst = min(values) if key in HIGHER_IS_BETTER else max(values)
            found[key] = Spread(round(sum(values) / len(values), 6), round(float(worst), 6))
        return found


def calibrate(args: argparse.Namespace) -> Tuple[Calibration, Path]:
    """Everything, from the checks to the finished calibration and where it belongs."""
    from cldm.files import require_room
    from deploy.spec import Build
    from runtime.choose import choose_model
    from scoring.measures import load_comparer

    started = time.perf_counter()
    config = choose_model(args.model, args.checkpoint)
    Build(config, args.height, args.width)  # refuses sizes that the model cannot take, whoever evaluates it
    folder = calibration_folder(args.build_dir)
    if args.output is not None:
        check_output(args.output)
    require_room(folder / "state", STATE_BYTES)
    cases = make_cases(args, config.name)
    comparer = load_comparer()
    by = next(key for key in BUDGET_MEASURES if key not in comparer.not_measured)
    networks = Batched(args) if args.batched else Deployed(args)
    try:
        path = args.output or folder / networks.setting.file_name
        kept = kept_calibration(path, networks.setting, cases, by, args)
        found = search(networks, cases, comparer, folder / "state", args, started)
    finally:
        networks.close()
    if not found:
        raise ValueError(f"{args.seconds:g} s were too short for a single plan; the same command goes on from here")
    fitted = len(cases) - len(cases) // 2
    made = how_made(found, cases, args)
    calibration = Calibration(networks.setting, fitted, tuple(selected(found, by)), by, made)
    return (calibration if kept is None else merged(calibration, kept)), path


def how_made(found: Sequence[Found], cases: Sequence[Case], args: argparse.Namespace) -> Dict[str, Any]:
    """`Calibration.made`."""
    return {
        "date": datetime.date.today().isoformat(),
        "cases": sorted({case.name for case in cases}),
        "cases_digest": cases_digest(cases),
        "seeds": [cases[0].seed, cases[-1].seed],
        "held_out": len(cases) // 2,
        "batched": args.batched,
        # What the plans have on the cases that they were fitted to: far less than held out would be an overfit.
        "fitted": {f"{len(one.indices)} {one.name}": round(one.fit_error, 5) for one in found},
        "prompts_digest": hashlib.sha256("\n".join(case.prompt for case in cases).encode()).hexdigest()[:16],
        "height": args.height,
        "width": args.width,
        "starts": args.starts,
        "trials": args.trials,
        "polish": args.polish,
    }


def cases_digest(cases: Sequence[Case]) -> str:
    """Hash of all pictures' pixels, names, prompts and seeds in their order."""
    return hashlib.sha256(json.dumps([case.describe() for case in cases]).encode()).hexdigest()[:16]


def check_output(path: Path) -> None:
    """Raise OSError or ValueError where --output could not be written, or would overwrite what is no calibration."""
    from cldm.files import require_room

    if path.is_dir():
        raise IsADirectoryError(f"--output {path} is a folder; name a file, such as {path / 'mine.json'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}; make it, or name another")
    require_room(path.parent, FILE_BYTES)
    if path.exists():
        try:
            load_calibration(path)
        except CalibrationError as error:
            raise ValueError(
                f"--output would overwrite what is no calibration: {error}, or name another file"
            ) from None


def kept_calibration(
    path: Path, setting: Setting, cases: Sequence[Case], by: str, args: argparse.Namespace
) -> Optional[Calibration]:
    """The calibration in a file that is about to be written, where what it has can be kept beside what will be made.

    Otherwise None, with a line on why the file will be replaced, where there is one.
    """
    if not path.is_file():
        return None
    try:
        found = load_calibration(path)
    except CalibrationError as error:
        say(f"{path} will be replaced: {error}")
        return None
    other = refusals(found.setting, setting)
    if found.setting != setting and not other:
        other.append("backend, precision or guidance scale is another")
    if found.made.get("cases_digest") != cases_digest(cases):
        other.append(f"it is of other cases ({found.cases} fitted)")
    if found.made.get("batched") != args.batched:
        other.append(f"it was made {'with' if found.made.get('batched') else 'without'} --batched")
    if found.selected_by != by:
        other.append(f"its plans were selected by {found.selected_by}, these are by {by}")
    counts = ", ".join(map(str, found.counts))
    if other:
        say(f"{path} with {counts} evaluations will be replaced: {'; '.join(other)}. To keep both give --output FILE")
        return None
    for stays, fate in ((True, "kept"), (False, "made anew")):
        some = [str(count) for count in found.counts if (count not in args.evaluations) == stays]
        if some:
            say(f"{path} is of these cases: its plans of {', '.join(some)} evaluations will be {fate}")
    return found


def merged(new: Calibration, old: Calibration) -> Calibration:
    """A calibration, and of another one of the same cases the numbers of evaluations that it lacks.

    `made` tells of the new one; under "kept" it says when, and with what effort, the others were made.
    """
    stay = [count for count in old.counts if count not in new.counts]
    effort = {key: old.made.get(key) for key in ("date", "starts", "trials", "polish")}
    earlier = old.made.get("kept", {})
    fitted = {key: error for key, error in old.made["fitted"].items() if int(key.split()[0]) in stay}
    made = {
        **new.made,
        "fitted": {**fitted, **new.made["fitted"]},
        "kept": {str(count): earlier.get(str(count), effort) for count in stay},
    }
    points = sorted([*new.points, *(p for p in old.points if p.evaluations in stay)], key=lambda p: p.evaluations)
    return dataclasses.replace(new, points=tuple(points), made=made)


def search(
    networks: Union[Deployed, Batched],
    cases: Sequence[Case],
    comparer: Any,
    state: Path,
    args: argparse.Namespace,
    started: float,
) -> List[Found]:
    """All stages, with what `parse_arguments` asks of them, in what is left of its seconds since `started`."""
    initial = networks.prepare(cases, args)
    stages = Stages(
        networks.network,
        Levels(networks.config.schedule, args.steps),
        initial,
        {
            "setting": vars(networks.setting),
            "batched": args.batched,
            "cases": [case.describe() for case in cases],
            "measures": sorted(comparer.not_measured),
        },
        state,
        Effort(
            args.starts,
            args.trials,
            max(2, 2 * args.starts // 3),
            max(1, args.cases_searched // 4),
            args.cases_searched,
        ),
        group=networks.group,
        seconds=args.seconds - (time.perf_counter() - started),
        report=say,
    )
    measure = ImageMeasure(networks, comparer, stages.record().select(stages.held).final)
    return stages.run(args.evaluations, args.kinds, measure, args.polish)


def format_table(calibration: Calibration) -> str:
    """Evaluations by kinds: mean of the selecting measure and of the latent's error; the chosen kind is starred."""
    by = calibration.selected_by
    keys = [by] + [key for key in ("latent_relative_error", "psnr_db", "lpips") if key != by]
    keys = [key for key in keys if all(key in point.errors for point in calibration.points)]
    lines = ["  ".join(["evaluations", f"{'kind':22}", *(f"{key:>21}" for key in keys), "indices"])]
    for point in sorted(calibration.points, key=lambda p: p.evaluations):
        star = "*" if point is calibration.point(point.evaluations) else " "
        cells = [f"{point.errors[key].mean:>21.4f}" for key in keys]
        indices = " ".join(map(str, point.indices))
        lines.append("  ".join([f"{point.evaluations:>10}{star}", f"{point.name:22}", *cells, indices]))
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The exit status: 0, or 1 after an error and 130 after Ctrl-C, each with a line on standard error."""
    args = parse_arguments(argv)
    try:
        calibration, path = calibrate(args)
        save_calibration(calibration, path)
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from here")
        return 130
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        say(f"calibrate_sampler: {error}")
        return 1
    print(format_table(calibration))
    print(f"{calibration.made['held_out']} held-out cases; * is what that number gets, by {calibration.selected_by}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
