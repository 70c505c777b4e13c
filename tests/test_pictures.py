"""The pictures that are scored by default: size, edges, written licences, and scenes that are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List

import cv2
import numpy as np
import pytest

from scoring.pictures import OWN_FOLDER, SUFFIXES, find_pictures
from tools.tiny.scenes import make_scene

PHOTOGRAPHS = sorted(OWN_FOLDER.glob("*.jpg"))
SCENES = sorted(OWN_FOLDER.glob("scene_*.png"))
# Without its vector instructions OpenCV rounds up to 5 of a scene's 294,912 values the other way.
ROUNDED_OTHERWISE = 30


def licence_rows(path: Path) -> List[str]:
    text = (OWN_FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if f"`{path.name}`" in line]


def test_there_are_several_photographs_and_scenes() -> None:
    assert len(PHOTOGRAPHS) >= 6 and len(SCENES) >= 4
    scored = [picture.path for picture in find_pictures(OWN_FOLDER)]
    assert sorted(scored) == sorted(PHOTOGRAPHS + SCENES)
    assert [path for path in OWN_FOLDER.iterdir() if path.suffix not in (*SUFFIXES, ".md")] == []
    # What --limit takes first, and what a contact sheet of eight rows shows, are photographs.
    assert scored[: len(PHOTOGRAPHS)] == PHOTOGRAPHS


@pytest.mark.parametrize("path", PHOTOGRAPHS + SCENES, ids=lambda path: path.name)
def test_size_and_edges(path: Path) -> None:
    image = cv2.imread(str(path))
    assert image.shape == (256, 384, 3)
    assert path.stat().st_size < 100_000
    # A picture with hardly any edges, or hardly anything else, would show little about a network that follows them.
    assert 0.02 < (cv2.Canny(image, 100, 200) > 0).mean() < 0.2


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_a_photograph_has_its_licence(path: Path) -> None:
    source, _ = licence_rows(path)  # the other row tells how it was cropped
    assert "CC0 1.0" in source or "public domain" in source


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.name)
def test_a_scene_is_the_one_that_its_row_names(path: Path) -> None:
    (row,) = licence_rows(path)
    assert "Apache 2.0" in row
    (call,) = re.findall(r'`make_scene\((\d+), split="(\w+)"\)`', row)
    index, split = int(call[0]), call[1]
    scene = make_scene(index, split)
    assert split == "test"
    assert path.name == f"scene_{scene.kind}_{index}.png"
    assert f"| {scene.caption} |" in row
    stored = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    difference = np.abs(stored.astype(int) - scene.image)
    assert difference.max() <= 1 and np.count_nonzero(difference) <= ROUNDED_OTHERWISE
