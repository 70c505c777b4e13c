"""The deployable graphs, run in PyTorch, against the reference algorithm and against diffusers' scheduler."""

from __future__ import annotations

import itertools
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.config import ModelConfig
from cldm.model import ControlLDM
from cldm.reference import Reference, to_uint8
from cldm.request import Request
from cldm.tokenizer import Tokenizer
from cldm.weights import Weights, find_weights
from deploy.graphs import build_graph, cast_copy
from deploy.spec import Build, graph_specs
from deploy.tracing import fast_half_convolution
from ldm.norm import GroupNorm, LayerNorm
from runtime.pipeline import About, Pipeline
from runtime.torch_session import TorchSession
from tests.diffusers_ddim import original_scheduler
from tests.small_model import small_config

HEIGHT, WIDTH = 64, 128

STRENGTHS, GUESS, SCALES, ETAS = (0.0, 0.6, 1.0), (False, True), (1.0, 9.0), (0.0, 0.7)
SAMPLES, STEPS = (1, 3), (1, 4, 7, 20)
Case = Tuple[float, bool, float, float, int, int]
ALL: List[Case] = list(itertools.product(STRENGTHS, GUESS, SCALES, ETAS, SAMPLES, STEPS))


def _every_pair() -> List[Case]:
    """Every combination of the first four, each with one of the other two, so that every pair of values meets.

    With each strength, the choices of guess mode, scale and eta as three bits also choose samples (one bit) and steps
    (two); the bits are rotated from one strength to the next, so that each of the three meets all samples and steps.
    """
    cases = []
    for i, strength in enumerate(STRENGTHS):
        for bits in itertools.product((0, 1), repeat=3):
            samples, high, low = bits[i:] + bits[:i]
            chosen = GUESS[bits[0]], SCALES[bits[1]], ETAS[bits[2]]
            cases.append((strength, *chosen, SAMPLES[samples], STEPS[2 * high + low]))
    return cases


SOME = _every_pair()


@pytest.fixture(scope="module")
def model() -> ControlLDM:
    config = small_config()
    return load_model(config, find_weights(config))


@pytest.fixture(scope="module")
def trained(tiny_config: ModelConfig, tiny_weights: Weights) -> ControlLDM:
    """The tiny model, where it matters how strongly edges and words count."""
    return load_model(tiny_config, tiny_weights)


@pytest.fixture(scope="module")
def trained_pipeline(trained: ControlLDM) -> Pipeline:
    return make_pipeline(trained, 1)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Blobs with clear edges."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 2, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8) * 200
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


