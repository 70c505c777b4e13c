"""Houses, boats, cups, rockets, people, balls and plain shapes.

Local units: 1 high, the foot at the origin, y down.
"""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Tuple

import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Clip, Spot, ellipse, ribbon, smooth
from tools.tiny.objects_nature import DARK, WHITE, some_texture
from tools.tiny.palette import Paint
from tools.tiny.textures import Texture

_ROOFS = (
    np.array([124, 72, 56], np.float32),
    np.array([92, 88, 92], np.float32),
    np.array([150, 116, 84], np.float32),
    np.array([66, 60, 66], np.float32),
    np.array([196, 190, 184], np.float32),
)
_GLASS = np.array([150, 186, 206], np.float32)
_WOOD = np.array([126, 88, 58], np.float32)
_SKINS = tuple(np.array(rgb, np.float32) for rgb in ((238, 202, 176), (214, 166, 132), (166, 116, 84), (112, 76, 56)))
_TROUSERS = tuple(np.array(rgb, np.float32) for rgb in ((58, 66, 92), (60, 56, 56), (150, 132, 108)))
_HAIRS = tuple(np.array(rgb, np.float32) for rgb in ((44, 34, 30), (104, 70, 44), (190, 150, 84), (150, 144, 140)))


def _box(x0: float, y0: float, x1: float, y1: float) -> List[Tuple[float, float]]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def draw_house(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A house with a gabled front, or seen along its roof; the walls bear the paint."""
    half = chance.between(0.36, 0.55)
    eaves = -chance.between(0.52, 0.66)
    roof = chance.pick(_ROOFS)
    texture = some_texture(
        chance, ("bricks", "planks", "speckle", "weave"), 0.04, 0.3, max(spot.size / 300, 0.3), 0.0, 0.6
    )
    tiles = some_texture(
        chance, ("scales", "bricks", "stripes", "straw"), 0.05, 0.4, max(spot.size / 350, 0.3), 0.0, 0.8
    )
    if chance.yes(0.6):
        x = half * chance.between(0.3, 0.6)
        canvas.solid(spot.place(_box(x, -1.0, x + 0.1, -0.7)), roof * 0.8, 0.2, texture=texture)
    if look == "gable":
        canvas.solid(
            spot.place([(-half, 0), (-half, eaves), (0, -0.95), (half, eaves), (half, 0)]),
            paint,
            0.08,
            named=True,
            texture=texture,
            rim=0.08,
        )
        for side, shade in ((-1, 1.0), (1, 0.8)):
            slope = [(0, -1.0), (side * (half + 0.08), eaves + 0.06), (side * (half + 0.08), eaves + 0.13), (0, -0.92)]
            canvas.solid(spot.place(slope), roof * shade, 0.1)
    else:
        canvas.solid(spot.place(_box(-half, eaves, half, 0)), paint, 0.08, named=True, texture=texture, rim=0.08)
        side = [(half, eaves), (half + 0.2, eaves - 0.02), (half + 0.2, -0.05), (half, 0)]
        canvas.solid(spot.place(side), paint.darker(0.7), 0.05, named=True, texture=texture)
        canvas.solid(
            spot.place([(half - 0.06, -0.92), (half + 0.1, -0.92), (half + 0.25, eaves + 0.02), (half, eaves + 0.02)]),
            roof * 0.7,
            0.05,
        )
        canvas.solid(
            spot.place(
                [(-half + 0.06, -0.94), (half - 0.04, -0.94), (half + 0.06, eaves + 0.04), (-half - 0.06, eaves + 0.04)]
            ),
            roof,
            0.1,
            texture=tiles,
        )
    _openings(canvas, chance, spot, half, eaves)


def _openings(canvas: Canvas, chance: Chance, spot: Spot, half: float, eaves: float) -> None:
    door = chance.pick((_WOOD, np.array([90, 60, 44], np.float32), WHITE * 0.9, np.array([70, 80, 90], np.float32)))
    x = half * chance.pick((-0.5, 0.0, 0.45))
    canvas.solid(spot.place(_box(x - 0.075, -0.3, x + 0.075, 0)), door, 0.1)
    canvas.flat(spot.place(ellipse(x + 0.045, -0.14, 0.012, 0.012, count=8)), np.array([230, 200, 110], np.float32))
    glass = np.array([250, 226, 140], np.float32) if canvas.dark else _GLASS * chance.between(0.5, 1.1)
    for wx in (-0.62, 0.0, 0.62):
        cx = wx * half
        if abs(cx - x) < 0.16:
            continue
        y = eaves * 0.62
        pane = _box(cx - 0.075, y - 0.08, cx + 0.075, y + 0.08)
        canvas.flat(spot.place(_box(cx - 0.092, y - 0.097, cx + 0.092, y + 0.097)), WHITE * 0.95)
        canvas.solid(spot.place(pane), glass, 0.15)
        canvas.lines(
            [spot.place([(cx, y - 0.08), (cx, y + 0.08)]), spot.place([(cx - 0.075, y), (cx + 0.075, y)])],
            WHITE,
            max(spot.size * 0.01, 1.0),
        )


def draw_boat(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A boat on the water line; the hull bears the paint, or in a small one hull and cabin."""
    deck, half = (-0.22, 0.46) if look == "sail" else (-0.42, 0.85)
    if look == "sail":
        mast = _box(-0.02, -1.0, 0.012, deck)
        canvas.solid(spot.place(mast), _WOOD, 0.2)
        cloth = chance.pick((WHITE, np.array([236, 226, 204], np.float32), np.array([215, 222, 228], np.float32)))
        main = smooth([(0.03, -0.97), (0.22, -0.6), (0.4, -0.3), (0.03, -0.28)], 4)
        jib = [(-0.035, -0.92), (-0.12, -0.6), (-0.36, -0.28), (-0.035, -0.3)]
        for sail in (main, jib):
            shape = spot.place(sail)
            canvas.solid(shape, cloth, 0.2, rim=0.2)
            canvas.lines([shape], cloth * 0.5, 1.0, 0.6, closed=True)
    else:
        cabin = spot.place(_box(-0.36, -0.78, 0.3, deck + 0.05))
        canvas.solid(cabin, WHITE * chance.between(0.8, 1.0), 0.1)
        canvas.solid(spot.place(_box(-0.42, -0.84, 0.36, -0.76)), paint.darker(0.8), 0.1, named=True)
        canvas.solid(spot.place(_box(-0.2, -1.0, -0.06, -0.84)), chance.pick(_ROOFS), 0.25)
        for x in (-0.24, -0.02, 0.2):
            canvas.flat(spot.place(_box(x - 0.07, -0.69, x + 0.06, -0.55)), _GLASS * 0.7)
    hull = spot.place(
        smooth(
            [
                (half * 1.12, deck - 0.05),
                (half * 0.86, 0.0),
                (half * 0.3, 0.03),
                (-half * 0.72, 0.03),
                (-half, -0.02),
                (-half * 1.02, deck),
                (-half * 0.2, deck + 0.04),
                (half * 0.5, deck + 0.025),
            ],
            4,
        )
    )
    hull[:, 1] = np.minimum(hull[:, 1], spot.y)
    texture = some_texture(chance, ("planks", "wood"), 0.04, 0.25, 0.6, math.pi / 2, 0.5)
    canvas.solid(hull, paint, 0.3, named=True, texture=texture, rim=0.15)
    strip = ribbon([(-half * 1.0, deck * 0.72 + 0.03), (0, deck * 0.62 + 0.03), (half * 1.02, deck * 0.75)], 0.03)
    canvas.solid(spot.place(strip), WHITE * 0.95, 0.05, clip=Clip([hull]))
    canvas.lines([hull], paint.line(), 1.3, 0.7, closed=True, named=True)


def draw_cup(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A cup with a handle, some on a saucer; cup and saucer bear the paint."""
    top, low = chance.between(0.44, 0.54), chance.between(0.28, 0.42)
    squash = chance.between(0.16, 0.34)
    foot = -0.04
    if chance.yes(0.55):
        plate = spot.place(ellipse(0, foot - 0.01, 0.78, 0.78 * squash, count=40))
        canvas.solid(plate, paint.darker(0.9), 0.2, named=True, rim=0.1)
        canvas.lines([plate], paint.line(), 1.2, 0.7, closed=True, named=True)
        inner = spot.place(ellipse(0, foot - 0.02, 0.5, 0.5 * squash, count=36))
        canvas.solid(inner, paint.darker(0.78), 0.15, named=True, rim=0.1)
    handle = spot.place(
        ribbon(
            smooth([(top * 0.9, -0.72), (top + 0.2, -0.74), (top + 0.24, -0.48), (low + 0.06, -0.28)], 6, closed=False),
            0.07,
        )
    )
    canvas.solid(handle, paint.darker(0.85), 0.3, named=True)
    canvas.lines([handle], paint.line(), 1.1, 0.6, closed=True, named=True)
    t = np.linspace(0, math.pi, 14)
    rim_y = -0.9
    bottom = np.stack([low * np.cos(t), foot + low * squash * 0.8 * np.sin(t) - 0.02], 1)
    side = [(-top, rim_y), (-(top * 0.6 + low * 0.4), -0.45)]
    other = [(top * 0.6 + low * 0.4, -0.45), (top, rim_y)]
    body = spot.place(np.concatenate([other[::-1], bottom, side[::-1]]))
    texture = some_texture(
        chance, ("stripes", "spots", "speckle", "scales"), 0.04, 0.3, 0.6, chance.between(0, 2), 0.35
    )
    canvas.solid(body, paint, 0.36, named=True, texture=texture, rim=0.2)
    mouth = ellipse(0, rim_y, top, top * squash, count=40)
    canvas.solid(spot.place(mouth), paint.paler(0.35), 0.1, named=True, rim=0.05)
    canvas.lines([spot.place(mouth), body], paint.line(), 1.2, 0.6, closed=True, named=True)
    drink = chance.pick(
        (np.array([92, 56, 34]), np.array([190, 120, 50]), np.array([240, 236, 226]), np.array([60, 38, 28]))
    )
    inside = spot.place(ellipse(0, rim_y, top * 0.88, top * 0.86 * squash, count=40))
    canvas.solid(inside, paint.darker(0.62), 0.1, named=True)
    canvas.solid(
        spot.place(ellipse(0, rim_y + 0.02, top * 0.8, top * 0.72 * squash, count=40)),
        drink.astype(np.float32),
        0.15,
        rim=0.15,
    )
    if chance.yes(0.35):
        for x in (-0.15, 0.1):
            steam = smooth([(x, -1.0), (x + 0.05, -1.12), (x - 0.03, -1.24), (x + 0.05, -1.38)], 5, closed=False)
            canvas.flat(spot.place(ribbon(steam, np.linspace(0.05, 0.01, len(steam)))), WHITE, 0.35)


def draw_rocket(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A rocket on its flame or on the ground; the body bears the paint."""
    half = chance.between(0.1, 0.15)
    trim = chance.pick((WHITE * 0.95, np.array([180, 184, 190], np.float32), np.array([80, 84, 92], np.float32)))
    flame = chance.yes(0.7)
    low = -0.26 if flame else -0.08
    if flame:
        for scale, colour in ((1.0, (240, 120, 40)), (0.72, (250, 190, 60)), (0.42, (255, 240, 180))):
            shape = smooth(
                [
                    (-half * 0.8 * scale, low),
                    (-half * 0.9 * scale, low + 0.1),
                    (0, low + 0.3 * scale),
                    (half * 0.9 * scale, low + 0.1),
                    (half * 0.8 * scale, low),
                ],
                4,
            )
            canvas.solid(spot.place(shape), np.array(colour, np.float32), 0.05, rim=0.0)
    for side in (-1, 1):
        fin = spot.place(
            [
                (side * half * 0.8, low - 0.22),
                (side * half * 2.1, low + 0.02),
                (side * half * 1.9, low + 0.09),
                (side * half * 0.7, low),
            ]
        )
        canvas.solid(fin, trim * 0.85, 0.2)
        canvas.lines([fin], trim * 0.4, 1.0, 0.7, closed=True)
    body = spot.place(
        smooth(
            [
                (0, -1.0),
                (half * 0.7, -0.84),
                (half, -0.62),
                (half, low - 0.1),
                (half * 0.75, low),
                (-half * 0.75, low),
                (-half, low - 0.1),
                (-half, -0.62),
                (-half * 0.7, -0.84),
            ],
            5,
        )
    )
    canvas.solid(body, paint, 0.4, named=True, rim=0.2)
    clip = Clip([body])
    canvas.solid(spot.place(_box(-0.3, -1.05, 0.3, -0.82)), trim, 0.2, clip=clip)
    canvas.solid(spot.place(_box(-0.3, low - 0.07, 0.3, low + 0.02)), trim * 0.8, 0.2, clip=clip)
    bands = [spot.place([(-half, y), (half, y)]) for y in (-0.8, low - 0.08, low - 0.2)]
    canvas.lines(bands, paint.line(), 1.1, 0.7, clip=clip, named=True)
    canvas.lines([body], paint.line(), 1.2, 0.7, closed=True, named=True)
    for y in (-0.66, -0.52)[: chance.whole(1, 2)]:
        canvas.solid(spot.place(ellipse(0, y, half * 0.5, half * 0.5)), trim * 0.6, 0.2)
        canvas.solid(spot.place(ellipse(0, y, half * 0.36, half * 0.36)), _GLASS, 0.3)


def draw_person(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A standing person, or head and shoulders; the coat bears the paint."""
    skin, hair = chance.pick(_SKINS), chance.pick(_HAIRS)
    texture = some_texture(chance, ("weave", "stripes", "bark", "fur"), 0.03, 0.25, 0.7, chance.between(0, 2), 0.4)
    if look == "bust":
        _shoulders(canvas, spot, paint, skin, texture)
        _head(canvas, chance, spot.at(0, -0.7), skin, hair, 0.2)
        return
    legs = chance.pick(_TROUSERS)
    stride = chance.between(0.02, 0.12)
    skirt = chance.yes(0.35)
    for side in (-1, 1):
        foot = side * (0.04 + stride)
        leg = ribbon([(side * 0.045, -0.5), (side * (0.045 + stride * 0.4), -0.25), (foot, -0.02)], [0.11, 0.09, 0.065])
        canvas.solid(spot.place(leg), skin * 0.9 if skirt else legs, 0.3)
        canvas.solid(spot.place(ellipse(foot + 0.03, -0.015, 0.06, 0.025)), DARK + 25, 0.2)
    swing = chance.between(0.02, 0.14)
    for side in (-1, 1):
        elbow, hand = (side * (0.17 + swing * 0.4), -0.6), (side * (0.15 + swing), -0.45)
        arm = spot.place(ribbon(smooth([(side * 0.12, -0.76), elbow, hand], 4, closed=False), 0.065))
        canvas.solid(spot.place(ellipse(hand[0], -0.435, 0.028, 0.032)), skin, 0.2)
        canvas.solid(arm, paint.darker(0.85), 0.3, named=True)
        canvas.lines([arm], paint.line(), 1.0, 0.6, closed=True, named=True)
    hem, flare = (-0.3, 0.2) if skirt else (-0.44, 0.115)
    half = [(0.06, -0.82), (0.14, -0.77), (0.11, -0.6), (flare, hem)]
    coat = spot.place(smooth([(-x, y) for x, y in half] + half[::-1], 5))
    canvas.solid(spot.place(ribbon([(0, -0.88), (0, -0.78)], 0.06)), skin * 0.85, 0.1)
    canvas.solid(coat, paint, 0.34, named=True, texture=texture, rim=0.2)
    canvas.lines([coat], paint.line(), 1.1, 0.6, closed=True, named=True)
    canvas.lines([spot.place([(-0.11, -0.58), (0.11, -0.58)])], paint.line(), 1.6, 0.8, named=True)
    _head(canvas, chance, spot.at(0, -0.915), skin, hair, 0.08)


def _shoulders(canvas: Canvas, spot: Spot, paint: Paint, skin: np.ndarray, texture: Optional[Texture]) -> None:
    """Neck and coat of a portrait."""
    half = [(0.62, 0.05), (0.56, -0.22), (0.22, -0.4)]
    coat = spot.place(smooth([(-x, y) for x, y in half] + half[::-1], 5))
    canvas.solid(spot.place(ribbon([(0, -0.55), (0, -0.33)], 0.2)), skin * 0.85, 0.2)
    canvas.solid(coat, paint, 0.34, named=True, texture=texture)
    canvas.solid(spot.place([(-0.13, -0.41), (0.13, -0.41), (0, -0.22)]), skin * 0.92, 0.1)
    seams = [
        spot.place([(-0.14, -0.41), (0.0, -0.2), (0.0, 0.05)]),
        spot.place([(0.14, -0.41), (0.0, -0.2)]),
        spot.place([(-0.36, 0.05), (-0.34, -0.12)]),
        spot.place([(0.36, 0.05), (0.34, -0.12)]),
    ]
    canvas.lines([*seams, coat], paint.line(), 1.4, 0.7, named=True)


def _head(canvas: Canvas, chance: Chance, spot: Spot, skin: np.ndarray, hair: np.ndarray, r: float) -> None:
    long = chance.yes(0.45)
    texture = some_texture(chance, ("fur", "bark"), 0.1, 0.5, max(spot.size * r / 60, 0.3))
    back = (
        ellipse(0, -0.1 * r, 1.02 * r, 1.15 * r)
        if not long
        else smooth(
            [(0, -1.2 * r), (1.05 * r, -0.5 * r), (1.1 * r, 1.1 * r), (-1.1 * r, 1.1 * r), (-1.05 * r, -0.5 * r)], 5
        )
    )
    canvas.solid(spot.place(back), hair * 0.8, 0.2, texture=texture)
    face = spot.place(
        smooth(
            [
                (0, -1.0 * r),
                (0.78 * r, -0.5 * r),
                (0.72 * r, 0.45 * r),
                (0, 1.12 * r),
                (-0.72 * r, 0.45 * r),
                (-0.78 * r, -0.5 * r),
            ],
            5,
        )
    )
    canvas.solid(face, skin, 0.22, rim=0.2)
    fringe = smooth(
        [
            (-0.95 * r, 0.05 * r),
            (-0.85 * r, -0.85 * r),
            (0, -1.25 * r),
            (0.85 * r, -0.85 * r),
            (0.95 * r, 0.05 * r),
            (0.6 * r, -0.5 * r),
            (-0.2 * r, -0.62 * r),
        ],
        5,
    )
    canvas.solid(spot.place(fringe), hair, 0.3, texture=texture)
    for side in (-1, 1):
        if spot.size * r > 14:
            canvas.flat(spot.place(ellipse(side * 0.32 * r, -0.02 * r, 0.15 * r, 0.08 * r)), WHITE)
            canvas.lines(
                [spot.place([(side * 0.15 * r, -0.24 * r), (side * 0.5 * r, -0.26 * r)])], hair * 0.7, 1.4, 0.8
            )
        canvas.flat(spot.place(ellipse(side * 0.32 * r, -0.02 * r, 0.075 * r, 0.085 * r, count=12)), DARK)
    canvas.lines([spot.place([(0, 0.0), (0.1 * r, 0.3 * r), (-0.02 * r, 0.34 * r)])], skin * 0.6, 1.0, 0.8)
    canvas.solid(
        spot.place(smooth([(-0.28 * r, 0.6 * r), (0, 0.56 * r), (0.28 * r, 0.6 * r), (0, 0.74 * r)], 4)),
        np.array([176, 84, 80], np.float32),
        0.1,
    )


def draw_ball(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str) -> None:
    """A ball on the ground."""
    canvas.solid(spot.place(ellipse(0, -0.3, 0.3, 0.3)), paint, 0.4, named=True, rim=0.3)


def _regular(count: int, inner: float = 1.0) -> List[Tuple[float, float]]:
    steps = count * 2 if inner < 1 else count
    return [
        (
            0.5 * (inner if inner < 1 and k % 2 else 1.0) * math.sin(2 * math.pi * k / steps),
            -0.5 - 0.5 * (inner if inner < 1 and k % 2 else 1.0) * math.cos(2 * math.pi * k / steps),
        )
        for k in range(steps)
    ]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([0.53 * np.sin(t) ** 3, -0.57 - y / 30], 1)


_OUTLINES: Dict[str, np.ndarray] = {
    "circle": ellipse(0, -0.5, 0.5, 0.5, count=60),
    "square": np.array(_box(-0.48, -0.98, 0.48, -0.02)),
    "triangle": np.array([(0, -1.0), (0.58, -0.02), (-0.58, -0.02)]),
    "star": np.array(_regular(5, 0.42)),
    "heart": _heart(),
    "ring": ellipse(0, -0.5, 0.5, 0.5, count=60),
    "diamond": np.array([(0, -1.0), (0.38, -0.5), (0, 0.0), (-0.38, -0.5)]),
    "cross": np.array(
        [
            (-0.16, -1),
            (0.16, -1),
            (0.16, -0.66),
            (0.5, -0.66),
            (0.5, -0.34),
            (0.16, -0.34),
            (0.16, 0),
            (-0.16, 0),
            (-0.16, -0.34),
            (-0.5, -0.34),
            (-0.5, -0.66),
            (-0.16, -0.66),
        ]
    ),
}


def draw_shape(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, kind: str) -> None:
    """A plain shape, flat or rounded, some textured."""
    middle = np.array([0.0, -0.5])
    angle = 0.0 if chance.yes(0.5) else chance.between(-0.5, 0.5)
    outline = _OUTLINES[kind] - middle
    cos, sin = math.cos(angle), math.sin(angle)
    turned = outline @ np.array([[cos, sin], [-sin, cos]])
    shape = spot.place(turned + middle)
    depth = chance.pick((0.06, 0.2, 0.4))
    texture = some_texture(
        chance,
        ("speckle", "wood", "weave", "marble", "stripes", "spots", "cells", "feathers", "bricks", "leaves"),
        0.03,
        0.4,
        chance.between(0.5, 1.3),
        chance.between(0, 3),
        0.5,
    )
    if kind == "ring":
        inner = chance.between(0.5, 0.75)
        hole = spot.place((turned * inner + middle)[::-1])
        canvas.ring(shape, hole, paint, depth)
        return
    canvas.solid(shape, paint, depth, named=True, texture=texture, rim=0.12)
    if chance.yes(0.3):
        edge = spot.place(turned * 0.8 + middle)
        canvas.solid(edge, paint.paler(0.3) if chance.yes(0.5) else paint.darker(0.7), depth, named=True, rim=0.1)
    canvas.lines([shape], paint.line(), 1.3, chance.between(0.2, 0.9), closed=True, named=True)
