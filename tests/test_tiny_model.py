"""What the trained tiny model paints, through the product's entry on ONNX Runtime: edges, words, seeds, guidance.

On random weights a change of an argument changes numbers and no more; here it has to change what it should. The limits
belong to the weights that ship: each stands between what these reach, which the tests print (`pytest -s`), and what
they reach with a fault in the chain, as half the strength, another guidance scale, or words in another order.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

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
from cldm.weights import Weights, find_weights
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
from tools.tiny.palette import HUES, hue_distance
from tools.tiny.scenes import Scene, make_scene

WEIGHTS = MODELS_DIR / "tiny.safetensors"
MAX_BYTES = 16 * 2**20

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
# Standard deviation of a zero convolution's weights that says that it is used: they begin at 0.
MIN_ZERO_CONVOLUTION = 0.003


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
    print(f"recall {found.recall:.3f} (at least {recall}), precision {found.precision:.3f} (at least {precision})")
    assert found.recall >= recall and found.precision >= precision


def hue_word(image: np.ndarray, mask: np.ndarray) -> Optional[str]:
    """The colour word that a region's dominant hue is nearest to."""
    return nearest_colour(dominant_hue(image, mask))


def held_out(suits: Callable[[Scene], bool], number: int) -> List[Scene]:
    """The first scenes of the test split that suit."""
    return list(itertools.islice(filter(suits, (make_scene(i, "test") for i in range(40))), number))


@pytest.fixture(scope="module")
def trained(tiny_weights: Weights, tiny_config: ModelConfig) -> ControlLDM:
    return load_model(tiny_config, tiny_weights)


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
def engine(tiny_weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hackathon]:
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


def test_file_is_small_and_in_half_precision(tiny_weights: Weights, tiny_config: ModelConfig) -> None:
    """At most 16 MiB of finite FP16 tensors: those of the networks, in their shapes, and no others."""
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


def test_every_part_is_trained(trained: ControlLDM) -> None:
    """The zero convolutions have left zero, all of them, and no other weight has stayed there."""
    weights = {name: value for name, value in trained.named_parameters() if value.dim() > 1}
    zero_convolution = re.compile(r"control_model\.(zero_convs\.\d+|middle_block_out)\.0\.weight")
    reached = {name: float(value.std()) for name, value in weights.items() if zero_convolution.fullmatch(name)}
    print({name: round(value, 4) for name, value in reached.items()})
    assert len(reached) == trained.config.num_controls
    assert min(reached.values()) > MIN_ZERO_CONVOLUTION
    assert [name for name, value in weights.items() if float(value.std()) < 1e-3] == []


def test_model_is_found_and_named(engine: hackathon, tiny_config: ModelConfig, scenes: List[Scene]) -> None:
    assert find_weights(tiny_config).path == WEIGHTS
    assert f"model tiny ({WEIGHTS.name}), backend onnxruntime on cpu in fp32" in engine.summary
    receipt = engine.run(of_scene(scenes[0]).image, replace(CONTEST, ddim_steps=1)).receipt
    assert (receipt.model, receipt.weights, receipt.warnings) == ("tiny", WEIGHTS.name, ())


@torch.no_grad()
def test_autoencoder_keeps_pictures(trained: ControlLDM, scenes: List[Scene]) -> None:
    images = np.stack([scene.image for scene in scenes])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, _ = trained.first_stage_model.encode(pixels)
    latents = mean * trained.config.autoencoder.scale_factor
    again = trained.decode(latents).permute(0, 2, 3, 1) * 127.5 + 127.5
    ratios = [psnr(a, b) for a, b in zip(again.numpy().clip(0, 255).astype(np.uint8), images)]
    print(f"PSNR {np.round(ratios, 1)} dB, standard deviation of the latents {float(latents.std()):.3f}")
    assert min(ratios) >= 27 and np.mean(ratios) >= 30
    # Guidance and the noise schedule count on latents of about unit variance.
    assert 0.8 < float(latents.std()) < 1.25


# --- The pipeline


def test_pipeline_paints_the_references_picture(engine: hackathon, paint: Paint, photographs: List[Subject]) -> None:
    """On the contest's own arguments; the reference is plain PyTorch with two network calls a step."""
    subject = photographs[0]
    found, wanted = paint(subject), engine.reference(subject.image, CONTEST)
    apart = np.abs(found.images[0].astype(int) - wanted.images[0])
    error, share = relative(found.latent, wanted.latent), float((apart > 0).mean())
    print(f"latent error {error:.1e}, {share:.1e} of the pixels differ, by at most {apart.max()}")
    assert error < 1e-4
    assert apart.max() <= 1 and share < 0.01


