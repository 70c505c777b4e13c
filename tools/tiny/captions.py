"""English for a planned scene: many wordings of the same content."""

from __future__ import annotations

import hashlib
import re
from typing import Callable, Dict, List, Sequence, Tuple

from tools.tiny.chance import Chance
from tools.tiny.palette import WORDS
from tools.tiny.plan import Plan, Thing

LONG = 6  # captions of this many words or more belong to one split
TEST_SHARE = 8  # one long caption in so many is the test split's
_TRIES = 400

POSITIVE = (
    "best quality",
    "extremely detailed",
    "high resolution",
    "sharp focus",
    "beautiful",
    "highly detailed",
    "masterpiece",
)
NEGATIVE = (
    "longbody",
    "lowres",
    "bad anatomy",
    "bad hands",
    "missing fingers",
    "extra digit",
    "fewer digits",
    "cropped",
    "worst quality",
    "low quality",
    "blurry",
)
_FAULT_WORDS: Dict[str, Tuple[str, ...]] = {
    "blur": ("blurry", "low quality", "worst quality"),
    "noise": ("low quality", "worst quality"),
    "blocks": ("low quality", "worst quality", "lowres"),
    "lowres": ("lowres", "low quality", "worst quality"),
    "washed": ("low quality", "worst quality"),
    "crop": ("cropped", "worst quality"),
    "longbody": ("longbody", "bad anatomy"),
    "anatomy": ("bad anatomy", "missing fingers", "bad hands", "extra digit", "fewer digits"),
}
_COLOUR_WORDS = re.compile(r"\b(?:" + "|".join(WORDS) + r")\b")
_ARTICLE = re.compile(r"\ban\b")

# Verbs of each pose: as a sentence says it, and as an addition to the subject.
_VERBS: Dict[str, Tuple[Tuple[str, str], ...]] = {
    "branch": (("sits", "sitting"), ("is perched", "perched"), ("rests", "resting"), ("is sitting", "perching")),
    "post": (("sits", "sitting"), ("stands", "standing"), ("is perched", "perched"), ("rests", "resting")),
    "rock": (("stands", "standing"), ("sits", "sitting"), ("rests", "resting")),
    "ground": (("stands", "standing"), ("walks", "walking"), ("is standing", "standing")),
    "swim": (("swims", "swimming"), ("floats", "floating"), ("is swimming", "swimming")),
    "fly": (("flies", "flying"), ("is flying", "in flight"), ("soars", "soaring"), ("glides", "gliding")),
    "tree": (("grows", "growing"), ("stands", "standing")),
    "house": (("stands", "standing"),),
    "flower": (("grows", "growing"), ("blooms", "blooming")),
    "fish": (("swims", "swimming"), ("is swimming", "swimming")),
    "boat": (("sails", "sailing"), ("floats", "floating")),
    "sun": (("shines", "shining"), ("is shining", "shining")),
    "cat": (("sits", "sitting"), ("is sitting", "sitting")),
    "cup": (("stands", "standing"),),
    "rocket": (("flies", "flying"), ("rises", "rising"), ("is flying", "flying")),
    "person": (("stands", "standing"), ("is standing", "standing")),
    "bust": (("looks at the viewer", "looking at the viewer"), ("smiles", "smiling")),
    "face": (("looks at the viewer", "looking at the viewer"), ("stares", "staring")),
    "mountain": (("rises", "rising"), ("stands", "standing")),
}
# Words before and after the noun that some looks allow.
_BEFORE: Dict[str, Tuple[str, ...]] = {
    "plump": ("plump", "round"),
    "slim": ("slim", "slender"),
    "heron": ("long-legged", "tall"),
    "swan": ("long-necked", "graceful"),
    "fir": ("pointed", "tall"),
    "tall": ("tall", "slender"),
    "wide": ("wide", "leafy"),
    "round": ("round",),
    "long": ("long",),
    "sail": ("sailing",),
}
_AFTER: Dict[str, Tuple[str, ...]] = {
    "heron": ("with long legs", "with a long beak"),
    "swan": ("with a long neck",),
    "owl": ("with big eyes", "like an owl"),
    "parrot": ("with a hooked beak", "like a parrot"),
    "prey": ("with a hooked beak", "like an eagle"),
    "back": ("with a hooked beak", "like an eagle", "seen from behind"),
    "duck": ("like a duck",),
    "hen": ("with a comb", "like a hen"),
    "side": ("with raised wings", "with open wings"),
    "above": ("with spread wings", "with open wings"),
    "glide": ("with spread wings", "with wide wings"),
    "sail": ("with white sails", "with a sail"),
    "gable": ("with a door and windows",),
    "face": ("seen from near",),
    "puff": ("with fine threads",),
    "daisy": ("with many petals",),
}
_PATTERN_NOUNS: Dict[str, Tuple[str, ...]] = {
    "mosaic": ("a mosaic", "a stained glass mosaic", "a mosaic of tiles"),
    "marble": ("marble", "veined marble", "a marble surface"),
    "camouflage": ("camouflage", "a camouflage pattern"),
    "polygons": ("polygons", "overlapping polygons"),
    "stripes": ("stripes", "a pattern of stripes"),
    "bricks": ("bricks", "a wall of bricks"),
    "leaves": ("leaves", "a heap of leaves"),
    "pebbles": ("pebbles", "many pebbles"),
    "grass": ("grass", "blades of grass"),
    "feathers": ("feathers", "rows of feathers"),
    "fur": ("fur", "soft fur"),
}
_MEDIA = (
    "a photo of",
    "a picture of",
    "a painting of",
    "an image of",
    "a drawing of",
    "a close view of",
    "a photograph of",
    "an illustration of",
)


