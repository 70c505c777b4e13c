"""Which function draws which kind of object, where each stands, and what it stands on."""

from __future__ import annotations

import math
from typing import Callable, Dict, Tuple

import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Spot, ellipse, ribbon, smooth
from tools.tiny.objects_birds import draw_bird
from tools.tiny.objects_nature import (
    draw_cat,
    draw_fish,
    draw_flower,
    draw_moon,
    draw_mountain,
    draw_sun,
    draw_tree,
    draw_weed,
    some_texture,
)
from tools.tiny.objects_things import (
    draw_ball,
    draw_boat,
    draw_cup,
    draw_house,
    draw_person,
    draw_rocket,
    draw_shape,
)
from tools.tiny.palette import Paint
from tools.tiny.plan import SHAPES, Backdrop, Thing

_DRAWERS: Dict[str, Callable[[Canvas, Chance, Spot, Paint, str], None]] = {
    "tree": draw_tree,
    "house": draw_house,
    "flower": draw_flower,
    "fish": draw_fish,
    "boat": draw_boat,
    "sun": draw_sun,
    "moon": draw_moon,
    "cat": draw_cat,
    "cup": draw_cup,
    "rocket": draw_rocket,
    "person": draw_person,
    "mountain": draw_mountain,
    "weed": draw_weed,
    "ball": draw_ball,
}
# Objects whose origin is their middle.
_CENTRED = ("fish", "sun", "moon")
# Width of each kind in units of its height, to keep objects in the picture.
_WIDTHS = {"boat": 1.0, "cup": 1.4, "house": 1.3, "mountain": 0.4, "fish": 1.5, "bird": 1.3, "cat": 0.9}

# Reach of each standing bird above and below its feet and to both sides together, in its own units.
_BIRD_REACH: Dict[str, Tuple[float, float, float]] = {
    "song": (1.13, 0.13, 1.38),
    "plump": (1.02, 0.03, 1.22),
    "slim": (0.90, 0.22, 1.59),
    "parrot": (1.14, 0.68, 1.25),
    "prey": (1.06, 0.31, 0.98),
    "gull": (0.98, 0.03, 1.48),
    "heron": (1.02, 0.03, 0.96),
    "hen": (1.14, 0.03, 1.39),
    "duck": (0.74, 0.0, 1.65),
    "swan": (1.16, 0.0, 1.69),
    "owl": (1.08, 0.24, 0.66),
    "back": (0.99, 0.24, 0.66),
}


def draw_object(
    canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, thing: Thing, faults: Tuple[str, ...] = ()
) -> None:
    """Draw one planned object at its spot."""
    if thing.kind == "bird":
        draw_bird(canvas, chance, spot, paint, thing.look, faults, thing.detail)
    elif thing.kind in SHAPES:
        draw_shape(canvas, chance, spot, paint, thing.kind)
    else:
        _DRAWERS[thing.kind](canvas, chance, spot, paint, thing.look)


def main_spot(canvas: Canvas, chance: Chance, thing: Thing, backdrop: Backdrop) -> Spot:
    """Where the main object goes, in pixels."""
    height, width = canvas.height, canvas.width
    size = thing.size * height
    limit = 0.96 * width / _WIDTHS.get(thing.kind, 1.0)
    size = min(size, limit)
    if thing.pose == "fly":
        size = min(max(size * 1.35, 0.5 * height), 0.95 * width)
        tall = 0.75 * size if thing.look == "side" else 0.55 * size
        room = max(height - tall, 0.12 * height) / 2
        angle = chance.between(-0.45, 0.35) if thing.look == "side" else chance.between(-0.6, 0.6)
        return Spot(thing.x * width, height / 2 + room * chance.between(-0.7, 0.7), size, thing.facing, angle)
    if thing.kind in _CENTRED:
        ground = backdrop.horizon * height if backdrop.ground else height
        room = max(ground - size, 0.1 * height) / 2
        return Spot(
            thing.x * width, max(ground / 2, size * 0.55) + room * chance.between(-0.5, 0.5), size, thing.facing
        )
    if thing.kind == "mountain":
        foot = backdrop.horizon * height + 4 if backdrop.ground else height + 6
        return Spot(thing.x * width, foot, min(size, foot * 0.92), thing.facing)
    if thing.kind == "bird":
        return _bird_spot(canvas, chance, thing, backdrop)
    if thing.look in ("bust", "face"):
        return Spot(thing.x * width, height + 2, max(size, 0.6 * height), thing.facing)
    top = size + 0.03 * height
    if backdrop.ground:
        low = max(backdrop.horizon * height + 0.06 * height, min(top, 0.9 * height))
        high = height * (0.96 if thing.kind != "boat" else 0.88)
        foot = low + max(high - low, 0.0) * thing.y
        return Spot(thing.x * width, min(foot, high), size, thing.facing)
    foot = size + max(height - size, 0.0) * (0.35 + 0.4 * thing.y)
    return Spot(thing.x * width, foot, size, thing.facing)


