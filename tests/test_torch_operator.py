"""The torch operator `canny2image::group_norm_silu`: its formula, how compilers see it, and its CUDA kernel."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plugins import torch_operator
from plugins.torch_operator import BuildError, fused_group_norm, group_norm_silu

OPERATOR = torch.ops.canny2image.group_norm_silu
HALF_TYPES = (torch.float16, torch.bfloat16)
NUM_CUDA_CASES = 360


class Case(NamedTuple):
    """One call in numbers; `make` draws its tensors."""

    seed: int
    shape: Tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    layout: str = "nchw"  # or nhwc, or strided: every second row of a map
    bias: str = "none"  # or rows, or row
    activation: str = "silu"
    epsilon: float = 1e-5
    mean: float = 0.0
    deviation: float = 1.0
    parameter_rows: int = 0  # of gamma and beta; 0: one vector


def make(case: Case, device: str = "cpu") -> Tuple[torch.Tensor, ...]:
    """x, gamma, beta and bias of a case, drawn on the CPU so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(case.seed)
    n, c, h, w = case.shape
    rows = 2 * h if case.layout == "strided" else h
    x = case.mean + case.deviation * torch.randn((n, c, rows, w), generator=generator)
    x = x.to(device, case.dtype)
    if case.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    elif case.layout == "strided":
        x = x[:, :, ::2]
    # Of the data's type at first, so that PyTorch, which takes them in that type only, has the same numbers.
    shape = (case.parameter_rows, c) if case.parameter_rows else (c,)
    gamma = (1 + 0.5 * torch.randn(shape, generator=generator)).to(case.dtype)
    beta = (0.5 * torch.randn(shape, generator=generator)).to(case.dtype)
    rows = {"none": 0, "row": 1, "rows": n}[case.bias]
    bias = case.deviation * torch.randn((rows, c), generator=generator).to(device, case.dtype) if rows else None
    return x, gamma.to(device, case.parameter_dtype), beta.to(device, case.parameter_dtype), bias