def split_of(caption: str) -> str:
    """The split that a long caption belongs to, "train" or "test".

    Colour words are all one in the hash, so that a scene keeps its wording and its split whatever colour it is asked
    for.
    """
    text = _ARTICLE.sub("a", _COLOUR_WORDS.sub("colour", caption))
    return "test" if hashlib.sha256(text.encode("utf-8")).digest()[0] % TEST_SHARE == 0 else "train"


def fits(caption: str, split: str) -> bool:
    """Whether a caption may be used in a split; short ones may in both."""
    return len(caption.split()) < LONG or split_of(caption) == split


def captions_of(plan: Plan) -> Tuple[str, ...]:
    """At least four wordings of a plan, the full one first and the barest last, all fit for its split."""
    chance = Chance(plan.seed, plan.split, plan.index, "words")
    makers: Sequence[Callable[[Plan, Chance], str]]
    if plan.main.kind == "pattern":
        makers, bare = (_pattern_full, _pattern_full, _pattern_medium, _pattern_short, _pattern_bare), _pattern_short
    else:
        makers, bare = (_full, _full, _medium, _medium, _named, _bare), _named
    bodies: List[str] = []
    for maker in makers:
        for _ in range(_TRIES):
            body = maker(plan, chance)
            if fits(body, plan.split) and not _too_short(body, maker, plan.split, chance):
                break
        else:
            body = bare(plan, chance)
        bodies.append(body)
    return _with_quality(plan, chance, bodies)


def _too_short(body: str, maker: Callable[[Plan, Chance], str], split: str, chance: Chance) -> bool:
    """Whether to try again, lest the test split, which refuses most long captions, be left with short ones."""
    if split != "test" or maker not in (_full, _medium, _pattern_full, _pattern_medium) or len(body.split()) >= LONG:
        return False
    return not chance.yes(1.0 / TEST_SHARE)


def _with_quality(plan: Plan, chance: Chance, bodies: List[str]) -> Tuple[str, ...]:
    """Words of quality on some captions of clean training scenes, and of its faults on all of a degraded one."""
    if plan.faults:
        return tuple(body + ", " + ", ".join(_negatives(plan, chance)) for body in bodies)
    if plan.split != "train" or chance.yes(0.5):
        return tuple(bodies)
    marked = [body + ", " + ", ".join(_positives(chance)) if chance.yes(0.5) else body for body in bodies]
    if marked == bodies:
        marked[-1] += ", best quality, extremely detailed"
    return tuple(marked)


def _positives(chance: Chance) -> List[str]:
    if chance.yes(0.5):
        return list(POSITIVE[:2])
    first, second = chance.pick(POSITIVE), chance.pick(POSITIVE)
    return [first] if first == second else [first, second]


def _negatives(plan: Plan, chance: Chance) -> List[str]:
    if chance.yes(0.25):
        return list(NEGATIVE[: 10 if chance.yes(0.5) else 5])
    fitting = [word for fault in plan.faults for word in _FAULT_WORDS[fault]]
    chosen = {chance.pick(fitting)}
    chosen.update(word for word in fitting if chance.yes(0.5))
    chosen.update(word for word in NEGATIVE if chance.yes(0.12))
    return [word for word in NEGATIVE if word in chosen]


