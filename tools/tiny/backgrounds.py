"""Skies, walls, waters and grounds."""

from __future__ import annotations

import math
from typing import Callable, Dict, List

import cv2
import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Spot, ellipse, ribbon, smooth
from tools.tiny.palette import Paint
from tools.tiny.plan import Backdrop
from tools.tiny.textures import Texture, lay, lay_flat, smooth_noise

# Light on a whole picture would be costly at full depth; everything here works on (H, W) light times one colour.
_WALL_TEXTURES = {"brick wall": "bricks", "wooden wall": "planks", "tiled wall": "tiles"}


def draw_backdrop(canvas: Canvas, chance: Chance, backdrop: Backdrop, top: Paint, ground: Paint) -> None:
    """Fill the picture with a backdrop in its two paints."""
    name = "wall" if "wall" in backdrop.back else backdrop.back
    _BACKS[name](canvas, chance, backdrop, top)
    if not backdrop.ground:
        return
    horizon = int(backdrop.horizon * canvas.height)
    if backdrop.ground not in ("table", "floor") and chance.yes(0.55):
        _far_land(canvas, chance, backdrop, horizon)
    _ground(canvas, chance, backdrop, ground, horizon)


def _light(canvas: Canvas, chance: Chance, depth: float) -> np.ndarray:
    """(H, W) light that changes slowly over the picture, about 1 +- depth."""
    grid = 1.0 + depth * chance.rng.standard_normal((3, 4)).astype(np.float32)
    return cv2.resize(grid, (canvas.width, canvas.height), interpolation=cv2.INTER_CUBIC)


def _spread_light(canvas: Canvas, colour: np.ndarray, light: np.ndarray, other: np.ndarray) -> None:
    """Mix two colours: light 0 gives the first and 1 the second."""
    canvas.image[:] = colour + light[..., None] * (other - colour)


def _whole(canvas: Canvas, texture: Texture, paint: Paint) -> np.ndarray:
    return texture.patch((0, 0, canvas.width, canvas.height), float(paint.rgb.max()))


