"""The generator of captioned scenes: pure, split, coloured as it says, and with edges as pictures have."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import List

import cv2
import numpy as np
import pytest

from tools.tiny.captions import NEGATIVE, POSITIVE, captions_of, split_of
from tools.tiny.palette import COLOURS, HUES, WORDS, hue_distance, paint
from tools.tiny.plan import KIND_WEIGHTS, LOOKS, plan_scene
from tools.tiny.scenes import HEIGHT, SEED, WIDTH, Scene, all_captions, make_scene
from tools.tiny.textures import tile

ROOT = Path(__file__).resolve().parent.parent
CONTEST = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)
_PRINT = """
import hashlib, sys
from tools.tiny.scenes import make_scene
for text in sys.argv[1:]:
    index, split = text.split(":")
    scene = make_scene(int(index), split)
    print(hashlib.sha256(scene.image.tobytes() + scene.mask.tobytes() + repr(scene.captions).encode()).hexdigest())
"""


def _digest(scene: Scene) -> str:
    content = scene.image.tobytes() + scene.mask.tobytes() + repr(scene.captions).encode()
    return hashlib.sha256(content).hexdigest()


def _edges(image: np.ndarray) -> np.ndarray:
    return cv2.Canny(image, 100, 200) > 0


def _near(edges: np.ndarray, others: np.ndarray) -> float:
    """Share of edge pixels with one of the others within 2 pixels."""
    wide = cv2.dilate(others.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    return float((edges & wide).sum() / max(edges.sum(), 1))


@pytest.fixture(scope="module")
def scenes() -> List[Scene]:
    return [make_scene(index) for index in range(150)]


@pytest.fixture(scope="module")
def held_out() -> List[Scene]:
    return [make_scene(index, "test") for index in range(80)]


def test_scene_has_the_stated_form(scenes: List[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (HEIGHT, WIDTH, 3) and scene.image.dtype == np.uint8
        assert scene.mask.shape == (HEIGHT, WIDTH) and scene.mask.dtype == bool
        assert len(scene.captions) >= 4 and scene.captions[0] == scene.caption
        assert scene.colour in WORDS


def test_same_arguments_give_the_same_scene_in_any_process_and_order() -> None:
    wanted = [(31, "test"), (4, "train"), (17, "train"), (4, "test")]
    here = [_digest(make_scene(index, split)) for index, split in wanted]
    names = [f"{index}:{split}" for index, split in reversed(wanted)]
    done = subprocess.run([sys.executable, "-c", _PRINT, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == here[::-1]


def test_index_split_and_seed_each_change_the_scene() -> None:
    digests = {_digest(make_scene(*arguments)) for arguments in ((0,), (1,), (0, "test"), (0, "train", None, SEED + 1))}
    assert len(digests) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [((-1,), "0 or more"), ((0, "validation"), "unknown split"), ((0, "train", "mauve"), "unknown colour")],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scene(*arguments)


def test_unknown_paint_tone_and_texture_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown colour"):
        paint("mauve")
    with pytest.raises(ValueError, match="unknown tone"):
        paint("red", tone="loud")
    with pytest.raises(ValueError, match="unknown texture"):
        tile("velvet")


def test_captions_need_no_drawing(scenes: List[Scene]) -> None:
    drawn = [caption for scene in scenes[:20] for caption in scene.captions]
    assert list(all_captions(20)) == drawn


def test_long_captions_belong_to_one_split() -> None:
    train = {caption for caption in all_captions(3000) if len(caption.split()) >= 6}
    test = {caption for caption in all_captions(400, "test") if len(caption.split()) >= 6}
    assert len(test) > 400 and len(train) > 4000
    assert not train & test
    assert all(split_of(caption) == "test" for caption in test)


def test_split_hash_is_the_same_for_every_colour() -> None:
    assert len({split_of(f"a {word} bird on an {word} branch") for word in WORDS}) == 1


def test_colour_changes_only_the_main_object_and_its_word() -> None:
    shares = []
    for index in range(24):
        own = make_scene(index, "test")
        if own.kind == "pattern":
            continue  # its second colour may be the one asked for, and then regions run together
        # A cap or belly of another colour lies upon the object, and its soft rim lets a little colour through.
        coloured = cv2.dilate(own.mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        around = cv2.dilate(own.mask.astype(np.uint8), np.ones((61, 61), np.uint8)) > 0
        for colour in ("red", "green", "blue", "pink"):
            other = make_scene(index, "test", colour)
            assert other.colour == colour and other.kind == own.kind
            np.testing.assert_array_equal(other.mask, own.mask)
            changed = (other.image != own.image).any(axis=2)
            assert not changed[~around].any()
            assert np.mean(changed & ~coloured) < 0.002
            for first, second in zip(own.captions, other.captions):
                assert _plain(first) == _plain(second)
                assert colour in second or first == second
            edges, wanted = _edges(other.image), _edges(own.image)
            shares += [_near(edges, wanted), _near(wanted, edges)]
    assert np.mean(shares) > 0.95
    assert min(shares) > 0.6


def _plain(caption: str) -> str:
    """A caption without its colours."""
    text = re.sub(r"\b(" + "|".join(WORDS) + r")\b", "colour", caption)
    return re.sub(r"\ban\b", "a", text)


@pytest.mark.parametrize("colour", COLOURS)
def test_hue_of_the_mask_is_the_words(colour: str) -> None:
    for index in range(16):
        scene = make_scene(index, "test", colour)
        hsv = cv2.cvtColor(scene.image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[scene.mask]
        turned = (hsv[:, 0] - HUES[colour] + 180) % 360 - 180
        assert abs(np.median(turned)) < 8
        clear = hsv[:, 2] > 0.15  # in near-black lines a hue is rounding
        assert np.mean(np.abs(turned[clear]) < 20) > 0.85


def test_hues_stand_apart() -> None:
    for first in COLOURS:
        assert hue_distance(paint(first).hue, HUES[first]) == 0
        assert all(hue_distance(HUES[first], HUES[second]) >= 25 for second in COLOURS if second != first)


def test_masks_are_of_reasonable_size(held_out: List[Scene]) -> None:
    shares = [scene.mask.mean() for scene in held_out]
    assert min(shares) > 0.008
    assert 0.06 < np.median(shares) < 0.3


def test_edges_range_from_few_to_as_dense_as_photographs(scenes: List[Scene], held_out: List[Scene]) -> None:
    clean = [scene for scene in scenes if not scene.degraded] + held_out
    density = np.array([_edges(scene.image).mean() for scene in clean])
    assert density.min() > 0.002 and density.max() < 0.25
    assert 0.02 < np.median(density) < 0.06
    assert np.mean(density < 0.015) > 0.05 and np.mean(density > 0.05) > 0.15 and np.mean(density > 0.08) > 0.04


def test_main_objects_are_outlined_in_every_colour() -> None:
    """Most of the border of the coloured part lies on an edge, whatever the colour."""
    for colour in COLOURS:
        shares = []
        for index in range(12):
            scene = make_scene(index, "test", colour)
            if scene.kind == "pattern":
                continue
            mask = scene.mask.astype(np.uint8)
            border = (mask - cv2.erode(mask, np.ones((3, 3), np.uint8))) > 0
            shares.append(_near(border, _edges(scene.image)))
        assert np.mean(shares) > 0.9


def test_kinds_have_their_shares() -> None:
    kinds = Counter(plan_scene(index, "train", None, SEED).main.kind for index in range(4000))
    assert 0.37 < kinds["bird"] / 4000 < 0.43
    assert 0.14 < kinds["pattern"] / 4000 < 0.2
    assert set(kinds) == set(KIND_WEIGHTS)


def test_captions_keep_the_grammar() -> None:
    colour_words = named = 0
    for index in range(1500):
        plan = plan_scene(index, "train", None, SEED)
        captions = captions_of(plan)
        assert len(captions) >= 4
        word = plan.main.look if plan.main.kind == "pattern" else plan.main.kind
        for caption in captions:
            assert caption == caption.lower() == caption.strip()
            assert len(caption.split()) < 60
            assert "  " not in caption and " ," not in caption and not caption.endswith(",")
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\b(a|an) (a|an)\b", caption), caption
            assert re.search(rf"\b{word.rstrip('s')}", caption), caption
        colour_words += plan.main.colour in captions[0]
        named += any(plan.main.colour in caption.split(",")[0] for caption in captions)
    assert colour_words / 1500 > 0.8
    assert named == 1500


def test_captions_name_no_colour_outside_the_palette() -> None:
    others = ("violet", "cyan", "magenta", "golden", "silver", "beige", "crimson", "scarlet", "navy", "teal", "gold")
    text = " ".join(all_captions(800))
    assert not re.search(r"\b(" + "|".join(others) + r")\b", text)


def test_negative_words_stand_on_degraded_scenes_only() -> None:
    degraded = 0
    for index in range(2000):
        plan = plan_scene(index, "train", None, SEED)
        for caption in captions_of(plan):
            tail = caption.split(", ")
            assert any(word in tail for word in NEGATIVE) == bool(plan.faults), caption
            assert not (plan.faults and any(word in tail for word in POSITIVE))
        degraded += bool(plan.faults)
    assert 0.09 < degraded / 2000 < 0.15
    for caption in all_captions(300, "test"):
        assert not any(word in caption for word in NEGATIVE + POSITIVE)
    assert not any(plan_scene(index, "test", None, SEED).faults for index in range(300))


def test_words_of_the_contest_are_covered() -> None:
    captions = list(all_captions(3000))
    assert "a bird" in captions
    assert "a bird, best quality, extremely detailed" in captions
    assert any(caption.endswith(CONTEST) for caption in captions)
    assert any(caption.endswith("longbody, lowres, bad anatomy, bad hands, missing fingers") for caption in captions)
    marked = sum(any(word in caption for caption in make for word in POSITIVE) for make in _groups(1000))
    assert 0.35 < marked / 1000 < 0.55  # half of the clean ones


def _groups(count: int) -> List[tuple]:
    return [captions_of(plan_scene(index, "train", None, SEED)) for index in range(count)]


def test_every_pattern_and_bird_can_be_drawn() -> None:
    missing = {("pattern", look) for look in LOOKS["pattern"]} | {("bird", pose) for pose in ("swim", "fly", "ground")}
    for index in range(2000):
        main = plan_scene(index, "train", None, SEED).main
        key = (main.kind, main.pose if main.kind == "bird" else main.look)
        if key in missing:
            missing.remove(key)
            assert make_scene(index).image.std() > 2
        if not missing:
            return
    raise AssertionError(f"not met in 2000 scenes: {missing}")