def of_samples(parameter: torch.Tensor, batch: int) -> torch.Tensor:
    """The row of gamma or beta that each sample has."""
    rows = parameter if parameter.dim() == 2 else parameter[None]
    return torch.stack([rows[n * len(rows) // batch] for n in range(batch)])


def exact(x: torch.Tensor, gamma: Any, beta: Any, bias: Any, case: Case) -> torch.Tensor:
    """The formula in float64, on the device of `x`."""
    h = x.double()
    if bias is not None:
        h = h + bias.double()[:, :, None, None]
    grouped = h.reshape(x.shape[0], case.groups, -1)
    grouped = grouped - grouped.mean(-1, keepdim=True)
    variance = grouped.square().mean(-1, keepdim=True)
    h = (grouped / (variance + case.epsilon).sqrt()).reshape(x.shape)
    gamma, beta = (of_samples(tensor, x.shape[0]).double()[:, :, None, None] for tensor in (gamma, beta))
    h = h * gamma + beta
    return h * h.sigmoid() if case.activation == "silu" else h


def run(case: Case, tensors: Tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, gamma, beta, bias = tensors
    return OPERATOR(x, gamma, beta, bias, case.groups, case.epsilon, case.activation)


def pytorch(case: Case, tensors: Tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The same in PyTorch's own operators, in the type of the data."""
    x, *parameters, bias = tensors
    if bias is not None:
        x = x + bias[:, :, None, None]
    gamma, beta = (parameter.to(x.dtype).reshape(-1, x.shape[1]) for parameter in parameters)
    # A network a row.
    shares = zip(x.chunk(len(gamma)), gamma, beta)
    y = torch.cat([torch.group_norm(one, case.groups, *own, case.epsilon) for one, *own in shares])
    return F.silu(y) if case.activation == "silu" else y


def largest(error: torch.Tensor) -> float:
    return float(error.abs().max())


# The CPU: the formula.

CPU_CASES = [
    Case(0, (2, 32, 4, 6), 32),
    Case(1, (1, 1, 1, 1), 1, activation="none"),
    Case(2, (3, 15, 5, 7), 5, bias="rows"),
    Case(3, (2, 21, 3, 3), 3, bias="row", layout="nhwc"),
    Case(4, (2, 14, 9, 1), 7, layout="strided", activation="none"),
    Case(5, (2, 24, 16, 16), 1, epsilon=0.5),
    Case(6, (2, 24, 16, 16), 24, epsilon=1e-12),
    Case(7, (2, 64, 16, 24), 8, mean=1000.0),
    Case(8, (1, 64, 64, 64), 2, mean=-1000.0, layout="nhwc", activation="none"),
    Case(9, (2, 12, 8, 8), 4, deviation=1e-4, epsilon=1e-6),
    Case(10, (2, 12, 8, 8), 4, deviation=1e15),
    Case(11, (2, 12, 8, 8), 4, deviation=0.0, mean=3.0),
    Case(12, (2, 12, 8, 8), 4, dtype=torch.float64, mean=1000.0),
    Case(13, (2, 12, 8, 8), 4, dtype=torch.float64, parameter_dtype=torch.float64, bias="rows"),
]
CPU_CASES += [
    Case(20 + rows, (6, 9, 5, 7), 3, layout=layout, bias="rows", parameter_rows=rows)
    for rows, layout in ((1, "nchw"), (2, "nhwc"), (3, "strided"), (6, "nchw"))
]


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: f"case{case.seed}")
def test_formula_against_float64(case: Case) -> None:
    tensors = make(case)
    found, wanted = run(case, tensors), exact(*tensors, case)
    bound = {torch.float64: 1e-12, torch.float32: 2e-6 * (1 + abs(case.mean) / 100)}[case.dtype]
    assert largest(found - wanted) < bound * max(1.0, largest(wanted))
    assert found.dtype == tensors[0].dtype


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in CPU_CASES if case.dtype == torch.float32], ids=lambda case: f"case{case.seed}"
)
def test_half_precision_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    deviation = min(case.deviation, 100.0)
    for parameter_dtype in (torch.float32, dtype):
        case = case._replace(dtype=dtype, parameter_dtype=parameter_dtype, deviation=deviation)
        tensors = make(case)
        found, wanted = run(case, tensors), exact(*tensors, case)
        half_a_step = torch.finfo(dtype).eps / 2
        # Half a step of the type, a thousandth more for FP32 arithmetic; near zero a fixed amount.
        assert bool(((found - wanted).abs() <= 1.001 * half_a_step * wanted.abs() + 2e-5).all())


def test_every_attribute_counts() -> None:
    base = Case(3, (2, 12, 6, 6), 4, bias="rows", deviation=0.01)
    results = [run(base, make(base))]
    for change in ({"groups": 3}, {"epsilon": 1e-3}, {"activation": "none"}):
        results.append(run(base._replace(**change), make(base)))
    x, gamma, beta, _ = make(base)
    results.append(run(base, (x, gamma, beta, None)))
    for i, one in enumerate(results):
        assert all(largest(one - other) > 1e-3 for other in results[:i])


def test_one_row_of_parameters_is_a_vector() -> None:
    x, gamma, beta, bias = make(Case(4, (4, 12, 3, 5), 4, bias="rows"))
    wanted = group_norm_silu(x, gamma, beta, bias, 4)
    for rows in (1, 2, 4):
        assert torch.equal(group_norm_silu(x, gamma.expand(rows, 12), beta.expand(rows, 12), bias, 4), wanted)


def test_rows_of_parameters_of_no_samples() -> None:
    assert group_norm_silu(torch.zeros(0, 8, 5, 7), groups=4, **parameters((2, 8))).shape == (0, 8, 5, 7)


def test_memory_format_is_kept() -> None:
    x = torch.randn(2, 8, 5, 7)
    ones, zeros = torch.ones(8), torch.zeros(8)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert group_norm_silu(given, ones, zeros, groups=4).stride() == given.stride()
    assert group_norm_silu(x.transpose(2, 3), ones, zeros, groups=4).is_contiguous()
    assert group_norm_silu(x[:0], ones, zeros, groups=4).shape == (0, 8, 5, 7)


def test_not_a_number_and_infinity_stay_in_their_group() -> None:
    x = torch.randn(2, 8, 4, 4)
    clean = group_norm_silu(x, torch.ones(8), torch.zeros(8), groups=4)
    for value in (float("nan"), float("inf"), -float("inf")):
        dirty = x.clone()
        dirty[1, 2, 3, 3] = value
        found = group_norm_silu(dirty, torch.ones(8), torch.zeros(8), groups=4)
        assert found[1, 2:4].isnan().all()
        found[1, 2:4] = clean[1, 2:4]
        assert torch.equal(found, clean)


# How compilers see it.


def example(
    layout: str, bias: str, dtype: torch.dtype = torch.float32, device: str = "cpu", parameter_rows: int = 0
) -> Tuple[Any, ...]:
    case = Case(5, (2, 12, 5, 7), 4, dtype=dtype, layout=layout, bias=bias, parameter_rows=parameter_rows)
    return (*make(case, device), case.groups, case.epsilon, case.activation)


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="this PyTorch has no torch.library.opcheck")
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize(("bias", "parameter_rows"), [("none", 0), ("rows", 0), ("rows", 2)])
def test_opcheck(layout: str, bias: str, parameter_rows: int) -> None:
    torch.library.opcheck(OPERATOR, example(layout, bias, parameter_rows=parameter_rows))


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("parameter_rows", [0, 1, 2])
def test_meta_says_what_the_cpu_gives(layout: str, dtype: torch.dtype, parameter_rows: int) -> None:
    arguments = example(layout, "row", dtype, parameter_rows=parameter_rows)
    real = OPERATOR(*arguments)
    fake = OPERATOR(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    # Moving a slice to another device makes it contiguous, which the result is too.
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert fake.device.type == "meta"


def test_fake_tensors_are_checked() -> None:
    x = torch.empty(2, 8, 4, 4, device="meta")
    gamma = torch.empty(8, device="meta")
    with pytest.raises(ValueError, match="split into 3 groups"):
        group_norm_silu(x, gamma, gamma, groups=3)
    with pytest.raises(ValueError, match="rows dividing the batch 2"):
        group_norm_silu(x, groups=4, **parameters((3, 8), device="meta"))


def test_compiles_without_breaks_on_the_cpu() -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-3).requires_grad_(False)
    bias = torch.randn(2, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = group_norm_silu(x + 1, norm.weight, norm.bias, bias, 4, 1e-3)
        return y * 2 + fused_group_norm(x, norm, "none", bias)

    # All of torch.compile but Inductor's C++, which wants a compiler and a path without spaces.
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 4, 6).to(memory_format=memory_format)
        assert torch.allclose(compiled(x), function(x), atol=1e-5)


# Errors.


def parameters(gamma: Tuple[int, ...], beta: Optional[Tuple[int, ...]] = None, device: str = "cpu") -> Dict[str, Any]:
    """Arguments with gamma and beta of these shapes, which are one unless both are given."""
    beta = gamma if beta is None else beta
    return {"gamma": torch.ones(gamma, device=device), "beta": torch.zeros(beta, device=device)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"x must be \(N, C, H, W\)"),
        ({"x": torch.zeros((2, 8, 4, 4), dtype=torch.int32)}, "float32, float16 or bfloat16"),
        ({"groups": 3}, "8 channels cannot be split into 3 groups"),
        ({"groups": 0}, "split into 0 groups"),
        ({"groups": -4}, "split into -4 groups"),
        ({"activation": "gelu"}, "'none' or 'silu', got 'gelu'"),
        ({"gamma": torch.zeros(7)}, r"gamma and beta must be \(8\) or \(rows, 8\).*, got \[7\] and \[8\]"),
        ({"beta": torch.zeros(8, 1)}, r"got \[8\] and \[8, 1\]"),
        (parameters((2, 8), (8,)), r"got \[2, 8\] and \[8\]"),
        (parameters((2, 8), (1, 8)), r"got \[2, 8\] and \[1, 8\]"),
        (parameters((3, 8)), r"rows dividing the batch 2, got \[3, 8\] and \[3, 8\]"),
        (parameters((4, 8)), r"rows dividing the batch 2, got \[4, 8\]"),
        (parameters((0, 8)), r"rows dividing the batch 2, got \[0, 8\]"),
        (parameters((2, 4)), r"\(rows, 8\) with rows dividing the batch 2, got \[2, 4\]"),
        (parameters((1, 2, 8)), r"got \[1, 2, 8\]"),
        (parameters(()), r"got \[\] and \[\]"),
        ({"beta": torch.zeros(8, dtype=torch.float16)}, "must have one type"),
        ({"gamma": torch.zeros(8).half(), "beta": torch.zeros(8).half()}, "float32 or the type of x"),
        ({"channel_bias": torch.zeros(8)}, r"channel_bias must be \(2, 8\) or \(1, 8\)"),
        ({"channel_bias": torch.zeros(3, 8)}, r"channel_bias must be \(2, 8\) or \(1, 8\)"),
        ({"channel_bias": torch.zeros((2, 8), device="meta")}, "channel_bias is on meta and x on cpu"),
    ],
)
def test_wrong_arguments(change: Dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 8, 4, 4), "gamma": torch.ones(8), "beta": torch.zeros(8), "groups": 4}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**arguments, **change})


