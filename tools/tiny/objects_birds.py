"""Birds: seen from the side perched, walking or swimming; facing the viewer; and in flight.

Local units: a standing bird is about 1 high, its feet at the origin, y down, looking to positive x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Dict, List, Sequence, Tuple

import numpy as np

from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Clip, Spot, ellipse, ribbon, smooth
from tools.tiny.palette import Paint
from tools.tiny.textures import Texture, lay

BEAKS: Dict[str, np.ndarray] = {
    "orange": np.array([238, 150, 40], np.float32),
    "yellow": np.array([240, 200, 60], np.float32),
    "black": np.array([60, 56, 60], np.float32),
    "grey": np.array([126, 120, 118], np.float32),
    "red": np.array([206, 60, 44], np.float32),
    "brown": np.array([150, 104, 70], np.float32),
}
_EYE = np.array([18, 16, 18], np.float32)
_WHITE = np.array([250, 250, 246], np.float32)


@dataclass(frozen=True)
class Build:
    """Proportions of a bird seen from the side.

    Attributes
    ----------
    tilt : radians of the body's axis above level
    length, depth : of the body; depth is half its thickness
    head : radius
    neck : length from the body's front to the head's centre
    neck_angle : radians above level of the neck
    legs : length below the body
    tail, tail_width : length and end width
    tail_lift : radians of the tail above the body's axis
    beak, beak_depth : length and thickness in head radii
    beak_form : "cone", "hook", "long" or "flat"
    """

    tilt: float
    length: float
    depth: float
    head: float
    neck: float
    neck_angle: float
    legs: float
    tail: float
    tail_width: float
    tail_lift: float
    beak: float
    beak_depth: float
    beak_form: str = "cone"


BUILDS: Dict[str, Build] = {
    "song": Build(0.62, 0.72, 0.215, 0.165, 0.13, 1.0, 0.17, 0.40, 0.13, -0.05, 0.85, 0.62),
    "plump": Build(0.5, 0.68, 0.29, 0.18, 0.10, 1.05, 0.14, 0.26, 0.11, 0.1, 0.6, 0.6),
    "slim": Build(0.55, 0.70, 0.15, 0.125, 0.14, 0.95, 0.2, 0.58, 0.1, 0.0, 1.2, 0.45),
    "parrot": Build(1.05, 0.72, 0.185, 0.18, 0.12, 1.25, 0.09, 0.62, 0.1, -0.05, 0.75, 1.1, "hook"),
    "prey": Build(1.1, 0.74, 0.2, 0.15, 0.12, 1.2, 0.13, 0.34, 0.17, -0.02, 0.75, 0.85, "hook"),
    "gull": Build(0.2, 0.80, 0.19, 0.145, 0.2, 1.0, 0.26, 0.25, 0.11, 0.02, 1.15, 0.5),
    "heron": Build(0.35, 0.42, 0.11, 0.062, 0.34, 1.25, 0.36, 0.12, 0.07, -0.1, 2.9, 0.7, "long"),
    "hen": Build(0.12, 0.68, 0.26, 0.12, 0.3, 1.1, 0.24, 0.34, 0.3, 0.85, 0.8, 0.7),
    "duck": Build(0.06, 0.98, 0.25, 0.15, 0.33, 1.25, 0.0, 0.2, 0.1, 0.45, 1.3, 0.62, "flat"),
    "swan": Build(0.06, 1.0, 0.27, 0.105, 0.66, 1.35, 0.0, 0.22, 0.09, 0.4, 1.3, 0.6, "flat"),
}


@dataclass(frozen=True)
class Coat:
    """Colours and patterns of one bird."""

    main: Paint
    wing: Paint
    patch: np.ndarray  # (3,) RGB of a belly, cheek or cap
    beak: np.ndarray
    legs: np.ndarray
    texture: float  # strength of the feathers' texture on the body
    patches: Tuple[str, ...]


def _coat(chance: Chance, paint: Paint) -> Coat:
    wing_shade = chance.pick((0.6, 0.75, 0.88, -0.22))
    wing = paint.paler(0.25) if wing_shade < 0 else paint.darker(wing_shade)
    patch = chance.pick((_WHITE * 0.96, np.array([236, 214, 178]), np.array([70, 64, 66]), np.array([225, 225, 230])))
    patches = tuple(
        name
        for name, share in (("belly", 0.4), ("cap", 0.12), ("cheek", 0.15), ("bars", 0.2), ("bib", 0.12))
        if chance.yes(share)
    )
    beak = chance.pick(list(BEAKS.values()), (4, 3, 3, 2, 2, 1))
    legs = chance.pick(list(BEAKS.values()), (3, 1, 3, 2, 3, 1))
    texture = chance.between(0.0, 0.16) if chance.yes(0.7) else chance.between(0.15, 0.4)
    return Coat(paint, wing, np.asarray(patch, np.float32), beak, legs, texture, patches)


def draw_bird(
    canvas: Canvas, chance: Chance, spot: Spot, paint: Paint, look: str, faults: Sequence[str] = (), beak: str = ""
) -> None:
    """Draw a bird of one of the looks of BUILDS, or "owl", "back", "side", "above" or "glide".

    `beak` is one of BEAKS; "" for any of them.
    """
    coat = _coat(chance, paint)
    if beak:
        coat = replace(coat, beak=BEAKS[beak])
    if look in ("owl", "back"):
        _facing(canvas, chance, spot, coat, look, faults)
    elif look in ("side", "above", "glide"):
        _flying(canvas, chance, spot, coat, look, faults)
    else:
        _standing(canvas, chance, spot, coat, look, faults)


def _varied(build: Build, chance: Chance, faults: Sequence[str]) -> Build:
    """The build of one bird of its sort."""
    s = chance.spread(10)
    longer = 1.9 if "longbody" in faults else 1.0
    return replace(
        build,
        tilt=build.tilt * (1 + 0.3 * s[0]) + 0.06 * s[1],
        length=build.length * (1 + 0.08 * s[2]) * longer,
        depth=build.depth * (1 + 0.14 * s[3]),
        head=build.head * (1 + 0.12 * s[4]),
        neck=build.neck * (1 + 0.18 * s[5]),
        neck_angle=build.neck_angle + 0.15 * s[6],
        tail=build.tail * (1 + 0.35 * s[7]),
        tail_lift=build.tail_lift + 0.14 * s[8],
        beak=build.beak * (1 + 0.25 * s[9]),
    )


class _Frame:
    """Points along the body's axis (x forward, y down) turned into the bird's own units."""

    def __init__(self, build: Build, swims: bool) -> None:
        self.cos, self.sin = math.cos(build.tilt), -math.sin(build.tilt)
        below = build.depth * 0.96 + 0.20 * build.length * abs(self.sin)
        self.x = -0.02
        self.y = -build.depth * 0.55 if swims else -(build.legs + below)

    def __call__(self, points: Sequence[Sequence[float]]) -> np.ndarray:
        p = np.asarray(points, np.float64).reshape(-1, 2)
        return np.stack(
            [self.x + p[:, 0] * self.cos - p[:, 1] * self.sin, self.y + p[:, 0] * self.sin + p[:, 1] * self.cos], 1
        )


def _standing(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, look: str, faults: Sequence[str]) -> None:
    swims = look in ("duck", "swan")
    b = _varied(BUILDS[look], chance, faults)
    frame = _Frame(b, swims)
    outline = _body_outline(b)
    front = frame([(0.36 * b.length, -0.25 * b.depth)])[0]
    head = front + np.array([math.cos(b.neck_angle), -math.sin(b.neck_angle)]) * (b.neck + 0.1 * b.length)
    if look in ("swan", "heron"):
        head = head + np.array([0.06, 0.0])
    body = [spot.place(smooth(frame(outline)))]
    neck = _neck(b, front, head, look)
    shapes = body + [spot.place(neck), spot.place(ellipse(head[0], head[1], b.head * 1.06, b.head * 0.97))]
    if look == "swan" or look == "duck":
        shapes = [_above_water(shape, spot) for shape in shapes]
    blend = max(spot.size * 0.03, 0.5)
    texture = _feather_texture(chance, spot, coat.texture)
    if not swims and "anatomy" not in faults:
        _legs(canvas, chance, spot, b, frame, coat.legs)
    else:
        chance.spread(8)
    _tail(canvas, chance, spot, b, frame, coat)
    _beak(canvas, spot, b, head, coat.beak)
    canvas.solid(shapes, coat.main, relief=0.36, named=True, blend=blend, texture=texture, rim=0.3)
    clip = Clip(shapes, blend)
    _patches(canvas, spot, b, frame, head, coat, clip)
    _folded_wing(canvas, chance, spot, b, frame, coat, swims)
    if look == "hen" or (look in ("song", "parrot") and chance.yes(0.25)):
        _crest(canvas, spot, b, head, coat, look)
    if not ("anatomy" in faults and chance.yes(0.5)):
        _eye(canvas, chance, spot, b, head)


def _above_water(shape: np.ndarray, spot: Spot) -> np.ndarray:
    return np.stack([shape[:, 0], np.minimum(shape[:, 1], spot.y)], 1)


def _body_outline(b: Build) -> List[Tuple[float, float]]:
    length, depth = b.length, b.depth
    return [
        (0.50 * length, 0.05 * depth),
        (0.36 * length, -0.58 * depth),
        (0.08 * length, -0.86 * depth),
        (-0.22 * length, -0.66 * depth),
        (-0.47 * length, -0.28 * depth),
        (-0.53 * length, 0.02 * depth),
        (-0.38 * length, 0.46 * depth),
        (-0.10 * length, 0.95 * depth),
        (0.20 * length, 1.04 * depth),
        (0.42 * length, 0.70 * depth),
    ]


def _neck(b: Build, front: np.ndarray, head: np.ndarray, look: str) -> np.ndarray:
    """The neck's outline from inside the body to the middle of the head; long necks are bent like an S."""
    inside = front - np.array([0.14 * b.length, -0.1 * b.depth])
    if look in ("swan", "heron"):
        line = [
            inside,
            front + [0.05, -0.02],
            front * 0.62 + head * 0.38 + [0.05, 0.0],
            front * 0.2 + head * 0.8 + [-0.07, 0.0],
            head + [-0.02, 0.0],
        ]
        curve = smooth(line, 6, closed=False)
        widths = np.interp(
            np.linspace(0, 1, len(curve)), [0, 0.3, 0.7, 1], [1.7 * b.depth, 1.5 * b.head, b.head * 1.05, b.head]
        )
        return ribbon(curve, widths)
    if look == "duck":
        return ribbon([inside, (inside + head) / 2, head], [1.25 * b.depth, 1.25 * b.head, 1.2 * b.head])
    return ribbon([inside, (inside + head) / 2, head], [1.75 * b.depth, 1.12 * b.depth + 0.9 * b.head, 1.8 * b.head])