def _an(words: str) -> str:
    return ("an " if words[:1] in "aeiou" else "a ") + words


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part).replace(" ,", ",")


def _subject(plan: Plan, chance: Chance, colour: float = 0.86) -> str:
    main = plan.main
    before: List[str] = []
    if chance.yes(0.3):
        sizes = ("small", "little", "tiny") if main.size < 0.45 else ("big", "large") if main.size > 0.7 else ()
        if sizes:
            before.append(chance.pick(sizes))
    if main.look in _BEFORE and chance.yes(0.3):
        before.append(chance.pick(_BEFORE[main.look]))
    named, after = chance.yes(colour), ""
    if main.kind == "person":
        dress = _join("in", chance.pick((main.colour, _an(main.colour + " coat"), _join(main.colour, "clothes"))))
        return _join(_an(" ".join([*before, "person"])), dress if named else "")
    if main.look in _AFTER and chance.yes(0.2):
        after = chance.pick(_AFTER[main.look])
    elif main.detail and chance.yes(0.12):
        after = "with " + _an(main.detail + " beak")
    words = [*before, main.colour, main.kind] if named else [*before, main.kind]
    return _join(_an(" ".join(words)), after)


def _verbs(main: Thing) -> Tuple[Tuple[str, str], ...]:
    key = main.look if main.look in ("bust", "face") else main.pose or main.kind
    return _VERBS.get(key, (("is", ""),))


def _where(plan: Plan, chance: Chance) -> str:
    """What the main object is on or in, "" for nothing to tell."""
    main, back = plan.main, plan.backdrop
    if plan.support is not None:
        nouns = {
            "branch": ("branch", "twig", "branch of a tree"),
            "post": ("post", "wooden post", "pole"),
            "rock": ("rock", "stone", "boulder"),
        }
        tone = plan.support.tone if chance.yes(0.5) else ""
        colour = plan.support.colour if chance.yes(0.65) else ""
        return "on " + _an(_join(tone, colour, chance.pick(nouns[plan.support.kind])))
    if not back.ground or main.kind == "sun" or main.pose == "fly" or main.look in ("bust", "face"):
        return ""
    if main.kind in ("mountain", "rocket"):
        return ("behind " if main.kind == "mountain" else "above ") + _ground(plan, chance)
    return "on " + _ground(plan, chance)


def _ground(plan: Plan, chance: Chance) -> str:
    back = plan.backdrop
    colour = _join(back.ground_tone, back.ground_colour) if chance.yes(0.7) else ""
    if back.ground in ("table", "floor", "field"):
        return _an(_join(colour, back.ground))
    nouns = {
        "grass": ("grass", "grass", "a lawn"),
        "water": ("water", "water", "the water"),
        "sand": ("sand", "sand", "sandy ground"),
        "earth": ("earth", "ground"),
        "stones": ("stones", "stony ground"),
        "snow": ("snow",),
    }
    noun = chance.pick(nouns[back.ground])
    if noun.startswith("a "):
        return _an(_join(colour, noun[2:]))
    return _join("the", colour, noun[4:]) if noun.startswith("the ") else _join(colour, noun)


def _behind(plan: Plan, chance: Chance) -> str:
    back = plan.backdrop
    colour = _join(back.back_tone, back.back_colour)
    if back.back in ("plain", "gradient", "textured"):
        kind = {"plain": ("plain", "", ""), "gradient": ("", "smooth", ""), "textured": ("textured", "rough", "")}
        ground = _an(_join(chance.pick(kind[back.back]), colour, "background"))
        return _join(chance.pick(("on", "against", "in front of", "with")), ground)
    if "wall" in back.back:
        return _join(chance.pick(("in front of", "against")), _an(_join(colour, back.back)))
    if back.back == "blur":
        word = chance.pick(("blurred", "soft", "blurred"))
        return _join(chance.pick(("with", "against", "in front of")), _an(_join(word, colour, "background")))
    if back.back == "water":
        return chance.pick(
            (_join("in", colour, "water"), _join("under", colour, "water"), _join("in the", colour, "sea"))
        )
    return _sky(plan, chance, colour)


def _sky(plan: Plan, chance: Chance, colour: str) -> str:
    back = plan.backdrop
    inside = plan.main.pose == "fly" or plan.main.kind in ("sun", "rocket")
    lead = "in" if inside else chance.pick(("under", "in front of", "below"))
    if back.back == "night":
        return chance.pick(("at night", "in the dark night", _join(lead, "a dark blue night sky")))
    if back.back == "sunset":
        return chance.pick((_join(lead, _an(_join(colour, "sky"))), "at sunset", "in the evening"))
    kinds = ("cloudy", "cloudy", "") if back.back == "clouds" else ("clear", "", "")
    return _join(lead, _an(_join(chance.pick(kinds), colour, "sky")))


