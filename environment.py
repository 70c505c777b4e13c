"""Finding the Python environment that preprocess.sh made. Standard library only, so that any Python can run it."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import List, Sequence

ROOT = Path(__file__).resolve().parent
# Set just before the program is started again, so that it is started again once at most.
GUARD = "CANNY2IMAGE_RESTARTED"


def missing_packages(packages: Sequence[str]) -> List[str]:
    """Those of the packages that this interpreter cannot import; none is imported to find out.

    Parameters
    ----------
    packages : sequence of str
        Top-level import names; "a or b" where one of the two is enough.
    """

    def is_there(name: str) -> bool:
        return any(importlib.util.find_spec(choice) is not None for choice in name.split(" or "))

    return [name for name in packages if not is_there(name)]


def ensure_environment(packages: Sequence[str]) -> None:
    """Go on where this interpreter has the packages, else start the program again with that of `.venv`.

    To be called by an entry script before it imports any of them. Where `.venv` is needed and there, this does not
    return: the process is replaced, with the same arguments and working directory.

    Parameters
    ----------
    packages : sequence of str
        As `missing_packages` takes them.

    Raises
    ------
    SystemExit
        Neither interpreter has all of them; the message names those that this one lacks.
    """
    restarted = os.environ.pop(GUARD, None) is not None
    missing = missing_packages(packages)
    if not missing:
        return
    venv = ROOT / ".venv"
    python = venv / "bin" / "python"
    # The prefix tells the two apart: a virtual environment's python is a link to the one that it was made with.
    inside = os.path.realpath(sys.prefix) == os.path.realpath(str(venv))
    if restarted or inside or not os.access(str(python), os.X_OK):
        raise SystemExit(
            f"{sys.executable} lacks the Python packages {', '.join(missing)}.\n"
            f"Run `bash preprocess.sh` in {ROOT}: it makes .venv with all of them. This program then finds it."
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[GUARD] = "1"
    os.execv(str(python), [str(python), *sys.argv])