def _feather_texture(chance: Chance, spot: Spot, strength: float) -> Texture:
    kind = chance.pick(("feathers", "fur", "scales", "bark"), (4, 4, 1, 2))
    scale = max(spot.size / 330.0, 0.25) * chance.between(0.6, 1.25)
    angle = chance.between(0.4, 1.4) * spot.facing
    return lay(kind, strength * (1.0 if kind != "fur" else 1.6), chance.spread(3), scale, angle)


def _legs(canvas: Canvas, chance: Chance, spot: Spot, b: Build, frame: _Frame, colour: np.ndarray) -> None:
    """Two legs with toes; the near one is lighter."""
    s = chance.spread(8)
    hip = frame([(-0.06 * b.length, 0.62 * b.depth)])[0]
    walk = 0.05 * s[0] if b.legs < 0.2 else 0.1 * s[0]
    for number, (shift, shade) in enumerate(((-0.055 + walk, 0.72), (0.055 - walk, 1.0))):
        foot = np.array([0.02 + shift * 1.3, 0.0])
        knee = np.array([(hip[0] + foot[0]) / 2 - 0.02, (hip[1] + foot[1]) / 2])
        line = smooth([hip + [shift * 0.7, 0], knee, foot - [0.0, 0.012]], 4, closed=False)
        toes = [
            ribbon([foot - [0, 0.012], foot + [reach, drop]], [0.022, 0.01])
            for reach, drop in ((0.085, 0.004), (0.06, 0.022), (-0.05, 0.012))
        ]
        width = 0.026 + 0.006 * s[1 + number]
        canvas.solid(
            [spot.place(ribbon(line, width))] + [spot.place(toe) for toe in toes], colour * shade, 0.2, rim=0.2
        )