def test_more_steps_come_nearer_to_the_end(paint: Paint, scenes: List[Scene]) -> None:
    """DDIM's pictures converge: few steps give the same picture as many, only less exactly."""
    subject = of_scene(scenes[0])
    wanted = paint(subject, ddim_steps=30).latent
    errors = [relative(paint(subject, ddim_steps=steps).latent, wanted) for steps in (5, 10, 20)]
    other = relative(paint(subject, seed=SEEDS[0]).latent, wanted)
    print(f"5, 10, 20 steps against 30: {np.round(errors, 3)}; another seed: {other:.3f}")
    assert errors[0] > 1.5 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.1 < 0.5 < other, "20 steps are far nearer than another seed is"


def test_noise_in_the_steps_changes_the_picture_but_not_its_edges(paint: Paint, scenes: List[Scene]) -> None:
    pairs = [(of_scene(scene), paint(of_scene(scene), eta=1.0)) for scene in scenes[:2]]
    for subject, noisy in pairs:
        assert mean_difference(noisy.images[0], paint(subject).images[0]) > 12
    assert_follows(follow(pairs), 0.95, 0.77)


# --- Edges


def test_edges_are_followed_as_strongly_as_asked(paint: Paint, scenes: List[Scene]) -> None:
    subjects = [of_scene(scene) for scene in scenes]
    results = {
        strength: [paint(subject, QUICK, prompt=subject.name, strength=strength) for subject in subjects]
        for strength in (1.0, 0.5, 0.25, 0.0)
    }
    own = {strength: follow(list(zip(subjects, painted))) for strength, painted in results.items()}
    others = [(a, b) for (i, a), (j, b) in itertools.product(enumerate(subjects), enumerate(results[1.0])) if i != j]
    chance = follow(others)
    print({strength: round(match.recall, 3) for strength, match in own.items()}, f"by chance {chance.recall:.3f}")
    assert_follows(own[1.0], 0.965, 0.71)
    assert 0.9 <= own[0.5].recall <= 0.97
    assert 0.66 <= own[0.25].recall <= 0.82
    assert own[0.0].recall <= 0.28 and own[0.0].precision <= 0.33
    for measure in ("recall", "precision"):
        assert getattr(own[0.0], measure) < getattr(chance, measure) + 0.1 < 0.4, measure


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
    print({subject.name: round(match.recall, 3) for subject, match in zip(photographs, matches)})
    assert_follows(sum(matches, EdgeMatch()), 0.91, 0.79)
    assert min(match.recall for match in matches) >= 0.82
    assert min(match.precision for match in matches) >= 0.66


def test_thresholds_choose_the_edges(paint: Paint, photographs: List[Subject]) -> None:
    """Thresholds that leave only the strongest edges leave only them in the picture."""
    subject = photographs[0]
    many, few = (paint(subject, QUICK, low_threshold=low, high_threshold=high) for low, high in ((50, 100), (200, 255)))
    asked = [int((result.canny > 0).sum()) for result in (many, few)]
    drawn = [int((find_edges(result.images[0]) > 0).sum()) for result in (many, few)]
    print(f"edge pixels asked for {asked}, drawn {drawn}")
    assert asked[0] > 1.8 * asked[1]
    assert drawn[0] > 1.7 * drawn[1]
    for result in (many, few):
        assert_follows(match_edges(result.canny, find_edges(result.images[0])), 0.9, 0.8)


# --- Words


def test_colour_words_colour_the_bird(paint: Paint, birds: List[Scene]) -> None:
    """The same edges and noise, and one word changed: the hue is the word's to half the way to the nearest other."""
    apart = {}
    for scene, (word, wanted) in zip(itertools.cycle(birds[:2]), HUES.items()):
        image = paint(of_scene(scene), QUICK, prompt=f"a {word} bird").images[0]
        hue = dominant_hue(image, scene.mask)
        apart[word] = 180.0 if hue is None else hue_distance(hue, wanted)
    print("degrees from the word's hue:", apart)
    assert max(apart.values()) <= 13


def test_words_colour_what_they_stand_beside(paint: Paint, birds: List[Scene]) -> None:
    """The same words in another order: which of the two colours is the bird's and which the background's."""
    pairs = [("red", "blue"), ("blue", "red"), ("green", "pink"), ("pink", "green")]
    for scene in birds[:2]:
        images = {
            (bird, ground): paint(
                of_scene(scene), QUICK, prompt=f"a {bird} bird on a {ground} background", added_prompt=""
            ).images[0]
            for bird, ground in pairs
        }
        found = {asked: (hue_word(image, scene.mask), hue_word(image, ~scene.mask)) for asked, image in images.items()}
        assert found == {asked: asked for asked in pairs}


