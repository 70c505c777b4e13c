"""The trained networks that the perceptual measures need: found on the machine, never fetched."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import List, Optional, Sequence

from cldm.files import sha256
from cldm.weights import METRICS_DIR


class NotMeasured(Exception):
    """A measure cannot be taken on this machine; the message says what is not there and what to do."""


def backbone_folders() -> List[Path]:
    """Where weights are looked for: models/metrics, then PyTorch's own download cache."""
    import torch

    return [METRICS_DIR, Path(torch.hub.get_dir()) / "checkpoints"]


def find_backbone(name: str, package: str, folders: Optional[Sequence[Path]] = None) -> Path:
    """The weights file of that name, its content checked against the hash that its name ends with.

    Parameters
    ----------
    name : str
        As `<anything>-<first eight hex digits of its SHA-256>.pth`, PyTorch's convention.
    package : str
        The Python package that holds the network.
    folders : sequence of Path, optional
        Where to look, the first first; `backbone_folders()` by default.

    Raises
    ------
    NotMeasured
        No such file, or the package is not installed.
    ValueError
        A file of that name is truncated or another one.
    """
    folders = backbone_folders() if folders is None else folders
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise NotMeasured(f"{name} not found, put it at {folders[0] / name}")
    if importlib.util.find_spec(package) is None:
        raise NotMeasured(f"Python package {package} not found, run `bash preprocess.sh`")
    match = re.search(r"-([0-9a-f]{8})\.pth$", name)
    if match is None:
        raise ValueError(f"{name} does not end with the first eight digits of its SHA-256")
    found = sha256(path)
    if not found.startswith(match.group(1)):
        raise ValueError(
            f"{path} is truncated or another file: its SHA-256 begins with {found[:8]}, not {match.group(1)};"
            " remove it, or put the original in its place"
        )
    return path