def _tail(canvas: Canvas, chance: Chance, spot: Spot, b: Build, frame: _Frame, coat: Coat) -> None:
    base = np.array([-0.44 * b.length, -0.02 * b.depth])
    angle = math.pi + b.tail_lift
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    half, end = min(0.42 * b.depth, 0.09), b.tail_width / 2
    form = chance.pick(("square", "round", "fork", "point"))
    tip = {"square": (1.0, 1.0), "round": (1.08, 0.95), "fork": (0.8, 1.02), "point": (1.2, 0.85)}[form]
    reach = b.tail + 0.08 * b.length
    outline = [
        base + across * half,
        base + along * reach * tip[1] + across * end,
        base + along * reach * (tip[0] * 0.5 + 0.5 * max(tip)) + across * end * 0.5,
        base + along * reach * tip[0],
        base + along * reach * (tip[0] * 0.5 + 0.5 * max(tip)) - across * end * 0.5,
        base + along * reach * tip[1] - across * end,
        base - across * half,
    ]
    shape = spot.place(frame(outline))
    shade = coat.main.darker(0.72)
    canvas.solid(shape, shade, relief=0.2, named=True, rim=0.2)
    rays = [
        spot.place(
            frame([base + along * reach * 0.3 + across * half * t, base + along * reach * 0.95 + across * end * t])
        )
        for t in (-0.6, -0.2, 0.2, 0.6)
    ]
    canvas.lines(rays, coat.main.darker(0.5).line(), 1.0, chance.between(0.3, 0.9), clip=Clip([shape]), named=True)
    canvas.lines([shape], shade.line(), 1.0, 0.7, closed=True, named=True)


