#!/usr/bin/env python3
"""Calibrate fewer network evaluations on your own weights and backend: one command, one small JSON file.

    python3 tools/calibrate_sampler.py                  # the model, backend and precision that run here
    python3 tools/calibrate_sampler.py --model sd15 --pictures my/photos --prompts my/prompts.txt --polish

Records the full schedule's trajectories of some pictures, prompts and seeds, searches which steps to evaluate and fits
how each evaluation moves the latent on half of the cases, and measures the result on the other half: by PD where its
weights are here, else by the image's mean error. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "cv2", "yaml", "transformers"])

import numpy as np  # noqa: E402

from sampling.calibration import (  # noqa: E402
    BUDGET_MEASURES,
    HIGHER_IS_BETTER,
    Calibration,
    Setting,
    Spread,
    calibration_folder,
    save_calibration,
)
from sampling.fit import KINDS  # noqa: E402
from sampling.search import Effort  # noqa: E402
from sampling.stages import Stages, selected  # noqa: E402
from sampling.trajectory import Levels  # noqa: E402

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
    if not counts or min(counts) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: 2 evaluations or more can be calibrated")
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
    add("--build-dir", type=Path, default=ROOT / "build", metavar="DIR", help="default: build")
    add("--height", type=int, default=256)
    add("--width", type=int, default=384)
    add("--evaluations", type=parse_counts, default=parse_counts("4-12"), metavar="N-M", help="default: 4-12")
    add("--steps", type=int, default=20, metavar="S", help="steps of the full schedule (default: 20)")
    add("--guidance", type=float, default=9.0, metavar="SCALE", help="default: 9")
    add("--cases", type=int, default=32, metavar="N", help="cases, half of them held out (default: 32)")
    add("--pictures", type=Path, metavar="DIR", help="default: pictures/, and for tiny scenes of its own as well")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line; default: a list built in")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is searched (default: all)")
    add("--polish", action="store_true", help="refine the best of each number on the end point; takes about as long")
    effort = Effort()
    add("--starts", type=int, default=effort.starts, metavar="N", help=f"of each search (default: {effort.starts})")
    add("--trials", type=int, default=effort.trials, metavar="N", help=f"of each search (default: {effort.trials})")
    add("--output", type=Path, metavar="FILE", help="default: build/sampler/<what it is for>.json")
    args = parser.parse_args(argv)
    if args.cases < 4 or args.cases % 2:
        parser.error(f"--cases must be an even number of 4 or more, got {args.cases}")
    if args.evaluations[-1] >= args.steps:
        parser.error(f"--evaluations: {args.evaluations[-1]} is not fewer than the {args.steps} of --steps")
    if args.starts < 1 or args.trials < 0:
        parser.error("--starts must be at least 1, and --trials at least 0")
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

    def __init__(self, args: argparse.Namespace) -> None:
        from cldm.checkpoint import load_model
        from cldm.tokenizer import Tokenizer
        from cldm.weights import find_weights
        from deploy.spec import Build
        from runtime.backends import BackendError, choose_backend
        from runtime.choose import choose_model
        from runtime.evaluator import StepEvaluator

        config = choose_model(args.model, args.checkpoint)
        weights = find_weights(config, args.checkpoint, args.random_weights, args.build_dir / ".hashes.json")
        tokenizer = Tokenizer(config)
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
        self._sessions = self.backend.sessions(build)
        self.evaluator = StepEvaluator(build, self._sessions, tokenizer, args.steps, self.backend.device)
        self._conditions: List[Any] = []

    def prepare(self, cases: Sequence[Case], args: argparse.Namespace) -> np.ndarray:
        """Run text and hint of all cases; their first latents, (K, D) float32."""
        import dataclasses

        from cldm.noise import draw_noise
        from scoring.runner import CONTEST_REQUEST

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

    def network(self, case: int, index: int, latent: np.ndarray) -> np.ndarray:
        """A `sampling.trajectory.Network`."""
        return self.evaluator.noise(self._conditions[case], index, latent.reshape(self.shape[1:])).reshape(-1)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        return self.evaluator.decode(latent.reshape(self.shape[1:]))

    def close(self) -> None:
        self.evaluator.close()
        for session in self._sessions.values():
            session.close()
        self.backend.close()


class ImageMeasure:
    """Every measure that this machine can take, of the held-out cases' final latents against the reference's."""

    def __init__(self, deployed: Deployed, comparer: Any, reference: np.ndarray) -> None:
        self._deployed = deployed
        self._comparer = comparer
        self._latents = reference
        self._images = [deployed.decode(latent) for latent in reference]

    def __call__(self, final: np.ndarray) -> Dict[str, Spread]:
        rows = [
            self._comparer.compare(self._deployed.decode(latent), image, latent, target)
            for latent, image, target in zip(final, self._images, self._latents)
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
    from runtime.choose import choose_model
    from scoring.measures import load_comparer

    cases = make_cases(args, choose_model(args.model, args.checkpoint).name)
    comparer = load_comparer()
    folder = calibration_folder(args.build_dir)
    require_room(folder / "state", STATE_BYTES)
    deployed = Deployed(args)
    try:
        initial = deployed.prepare(cases, args)
        described = [case.describe() for case in cases]
        stages = Stages(
            deployed.network,
            Levels(deployed.config.schedule, args.steps),
            initial,
            {"setting": vars(deployed.setting), "cases": described, "measures": sorted(comparer.not_measured)},
            folder / "state",
            Effort(args.starts, args.trials, max(2, 2 * args.starts // 3)),
            report=say,
        )
        reference = stages.record().select(stages.held).final
        measure = ImageMeasure(deployed, comparer, reference)
        found = stages.run(args.evaluations, args.kinds, measure, args.polish)
    finally:
        deployed.close()
    by = next(key for key in BUDGET_MEASURES if key in found[0].errors)
    made = {
        "date": datetime.date.today().isoformat(),
        "cases": sorted({case.name for case in cases}),
        "seeds": [cases[0].seed, cases[-1].seed],
        "prompts_digest": hashlib.sha256("\n".join(case.prompt for case in cases).encode()).hexdigest()[:16],
        "height": args.height,
        "width": args.width,
        "starts": args.starts,
        "trials": args.trials,
        "polish": args.polish,
    }
    calibration = Calibration(deployed.setting, len(cases), tuple(selected(found, by)), by, made)
    return calibration, args.output or folder / deployed.setting.file_name


def format_table(calibration: Calibration) -> str:
    """Evaluations by kinds: mean of the selecting measure and of the latent's error; the chosen kind is starred."""
    by = calibration.selected_by
    keys = [by] + [key for key in ("latent_relative_error", "psnr_db", "lpips") if key != by]
    keys = [key for key in keys if key in calibration.points[0].errors]
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
    print(f"{calibration.cases // 2} held-out cases; * is what that number gets, by {calibration.selected_by}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
