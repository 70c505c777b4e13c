#!/usr/bin/env python3
"""ONNX Runtime against eager PyTorch on this machine's CPU, stage by stage, in one run.

The two take turns on the same request, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("host", "text", "hint", "steps", "decode", "total")


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="seeded random weights")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5, help="timed images a backend, after one that is not")
    parser.add_argument("--picture", type=Path, help="default: the first of pictures/")
    parser.add_argument("--build-dir", help="where exported graphs are; default build/")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    from environment import ensure_environment

    ensure_environment(["torch", "onnxruntime", "onnx", "cv2", "transformers"])
    import cv2
    import numpy as np

    from canny2image_TRT import hackathon
    from cldm.request import Request

    path = args.picture or sorted((ROOT / "pictures").glob("*.jpg"))[0]
    image = cv2.imread(str(path))
    if image is None:
        print(f"cannot read {path}", file=sys.stderr)
        return 1
    request = Request("a bird", "best quality, extremely detailed", "lowres", ddim_steps=args.steps, seed=2946901)
    engines: Dict[str, Any] = {}
    try:
        for backend in ("onnxruntime", "torch"):  # an export takes memory that torch's weights would be in the way of
            engines[backend] = hackathon()
            engines[backend].initialize(
                args.model,
                backend,
                "fp32",
                device="cpu",
                random_weights=args.random_weights,
                build_dir=args.build_dir,
            )
        results = {name: engine.run(image, request) for name, engine in engines.items()}
        times = measure(engines, image, request, args.repeats)
    finally:
        for engine in engines.values():
            engine.close()
    latents = [results[name].latent for name in engines]
    error = np.linalg.norm(latents[1] - latents[0]) / np.linalg.norm(latents[0])
    print_report(args, results["torch"].receipt, times, float(error))
    return 0


def measure(engines: Dict[str, Any], image: Any, request: Any, repeats: int) -> Dict[str, List[Dict[str, float]]]:
    """Milliseconds a stage of each timed image, by engine; the engines take turns."""
    times: Dict[str, List[Dict[str, float]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            times[name].append(dict(engine.run(image, request).receipt.milliseconds))
    return times


def print_report(
    args: argparse.Namespace, receipt: Any, times: Dict[str, List[Dict[str, float]]], error: float
) -> None:
    import onnxruntime
    import torch

    from cldm.machine import available_cores, peak_memory_text, processor_name

    print(
        f"{processor_name()}, {available_cores()} cores; torch {torch.__version__} ({torch.get_num_threads()} threads),"
        f" onnxruntime {onnxruntime.__version__}; {receipt.model} ({receipt.weights}), fp32,"
        f" {receipt.height} x {receipt.width}, {receipt.evaluations} steps of batch 2;"
        f" 1 warm-up, median of {args.repeats} (lowest - highest), ms"
    )
    times = {name: times[name] for name in ("torch", "onnxruntime")}
    print(f"{'stage':8}{'torch eager':>28}{'ONNX Runtime':>28}{'ratio':>8}")
    for stage in STAGES:
        columns = {name: [run[stage] for run in runs] for name, runs in times.items()}
        cells = "".join(
            f"{statistics.median(c):>12.1f} ({min(c):.1f} - {max(c):.1f})".rjust(28) for c in columns.values()
        )
        ratio = statistics.median(columns["torch"]) / statistics.median(columns["onnxruntime"])
        print(f"{stage:8}{cells}{ratio:>8.2f}")
    print(f"latents differ by {error:.1e} (relative); {peak_memory_text()}, of both together")


if __name__ == "__main__":
    sys.exit(main())