def _beak(canvas: Canvas, spot: Spot, b: Build, head: np.ndarray, colour: np.ndarray, drop: float = 0.06) -> None:
    r, reach, thick = b.head, b.beak * b.head, b.beak_depth * b.head
    x, y = head[0] + 0.8 * r, head[1] + 0.1 * r
    tip = x + 0.2 * r + reach
    if b.beak_form == "flat":
        upper = [
            (x, y - thick * 0.55),
            (x + reach * 0.4, y - thick * 0.05),
            (tip, y + thick * 0.1),
            (tip - 0.02, y + thick * 0.35),
            (x, y + thick * 0.2),
        ]
        lower = [
            (x, y + thick * 0.1),
            (tip - 0.04, y + thick * 0.3),
            (tip - 0.08, y + thick * 0.5),
            (x, y + thick * 0.5),
        ]
    elif b.beak_form == "hook":
        upper = [
            (x, y - thick * 0.6),
            (x + reach * 0.5, y - thick * 0.5),
            (tip - reach * 0.1, y - thick * 0.1),
            (tip - reach * 0.12, y + thick * 0.75),
            (x + reach * 0.55, y + thick * 0.16),
            (x, y + thick * 0.12),
        ]
        lower = [
            (x, y + thick * 0.05),
            (x + reach * 0.6, y + thick * 0.14),
            (x + reach * 0.45, y + thick * 0.45),
            (x, y + thick * 0.5),
        ]
    else:
        upper = [(x, y - thick * 0.5), (x + reach * 0.5, y - thick * 0.26), (tip, y + drop * r), (x, y + thick * 0.12)]
        lower = [(x, y), (tip - 0.12 * reach, y + drop * r), (x, y + thick * 0.5)]
    canvas.solid(spot.place(lower), colour * 0.75, 0.1, rim=0.15)
    canvas.solid(spot.place(upper), colour, 0.2, rim=0.15)
    canvas.lines([spot.place(upper[-3:] if b.beak_form != "cone" else upper[-2:])], colour * 0.4, 1.0, 0.8)


def _eye(canvas: Canvas, chance: Chance, spot: Spot, b: Build, head: np.ndarray) -> None:
    x, y, r = head[0] + 0.36 * b.head, head[1] - 0.2 * b.head, b.head * chance.between(0.19, 0.27)
    ring = chance.pick((None, _WHITE, np.array([240, 190, 60], np.float32), np.array([120, 60, 30], np.float32)))
    if ring is not None:
        canvas.flat(spot.place(ellipse(x, y, r * 1.4, r * 1.4)), ring)
    canvas.flat(spot.place(ellipse(x, y, r, r)), _EYE)
    canvas.flat(spot.place(ellipse(x + r * 0.3, y - r * 0.35, r * 0.34, r * 0.34, count=12)), _WHITE)


def _crest(canvas: Canvas, spot: Spot, b: Build, head: np.ndarray, coat: Coat, look: str) -> None:
    r = b.head
    if look == "hen":
        comb = [(0.55, -0.6), (0.6, -1.3), (0.3, -1.0), (0.15, -1.5), (-0.1, -1.05), (-0.35, -1.45), (-0.5, -0.7)]
        red = np.array([200, 40, 36], np.float32)
        canvas.solid(spot.place(head + np.array(comb) * r), red, 0.2)
        canvas.solid(spot.place(ellipse(head[0] + 0.85 * r, head[1] + 0.75 * r, 0.22 * r, 0.42 * r)), red, 0.2)
        return
    tuft = [(0.35, -0.75), (0.0, -1.15), (-0.7, -1.75), (-0.55, -1.15), (-1.1, -1.1), (-0.75, -0.55)]
    shape = spot.place(smooth(head + np.array(tuft) * r, 4))
    canvas.solid(shape, coat.main, 0.25, named=True)
    canvas.lines([shape[4:-4]], coat.main.line(), 1.0, 0.6, named=True)