def make_pipeline(model: ControlLDM, samples: int, precision: str = "fp32") -> Pipeline:
    build = Build(model.config, HEIGHT, WIDTH, samples, precision)
    sessions = {
        name: TorchSession(build_graph(name, model, precision, samples), spec)
        for name, spec in graph_specs(build).items()
    }
    return Pipeline(build, sessions, Tokenizer(model.config), About("seeded", "torch", "test"))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check_case(model: ControlLDM, picture: np.ndarray, pipelines: Dict[int, Pipeline], case: Case) -> None:
    strength, guess, scale, eta, samples, steps = case
    request = Request(
        "a red bird",
        "best quality",
        "lowres",
        num_samples=samples,
        image_resolution=HEIGHT,
        ddim_steps=steps,
        guess_mode=guess,
        strength=strength,
        guidance_scale=scale,
        seed=11,
        eta=eta,
    )
    wanted = Reference(model, Tokenizer(model.config), "seeded").generate(picture, request)
    found = pipelines[samples].generate(picture, request)
    assert found.latent.shape == wanted.latent.shape == (samples, 4, HEIGHT // 8, WIDTH // 8)
    assert relative(found.latent, wanted.latent) < 1e-4
    assert np.array_equal(found.canny, wanted.canny)
    assert len(found.images) == samples
    for ours, theirs in zip(found.images, wanted.images):
        # A latent off by 1e-4 may move a pixel across one truncation.
        difference = np.abs(ours.astype(int) - theirs.astype(int))
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= 0.01 * difference.size


@pytest.fixture(scope="module")
def pipelines(model: ControlLDM) -> Dict[int, Pipeline]:
    return {samples: make_pipeline(model, samples) for samples in (1, 3)}


def test_some_covers_every_pair() -> None:
    values = (STRENGTHS, GUESS, SCALES, ETAS, SAMPLES, STEPS)
    for i, j in itertools.combinations(range(6), 2):
        assert {(case[i], case[j]) for case in SOME} == set(itertools.product(values[i], values[j]))
    assert len(SOME) == len(set(SOME)) == 24 and set(SOME) < set(ALL)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_graphs_equal_the_reference(
    model: ControlLDM, picture: np.ndarray, pipelines: Dict[int, Pipeline], case: Case
) -> None:
    check_case(model, picture, pipelines, case)


@pytest.mark.slow
def test_graphs_equal_the_reference_everywhere(
    model: ControlLDM, picture: np.ndarray, pipelines: Dict[int, Pipeline]
) -> None:
    for case in ALL:
        check_case(model, picture, pipelines, case)


def diffusers_loop(model: ControlLDM, request: Request, hint: Any, noises: torch.Tensor) -> np.ndarray:
    """Guided sampling with diffusers' DDIM: the initial latent is noises[0], the steps' noise follows."""
    scheduler = original_scheduler(request.ddim_steps)
    ids, _ = Tokenizer(model.config)([request.conditional_text, request.negative_prompt])
    context = model.encode_text(torch.from_numpy(ids).long())
    scales = [request.strength] * model.config.num_controls
    x = noises[:1]
    for i, t in enumerate(scheduler.timesteps):
        e = model.predict_noise(x.repeat(2, 1, 1, 1), t.repeat(2), context, hint, scales)
        e = e[1:] + request.guidance_scale * (e[:1] - e[1:])
        x = scheduler.step(e, t, x, eta=request.eta, variance_noise=noises[i + 1 : i + 2]).prev_sample
    return x.numpy()


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", [4, 20])
def test_reference_equals_diffusers_scheduler(model: ControlLDM, picture: np.ndarray, eta: float, steps: int) -> None:
    request = Request("a bird", "x", "y", image_resolution=HEIGHT, ddim_steps=steps, seed=5, eta=eta, strength=0.8)
    result = Reference(model, Tokenizer(model.config), "seeded").generate(picture, request)
    hint = torch.from_numpy(result.canny / np.float32(255)).expand(2, 3, HEIGHT, WIDTH)
    torch.manual_seed(5)
    noises = torch.cat([torch.randn(1, 4, HEIGHT // 8, WIDTH // 8) for _ in range(steps + 1)])
    with torch.no_grad():
        assert relative(result.latent, diffusers_loop(model, request, hint, noises)) < 1e-4


def test_strength_zero_is_plain_stable_diffusion(
    trained: ControlLDM, trained_pipeline: Pipeline, picture: np.ndarray
) -> None:
    request = Request("a bird", image_resolution=HEIGHT, ddim_steps=7, seed=5, strength=0)
    torch.manual_seed(5)
    start = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8)
    found = trained_pipeline.generate(picture, request)
    seen = trained_pipeline.generate(picture, Request("a bird", image_resolution=HEIGHT, ddim_steps=7, seed=5))
    # diffusers spaces 7 steps differently, so the plain model is sampled here with our own timesteps.
    reference = Reference(trained, Tokenizer(trained.config), "trained")
    calls = []
    original = ControlLDM.predict_noise

    def without_hint(self: ControlLDM, x: Any, t: Any, context: Any, hint: Any = None, scales: Any = None) -> Any:
        calls.append(int(t[0]))
        return original(self, x, t, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ControlLDM, "predict_noise", without_hint)
        plain = reference.generate(picture, request, latents=start)
    assert calls[::2] == [858, 715, 572, 429, 286, 143, 1]
    assert relative(found.latent, plain.latent) < 1e-4
    assert relative(seen.latent, plain.latent) > 0.5


def test_guess_mode_leaves_the_unconditional_half_without_control(
    trained_pipeline: Pipeline, picture: np.ndarray
) -> None:
    """With guidance 0 only the unconditional half counts, and guess mode makes it plain Stable Diffusion's."""
    options: Dict[str, Any] = {"image_resolution": HEIGHT, "ddim_steps": 4, "seed": 5, "guidance_scale": 0}
    guess = trained_pipeline.generate(picture, Request("a bird", guess_mode=True, **options))
    plain = trained_pipeline.generate(picture, Request("a bird", strength=0, **options))
    control = trained_pipeline.generate(picture, Request("a bird", **options))
    assert relative(guess.latent, plain.latent) < 1e-6
    assert relative(control.latent, plain.latent) > 0.5


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 4e-2), ("bf16", 2.5e-1)])
def test_half_precision_stays_close(
    trained: ControlLDM, trained_pipeline: Pipeline, picture: np.ndarray, precision: str, bound: float
) -> None:
    """Guidance at scale 9 multiplies the difference of two rounded predictions, and the sampler adds them up."""
    pipeline = make_pipeline(trained, 1, precision)
    errors = []
    for seed in (5, 6):
        request = Request("a bird", image_resolution=HEIGHT, ddim_steps=20, seed=seed)
        with fast_half_convolution():
            found = pipeline.generate(picture, request)
        errors.append(relative(found.latent, trained_pipeline.generate(picture, request).latent))
    print(f"{precision}: latent errors {np.round(errors, 4)}")
    assert min(errors) > 1e-4 and max(errors) < bound


