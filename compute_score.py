#!/usr/bin/env python3
"""Score the pipeline: latency, and distance from what the original PyTorch FP32 pipeline makes, picture by picture.

Writes score.json, score.csv and contact_sheet.png; with --speed alone, a table of what fewer network evaluations cost
and give on this machine, and speed.json. Needs no network.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from environment import ensure_environment

ROOT = Path(__file__).resolve().parent
PACKAGES = ("numpy", "cv2", "torch", "transformers", "yaml", "tqdm", "onnxruntime or tensorrt")
# Options that are passed on to hackathon.initialize where given.
INITIALIZE = ("model", "checkpoint", "random_weights", "backend", "precision", "device")
# What --speed asks for where no speed follows it.
TABLE = "table"
# What a full report needs on the disk: tables, and a sheet of eight rows.
OUTPUT_BYTES = 16 << 20


def build_folder() -> Path:
    """Where made files are kept, as `hackathon` has it."""
    return Path(os.environ.get("HACKATHON_BUILD_DIR") or ROOT / "build")


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pictures", metavar="DIR", help="default: the contest's folder where there is one, else pictures/")
    add("--limit", type=int, metavar="N", help="score the first N pictures")
    add("--model", help="sd15, tiny, or a YAML file; default: sd15 where its checkpoint is, else tiny")
    add("--checkpoint", metavar="FILE", help="default: the model's own under models/")
    add("--random-weights", type=int, metavar="SEED", help="seeded random weights, for benchmarks")
    add("--backend", help="such as onnxruntime or torch; default: the first that can run here")
    add("--precision", help="such as fp32 or fp16; default: the backend's own")
    add("--device", help="such as cpu or cuda:1; default: the backend's own")
    add("--prompt", help="default: the contest's")
    add("--seed", type=int, help="default: the contest's")
    add("--steps", type=int, metavar="N", help="sampler steps; default: the contest's 20")
    speed = "such as 7, pd:5 or exact; alone: the table of all speeds; default: HACKATHON_SPEED, else exact"
    add("--speed", nargs="?", const=TABLE, metavar="SPEED", help=speed)
    add("--warmup", type=int, default=1, metavar="N", help="untimed calls before the first timed one (default: 1)")
    add("--repeats", type=int, default=1, metavar="N", help="timed calls a picture, their median counts (default: 1)")
    add("--output", type=Path, default=build_folder() / "score", metavar="DIR", help="default: build/score")
    add("--noise-floor", action="store_true", help="make each reference twice and compare the two as well")
    add("--no-reference", action="store_true", help="measure latency only")
    return parser.parse_args(argv)


def score_options(arguments: argparse.Namespace) -> Any:
    """The contest's arguments with those that the user gave in their place."""
    import dataclasses

    from scoring.runner import CONTEST_REQUEST, ScoreOptions

    given = {"prompt": arguments.prompt, "seed": arguments.seed, "ddim_steps": arguments.steps}
    request = dataclasses.replace(CONTEST_REQUEST, **{k: v for k, v in given.items() if v is not None})
    return ScoreOptions(
        request=request,
        warmup=arguments.warmup,
        repeats=arguments.repeats,
        reference=not arguments.no_reference,
        noise_floor=arguments.noise_floor,
    )


def run(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked before the work, then do it and write the report."""
    from canny2image_TRT import hackathon
    from cldm.files import require_room
    from scoring.measures import Comparer, load_comparer
    from scoring.pictures import default_folder, find_pictures
    from scoring.reference_cache import ReferenceCache

    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {arguments.limit}")
    options = score_options(arguments)
    folder = arguments.pictures or default_folder()
    pictures = find_pictures(folder, arguments.limit, options.request.image_resolution)
    cache = ReferenceCache(build_folder() / "reference")
    for place in [arguments.output, *([cache.folder] if options.reference else [])]:
        require_room(place, OUTPUT_BYTES)
    comparer = load_comparer() if options.reference else Comparer()
    pipeline = hackathon()
    keywords = {key: getattr(arguments, key) for key in INITIALIZE}
    # The table runs plans of its own; a HACKATHON_SPEED that cannot be had must not keep the user from choosing one.
    keywords["speed"] = "exact" if arguments.speed == TABLE else arguments.speed
    pipeline.initialize(**{key: value for key, value in keywords.items() if value is not None})
    work = _compare_speeds if arguments.speed == TABLE else _score
    try:
        work(pipeline, comparer, options, cache, pictures, arguments)
    finally:
        pipeline.close()


def _score(
    pipeline: Any, comparer: Any, options: Any, cache: Any, pictures: List[Any], arguments: argparse.Namespace
) -> None:
    from tqdm import tqdm

    from scoring.report import format_report, what_runs, write_report
    from scoring.runner import Runner
    from scoring.sheet import MAX_ROWS

    runner = Runner(pipeline, comparer, options, cache)
    receipt = runner.warm_up(pictures[0]).receipt
    print(what_runs(receipt.to_dict(), options.warmup, options.repeats), flush=True)
    print(f"pictures   {len(pictures)} of {pictures[0].path.parent}", flush=True)
    with tqdm(total=len(pictures), unit="picture") as bar:

        def progress(name: str, doing: str) -> None:
            bar.set_postfix_str(f"{name}: {doing}")
            bar.update(doing == "done")

        score = runner.run(pictures, MAX_ROWS, progress)
    print(format_report(score), flush=True)
    for path in write_report(score, arguments.output, _plain(arguments)):
        print(f"wrote      {path}")


def _compare_speeds(
    pipeline: Any, comparer: Any, options: Any, cache: Any, pictures: List[Any], arguments: argparse.Namespace
) -> None:
    from tqdm import tqdm

    from cldm.files import write_json
    from scoring.report import what_runs
    from scoring.runner import Runner
    from scoring.speed import SpeedRunner, format_speeds, speeds_json

    runner = Runner(pipeline, comparer, options, cache)
    plans = pipeline.plans(options.request)
    receipt = pipeline.run(pictures[0].read(), options.request, plan=plans[-1]).receipt
    print(what_runs(receipt.to_dict(), options.warmup, options.repeats, by_plan=True), flush=True)
    print(f"pictures   {len(pictures)} of {pictures[0].path.parent}, each with {len(plans)} plans", flush=True)
    with tqdm(total=len(pictures) * len(plans), unit="picture") as bar:

        def progress(name: str, doing: str, done: bool) -> None:
            bar.set_postfix_str(f"{name}: {doing}")
            bar.update(done)

        rows = SpeedRunner(runner, progress).run(plans, pictures, receipt.device)
    not_measured = comparer.not_measured if options.reference else {}
    print(format_speeds(rows, not_measured), flush=True)
    path = arguments.output / "speed.json"
    write_json(path, speeds_json(rows, not_measured, options.request, _plain(arguments)))
    print(f"wrote      {path}")


def _plain(arguments: argparse.Namespace) -> Dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 after an error and 130 after Ctrl-C, each with a line on standard error."""
    arguments = parse_arguments(argv)
    ensure_environment(PACKAGES)
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("interrupted: files that were written are whole, and references made so far are kept", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
