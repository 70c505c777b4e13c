"""What FP8 is packed from: factors, steps, the layers that take it, and how it is asked for."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Dict

import pytest
import torch
from torch import nn

from cldm.checkpoint import load_model
from cldm.config import load_config
from cldm.model import ControlLDM
from cldm.weights import Weights
from deploy.spec import Build, graph_specs
from ldm.autoencoder import AttnBlock
from runtime.backends import BackendError
from runtime.fused import networks
from runtime.fused.build import SHIPPED, _meta
from runtime.fused.fp8 import factor_of, input_ranges, quantise, worthwhile
from runtime.fused.ops import Fused
from runtime.fused.packing import Packer
from runtime.fused.tuning import (
    Card,
    Config,
    Problem,
    Tuning,
    candidates,
    card_slug,
    estimate,
    fits,
    read_table,
    shared_bytes,
)
from runtime.torch_backend import TorchBackend
from tests.interpreted import needs_triton
from tests.small_model import small_config

H200 = Card("NVIDIA H200", 90, 132, 232448, boxes=True)
RTX_4090 = Card("NVIDIA GeForce RTX 4090", 89, 128, 101376)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("largest", "factor"), [(112, 1), (113, 0.5), (7, 16), (3.4, 32), (1000, 0.0625), (0, 1)])
def test_factors_by_hand(largest: float, factor: float) -> None:
    """448 / (4 x 112) is 1."""
    assert factor_of(largest) == factor


def test_factors_are_numbers_of_fp16() -> None:
    for largest in (1e-30, 1e-6, 65504.0, 1e30):
        factor = factor_of(largest)
        assert float(torch.tensor(factor, dtype=torch.float16)) == factor > 0


@pytest.mark.parametrize("largest", [math.inf, math.nan])
def test_inputs_without_a_largest_number_are_an_error(largest: float) -> None:
    with pytest.raises(ValueError, match="a layer's input reaches .*; take precision fp32"):
        factor_of(largest)


def test_weights_come_back_within_half_a_step() -> None:
    """e4m3 has three bits behind the leading one: an error of a 16th at most, and of half the smallest step, 2^-10."""
    matrix = torch.randn(2, 24, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 24)[:, None]
    matrix[1, 3] = 0
    numbers, scaling = quantise(matrix, 16, 8.0, 0.25)
    assert numbers.dtype == torch.float8_e4m3fn and scaling[1:] == (8.0, 0.25)
    factors = torch.cat([torch.full((64,), 8.0), torch.full((16,), 0.25)])
    steps = scaling.steps[..., None]
    back = numbers.float() * steps * factors
    assert ((back - matrix).abs() <= matrix.abs() / 16 + factors * steps * 2**-10 * 1.001).all()
    filled = torch.ones(2, 24, dtype=torch.bool)
    filled[1, 3] = False
    assert (numbers.float().abs().amax(dim=2) == 448)[filled].all() and not numbers[1, 3].float().any()


# -- layers ------------------------------------------------------------------------------------------------------------


def small_model() -> ControlLDM:
    config = small_config()
    return load_model(config, Weights(None, config.seed, ""))


def test_ranges_are_those_of_a_run_and_leave_the_model_as_it_was() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    ranges = input_ranges(model, "cpu", "fp32", (64, 64))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert ranges == input_ranges(model, "cpu", "fp32", (64, 64))
    decoder = model.first_stage_model.decoder
    products = [m for root in (model.unet, decoder) for m in root.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    left_out = {m for m in products if m not in ranges}
    attention = {m for block in decoder.modules() if isinstance(block, AttnBlock) for m in block.modules()}
    text = {m for block in model.unet.transformer_blocks() for m in (block.attn2.to_k, block.attn2.to_v)}
    time = {m for block in model.unet.res_blocks() for m in block.emb_layers} | set(model.unet.time_embed)
    assert left_out == {m for m in attention | text | time if m in products}
    assert all(0 < largest < 1e3 for largest in ranges.values())


def test_ranges_follow_the_inputs() -> None:
    """A layer behind a norm is given what the norm's scale makes of it."""
    model = small_model()
    block = model.unet.transformer_blocks()[0]
    before = input_ranges(model, "cpu", "fp32", (64, 64))[block.attn1.to_q]
    with torch.no_grad():
        block.norm1.weight.mul_(16)
        block.norm1.bias.mul_(16)
    assert input_ranges(model, "cpu", "fp32", (64, 64))[block.attn1.to_q] > 12 * before


def test_layers_of_one_launch_share_the_larger_range() -> None:
    convs = [nn.Conv2d(32, 64, 3, padding=1).requires_grad_(False) for _ in range(2)]
    tails = [nn.Conv2d(32, 64, 1).requires_grad_(False) for _ in range(2)]
    ranges: Dict[nn.Module, float] = {convs[0]: 1.0, convs[1]: 7.0, tails[0]: 500.0, tails[1]: 30.0}
    packed = Packer("cpu", torch.float16, ranges).conv(convs, tails)
    assert packed.fp8 is not None and packed.matrix.dtype == torch.float8_e4m3fn
    assert packed.fp8[1:] == (factor_of(7.0), factor_of(500.0))
    assert packed.fp8.steps.shape == (2, 64)
    del ranges[tails[1]]
    plain = Packer("cpu", torch.float16, ranges).conv(convs, tails)
    assert plain.fp8 is None and plain.matrix.dtype == torch.float16


