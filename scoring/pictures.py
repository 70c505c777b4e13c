"""The pictures that a score runs over."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple, Union

import numpy as np

from cldm.image import target_size

# Where the contest's machine has its pictures; the spelling is the contest's.
CONTEST_FOLDER = Path("/home/player/pictures_croped")
OWN_FOLDER = Path(__file__).resolve().parent.parent / "pictures"
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Picture:
    """A picture file and the hash of its bytes."""

    path: Path
    digest: str

    @property
    def name(self) -> str:
        return self.path.name

    def read(self) -> np.ndarray:
        """(H, W, 3) uint8, BGR: what cv2.imread returns, as the contest's scorer feeds it.

        Raises
        ------
        ValueError
            OpenCV cannot decode it.
        """
        import cv2

        image = cv2.imread(str(self.path))
        if image is None:
            raise ValueError(f"{self.path} is not a picture that OpenCV can read; replace or remove it")
        return image


def natural_key(name: str) -> List[Tuple[int, int, str]]:
    """Sort key under which numbers inside names count as numbers: bird_2 before bird_10."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def default_folder() -> Path:
    """The contest's picture folder where there is one, else this repository's."""
    return CONTEST_FOLDER if CONTEST_FOLDER.is_dir() else OWN_FOLDER


def find_pictures(folder: Union[str, Path], limit: Optional[int] = None, resolution: int = 256) -> List[Picture]:
    """The pictures of a folder in natural order, each one read and its size checked before any work is done.

    Parameters
    ----------
    limit : int, optional
        Take the first so many.
    resolution : int
        The `image_resolution` that they will be painted at.

    Raises
    ------
    ValueError
        No such folder, no picture in it, or a picture that cannot be read or painted; the message names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no picture folder at {folder}; name one with --pictures")
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES]
    paths.sort(key=lambda path: (natural_key(path.name), path.name))
    if not paths:
        raise ValueError(f"no {', '.join(SUFFIXES)} files in {folder}; name another folder with --pictures")
    pictures = []
    for path in paths[:limit]:
        picture = Picture(path, hashlib.sha256(path.read_bytes()).hexdigest())
        height, width = picture.read().shape[:2]
        try:
            target_size(height, width, resolution)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        pictures.append(picture)
    return pictures