def test_gradient_is_refused() -> None:
    x = torch.zeros(1, 8, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient and x requires one"):
        group_norm_silu(x, torch.ones(8), torch.zeros(8), groups=4)
    with torch.no_grad():
        assert not group_norm_silu(x, torch.ones(8), torch.zeros(8), groups=4).requires_grad


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_fused_group_norm_is_the_module_and_can_be_trained(affine: bool, activation: str) -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-3, affine=affine)
    x, bias = torch.randn(2, 8, 3, 3), torch.randn(1, 8, requires_grad=True)
    found = fused_group_norm(x, norm, activation, bias)
    wanted = norm(x + bias[:, :, None, None])
    assert torch.equal(found, F.silu(wanted) if activation == "silu" else wanted)
    found.sum().backward()
    assert bias.grad is not None
    with pytest.raises(ValueError, match="activation must be one of"):
        fused_group_norm(x, norm, "relu")


# Building.


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nvcc that notes its calls in the file beside it and writes what -o names."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/calls\n'
        'case "$1" in\n'
        "--list-gpu-arch) echo compute_80; echo compute_90; exit 0;;\n"
        '--version) echo "nvcc 13"; exit 0;;\n'
        "esac\n"
        f"[ -e {tmp_path}/fails ] && {{ echo 'kernels.cu(7): error: expected a ;'; exit 2; }}\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    sources = [tmp_path / source.name for source in torch_operator.SOURCES]
    for source in sources:
        source.write_text("// nothing\n")
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch_operator, "SOURCES", tuple(sources))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return path