def _plain(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    canvas.image[:] = paint.rgb * _light(canvas, chance, 0.025)[..., None]


def _gradient(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    other = paint.paler(0.5 if paint.value > 0.2 else 0.12) if chance.yes(0.5) else paint.darker(0.72)
    angle = chance.between(0, 2 * math.pi)
    x = np.linspace(-0.7, 0.7, canvas.width, dtype=np.float32)[None, :]
    y = np.linspace(-0.5, 0.5, canvas.height, dtype=np.float32)[:, None]
    if chance.yes(0.6):
        ramp = np.clip(0.5 + 0.75 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)
    else:
        ramp = np.clip(1.5 * np.hypot(x - 0.3 * math.cos(angle), y - 0.3 * math.sin(angle)), 0, 1)
    _spread_light(canvas, paint.rgb, ramp, other.rgb)


def _textured(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    kind = chance.pick(
        ("speckle", "marble", "weave", "cloudy", "straw", "wood", "cells", "fur", "leaves", "stripes", "bark")
    )
    strength = chance.between(0.03, 0.12) if chance.yes(0.6) else chance.between(0.12, 0.42)
    texture = lay(kind, strength, chance.spread(3), chance.between(0.6, 1.8), chance.between(0, math.pi))
    canvas.image[:] = paint.rgb * (_light(canvas, chance, 0.02) + _whole(canvas, texture, paint))[..., None]


def _wall(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    kind = _WALL_TEXTURES.get(backdrop.back)
    if kind is None:
        kind = chance.pick(("speckle", "cloudy", "bark", "stripes"))
        strength = chance.between(0.02, 0.1)
    else:
        strength = chance.between(0.08, 0.4)
    texture = lay(kind, strength, chance.spread(3), chance.between(0.6, 1.5), 0.06 * chance.between(-1, 1))
    canvas.image[:] = paint.rgb * (_light(canvas, chance, 0.03) + _whole(canvas, texture, paint))[..., None]


def _blur(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    """Far things out of focus: soft discs and stems, drawn small and enlarged."""
    small = np.ones((32, 48, 3), np.float32) * paint.rgb
    for _ in range(chance.whole(5, 26)):
        shade = paint.paler(chance.between(0.05, 0.4)) if chance.yes(0.5) else paint.darker(chance.between(0.6, 0.95))
        centre = (chance.whole(0, 47), chance.whole(0, 31))
        colour = tuple(float(v) for v in shade.rgb)
        if chance.yes(0.7):
            cv2.circle(small, centre, chance.whole(2, 7), colour, -1)
        else:
            cv2.line(small, centre, (centre[0] + chance.whole(-6, 6), 32), colour, chance.whole(1, 3))
    small = cv2.GaussianBlur(small, (0, 0), chance.between(0.9, 2.5))
    canvas.image[:] = cv2.resize(small, (canvas.width, canvas.height), interpolation=cv2.INTER_CUBIC)
    if chance.yes(0.5):
        for _ in range(chance.whole(3, 14)):
            radius = chance.between(6, 26)
            x, y = chance.between(0, canvas.width), chance.between(0, canvas.height)
            disc = ellipse(x, y, radius, radius)
            canvas.flat(disc, paint.paler(0.5), chance.between(0.1, 0.3))


def _sky(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    ramp = np.linspace(0.0, 1.0, canvas.height, dtype=np.float32)[:, None] * np.ones((1, canvas.width), np.float32)
    _spread_light(canvas, paint.darker(0.96).rgb, ramp * chance.between(0.5, 1.0), paint.paler(0.6).rgb)


def _clouds(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    _sky(canvas, chance, backdrop, paint)
    if chance.yes(0.45):
        noise = smooth_noise(chance.rng, 64, 96, 5, 4)
        noise = cv2.resize(noise, (canvas.width, canvas.height), interpolation=cv2.INTER_CUBIC)
        cover = np.clip(noise * 0.8 + chance.between(-0.3, 0.3), 0, 0.95)
        white = np.array([252, 252, 252], np.float32)
        canvas.image += cover[..., None] * (white - canvas.image)
        return
    for _ in range(chance.whole(1, 5)):
        _cloud(
            canvas,
            chance,
            chance.between(0, canvas.width),
            chance.between(0.05, 0.6) * canvas.height,
            chance.between(0.08, 0.26) * canvas.width,
        )


def _cloud(canvas: Canvas, chance: Chance, x: float, y: float, size: float) -> None:
    """A heap cloud of puffs with a flat bottom."""
    shapes: List[np.ndarray] = []
    for _ in range(chance.whole(4, 7)):
        t = chance.between(-1, 1)
        r = size * (0.42 - 0.24 * abs(t)) * chance.between(0.75, 1.2)
        shapes.append(ellipse(x + t * size * 0.75, y - r * 0.5, r * 1.15, r))
    shapes = [np.stack([s[:, 0], np.minimum(s[:, 1], y + size * 0.06)], 1) for s in shapes]
    shade = np.array([250, 250, 252], np.float32) * chance.between(0.93, 1.0)
    canvas.solid(shapes, shade, relief=0.10, blend=size * 0.03 + 0.5, base=0.97, rim=0.06)


def _sunset(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    ramp = np.linspace(0.0, 1.0, canvas.height, dtype=np.float32)[:, None] * np.ones((1, canvas.width), np.float32)
    high = Paint(250.0, 0.18, chance.between(0.6, 0.85))
    _spread_light(canvas, high.rgb, np.clip(ramp * 1.5, 0, 1), paint.rgb)
    x, y = chance.between(0.1, 0.9) * canvas.width, canvas.height * chance.between(0.45, 0.75)
    canvas.glow(x, y, canvas.width * 0.6, canvas.height * 0.5, paint.paler(0.75), 0.8)
    for _ in range(chance.whole(0, 5)):
        cy, cx = chance.between(0.05, 0.6) * canvas.height, chance.between(0, 1) * canvas.width
        streak = ellipse(cx, cy, chance.between(30, 120), chance.between(2, 7))
        canvas.flat(streak, paint.darker(0.86), chance.between(0.3, 0.8))


def _night(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    ramp = np.linspace(0.0, 1.0, canvas.height, dtype=np.float32)[:, None] * np.ones((1, canvas.width), np.float32)
    _spread_light(canvas, paint.darker(0.6).rgb, ramp, paint.darker(1.25).rgb)
    for _ in range(chance.whole(8, 45)):
        x, y = chance.between(0, canvas.width), chance.between(0, 0.8) * canvas.height
        r = chance.between(0.5, 1.5)
        canvas.flat(ellipse(x, y, r, r, count=8), np.array([250, 248, 225], np.float32), chance.between(0.4, 1.0))


def _under_water(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint) -> None:
    ramp = np.linspace(1.0, 0.0, canvas.height, dtype=np.float32)[:, None] * np.ones((1, canvas.width), np.float32)
    _spread_light(canvas, paint.darker(0.86).rgb, ramp, paint.paler(0.22).rgb)
    if chance.yes(0.6):
        texture = lay("waves", chance.between(0.02, 0.12), chance.spread(3), chance.between(1.2, 2.5), 0, 1.6)
        canvas.image *= (1.0 + _whole(canvas, texture, paint))[..., None]
    for _ in range(chance.whole(0, 5)):
        x = chance.between(0, canvas.width)
        ray = np.array([[x, -2], [x + 20, -2], [x + 70, canvas.height + 2], [x + 10, canvas.height + 2]], np.float64)
        canvas.flat(ray, paint.paler(0.6), chance.between(0.05, 0.16))
    for _ in range(chance.whole(0, 14)):
        x, y, r = chance.between(0, canvas.width), chance.between(0, canvas.height), chance.between(1.5, 7)
        canvas.flat(ellipse(x, y, r, r, count=16), paint.paler(0.7), 0.35)
        canvas.lines([ellipse(x, y, r, r, count=16)], paint.paler(0.85), 1.0, 0.8, closed=True)
    if chance.yes(0.6):
        _sea_bed(canvas, chance)


def _sea_bed(canvas: Canvas, chance: Chance) -> None:
    xs = np.linspace(-10, canvas.width + 10, 9)
    ys = canvas.height * (0.9 + 0.04 * chance.spread(9))
    edge = smooth(np.stack([xs, ys], 1), 5, closed=False)
    bed = np.concatenate([edge, [[canvas.width + 10, canvas.height + 10], [-10, canvas.height + 10]]])
    kind = chance.pick(("speckle", "pebbles"))
    canvas.solid(
        bed,
        np.array([196, 178, 136], np.float32),
        0.1,
        rim=0.05,
        texture=lay(kind, chance.between(0.1, 0.35), chance.spread(3), 0.8),
    )


_BACKS: Dict[str, Callable[[Canvas, Chance, Backdrop, Paint], None]] = {
    "plain": _plain,
    "gradient": _gradient,
    "textured": _textured,
    "wall": _wall,
    "blur": _blur,
    "sky": _sky,
    "clouds": _clouds,
    "sunset": _sunset,
    "night": _night,
    "water": _under_water,
}


def _far_land(canvas: Canvas, chance: Chance, backdrop: Backdrop, horizon: int) -> None:
    """Hills or woods along the horizon, greyed by the distance."""
    for _ in range(chance.whole(1, 2)):
        count = chance.whole(5, 12)
        height = canvas.height * chance.between(0.03, 0.15)
        xs = np.linspace(-20, canvas.width + 20, count)
        ys = horizon - height * (0.55 + 0.45 * chance.spread(count))
        edge = np.stack([xs, ys], 1)
        edge = smooth(edge, 5, closed=False) if chance.yes(0.7) else edge
        land = np.concatenate([edge, [[canvas.width + 20, horizon + 3], [-20, horizon + 3]]])
        value = 0.22 if backdrop.dark else chance.between(0.45, 0.75)
        tone = Paint(chance.pick((215.0, 130.0, 100.0, 30.0)), chance.between(0.08, 0.28), value)
        texture = None
        if chance.yes(0.4):
            texture = lay("leaves", chance.between(0.08, 0.3), chance.spread(3), 0.6)
        canvas.solid(land, tone, 0.08, rim=0.05, texture=texture)


_GROUND_TEXTURES: Dict[str, tuple] = {
    "grass": (("grass", "fur", "straw"), 0.06, 0.4),
    "sand": (("speckle", "waves"), 0.04, 0.2),
    "snow": (("speckle", "cloudy"), 0.02, 0.08),
    "earth": (("speckle", "pebbles", "waves"), 0.06, 0.3),
    "stones": (("pebbles", "cells"), 0.15, 0.5),
    "field": (("straw", "grass", "stripes"), 0.06, 0.35),
    "water": (("waves",), 0.05, 0.35),
    "table": (("wood", "planks", "speckle"), 0.05, 0.4),
    "floor": (("tiles", "planks", "weave"), 0.1, 0.4),
}


def _ground(canvas: Canvas, chance: Chance, backdrop: Backdrop, paint: Paint, horizon: int) -> None:
    kinds, low, high = _GROUND_TEXTURES[backdrop.ground]
    strength = low + (high - low) * chance.between(0, 1) ** 1.6
    texture = lay_flat(chance.pick(kinds), strength, chance.spread(3), horizon - 6, chance.between(0.35, 0.9))
    box = (0, max(horizon - 8, 0), canvas.width, canvas.height)
    rows = box[3] - box[1]
    depth = np.linspace(0.0, 1.0, rows, dtype=np.float32)[:, None]
    value = texture.patch(box, float(paint.rgb.max()))
    value += 1.03 - 0.16 * depth
    xs = np.linspace(-10, canvas.width + 10, 8)
    bump = {"water": 0.0, "table": 0.0, "floor": 0.0}.get(backdrop.ground, 3.0)
    edge = smooth(np.stack([xs, horizon + bump * chance.spread(8)], 1), 5, closed=False)
    area = np.concatenate([edge, [[canvas.width + 10, canvas.height + 10], [-10, canvas.height + 10]]])
    alpha = canvas.alpha([area], box)
    canvas.cover(box, alpha, np.minimum(value, 1.25)[..., None] * paint.rgb)
    if backdrop.ground == "water":
        _ripples(canvas, chance, paint, horizon)
    elif backdrop.ground == "table":
        canvas.lines([np.array([[0, horizon], [canvas.width, horizon]], np.float64)], paint.darker(0.5), 2.0, 0.8)


def _ripples(canvas: Canvas, chance: Chance, paint: Paint, horizon: int) -> None:
    """Light streaks on water, longer towards the viewer."""
    depth = canvas.height - horizon
    for _ in range(chance.whole(4, 26)):
        t = chance.between(0.03, 1.0)
        x, y = chance.between(0, canvas.width), horizon + depth * t
        half = (6 + 34 * t) * chance.between(0.5, 1.4)
        line = smooth(
            [(x - half, y), (x - half * 0.3, y - 1.5 * t), (x + half * 0.3, y + 1.2 * t), (x + half, y)],
            4,
            closed=False,
        )
        shade = paint.paler(0.55) if chance.yes(0.7) else paint.darker(0.75)
        canvas.flat(
            ribbon(line, np.interp(np.linspace(0, 1, len(line)), [0, 0.5, 1], [0.2, 1.0 + 2.0 * t, 0.2])), shade, 0.75
        )


def draw_blades(canvas: Canvas, chance: Chance, x: float, y: float, width: float, paint: Paint) -> None:
    """Blades of grass in front of what stands at (x, y)."""
    count = chance.whole(6, 26)
    xs = x + width * chance.spread(count)
    lean, tall = chance.spread(count), chance.spread(count)
    blades = []
    for k in range(count):
        height = 12 + 9 * tall[k]
        base = np.array([xs[k], y + 4])
        blades.append(
            ribbon(
                smooth([base, base + [lean[k] * 2, -height * 0.6], base + [lean[k] * 7, -height]], 3, closed=False),
                [3.0, 2.8, 2.4, 2.0, 1.5, 1.0, 0.4],
            )
        )
    third = max(count // 3, 1)
    for part, shade in enumerate((0.62, 0.85, 1.1)):
        group = blades[part * third : (part + 1) * third]
        if group:
            canvas.flat(group, paint.rgb * shade)


def draw_wake(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    """The dark mirror image's foot and the rings around what floats at a spot."""
    width = spot.size * 0.62
    canvas.glow(spot.x, spot.y + spot.size * 0.1, width * 1.1, spot.size * 0.16, paint.darker(0.5), 0.55)
    for k in range(chance.whole(2, 4)):
        reach = width * (0.95 + 0.28 * k)
        t = np.linspace(0.08 * math.pi, 0.92 * math.pi, 16)
        line = np.stack([spot.x + reach * np.cos(t), spot.y - 2 + (4 + 0.07 * spot.size + 5 * k) * np.sin(t)], 1)
        wide = np.interp(np.linspace(0, 1, 16), [0, 0.5, 1], [0.3, 2.6 - 0.4 * k, 0.3])
        canvas.flat(ribbon(line, wide), paint.paler(0.65), 0.85 - 0.15 * k)