def _patches(canvas: Canvas, spot: Spot, b: Build, frame: _Frame, head: np.ndarray, coat: Coat, clip: Clip) -> None:
    """Belly, cap, cheek and bib, inside the body's outline."""
    if "belly" in coat.patches:
        belly = frame(ellipse(0.14 * b.length, 0.98 * b.depth, 0.42 * b.length, 0.62 * b.depth, 0.06))
        canvas.solid(spot.place(belly), coat.patch, 0.15, clip=clip, rim=0.1)
    if "bib" in coat.patches:
        bib = ellipse(head[0] + 0.35 * b.head, head[1] + 1.05 * b.head, 0.8 * b.head, 0.75 * b.head)
        canvas.solid(spot.place(bib), coat.patch, 0.1, clip=clip, rim=0.1)
    if "cap" in coat.patches:
        cap = ellipse(head[0] - 0.1 * b.head, head[1] - 0.75 * b.head, 1.15 * b.head, 0.55 * b.head, 0.1)
        canvas.solid(spot.place(cap), coat.patch * 0.85, 0.1, clip=clip, rim=0.1)
    if "cheek" in coat.patches:
        cheek = ellipse(head[0] + 0.05 * b.head, head[1] + 0.3 * b.head, 0.45 * b.head, 0.32 * b.head)
        canvas.solid(spot.place(cheek), coat.patch, 0.1, rim=0.1)


def _folded_wing(canvas: Canvas, chance: Chance, spot: Spot, b: Build, frame: _Frame, coat: Coat, swims: bool) -> None:
    length, depth = b.length, b.depth
    reach = -0.62 - 0.16 * chance.between(0, 1)
    low = 0.42 + 0.18 * chance.between(-1, 1)
    points = [
        (0.30 * length, -0.30 * depth),
        (0.12 * length, -0.66 * depth),
        (-0.22 * length, -0.60 * depth),
        (reach * length, -0.02 * depth),
        (-0.30 * length, (low - 0.05) * depth),
        (0.02 * length, low * depth),
        (0.25 * length, 0.24 * depth),
    ]
    if swims:
        points = [(x, y - 0.12 * depth) for x, y in points]
    shape = spot.place(frame(smooth(points)))
    canvas.solid(
        shape, coat.wing, relief=0.24, named=True, rim=0.25, texture=_feather_texture(chance, spot, coat.texture)
    )
    clip = Clip([shape])
    tip = np.array([reach * length, -0.02 * depth])
    count = chance.whole(3, 6)
    strength = chance.between(0.45, 0.95)
    long_feathers = []
    for number in range(count):
        t = (number + 0.6) / count
        start = np.array([(0.06 - 0.16 * t) * length, (-0.5 + (low + 0.45) * t) * depth])
        bend = (start + tip) / 2 + np.array([0.0, (0.10 * t - 0.02) * depth])
        long_feathers.append(spot.place(frame(smooth([start, bend, bend + 0.5 * (tip - bend)], 5, closed=False))))
    line = coat.wing.line()
    canvas.lines(long_feathers, line, 1.2, strength, clip=clip, named=True)
    coverts = [
        spot.place(
            frame(_arc(0.20 * length - 0.13 * length * k, (low - 0.45) * 0.5 * depth, 0.1 * length, 0.5 * depth))
        )
        for k in range(3)
    ]
    canvas.lines(coverts, line, 1.0, strength * 0.8, clip=clip, named=True)
    if "bars" in coat.patches:
        bar = ribbon(frame(_arc(0.02 * length, 0.0, 0.07 * length, 0.5 * depth)), 0.03)
        canvas.solid(spot.place(bar), coat.patch, 0.05, clip=clip, rim=0.1)
    canvas.lines([shape], line, 1.4, 0.85, closed=True, named=True)


def _arc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    t = np.linspace(-1.25, 1.25, 9)
    return np.stack([x - rx * np.cos(t), y + ry * np.sin(t)], 1)


