#!/usr/bin/env python3
"""Say what is here, what fits and what does not, with the command that changes it. Exit status 1 if nothing can run."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parent


def parse_arguments(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="sd15, tiny, or a YAML file; default: sd15 where its checkpoint is, else tiny")
    add("--checkpoint", metavar="FILE", help="default: the model's own under models/")
    add("--random-weights", type=int, metavar="SEED", help="seeded random weights, which builds may be of")
    default = Path(os.environ.get("HACKATHON_BUILD_DIR") or ROOT / "build")
    add("--build-dir", type=Path, default=default, metavar="DIR", help="folder of the builds (default: build/)")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0 if a backend can run, else 1; 2 of wrong options."""
    arguments = parse_arguments(argv)
    from environment import ensure_environment
    from tools.doctor.examine import TO_RUN, examine
    from tools.doctor.machine import PACKAGES
    from tools.doctor.rows import format_rows

    with contextlib.suppress(SystemExit):  # that no interpreter has them is for the table to say
        ensure_environment(list(PACKAGES[TO_RUN]))
    try:
        rows, backends = examine(arguments.model, arguments.checkpoint, arguments.random_weights, arguments.build_dir)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 1
    print(format_rows(rows))
    print(f"\nruns here: {', '.join(backends)}" if backends else "\nnothing can run here yet")
    return 0 if backends else 1


if __name__ == "__main__":
    sys.exit(main())
