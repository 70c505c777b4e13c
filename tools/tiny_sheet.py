#!/usr/bin/env python3
"""Draw the README's sheet of the tiny model: scenes and photographs by colours and strengths, through the product.

    python3 tools/tiny_sheet.py [--output docs/tiny_sheet.jpg] [--picture FILE:NOUN ...]

Every picture is made by `canny2image_TRT.hackathon` on whatever backend this machine has, with the contest's added and
negative prompts.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, Python's path begins with tools/
    sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from environment import ensure_environment

    ensure_environment(["torch or onnxruntime", "numpy", "cv2", "yaml", "transformers", "tqdm"])

import numpy as np  # noqa: E402

COLOURS = ("red", "blue")
STRENGTHS = (0.0, 0.5, 1.0)
NUM_SCENES = 3
PHOTOS = (("eagle.jpg", "bird"), ("dandelion.jpg", "flower"), ("coffee.jpg", "cup"), ("cat.jpg", "cat"))
DEFAULT_NOUN = "bird"
SEED = 2946901
CELL_WIDTH = 240
MAX_BYTES = 400_000
QUALITIES = (92, 88, 84, 78, 70, 60, 50)


class Subject(NamedTuple):
    """A picture file and what the prompts call its main object."""

    path: Path
    noun: str


def default_subjects(folder: Path) -> List[Subject]:
    """The first generated scenes of a folder, and the photographs of `PHOTOS` that it has."""
    from scoring.pictures import natural_key

    scenes = sorted(folder.glob("scene_*.png"), key=lambda path: natural_key(path.name))[:NUM_SCENES]
    photos = [Subject(folder / name, word) for name, word in PHOTOS if (folder / name).is_file()]
    return [Subject(path, noun_of(path)) for path in scenes] + photos


def noun_of(scene: Path) -> str:
    """What a generated scene shows, by its file's name: scene_red_tree_2.png a tree; `DEFAULT_NOUN` if it is silent."""
    from tools.tiny.palette import WORDS

    words = [word for word in re.split(r"[^a-z]+", scene.stem.lower()) if word and word not in ("scene", *WORDS)]
    return words[0] if words else DEFAULT_NOUN


def parse_subject(text: str) -> Subject:
    """ "FILE:NOUN" or "FILE"."""
    name, colon, noun = text.rpartition(":")
    path = Path(name if colon else text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no picture {path}")
    return Subject(path, noun.strip() if colon and noun.strip() else DEFAULT_NOUN)


def columns() -> List[Tuple[str, float]]:
    """Colour and strength of each painted column."""
    return [(word, strength) for word in COLOURS for strength in STRENGTHS]


def paint_row(product: Any, image: np.ndarray, noun: str, seed: int) -> List[np.ndarray]:
    """Input, edges and the painted columns, each (h, w, 3) uint8 BGR.

    Parameters
    ----------
    product : hackathon
        Initialized.
    image : (H, W, 3) uint8 array, BGR
    """
    from tools.tiny.report import as_bgr
    from tools.tiny.sampling import ADDED_PROMPT, NEGATIVE_PROMPT

    cells = [image]
    for colour, strength in columns():
        result = product.generate(
            image,
            prompt_of(colour, noun),
            added_prompt=ADDED_PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            controlnet_conditioning_scale=strength,
            seed=seed,
        )
        if len(cells) == 1:
            cells.append(as_bgr(result.canny))
        cells.append(as_bgr(result.images[0]))
    return cells


def prompt_of(colour: str, noun: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}"


def encode_jpeg(sheet: np.ndarray, max_bytes: int = MAX_BYTES) -> bytes:
    """A BGR sheet as JPEG in the best of `QUALITIES` that fits.

    Raises
    ------
    ValueError
        None does.
    """
    import cv2

    for quality in QUALITIES:
        done, data = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if done and data.size <= max_bytes:
            return data.tobytes()
    raise ValueError(f"a sheet of {sheet.shape[1]} x {sheet.shape[0]} pixels does not fit into {max_bytes:,} bytes")


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "docs" / "tiny_sheet.jpg", metavar="FILE")
    add("--picture", type=parse_subject, action="append", metavar="FILE:NOUN", help="a row; default: from pictures/")
    add("--pictures", type=Path, default=ROOT / "pictures", metavar="DIR", help="where the default rows are from")
    add("--model", default="tiny", help="tiny, or a YAML file (default tiny)")
    add("--backend", help="such as onnxruntime or torch; default: the first that can run here")
    add("--seed", type=int, default=SEED, help=f"default {SEED}")
    add("--cell-width", type=int, default=CELL_WIDTH, metavar="PIXELS", help=f"default {CELL_WIDTH}")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in (".jpg", ".jpeg"):
        parser.error(f"--output: the sheet is a JPEG, so not {args.output.name}")
    if args.cell_width < 16:
        parser.error(f"--cell-width must be at least 16, got {args.cell_width}")
    args.picture = args.picture or default_subjects(args.pictures)
    if not args.picture:
        parser.error(f"--pictures: {args.pictures} has neither scene_*.png nor the photographs; name some by --picture")
    return args


def draw_sheet(args: argparse.Namespace) -> np.ndarray:
    """The sheet, (h, w, 3) uint8 BGR."""
    import cv2
    from tqdm import tqdm

    from canny2image_TRT import hackathon
    from scoring.sheet import image_grid

    images = [cv2.imread(str(subject.path)) for subject in args.picture]
    unreadable = [str(subject.path) for subject, image in zip(args.picture, images) if image is None]
    if unreadable:
        raise ValueError(f"not a picture that OpenCV can read: {', '.join(unreadable)}")
    product = hackathon()
    product.initialize(model=args.model, backend=args.backend)
    print(product.summary, file=sys.stderr)
    rows = [
        paint_row(product, image, subject.noun, args.seed)
        for subject, image in tqdm(list(zip(args.picture, images)), desc="rows", disable=None)
    ]
    product.close()
    titles = ["input", "edges", *(f"{colour}, strength {strength:g}" for colour, strength in columns())]
    captions = [f'{subject.path.stem}: "a ... {subject.noun}"' for subject in args.picture]
    return image_grid(titles, captions, rows, args.cell_width)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    from cldm.files import atomic_path

    try:
        data = encode_jpeg(draw_sheet(args))
        with atomic_path(args.output) as temporary:
            temporary.write_bytes(data)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"tiny_sheet: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