def _bird_spot(canvas: Canvas, chance: Chance, thing: Thing, backdrop: Backdrop) -> Spot:
    """Where a bird that stands or swims has its feet."""
    height, width = canvas.height, canvas.width
    above, below, wide = _BIRD_REACH[thing.look]
    below = below if thing.pose in ("branch", "ground") else 0.08
    size = min(thing.size * height / (above + below), 0.97 * width / wide)
    high, low = size * above + 0.02 * height, height * 0.97 - size * below
    if thing.pose == "branch" or not backdrop.ground:
        high, low = min(high, 0.9 * height), min(low, 0.93 * height)
        share = 0.3 + 0.4 * thing.y
    else:
        low = min(low, height * (0.86 if thing.pose == "swim" else 0.93))
        high = max(min(high, low), min(backdrop.horizon * height + 0.05 * height, low))
        share = thing.y
    return Spot(thing.x * width, high + max(low - high, 0.0) * share, size, thing.facing)


# Height of a lesser object against the picture's, and whether it stands on the ground (1), near the horizon (0), in
# the sky (-1) or anywhere (2).
_LESSER: Dict[str, Tuple[float, int]] = {
    "tree": (0.5, 0),
    "house": (0.32, 0),
    "sun": (0.3, -1),
    "moon": (0.24, -1),
    "bird": (0.24, -1),
    "mountain": (0.36, 0),
    "boat": (0.3, 0),
    "flower": (0.36, 1),
    "person": (0.42, 1),
    "cup": (0.26, 1),
    "ball": (0.3, 1),
    "fish": (0.24, 2),
    "weed": (0.5, 3),
}


def other_spot(canvas: Canvas, thing: Thing, backdrop: Backdrop) -> Spot:
    """Where a lesser object goes, in pixels."""
    height = canvas.height
    share, where = _LESSER.get(thing.kind, (0.22, 2))
    size = share * thing.size * height
    x = thing.x * canvas.width
    horizon = (backdrop.horizon if backdrop.ground else 1.0) * height
    if where == -1:
        return Spot(x, min(horizon * (0.14 + 0.2 * thing.y), height * 0.32), size, thing.facing)
    if where == 0:
        return Spot(x, horizon + (0.02 + 0.16 * thing.y) * (height - horizon) + 2, size, thing.facing)
    if where == 1:
        return Spot(x, horizon + (0.3 + 0.5 * thing.y) * (height - horizon), size, thing.facing)
    if where == 3:
        return Spot(x, height + 4, size, thing.facing)
    return Spot(x, height * (0.25 + 0.5 * thing.y), size, thing.facing)


def draw_support(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, kind: str) -> None:
    """What a bird sits on: a branch, a post down to the lower border, or a rock."""
    {"branch": _branch, "post": _post, "rock": _rock}[kind](canvas, chance, spot, paint)


