"""Grey textures that are laid over colours as light and shade: fur, feathers, bricks, bark, waves, and the like.

Each is drawn once in a process from a seed of its own, as a large tile that scenes then see shifted, turned and scaled.
An edge of the picture must be one that a small autoencoder can keep, so a texture is either soft, with slopes below
what Canny takes for an edge, or bold, with strokes and gaps of some 6 pixels and a clear contrast. A small share is
fine: smaller and of any contrast, as in photographs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Callable, Dict, Optional, Tuple

import cv2
import numpy as np

SIZE = 640
Box = Tuple[int, int, int, int]

# Share of the textures that are fine: scenes have none to four, and about a tenth of them show one.
FINE_SHARE = 0.1
# Textures that are asked to be stronger than this are bold.
_BOLD_FROM = 0.15
# Steepest slope of a soft texture in grey levels a pixel. Canny's lower threshold of 100 is a slope of 12.5.
_SOFT_SLOPE = 7.0
# Change of a bold texture from its middle to its extremes, in grey levels; a step of 50 is Canny's upper threshold.
_BOLD_LEVELS = (70.0, 105.0)
_FINE_STRENGTH = 0.28  # at least
_BOLD_LIGHT = 0.68  # and at most this share of the light
# Textures that have no clear parts, and are soft whatever is asked.
_ALWAYS_SOFT = ("cloudy",)


@dataclass(frozen=True)
class Texture:
    """A tile as it lies over the picture.

    Attributes
    ----------
    kind : one of KINDS
    strength : the change of light at the tile's extremes that is asked for; 0.1 is faint, 0.5 strong
    matrix : (2, 3) or (3, 3) from picture to tile pixels
    scale : pixels of the picture to one of the tile; on the ground below a horizon, where it is nearest
    manner : "soft", "bold" or "fine"
    horizon : of a texture that lies on the ground, in pixels; None for one that faces the viewer
    """

    kind: str
    strength: float
    matrix: np.ndarray
    scale: float = 1.0
    manner: str = "soft"
    horizon: Optional[float] = None

    def patch(self, box: Box, peak: float = 220.0) -> np.ndarray:
        """(h, w) float32 light over a box of the picture, for a colour whose largest channel is `peak` (0..255)."""
        x0, y0, x1, y1 = box
        shift = np.array([[1, 0, x0], [0, 1, y0], [0, 0, 1]], np.float64)
        matrix = self.matrix @ shift
        warp = cv2.warpAffine if len(matrix) == 2 else cv2.warpPerspective
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        strength = self._bold_strength(peak)
        soft = strength is None
        image = _soft_tile(self.kind)[0] if soft else tile(self.kind)
        patch = warp(image, matrix, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        scale = np.float32(self.scale) if self.horizon is None else self._row_scales(y0, y1)[:, None]
        if soft:
            return patch * np.minimum(self.strength, self._soft_limit(peak) * scale)
        return patch * (strength if self.horizon is None else strength * np.clip((scale - 0.7) * 5.0, 0.0, 1.0))

    def _bold_strength(self, peak: float) -> Optional[float]:
        """The change of light of a bold or fine texture; None where it must be soft."""
        if self.manner == "soft":
            return None
        if self.manner == "fine":
            return max(self.strength, _FINE_STRENGTH)
        low, high = _BOLD_LEVELS
        wanted = min(max(self.strength * peak, low), high) / max(peak, 1.0)
        return wanted if wanted <= _BOLD_LIGHT else None

    def _soft_limit(self, peak: float) -> float:
        """The strength at which the soft tile, one pixel for one, is as steep as it may be."""
        return _SOFT_SLOPE / (_soft_tile(self.kind)[1] * max(peak, 60.0))

    def _row_scales(self, y0: int, y1: int) -> np.ndarray:
        """(y1 - y0,) float32 pixels of the picture to one of the tile, for rows of the ground."""
        depth = np.maximum(np.arange(y0, y1, dtype=np.float32) - np.float32(self.horizon) + _GROUND_DEPTH, 1.0)
        return self.scale / np.maximum(_GROUND_NEAR / depth, _GROUND_NEAR * _GROUND_TILT / (depth * depth))


def lay(
    kind: str, strength: float, draws: np.ndarray, scale: float = 1.0, angle: float = 0.0, stretch: float = 1.0
) -> Texture:
    """A texture turned by `angle` radians and seen about `scale` times as large; `draws` are three numbers in -1..1."""
    manner = _manner(kind, strength, draws)
    scale = {"bold": max(scale, 0.95), "fine": min(max(scale * 0.6, 0.35), 0.7)}.get(manner, max(scale, 0.5))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    offset = SIZE * (0.5 + 0.5 * np.asarray(draws[:2], np.float64))
    matrix = np.array([[cos / stretch, sin / stretch, offset[0]], [-sin, cos, offset[1]]])
    return Texture(kind, strength, matrix, scale, manner)


_GROUND_NEAR, _GROUND_TILT, _GROUND_DEPTH = 78.0, 110.0, 8.0


def lay_flat(kind: str, strength: float, draws: np.ndarray, horizon: float, scale: float = 1.0) -> Texture:
    """A texture that lies on the ground below a horizon (in pixels), larger towards the viewer."""
    manner = _manner(kind, strength, draws)
    scale = {"bold": max(scale, 0.8) * 1.2, "fine": scale * 0.8}.get(manner, scale)
    centre = 192.0 + 100.0 * float(draws[0])
    near, start = _GROUND_NEAR / scale, _GROUND_DEPTH - horizon
    matrix = np.array(
        [
            [near, SIZE * 0.5, -near * centre + SIZE * 0.5 * start],
            [0.0, SIZE * 0.4, SIZE * 0.4 * start + near * _GROUND_TILT],
            [0.0, 1.0, start],
        ]
    )
    return Texture(kind, strength, matrix, scale, manner, horizon)


def even(texture: Optional[Texture]) -> Optional[Texture]:
    """The same texture as soft shading only, for parts too small for clear strokes."""
    return None if texture is None else replace(texture, manner="soft")


def _manner(kind: str, strength: float, draws: np.ndarray) -> str:
    if abs(float(draws[2])) < FINE_SHARE:
        return "fine"
    return "bold" if strength > _BOLD_FROM and kind not in _ALWAYS_SOFT else "soft"


@functools.lru_cache(maxsize=None)
def tile(kind: str) -> np.ndarray:
    """(640, 640) float32 in -1..1; read only."""
    if kind not in KINDS:
        raise ValueError(f"unknown texture {kind!r}: use one of {', '.join(KINDS)}")
    made = KINDS[kind](np.random.default_rng([20261121, sorted(KINDS).index(kind)]))
    made = np.clip(made, -1, 1).astype(np.float32)
    made.setflags(write=False)
    return made


@functools.lru_cache(maxsize=None)
def _soft_tile(kind: str) -> Tuple[np.ndarray, float]:
    """A blurred tile around 0, and its slope in tile values a pixel that only one pixel in 500 exceeds."""
    soft = cv2.GaussianBlur(tile(kind), (0, 0), 2.2)
    soft = soft - soft.mean()
    slope = np.abs(cv2.Sobel(soft, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(soft, cv2.CV_32F, 0, 1))
    soft.setflags(write=False)
    return soft, max(float(np.quantile(slope, 0.998)) / 8.0, 1e-3)


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


def _blobs(rng: np.random.Generator, across: float, down: float, level: float) -> np.ndarray:
    """Dark blobs with smooth outlines: noise blurred by so many pixels both ways, and cut where it exceeds `level`."""
    noise = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigmaX=across, sigmaY=down, borderType=cv2.BORDER_REFLECT)
    return _cut(noise / float(noise.std()), level, min(across, down))


def _cut(noise: np.ndarray, level: float, size: float) -> np.ndarray:
    """0.25 below a level of the noise and -0.75 above it; parts smaller than `size` ** 2 * 6 pixels are left out."""
    above = (noise > level).astype(np.uint8)
    for value in (1, 0):
        _, labels, stats, _ = cv2.connectedComponentsWithStats((above == value).astype(np.uint8), connectivity=4)
        small = stats[:, cv2.CC_STAT_AREA] < 6 * size * size
        small[0] = False
        above[small[labels]] = 1 - value
    return 0.25 - cv2.GaussianBlur(above.astype(np.float32), (0, 0), 0.8)


def _strokes(
    rng: np.random.Generator, count: int, length: Tuple[float, float], angle: float, spread: float, width: int
) -> np.ndarray:
    """Broad strokes of two shades over each other, on a ground between them."""
    image = np.full((SIZE, SIZE), 160, np.uint8)
    start = rng.uniform(-20, SIZE + 20, (count, 2))
    turn = angle + spread * rng.standard_normal(count)
    reach = rng.uniform(*length, count)
    end = start + np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None]
    level = np.where(rng.random(count) < 0.42, 34, 160)
    for a, b, grey in zip(np.round(start * 8).astype(int), np.round(end * 8).astype(int), level):
        cv2.line(image, a.tolist(), b.tolist(), float(grey), width, cv2.LINE_AA, 3)
    return _signed(image)


def _fur(rng: np.random.Generator) -> np.ndarray:
    return _blobs(rng, 4.2, 15.0, 0.75)


def _grass(rng: np.random.Generator) -> np.ndarray:
    return _strokes(rng, 1100, (26, 60), -math.pi / 2, 0.25, 7)


def _straw(rng: np.random.Generator) -> np.ndarray:
    return _strokes(rng, 800, (24, 70), 0.0, 1.5, 7)


def _feathers(rng: np.random.Generator, width: int = 42, row: int = 30) -> np.ndarray:
    image = np.full((SIZE, SIZE), 160, np.uint8)
    for number, y in enumerate(range(SIZE + row, -2 * row, -row)):
        for x in range(-width, SIZE + width, width):
            cx = x + (width // 2 if number % 2 else 0) + int(rng.integers(-2, 3))
            grey = int(np.clip(160 + 8 * rng.standard_normal(), 140, 180))
            axes = (int(width * 0.56), int(row * 1.35))
            cv2.ellipse(image, (cx, y), axes, 0, 0, 360, grey, -1, cv2.LINE_AA)
            cv2.ellipse(image, (cx, y), axes, 0, 0, 180, 20, 5, cv2.LINE_AA)
    return _signed(image)


def _scales(rng: np.random.Generator) -> np.ndarray:
    return _feathers(rng, 32, 20)


def _leaves(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 40, np.uint8)
    for _ in range(620):
        x, y = rng.integers(0, SIZE, 2).tolist()
        axes = (int(rng.integers(15, 26)), int(rng.integers(8, 13)))
        turn = float(rng.uniform(0, 180))
        grey = float(np.clip(160 + 9 * rng.standard_normal(), 140, 185))
        cv2.ellipse(image, (x, y), (axes[0] + 4, axes[1] + 4), turn, 0, 360, 40, -1, cv2.LINE_AA)
        cv2.ellipse(image, (x, y), axes, turn, 0, 360, grey, -1, cv2.LINE_AA)
    return _signed(image)


def _bricks(rng: np.random.Generator, width: int = 66, height: int = 30, gap: int = 6) -> np.ndarray:
    image = np.full((SIZE, SIZE), 188, np.uint8)
    for number, y in enumerate(range(0, SIZE, height)):
        for x in range(-width, SIZE + width, width):
            left = x + (width // 2 if number % 2 else 0)
            grey = float(np.clip(60 + 8 * rng.standard_normal(), 45, 75))
            cv2.rectangle(image, (left + gap, y + gap), (left + width - 1, y + height - 1), grey, -1)
    return _signed(cv2.GaussianBlur(image, (0, 0), 0.6))


def _tiles(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 30, np.uint8)
    for y in range(0, SIZE, 54):
        for x in range(0, SIZE, 54):
            grey = float(np.clip(156 + 8 * rng.standard_normal(), 135, 180))
            cv2.rectangle(image, (x + 3, y + 3), (x + 50, y + 50), grey, -1)
    return _signed(cv2.GaussianBlur(image, (0, 0), 0.6))


def _wood(rng: np.random.Generator) -> np.ndarray:
    grain = smooth_noise(rng, SIZE, SIZE, 3, 2)
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    return np.clip(4.0 * (np.sin(rows * 0.26 + 2.0 * grain) - 0.35), -0.25, 0.75) * -1.0


def _planks(rng: np.random.Generator) -> np.ndarray:
    wood = 0.08 * _wood(rng).T.copy() + 0.2
    for x in range(0, SIZE, 64):
        wood[:, x : x + 64] += 0.05 * float(rng.standard_normal())
        wood[:, x : x + 6] = -0.8
    return cv2.GaussianBlur(wood, (0, 0), 0.6)


def _marble(rng: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(smooth_noise(rng, SIZE, SIZE, 6, 3, 0.5), (0, 0), 3.0)
    dx, dy = cv2.Sobel(noise, cv2.CV_32F, 1, 0) / 8.0, cv2.Sobel(noise, cv2.CV_32F, 0, 1) / 8.0
    distance = np.abs(noise) / np.maximum(np.hypot(dx, dy), 0.012)  # pixels to the vein's middle
    return _cut(-distance, -3.6, 4.0)


def _speckle(rng: np.random.Generator) -> np.ndarray:
    return _blobs(rng, 4.5, 4.5, 1.1)


def _cloudy(rng: np.random.Generator) -> np.ndarray:
    return 0.45 * smooth_noise(rng, SIZE, SIZE, 6, 4)


def _bark(rng: np.random.Generator) -> np.ndarray:
    return _blobs(rng, 5.0, 26.0, 0.45)


def _waves(rng: np.random.Generator) -> np.ndarray:
    return _blobs(rng, 30.0, 5.0, 0.7)


def _pebbles(rng: np.random.Generator) -> np.ndarray:
    image = np.full((SIZE, SIZE), 30, np.uint8)
    for _ in range(620):
        x, y = rng.integers(0, SIZE, 2).tolist()
        axes = (int(rng.integers(14, 26)), int(rng.integers(10, 17)))
        turn = float(rng.uniform(0, 180))
        grey = float(np.clip(156 + 10 * rng.standard_normal(), 130, 185))
        cv2.ellipse(image, (x, y + 2), (axes[0] + 4, axes[1] + 4), turn, 0, 360, 30, -1, cv2.LINE_AA)
        cv2.ellipse(image, (x, y), axes, turn, 0, 360, grey, -1, cv2.LINE_AA)
    return _signed(image)


def _weave(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    over = np.tanh(3.0 * np.sin(x * math.pi / 14) * np.sin(y * math.pi / 14))
    return 0.5 * over - 0.1


def _cells(rng: np.random.Generator) -> np.ndarray:
    points = np.full((SIZE, SIZE), 255, np.uint8)
    points[rng.integers(0, SIZE, 330), rng.integers(0, SIZE, 330)] = 0
    _, labels = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    level = rng.uniform(0.15, 0.3, labels.max() + 1).astype(np.float32)
    edge = cv2.morphologyEx(labels.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    return cv2.GaussianBlur(np.where(edge, np.float32(-0.8), level[labels]), (0, 0), 0.8)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    x = np.arange(SIZE, dtype=np.float32)[None, :]
    noise = smooth_noise(rng, SIZE, SIZE, 5, 2)
    return np.clip(3.0 * np.sin(x * 0.17 + 0.8 * noise), -0.6, 0.4)


def _spots(rng: np.random.Generator) -> np.ndarray:
    return _blobs(rng, 8.0, 8.0, 0.9)


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