def calls(tmp_path: Path) -> List[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_build_is_cached_by_what_it_depends_on(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch_operator.build([80, 90], tmp_path / "out", report=lambda line: None)
    assert first.read_text() == "made\n"
    assert sum("-c" in call.split() for call in calls(tmp_path)) == 2
    assert any("code=sm_80" in call and "code=compute_90" in call for call in calls(tmp_path))
    before = len(calls(tmp_path))
    assert torch_operator.build([80, 90], tmp_path / "out") == first
    assert len(calls(tmp_path)) == before
    paths = {first, torch_operator.build([90], tmp_path / "out")}
    torch_operator.SOURCES[1].write_text("// something\n")
    paths.add(torch_operator.build([90], tmp_path / "out"))
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    paths.add(torch_operator.build([90], tmp_path / "out"))
    assert len(paths) == 4 and all(path.is_file() for path in paths)


def test_newer_gpu_than_compiler_gets_ptx(compiler: Path, tmp_path: Path) -> None:
    torch_operator.build([120], tmp_path / "out")
    kernels = [call for call in calls(tmp_path) if "group_norm_kernels.cu" in call and "-c" in call.split()]
    assert "arch=compute_90,code=compute_90" in kernels[0] and "code=sm_" not in kernels[0]
    with pytest.raises(BuildError, match="cannot compile for compute capability 70"):
        torch_operator.build([70], tmp_path / "out")


def test_failed_build_says_why_and_leaves_nothing(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    with pytest.raises(BuildError, match="(?s)failed with code 2; its last lines:.*expected a ;"):
        torch_operator.build([90], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*torch_operator*"))
    (tmp_path / "fails").unlink()
    assert torch_operator.build([90], tmp_path / "out").is_file()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_operator.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="no nvcc"):
        torch_operator.find_compiler()


def _build_at(folder: Path) -> str:
    return str(torch_operator.build([90], folder, report=lambda line: None))


def test_two_processes_compile_once(compiler: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(_build_at, [tmp_path / "out"] * 2, chunksize=1)
    assert paths[0] == paths[1]
    assert sum("-c" in call.split() for call in calls(tmp_path)) == 2


def test_failure_to_load_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def find() -> Optional[Path]:
        attempts.append(1)
        raise BuildError("no compiler today")

    monkeypatch.setattr(torch_operator, "_state", torch_operator._State())
    monkeypatch.setattr(torch_operator, "_find", find)
    for _ in range(2):
        with pytest.raises(BuildError, match="no compiler today"):
            torch_operator.load()
        assert torch_operator.unavailable_reason() == "no compiler today"
    assert len(attempts) == 1


# The CUDA kernel.


def draw_case(index: int) -> Case:
    """A random case: sizes from one element to a few million, odd ones among them, and one extreme in three."""
    rng = np.random.default_rng(index)
    per_group = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 30, 40, 60]))
    groups = int(rng.choice([1, 2, 3, 5, 8, 16, 32]))
    largest_side = int(rng.choice([1, 4, 17, 40, 96, 200]))
    height, width = (int(side) for side in rng.integers(1, largest_side + 1, size=2))
    batch = int(rng.integers(1, 5))
    while batch * groups * per_group * height * width > 1 << 22:
        height, width = (height + 1) // 2, (width + 1) // 2
    dtype = (torch.float16, torch.bfloat16, torch.float32)[int(rng.integers(3))]
    top = 5e3 if dtype == torch.float16 else 1e15
    several = 2 - batch % 2  # rows of gamma and beta
    extremes = [(1000.0, 1.0), (-1000.0, 1.0), (3.0, 0.0), (0.0, 1e-4), (0.0, top), (0.0, 1e-6)]
    mean, deviation = extremes[int(rng.integers(len(extremes)))] if index % 3 == 0 else (float(rng.normal()), 1.0)
    return Case(
        index,
        (batch, groups * per_group, height, width),
        groups,
        dtype,
        (torch.float32, dtype)[int(rng.integers(2))],
        ("nchw", "nhwc", "nhwc", "strided")[int(rng.integers(4))],
        ("none", "row", "rows")[int(rng.integers(3))],
        ("none", "silu")[int(rng.integers(2))],
        float(rng.choice([1e-6, 1e-5, 1e-3, 0.1])),
        mean,
        deviation,
        (0, 1, several, batch)[int(rng.integers(4))],
    )


def check_against_pytorch(case: Case) -> Optional[str]:
    """What is wrong with the kernel's result, or None: at most twice PyTorch's own error, and a little for luck."""
    tensors = make(case, "cuda")
    if not bool(torch.isfinite(tensors[0]).all()):
        return "the case itself is not finite"
    wanted = exact(*tensors, case)
    found = run(case, tensors)
    ours, theirs = largest(found.double() - wanted), largest(pytorch(case, tensors).double() - wanted)
    # Luck: one unit of FP32 at the largest value, and half the smallest step of the type for values near zero.
    spare = 2.0**-23 * max(1.0, largest(wanted)) + torch.finfo(case.dtype).tiny * torch.finfo(case.dtype).eps
    if not ours <= 2 * theirs + spare:
        return f"error {ours:.3e}, PyTorch's {theirs:.3e}"
    if not torch.equal(found, run(case, tensors)):
        return "a second run gave other bits"
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    return None if found.is_contiguous(memory_format=layout) else f"strides {found.stride()}"


@pytest.mark.gpu
def test_cuda_cases_differ() -> None:
    assert len({draw_case(index)[1:] for index in range(NUM_CUDA_CASES)}) >= 300


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(12))
def test_cuda_against_float64(part: int) -> None:
    cases = [draw_case(index) for index in range(part, NUM_CUDA_CASES, 12)]
    faults = [(case, check_against_pytorch(case)) for case in cases]
    assert not [f"{case}: {fault}" for case, fault in faults if fault]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("parameter_rows", [1, 2, 4])
