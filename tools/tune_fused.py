#!/usr/bin/env python3
"""Measure the tile sizes of the CUDA path's kernels on the GPU at hand, and write the table that ships for it.

    python3 tools/tune_fused.py                                  # sd15's shapes into runtime/fused/tables/<card>.json
    python3 tools/tune_fused.py --samples 4 --width 512          # the shapes of four images of 512 x 512 as well

Every candidate of every problem is timed alone, and then the best of each by the time of the whole network that they
are in. Weights are random: times do not depend on them. On a card without a table the first start does the first part
by itself, for the shapes that it needs, and keeps what it finds under build/.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch", "numpy", "yaml"])


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="a config; default: sd15")
    parser.add_argument("--precision", default="fp16", choices=("fp16", "bf16", "fp8"))
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="images a call (default 1)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=900.0, metavar="N", help="for the candidates (default 900)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: the card's own, of those that ship")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    import torch

    from cldm.config import load_config
    from runtime.fused.build import SHIPPED, FusedNetworks, fused_problem, require_memory

    found = torch.cuda.is_available()
    problem = fused_problem(args.device, args.precision) if found else "PyTorch finds no CUDA device here"
    if problem is not None:
        print(f"tune_fused: the fused kernels cannot be timed: {problem}", file=sys.stderr)
        return 1
    from cldm.checkpoint import load_model
    from cldm.weights import Weights
    from deploy.spec import Build
    from runtime.fused.tune import card_of
    from runtime.fused.tuning import card_slug

    config = load_config(args.model)
    build = Build(config, args.height, args.width, args.samples, args.precision)
    path = args.output or SHIPPED / f"{card_slug(card_of(args.device))}.json"
    require_memory(config, args.device)
    model = load_model(config, Weights(None, 1, ""))
    networks = FusedNetworks(model, args.device, args.precision, ROOT / "build", lambda line: print(line, flush=True))
    networks.retune(build, path, args.seconds)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