def test_negative_prompt_drives_away_what_it_names(paint: Paint, birds: List[Scene]) -> None:
    """With a prompt that names no colour: of red, green and blue the bird lacks that which is not wanted."""
    scene = birds[0]
    words = ("red", "green", "blue")
    channels = np.zeros((3, 3))
    for (i, word), seed in itertools.product(enumerate(words), SEEDS):
        image = paint(of_scene(scene), QUICK, negative_prompt=f"a {word} bird", seed=seed).images[0]
        pixels = image[scene.mask].astype(float)
        channels[i] += (pixels - pixels.mean(axis=1, keepdims=True)).mean(axis=0) / len(SEEDS)
    print(f"channels over their mean, a row for each word not wanted:\n{channels.round(1)}")
    assert channels.diagonal().max() < -60
    assert channels[~np.eye(3, dtype=bool)].min() > -30


def test_added_words_of_bad_quality_give_bad_quality(paint: Paint, birds: List[Scene]) -> None:
    found = {}
    for words in ("best quality, extremely detailed", "blurry, low quality, worst quality"):
        images = [paint(of_scene(b), QUICK, added_prompt=words, negative_prompt="").images[0] for b in birds[:2]]
        found[words] = sum(sharpness(image) for image in images)
    print("sharpness:", found)
    good, bad = found.values()
    assert bad < 0.4 * good


# --- Seeds


def test_seeds_give_other_pictures_with_the_same_edges(paint: Paint, birds: List[Scene]) -> None:
    subject = of_scene(birds[0])
    results = [paint(subject, QUICK, seed=seed, negative_prompt="") for seed in SEEDS]
    apart = [mean_difference(a.images[0], b.images[0]) for a, b in itertools.combinations(results, 2)]
    print("levels between seeds:", np.round(apart, 1))
    assert min(apart) > 10 and np.mean(apart) > 18
    assert_follows(follow([(subject, result) for result in results]), 0.965, 0.8)


def test_samples_of_one_call_are_other_pictures_with_the_same_edges(paint: Paint, birds: List[Scene]) -> None:
    subject = of_scene(birds[0])
    images = paint(subject, QUICK, num_samples=3, negative_prompt="").images
    apart = [mean_difference(a, b) for a, b in itertools.combinations(images, 2)]
    print("levels between samples:", np.round(apart, 1))
    assert len(images) == 3 and min(apart) > 8
    assert_follows(sum((match_edges(subject.edges, find_edges(image)) for image in images), EdgeMatch()), 0.965, 0.8)


# --- Guidance


def test_guidance_strengthens_what_the_prompt_asks(paint: Paint, birds: List[Scene]) -> None:
    """Contrast grows with the scale, most from 1 to 3; a scale off by one is seen there."""
    contrast = {}
    for scale in (1, 3, 9):
        images = [paint(of_scene(b), QUICK, prompt="a red bird", guidance_scale=scale).images[0] for b in birds]
        contrast[scale] = float(np.mean([image.std() for image in images]))
    print("standard deviation of the pixels at guidance scales:", contrast)
    assert 30 < contrast[1] < 37
    assert 52 < contrast[3] < 58
    assert 63.5 < contrast[9] < 68.5


def test_guess_mode_follows_edges_in_another_picture(paint: Paint, scenes: List[Scene]) -> None:
    pairs = [(of_scene(scene), paint(of_scene(scene), guess_mode=True)) for scene in scenes[:2]]
    apart = [mean_difference(guess.images[0], paint(subject).images[0]) for subject, guess in pairs]
    print("levels from the picture without guess mode:", np.round(apart, 1))
    assert min(apart) > 14
    assert_follows(follow(pairs), 0.92, 0.84)


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
    assert_follows(followed["control"], 0.96, 0.82)
    assert followed["guess"].recall < 0.45


def test_scale_one_is_the_conditional_half_alone(engine: hackathon, paint: Paint, scenes: List[Scene]) -> None:
    """The reference does not even call the unconditional half there; the graphs compute and cancel it."""
    subject = of_scene(scenes[0])
    one = paint(subject, QUICK, guidance_scale=1)
    assert relative(one.latent, engine.reference(subject.image, replace(QUICK, guidance_scale=1)).latent) < 2e-5
    assert relative(paint(subject, QUICK, guidance_scale=1, negative_prompt="a red bird").latent, one.latent) < 2e-5
    nine = paint(subject, QUICK).latent
    changes = relative(paint(subject, QUICK, negative_prompt="a red bird").latent, nine), relative(one.latent, nine)
    print("at scale 9 another negative prompt changes the latent by {:.2f}, scale 1 by {:.2f}".format(*changes))
    assert changes[0] > 0.6 and changes[1] > 0.4


# --- Precision


@pytest.mark.gpu
def test_half_precision_paints_the_same_pictures(tiny_weights: Weights, scenes: List[Scene], tmp_path: Path) -> None:
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