def test_cuda_rows_of_parameters(layout: str, parameter_rows: int) -> None:
    """Small maps held on chip, ones of odd channels and of few, and a large one in two kernels."""
    faults = []
    for shape, groups in (((4, 64, 4, 6), 8), ((4, 15, 7, 9), 3), ((4, 320, 16, 24), 32), ((4, 32, 192, 256), 2)):
        for dtype in (torch.float32, *HALF_TYPES):
            for bias, parameter_dtype in (("none", torch.float32), ("rows", dtype)):
                case = Case(7, shape, groups, dtype, parameter_dtype, layout, bias, parameter_rows=parameter_rows)
                fault = check_against_pytorch(case)
                faults += [f"{case}: {fault}"] if fault else []
    assert not faults


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_cuda_takes_unaligned_memory(layout: str, offset: int) -> None:
    for dtype in (torch.float32, *HALF_TYPES):
        case = Case(offset, (2, 64, 7, 9), 8, dtype, layout=layout)
        x, *rest = make(case, "cuda")
        moved = torch.empty(x.numel() + offset, dtype=dtype, device="cuda")[offset:].as_strided(x.size(), x.stride())
        moved.copy_(x)
        wanted = exact(x, *rest, case)
        error = largest(run(case, (x, *rest)).double() - wanted)
        assert largest(run(case, (moved, *rest)).double() - wanted) <= 1.1 * error + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(2, 64, 4, 6), (2, 320, 32, 48), (1, 128, 256, 384)], ids=str)
