"""The contact sheet: one row a picture, with photo, edges, reference and ours side by side, in true colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence

import numpy as np

MAX_ROWS = 8
MAX_CELL_SIDE = 512
HEADER = 24
GAP = 4
BACKGROUND = 255


@dataclass(frozen=True)
class SheetRow:
    """Images of one picture.

    Attributes
    ----------
    name : str
    photo : (h, w, 3) uint8 array, BGR as cv2.imread gives it
    edges : (H, W) uint8 array
    reference : (H, W, 3) uint8 array, RGB, or None
    image : (H, W, 3) uint8 array, RGB
    pd : float or None
        Printed beside the name where it was measured.
    """

    name: str
    photo: np.ndarray
    edges: np.ndarray
    reference: Optional[np.ndarray]
    image: np.ndarray
    pd: Optional[float] = None


def contact_sheet(rows: Sequence[SheetRow], label: str = "ours") -> np.ndarray:
    """The (height, width, 3) uint8 BGR sheet of at most `MAX_ROWS` rows.

    The reference's column is left out where no row has one. Cells are as large as the images, or scaled down to 512
    pixels; smaller ones are padded to the largest.

    Raises
    ------
    ValueError
        There is no row.
    """
    rows = rows[:MAX_ROWS]
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    with_reference = any(row.reference is not None for row in rows)
    titles = ["photo", "edges", *(["reference"] if with_reference else []), label]
    captions = [row.name if row.pd is None else f"{row.name}   PD {row.pd:.2f}" for row in rows]
    return image_grid(titles, captions, [_cells(row, with_reference) for row in rows])


def image_grid(
    titles: Sequence[str], captions: Sequence[str], rows: Sequence[Sequence[np.ndarray]], cell_width: int = 0
) -> np.ndarray:
    """Rows of images under their captions, and one line of titles over the columns.

    Parameters
    ----------
    titles : one text a column
    captions : one text a row
    rows : for each caption its (h, w, 3) uint8 BGR images
        All columns are as wide as the widest image, a row as high as its highest.
    cell_width : int
        Scale each image to this width; 0 leaves them as they are.

    Returns
    -------
    (height, width, 3) uint8 array, BGR

    Raises
    ------
    ValueError
        There is no row, or one that has not as many images as there are titles.
    """
    if not rows or any(len(line) != len(titles) for line in rows) or len(rows) != len(captions):
        raise ValueError(f"a grid needs rows of {len(titles)} images and a caption for each row")
    if cell_width:
        rows = [[_to_width(image, cell_width) for image in line] for line in rows]
    width = max(cell.shape[1] for line in rows for cell in line)
    strips = [_strip([_text(title, width) for title in titles], HEADER, width)]
    for caption, line in zip(captions, rows):
        strips.append(_text(caption, strips[0].shape[1]))
        strips.append(_strip(line, max(cell.shape[0] for cell in line), width))
    return np.concatenate(strips, axis=0)


def _to_width(image: np.ndarray, width: int) -> np.ndarray:
    import cv2

    if image.shape[1] == width:
        return image
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def encode_png(sheet: np.ndarray) -> bytes:
    """A BGR image as the bytes of a PNG file."""
    import cv2

    ok, data = cv2.imencode(".png", sheet)
    if not ok:
        raise ValueError(f"OpenCV could not encode a {sheet.shape} image as PNG")
    return data.tobytes()


def _cells(row: SheetRow, with_reference: bool) -> List[np.ndarray]:
    """The row's images in BGR, all of one size."""
    import cv2

    height, width = row.image.shape[:2]
    scale = min(1.0, MAX_CELL_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    images = [row.photo, cv2.cvtColor(row.edges, cv2.COLOR_GRAY2BGR)]
    if with_reference:
        blank = np.full_like(row.image, BACKGROUND)
        images.append(blank if row.reference is None else cv2.cvtColor(row.reference, cv2.COLOR_RGB2BGR))
    images.append(cv2.cvtColor(row.image, cv2.COLOR_RGB2BGR))
    return [
        image if image.shape[1::-1] == size else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for image in images
    ]


def _strip(cells: Sequence[np.ndarray], height: int, cell_width: int) -> np.ndarray:
    """Cells beside each other, at their top left corners, on the background."""
    strip = np.full((height, len(cells) * (cell_width + GAP) + GAP, 3), BACKGROUND, dtype=np.uint8)
    for i, cell in enumerate(cells):
        left = GAP + i * (cell_width + GAP)
        strip[: cell.shape[0], left : left + cell.shape[1]] = cell
    return strip


def _text(text: str, width: int) -> np.ndarray:
    """A strip of the given width with dark text; characters that OpenCV's font lacks become question marks."""
    import cv2

    strip = np.full((HEADER, width, 3), BACKGROUND, dtype=np.uint8)
    plain = text.encode("ascii", "replace").decode("ascii")
    cv2.putText(strip, plain, (GAP, HEADER - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (32, 32, 32), 1, cv2.LINE_AA)
    return strip
