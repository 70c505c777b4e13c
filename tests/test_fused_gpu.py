"""The fused kernels and networks on a CUDA device; skipped elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch

from canny2image_TRT import hackathon
from cldm.checkpoint import load_model
from cldm.config import ModelConfig, load_config
from cldm.request import Request
from cldm.weights import Weights
from deploy.spec import Build
from ldm.exact import exact_fp32
from runtime.fused.fp8 import input_ranges, worthwhile
from runtime.fused.ops import Fused
from runtime.fused.session import FusedSession
from runtime.fused.tuning import (
    AttentionConfig,
    AttentionProblem,
    Card,
    Config,
    Tuning,
    attention_candidates,
    attention_fits,
    candidates,
    estimate,
    flash_programs,
)
from runtime.torch_session import TorchSession
from scoring.pictures import OWN_FOLDER
from tests.fused_cases import ATTENTIONS, FP8_ERROR, MATMULS, RAGGED, Attention, Matmul, Operands, boxed, relative
from tests.fused_kernel_cases import KERNELS
from tests.fused_network_cases import compare

pytestmark = pytest.mark.gpu

SHORT = Request("a bird", "best quality", "lowres", ddim_steps=4, seed=3)
# Of SD1.5 at the contest's size: those that cut sums, those that fill the card, and both kinds of concatenation.
LARGE = {
    "qkv": Matmul(nets=2, batch=2, height=16, width=24, cin=640, n=1920),
    "few rows": Matmul(nets=2, batch=2, height=4, width=6, cin=1280, n=1280, residual=1),
    "gated": Matmul(nets=2, batch=2, height=8, width=12, cin=640, n=2560, gated=True),
    "gated, short sum": Matmul(nets=2, batch=2, height=32, width=48, cin=320, n=1280, gated=True),
    "gated, ragged": Matmul(nets=2, batch=1, height=10, width=10, cin=456, n=200, gated=True),
    "short sum": Matmul(nets=2, batch=2, height=32, width=48, cin=320, n=960),
    "short sum, all that is added": Matmul(batch=4, height=9, width=7, cin=320, n=328, residual=2, shift=True, scale=2),
    "zero conv": Matmul(batch=2, height=8, width=12, cin=640, n=640, residual=1, scale=2, margin=64),
    "conv": Matmul("conv", batch=2, height=16, width=24, cin=320, n=640, shift=True),
    "conv, smallest map": Matmul("conv", nets=2, batch=2, height=4, width=6, cin=1280, n=1280, residual=2),
    "conv with a tail": Matmul("conv", nets=2, batch=2, height=8, width=12, cin=640, n=1280, tail=320, margin=64),
    "conv of the hint": Matmul("conv", height=64, width=96, cin=96, n=256, stride=2, act="silu"),
    "last conv": Matmul("conv", batch=2, height=32, width=48, cin=320, n=4, out="float32"),
    "up": Matmul("up", batch=2, height=8, width=12, cin=640, n=640),
}


@pytest.fixture(scope="module")
def card() -> Card:
    from runtime.fused.tune import card_of  # needs triton

    return card_of("cuda")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    import cv2

    return cv2.imread(str(OWN_FOLDER / "eagle.jpg"))


def check_product(operands: Operands, run: Fused, config: Config) -> None:
    found = operands.run(run, config, repeats=2)
    torch.cuda.synchronize()
    assert found["error"] < operands.bound(), config
    assert found["same"] and found["beside"] and found["counters"] == 0, (config, found)


def needs_fp8(card: Card) -> None:
    if card.capability < 89:
        pytest.skip("FP8 needs compute capability 8.9")


@pytest.mark.parametrize("name", MATMULS)
def test_small_products(name: str, card: Card) -> None:
    """All kernels, with and without programmatic launch."""
    case, config = MATMULS[name]
    if case.fp8:
        needs_fp8(card)
    operands = Operands(case, "cuda")
    runs = [Fused(Tuning(card), pdl=pdl) for pdl in ((False, True) if card.capability >= 90 else (False, False))]
    configs = [config, estimate(case.problem(), card), *boxed(case, config.splits, card)]
    for i, chosen in enumerate(configs):
        check_product(operands, runs[i % 2], chosen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_boxes_that_stick_out_of_their_maps(name: str, dtype: torch.dtype, card: Card) -> None:
    if not card.boxes:
        pytest.skip("the boxes are for compute capability 9.0")
    operands = Operands(RAGGED[name], "cuda", dtype)
    runs = [Fused(Tuning(card), dtype, pdl=pdl) for pdl in (False, True)]
    for splits in (1, 3):
        for i, config in enumerate(boxed(RAGGED[name], splits, card)):
            check_product(operands, runs[i % 2], config)


def check_tiles(operands: Operands, offered: List[Config], card: Card) -> None:
    """Some of all kernels' configurations, with and without programmatic launch."""
    kinds: Dict[Tuple[bool, ...], List[Config]] = {}
    for config in offered:
        kinds.setdefault((config.bx > 0, config.columns > 0, config.walk > 0, config.feeder > 0), []).append(config)
    runs = [Fused(Tuning(card), pdl=pdl) for pdl in ((False, True) if card.capability >= 90 else (False, False))]
    for kind in kinds.values():
        for i, config in enumerate(kind[:: max(1, len(kind) // 4)]):
            check_product(operands, runs[i % 2], config)


@pytest.mark.parametrize("name", LARGE)
def test_large_products(name: str, card: Card) -> None:
    case = LARGE[name]
    operands, offered = Operands(case, "cuda"), candidates(case.problem(), card)
    check_tiles(operands, offered, card)


@pytest.mark.parametrize("name", LARGE)
def test_large_products_in_fp8(name: str, card: Card) -> None:
    """Both kernels' tiles; the result is that of the numbers that are left, and comes near that of the others."""
    needs_fp8(card)
    case = LARGE[name]._replace(fp8=1)
    if not worthwhile(case.n, case.cin, case.taps, case.tail):
        pytest.skip("too small a layer, or one whose blocks have a rest")
    operands, offered = Operands(case, "cuda"), candidates(case.problem(), card)
    check_tiles(operands, offered, card)
    assert 2e-3 < operands.run(Fused(Tuning(card)), offered[0])["before rounding"] < FP8_ERROR


@pytest.mark.parametrize("name", ["linear, two nets", "gated", "conv with a tail, 3 parts", "up", "scale by image"])
def test_products_in_bfloat16(name: str, card: Card) -> None:
    case, config = MATMULS[name]
    operands = Operands(case, "cuda", torch.bfloat16)
    run = Fused(Tuning(card), torch.bfloat16, pdl=card.capability >= 90)
    for chosen in (config, *boxed(case, config.splits, card)):
        check_product(operands, run, chosen)


# Several tiles a program, blocks and tiles that end inside, keys and queries of halves.
LARGE_ATTENTIONS = {
    "step": Attention(40, nets=2, length=1536, keys=1536, heads=8),
    "step, one net": Attention(40, length=1536, keys=1536, heads=8),
    "step, half the size": Attention(80, nets=2, length=384, keys=384, heads=8),
    "text": Attention(40, nets=2, queries=1, length=1536, keys=77, heads=8),
    "text, half the size": Attention(80, nets=2, queries=4, images=4, length=384, keys=77, heads=8),
    "ragged": Attention(40, nets=2, queries=1, images=3, key_images=1, length=1111, keys=777, heads=5),
    "one head": Attention(128, queries=1, images=1, key_images=1, length=65, keys=129, heads=1),
}


def attention_tiles(problem: AttentionProblem, card: Card) -> List[AttentionConfig]:
    """Some of the first kernel's configurations; all of the second's, and some however small the problem."""
    offered = attention_candidates(problem, card)
    few = 2 if problem.length < 64 else 8
    kept = [config for config in offered if not config.teams][::few] + [config for config in offered if config.teams]
    shapes = ((1, 32, 3, 1), (2, 64, 4, 0), (3, 64, 3, 8))
    more = [AttentionConfig(64 * teams, bn, 4, stages, teams, p) for teams, bn, stages, p in shapes]
    return kept + [config for config in more if attention_fits(problem, config, card)]


def check_attention(case: Attention, dtype: torch.dtype, bound: float, card: Card) -> None:
    """With and without programmatic launch, and the same bits each time."""
    runs = [Fused(Tuning(card), dtype, pdl=pdl) for pdl in ((True, False) if card.capability >= 90 else (False, False))]
    q, k, v = case.operands("cuda", dtype)
    wanted = case.wanted(q, k, v)
    runs[0].attention(q.to("meta"), k.to("meta"), v.to("meta"), case.heads, case.causal, case.images)
    (problem,) = runs[0].asked_attention
    for i, config in enumerate((None, *attention_tiles(problem, card))):
        run = runs[i % 2]
        found = [run.attention(q, k, v, case.heads, case.causal, case.images, config) for _ in range(2)]
        assert relative(found[0], wanted) < bound, config
        assert torch.equal(*found), config


@pytest.mark.parametrize("name", [*ATTENTIONS, *LARGE_ATTENTIONS])
def test_attention(name: str, card: Card) -> None:
    check_attention({**ATTENTIONS, **LARGE_ATTENTIONS}[name], torch.float16, 5e-4, card)


@pytest.mark.parametrize("name", ["step, half the size", "ragged"])
def test_attention_in_bfloat16(name: str, card: Card) -> None:
    check_attention(LARGE_ATTENTIONS[name], torch.bfloat16, 4e-3, card)


def test_programs_of_attention_take_several_tiles(card: Card) -> None:
    """Or what the large cases check would not be what runs."""
    problem = AttentionProblem(1536, 1536, 40, 8, 4)
    config = AttentionConfig(192, 128, 4, 4, 3)
    if not attention_fits(problem, config, card):
        pytest.skip("the kernel is for compute capability 9.0")
    assert flash_programs(problem, config, card) < 8 * 4 * 1536 // 192


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("pdl", [False, True])
def test_other_kernels(name: str, pdl: bool, card: Card) -> None:
    if pdl and card.capability < 90:
        pytest.skip("programmatic launch needs compute capability 9.0")
    with torch.device("cuda"), torch.no_grad():
        outcome = KERNELS[name](Fused(Tuning(card), pdl=pdl))
    assert outcome["error"] <= outcome["bound"]


@pytest.mark.parametrize("name", ["conv, smallest map", "few rows"])
def test_replays_give_the_same_bits(name: str, card: Card) -> None:
    """A cut sum is added in one order whoever comes last, and each launch leaves the counters ready for the next."""
    case = LARGE[name]
    operands, problem = Operands(case, "cuda"), case.problem()
    cut = [config for config in candidates(problem, card) if config.splits > 2]
    chosen = [next(config for config in cut if bool(config.bx) == kind) for kind in {bool(c.bx) for c in cut}]
    run = Fused(Tuning(card), pdl=card.capability >= 90)
    outs = [operands.target()[0] for _ in range(4)]

    def launch() -> None:
        for i, out in enumerate(outs):
            config = chosen[i % len(chosen)]
            run.matmul(operands.x, operands.weights, out, residual=operands.residual, config=config)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    wanted = [out.clone() for out in outs]
    for _ in range(50):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, want) for out, want in zip(outs, wanted))
    assert relative(wanted[0], operands.wanted()) < operands.bound()


# -- whole networks ----------------------------------------------------------------------------------------------------


def networks_of(config: ModelConfig, weights: Weights, build: Build, card: Card, **options: Any) -> Dict[str, Any]:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[build.precision]
    run = Fused(Tuning(card), dtype, pdl=card.capability >= 90)
    with torch.no_grad(), exact_fp32():
        return compare(build, load_model(config, weights), run, device="cuda", **options)


def check_errors(errors: Dict[str, Tuple[float, float]], bound: float) -> None:
    for name, (fused, plain) in errors.items():
        print(f"{name}: {fused:.2e}, in plain half precision {plain:.2e}")
        assert plain < bound
        assert fused < 1.5 * plain, name


@pytest.mark.parametrize(("samples", "precision", "bound"), [(1, "fp16", 2e-2), (2, "fp16", 2e-2), (1, "bf16", 2e-1)])
def test_networks_of_tiny(
    samples: int, precision: str, bound: float, tiny_config: ModelConfig, tiny_weights: Weights, card: Card
) -> None:
    build = Build(tiny_config, 256, 384, samples, precision)
    check_errors(networks_of(tiny_config, tiny_weights, build, card), bound)


def test_networks_of_tiny_in_fp8(tiny_config: ModelConfig, tiny_weights: Weights, card: Card) -> None:
    needs_fp8(card)
    model = load_model(tiny_config, tiny_weights)
    ranges = input_ranges(model, "cuda")
    run = Fused(Tuning(card), pdl=card.capability >= 90)
    with torch.no_grad(), exact_fp32():
        errors = compare(Build(tiny_config, 256, 384, 1, "fp8"), model, run, ("step", "decode"), "cuda", ranges)
    for name, (fused, plain) in errors.items():
        print(f"{name}: {fused:.2e}, in plain FP16 {plain:.2e}")
        assert 3 * plain < fused < 0.4, name


@pytest.mark.slow
def test_step_of_sd15(card: Card) -> None:
    config = load_config("sd15")
    build = Build(config, 256, 384, 1, "fp16")
    check_errors(networks_of(config, Weights(None, 1, ""), build, card, names=("step", "decode")), 2e-2)


def test_images_are_the_same_bits_after_another_start(tiny_weights: Weights, picture: np.ndarray) -> None:
    """Three images of builds for two and for one."""
    for samples in (1, 2):
        found = []
        for _ in range(2):
            hk = hackathon()
            hk.initialize(model="tiny", samples=samples)
            (pipeline,) = hk._pipelines.values()
            assert isinstance(pipeline.sessions["step"], FusedSession)
            found.append(hk.run(picture, replace(SHORT, num_samples=3)))
            assert not found[-1].receipt.warnings
            hk.close()
        first, second = found
        assert len(first.images) == 3 and np.array_equal(first.latent, second.latent)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(first.images, second.images))
        assert len({image.tobytes() for image in first.images}) == 3