def _facing(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, look: str, faults: Sequence[str]) -> None:
    """An upright bird seen from the front (an owl) or from behind, its head turned to the side."""
    s = chance.spread(6)
    wide = 0.27 * (1 + 0.15 * s[0])
    tall = 1.0 if "longbody" not in faults else 1.5
    body = smooth(
        [
            (0, -0.74 * tall),
            (wide * 0.8, -0.66 * tall),
            (wide, -0.42),
            (wide * 0.72, -0.12),
            (0, -0.03),
            (-wide * 0.72, -0.12),
            (-wide, -0.42),
            (-wide * 0.8, -0.66 * tall),
        ]
    )
    radius = 0.24 if look == "owl" else 0.15 * (1 + 0.1 * s[1])
    head_y = -0.76 * tall if look == "owl" else -0.84 * tall
    head = ellipse(0, head_y, radius * (1.12 if look == "owl" else 1.0), radius * 0.95)
    shapes = [spot.place(body), spot.place(head)]
    if look == "owl" and s[2] > 0:
        shapes += [
            spot.place([(k * 0.06, head_y - 0.16), (k * 0.22, head_y - 0.36), (k * 0.26, head_y - 0.1)])
            for k in (-1, 1)
        ]
    tail = spot.place([(-0.09, -0.2), (0.09, -0.2), (0.11, 0.2), (0.0, 0.24), (-0.11, 0.2)])
    canvas.solid(tail, coat.main.darker(0.62), 0.15, named=True)
    canvas.lines(
        [spot.place([(x * 0.6, -0.1), (x, 0.22)]) for x in (-0.06, -0.02, 0.03, 0.07)],
        coat.main.darker(0.4),
        1.0,
        0.7,
        named=True,
    )
    blend = max(spot.size * 0.03, 0.5)
    if look == "back":
        b = replace(BUILDS["prey"], head=radius, beak=0.8)
        _beak(canvas, spot, b, np.array([0.0, head_y]), coat.beak)
    canvas.solid(
        shapes, coat.main, 0.36, named=True, blend=blend, texture=_feather_texture(chance, spot, coat.texture), rim=0.3
    )
    if look == "owl" and "belly" in coat.patches:
        canvas.solid(spot.place(ellipse(0, -0.3, wide * 0.62, 0.27)), coat.patch, 0.15, rim=0.15)
    if look == "owl":
        marks = [
            spot.place(_arc_down(x, -0.46 + 0.085 * row, 0.028))
            for row in range(5)
            for x in np.linspace(-0.1, 0.1, 3) + 0.03 * (row % 2)
        ]
        canvas.lines(marks, coat.main.line(), 1.2, 0.8, named=True)
    _side_wings(canvas, chance, spot, coat, look, wide, tall)
    if "anatomy" not in faults or s[3] > 0:
        _grip(canvas, spot, coat)
    if look == "owl":
        _owl_face(canvas, chance, spot, coat, head_y, radius)
    else:
        _eye(canvas, chance, spot, replace(BUILDS["prey"], head=radius), np.array([0.0, head_y]))


def _arc_down(x: float, y: float, r: float) -> np.ndarray:
    t = np.linspace(0.2, math.pi - 0.2, 6)
    return np.stack([x + r * np.cos(t), y + r * np.sin(t)], 1)


def _side_wings(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, look: str, wide: float, tall: float) -> None:
    inner = 0.55 if look == "owl" else 0.06
    strength = chance.between(0.5, 0.95)
    for side in (-1, 1):
        points = [
            (side * wide * 0.72, -0.68 * tall),
            (side * wide * 1.1, -0.45),
            (side * wide * 0.95, -0.18),
            (side * wide * 0.35, 0.1),
            (side * wide * inner, -0.2),
            (side * wide * (inner + 0.12), -0.5),
        ]
        shape = spot.place(smooth(points))
        canvas.solid(shape, coat.wing, 0.22, named=True, rim=0.25)
        lines = [
            spot.place(
                smooth(
                    [(side * wide * u, -0.42 + 0.05 * k), (side * wide * (u * 0.9), -0.15), (side * wide * 0.38, 0.08)],
                    4,
                    closed=False,
                )
            )
            for k, u in enumerate((0.95, 0.8, 0.62) if look == "owl" else (0.95, 0.75, 0.5, 0.3))
        ]
        canvas.lines(lines, coat.wing.line(), 1.2, strength, clip=Clip([shape]), named=True)
        canvas.lines([shape], coat.wing.line(), 1.3, 0.8, closed=True, named=True)


def _grip(canvas: Canvas, spot: Spot, coat: Coat) -> None:
    for side in (-1, 1):
        toes = [spot.place(ellipse(side * 0.09 + 0.032 * k, 0.0, 0.017, 0.042)) for k in (-1, 0, 1)]
        for toe in toes:
            canvas.solid(toe, coat.legs, 0.2, rim=0.3)


def _owl_face(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, y: float, r: float) -> None:
    ring = chance.pick((np.array([245, 195, 60], np.float32), np.array([240, 150, 50], np.float32), _WHITE * 0.95))
    for side in (-1, 1):
        x = side * 0.45 * r
        disc = spot.place(ellipse(x, y, 0.46 * r, 0.5 * r))
        canvas.solid(disc, coat.main.paler(0.45), 0.15, rim=0.25, named=True)
        canvas.lines([disc], coat.main.line(), 1.2, 0.8, closed=True, named=True)
        canvas.flat(spot.place(ellipse(x, y, 0.27 * r, 0.27 * r)), ring)
        canvas.flat(spot.place(ellipse(x, y, 0.16 * r, 0.16 * r)), _EYE)
        canvas.flat(spot.place(ellipse(x + 0.06 * r, y - 0.07 * r, 0.055 * r, 0.055 * r, count=10)), _WHITE)
    canvas.solid(spot.place([(-0.12 * r, y + 0.1 * r), (0.12 * r, y + 0.1 * r), (0, y + 0.5 * r)]), coat.beak, 0.2)


