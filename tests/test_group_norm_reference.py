"""The NumPy reference of GroupNorm against torch, and the kernels' compilation where there is a CUDA compiler."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plugins.reference import group_norm, silu

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [
    # batch, channels, groups, pixels
    (2, 320, 32, (4, 6)),
    (1, 128, 32, (5, 7)),
    (3, 9, 3, (11,)),
    (2, 7, 7, (1, 1)),
    (1, 30, 1, (2, 3)),
    (2, 60, 4, ()),
]


def make_inputs(batch: int, channels: int, pixels: Tuple[int, ...], seed: int = 0) -> Dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(3.0, 2.0, (batch, channels, *pixels)),
        "gamma": rng.normal(1.0, 0.3, channels),
        "beta": rng.normal(0.0, 0.3, channels),
        "channel_bias": rng.normal(0.0, 1.0, (batch, channels)),
    }


def by_torch(inputs: Dict[str, np.ndarray], groups: int, epsilon: float, activation: str, bias: bool) -> np.ndarray:
    x, gamma, beta, channel_bias = (torch.from_numpy(inputs[name]) for name in ("x", "gamma", "beta", "channel_bias"))
    if bias:
        x = x + channel_bias.reshape(*channel_bias.shape, *([1] * (x.ndim - 2)))
    y = F.group_norm(x, groups, gamma, beta, epsilon)
    return (F.silu(y) if activation == "silu" else y).numpy()


def reference(inputs: Dict[str, np.ndarray], bias: bool = True, **options: Any) -> np.ndarray:
    channel_bias = inputs["channel_bias"] if bias else None
    return group_norm(inputs["x"], inputs["gamma"], inputs["beta"], channel_bias=channel_bias, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(
    shape: Tuple[int, int, int, Tuple[int, ...]], epsilon: float, activation: str, bias: bool
) -> None:
    batch, channels, groups, pixels = shape
    if batch * channels // groups * int(np.prod(pixels)) == 1:
        pytest.skip("torch refuses one value a group")
    inputs = make_inputs(batch, channels, pixels)
    got = reference(inputs, bias=bias, groups=groups, epsilon=epsilon, activation=activation)
    np.testing.assert_allclose(got, by_torch(inputs, groups, epsilon, activation, bias), rtol=1e-10, atol=1e-10)


def test_one_group_is_layer_norm() -> None:
    inputs = make_inputs(3, 10, (4, 5))
    x = torch.from_numpy(inputs["x"])
    one = np.ones(10)
    want = F.layer_norm(x, x.shape[1:], eps=1e-5).numpy()
    np.testing.assert_allclose(group_norm(inputs["x"], one, 0 * one, groups=1), want, rtol=1e-10, atol=1e-10)


def test_one_channel_a_group_is_instance_norm() -> None:
    inputs = make_inputs(3, 6, (4, 5))
    want = F.instance_norm(torch.from_numpy(inputs["x"]), eps=1e-5).numpy()
    one = np.ones(6)
    np.testing.assert_allclose(group_norm(inputs["x"], one, 0 * one, groups=6), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_rows_of_parameters_are_networks_side_by_side(rows: int, layout: str) -> None:
    inputs = make_inputs(6, 9, (4, 5))
    rng = np.random.default_rng(rows)
    inputs["gamma"], inputs["beta"] = rng.normal(1.0, 0.5, (2, rows, 9))
    samples = 6 // rows
    networks = []
    for row in range(rows):
        own = {name: inputs[name][row * samples : (row + 1) * samples] for name in ("x", "channel_bias")}
        own.update(gamma=inputs["gamma"][row], beta=inputs["beta"][row])
        networks.append(by_torch(own, 3, 1e-5, "silu", bias=True))
    if layout == "nhwc":
        inputs["x"] = np.moveaxis(inputs["x"], 1, -1)
    got = reference(inputs, groups=3, activation="silu", layout=layout)
    got = np.moveaxis(got, -1, 1) if layout == "nhwc" else got
    np.testing.assert_allclose(got, np.concatenate(networks), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 4])
def test_nhwc_is_nchw_with_its_axes_moved(padding: int) -> None:
    inputs = make_inputs(2, 12, (3, 5))
    want = np.moveaxis(reference(inputs, groups=4, activation="silu"), 1, -1)
    # What lies in the padding must not matter, whatever it is.
    padded = np.full((2, 3, 5, 12 + padding), np.nan)
    padded[..., :12] = np.moveaxis(inputs["x"], 1, -1)
    got = reference({**inputs, "x": padded}, groups=4, activation="silu", layout="nhwc", channels=12)
    np.testing.assert_array_equal(got[..., :12], want)
    assert not got[..., 12:].any()


def test_float32_survives_a_large_mean() -> None:
    inputs = make_inputs(1, 32, (16, 16))
    inputs["x"] = np.float32(1000.0 + inputs["x"]).astype(np.float64)
    exact = reference(inputs, bias=False, groups=4)
    got = reference(inputs, bias=False, groups=4, dtype=np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 1000.1, -6e4])
def test_constant_input_gives_beta(value: float, dtype: type) -> None:
    inputs = make_inputs(2, 8, (5,))
    inputs["x"] = np.full((2, 8, 5), value)
    got = reference(inputs, bias=False, groups=2, dtype=dtype)
    np.testing.assert_array_equal(got, np.broadcast_to(inputs["beta"].astype(dtype)[:, None], got.shape))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_fill_their_group_only(bad: float) -> None:
    inputs = make_inputs(2, 8, (5,))
    inputs["x"][1, 3, 2] = bad
    got = reference(inputs, groups=2, activation="silu")
    assert np.isnan(got[1, :4]).all()
    assert np.isfinite(got[0]).all() and np.isfinite(got[1, 4:]).all()


def test_silu_at_the_ends() -> None:
    got = silu(np.array([-np.inf, -2000.0, 0.0, 50.0, np.inf, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(got, np.array([0, 0, 0, 50, np.inf, np.nan], dtype=np.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"groups": 3}, "groups: 3 does not divide 8"),
        ({"groups": 0}, "groups: 0"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": np.inf}, "epsilon"),
        ({"activation": "gelu"}, "activation: 'gelu'"),
        ({"layout": "chw"}, "layout: 'chw'"),
        ({"channels": 4}, "channels: 4"),
    ],
)
def test_bad_arguments(change: Dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        reference(make_inputs(1, 8, (5,)), **{"groups": 2, **change})


@pytest.mark.parametrize("name", ["gamma", "beta", "channel_bias"])
def test_bad_shapes(name: str) -> None:
    inputs = make_inputs(1, 8, (5,))
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=name):
        reference(inputs, groups=2)


@pytest.mark.parametrize(
    "gamma, beta, message",
    [
        ((3, 8), (3, 8), "gamma: shape (3, 8), (8,) or (rows, 8) is wanted, rows dividing 4"),
        ((8, 8), (8, 8), "gamma: shape (8, 8)"),
        ((0, 8), (0, 8), "gamma: shape (0, 8)"),
        ((2, 4), (2, 4), "gamma: shape (2, 4)"),
        ((1, 2, 8), (1, 2, 8), "gamma: shape (1, 2, 8)"),
        ((), (), "gamma: shape ()"),
        ((2, 8), (8,), "beta: shape (8,), (2, 8) is wanted"),
        ((2, 8), (4, 8), "beta: shape (4, 8), (2, 8) is wanted"),
    ],
    ids=str,
)
def test_bad_rows(gamma: Tuple[int, ...], beta: Tuple[int, ...], message: str) -> None:
    inputs = {**make_inputs(4, 8, (5,)), "gamma": np.ones(gamma), "beta": np.zeros(beta)}
    with pytest.raises(ValueError, match=re.escape(message)):
        reference(inputs, groups=2)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA compiler, nvcc")
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_warnings_and_spills(architecture: int, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xcompiler", "-fPIC,-Wall,-Wextra", "-Xptxas", "-v", "-c", "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(
        [*command, str(ROOT / "plugins" / "group_norm_kernels.cu")], capture_output=True, text=True, timeout=280
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    assert "warning" not in report, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) > 10
    assert set(spills) == {("0", "0", "0")}, report
