"""The fused kernels' own text against float64, on a CPU."""

from __future__ import annotations

import weakref
from typing import Any, Dict

import pytest
import torch

from runtime.fused.ops import MOST_ELEMENTS, Affine, Fused, Weights
from runtime.fused.tuning import Config, Problem, Tuning
from tests.fused_cases import ATTENTIONS, CARD, FP8_ERROR, MATMULS
from tests.fused_kernel_cases import KERNELS
from tests.interpreted import needs_triton, run_interpreted


@pytest.fixture(scope="module")
def found() -> Dict[str, Dict[str, Any]]:
    """All outcomes of one process: to start it takes longer than most cases."""
    return run_interpreted("tests.fused_kernel_cases")


@needs_triton
@pytest.mark.parametrize("name", MATMULS)
def test_product(found: Dict[str, Dict[str, Any]], name: str) -> None:
    outcome = found["products"][name]
    assert outcome["error"] < outcome["bound"]
    assert outcome["beside"], "channels beside the slice were written"
    assert outcome["same"], "a second run gave other bits"
    assert outcome["counters"] == 0, "the counters are not ready for the next launch"


@needs_triton
@pytest.mark.parametrize("name", [name for name, (case, _) in MATMULS.items() if case.fp8 == 1])
def test_fp8_product_beside_the_numbers_before_rounding(found: Dict[str, Dict[str, Any]], name: str) -> None:
    error = found["products"][name]["before rounding"]
    print(f"{name}: {error:.4f}")
    assert 5e-3 < error < FP8_ERROR


@needs_triton
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(found: Dict[str, Dict[str, Any]], name: str) -> None:
    assert found["attentions"][name]["error"] < found["attentions"][name]["bound"]


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(found: Dict[str, Dict[str, Any]], name: str) -> None:
    assert found["kernels"][name]["error"] <= found["kernels"][name]["bound"]


@needs_triton
def test_pixels_meet_both_ends(found: Dict[str, Dict[str, Any]]) -> None:
    assert 0.1 < found["kernels"]["pixels"]["clamped"] < 0.5


# -- what the launches are made from -----------------------------------------------------------------------------------


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def test_weights_that_do_not_fit_are_refused() -> None:
    run, weights = Fused(Tuning(CARD)), Weights(meta(1, 16, 32))
    for shape in ((1, 1, 1, 4, 31), (2, 1, 1, 4, 32)):
        with pytest.raises(ValueError, match="does not fit weights"):
            run.matmul(meta(*shape), weights)


@needs_triton
def test_maps_that_are_no_rows_of_pixels_are_refused() -> None:
    """Kernels know one distance, from pixel to pixel."""
    run, weights = Fused(Tuning(CARD)), Weights(meta(1, 16, 32))
    whole = meta(1, 4, 6, 6, 64)
    run.matmul(whole[..., :32], weights)
    run.matmul(whole[:, 1:3, ..., 32:], weights)
    cases = [whole[:, :, :3, :, :32], whole[:, :, :, :3, :32], whole[:, ::2, ..., :32], whole[..., ::2]]
    for x in cases:
        with pytest.raises(ValueError, match="the input .* is no row of pixels"):
            run.matmul(x, weights)
        with pytest.raises(ValueError, match="the input .* is no row of pixels"):
            run.layer_norm(x, Affine(meta(1, 32), meta(1, 32), 1e-5))
    for name in ("out", "residual"):
        with pytest.raises(ValueError, match="is no row of pixels"):
            run.matmul(meta(1, 2, 3, 3, 32), weights, **{name: meta(1, 2, 3, 6, 16)[:, :, :, :3]})


def test_attention_of_rows_between_multiples_of_16_bytes_is_refused() -> None:
    run, rows = Fused(Tuning(CARD)), torch.empty(1, 2, 9, 3 * 80 + 4, dtype=torch.float16)
    whole = torch.empty(1, 2, 9, 3 * 80 + 8, dtype=torch.float16)
    for between in (rows[..., :80], whole[..., 4:84]):
        q, k, v = whole[:, :, None, :, :80], whole[..., 80:160], whole[..., 160:240]
        for name, parts in (
            ("queries", (between[:, :, None], k, v)),
            ("keys", (q, between, v)),
            ("values", (q, k, between)),
        ):
            with pytest.raises(ValueError, match=f"the {name} .* multiples of 16 bytes"):
                run.attention(*parts, heads=2)
    with pytest.raises(ValueError, match="odd number"):
        run.attention(whole[:, :, None, :, :80], whole[..., 80:160], whole[..., 160:240], heads=16)


@needs_triton
def test_maps_beyond_32_bit_offsets_are_refused() -> None:
    """Eight pictures of 1024 x 1024, and the scores of one of 2048 x 2048, as the decoder has them."""
    run = Fused(Tuning(CARD))
    conv = Weights(meta(1, 128, 9 * 256), taps=9)
    run.matmul(meta(1, 7, 1024, 1024, 256), conv)
    with pytest.raises(ValueError, match="the input .*32-bit.*fewer samples"):
        run.matmul(meta(1, 8, 1024, 1025, 256), conv)
    with pytest.raises(ValueError, match="the output .*32-bit"):
        run.matmul(meta(1, 1, 256, 256, 64), Weights(meta(1, 256 * 256, 64)))
    with pytest.raises(ValueError, match="the output .*32-bit"):
        run.first_conv(meta(1, 3, 4096, 4096), Weights(meta(1, 256, 27), taps=9), 1)
    assert torch.iinfo(torch.int32).max == MOST_ELEMENTS


def test_scratch_that_graphs_were_captured_with_stays() -> None:
    run = Fused(Tuning(CARD))
    device, config = torch.device("cpu"), Config(128, 256, 64, 8, 3, 4)
    problem = Problem(1, 1, 1, 64)
    small = run._split_scratch(device, problem, config, 1)
    assert run._split_scratch(device, problem, config, 2)[0] is small[0]
    kept = [weakref.ref(tensor) for tensor in small]
    del small
    large = run._split_scratch(device, problem, config, 80)
    assert large[0].numel() >= 80 * 4 * 128 * 256 and not large[1].any()
    assert all(tensor() is not None for tensor in kept)
    assert run._split_scratch(device, problem, config, 1)[0] is large[0]
    many = Config(16, 16, 16, 4, 2, 2)
    assert run._split_scratch(device, Problem(2, 1, 1, 64), many, 5000)[1].numel() >= 10_000
    assert run._split_scratch(device, problem, config, 1)[0].numel() >= large[0].numel()