def _flying(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, look: str, faults: Sequence[str]) -> None:
    """A bird in the air, centred on the spot, about 1 from wing tip to wing tip or from beak to tail."""
    if look == "side":
        _flying_side(canvas, chance, spot, coat, faults)
    else:
        _flying_spread(canvas, chance, spot, coat, look, faults)


def _flying_side(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, faults: Sequence[str]) -> None:
    s = chance.spread(8)
    long = 1.8 if "longbody" in faults else 1.0
    half = 0.27 * long
    body = smooth(
        [
            (half, -0.01),
            (0.17 * long, -0.075),
            (-0.05, -0.085),
            (-half, -0.03),
            (-half * 1.1, 0.01),
            (-half * 0.85, 0.05),
            (-0.02, 0.105),
            (0.17 * long, 0.085),
        ]
    )
    head = np.array([half + 0.045, -0.05 - 0.02 * s[0]])
    r = 0.085 * (1 + 0.1 * s[1])
    b = replace(BUILDS["song"], head=r, beak=0.95 + 0.3 * s[2])
    lift = chance.pick((1.25, 1.0, 0.55, -0.75, -1.05)) + 0.2 * s[3]
    span = 0.56 * (1 + 0.12 * s[4])
    chord = 0.24 * (1 + 0.15 * s[5])
    shoulder = np.array([0.1 * long, -0.045])
    back = math.copysign(1.0, lift)
    direction = np.array([math.cos(lift) * -0.35 + 0.0, -math.sin(lift)]) * span
    far = np.array([direction[0] + 0.24, direction[1] * 0.9])
    no_wing = "anatomy" in faults
    if not no_wing:
        _spread_wing(
            canvas, chance, spot, shoulder + [0.07, 0.0], far, np.array([-chord, 0.02 * back]), replace_coat(coat, 0.7)
        )
    _fan(canvas, spot, np.array([-half * 0.95, 0.005]), math.pi + 0.15 * s[6], 0.26, 0.32 + 0.12 * s[7], coat)
    _beak(canvas, spot, b, head, coat.beak)
    shapes = [
        spot.place(body),
        spot.place(ellipse(head[0], head[1], r * 1.05, r * 0.95)),
        spot.place(ribbon([(half * 0.6, 0.0), head], [0.15, 0.14])),
    ]
    blend = max(spot.size * 0.018, 0.5)
    canvas.solid(
        shapes, coat.main, 0.34, named=True, blend=blend, texture=_feather_texture(chance, spot, coat.texture), rim=0.3
    )
    if "belly" in coat.patches:
        canvas.solid(
            spot.place(ellipse(0.03, 0.085, half * 0.8, 0.05)), coat.patch, 0.1, clip=Clip(shapes, blend), rim=0.1
        )
    _spread_wing(canvas, chance, spot, shoulder, direction, np.array([-chord, 0.03 * back]), coat)
    _eye(canvas, chance, spot, b, head)


def replace_coat(coat: Coat, shade: float) -> Coat:
    """The same coat in shadow."""
    return replace(coat, main=coat.main.darker(shade), wing=coat.wing.darker(shade))


def _spread_wing(
    canvas: Canvas, chance: Chance, spot: Spot, shoulder: np.ndarray, span: np.ndarray, chord: np.ndarray, coat: Coat
) -> None:
    """An open wing: an arm along `span`, feathers hanging along `chord` and fanning out at the tip."""
    s = chance.spread(4)

    def at(u: float, v: float) -> np.ndarray:
        return shoulder + span * u + chord * v

    wrist = (0.46 + 0.05 * s[0], -0.16)
    tips: List[Tuple[float, float]] = []
    inner, outer = chance.whole(3, 5), chance.whole(5, 7)
    for k in range(inner):
        t = (k + 0.5) / inner
        tips.append((0.02 + 0.44 * t, 1.0 - 0.06 * t))
    for k in range(outer):
        a = math.radians(82 - 78 * (k + 0.3) / outer)
        reach = 1.12 - 0.05 * k
        tips.append((wrist[0] + 0.56 * math.cos(a) * reach * (1 + 0.06 * s[1]), wrist[1] + 1.15 * math.sin(a) * reach))
    bases = [(0.05 + 0.75 * (k + 0.5) / len(tips), 0.12) for k in range(len(tips))]
    edge: List[Tuple[float, float]] = [(0.0, 0.0), (0.22, -0.12), wrist, (0.72, -0.08), (0.95, 0.0)]
    notch = 0.86 + 0.06 * s[2]
    for k in range(len(tips) - 1, -1, -1):
        edge.append(tips[k])
        nxt = tips[k - 1] if k else (-0.02, 0.85)
        middle = ((tips[k][0] + nxt[0]) / 2, (tips[k][1] + nxt[1]) / 2)
        root = bases[k]
        edge.append((root[0] + (middle[0] - root[0]) * notch, root[1] + (middle[1] - root[1]) * notch))
    shape = spot.place(smooth([at(*p) for p in edge], 4))
    canvas.solid(shape, coat.wing, 0.22, named=True, rim=0.2, texture=_feather_texture(chance, spot, coat.texture))
    line, clip, strength = coat.wing.line(), Clip([shape]), chance.between(0.5, 0.95)
    notches = edge[6::2]
    canvas.lines(
        [spot.place([at(*bases[len(tips) - 1 - k]), at(*p)]) for k, p in enumerate(notches)],
        line,
        1.1,
        strength,
        clip=clip,
        named=True,
    )
    covert = smooth(
        [(0.0, 0.0), (0.22, -0.12), wrist, (0.75, -0.07), (0.6, 0.26), (0.4, 0.42), (0.2, 0.46), (0.0, 0.45)], 4
    )
    upper = spot.place([at(*p) for p in covert])
    canvas.solid(upper, coat.main, 0.2, named=True, clip=clip, rim=0.2)
    canvas.lines([upper[12:]], line, 1.1, strength, clip=clip, named=True)
    canvas.lines([shape], line, 1.2, 0.8, closed=True, named=True)


