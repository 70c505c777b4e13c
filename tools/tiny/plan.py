"""What is in a scene: chosen before anything is drawn, and all that captions need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Optional, Tuple

from tools.tiny.chance import Chance
from tools.tiny.palette import COLOURS, NEUTRALS, WORDS

SPLITS = ("train", "test")
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "diamond", "cross")
PATTERNS = (
    "mosaic",
    "marble",
    "camouflage",
    "polygons",
    "stripes",
    "bricks",
    "leaves",
    "pebbles",
    "grass",
    "feathers",
    "fur",
)

# Share of each kind of main object.
KIND_WEIGHTS: Dict[str, float] = {
    "bird": 45.0,
    "tree": 5.0,
    "house": 5.0,
    "flower": 5.0,
    "fish": 4.5,
    "boat": 4.0,
    "sun": 2.5,
    "cat": 4.0,
    "cup": 3.5,
    "rocket": 2.5,
    "person": 4.0,
    "mountain": 2.0,
    **dict.fromkeys(SHAPES, 1.0),
    "pattern": 19.0,
}

# Settings that suit each kind and pose, with their weights.
BIRD_POSES: Dict[str, float] = {
    "branch": 30.0,
    "post": 10.0,
    "rock": 9.0,
    "ground": 15.0,
    "swim": 12.0,
    "fly": 24.0,
}
SETTINGS: Dict[str, Dict[str, float]] = {
    "branch": {"plain": 4, "air": 4, "blur": 3, "wall": 1},
    "post": {"plain": 2, "air": 3, "blur": 2, "land": 2},
    "rock": {"plain": 1, "land": 3, "water": 2, "blur": 1},
    "ground": {"land": 5, "room": 1, "plain": 1},
    "swim": {"water": 1},
    "fly": {"air": 6, "plain": 2, "water": 1, "land": 1, "blur": 1},
    "tree": {"land": 6, "plain": 1},
    "house": {"land": 6, "plain": 1},
    "flower": {"land": 3, "plain": 2, "blur": 3},
    "fish": {"under": 5, "plain": 1},
    "boat": {"water": 1},
    "sun": {"air": 4, "land": 2, "water": 2},
    "cat": {"room": 3, "land": 3, "plain": 1, "blur": 1},
    "cup": {"room": 5, "plain": 1},
    "rocket": {"air": 4, "land": 2},
    "person": {"land": 4, "room": 2, "plain": 2, "blur": 1},
    "mountain": {"air": 3, "land": 2},
    "shape": {"plain": 5, "wall": 2, "blur": 1, "room": 1},
}
# Height of the main object against the picture's.
HEIGHTS: Dict[str, Tuple[float, float]] = {
    "bird": (0.32, 0.95),
    "tree": (0.45, 0.92),
    "house": (0.35, 0.8),
    "flower": (0.4, 0.95),
    "fish": (0.25, 0.62),
    "boat": (0.4, 0.85),
    "sun": (0.25, 0.6),
    "cat": (0.45, 0.95),
    "cup": (0.35, 0.75),
    "rocket": (0.5, 0.92),
    "person": (0.55, 0.98),
    "mountain": (0.4, 0.75),
    "shape": (0.3, 0.85),
}
FAULTS = ("blur", "noise", "blocks", "lowres", "washed", "crop", "longbody", "anatomy")


@dataclass(frozen=True)
class Thing:
    """One object: what it is, how it is coloured and where it goes (fractions of the picture)."""

    kind: str
    colour: str
    tone: str
    x: float
    y: float
    size: float
    facing: int
    pose: str = ""
    look: str = ""  # a variant of the form: "plump", "slim", ...
    place: str = ""  # words for where it is
    detail: str = ""  # the colour of a bird's beak


@dataclass(frozen=True)
class Backdrop:
    """Sky or wall, and the ground below the horizon (a fraction of the height) where there is one."""

    setting: str
    back: str
    back_colour: str
    back_tone: str
    ground: str = ""
    ground_colour: str = ""
    ground_tone: str = ""
    horizon: float = 1.0

    @property
    def dark(self) -> bool:
        return self.back in ("night",) or self.back_tone in ("dark", "deep") or self.back_colour == "black"


@dataclass(frozen=True)
class Plan:
    """All choices of a scene that words can tell."""

    index: int
    split: str
    seed: int
    main: Thing
    backdrop: Backdrop
    others: Tuple[Thing, ...]
    support: Optional[Thing]
    faults: Tuple[str, ...]
    second: str  # a pattern's second colour
    third: str  # and its third, of which there is little


def plan_scene(index: int, split: str, colour: Optional[str], seed: int) -> Plan:
    """Choose the content of a scene.

    The main object's colour is drawn last and from a stream of its own, so that asking for another one changes nothing
    else.
    """
    chance = Chance(seed, split, index, "plan")
    kind = chance.pick(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))
    pose = chance.pick(list(BIRD_POSES), list(BIRD_POSES.values())) if kind == "bird" else ""
    backdrop = _backdrop(chance, kind, pose)
    main = _main(chance, kind, pose, backdrop)
    support = _support(chance, main) if pose in ("branch", "post", "rock") else None
    others = _others(chance, main, backdrop)
    second = chance.pick(("white", "grey", "black", "brown", "yellow", "blue", "green", "red"))
    third = chance.pick([word for word in ("white", "grey", "black") if word != second])
    faults: Tuple[str, ...] = ()
    if split == "train" and chance.yes(0.12):
        faults = _faults(chance, kind)
    taken = {second, third} if kind == "pattern" else {backdrop.back_colour, backdrop.ground_colour}
    return Plan(
        index=index,
        split=split,
        seed=seed,
        main=replace(main, colour=colour or _main_colour(Chance(seed, split, index, "colour"), kind, taken)),
        backdrop=backdrop,
        others=others,
        support=support,
        faults=faults,
        second=second,
        third=third,
    )


def _main_colour(chance: Chance, kind: str, taken: set) -> str:
    words: List[str] = [word for word in COLOURS if word not in taken]
    if chance.yes(0.16):
        words = [word for word in NEUTRALS if word not in taken and kind != "sun"] or words
    elif kind == "sun" and chance.yes(0.6):
        words = [word for word in ("yellow", "orange", "red") if word not in taken]
    return chance.pick(words)


def _backdrop(chance: Chance, kind: str, pose: str) -> Backdrop:
    table = SETTINGS[pose or ("shape" if kind in SHAPES or kind == "pattern" else kind)]
    setting = chance.pick(list(table), list(table.values()))
    if setting in ("plain", "wall", "blur"):
        return _plain(chance, setting)
    if setting == "under":
        colour, tone = chance.pick((("blue", "pale"), ("blue", "dark"), ("turquoise", "pale"), ("green", "dark")))
        return Backdrop(setting, "water", colour, tone)
    if setting == "room":
        wall = _plain(chance, "wall" if chance.yes(0.5) else "plain")
        on_table = {"cup": 0.85, "person": 0.0, "cat": 0.2}.get(kind, 0.5)
        ground = "table" if chance.yes(on_table) else "floor"
        ground_colour, tone = chance.pick(
            (("brown", ""), ("brown", "light"), ("brown", "dark"), ("grey", ""), ("white", ""), ("grey", "dark"))
        )
        return Backdrop(
            setting, wall.back, wall.back_colour, wall.back_tone, ground, ground_colour, tone, chance.between(0.55, 0.8)
        )
    back, colour, tone = _sky(chance)
    if setting == "air":
        return Backdrop(setting, back, colour, tone)
    if setting == "water":
        ground, ground_colour = "water", chance.pick(("blue", "turquoise", "grey", "green"), (6, 2, 2, 1))
        ground_tone = chance.pick(("pale", "deep", "light")) if back != "night" else "dark"
        return Backdrop(setting, back, colour, tone, ground, ground_colour, ground_tone, chance.between(0.3, 0.62))
    ground, ground_colour, ground_tone = chance.pick(_GROUNDS, (8, 3, 2, 3, 2, 2))
    if back == "night":
        ground_tone = "dark" if ground != "snow" else ground_tone
    return Backdrop(setting, back, colour, tone, ground, ground_colour, ground_tone, chance.between(0.45, 0.75))


_GROUNDS = (
    ("grass", "green", ""),
    ("sand", "yellow", "pale"),
    ("snow", "white", ""),
    ("earth", "brown", ""),
    ("stones", "grey", ""),
    ("field", "yellow", "light"),
)


def _sky(chance: Chance) -> Tuple[str, str, str]:
    back = chance.pick(("sky", "clouds", "sunset", "night", "grey sky"), (6, 5, 2, 2, 2))
    if back in ("sky", "clouds"):
        colour, tone = chance.pick((("blue", "pale"), ("blue", "light"), ("turquoise", "pale")), (4, 3, 1))
        return back, colour, tone
    if back == "sunset":
        return back, chance.pick(("orange", "pink", "yellow")), "pale"
    if back == "night":
        return back, "blue", "dark"
    return "clouds", "grey", "pale"


def _plain(chance: Chance, setting: str) -> Backdrop:
    colour = chance.pick(WORDS)
    if colour in ("white", "black"):
        tone = ""
    elif colour in ("grey", "brown"):
        tone = chance.pick(("pale", "dark", "light", "deep"))
    else:
        tone = chance.pick(("pale", "dark"), (2, 1))
    if setting == "wall":
        back = chance.pick(("wall", "brick wall", "wooden wall", "tiled wall"))
    elif setting == "blur":
        back = "blur"
        if chance.yes(0.5):
            colour, tone = "green", chance.pick(("dark", "pale", "deep"))
    else:
        back = chance.pick(("plain", "gradient", "textured"))
    return Backdrop(setting, back, colour, tone)


def _main(chance: Chance, kind: str, pose: str, backdrop: Backdrop) -> Thing:
    low, high = HEIGHTS["shape" if kind in SHAPES or kind == "pattern" else kind]
    size = chance.between(low, high)
    if pose == "swim":
        size = min(size, 0.8)
    x = 0.5 + chance.between(-1, 1) * 0.28 * (1.15 - size)
    y = chance.between(0.0, 1.0)
    look = ""
    if kind == "bird":
        look = chance.pick(_BIRD_LOOKS[pose])
    elif kind in LOOKS:
        look = chance.pick(LOOKS[kind])
    beak = chance.pick(("orange", "yellow", "black", "grey", "red", "brown"), (5, 4, 4, 2, 1, 1))
    return Thing(kind, "", "", x, y, size, chance.sign(), pose, look, "", beak if kind == "bird" else "")


LOOKS: Dict[str, Tuple[str, ...]] = {
    "tree": ("round", "wide", "tall", "fir", "fir", "palm"),
    "house": ("gable", "gable", "broad"),
    "flower": ("daisy", "daisy", "daisy", "tulip", "rose", "puff"),
    "fish": ("round", "long", "oval"),
    "boat": ("sail", "sail", "ship"),
    "cat": ("front", "profile", "face"),
    "person": ("whole", "whole", "bust"),
    "pattern": PATTERNS,
}
_BIRD_LOOKS: Dict[str, Tuple[str, ...]] = {
    "branch": ("song", "song", "song", "plump", "slim", "parrot", "owl", "owl", "prey", "back"),
    "post": ("song", "plump", "slim", "owl", "prey", "back", "gull"),
    "rock": ("song", "plump", "gull", "prey", "heron", "back"),
    "ground": ("song", "plump", "slim", "hen", "heron", "gull"),
    "swim": ("duck", "duck", "swan"),
    "fly": ("side", "side", "above", "glide"),
}


def _support(chance: Chance, main: Thing) -> Thing:
    colour, tone = chance.pick(
        (("brown", ""), ("brown", "dark"), ("grey", ""), ("white", ""), ("brown", "light")), (5, 2, 3, 1, 2)
    )
    return Thing(main.pose, colour, tone, 0.0, 0.0, 0.0, 1)


_OTHERS: Dict[str, Tuple[Tuple[str, ...], float]] = {
    "air": (("sun", "moon", "bird"), 0.45),
    "land": (("tree", "house", "sun", "flower", "bird", "mountain", "person"), 0.75),
    "water": (("boat", "sun", "bird", "mountain", "moon"), 0.6),
    "under": (("fish", "weed"), 0.6),
    "room": (("cup", "flower", "ball"), 0.5),
    "plain": (("circle", "star", "square"), 0.06),
    "wall": (("circle", "heart", "star"), 0.06),
    "blur": ((), 0.0),
}


def _others(chance: Chance, main: Thing, backdrop: Backdrop) -> Tuple[Thing, ...]:
    if main.kind == "pattern":
        return ()
    kinds, share = _OTHERS[backdrop.setting]
    things: List[Thing] = []
    side = 1 if main.x < 0.5 else -1
    while len(things) < 3 and kinds and chance.yes(share if not things else share * 0.5):
        kind = chance.pick(kinds)
        if kind == main.kind and kind in ("sun", "mountain") or any(kind == thing.kind for thing in things):
            continue
        if kind in ("sun", "moon") and (backdrop.back == "night") != (kind == "moon"):
            continue
        x = 0.5 + side * chance.between(0.3, 0.44)
        side = -side
        things.append(_other(chance, kind, x, main, backdrop))
    return tuple(things)


def _other(chance: Chance, kind: str, x: float, main: Thing, backdrop: Backdrop) -> Thing:
    free = [word for word in WORDS if word not in (backdrop.back_colour, backdrop.ground_colour, "black")]
    colour = chance.pick(free)
    if kind == "sun":
        colour = chance.pick(("yellow", "orange", "red", "white"), (6, 3, 1, 1))
        colour = "yellow" if colour == backdrop.back_colour and colour != "yellow" else colour
    elif kind == "moon":
        colour = chance.pick(("white", "yellow"))
    elif kind == "tree" and chance.yes(0.75) or kind == "weed":
        colour = "green"
    elif kind == "mountain":
        colour = chance.pick(("grey", "blue", "purple", "brown"))
    place = {
        "sun": "in the corner",
        "moon": "in the corner",
        "mountain": "far away",
        "bird": "in the background",
    }.get(kind, chance.pick(("beside it", "on the left" if x < 0.5 else "on the right", "behind it")))
    look = chance.pick(LOOKS.get(kind, ("",))) if kind != "bird" else chance.pick(("side", "above"))
    look = {"bust": "whole", "face": "front"}.get(look, look)
    size = chance.between(0.7, 1.15)
    return Thing(kind, colour, "", x, chance.between(0, 1), size, chance.sign(), "", look, place)


def _faults(chance: Chance, kind: str) -> Tuple[str, ...]:
    first = chance.pick(FAULTS if kind == "bird" else FAULTS[:6])
    second = chance.pick(FAULTS[:6])
    return (first,) if first == second or chance.yes(0.5) else (first, second)
