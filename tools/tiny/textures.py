"""Grey textures that are laid over colours as light and shade: fur, feathers, bricks, bark, waves, and the like.

Each is drawn once in a process from a seed of its own, as a large tile that scenes then see shifted, turned and scaled.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Callable, Dict, Tuple

import cv2
import numpy as np

SIZE = 640
Box = Tuple[int, int, int, int]


@dataclass(frozen=True)
class Texture:
    """A tile as it lies over the picture.

    Attributes
    ----------
    kind : one of KINDS
    strength : the change of light at the tile's extremes; 0.1 is faint, 0.5 makes edges everywhere
    matrix : (2, 3) or (3, 3) from picture to tile pixels
    """

    kind: str
    strength: float
    matrix: np.ndarray

    def patch(self, box: Box) -> np.ndarray:
        """(h, w) float32 light over a box of the picture."""
        x0, y0, x1, y1 = box
        shift = np.array([[1, 0, x0], [0, 1, y0], [0, 0, 1]], np.float64)
        matrix = self.matrix @ shift
        warp = cv2.warpAffine if len(matrix) == 2 else cv2.warpPerspective
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        patch = warp(tile(self.kind), matrix, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        return patch * self.strength


def lay(
    kind: str, strength: float, draws: np.ndarray, scale: float = 1.0, angle: float = 0.0, stretch: float = 1.0
) -> Texture:
    """A texture turned by `angle` radians and seen `scale` times as large; `draws` are two numbers in -1..1."""
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    offset = SIZE * (0.5 + 0.5 * np.asarray(draws[:2], np.float64))
    matrix = np.array([[cos / stretch, sin / stretch, offset[0]], [-sin, cos, offset[1]]])
    return Texture(kind, strength, matrix)


def lay_flat(kind: str, strength: float, draws: np.ndarray, horizon: float, scale: float = 1.0) -> Texture:
    """A texture that lies on the ground below a horizon (in pixels), larger towards the viewer."""
    near = 130.0
    centre = 192.0 + 100.0 * float(draws[0])
    depth = 8.0
    zoom = 1.0 / scale
    matrix = np.array(
        [
            [near * zoom, SIZE * 0.5, -near * zoom * centre + SIZE * 0.5 * (depth - horizon)],
            [0.0, SIZE * 0.4, SIZE * 0.4 * (depth - horizon) + near * 60.0 * zoom],
            [0.0, 1.0, depth - horizon],
        ]
    )
    return Texture(kind, strength, matrix)


@functools.lru_cache(maxsize=None)
def tile(kind: str) -> np.ndarray:
    """(640, 640) float32 in -1..1; read only."""
    if kind not in KINDS:
        raise ValueError(f"unknown texture {kind!r}: use one of {', '.join(KINDS)}")
    made = KINDS[kind](np.random.default_rng([20261121, sorted(KINDS).index(kind)]))
    made = np.clip(made, -1, 1).astype(np.float32)
    made.setflags(write=False)
    return made


def smooth_noise(
    rng: np.random.Generator, height: int, width: int, cells: int, octaves: int = 1, fade: float = 0.55
) -> np.ndarray:
    """(height, width) float32 noise of unit spread, with about `cells` bumps along the width."""
    total = np.zeros((height, width), np.float32)
    gain = 1.0
    for octave in range(octaves):
        columns = min(cells * 2**octave, width)
        rows = max(min(int(round(columns * height / width)), height), 2)
        grid = rng.standard_normal((rows, max(columns, 2)), dtype=np.float32)
        total += gain * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        gain *= fade
    return total / max(float(total.std()), 1e-6)


def _signed(image: np.ndarray) -> np.ndarray:
    return (image.astype(np.float32) - 128.0) / 127.0


def _strokes(
    rng: np.random.Generator, count: int, length: Tuple[float, float], angle: float, spread: float, width: int = 1
) -> np.ndarray:
    """Short strokes of random brightness over each other."""
    image = np.full((SIZE, SIZE), 128, np.uint8)
    start = rng.uniform(-20, SIZE + 20, (count, 2))
    turn = angle + spread * rng.standard_normal(count)
    reach = rng.uniform(*length, count)
    end = start + np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None]
    level = np.clip(128 + 62 * rng.standard_normal(count), 0, 255)
    for a, b, grey in zip(np.round(start * 8).astype(int), np.round(end * 8).astype(int), level):
        cv2.line(image, a.tolist(), b.tolist(), float(grey), width, cv2.LINE_AA, 3)
    return _signed(image)


def _fur(rng: np.random.Generator) -> np.ndarray:
    return _strokes(rng, 9000, (9, 24), math.pi / 2, 0.28)


def _grass(rng: np.random.Generator) -> np.ndarray:
    return _strokes(rng, 8000, (10, 30), -math.pi / 2, 0.35, 2)


def _straw(rng: np.random.Generator) -> np.ndarray:
    return _strokes(rng, 5000, (10, 40), 0.0, 1.5, 2)


def _feathers(rng: np.random.Generator, width: int = 30, row: int = 20) -> np.ndarray:
    image = np.full((SIZE, SIZE), 128, np.uint8)
    for number, y in enumerate(range(SIZE + row, -2 * row, -row)):
        for x in range(-width, SIZE + width, width):
            cx = x + (width // 2 if number % 2 else 0) + int(rng.integers(-2, 3))
            grey = int(np.clip(150 + 26 * rng.standard_normal(), 60, 235))
            axes = (int(width * 0.56), int(row * 1.35))
            cv2.ellipse(image, (cx, y), axes, 0, 0, 360, grey, -1, cv2.LINE_AA)
            cv2.ellipse(image, (cx, y), axes, 0, 0, 180, 20, 2, cv2.LINE_AA)
            cv2.line(image, (cx, y - row), (cx, y + row), grey - 35, 1, cv2.LINE_AA)
    return _signed(image)


def _scales(rng: np.random.Generator) -> np.ndarray:
    return _feathers(rng, 22, 11)


def _leaves(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 40, np.uint8)
    for _ in range(2600):
        x, y = rng.integers(0, SIZE, 2).tolist()
        axes = (int(rng.integers(7, 15)), int(rng.integers(3, 7)))
        grey = float(np.clip(135 + 55 * rng.standard_normal(), 10, 255))
        cv2.ellipse(image, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, grey, -1, cv2.LINE_AA)
    return _signed(image)


def _bricks(rng: np.random.Generator, width: int = 58, height: int = 24, gap: int = 3) -> np.ndarray:
    image = np.full((SIZE, SIZE), 215, np.uint8)
    for number, y in enumerate(range(0, SIZE, height)):
        for x in range(-width, SIZE + width, width):
            left = x + (width // 2 if number % 2 else 0)
            grey = float(np.clip(105 + 24 * rng.standard_normal(), 30, 180))
            cv2.rectangle(image, (left + gap, y + gap), (left + width - 1, y + height - 1), grey, -1)
    return _signed(image) + 0.08 * smooth_noise(rng, SIZE, SIZE, 160, 2)


def _tiles(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 50, np.uint8)
    for y in range(0, SIZE, 46):
        for x in range(0, SIZE, 46):
            grey = float(np.clip(150 + 18 * rng.standard_normal(), 60, 240))
            cv2.rectangle(image, (x + 2, y + 2), (x + 44, y + 44), grey, -1)
    return _signed(image)


def _wood(rng: np.random.Generator) -> np.ndarray:
    grain = smooth_noise(rng, SIZE, SIZE, 3, 2)
    lines = cv2.resize(
        rng.standard_normal((SIZE // 3, 6), dtype=np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC
    )
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    return 0.45 * np.sin(rows * 0.22 + 2.2 * grain) + 0.4 * lines


def _planks(rng: np.random.Generator) -> np.ndarray:
    wood = 0.45 * _wood(rng).T.copy()
    for x in range(0, SIZE, 64):
        wood[:, x : x + 64] += 0.22 * float(rng.standard_normal())
        wood[:, x : x + 3] = -1.0
    return wood


def _marble(rng: np.random.Generator) -> np.ndarray:
    noise = smooth_noise(rng, SIZE, SIZE, 6, 5, 0.6)
    return 0.5 - 1.6 * np.exp(-np.abs(noise) * 3.5)


def _speckle(rng: np.random.Generator) -> np.ndarray:
    return 0.4 * smooth_noise(rng, SIZE, SIZE, 220, 2)


def _cloudy(rng: np.random.Generator) -> np.ndarray:
    return 0.45 * smooth_noise(rng, SIZE, SIZE, 6, 5)


def _bark(rng: np.random.Generator) -> np.ndarray:
    noise = smooth_noise(rng, SIZE // 5, SIZE, 60, 3)
    return 0.45 * cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


def _waves(rng: np.random.Generator) -> np.ndarray:
    noise = cv2.resize(smooth_noise(rng, SIZE, SIZE // 4, 22, 3), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return np.tanh(0.8 * noise)


def _pebbles(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 30, np.uint8)
    for _ in range(1500):
        x, y = rng.integers(0, SIZE, 2).tolist()
        axes = (int(rng.integers(7, 17)), int(rng.integers(5, 11)))
        turn = float(rng.uniform(0, 180))
        grey = float(np.clip(140 + 45 * rng.standard_normal(), 40, 240))
        cv2.ellipse(image, (x, y + 2), axes, turn, 0, 360, 40, -1, cv2.LINE_AA)
        cv2.ellipse(image, (x, y), axes, turn, 0, 360, grey, -1, cv2.LINE_AA)
        cv2.ellipse(
            image, (x - 2, y - 2), (axes[0] // 2, axes[1] // 2), turn, 0, 360, min(grey + 25, 255), -1, cv2.LINE_AA
        )
    return _signed(image)


def _weave(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    over = (np.floor(x / 7) + np.floor(y / 7)) % 2
    return np.where(over > 0, np.sin(x * math.pi / 7) ** 2, np.sin(y * math.pi / 7) ** 2) * 1.2 - 0.7


def _cells(rng: np.random.Generator) -> np.ndarray:
    points = np.full((SIZE, SIZE), 255, np.uint8)
    points[rng.integers(0, SIZE, 900), rng.integers(0, SIZE, 900)] = 0
    distance, labels = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    level = rng.uniform(-0.5, 0.7, labels.max() + 1).astype(np.float32)
    flat = level[labels]
    edge = cv2.morphologyEx(labels.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    return np.where(edge, -1.0, flat - distance * 0.01)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    x = np.arange(SIZE, dtype=np.float32)[None, :]
    noise = smooth_noise(rng, SIZE, SIZE, 5, 3)
    return np.clip(3.0 * np.sin(x * 0.17 + 0.9 * noise), -1, 1)


def _spots(rng: np.random.Generator) -> np.ndarray:
    noise = smooth_noise(rng, SIZE, SIZE, 34, 1)
    return np.clip(-4.0 * (noise - 0.9), -1, 0.3)


KINDS: Dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "fur": _fur,
    "grass": _grass,
    "straw": _straw,
    "feathers": _feathers,
    "scales": _scales,
    "leaves": _leaves,
    "bricks": _bricks,
    "tiles": _tiles,
    "wood": _wood,
    "planks": _planks,
    "marble": _marble,
    "speckle": _speckle,
    "cloudy": _cloudy,
    "bark": _bark,
    "waves": _waves,
    "pebbles": _pebbles,
    "weave": _weave,
    "cells": _cells,
    "stripes": _stripes,
    "spots": _spots,
}
