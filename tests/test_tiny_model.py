"""What the trained tiny model paints, through the product's entry on ONNX Runtime: edges, words, seeds, guidance.

On random weights a change of an argument changes numbers and no more; here it has to change what it should.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open

from canny2image_TRT import hackathon
from cldm.checkpoint import load_model
from cldm.config import MODELS_DIR, ModelConfig
from cldm.model import ControlLDM
from cldm.request import Request
from cldm.result import Result
from cldm.weights import find_weights
from scoring.metrics import psnr
from scoring.pictures import OWN_FOLDER
from tools.tiny.measures import (
    EdgeMatch,
    dominant_hue,
    find_edges,
    match_edges,
    mean_difference,
    nearest_colour,
    sharpness,
)
from tools.tiny.scenes import Scene, make_scene

WEIGHTS = MODELS_DIR / "tiny.safetensors"
MAX_BYTES = 16 * 2**20
pytestmark = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"{WEIGHTS.name} is not trained yet: tools/train_tiny.py makes it"
)

# The contest's call; the other arguments are `Request`'s own defaults.
CONTEST = Request(
    "a bird",
    "best quality, extremely detailed",
    "longbody, lowres, bad anatomy, bad hands, missing fingers",
    seed=2946901,
)
# For what needs no fine picture.
QUICK = replace(CONTEST, ddim_steps=10)
SEEDS = (11, 12, 13)
NUM_SCENES = 4
# An object of a smaller share of the picture has too few pixels for a dominant hue.
SMALLEST_OBJECT = 0.05


@dataclass(frozen=True)
class Subject:
    """A picture to take edges of: (256, 384, 3) uint8, BGR as cv2.imread gives it; and its (256, 384) edges."""

    name: str
    image: np.ndarray
    edges: np.ndarray


Paint = Callable[..., Result]


def as_subject(name: str, image: np.ndarray) -> Subject:
    return Subject(name, np.ascontiguousarray(image), find_edges(image))


def of_scene(scene: Scene) -> Subject:
    return as_subject(scene.caption, scene.image[:, :, ::-1])


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def follow(pairs: Sequence[Tuple[Subject, Result]]) -> EdgeMatch:
    """How the images follow the edges of the subjects, all pixels together."""
    return sum((match_edges(subject.edges, find_edges(result.images[0])) for subject, result in pairs), EdgeMatch())


def assert_follows(found: EdgeMatch, recall: float, precision: float) -> None:
    """Both, as noise has an edge near every edge, and a flat picture no wrong one."""
    assert found.recall >= recall and found.precision >= precision, (found.recall, found.precision)


def held_out(suits: Callable[[Scene], bool], number: int) -> List[Scene]:
    """The first scenes of the test split that suit."""
    return list(itertools.islice(filter(suits, (make_scene(i, "test") for i in range(40))), number))


@pytest.fixture(scope="module")
def scenes() -> List[Scene]:
    """Things on backgrounds; edges of patterns are too dense to be followed by chance only."""
    return held_out(lambda scene: scene.kind != "pattern", NUM_SCENES)


@pytest.fixture(scope="module")
def birds() -> List[Scene]:
    return held_out(lambda scene: scene.kind == "bird" and scene.mask.mean() > SMALLEST_OBJECT, 3)


@pytest.fixture(scope="module")
def photographs() -> List[Subject]:
    return [as_subject(path.name, cv2.imread(str(path))) for path in sorted(OWN_FOLDER.glob("*.jpg"))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hackathon]:
    hk = hackathon()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HACKATHON_")]:
            patch.delenv(name)
        hk.initialize("tiny", "onnxruntime", build_dir=str(tmp_path_factory.mktemp("tiny")))
    yield hk
    hk.close()


@pytest.fixture(scope="module")
def paint(engine: hackathon) -> Paint:
    """Paint a subject's edges by a request with changes; what was painted before is not painted again."""
    results: Dict[Any, Result] = {}

    def painted(subject: Subject, request: Request = CONTEST, **changes: Any) -> Result:
        request = replace(request, **changes)
        key = (subject.image.tobytes(), request)
        if key not in results:
            results[key] = engine.run(subject.image, request)
        return results[key]

    return painted