def test_large_layers_alone() -> None:
    assert worthwhile(320, 320, 1, 0) and worthwhile(64, 32, 9, 0) and worthwhile(320, 320, 9, 640)
    assert not worthwhile(4, 320, 9, 0), "the predicted noise"
    assert not worthwhile(320, 4, 9, 0), "the latent"
    assert not worthwhile(64, 32, 1, 0) and not worthwhile(64, 48, 9, 0) and not worthwhile(64, 32, 9, 8)


@needs_triton
def test_nearly_all_of_sd15s_step_is_in_fp8() -> None:
    """By its operations; the text, the hint and the autoencoder's attention are not."""
    config = load_config("sd15")
    with torch.device("meta"):
        model = ControlLDM(config)
    ranges = {module: 1.0 for root in (model.unet, model.control_model) for module in root.modules()}
    run = Fused(Tuning(RTX_4090))
    spec = graph_specs(Build(config, 256, 384, 1, "fp8"))["step"]
    networks.FusedStep(model, run, "meta", ranges=ranges)(_meta(spec.inputs), _meta(spec.outputs))
    fp8 = sum(problem.flops for problem in run.asked if problem.fp8)
    assert fp8 > 0.99 * sum(problem.flops for problem in run.asked)
    assert {problem.n for problem in run.asked if not problem.fp8} == {4}
    shipped = read_table(SHIPPED / f"{card_slug(H200)}.json")
    assert not any(problem.key() in shipped for problem in run.asked if problem.fp8)
    for card in (H200, RTX_4090):
        for problem in run.asked:
            for config_ in (*candidates(problem, card), estimate(problem, card)):
                assert fits(problem, config_, card), (problem, config_)
                assert not problem.fp8 or config_.bk >= 32


def test_limits_by_hand() -> None:
    plain = Problem(1, 1024, 640, 640)
    problem = plain._replace(fp8=True)
    assert problem.key() == f"{plain.key()} fp8" and not plain.key().endswith("fp8")
    config = next(iter(candidates(problem, RTX_4090)))._replace(bm=128, bn=64, bk=64, warps=4, stages=4, splits=1)
    assert shared_bytes(problem, config) == (2 * 128 + 64) * 64 * 4
    assert fits(problem, config, RTX_4090)
    assert not fits(problem, config._replace(bn=128), RTX_4090), "two sums of 128 x 128 on 128 threads"
    assert fits(problem, config._replace(bn=128, warps=8, stages=3), RTX_4090)
    assert not fits(problem, config._replace(bk=16), RTX_4090)
    assert not fits(problem, config._replace(by=1, bx=128, stages=2), H200)


def test_tiles_of_fp16_where_nobody_measured() -> None:
    plain = Problem(1, 1024, 640, 640)
    problem, other = plain._replace(fp8=True), plain._replace(fp8=True, m=512)
    large, box_ = Config(128, 128, 64, 4, 3), Config(128, 64, 64, 4, 4, 2, 1, 128)
    assert Tuning(RTX_4090, {plain.key(): list(large)}).config(problem) == large._replace(warps=8)
    assert Tuning(H200, {plain.key(): list(box_)}).config(problem) == box_
    assert Tuning(RTX_4090, {plain.key(): list(box_)}).config(problem) == estimate(problem, RTX_4090)
    assert Tuning(H200, {plain.key(): list(box_)}).config(other) == estimate(other, H200)
    measured = Config(64, 64, 128, 4, 3)
    table = {plain.key(): list(large), problem.key(): list(measured)}
    assert Tuning(H200, table).config(problem) == measured and Tuning(H200, table).config(plain) == large


# -- how it is asked for -----------------------------------------------------------------------------------------------


def backend(device: str, folder: Path) -> TorchBackend:
    def load() -> None:
        raise AssertionError("weights were loaded before the device was looked at")

    return TorchBackend(Weights(None, 1, ""), load, device, folder, print)


def test_cuda_devices_alone_offer_it(tmp_path: Path) -> None:
    assert "fp8" in backend("cuda", tmp_path).precisions and "fp8" not in backend("cpu", tmp_path).precisions
    assert backend("cuda", tmp_path).precisions[0] == "fp16"


@needs_triton
@pytest.mark.parametrize(
    ("capability", "variable", "reason"),
    [((8, 6), "1", "FP8 needs compute capability 8.9, and this GPU has 8.6"), ((9, 0), "0", "HACKATHON_FUSED is 0")],
)
def test_where_it_cannot_run_is_an_error_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple, variable: str, reason: str
) -> None:
    monkeypatch.setenv("HACKATHON_FUSED", variable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    build = Build(small_config(), 64, 64, 1, "fp8")
    with pytest.raises(BackendError, match=f"fp8 runs on the fused kernels alone: {reason}; take precision fp16"):
        backend("cuda", tmp_path).sessions(build)


def test_its_tensors_are_those_of_fp16() -> None:
    config = small_config()
    fp8, fp16 = (graph_specs(Build(config, 64, 64, 1, precision)) for precision in ("fp8", "fp16"))
    assert {name: spec.tensors for name, spec in fp8.items()} == {name: spec.tensors for name, spec in fp16.items()}
    assert Build(config, 64, 64, 1, "fp8").folder_name.endswith("-fp8")
