"""Pictures filled with regions of every shape and density, with no object in front.

They teach that any closed edge bounds a region, however small or ragged, as edges of photographs are.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, Sequence, Tuple

import cv2
import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas
from tools.tiny.palette import Paint
from tools.tiny.textures import lay, smooth_noise

# Regions are drawn as numbers on a grid twice as fine, on which pieces and joints are 9 pixels wide or more, so that
# edges are clear; fine patterns are drawn on one three times as fine. A number's low part is its light, the high part
# its paint.
_LIGHTS = 24
_DARK = 3 * _LIGHTS  # the first number of the joints' dark grey
_COUNT = _DARK + 2
# Share of finer, denser patterns.
FINE_SHARE = 0.2
# Side of the window, in pixels of that grid, whose median takes specks away.
_TIDY = 11


def draw_pattern(canvas: Canvas, chance: Chance, look: str, paints: Sequence[Paint]) -> None:
    """Fill the picture; the first of the three paints is the one that the caption names first."""
    grid = 3 if chance.yes(FINE_SHARE) else 2
    height, width = canvas.height * grid, canvas.width * grid
    regions = _MAKERS[look](chance, height, width)
    lights = _lights(chance)
    table = np.zeros((_COUNT, 3), np.float32)
    for slot, paint in enumerate(paints):
        light = lights[:, None]
        bright = np.clip(light - 1.0, 0, 1)
        table[slot * _LIGHTS : (slot + 1) * _LIGHTS] = np.minimum(light, 1.0) * paint.rgb + bright * (255 - paint.rgb)
    table[_DARK:] = chance.pick((np.array([34, 32, 36]), np.array([70, 66, 62]), np.array([222, 218, 210])))
    image = table.clip(0, 255).astype(np.uint8)[regions]
    canvas.image[:] = cv2.resize(image, (canvas.width, canvas.height), interpolation=cv2.INTER_AREA)
    named = (regions < _LIGHTS).astype(np.uint8) * 255
    canvas.mask[:] = cv2.resize(named, (canvas.width, canvas.height), interpolation=cv2.INTER_AREA) * (1.0 / 255.0)
    if chance.yes(0.6):
        kind = chance.pick(("speckle", "cloudy", "marble", "fur", "bark", "weave"))
        texture = lay(
            kind, chance.between(0.03, 0.16), chance.spread(3), chance.between(0.6, 2.0), chance.between(0, 3)
        )
        canvas.image *= (1.0 + texture.patch((0, 0, canvas.width, canvas.height), 245.0))[..., None]
    if chance.yes(0.3):
        _unfocus(canvas, chance)


def _lights(chance: Chance) -> np.ndarray:
    """(_LIGHTS,) float32 light of each number: nearly even, or three steps far enough apart for clear edges."""
    steps = np.linspace(-1.0, 1.0, _LIGHTS, dtype=np.float32)
    if chance.yes(0.45):
        return np.concatenate([[0.5], 0.95 + 0.025 * steps[1:]]).astype(np.float32)  # the first is that of outlines
    depth = chance.between(0.26, 0.34)
    return 0.98 + 0.01 * steps + depth * np.floor(steps * 1.499 - 0.501).astype(np.float32)


def _unfocus(canvas: Canvas, chance: Chance) -> None:
    """Blur the picture in some places, so that its edges end in the open, as those of photographs do."""
    sharp = canvas.image
    noise = smooth_noise(chance.rng, 16, 24, chance.whole(2, 6))
    share = np.clip(0.5 + 1.5 * cv2.resize(noise, (canvas.width, canvas.height), interpolation=cv2.INTER_CUBIC), 0, 1)
    canvas.soften(chance.between(2.0, 5.0))
    canvas.image = sharp + share[..., None] * (canvas.image - sharp)


def _numbers(chance: Chance, count: int, shares: Tuple[float, float, float] = (0.5, 0.38, 0.12)) -> np.ndarray:
    """(count,) uint8 region numbers with random paints and lights."""
    draws = chance.rng.random((2, count))
    slot = (draws[0] > shares[0]).astype(np.uint8) + (draws[0] > shares[0] + shares[1]).astype(np.uint8)
    return (slot * _LIGHTS + (draws[1] * _LIGHTS).astype(np.uint8)).astype(np.uint8)


def _warp(chance: Chance, regions: np.ndarray, reach: float) -> np.ndarray:
    """Regions with their borders made ragged."""
    height, width = regions.shape
    cells = chance.whole(4, 18)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x += reach * smooth_noise(chance.rng, height, width, cells)
    y += reach * smooth_noise(chance.rng, height, width, cells)
    return cv2.remap(regions, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)


def _mosaic(chance: Chance, height: int, width: int) -> np.ndarray:
    count = int(12 * 20 ** chance.between(0, 1)) * height // 512
    points = np.full((height // 2, width // 2), 255, np.uint8)
    points[chance.rng.integers(0, height // 2, count), chance.rng.integers(0, width // 2, count)] = 0
    _, labels = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    labels = cv2.resize(labels.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int32)
    regions = _numbers(chance, int(labels.max()) + 1)[labels]
    if chance.yes(0.4):
        regions = _warp(chance, regions, chance.between(3, 10))
    if chance.yes(0.5):
        return _joints(regions, chance.whole(9, 14))
    return regions


def _joints(regions: np.ndarray, width: int) -> np.ndarray:
    """Dark joints between the regions."""
    border = cv2.morphologyEx(regions, cv2.MORPH_GRADIENT, np.ones((width, width), np.uint8)) > 0
    regions = regions.copy()
    regions[border] = _DARK
    return regions


def _bands(chance: Chance, height: int, width: int) -> np.ndarray:
    """Veined bands of smooth noise, as in marble."""
    noise = smooth_noise(
        chance.rng, height // 2, width // 2, chance.whole(2, 7), chance.whole(1, 3), chance.between(0.3, 0.45)
    )
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    band = np.floor(noise * chance.between(1.2, 2.6)).astype(np.int32) % 64
    return cv2.medianBlur(_numbers(chance, 64, (0.45, 0.4, 0.15))[band], _TIDY)


def _camouflage(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), 12, np.uint8)
    for number in _numbers(chance, chance.whole(3, 6), (0.4, 0.4, 0.2)):
        noise = smooth_noise(chance.rng, height // 2, width // 2, chance.whole(3, 14), chance.whole(1, 2))
        noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
        regions[noise > chance.between(0.4, 1.0)] = number
    return cv2.medianBlur(regions, _TIDY)


def _polygons(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), _LIGHTS + 20, np.uint8)
    for number in _numbers(chance, chance.whole(8, 40)).tolist():
        centre = np.array([chance.between(0, width), chance.between(0, height)])
        radius = chance.between(20, 150)
        if chance.yes(0.3):
            cv2.ellipse(
                regions,
                centre.astype(int).tolist(),
                (int(radius), int(radius * chance.between(0.3, 1))),
                chance.between(0, 180),
                0,
                360,
                number,
                -1,
            )
            continue
        angles = np.sort(chance.rng.random(chance.whole(3, 6))) * 2 * math.pi
        corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(regions, [corners.astype(np.int32)], number)
    return regions


def _stripes(chance: Chance, height: int, width: int) -> np.ndarray:
    angle, pitch = chance.between(0, math.pi), chance.between(22, 90)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = (x * math.cos(angle) + y * math.sin(angle)) / pitch
    if chance.yes(0.7):
        phase += chance.between(0.1, 1.4) * smooth_noise(
            chance.rng, height, width, chance.whole(2, 8), chance.whole(1, 2)
        )
    band = np.floor(phase).astype(np.int32)
    numbers = _numbers(chance, 256)
    numbers[::2] %= _LIGHTS
    numbers[1::2] = numbers[1::2] % _LIGHTS + _LIGHTS
    return numbers[band % 256]


def _bricks(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), _DARK, np.uint8)
    tall = chance.whole(42, 84)
    long = int(tall * chance.between(1.4, 2.6))
    gap = chance.whole(9, 13)
    shares = (0.88, 0.12, 0.0) if chance.yes(0.6) else (0.5, 0.4, 0.1)
    numbers = _numbers(chance, 1024, shares).tolist()
    for row, y in enumerate(range(-tall // 2, height, tall)):
        for x in range(-long + (row % 2) * (long // 2), width, long):
            cv2.rectangle(regions, (x, y), (x + long - gap, y + tall - gap), numbers.pop(), -1)
    return _warp(chance, regions, chance.between(0.5, 3)) if chance.yes(0.4) else regions


def _leaves(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), _LIGHTS * 2, np.uint8)
    size = chance.between(42, 84)
    count = int(min(2.2 * height * width / (size * size * 1.6), 320))
    t = np.linspace(0, math.pi, 8)
    outline = np.concatenate(
        [np.stack([-np.cos(t), 0.42 * np.sin(t) ** 1.3], 1), np.stack([np.cos(t), -0.42 * np.sin(t) ** 1.3], 1)]
    )
    draws = chance.rng.random((count, 4))
    for (u, v, turn, scale), number in zip(draws, _numbers(chance, count, (0.72, 0.22, 0.06)).tolist()):
        a, r = turn * 2 * math.pi, size * (0.6 + 0.8 * scale)
        spin = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
        centre = np.array([u * width, v * height])
        shape = (outline @ spin * r + centre).astype(np.int32)
        cv2.fillPoly(regions, [shape], number)
        base = number // _LIGHTS * _LIGHTS
        cv2.polylines(regions, [shape], True, base, 9)
    return regions


def _pebbles(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), _DARK, np.uint8)
    size = chance.between(30, 64)
    count = int(min(2.6 * height * width / (size * size * 3), 420))
    draws = chance.rng.random((count, 5))
    for (u, v, turn, a, b), number in zip(draws, _numbers(chance, count, (0.6, 0.28, 0.12)).tolist()):
        centre = (int(u * width), int(v * height))
        axes = (int(size * (0.6 + 0.7 * a)), int(size * (0.45 + 0.45 * b)))
        base = number // _LIGHTS * _LIGHTS
        cv2.ellipse(regions, centre, axes, turn * 180, 0, 360, base, -1)
        inner = (max(axes[0] - 9, 1), max(axes[1] - 9, 1))
        cv2.ellipse(regions, (centre[0] - 1, centre[1] - 2), inner, turn * 180, 0, 360, number, -1)
    return regions


def _strokes(
    chance: Chance, height: int, width: int, count: int, length: float, thick: int, spread: float
) -> np.ndarray:
    regions = np.full((height, width), 4, np.uint8)
    angle = chance.between(-0.5, 0.5) - math.pi / 2
    field = angle + spread * cv2.resize(smooth_noise(chance.rng, 16, 24, 5), (width, height))
    count = count * height * width // (512 * 768)
    draws = chance.rng.random((count, 3))
    for (u, v, w), number in zip(draws, _numbers(chance, count, (0.75, 0.2, 0.05)).tolist()):
        x, y = u * (width - 1), v * (height - 1)
        a = float(field[int(y), int(x)]) + 0.5 * (w - 0.5)
        far = length * (0.5 + w)
        cv2.line(regions, (int(x), int(y)), (int(x + far * math.cos(a)), int(y + far * math.sin(a))), number, thick)
    return regions


def _grass(chance: Chance, height: int, width: int) -> np.ndarray:
    return _strokes(chance, height, width, chance.whole(150, 380), chance.between(80, 160), chance.whole(12, 20), 0.3)


def _fur(chance: Chance, height: int, width: int) -> np.ndarray:
    return _strokes(chance, height, width, chance.whole(240, 520), chance.between(50, 100), chance.whole(11, 16), 0.9)


def _feathers(chance: Chance, height: int, width: int) -> np.ndarray:
    regions = np.full((height, width), _LIGHTS, np.uint8)
    wide = chance.whole(56, 120)
    row = int(wide * chance.between(0.4, 0.7))
    numbers = _numbers(chance, 2048, (0.78, 0.2, 0.02)).tolist()
    for line, y in enumerate(range(height + row, -2 * row, -row)):
        for x in range(-wide + (line % 2) * (wide // 2), width + wide, wide):
            number = numbers.pop()
            base = number // _LIGHTS * _LIGHTS
            centre, axes = (x, y), (int(wide * 0.55), int(row * 1.4))
            cv2.ellipse(regions, centre, axes, 0, 0, 360, base, -1)
            cv2.ellipse(regions, (x, y - 3), (axes[0] - 8, axes[1] - 10), 0, 0, 360, number, -1)
            if wide > 80:
                cv2.line(regions, (x, y - row), (x, y + row // 2), base, 9)
    return _warp(chance, regions, chance.between(2, 8)) if chance.yes(0.5) else regions


_MAKERS: Dict[str, Callable[[Chance, int, int], np.ndarray]] = {
    "mosaic": _mosaic,
    "marble": _bands,
    "camouflage": _camouflage,
    "polygons": _polygons,
    "stripes": _stripes,
    "bricks": _bricks,
    "leaves": _leaves,
    "pebbles": _pebbles,
    "grass": _grass,
    "feathers": _feathers,
    "fur": _fur,
}
