"""Trees, flowers, fish, cats, suns and mountains.

Local units: 1 high, the foot at the origin, y down; fish, suns and moons are centred on the origin instead.
"""

from __future__ import annotations

import math
from typing import List, Optional, Sequence

import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Clip, Spot, ellipse, ribbon, smooth
from tools.tiny.palette import Paint
from tools.tiny.textures import Texture, lay

BARK = Paint(26.0, 0.48, 0.42)
LEAF = Paint(112.0, 0.55, 0.52)
DARK = np.array([20, 18, 20], np.float32)
WHITE = np.array([250, 250, 246], np.float32)


def some_texture(
    chance: Chance,
    kinds: Sequence[str],
    low: float,
    high: float,
    scale: float = 1.0,
    angle: float = 0.0,
    share: float = 1.0,
) -> Optional[Texture]:
    """A texture of a random strength, for a share of the objects."""
    kind, strength = chance.pick(kinds), chance.between(low, high)
    draws, used = chance.spread(3), chance.yes(share)
    return lay(kind, strength, draws, scale, angle) if used else None


def draw_tree(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A tree; its crown bears the paint."""
    {"fir": _fir, "palm": _palm}.get(look, _leafy)(canvas, chance, spot, paint, look)


def _trunk(canvas: Canvas, chance: Chance, spot: Spot, top: float, width: float) -> None:
    lean = 0.05 * chance.between(-1, 1)
    line = smooth([(0, 0.02), (lean * 0.4, top * 0.5), (lean, top)], 5, closed=False)
    shape = ribbon(line, np.linspace(width, width * 0.55, len(line)))
    shade = BARK.darker(chance.between(0.6, 1.3))
    texture = some_texture(chance, ("bark", "stripes", "planks"), 0.1, 0.45, 0.5 * spot.size / 200)
    canvas.solid(spot.place(shape), shade, 0.35, texture=texture)
    for side in (-1, 1):
        twig = smooth([(lean * 0.6, top * 0.7), (side * 0.1, top * 0.95), (side * 0.17, top * 1.2)], 4, closed=False)
        canvas.solid(spot.place(ribbon(twig, np.linspace(width * 0.4, width * 0.15, len(twig)))), shade, 0.2)


def _leafy(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    _trunk(canvas, chance, spot, -0.5, 0.075 + 0.03 * chance.between(-1, 1))
    wide = {"tall": 0.2, "round": 0.36}.get(look, 0.4) * chance.between(0.85, 1.15)
    count = chance.whole(7, 13)
    shapes: List[np.ndarray] = [spot.place(ellipse(0, -0.65, wide * 0.75, 0.28))]
    for k in range(count):
        a = 2 * math.pi * (k + 0.5 * chance.between(-1, 1)) / count
        r = chance.between(0.09, 0.15)
        shapes.append(spot.place(ellipse(math.cos(a) * (wide - r * 0.7), -0.66 + math.sin(a) * (0.34 - r), r, r * 0.9)))
    scale = max(spot.size / 220, 0.3) * chance.between(0.7, 1.3)
    texture = some_texture(
        chance, ("leaves", "leaves", "cells", "scales", "fur", "pebbles"), 0.05, 0.4, scale, chance.between(0, 3)
    )
    blend = max(0.012 * spot.size, 0.45)
    canvas.solid(shapes, paint, 0.38, named=True, blend=blend, texture=texture, rim=0.2)
    clip = Clip(shapes, blend)
    for _ in range(chance.whole(2, 6)):
        x, y = wide * 0.6 * chance.between(-1, 1), -0.66 + 0.22 * chance.between(-1, 1)
        r = chance.between(0.08, 0.14)
        puff = spot.place(ellipse(x, y, r * 1.2, r))
        canvas.solid(
            puff, paint.darker(chance.between(0.82, 1.04)), 0.25, named=True, clip=clip, texture=texture, rim=0.22
        )
    if chance.yes(0.25):
        fruit = chance.pick((np.array([205, 45, 40]), np.array([240, 160, 40]), np.array([250, 240, 240])))
        for _ in range(chance.whole(4, 10)):
            x, y = wide * 0.7 * chance.between(-1, 1), -0.66 + 0.24 * chance.between(-1, 1)
            canvas.solid(spot.place(ellipse(x, y, 0.025, 0.025, count=14)), fruit, 0.25)


def _fir(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    _trunk(canvas, chance, spot, -0.2, 0.07)
    layers = chance.whole(3, 5)
    wide = chance.between(0.26, 0.38)
    texture = some_texture(chance, ("fur", "grass", "leaves"), 0.05, 0.5, max(spot.size / 250, 0.3))
    for k in range(layers):
        t = k / layers
        low, high = -0.12 - 0.62 * t, min(-0.12 - 0.62 * t - 0.5, -0.5) if k < layers - 1 else -1.0
        half = wide * (1 - 0.72 * t)
        teeth = chance.whole(5, 8)
        hem = [(-half + 2 * half * j / (2 * teeth), low + (0.035 if j % 2 else 0.0)) for j in range(2 * teeth + 1)]
        shape = spot.place([(0, high), *[(x, y) for x, y in hem[::-1]]])
        canvas.solid(shape, paint.darker(0.82 + 0.18 * t), 0.3, named=True, texture=texture, rim=0.25)
        canvas.lines([spot.place(hem)], paint.line(), 1.2, 0.6, named=True)


def _palm(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    bend = 0.16 * chance.between(-1, 1)
    line = smooth([(0, 0), (bend * 0.3, -0.35), (bend, -0.72)], 6, closed=False)
    texture = some_texture(chance, ("stripes", "bark"), 0.1, 0.4, 0.3, math.pi / 2)
    canvas.solid(spot.place(ribbon(line, np.linspace(0.075, 0.05, len(line)))), BARK, 0.35, texture=texture)
    count = chance.whole(6, 9)
    for k in range(count):
        a = math.pi * (0.05 + 0.9 * k / (count - 1)) + 0.1 * chance.between(-1, 1)
        reach = 0.36 * chance.between(0.8, 1.15)
        end = np.array([bend + math.cos(a) * reach, -0.74 - math.sin(a) * reach * 0.55 + 0.12])
        middle = np.array([bend + math.cos(a) * reach * 0.55, -0.78 - math.sin(a) * reach * 0.5])
        rib = smooth([(bend, -0.73), middle, end], 6, closed=False)
        width = np.interp(np.linspace(0, 1, len(rib)), [0, 0.3, 1], [0.03, 0.1, 0.01])
        width[1::2] *= 0.72
        leaf = spot.place(ribbon(rib, width))
        canvas.solid(leaf, paint.darker(0.85 + 0.15 * (k % 2)), 0.25, named=True)
        canvas.lines([spot.place(rib)], paint.line(), 1.0, 0.7, named=True)


def draw_flower(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A flower on its stem; the petals bear the paint."""
    bend = 0.1 * chance.between(-1, 1)
    head = np.array([bend, -0.72])
    stem = smooth([(0, 0.05), (bend * 0.2, -0.35), head], 6, closed=False)
    green = LEAF.darker(chance.between(0.75, 1.15))
    canvas.solid(spot.place(ribbon(stem, 0.03)), green, 0.2)
    for side in (-1, 1):
        y = -chance.between(0.12, 0.38)
        tip = np.array([side * chance.between(0.16, 0.28), y - chance.between(0.05, 0.2)])
        rib = smooth([(bend * 0.3, y), (side * 0.1, y - 0.08), tip], 5, closed=False)
        leaf = spot.place(ribbon(rib, np.interp(np.linspace(0, 1, len(rib)), [0, 0.4, 1], [0.02, 0.085, 0.004])))
        canvas.solid(leaf, green, 0.3)
        canvas.lines([spot.place(rib)], green.line(), 1.0, 0.6)
    petals = {"tulip": _tulip, "rose": _rose, "puff": _puff}.get(look, _daisy)
    petals(canvas, chance, spot.at(head[0], head[1]), paint)


def _daisy(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    count, reach = chance.whole(5, 14), chance.between(0.24, 0.29)
    count = max(min(count, int(reach * spot.size / 2.6)), 5)  # petals of 12 pixels or more at the widest
    rings = 2 if chance.yes(0.4) and reach * spot.size > 5 * count else 1
    width = min(2.4 * reach / count, 0.13) * chance.between(0.9, 1.3)
    squash = chance.between(0.72, 1.0)
    for ring in range(rings):
        for k in range(count):
            a = 2 * math.pi * (k + 0.5 * ring) / count + 0.05 * chance.between(-1, 1)
            far = reach * (1.0 - 0.22 * ring)
            shape = ellipse(math.cos(a) * far * 0.56, math.sin(a) * far * 0.56, far * 0.5, width, a, 18)
            shape[:, 1] *= squash
            petal = spot.place(shape)
            canvas.solid(petal, paint.darker(0.84 + 0.14 * ((k + ring) % 2)), 0.28, named=True, rim=0.3)
            canvas.lines([petal], paint.line(), 1.0, 0.6, closed=True, named=True)
    heart = chance.pick((np.array([240, 190, 50]), np.array([120, 76, 40]), np.array([70, 50, 46])))
    texture = some_texture(chance, ("pebbles", "speckle", "scales"), 0.1, 0.4, 0.35)
    centre = ellipse(0, 0, reach * 0.3, reach * 0.3)
    centre[:, 1] *= squash
    canvas.solid(spot.place(centre), heart.astype(np.float32), 0.35, texture=texture)


def _tulip(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    w, h = chance.between(0.15, 0.19), chance.between(0.24, 0.28)
    for side in (-1, 1):
        petal = spot.place(
            smooth([(0, 0.06), (side * w, -0.02), (side * w * 1.05, -h * 0.7), (side * w * 0.75, -h), (0, -h * 0.5)])
        )
        canvas.solid(petal, paint.darker(0.82), 0.3, named=True, rim=0.3)
        canvas.lines([petal], paint.line(), 1.1, 0.6, closed=True, named=True)
    front = spot.place(
        smooth(
            [
                (0, 0.08),
                (w * 0.72, 0.0),
                (w * 0.55, -h * 0.55),
                (0, -h * 0.98),
                (-w * 0.55, -h * 0.55),
                (-w * 0.72, 0.0),
            ]
        )
    )
    canvas.solid(front, paint, 0.35, named=True, rim=0.3)
    canvas.lines([front], paint.line(), 1.1, 0.7, closed=True, named=True)


def _rose(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    radius = chance.between(0.2, 0.25)
    rings = max(min(5, int(radius * spot.size / 7)), 1)
    for ring in range(rings):
        r = radius * (1 - ring / rings)
        count = max(6 - ring, 2)
        turn = chance.between(0, 6)
        for k in range(count):
            a = turn + 2 * math.pi * k / count
            petal = spot.place(ellipse(math.cos(a) * r * 0.5, math.sin(a) * r * 0.42, r * 0.62, r * 0.52, a, 20))
            canvas.solid(petal, paint.darker(1.0 - 0.07 * ring - 0.04 * (k % 2)), 0.3, named=True, rim=0.35)
            canvas.lines([petal], paint.line(), 1.0, 0.5, closed=True, named=True)


def _puff(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    """A round head of many fine threads, as a dandelion gone to seed."""
    radius = chance.between(0.22, 0.28)
    canvas.solid(spot.place(ellipse(0, 0, radius, radius)), paint, 0.3, named=True, rim=0.25)
    count = chance.whole(70, 140)
    a, u = math.pi * chance.spread(count), np.abs(chance.spread(count))
    shades = (paint.paler(0.5), paint.darker(0.62), paint.paler(0.75))
    for part in range(3):
        threads = []
        for k in range(part, count, 3):
            direction = np.array([math.cos(a[k]), math.sin(a[k])])
            start, end = radius * (0.25 + 0.5 * u[k]), radius * (0.72 + 0.42 * u[k])
            threads.append(spot.place([direction * start, direction * end]))
        canvas.lines(threads, shades[part], 1.0, 0.8, named=True)
    canvas.solid(spot.place(ellipse(0, 0, radius * 0.16, radius * 0.16)), paint.darker(0.5), 0.2, named=True)


def draw_fish(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A fish looking to positive x, centred on the origin, 1 high with its fins."""
    tall = {"round": 0.42, "long": 0.22}.get(look, 0.32) * chance.between(0.9, 1.1)
    long = {"round": 0.52, "long": 0.75}.get(look, 0.62)
    reach = np.array([long, tall])  # the outlines below are in units of half the body's length and height
    fin = paint.darker(chance.pick((0.7, 0.85, 0.95)))
    for outline, root in (
        ([(-0.8, 0), (-1.35, -0.95), (-1.2, 0), (-1.35, 0.95)], (-0.75, 0.0)),
        ([(0.35, -0.7), (-0.05, -1.5), (-0.5, -1.15), (-0.45, -0.5)], (0.0, 0.0)),
        ([(0, 0.8), (-0.2, 1.35), (-0.45, 1.0), (-0.35, 0.6)], (0.0, 0.0)),
    ):
        _fin(canvas, spot, smooth(np.array(outline) * reach, 5), np.array(root) * reach, fin)
    body = spot.place(smooth(np.array(_FISH_BODY) * reach))
    kinds = ("scales", "scales", "feathers", "speckle")
    scale = max(spot.size / 300, 0.3)
    texture = some_texture(chance, kinds, 0.03, 0.35, scale, math.pi / 2 * spot.facing, 0.8)
    canvas.solid(body, paint, 0.4, named=True, texture=texture, rim=0.3)
    if chance.yes(0.4):
        colour = chance.pick((WHITE, DARK, np.array([245, 210, 80], np.float32)))
        for x in (0.3, -0.1, -0.45)[: chance.whole(1, 3)]:
            band = ribbon(np.array([(x, -1.0), (x + 0.06, 0.0), (x, 1.0)]) * reach, 0.09)
            canvas.flat_clipped(spot.place(band), colour, Clip([body]))
    canvas.lines([body], paint.line(), 1.3, 0.7, closed=True, named=True)
    t = np.linspace(-1.2, 1.2, 8)
    gill = np.stack([long * 0.42 - tall * 0.22 * np.cos(t), tall * 0.6 * np.sin(t)], 1)
    canvas.lines([spot.place(gill)], paint.line(), 1.4, 0.8, named=True)
    side = spot.place(smooth(np.array([(0.22, 0.1), (-0.18, 0.02), (-0.12, 0.42)]) * reach, 4))
    canvas.solid(side, fin, 0.25, named=True)
    canvas.lines([side], fin.line(), 1.1, 0.7, closed=True, named=True)
    r = tall * 0.17
    canvas.flat(spot.place(ellipse(long * 0.66, -tall * 0.2, r, r)), WHITE)
    canvas.flat(spot.place(ellipse(long * 0.68, -tall * 0.2, r * 0.6, r * 0.6)), DARK)
    mouth = spot.place(np.array([(0.97, 0.1), (0.8, 0.2)]) * reach)
    canvas.lines([mouth], paint.line(), 1.2, 0.8, named=True)


_FISH_BODY = (
    (1.0, 0.05),
    (0.75, -0.5),
    (0.25, -0.95),
    (-0.4, -0.6),
    (-0.9, -0.16),
    (-0.9, 0.16),
    (-0.4, 0.62),
    (0.25, 0.95),
    (0.78, 0.5),
)


def _fin(canvas: Canvas, spot: Spot, outline: np.ndarray, root: np.ndarray, paint: Paint) -> None:
    shape = spot.place(outline)
    canvas.solid(shape, paint, 0.2, named=True)
    rays = [spot.place([root, tip]) for tip in outline[::4]]
    canvas.lines(rays, paint.line(), 1.0, 0.5, clip=Clip([shape]), named=True)
    canvas.lines([shape], paint.line(), 1.0, 0.6, closed=True, named=True)


def draw_sun(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A sun with or without rays, centred; the disc and the rays bear the paint."""
    form = chance.pick(("glow", "rays", "beams"))
    r = 0.5 if form == "glow" else 0.32
    if form != "glow":
        count = chance.whole(8, 16)
        for k in range(count):
            a = 2 * math.pi * k / count
            far = 0.5 if k % 2 or form == "rays" else 0.42
            d, n = np.array([math.cos(a), math.sin(a)]), np.array([-math.sin(a), math.cos(a)])
            wide = 0.05 if form == "rays" else 0.02
            ray = [
                d * 0.36 + n * wide,
                d * far + n * (0.0 if form == "rays" else wide),
                d * far - n * (0 if form == "rays" else wide),
                d * 0.36 - n * wide,
            ]
            canvas.solid(spot.place(ray), paint, 0.05, named=True, rim=0.05)
    disc = spot.place(ellipse(0, 0, r, r, count=48))
    canvas.solid(disc, paint, 0.12, named=True, rim=0.12)
    canvas.lines([disc], paint.line(), 1.0, 0.35, closed=True, named=True)


def draw_moon(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A full moon or a crescent, centred."""
    canvas.glow(spot.x, spot.y, spot.size * 1.3, spot.size * 1.3, paint.paler(0.3), 0.35)
    if chance.yes(0.5):
        t = np.linspace(math.pi / 2, math.pi * 1.5, 20)
        outer = np.stack([0.4 * np.cos(t), 0.4 * np.sin(t)], 1)
        inner = np.stack([0.16 * np.cos(t[::-1]), 0.4 * np.sin(t[::-1])], 1)
        canvas.solid(spot.place(np.concatenate([outer, inner])), paint.paler(0.5), 0.1, rim=0.08)
        return
    canvas.solid(
        spot.place(ellipse(0, 0, 0.4, 0.4, count=40)),
        paint.paler(0.5),
        0.1,
        rim=0.1,
        texture=some_texture(chance, ("cloudy",), 0.05, 0.2, 0.3),
    )


def draw_mountain(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A mountain, the light on one side of its ridge, some with snow."""
    s = chance.spread(12)
    top = np.array([0.12 * s[0], -1.0])
    left = [(-1.15, 0.1), (-0.75 + 0.1 * s[1], -0.35 + 0.1 * s[2]), (-0.35 + 0.08 * s[3], -0.68 + 0.08 * s[4])]
    right = [(0.38 + 0.08 * s[5], -0.62 + 0.08 * s[6]), (0.75 + 0.1 * s[7], -0.32 + 0.1 * s[8]), (1.15, 0.1)]
    outline = spot.place([*left, top, *right])
    texture = some_texture(
        chance,
        ("bark", "marble", "cells", "cloudy", "leaves"),
        0.05,
        0.35,
        chance.between(0.6, 1.4),
        chance.between(0, 1),
        0.8,
    )
    canvas.solid(outline, paint.darker(0.82), 0.12, named=True, texture=texture, rim=0.08, base=1.0)
    clip = Clip([outline])
    ridge = [top, (0.05 + 0.1 * s[9], -0.7), (-0.06 + 0.1 * s[10], -0.4), (0.08 * s[11], 0.1)]
    shade = spot.place([*ridge, (1.15, 0.1), *right[::-1]])
    canvas.solid(shade, paint.darker(0.55), 0.08, named=True, texture=texture, clip=clip, rim=0.05)
    if chance.yes(0.6):
        depth = chance.between(0.2, 0.36)
        zigzag = [(x, -1.0 + depth * (1.0 if k % 2 else 0.62)) for k, x in enumerate(np.linspace(-0.6, 0.6, 9))]
        canvas.solid(
            spot.place([(-0.6, -1.2), *zigzag, (0.6, -1.2)]),
            np.array([244, 247, 252], np.float32),
            0.08,
            clip=clip,
            rim=0.05,
        )


def draw_weed(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """Water weed: wavering ribbons."""
    for _ in range(chance.whole(2, 5)):
        x, tall, phase = 0.25 * chance.between(-1, 1), chance.between(0.5, 1.0), chance.between(0, 6)
        y = np.linspace(0, -tall, 14)
        line = np.stack([x + 0.06 * np.sin(phase - y * 9), y], 1)
        canvas.solid(spot.place(ribbon(line, np.linspace(0.07, 0.015, 14))), paint.darker(0.75), 0.25)


def draw_cat(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A sitting cat seen from the front or the side, or a cat's face filling its space."""
    angle = chance.between(-0.4, 0.4)
    texture = some_texture(chance, ("fur", "fur", "stripes", "bark"), 0.05, 0.5, max(spot.size / 260, 0.3), angle)
    if look == "face":
        _cat_face(canvas, chance, spot.at(0, -0.46, 1.0), paint, texture, 0.42)
        return
    if look == "profile":
        body = [
            spot.place(
                smooth(
                    [(-0.3, -0.02), (-0.36, -0.22), (-0.2, -0.5), (0.05, -0.66), (0.2, -0.6), (0.24, -0.3), (0.26, 0.0)]
                )
            )
        ]
        tail = smooth([(-0.25, -0.06), (-0.5, -0.08), (-0.6, -0.28), (-0.52, -0.45)], 6, closed=False)
        head = (0.18, -0.76)
    else:
        body = [
            spot.place(
                smooth(
                    [
                        (-0.3, -0.02),
                        (-0.32, -0.2),
                        (-0.17, -0.56),
                        (0, -0.62),
                        (0.17, -0.56),
                        (0.32, -0.2),
                        (0.3, -0.02),
                        (0, 0.0),
                    ]
                )
            )
        ]
        tail = smooth([(0.22, -0.05), (0.42, -0.06), (0.5, -0.2), (0.42, -0.36)], 6, closed=False)
        head = (0.0, -0.74)
    canvas.solid(
        spot.place(ribbon(tail, np.linspace(0.09, 0.06, len(tail)))),
        paint.darker(0.88),
        0.3,
        named=True,
        texture=texture,
    )
    canvas.solid(body, paint, 0.36, named=True, texture=texture, rim=0.28, blend=1.0)
    line = paint.line()
    legs = (
        [[(-0.06, -0.34), (-0.07, -0.02)], [(0.06, -0.34), (0.07, -0.02)]]
        if look != "profile"
        else [[(0.12, -0.36), (0.1, -0.02)], [(-0.3, -0.1), (-0.1, -0.26)]]
    )
    if chance.yes(0.4):
        canvas.solid(spot.place(ellipse(head[0] * 0.9, -0.45, 0.11, 0.15)), WHITE * 0.96, 0.15, clip=Clip(body, 1.0))
    canvas.lines([spot.place(leg) for leg in legs], line, 1.5, 0.8, named=True)
    for x in (-0.1, 0.1) if look != "profile" else (0.18,):
        canvas.solid(spot.place(ellipse(x, -0.02, 0.08, 0.04)), paint.paler(0.12), 0.25, named=True)
    _cat_face(canvas, chance, spot.at(head[0], head[1], 0.46), paint, texture, 0.42)


def _cat_face(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, texture: Optional[Texture], r: float) -> None:
    for side in (-1, 1):
        ear = spot.place([(side * r * 1.0, -r * 0.2), (side * r * 0.92, -r * 1.45), (side * r * 0.2, -r * 0.85)])
        canvas.solid(ear, paint.darker(0.9), 0.25, named=True, texture=texture)
        canvas.lines([ear], paint.line(), 1.2, 0.6, closed=True, named=True)
        inner = spot.place([(side * r * 0.85, -r * 0.55), (side * r * 0.83, -r * 1.18), (side * r * 0.42, -r * 0.8)])
        canvas.solid(inner, np.array([226, 160, 150], np.float32), 0.1)
    head = spot.place(
        smooth(
            [
                (0, -r * 0.95),
                (r * 0.75, -r * 0.75),
                (r * 1.12, 0),
                (r * 0.7, r * 0.72),
                (0, r * 0.9),
                (-r * 0.7, r * 0.72),
                (-r * 1.12, 0),
                (-r * 0.75, -r * 0.75),
            ]
        )
    )
    canvas.solid(head, paint, 0.32, named=True, texture=texture, rim=0.3)
    line = paint.line()
    canvas.lines([head], line, 1.2, 0.6, closed=True, named=True)
    if chance.yes(0.5):
        marks = [spot.place([(x * r, -r * 0.85), (x * r * 0.7, -r * 0.5)]) for x in (-0.3, 0.0, 0.3)]
        canvas.lines(marks, line, max(spot.size * 0.012, 1.0), 0.8, named=True)
    for side in (-1, 1):
        canvas.solid(spot.place(ellipse(side * r * 0.2, r * 0.42, r * 0.3, r * 0.24)), WHITE * 0.95, 0.15, rim=0.15)
    iris = chance.pick(
        (np.array([190, 200, 70]), np.array([110, 180, 110]), np.array([230, 180, 60]), np.array([120, 180, 220]))
    )
    slit = chance.pick((0.3, 0.55, 0.8))
    for side in (-1, 1):
        x, y = side * r * 0.45, -r * 0.12
        eye = spot.place(smooth([(x - r * 0.27, y), (x, y - r * 0.22), (x + r * 0.27, y), (x, y + r * 0.2)], 5))
        canvas.flat(eye, DARK)
        canvas.solid(spot.place(ellipse(x, y, r * 0.19, r * 0.18)), iris.astype(np.float32), 0.2, rim=0.3)
        canvas.flat(spot.place(ellipse(x, y, r * 0.12 * slit, r * 0.16)), DARK)
        canvas.flat(spot.place(ellipse(x + r * 0.06, y - r * 0.07, r * 0.045, r * 0.045, count=10)), WHITE)
    canvas.solid(
        spot.place([(-r * 0.12, r * 0.22), (r * 0.12, r * 0.22), (0, r * 0.36)]),
        np.array([205, 110, 110], np.float32),
        0.15,
    )
    mouth = [
        spot.place(smooth([(0, r * 0.36), (side * r * 0.08, r * 0.5), (side * r * 0.24, r * 0.5)], 4, closed=False))
        for side in (-1, 1)
    ]
    canvas.lines(mouth, DARK, 1.3, 0.8)
    whiskers = [
        spot.place([(side * r * 0.35, r * (0.38 + 0.04 * k)), (side * r * 1.3, r * (0.2 + 0.2 * k))])
        for side in (-1, 1)
        for k in range(3)
    ]
    canvas.lines(whiskers, WHITE if canvas.dark else DARK + 40, 1.0, 0.7)
