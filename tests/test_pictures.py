"""The pictures that are scored by default: their size, and that each one's licence is written down."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

PICTURES = Path(__file__).resolve().parent.parent / "pictures"
FILES = sorted(PICTURES.glob("*.jpg"))


def test_there_are_several() -> None:
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_size_edges_and_licence(path: Path) -> None:
    image = cv2.imread(str(path))
    assert image.shape == (256, 384, 3)
    assert path.stat().st_size < 100_000
    # A picture with hardly any edges, or hardly anything else, would show little about a network that follows them.
    assert 0.02 < (cv2.Canny(image, 100, 200) > 0).mean() < 0.2
    rows = [line for line in (PICTURES / "LICENSES.md").read_text().splitlines() if f"`{path.name}`" in line]
    assert len(rows) == 2 and ("CC0 1.0" in rows[0] or "public domain" in rows[0])
