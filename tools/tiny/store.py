"""Scenes on disk for training: drawn once by all cores, in chunks that a killed run leaves whole."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Tuple

import numpy as np

from cldm.config import load_config
from cldm.files import atomic_path, source_digest
from cldm.image import canny_map
from cldm.machine import available_cores
from cldm.tokenizer import Tokenizer
from tools.tiny.measures import HIGH_THRESHOLD, LOW_THRESHOLD
from tools.tiny.scenes import HEIGHT, SEED, WIDTH, make_scene

CHUNK = 250
WORDINGS = 6


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes.

    Attributes
    ----------
    images : (N, 256, 384, 3) uint8, RGB
    edges : (N, 256, 48) uint8
        Canny maps at 100 / 200, eight pixels a byte, the leftmost in the highest bit (`numpy.packbits`).
    tokens : (N, WORDINGS, 77) int16
        Token ids of wordings of the caption; a scene with fewer repeats its own.
    """

    images: np.ndarray
    edges: np.ndarray
    tokens: np.ndarray


# Beside this folder's sources, those of training and measuring: they decide nothing about a scene.
NOT_DRAWING = ("__init__", "report", "sampling", "train_autoencoder", "train_diffusion", "training")


def code_digest() -> str:
    """Hash over what decides a chunk's content: the generator's sources and the vocabulary."""
    own = [path for path in sorted(Path(__file__).resolve().parent.glob("*.py")) if path.stem not in NOT_DRAWING]
    config = load_config("tiny")
    tokenizer = Path(config.folder) / config.tokenizer
    return source_digest([*own, tokenizer / "vocab.json", tokenizer / "merges.txt"])


def packed_edges(image: np.ndarray) -> np.ndarray:
    """The (256, 48) uint8 packed Canny map of a (256, 384, 3) uint8 RGB scene.

    Of channels that are equally strong Canny takes the first, so the order is that in which pictures come: BGR.
    """
    edges = canny_map(np.ascontiguousarray(image[:, :, ::-1]), HEIGHT, LOW_THRESHOLD, HIGH_THRESHOLD)
    return np.packbits(edges > 0, axis=1)


def draw_chunk(job: Tuple[str, int, str, int]) -> str:
    """Draw `CHUNK` scenes from index `first` on and write them to `path`; the path comes back."""
    path, first, split, seed = job
    import cv2

    cv2.setNumThreads(1)  # one process a core
    tokenizer = Tokenizer(load_config("tiny"))
    scenes = [make_scene(first + i, split, seed=seed) for i in range(CHUNK)]
    edges = [packed_edges(scene.image) for scene in scenes]
    texts = [scene.captions[i % len(scene.captions)] for scene in scenes for i in range(WORDINGS)]
    ids, _ = tokenizer(texts)
    with atomic_path(Path(path)) as temporary, open(str(temporary), "wb") as file:
        np.savez(
            file,
            images=np.stack([scene.image for scene in scenes]),
            edges=np.stack(edges),
            tokens=ids.reshape(CHUNK, WORDINGS, -1).astype(np.int16),
        )
    return path


def load_scenes(folder: Path, count: int, split: str = "train", seed: int = SEED) -> Scenes:
    """The first `count` scenes of a split; those that are not under `folder` yet are drawn, with progress.

    Raises
    ------
    ValueError
        `count` is not a positive multiple of `CHUNK`.
    """
    from tqdm import tqdm

    if count <= 0 or count % CHUNK:
        raise ValueError(f"the number of scenes must be a positive multiple of {CHUNK}, got {count}")
    folder = folder / f"{split}-{seed}-{code_digest()}"
    paths = [folder / f"{first:07d}.npz" for first in range(0, count, CHUNK)]
    jobs = [(str(path), i * CHUNK, split, seed) for i, path in enumerate(paths) if not path.is_file()]
    if jobs:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(available_cores(), len(jobs))) as pool:
            for _ in tqdm(pool.imap_unordered(draw_chunk, jobs), total=len(jobs), unit="chunk", desc="scenes"):
                pass
    images = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
    edges: List[np.ndarray] = []
    tokens: List[np.ndarray] = []
    for i, path in enumerate(tqdm(paths, unit="chunk", desc="reading")):
        with np.load(str(path)) as chunk:
            images[i * CHUNK : (i + 1) * CHUNK] = chunk["images"]
            edges.append(chunk["edges"])
            tokens.append(chunk["tokens"])
    return Scenes(images, np.concatenate(edges), np.concatenate(tokens))


def check_scenes(scenes: Scenes, images: Any, count: int = 16) -> None:
    """Draw some scenes of the train split again and compare them with what was loaded.

    Parameters
    ----------
    images : (N, 256, 384, 3) uint8 tensor
        The pictures as they lie on the device.

    Raises
    ------
    RuntimeError
        A picture, its edges or its words are another scene's.
    """
    tokenizer = Tokenizer(load_config("tiny"))
    for index in np.linspace(0, len(scenes.images) - 1, count).astype(int).tolist():
        scene = make_scene(index, "train")
        edges = packed_edges(scene.image)
        ids, _ = tokenizer([scene.captions[0]])
        same = (
            np.array_equal(images[index].cpu().numpy(), scene.image),
            np.array_equal(scenes.edges[index], edges),
            np.array_equal(scenes.tokens[index, 0], ids[0]),
        )
        if not all(same):
            raise RuntimeError(f"scene {index} as loaded is not scene {index}: picture, edges, words equal: {same}")