def _company(plan: Plan, chance: Chance) -> str:
    if not plan.others or chance.yes(0.12):
        return ""
    parts = [_other(thing, plan, chance) for thing in plan.others]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return chance.pick((", with ", " with ", ", and ")) + listed


def _other(thing: Thing, plan: Plan, chance: Chance) -> str:
    place = thing.place if chance.yes(0.6) else ""
    colour = thing.colour if chance.yes(0.7) else ""
    article = "another" if thing.kind == plan.main.kind and chance.yes(0.7) else ""
    if thing.kind == "person":
        return _join(article or "a", "person", "in " + colour if colour else "", place)
    if thing.kind == "weed":
        return _join(colour, "weed", place)
    words = _join(colour, thing.kind)
    return _join(_join(article, words) if article else _an(words), place)


def _full(plan: Plan, chance: Chance) -> str:
    subject, where = _subject(plan, chance), _where(plan, chance)
    behind = _behind(plan, chance) if chance.yes(0.92) else ""
    company = _company(plan, chance)
    verb, participle = chance.pick(_verbs(plan.main))
    form = chance.whole(0, 7)
    if form in (0, 1) and (where or behind):
        body = _join(subject, verb, where, behind)
    elif form == 2:
        body = _join(chance.pick(_MEDIA), subject, participle, where, behind)
    elif form == 3:
        body = _join("there is", subject, participle, where, behind)
    elif form == 4 and behind and where:
        body = _join(behind + ",", subject, verb, where)
    elif form == 5 and behind:
        body = _join(behind, "there is", subject, where)
    elif form == 6 and where and behind:
        body = _join(where, "there is", subject, behind)
    elif form == 7 and behind:
        body = _join(subject, participle, where + "," if where else "", behind)
    else:
        body = _join(subject, participle, where, behind)
    return body + company


def _medium(plan: Plan, chance: Chance) -> str:
    subject, where = _subject(plan, chance, 0.9), _where(plan, chance)
    _, participle = chance.pick(_verbs(plan.main))
    form = chance.whole(0, 3)
    if form == 0 and where:
        return _join(subject, participle, where)
    if form == 1 and participle:
        return _join(subject, participle)
    if form == 2:
        return _join(chance.pick(_MEDIA), subject)
    return _join(subject, _behind(plan, chance))


def _named(plan: Plan, chance: Chance) -> str:
    if plan.main.kind == "person":
        return _join("a person in", plan.main.colour)
    return _an(_join(plan.main.colour, plan.main.kind))


def _bare(plan: Plan, chance: Chance) -> str:
    return _an(plan.main.kind)


def _pattern_full(plan: Plan, chance: Chance) -> str:
    ending = (
        "",
        "",
        "with many pieces",
        "of many small parts",
        "seen from near",
        "filling the picture",
        "side by side",
    )
    body = _pattern_medium(plan, chance)
    many = plan.main.look.endswith("s") and plan.main.look != "grass" and not body.startswith(("a ", "an "))
    leads = ("", chance.pick(_MEDIA), "there are" if many else "there is", "a background of")
    return _join(chance.pick(leads) if chance.yes(0.7) else "", body, chance.pick(ending))


def _pattern_medium(plan: Plan, chance: Chance) -> str:
    first, second = plan.main.colour, plan.second
    noun = chance.pick(_PATTERN_NOUNS[plan.main.look])
    form = chance.whole(0, 3)
    if form == 0:
        return _join(noun, "in", first, "and", second)
    if form == 1:
        return _join(noun, "with", first, "and", second)
    article, bare = ("a ", noun[2:]) if noun.startswith("a ") else ("", noun)
    if form == 2:
        return article + _join(first, "and", second, bare) if not article else _an(_join(first, "and", second, bare))
    return _an(_join(first, bare)) if article else _join(first, bare)


def _pattern_short(plan: Plan, chance: Chance) -> str:
    words = _join(plan.main.colour, plan.main.look)
    return _an(words) if plan.main.look == "mosaic" else words


def _pattern_bare(plan: Plan, chance: Chance) -> str:
    return _an(plan.main.look) if plan.main.look == "mosaic" else plan.main.look