def _fan(canvas: Canvas, spot: Spot, base: np.ndarray, angle: float, reach: float, spread: float, coat: Coat) -> None:
    """A tail of fanned feathers."""
    angles = np.linspace(angle - spread, angle + spread, 6)
    rim = [
        base + reach * (1.0 if k % 2 else 0.94) * np.array([math.cos(a), math.sin(a)])
        for k, a in enumerate(np.linspace(angles[0], angles[-1], 11))
    ]
    across = np.array([-math.sin(angle), math.cos(angle)]) * 0.035
    shape = spot.place(np.array([base - across] + rim + [base + across]))
    canvas.solid(shape, coat.wing.darker(0.9), 0.2, named=True)
    rays = [
        spot.place(
            [
                base + reach * 0.4 * np.array([math.cos(a), math.sin(a)]),
                base + reach * 0.95 * np.array([math.cos(a), math.sin(a)]),
            ]
        )
        for a in angles[1:-1]
    ]
    canvas.lines(rays, coat.wing.line(), 1.0, 0.7, named=True, clip=Clip([shape]))
    canvas.lines([shape], coat.wing.line(), 1.1, 0.75, closed=True, named=True)


def _flying_spread(canvas: Canvas, chance: Chance, spot: Spot, coat: Coat, look: str, faults: Sequence[str]) -> None:
    """Seen from above or below, or gliding: both wings out to the sides, head up along the local -y."""
    s = chance.spread(8)
    long = 1.7 if "longbody" in faults else 1.0
    r = 0.07 * (1 + 0.1 * s[0])
    sweep = chance.pick((0.0, -0.1, 0.12)) + 0.05 * s[1]
    rise = -0.06 if look == "above" else -0.16
    span = 0.5 * (1 + 0.08 * s[2])
    chord = 0.24 * (1 + 0.18 * s[3])
    _fan(canvas, spot, np.array([0.0, 0.17 * long]), math.pi / 2, 0.2 * (1 + 0.2 * s[4]), 0.35 + 0.15 * s[5], coat)
    sides = (-1,) if "anatomy" in faults else (-1, 1)
    chance_wing = chance.whole(0, 1 << 20)
    for side in sides:
        same = Chance(chance_wing, "train", 0, "main")
        shoulder = np.array([side * 0.05, -0.08])
        _spread_wing(canvas, same, spot, shoulder, np.array([side * span, sweep + rise]), np.array([0.0, chord]), coat)
    body = smooth(
        [
            (0, -0.2 * long),
            (0.075, -0.1),
            (0.08, 0.03),
            (0.045, 0.17 * long),
            (0, 0.22 * long),
            (-0.045, 0.17 * long),
            (-0.08, 0.03),
            (-0.075, -0.1),
        ]
    )
    head = np.array([0.0, -0.2 * long - 0.03])
    beak = spot.place([(-0.028, head[1] - 0.05), (0, head[1] - 0.14), (0.028, head[1] - 0.05)])
    canvas.solid(beak, coat.beak, 0.1)
    shapes = [spot.place(body), spot.place(ellipse(head[0], head[1], r, r * 1.05))]
    canvas.solid(
        shapes,
        coat.main,
        0.34,
        named=True,
        blend=max(spot.size * 0.015, 0.5),
        texture=_feather_texture(chance, spot, coat.texture),
        rim=0.3,
    )
    for side in (-1, 1):
        canvas.flat(spot.place(ellipse(side * 0.04, head[1] - 0.02, 0.013, 0.013, count=12)), _EYE)