def _branch(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    s = chance.spread(8)
    thick = max(min(spot.size * 0.075, 17.0), 6.0) * (1 + 0.25 * s[0])
    slope = 26 * s[1]
    left = np.array([-15.0, spot.y + thick * 0.4 - slope * (spot.x + 15) / canvas.width + 14 * s[2]])
    right = np.array(
        [canvas.width + 15.0, spot.y + thick * 0.4 + slope * (canvas.width - spot.x) / canvas.width + 14 * s[3]]
    )
    centre = np.array([spot.x, spot.y + thick * 0.42])
    ends = chance.pick(((True, True), (True, False), (False, True)))
    near = max(spot.size * 0.7, 60)
    first = left if ends[0] else centre + [-near, 12 * s[4]]
    last = right if ends[1] else centre + [near, 12 * s[5]]
    line = smooth(
        [first, (first + centre) / 2 + [0, 7 * s[6]], centre, (last + centre) / 2 + [0, 7 * s[7]], last],
        7,
        closed=False,
    )
    widths = np.linspace(thick * (1.25 if ends[0] else 0.35), thick * (0.8 if ends[1] else 0.3), len(line))
    texture = some_texture(chance, ("bark", "stripes", "wood"), 0.08, 0.45, 0.5, math.pi / 2 * chance.sign(), 0.85)
    twigs = []
    for _ in range(chance.whole(0, 3)):
        k = chance.whole(3, len(line) - 4)
        reach = np.array([chance.between(-60, 60), -chance.between(14, 60) * chance.sign()])
        twig = smooth([line[k], line[k] + reach * 0.5 + [6, 0], line[k] + reach], 4, closed=False)
        twigs.append((ribbon(twig, np.linspace(thick * 0.35, thick * 0.12, len(twig))), twig))
    for shape, _ in twigs:
        canvas.solid(shape, paint.darker(0.85), 0.25)
    canvas.solid(ribbon(line, widths), paint, 0.4, texture=texture, rim=0.25)
    if chance.yes(0.5):
        _twig_leaves(
            canvas,
            chance,
            [line[chance.whole(0, len(line) - 1)] for _ in range(chance.whole(1, 6))] + [t[-1] for _, t in twigs],
        )


def _twig_leaves(canvas: Canvas, chance: Chance, places: list) -> None:
    leaf = Paint(chance.between(80, 125), chance.between(0.4, 0.65), chance.between(0.4, 0.65))
    for place in places:
        angle, reach = chance.between(0, 2 * math.pi), chance.between(10, 24)
        d = np.array([math.cos(angle), math.sin(angle)])
        rib = np.stack([place, place + d * reach * 0.5, place + d * reach])
        shape = ribbon(
            smooth(rib, 4, closed=False), np.interp(np.linspace(0, 1, 9), [0, 0.45, 1], [1, reach * 0.45, 0.5])
        )
        canvas.solid(shape, leaf.darker(chance.between(0.75, 1.1)), 0.2)
        canvas.lines([rib], leaf.darker(0.5), 1.0, 0.6)


def _post(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    half = max(spot.size * 0.13, 12) * chance.between(0.8, 1.5)
    low = canvas.height + 8
    texture = some_texture(chance, ("wood", "bark", "planks"), 0.08, 0.4, 0.6, math.pi / 2, 0.85)
    side = np.array(
        [[spot.x - half, spot.y], [spot.x + half, spot.y], [spot.x + half * 1.04, low], [spot.x - half * 1.04, low]]
    )
    canvas.solid(side, paint, 0.4, texture=texture)
    top = ellipse(spot.x, spot.y, half, half * 0.3)
    canvas.solid(top, paint.paler(0.25), 0.1)
    canvas.lines([top], paint.line(), 1.0, 0.6, closed=True)
    if chance.yes(0.3):
        for y in (spot.y + 30, spot.y + 62):
            rail = np.array([[-5, y], [canvas.width + 5, y], [canvas.width + 5, y + 12], [-5, y + 12]], np.float64)
            canvas.solid(rail, paint.darker(0.9), 0.2, texture=texture)


def _rock(canvas: Canvas, chance: Chance, spot: Spot, paint: Paint) -> None:
    s = chance.spread(9)
    half = max(spot.size * 0.42, 40) * chance.between(0.9, 1.6)
    low = min(spot.y + half * chance.between(0.5, 1.2), canvas.height + 20.0)
    low = canvas.height + 20.0 if chance.yes(0.5) else low
    deep = low - spot.y
    outline = [
        (spot.x - half * 1.05, low),
        (spot.x - half * (0.9 + 0.1 * s[0]), spot.y + deep * (0.45 + 0.15 * s[1])),
        (spot.x - half * 0.5, spot.y + deep * (0.1 + 0.08 * s[2])),
        (spot.x, spot.y - 1),
        (spot.x + half * 0.5, spot.y + deep * (0.08 + 0.08 * s[3])),
        (spot.x + half * (0.95 + 0.1 * s[4]), spot.y + deep * (0.5 + 0.15 * s[5])),
        (spot.x + half * 1.1, low),
    ]
    texture = some_texture(
        chance,
        ("speckle", "cells", "marble", "cloudy", "bark"),
        0.05,
        0.4,
        chance.between(0.6, 1.2),
        chance.between(0, 3),
        0.85,
    )
    canvas.solid(np.array(outline), paint, 0.35, texture=texture, rim=0.2)
    cracks = [
        np.array(
            [
                [spot.x + half * 0.3 * s[6], spot.y + deep * 0.2],
                [spot.x + half * 0.2, spot.y + deep * 0.55],
                [spot.x + half * 0.35 * s[7], low],
            ]
        )
    ]
    canvas.lines(cracks, paint.line(), 1.2, 0.7)


def draw_shadow(canvas: Canvas, spot: Spot, thing: Thing) -> None:
    """The soft shadow of an object on its ground, away from the light."""
    wide = spot.size * _WIDTHS.get(thing.kind, 0.9) * 0.5
    away = -canvas.light[0] * spot.size * 0.22
    canvas.glow(
        spot.x + away, spot.y + 1, wide * 1.1, max(spot.size * 0.1, 5.0), np.array([20, 18, 26], np.float32), 0.5
    )
    canvas.glow(spot.x, spot.y + 1, wide * 0.6, max(spot.size * 0.05, 3.0), np.array([14, 12, 18], np.float32), 0.45)
