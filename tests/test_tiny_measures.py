"""The tiny model's measures against counting by hand and brute force; its sampler against the reference pipeline."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from typing import Any, List

import cv2
import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.reference import Reference
from cldm.request import Request
from cldm.tokenizer import Tokenizer
from cldm.weights import Weights
from scoring.metrics import error_stats, psnr
from scoring.sheet import GAP, HEADER, image_grid
from tests.micro_model import write_micro
from tests.small_model import small_config
from tools import measure_tiny, tiny_sheet
from tools.tiny.measures import (
    EdgeMatch,
    derangement,
    dominant_hue,
    edge_recall_precision,
    find_edges,
    match_edges,
    mean_and_error,
    mean_difference,
    nearest_colour,
    others_of_kind,
    sharpness,
    variety,
)
from tools.tiny.palette import COLOURS, HUES
from tools.tiny.report import Report, Row, confusion_table
from tools.tiny.sampling import ADDED_PROMPT, NEGATIVE_PROMPT, Sampler, generate
from tools.tiny.scenes import Scene, make_scene

# --- edges


def edge_map(*points: Any, shape: Any = (24, 32)) -> np.ndarray:
    edges = np.zeros(shape, np.uint8)
    for y, x in points:
        edges[y, x] = 255
    return edges


@pytest.mark.parametrize(
    "offset, near", [((0, 2), True), ((2, 0), True), ((1, 1), True), ((2, 1), False), ((2, 2), False), ((0, 3), False)]
)
def test_edges_match_within_the_radius_inclusive(offset, near):
    control, output = edge_map((10, 10)), edge_map((10 + offset[0], 10 + offset[1]))
    assert edge_recall_precision(control, output, radius=2) == (float(near), float(near))


def test_edge_recall_and_precision_by_hand():
    control = edge_map((5, 5), (5, 6), (15, 20), (15, 21))
    output = edge_map((6, 5), (2, 28), (3, 28))
    # (6, 5) is near both of the first pair; nothing is near the second pair or the output's other two.
    assert match_edges(control, output) == EdgeMatch(found=2, control=4, right=1, output=3)
    assert edge_recall_precision(control, output) == (0.5, pytest.approx(1 / 3))


@pytest.mark.parametrize("radius", [1, 2, 3.5])
def test_edges_match_as_in_brute_force(radius):
    rng = np.random.default_rng(4)
    control, output = (((rng.random((37, 41)) < p) * 255).astype(np.uint8) for p in (0.03, 0.02))

    def share(of: np.ndarray, among: np.ndarray) -> float:
        distances = np.linalg.norm(np.argwhere(of)[:, None] - np.argwhere(among)[None], axis=2)
        return float((distances.min(axis=1) <= radius).mean())

    assert edge_recall_precision(control, output, radius) == (share(control, output), share(output, control))


def test_empty_edge_maps():
    empty, some = edge_map(), edge_map((3, 3), (4, 4))
    assert edge_recall_precision(empty, empty) == (1.0, 1.0)
    assert edge_recall_precision(some, empty) == (0.0, 0.0)
    assert edge_recall_precision(empty, some) == (0.0, 0.0)
    assert match_edges(some, empty) + match_edges(empty, some) == EdgeMatch(0, 2, 0, 2)


def test_edge_matches_pool_their_pixels():
    pooled = EdgeMatch(9, 10, 1, 2) + EdgeMatch(0, 30, 3, 18)
    assert (pooled.recall, pooled.precision) == (9 / 40, 4 / 20)


def test_edge_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        match_edges(edge_map(), edge_map(shape=(24, 33)))


# --- colours


@pytest.mark.parametrize("word", COLOURS)
def test_each_word_is_nearest_to_its_own_hue_in_light_and_shade(word):
    hsv = np.zeros((20, 30, 3), np.float32)
    hsv[..., 0] = HUES[word]
    hsv[..., 1] = 0.7
    hsv[..., 2] = np.linspace(0.4, 1.0, 30)  # shade
    image = np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    image[:, :6] = 128  # a grey fifth
    hue = dominant_hue(image, np.ones((20, 30), bool))
    assert abs((hue - HUES[word] + 180) % 360 - 180) <= 2
    assert nearest_colour(hue) == word


def test_dominant_hue_looks_at_the_mask_only_and_wraps_around():
    image = np.zeros((10, 10, 3), np.uint8)
    image[:] = (0, 0, 255)
    mask = np.zeros((10, 10), bool)
    mask[:4] = True
    image[:2] = (255, 0, 30)  # 353 degrees
    image[2:4] = (255, 30, 0)  # 7 degrees
    hue = dominant_hue(image, mask)
    assert min(hue, 360 - hue) <= 8 and nearest_colour(hue) == "red"
    assert nearest_colour(dominant_hue(image, ~mask)) == "blue"
    assert nearest_colour(dominant_hue(image, np.ones((10, 10), bool))) == "blue"


def test_grey_has_no_hue_and_bad_masks_are_refused():
    grey = np.full((8, 8, 3), 90, np.uint8)
    assert dominant_hue(grey, np.ones((8, 8), bool)) is None
    assert nearest_colour(None) is None
    with pytest.raises(ValueError, match="empty"):
        dominant_hue(grey, np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="does not belong"):
        dominant_hue(grey, np.ones((8, 9), bool))


def test_drawn_scenes_have_the_colours_that_they_were_asked_for():
    cases = [(i, word) for i in range(4) for word in COLOURS]
    scenes = [make_scene(i, "test", colour=word) for i, word in cases]
    chosen = [(s, word) for s, (_, word) in zip(scenes, cases) if s.mask.mean() > measure_tiny.SMALLEST_OBJECT]
    assert len(chosen) >= 16
    right = [nearest_colour(dominant_hue(s.image, s.mask)) == word for s, word in chosen]
    assert np.mean(right) >= 0.9


# --- variety, sharpness, statistics


def test_variety_against_brute_force_inside_and_outside_a_mask():
    images = np.random.default_rng(5).integers(0, 256, (4, 6, 7, 3), dtype=np.uint8)
    mask = np.arange(42).reshape(6, 7) % 3 == 0
    whole = [np.abs(a.astype(int) - b.astype(int)) for a, b in itertools.combinations(images, 2)]
    assert variety(images) == pytest.approx(np.mean(whole))
    assert variety(images, mask) == pytest.approx(np.mean([d[mask] for d in whole]))
    assert variety(np.stack([images[0]] * 3)) == 0
    assert mean_difference(images[0], 255 - images[0]) == mean_difference(255 - images[0], images[0])
    with pytest.raises(ValueError, match="got 1"):
        variety(images[:1])
    with pytest.raises(ValueError, match="empty"):
        variety(images, mask & ~mask)


def test_sharpness_of_a_ramp_and_of_its_blur():
    ramp = np.repeat(np.tile(np.arange(0, 120, 3, dtype=np.uint8), (20, 1))[:, :, None], 3, axis=2)
    assert sharpness(ramp) == pytest.approx(3.0)
    noise = np.random.default_rng(6).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert sharpness(cv2.GaussianBlur(noise, (0, 0), 2)) < 0.5 * sharpness(noise)


def test_derangements_move_everything():
    for number in (2, 3, 17):
        order = derangement(number, seed=number)
        assert sorted(order) == list(range(number))
        assert (order != np.arange(number)).all()
    assert (derangement(17, 1) == derangement(17, 1)).all()
    with pytest.raises(ValueError, match="at least 2"):
        derangement(1)


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(np.sqrt(14 / 3 / 4)))
    assert mean_and_error([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="nothing"):
        mean_and_error([])


# --- report


def test_rows_say_whether_their_limits_are_kept():
    assert Row("s", "n", 70.0, at_least=70).passed is True
    assert Row("s", "n", 69.9, at_least=70).passed is False
    assert Row("s", "n", 1.3, at_most=1.25).passed is False
    assert Row("s", "n", float("nan"), at_least=0).passed is False
    assert Row("s", "n", 1.0).passed is None


def test_report_pools_pixels_and_averages_images(tmp_path):
    report = Report({"model": "x"})
    report.add_edges("edges", "two", [EdgeMatch(9, 10, 1, 1), EdgeMatch(0, 30, 1, 1)], 70, 60)
    assert [(row.value, row.passed) for row in report.rows] == [
        (22.5, False),
        (pytest.approx(45.0), False),
        (100.0, True),
        (100.0, True),
    ]
    assert len(report.missed) == 2 and report.table().count("MISSED") == 2
    assert report.limits == 4 and {row.note for row in report.rows} == {"2 pictures"}
    assert [report.rows[0].asked, report.rows[0].reached] == [">= 70 %", "22.5 %"]
    report.write(tmp_path)
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["passed"] for row in rows] == [False, False, True, True]


def test_confusion_table_counts_by_row():
    text = confusion_table(np.array([[3, 0, 1], [0, 0, 0]]), ["red", "blue"])
    lines = [line.split() for line in text.splitlines()]
    assert lines == [["asked", "red", "blue", "grey", "right"], ["red", "3", "0", "1", "75", "%"], ["blue", *"000-"]]


def test_image_grid_scales_cells_and_refuses_ragged_rows():
    big, small = np.zeros((64, 96, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)
    sheet = image_grid(["a", "b"], ["one", "two"], [[big, small], [small, big]], cell_width=48)
    assert sheet.shape == (HEADER + 2 * (HEADER + 32), 2 * 48 + 3 * GAP, 3)
    for rows in ([], [[big]], [[big, big]] * 2):
        with pytest.raises(ValueError, match="rows of 2 images"):
            image_grid(["a", "b"], ["one"], rows)


# --- sampling

SIZE = (64, 128)
PROMPTS = ("a red bird", "a blue boat under a pale sky", "a tree")


@pytest.fixture(scope="module")
def small():
    """A small model with a strong control, its tokenizer, and three pictures with their edges."""
    config = small_config()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=4096))
    model = load_model(config, Weights(None, 7, ""))
    pictures = [cv2.resize(make_scene(i, "test").image, SIZE[::-1]) for i in range(3)]
    return model, Tokenizer(config), pictures, np.stack([find_edges(p) for p in pictures])


def reference_images(small: Any, **options: Any) -> List[Any]:
    model, tokenizer, pictures, _ = small
    reference = Reference(model, tokenizer, "test", "cpu")
    results = []
    for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS)):
        own = {key: value[i] if isinstance(value, tuple) else value for key, value in options.items()}
        request = Request(prompt, ADDED_PROMPT, NEGATIVE_PROMPT, image_resolution=64, ddim_steps=3, seed=100 + i, **own)
        results.append(reference.generate(picture, request))
    return results


@pytest.mark.parametrize(
    "options, same",
    [
        ({}, {}),
        ({"strength": 0.0}, {"strength": 0.0}),
        ({"guess_mode": True, "guidance": 4.0}, {"guess_mode": True, "guidance_scale": 4.0}),
        ({"strength": (0.0, 0.5, 1.5), "guidance": (1.0, 5.0, 9.0)},) * 2,
    ],
    ids=["plain", "strength 0", "guess mode", "each its own"],
)
def test_batches_hold_what_the_reference_makes_one_by_one(small, options, same):
    model, tokenizer, _, canny = small
    same = {"guidance_scale" if key == "guidance" else key: value for key, value in same.items()}
    expected = reference_images(small, **same)
    assert all((result.canny == edges).all() for result, edges in zip(expected, canny))
    images, latents = generate(model, tokenizer, canny, PROMPTS, seeds=[100, 101, 102], steps=3, batch=2, **options)
    assert images.shape == (3, *SIZE, 3) and images.dtype == np.uint8
    assert latents.shape == (3, 4, SIZE[0] // 8, SIZE[1] // 8) and latents.dtype == np.float32
    for image, latent, result in zip(images, latents, expected):
        assert error_stats(latent, result.latent[0]).relative < 1e-4
        assert np.abs(image.astype(int) - result.images[0]).max() <= 1


def test_edges_reach_the_picture_with_strength_only(small):
    model, tokenizer, _, canny = small
    sampler = Sampler(model, tokenizer)
    for strength, differs in ((1.0, True), (0.0, False)):
        runs = [sampler.generate(c, "a bird", "", 5, strength=strength, steps=2)[1] for c in (canny[:1], canny[1:2])]
        assert (error_stats(*runs).relative > 1e-3) == differs


def test_half_precision_is_near_and_leaves_the_model_as_it_was(small):
    model, tokenizer, _, canny = small
    exact = generate(model, tokenizer, canny[:1], PROMPTS[:1], steps=2)
    half = generate(model, tokenizer, canny[:1], PROMPTS[:1], steps=2, dtype=torch.bfloat16)
    assert 0 < error_stats(half[1], exact[1]).relative < 0.1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_reconstruction_is_encoding_and_decoding(small):
    model, tokenizer, pictures, _ = small
    again = Sampler(model, tokenizer, batch=2).reconstruct(np.stack(pictures))
    pixels = torch.from_numpy(pictures[2]).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, _ = model.first_stage_model.encode(pixels)
    image = model.decode(mean * model.config.autoencoder.scale_factor)[0].permute(1, 2, 0) * 127.5 + 127.5
    assert psnr(again[2], image.clamp(0, 255).numpy().astype(np.uint8)) > 50


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ["a", "b"]}, "prompts: 2 values for 3 images"),
        ({"seeds": [1]}, "seeds: 1 values"),
        ({"strength": [1.0, 2.0]}, "strength: 2 values"),
        ({"seeds": -1}, "seeds must be 0 or more"),
        ({"steps": 0}, "ddim_steps"),
        ({"batch": 0}, "batch"),
        ({"canny": np.zeros((3, 60, 128), np.uint8)}, "multiples of"),
        ({"canny": np.zeros((64, 96), np.uint8)}, "N x H x W"),
    ],
)
def test_bad_sampling_arguments_are_named(small, change, message):
    model, tokenizer, _, canny = small
    arguments = {"canny": canny, "prompts": "a", **change}
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, arguments.pop("canny"), arguments.pop("prompts"), **arguments)


# --- commands


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only", "edges,wrods"], "wrods"),
        (["--only", ","], "nothing"),
        (["--scenes", "1"], "at least 2"),
        (["--batch", "0"], "--batch"),
        (["--steps", "0"], "ddim_steps"),
        (["--guidance", "1000"], "guidance_scale"),
    ],
)
def test_measure_tiny_refuses_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        measure_tiny.main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_measure_tiny_says_what_is_missing(tmp_path, capsys):
    assert measure_tiny.main(["--weights", str(tmp_path / "none.safetensors"), "--output", str(tmp_path)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    (tmp_path / "pictures").mkdir()
    arguments = ["--pictures", str(tmp_path / "pictures"), "--only", "photographs", "--output", str(tmp_path)]
    assert measure_tiny.main(arguments) == 2
    assert str(tmp_path / "pictures") in capsys.readouterr().err


class Painter:
    """Stands in for the sampler: pictures whose edges are those of a square that the seed places.

    With `leaking` control, the picture at strength 0 has the square that is given as edges.
    """

    def __init__(self, leaking: bool = False) -> None:
        self.leaking = leaking

    def generate(self, canny: np.ndarray, prompts: Any, negative: Any, seeds: Any, **options: Any) -> Any:
        follow = options["strength"] > 0 or self.leaking
        images = np.stack([square(*corner_of(c)) if follow else square(s % 40, 0) for c, s in zip(canny, seeds)])
        return images, images[:, None, ::8, ::8, 0].astype(np.float32)


def square(y: int, x: int) -> np.ndarray:
    image = np.zeros((96, 160, 3), np.uint8)
    image[y + 8 : y + 40, x + 8 : x + 40] = 255
    return image


def corner_of(canny: np.ndarray) -> Any:
    return np.argwhere(canny).min(axis=0) - 7  # Canny marks the pixel before the step


def edge_bench(folder: Any, corners: Any, kinds: Any, leaking: bool = False) -> measure_tiny.Bench:
    mask = np.zeros((96, 160), bool)
    scenes = [Scene(square(*c), f"a {k}", (f"a {k}",) * 4, k, "", mask, False) for c, k in zip(corners, kinds)]
    return measure_tiny.Bench(Painter(leaking), None, None, scenes, {}, [], 9.0, 1, folder)


def test_strength_0_is_measured_against_others_of_the_kind(tmp_path):
    # At seeds 7000 to 7003 the squares stand 0 to 3 rows down. Birds stand there too, so chance alone follows them; no
    # picture of a boat follows a boat, and a lone tree has nothing to be compared with.
    corners = [(0, 0), (0, 0), (40, 100), (40, 100), (0, 0)]
    report = Report({})
    bench = edge_bench(tmp_path, corners, ["bird", "bird", "boat", "boat", "tree"])
    measure_tiny.measure_edges(bench, report)
    rows = {row.name: row for row in report.rows}
    assert rows["recall, strength 1: mean of images"].value == 100
    assert rows["pictures that another scene's edges change, strength 0"].value == 0
    counted = rows["scenes that have others of their kind"]
    assert counted.value == 4 and counted.note.startswith("1 alone")
    for measure in ("recall", "precision"):
        chance = rows[f"{measure}, others of the kind, strength 0: mean of images"]
        assert chance.value == pytest.approx(50) and chance.note == "4 scenes"
        assert rows[f"{measure}, strength 0 less others of the kind"].value == pytest.approx(0)
        assert rows[f"{measure}, strength 0 / others of the kind"].value == pytest.approx(1)
    assert not report.missed


def test_edges_that_leak_at_strength_0_are_caught(tmp_path):
    corners = [(0, 0), (30, 30), (0, 100), (50, 60)]
    report = Report({})
    measure_tiny.measure_edges(edge_bench(tmp_path, corners, ["bird"] * 4, leaking=True), report)
    missed = {row.name: row.value for row in report.missed}
    assert missed.pop("pictures that another scene's edges change, strength 0") == 4
    assert set(missed) == {f"{m}, strength 0 / others of the kind" for m in ("recall", "precision")}
    assert min(missed.values()) > 2


def test_chance_is_compared_scene_by_scene():
    report = Report({})
    measure_tiny.add_chance(report, "recall", [30.0, 20.0, 40.0], [20.0, 20.0, 20.0])
    chance, excess, ratio = report.rows
    assert (chance.value, chance.error) == (20.0, 0.0)
    assert (excess.value, excess.error) == (10.0, pytest.approx(10 / np.sqrt(3)))
    assert (ratio.value, ratio.passed) == (1.5, False)


def test_without_scenes_of_one_kind_the_comparison_is_missed_not_passed(tmp_path):
    report = Report({})
    measure_tiny.measure_edges(edge_bench(tmp_path, [(0, 0), (40, 100)], ["bird", "boat"]), report)
    assert [row.name for row in report.missed] == ["scenes that have others of their kind"]


def test_others_of_a_kind():
    assert others_of_kind(["a", "b", "a", "c", "b", "a"]) == {0: [2, 5], 1: [4], 2: [0, 5], 4: [1], 5: [0, 2]}
    assert others_of_kind(["a", "b"]) == {}


def test_short_prompts_have_the_right_article():
    assert measure_tiny.short_prompt("orange", "bird") == "an orange bird"
    assert measure_tiny.short_prompt("", "boat") == "a boat"


def test_recoloured_captions_name_their_colours():
    found = {i: measure_tiny.recolour(i) for i in range(8)}
    assert any(found.values())
    for scenes in filter(None, found.values()):
        assert len(scenes) == len(COLOURS)
        assert all(word in scene.caption.split() for word, scene in zip(COLOURS, scenes))


def test_measure_tiny_runs_through_on_a_random_model(tmp_path, capsys):
    config = write_micro(tmp_path / "model")
    # Wide enough for the vocabulary whatever its size.
    config.write_text(
        re.sub(r"vocab_size: \d+", "vocab_size: 4096", config.read_text(encoding="utf-8")), encoding="utf-8"
    )
    output = tmp_path / "report"
    arguments = ["--model", str(config), "--scenes", "2", "--steps", "1", "--device", "cpu", "--output", str(output)]
    arguments += ["--only", "edges,words,autoencoder,half"]
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "pictures" / "photo.png"), make_scene(3, "test").image)
    arguments += ["--pictures", str(tmp_path / "pictures")]
    assert measure_tiny.main(arguments) == 1  # random weights follow nothing
    printed = capsys.readouterr().out
    # A bird and a boat: no two of a kind.
    assert "MISSED" in printed
    assert "missed: edges: scenes that have others of their kind: >= 2 asked, 0 reached" in printed
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    values = {row["name"]: row["value"] for row in report["rows"]}
    assert values["pictures that another scene's edges change, strength 0"] == 0
    assert {row["section"] for row in report["rows"]} == {"edges", "words", "autoencoder", "half"}
    counts = np.array(report["details"]["confusion, caption"]["counts"])
    assert counts.shape == (len(COLOURS), len(COLOURS) + 1)
    assert counts.sum() == len(COLOURS) * report["settings"]["coloured_scenes"]
    assert {path.name for path in output.glob("*.png")} >= {"edges.png", "words_caption.png", "autoencoder.png"}
    assert measure_tiny.main([*arguments[:-4], "--only", "edges", "--no-check"]) == 0


def test_sheet_takes_scenes_and_photos_and_names_them(tmp_path):
    for name in ("scene_2.png", "scene_red_boat_10.png", "scene_9_tree.png", "scene_11.png", "cat.jpg", "dog.jpg"):
        (tmp_path / name).touch()
    subjects = tiny_sheet.default_subjects(tmp_path)
    assert [(s.path.name, s.noun) for s in subjects] == [
        ("scene_2.png", "bird"),
        ("scene_9_tree.png", "tree"),
        ("scene_11.png", "bird"),
        ("cat.jpg", "cat"),
    ]
    assert tiny_sheet.parse_subject(f"{tmp_path / 'dog.jpg'}:cat") == tiny_sheet.Subject(tmp_path / "dog.jpg", "cat")


def test_sheet_fits_into_its_bytes():
    noise = np.random.default_rng(8).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    sizes = [len(tiny_sheet.encode_jpeg(noise, limit)) for limit in (200_000, 60_000)]
    assert sizes[1] <= 60_000 < sizes[0]
    with pytest.raises(ValueError, match="does not fit"):
        tiny_sheet.encode_jpeg(noise, 1000)


@pytest.mark.parametrize("argv", [["--output", "sheet.png"], ["--cell-width", "3"], ["--picture", "nothing.png:bird"]])
def test_sheet_refuses_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as error:
        tiny_sheet.main(argv)
    assert error.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["measure_tiny", "tiny_sheet", "train_tiny", "build_vocabulary"])
def test_tools_find_the_environment_by_themselves(tool: str) -> None:
    """Started by a Python without packages, as a user's `python3` may be, they take that of .venv or say what to do."""
    command = [sys.executable, "-S", str(measure_tiny.ROOT / "tools" / f"{tool}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "usage:" in result.stdout or "bash preprocess.sh" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