# --- The file


def test_file_is_small_and_in_half_precision(tiny_config: ModelConfig) -> None:
    assert 4 * 2**20 < WEIGHTS.stat().st_size <= MAX_BYTES
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in ControlLDM(tiny_config).state_dict().items()}
    with safe_open(str(WEIGHTS), framework="pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        notes = file.metadata()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert notes["model"] == tiny_config.digest(), "trained with another models/tiny.yaml"


def test_every_part_is_trained(tiny_config: ModelConfig) -> None:
    """The zero convolutions have left zero, and no other weight has stayed there."""
    model = load_model(tiny_config, find_weights(tiny_config, str(WEIGHTS)))
    zero_convolutions = [name for name, _ in model.named_parameters() if "zero_convs" in name and "weight" in name]
    assert len(zero_convolutions) == tiny_config.num_controls - 1
    dead = [name for name, value in model.named_parameters() if value.dim() > 1 and float(value.abs().max()) == 0]
    assert dead == []


def test_model_is_found_and_named(engine: hackathon, tiny_config: ModelConfig, scenes: List[Scene]) -> None:
    assert find_weights(tiny_config).path == WEIGHTS
    assert f"model tiny ({WEIGHTS.name}), backend onnxruntime on cpu in fp32" in engine.summary
    receipt = engine.run(of_scene(scenes[0]).image, replace(CONTEST, ddim_steps=1)).receipt
    assert (receipt.model, receipt.weights, receipt.warnings) == ("tiny", WEIGHTS.name, ())


@torch.no_grad()
def test_autoencoder_keeps_pictures(tiny_config: ModelConfig, scenes: List[Scene]) -> None:
    model = load_model(tiny_config, find_weights(tiny_config))
    images = np.stack([scene.image for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = model.first_stage_model.encode(pixels)
    again = model.decode(mean * tiny_config.autoencoder.scale_factor).permute(0, 2, 3, 1) * 127.5 + 127.5
    ratios = [psnr(a, b) for a, b in zip(again.numpy().clip(0, 255).astype(np.uint8), images)]
    assert np.mean(ratios) >= 26
    # Guidance and the noise schedule count on latents of about unit variance.
    assert 0.7 < float((mean * tiny_config.autoencoder.scale_factor).std()) < 1.4


# --- The pipeline


def test_pipeline_paints_the_references_picture(engine: hackathon, paint: Paint, photographs: List[Subject]) -> None:
    """On the contest's own arguments; the reference is plain PyTorch with two network calls a step."""
    subject = photographs[0]
    found, wanted = paint(subject), engine.reference(subject.image, CONTEST)
    assert relative(found.latent, wanted.latent) < 1e-4
    apart = np.abs(found.images[0].astype(int) - wanted.images[0])
    assert apart.max() <= 2 and (apart > 0).mean() < 0.02


def test_more_steps_come_nearer_to_the_end(paint: Paint, scenes: List[Scene]) -> None:
    """DDIM's pictures converge: few steps give the same picture as many, only less exactly."""
    subject = of_scene(scenes[0])
    wanted = paint(subject, ddim_steps=30).latent
    errors = [relative(paint(subject, ddim_steps=steps).latent, wanted) for steps in (5, 10, 20)]
    assert errors[0] > errors[1] > errors[2]
    other = relative(paint(subject, seed=SEEDS[0]).latent, wanted)
    assert errors[2] < 0.3 * other, "20 steps are far nearer than another seed is"


def test_noise_in_the_steps_changes_the_picture_but_not_its_edges(paint: Paint, scenes: List[Scene]) -> None:
    pairs = []
    for scene in scenes[:2]:
        subject = of_scene(scene)
        pairs.append((subject, paint(subject, eta=1.0)))
        assert mean_difference(pairs[-1][1].images[0], paint(subject).images[0]) > 5
    assert_follows(follow(pairs), 0.7, 0.6)


# --- Edges


def test_edges_are_followed_as_strongly_as_asked(paint: Paint, scenes: List[Scene]) -> None:
    subjects = [of_scene(scene) for scene in scenes]
    results = {
        strength: [paint(subject, QUICK, prompt=subject.name, strength=strength) for subject in subjects]
        for strength in (1.0, 0.5, 0.0)
    }
    own = {strength: follow(list(zip(subjects, painted))) for strength, painted in results.items()}
    assert_follows(own[1.0], 0.7, 0.6)
    others = [(a, b) for (i, a), (j, b) in itertools.product(enumerate(subjects), enumerate(results[1.0])) if i != j]
    chance = follow(others)
    for measure in ("recall", "precision"):
        full, half, none = (getattr(own[strength], measure) for strength in (1.0, 0.5, 0.0))
        by_chance = getattr(chance, measure)
        assert full > half > none, measure
        assert none < by_chance + 0.1, measure
        assert full > 2 * by_chance, measure


def test_contest_call_follows_photographs(engine: hackathon, photographs: List[Subject]) -> None:
    """The scorer's positional call, on the pictures that the score runs over."""
    matches = []
    for subject in photographs:
        (image,) = engine.process(
            subject.image,
            *("a bird", "best quality, extremely detailed"),
            "longbody, lowres, bad anatomy, bad hands, missing fingers",
            *(1, 256, 20, False, 1, 9, 2946901, 0.0, 100, 200),
        )
        assert image.shape == subject.image.shape and image.dtype == np.uint8
        matches.append(match_edges(subject.edges, find_edges(image)))
    assert_follows(sum(matches, EdgeMatch()), 0.5, 0.5)
    assert min(match.recall for match in matches) >= 0.3


def test_thresholds_choose_the_edges(paint: Paint, photographs: List[Subject]) -> None:
    """Thresholds that leave only the strongest edges leave only them in the picture."""
    subject = photographs[0]
    many, few = (paint(subject, QUICK, low_threshold=low, high_threshold=high) for low, high in ((50, 100), (200, 255)))
    drawn = [(find_edges(result.images[0]) > 0).sum() for result in (many, few)]
    assert (many.canny > 0).sum() > 1.5 * (few.canny > 0).sum()
    assert drawn[0] > 1.2 * drawn[1]


# --- Words


def test_colour_words_colour_the_bird(paint: Paint, birds: List[Scene]) -> None:
    """The same edges and noise, and one word changed."""
    words = ("red", "yellow", "green", "blue")
    wrong = []
    for scene, word in itertools.product(birds[:2], words):
        image = paint(of_scene(scene), QUICK, prompt=f"a {word} bird").images[0]
        reached = nearest_colour(dominant_hue(image, scene.mask))
        wrong += [] if reached == word else [(scene.caption, word, reached)]
    assert len(wrong) <= 1, wrong


def test_background_words_colour_the_background(paint: Paint, birds: List[Scene]) -> None:
    scene = birds[0]
    hues = {}
    for word in ("blue", "green"):
        image = paint(of_scene(scene), QUICK, prompt=f"a red bird on a {word} background").images[0]
        hues[word] = nearest_colour(dominant_hue(image, ~scene.mask))
    assert hues == {"blue": "blue", "green": "green"}


def test_negative_prompt_drives_away_what_it_names(paint: Paint, birds: List[Scene]) -> None:
    """With a prompt that names no colour: of red, green and blue the bird has least where each is not wanted."""
    scene = birds[0]
    words = ("red", "green", "blue")
    channels = np.zeros((3, 3))
    for (i, word), seed in itertools.product(enumerate(words), SEEDS):
        image = paint(of_scene(scene), QUICK, negative_prompt=f"a {word} bird", seed=seed).images[0]
        pixels = image[scene.mask].astype(float)
        channels[i] += (pixels - pixels.mean(axis=1, keepdims=True)).mean(axis=0) / len(SEEDS)
    others = (channels.sum(axis=0) - channels.diagonal()) / 2
    assert (channels.diagonal() < others - 10).all(), channels
    assert (channels.argmin(axis=0) == range(3)).all(), channels


def test_words_of_bad_quality_give_bad_quality(paint: Paint, birds: List[Scene]) -> None:
    plain = {"added_prompt": "", "negative_prompt": ""}
    found = {"good": 0.0, "bad": 0.0}
    for scene in birds[:2]:
        for name, words in (
            ("good", "best quality, extremely detailed"),
            ("bad", "blurry, low quality, worst quality"),
        ):
            image = paint(of_scene(scene), QUICK, prompt=f"a bird, {words}", **plain).images[0]
            found[name] += sharpness(image)
    assert found["bad"] < 0.9 * found["good"], found


# --- Seeds


def test_seeds_give_other_pictures_with_the_same_edges(paint: Paint, birds: List[Scene]) -> None:
    subject = of_scene(birds[0])
    results = [paint(subject, QUICK, seed=seed, negative_prompt="") for seed in SEEDS]
    for a, b in itertools.combinations(results, 2):
        assert mean_difference(a.images[0], b.images[0]) > 8
    assert_follows(follow([(subject, result) for result in results]), 0.7, 0.6)


# --- Guidance


def test_guess_mode_follows_edges_in_another_picture(paint: Paint, scenes: List[Scene]) -> None:
    pairs = [(of_scene(scene), paint(of_scene(scene), guess_mode=True)) for scene in scenes[:2]]
    for subject, guess in pairs:
        assert mean_difference(guess.images[0], paint(subject).images[0]) > 5
    assert_follows(follow(pairs), 0.5, 0.5)


def test_guess_mode_keeps_control_from_the_unconditional_half(paint: Paint, scenes: List[Scene]) -> None:
    """At guidance scale 0 only the unconditional half counts, so what it sees can be seen."""
    subjects = [of_scene(scene) for scene in scenes[:2]]
    options = {"guidance_scale": 0, "negative_prompt": ""}
    runs = {
        "guess": {"guess_mode": True},
        "strength 0": {"strength": 0},
        "control": {},
    }
    results = {name: [paint(s, QUICK, **options, **changes) for s in subjects] for name, changes in runs.items()}
    for guess, plain in zip(results["guess"], results["strength 0"]):
        assert relative(guess.latent, plain.latent) < 1e-5
    followed = {name: follow(list(zip(subjects, painted))) for name, painted in results.items()}
    assert_follows(followed["control"], 0.5, 0.5)
    assert followed["guess"].recall < 0.6 * followed["control"].recall


def test_scale_one_is_the_conditional_half_alone(engine: hackathon, paint: Paint, scenes: List[Scene]) -> None:
    """The reference does not even call the unconditional half there; the graphs compute and cancel it."""
    subject = of_scene(scenes[0])
    one = paint(subject, QUICK, guidance_scale=1)
    assert relative(one.latent, engine.reference(subject.image, replace(QUICK, guidance_scale=1)).latent) < 1e-4
    assert relative(paint(subject, QUICK, guidance_scale=1, negative_prompt="a red bird").latent, one.latent) < 1e-4
    nine = paint(subject, QUICK).latent
    assert relative(paint(subject, QUICK, negative_prompt="a red bird").latent, nine) > 0.05
    assert relative(one.latent, nine) > 0.05


# --- Precision


@pytest.mark.gpu
def test_half_precision_paints_the_same_pictures(scenes: List[Scene], tmp_path: Path) -> None:
    hk = hackathon()
    hk.initialize("tiny", "torch", "fp16", "cuda", build_dir=str(tmp_path))
    errors, ratios = [], []
    for scene in scenes:
        subject = of_scene(scene)
        request = replace(CONTEST, prompt=scene.caption)
        found, wanted = hk.run(subject.image, request), hk.reference(subject.image, request)
        errors.append(relative(found.latent, wanted.latent))
        ratios.append(psnr(found.images[0], wanted.images[0]))
    hk.close()
    print(f"latent errors {np.round(errors, 4)}, PSNR {np.round(ratios, 1)} dB")
    assert max(errors) < 5e-2
    assert min(ratios) >= 35
