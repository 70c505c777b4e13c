#!/usr/bin/env python3
"""Export a model's graphs to ONNX under build/. `python3 export_onnx.py --help` lists the options."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

ROOT = Path(__file__).resolve().parent


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        default="auto",
        help="sd15, tiny, a config's path, or auto: sd15 if its checkpoint is there, else tiny",
    )
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "fp16"], help="auto: fp16 where there is a CUDA device"
    )
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--samples", type=int, default=1, help="images a run")
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder for the builds (default: build/)")
    parser.add_argument("--checkpoint", help="weights other than those under models/")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="seeded random weights, for benchmarks")
    parser.add_argument("--graphs", nargs="+", choices=["text", "hint", "time", "step", "decode"], help="only these")
    parser.add_argument("--force", action="store_true", help="export again what is there already")
    parser.add_argument("--no-check", action="store_true", help="do not compare with PyTorch")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> List[Any]:
    """Make what is not there yet; the rows of the table."""
    from cldm.checkpoint import load_model
    from cldm.weights import find_weights
    from deploy.export import export_all
    from deploy.spec import Build
    from runtime.choose import choose_model, default_precision

    config = choose_model(args.model, args.checkpoint)
    precision = default_precision() if args.precision == "auto" else args.precision
    weights = find_weights(config, args.checkpoint, args.random_weights, args.output / ".hashes.json")
    return export_all(
        Build(config, args.height, args.width, args.samples, precision),
        weights,
        lambda: load_model(config, weights),
        args.output,
        args.force,
        not args.no_check,
        lambda line: print(line, flush=True),
        args.graphs,
    )


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 after an error and 130 after Ctrl-C, each with a line on standard error."""
    args = parse_arguments(argv)
    from environment import ensure_environment

    ensure_environment(["torch", "onnx", "polygraphy", "numpy", "yaml"])
    start = time.perf_counter()
    try:
        results = run(args)
    except KeyboardInterrupt:
        print("export_onnx.py: interrupted; files that were finished are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"export_onnx.py: {error}", file=sys.stderr)
        return 1
    print_table(results, time.perf_counter() - start)
    return 0


def print_table(results: List[Any], seconds: float) -> None:
    from cldm.machine import peak_memory_text

    print(f"\n{'graph':8}{'MB':>10}{'nodes':>8}{'seconds':>9}{'error':>10}  file")
    for row in results:
        error = "-" if row.error is None else f"{row.error:.1e}"
        took = "there" if row.skipped else f"{row.seconds:.1f}"
        print(f"{row.graph:8}{row.num_bytes / 1e6:10.1f}{row.nodes:8}{took:>9}{error:>10}  {row.file}")
    print(f"error: of ONNX Runtime against PyTorch, relative; {peak_memory_text()}; {seconds:.1f} s in all")


if __name__ == "__main__":
    sys.exit(main())