def test_cuda_not_a_number_and_infinity_stay_in_their_group(layout: str, shape: Tuple[int, int, int, int]) -> None:
    case = Case(1, shape, 32, torch.float16, layout=layout)
    x, *rest = make(case, "cuda")
    clean = run(case, (x, *rest))
    width = shape[1] // 32
    for value in (float("nan"), float("inf"), -float("inf")):
        dirty = x.clone(memory_format=torch.preserve_format)
        dirty[-1, 2 * width, shape[2] - 1, 0] = value
        found = run(case, (dirty, *rest))
        assert found[-1, 2 * width : 3 * width].isnan().all()
        found[-1, 2 * width : 3 * width] = clean[-1, 2 * width : 3 * width]
        assert torch.equal(found, clean)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_cuda_graph(layout: str) -> None:
    """Two sizes in one graph, replayed on new data."""
    cases = [
        Case(1, (2, 320, 32, 48), 32, torch.float16, layout=layout, bias="rows"),
        Case(2, (1, 128, 128, 192), 32, torch.float16, layout=layout),
    ]
    inputs = [make(case, "cuda") for case in cases]
    for case, tensors in zip(cases, inputs):
        run(case, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(case, tensors) for case, tensors in zip(cases, inputs)]
    for seed in (11, 12):
        for case, tensors in zip(cases, inputs):
            tensors[0].copy_(make(case._replace(seed=seed), "cuda")[0])
        graph.replay()
        torch.cuda.synchronize()
        for case, tensors, found in zip(cases, inputs, outputs):
            assert torch.equal(found, run(case, tensors))


@pytest.mark.gpu
def test_cuda_compiles_without_breaks() -> None:
    norm = nn.GroupNorm(32, 320).cuda().half().requires_grad_(False)
    bias = torch.randn(2, 320, device="cuda", dtype=torch.float16)

    def function(x: torch.Tensor) -> torch.Tensor:
        return fused_group_norm(x * 2, norm, "silu", bias) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    reduced = torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 320, 32, 48, device="cuda", dtype=torch.float16).to(memory_format=memory_format)
        wanted = function(x)
        for _ in range(3):
            assert torch.equal(compiled(x), wanted)
            assert torch.equal(reduced(x).clone(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
def test_cuda_opcheck(layout: str) -> None:
    if not hasattr(torch.library, "opcheck"):
        pytest.skip("this PyTorch has no torch.library.opcheck")
    torch.library.opcheck(OPERATOR, example(layout, "row", torch.float16, "cuda"))


@pytest.mark.gpu
def test_cuda_follows_the_current_stream() -> None:
    """The input is written behind a long wait on a side stream: a launch on any other stream would read old data."""
    case = Case(1, (2, 320, 32, 48), 32, torch.float16, layout="nhwc")
    x, *rest = make(case, "cuda")
    wanted = run(case, (x, *rest))
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = [run(case, (late, *rest)) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.gpu
def test_cuda_refuses_what_the_cpu_refuses() -> None:
    x = torch.zeros(2, 8, 4, 4, device="cuda")
    ones = torch.ones(8, device="cuda")
    for change, message in (
        ({"groups": 3}, "split into 3 groups"),
        ({"activation": "gelu"}, "got 'gelu'"),
        ({"gamma": ones.half()}, "must be float32 or the type of x"),
        ({"beta": ones.cpu()}, "beta is on cpu"),
        ({"x": x.double()}, "float32, float16 or bfloat16"),
        ({"channel_bias": x[:, 0, 0]}, "channel_bias must be"),
        (parameters((3, 8), device="cuda"), r"rows dividing the batch 2, got \[3, 8\] and \[3, 8\]"),
        (parameters((0, 8), device="cuda"), r"rows dividing the batch 2, got \[0, 8\]"),
        (parameters((2, 8), (8,), device="cuda"), r"got \[2, 8\] and \[8\]"),
        (parameters((1, 2, 8), device="cuda"), r"got \[1, 2, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm_silu(**{"x": x, "gamma": ones, "beta": ones, "groups": 4, **change})
    with pytest.raises(RuntimeError, match="no gradient and x requires one"):
        group_norm_silu(x.requires_grad_(), ones, ones, groups=4)
