"""Captioned scenes that the tiny model is trained and measured on, made from an index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

import numpy as np

from tools.tiny.backgrounds import draw_backdrop, draw_blades, draw_wake
from tools.tiny.captions import captions_of
from tools.tiny.chance import Chance
from tools.tiny.drawing import Canvas, Spot
from tools.tiny.faults import spoil
from tools.tiny.objects import draw_object, draw_shadow, draw_support, main_spot, other_spot
from tools.tiny.palette import COLOURS, HUES, WORDS, Paint, paint
from tools.tiny.patterns import draw_pattern
from tools.tiny.plan import SPLITS, Plan, plan_scene

HEIGHT, WIDTH = 256, 384
SEED = 20261121


@dataclass(frozen=True)
class Scene:
    """One captioned picture.

    Attributes
    ----------
    image : (256, 384, 3) uint8 RGB
    caption : the full caption
    captions : at least four wordings, the first being `caption`, from full to bare
    kind : the main object's kind ("bird", "tree", ...), or "pattern"
    colour : the colour word of the main object
    mask : (256, 384) bool, the visible pixels of the main object that bear its colour
    degraded : whether the picture was spoilt on purpose, which its captions then say
    """

    image: np.ndarray
    caption: str
    captions: Tuple[str, ...]
    kind: str
    colour: str
    mask: np.ndarray
    degraded: bool


def make_scene(index: int, split: str = "train", colour: Optional[str] = None, seed: int = SEED) -> Scene:
    """Make one scene; the same arguments give the same scene in any process and any order.

    Parameters
    ----------
    index : 0 or more
    split : "train" or "test", which share neither pictures nor long captions
    colour : a colour word that the main object is given instead of its own; all else stays
    seed : of the whole set

    Raises
    ------
    ValueError
        For a negative index, an unknown split or an unknown colour word.
    """
    _check(index, split, colour)
    plan = plan_scene(index, split, colour, seed)
    canvas = _draw(plan)
    captions = captions_of(plan)
    image, mask = canvas.finish(), canvas.mask > 0.5
    if plan.faults:
        image, mask = spoil(image, mask, plan.faults, _chance(plan, "fault"))
    return Scene(
        image=image,
        caption=captions[0],
        captions=captions,
        kind=plan.main.kind,
        colour=plan.main.colour,
        mask=mask,
        degraded=bool(plan.faults),
    )


def all_captions(count: int, split: str = "train", seed: int = SEED) -> Iterator[str]:
    """Every caption of the first `count` scenes, without drawing them."""
    _check(count, split, None)
    for index in range(count):
        yield from captions_of(plan_scene(index, split, None, seed))


def _check(index: int, split: str, colour: Optional[str]) -> None:
    if index < 0:
        raise ValueError(f"a scene's index must be 0 or more, not {index}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if colour is not None and colour not in WORDS:
        raise ValueError(f"unknown colour {colour!r}: use one of {', '.join(WORDS)}")


def _paint_of(plan: Plan, part: int, word: str, tone: str = "") -> Paint:
    return paint(word, Chance(plan.seed, plan.split, plan.index, "paint", part).spread(3), tone)


def _chance(plan: Plan, stream: str, part: int = 0) -> Chance:
    return Chance(plan.seed, plan.split, plan.index, stream, part)


def _draw(plan: Plan) -> Canvas:
    chance = _chance(plan, "back")
    back, main = plan.backdrop, plan.main
    canvas = Canvas(HEIGHT, WIDTH, chance.between(0.9, 2.2))
    canvas.dark = back.dark
    own = _paint_of(plan, 0, main.colour)
    if main.kind == "pattern":
        third = _paint_of(plan, 3, plan.third)
        draw_pattern(canvas, _chance(plan, "main"), main.look, (own, _paint_of(plan, 4, plan.second), third))
        return canvas
    ground = _paint_of(plan, 2, back.ground_colour or "grey", back.ground_tone).duller(0.62)
    draw_backdrop(canvas, chance, back, _paint_of(plan, 1, back.back_colour, back.back_tone), ground)
    _draw_others(canvas, plan)
    if chance.yes(0.15):
        canvas.soften(chance.between(0.8, 2.6))
    chance = _chance(plan, "main")
    spot = main_spot(canvas, chance, main, back)
    if plan.support is not None:
        draw_support(
            canvas,
            _chance(plan, "front"),
            spot,
            _paint_of(plan, 5, plan.support.colour, plan.support.tone),
            plan.support.kind,
        )
    elif _grounded(plan):
        draw_shadow(canvas, spot, main)
    canvas.main = True
    draw_object(canvas, chance, spot, own, main, plan.faults)
    canvas.main = False
    _draw_front(canvas, plan, spot, ground)
    return canvas


def _grounded(plan: Plan) -> bool:
    """Whether the main object stands on something that takes its shadow."""
    if plan.main.pose in ("fly", "swim", "branch") or plan.main.kind in ("sun", "fish", "boat", "mountain", "rocket"):
        return False
    return bool(plan.backdrop.ground) or plan.main.pose == "ground"


def _draw_others(canvas: Canvas, plan: Plan) -> None:
    for number, thing in enumerate(plan.others):
        spot = other_spot(canvas, thing, plan.backdrop)
        if thing.kind in ("tree", "house", "person", "flower", "cup", "ball"):
            draw_shadow(canvas, spot, thing)
        draw_object(
            canvas, _chance(plan, "other", number), spot, _paint_of(plan, 10 + number, thing.colour, thing.tone), thing
        )


def _draw_front(canvas: Canvas, plan: Plan, spot: Spot, ground: Paint) -> None:
    """What lies before the main object's foot: blades of grass, or ripples of water."""
    chance = _chance(plan, "front", 1)
    if plan.main.pose == "swim" or plan.main.kind == "boat":
        draw_wake(canvas, chance, spot, ground)
    elif plan.backdrop.ground in ("grass", "field") and _grounded(plan) and chance.yes(0.7):
        draw_blades(canvas, chance, spot.x, spot.y, spot.size * 0.6, ground)


__all__ = ["COLOURS", "HEIGHT", "HUES", "SEED", "WIDTH", "Scene", "all_captions", "make_scene"]