def test_pictures_of_two_sizes_in_turn(tiny_weights: Weights, picture: np.ndarray) -> None:
    """Graphs of one size are launched after those of the other were captured, on the same scratch."""
    hk = hackathon()
    hk.initialize(model="tiny")
    wanted = hk.run(picture, SHORT)
    larger = hk.run(picture, replace(SHORT, image_resolution=512))
    for _ in range(2):
        assert np.array_equal(hk.run(picture, SHORT).latent, wanted.latent)
        assert np.array_equal(hk.run(picture, replace(SHORT, image_resolution=512)).latent, larger.latent)
    hk.close()


def test_the_fused_networks_can_be_turned_off(
    tiny_weights: Weights, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for value, session in (("1", FusedSession), ("0", TorchSession)):
        monkeypatch.setenv("HACKATHON_FUSED", value)
        hk = hackathon()
        hk.initialize(model="tiny")
        (pipeline,) = hk._pipelines.values()
        assert isinstance(pipeline.sessions["step"], session)
        found.append(torch.from_numpy(hk.run(picture, SHORT).latent))
        hk.close()
    error = relative(found[0], found[1].double())
    print(f"tiny, 4 steps, with and without the fused networks: {error:.2e}")
    assert 0 < error < 2e-2


def test_images_in_fp8(tiny_weights: Weights, picture: np.ndarray, card: Card) -> None:
    """Receipts say so, two starts give the same bits, and the picture is that of FP16 with some noise."""
    needs_fp8(card)
    found = {}
    for name, precision in (("first", "fp8"), ("second", "fp8"), ("plain", "fp16")):
        hk = hackathon()
        hk.initialize(model="tiny", precision=precision)
        found[name] = hk.run(picture, SHORT)
        assert found[name].receipt.precision == precision and not found[name].receipt.warnings
        hk.close()
    assert np.array_equal(found["first"].latent, found["second"].latent)
    error = relative(torch.from_numpy(found["first"].latent), torch.from_numpy(found["plain"].latent).double())
    print(f"tiny, 4 steps, FP8 beside FP16: {error:.3f}")
    assert 1e-3 < error < 0.4


def test_too_little_memory_is_an_error_before_any_work(tiny_weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *arguments: (int(5e8), int(8e9)))
    hk = hackathon()
    with pytest.raises(MemoryError, match="stop other programs"):
        hk.initialize(model="tiny")