def test_types_in_half_precision(model: ControlLDM) -> None:
    step = build_graph("step", model, "fp16", 1)
    norms = [m for m in step.modules() if isinstance(m, (GroupNorm, LayerNorm))]
    assert len(norms) > 20
    assert {p.dtype for m in norms for p in m.parameters()} == {torch.float32}
    kept = {id(p) for m in norms for p in m.parameters()}
    assert {p.dtype for p in step.parameters() if id(p) not in kept} == {torch.float16}
    assert {p.dtype for p in build_graph("time", model, "fp16", 1).parameters()} == {torch.float32}


def test_fp32_graphs_share_the_models_weights(model: ControlLDM) -> None:
    """A second copy of SD1.5 would be 5 GB."""
    owned = {p.data_ptr() for p in model.parameters()}
    for name in ("text", "hint", "time", "step", "decode"):
        assert all(p.data_ptr() in owned for p in build_graph(name, model, "fp32", 1).parameters())


def test_casting_leaves_the_model_as_it_was(model: ControlLDM) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    half = cast_copy(model.unet, torch.float16)
    assert half.input_blocks[0][0].weight.dtype == torch.float16
    assert all(p.dtype == torch.float32 and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_step_holds_nothing_that_left_the_loop(model: ControlLDM) -> None:
    names = [name for name, _ in build_graph("step", model, "fp32", 1).named_parameters()]
    gone = ("time_embed", "emb_layers", "attn2.to_k", "attn2.to_v", "input_hint_block")
    assert names
    assert not [name for name in names if any(part in name for part in gone)]


class Picture(torch.nn.Module):
    """Stands for a decoder: the same picture whatever the latent."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.image


def test_pixels_are_clipped_and_truncated_in_the_order_of_the_channels(model: ControlLDM) -> None:
    """Half a level above each of the 256, where rounding and truncation differ; then far beyond both ends."""
    levels = np.arange(256).reshape(16, 16)
    wanted = np.stack([levels, levels.T, 255 - levels], axis=-1)[None].repeat(2, axis=0)
    values = (wanted + 0.5 - 127.5) / 127.5
    values[1] = [-2, 0, 2]
    wanted[1] = [0, 127, 255]
    image = torch.from_numpy(values).permute(0, 3, 1, 2).float().contiguous()
    graph = build_graph("decode", model, "fp32", 2)
    graph.post_quant_conv, graph.decoder = torch.nn.Identity(), Picture(image)
    for found in (to_uint8(image), graph(torch.zeros(2, 4, 2, 2)).numpy()):
        assert found.dtype == np.uint8 and found.shape == (2, 16, 16, 3)
        assert np.array_equal(found, wanted)


def test_packed_widths_of_sd15() -> None:
    from cldm.config import load_config

    specs = graph_specs(Build(load_config("sd15"), 256, 384))
    assert specs["text"].outputs["keys_values"].shape == (2, 77, 36480)
    assert specs["time"].outputs["time_biases"].shape == ("S", 29760)
    assert specs["step"].inputs["control_scales"].shape == (2, 13)
    assert specs["hint"].outputs["hint_features"].shape == (1, 320, 32, 48)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 100}, "multiple of 32"),
        ({"width": 0}, "multiple of 32"),
        ({"samples": 0}, "samples"),
        ({"precision": "int8"}, "precision"),
    ],
)
def test_builds_that_cannot_be(arguments: Dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Build(small_config(), **{"height": HEIGHT, "width": WIDTH, **arguments})
