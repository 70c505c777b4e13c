"""The fused kernels compiled for cards that are not here: what the assembler reports, and which instructions it was
given."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import pytest
import torch

from runtime.fused.ops import Affine, Fused, Scaling, Weights
from runtime.fused.tuning import (
    AttentionConfig,
    AttentionProblem,
    Card,
    Config,
    Problem,
    Tuning,
    fed_registers,
    flash_bytes,
    shared_bytes,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which there is for Linux only", allow_module_level=True)

CARDS = {
    80: Card("NVIDIA A100-SXM4-80GB", 80, 108, 166912),
    86: Card("NVIDIA A10", 86, 72, 101376),
    89: Card("NVIDIA GeForce RTX 4090", 89, 128, 101376),
    90: Card("NVIDIA H200", 90, 132, 232448, boxes=True),
}
Call = Callable[[Fused], Any]


class Compiled(NamedTuple):
    """What one launch was compiled to."""

    kernel: Any
    ptx: str
    usage: Dict[str, int]


class NoDevice:
    """Stands for a driver with a card of each capability; nothing can be launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., List[Compiled]]:
    """Runs an operator up to the launch of its kernels, which are compiled and not launched."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    made: List[Any] = []
    run = JITFunction.run

    def compile_alone(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(run(kernel, *args, **{**kwargs, "warmup": True}))
        return made[-1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_alone)

    def compile_for(capability: int, call: Call) -> List[Compiled]:
        made.clear()
        monkeypatch.setattr(driver, "_active", NoDevice(capability))
        call(Fused(Tuning(CARDS[capability]), pdl=capability >= 90))
        return [Compiled(kernel, kernel.asm["ptx"], _usage(kernel, tmp_path)) for kernel in made]

    return compile_for


def _usage(kernel: Any, folder: Path) -> Dict[str, int]:
    """Registers, stack, and shared and local memory, by cuobjdump, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def maps(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def weights(nets: int, n: int, depth: int, **options: Any) -> Weights:
    rows = n * (2 if options.get("gated") else 1)
    return Weights(maps(nets, rows, depth), torch.empty(nets, rows), **options)


def fp8_weights(nets: int, n: int, depth: int, **options: Any) -> Weights:
    plain = weights(nets, n, depth, **options)
    scaling = Scaling(torch.empty(plain.matrix.shape[:2]), 16.0, 0.5)
    return replace(plain, matrix=plain.matrix.to(torch.float8_e4m3fn), fp8=scaling)


def conv(run: Fused) -> None:
    run.matmul(maps(1, 2, 32, 48, 640), weights(1, 320, 9 * 640, taps=9), shift=(maps(640), 320))


def conv_with_tail(run: Fused) -> None:
    """A sum that is cut, of a slice of a concatenation too."""
    tail = maps(2, 2, 8, 12, 1920)[..., :640]
    run.matmul(maps(2, 2, 8, 12, 1280), weights(2, 1280, 9 * 1280 + 640, taps=9, tail=640), tail=tail)


def conv_of_small_channels(run: Fused) -> None:
    run.matmul(maps(1, 1, 64, 96, 24), weights(1, 40, 9 * 24, taps=9, stride=2), act="silu")


def up_conv(run: Fused) -> None:
    run.matmul(maps(1, 1, 64, 96, 512), weights(4, 512, 4 * 512, taps=4))


def gated(run: Fused) -> None:
    run.matmul(maps(2, 2, 32, 48, 320), weights(2, 1280, 320, gated=True))


def linear(run: Fused) -> None:
    residual, scale = maps(1, 2, 16, 24, 640), torch.empty(2, 13)[:, 3]
    run.matmul(maps(1, 2, 16, 24, 640), weights(1, 640, 640), residual=residual, scale=scale)


def attention_40(run: Fused) -> None:
    qkv = maps(2, 1, 32, 48, 960)
    rows = qkv.flatten(2, 3)
    run.attention(qkv[..., :320], rows[..., 320:640], rows[..., 640:], 8)


def attention_160(run: Fused) -> None:
    run.attention(maps(2, 1, 8, 12, 1280), maps(2, 2, 77, 1280), maps(2, 2, 77, 1280), 8, images=2)


def attention_causal(run: Fused) -> None:
    run.attention(maps(1, 2, 1, 77, 768), maps(1, 2, 77, 768), maps(1, 2, 77, 768), 12, causal=True)


def neighbours(run: Fused) -> None:
    """The kernels that are no products, but for the last convolution."""
    run.layer_norm(maps(2, 2, 16, 24, 640), Affine(torch.empty(2, 640), torch.empty(2, 640), 1e-5))
    run.softmax(maps(1, 1, 1, 8, 1536))
    run.first_conv(torch.empty(1, 4, 32, 48), weights(2, 320, 36, taps=9), 1, added=maps(1, 320, 32, 48))
    latent, scalar = torch.empty(1, 4, 32, 48), torch.empty(1)
    run.guide(torch.empty(1, 2, 32, 48, 4), latent, latent, scalar, torch.empty(1, 3), latent, latent)
    run.pixels(maps(1, 1, 64, 96, 128), weights(1, 3, 9 * 128, taps=9), torch.empty(1, 64, 96, 3, dtype=torch.uint8))
    run.embed(torch.empty(2, 77, dtype=torch.int32), maps(100, 768), maps(77, 768))


PRODUCTS: Dict[str, Call] = {
    call.__name__: call
    for call in (
        *(conv, conv_with_tail, conv_of_small_channels, up_conv, gated, linear),
        *(attention_40, attention_160, attention_causal),
    )
}
# The two cards of one generation and size of shared memory compile the same but for the name.
FOR_89 = ("conv_with_tail", "gated", "attention_160")


def check(found: Compiled, capability: int) -> None:
    name = f"{found.kernel.metadata.name} for sm_{capability}"
    assert re.search(rf"\.target sm_{capability}", found.ptx), name
    assert found.usage["LOCAL"] == 0 and found.usage["STACK"] == 0, f"{name} spills: {found.usage}"
    assert found.usage["REG"] <= 255
    assert found.kernel.metadata.shared <= CARDS[capability].shared_memory, name
    assert found.kernel.metadata.global_scratch_size == 0, name
    assert ("griddepcontrol.wait" in found.ptx) == (capability >= 90), f"{name}: programmatic launch"


@pytest.mark.parametrize(
    ("capability", "name"),
    [(capability, name) for capability in CARDS for name in (PRODUCTS if capability != 89 else FOR_89)],
)
def test_products(compiled: Callable[..., List[Compiled]], capability: int, name: str) -> None:
    (found,) = compiled(capability, PRODUCTS[name])
    check(found, capability)
    print(f"{name} for sm_{capability}: {found.usage}, {found.kernel.metadata.shared} bytes shared")
    if capability >= 90:
        # Sums of tiles below 64 rows stay with the older instruction.
        assert "wgmma.mma_async" in found.ptx or "mma.sync.aligned.m16n8k16" in found.ptx
    else:
        assert "mma.sync.aligned.m16n8k16" in found.ptx
        # Channels that no block divides are read one by one, and two bytes are too few for an asynchronous copy.
        assert ("cp.async" in found.ptx) == (name != "conv_of_small_channels")


@pytest.mark.parametrize("capability", [80, 90])
def test_other_kernels(compiled: Callable[..., List[Compiled]], capability: int) -> None:
    found = compiled(capability, neighbours)
    assert len(found) == 6
    for one in found:
        check(one, capability)


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def fp8_conv_with_tail(run: Fused) -> None:
    tail = maps(2, 2, 8, 12, 1920)[..., :640]
    run.matmul(maps(2, 2, 8, 12, 1280), fp8_weights(2, 1280, 9 * 1280 + 640, taps=9, tail=640), tail=tail)


def fp8_up_conv(run: Fused) -> None:
    run.matmul(maps(1, 1, 64, 96, 512), fp8_weights(4, 512, 4 * 512, taps=4))


def fp8_gated(run: Fused) -> None:
    run.matmul(maps(2, 2, 32, 48, 320), fp8_weights(2, 1280, 320, gated=True))


def fp8_linear(run: Fused) -> None:
    run.matmul(maps(1, 2, 16, 24, 640), fp8_weights(1, 640, 640), residual=maps(1, 2, 16, 24, 640))


FP8_CALLS = {call.__name__: call for call in (fp8_conv_with_tail, fp8_up_conv, fp8_gated, fp8_linear)}


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("name", FP8_CALLS)
def test_fp8_products(compiled: Callable[..., List[Compiled]], capability: int, name: str) -> None:
    """By FP8's own instructions; beyond its range it saturates; a block's sum is added to the others in FP32."""
    (found,) = compiled(capability, FP8_CALLS[name])
    check(found, capability)
    assert "cvt.rn.satfinite.e4m3x2.f16x2" in found.ptx
    assert not re.search(r"cvt\.rn\.e4m3", found.ptx)
    kind = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3"
    if capability < 90:
        kind = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"
    assert re.search(kind, found.ptx)
    behind_first = found.ptx[re.search(kind, found.ptx).end() :]
    loop = behind_first[: behind_first.index("bra")]
    assert re.search(r"add(\.rn)?\.f32", loop), "sums stay in the tensor cores"


# -- the kernel of compute capability 9.0 ------------------------------------------------------------------------------


def boxed(call: Call, *numbers: int) -> Call:
    """The same operator with one tile size for all its products."""

    def chosen(run: Fused) -> Any:
        run.tuning.config = lambda problem: Config(*numbers)  # type: ignore[method-assign]
        return call(run)

    return chosen


def compiled_with(compiled: Callable[..., List[Compiled]], call: Call, config: Config) -> Tuple[Compiled, Problem]:
    """One product with a configuration of the kernels for 9.0, checked, and what problem it is."""
    problems: List[Problem] = []

    def chosen(run: Fused) -> None:
        run.tuning.config = lambda problem: problems.append(problem) or config  # type: ignore
        call(run)

    (found,) = compiled(90, chosen)
    check(found, 90)
    return found, problems[0]


def strided(run: Fused) -> None:
    run.matmul(maps(2, 2, 16, 24, 640), weights(2, 640, 9 * 640, taps=9, stride=2))


BOXES = {
    "strided": boxed(strided, 64, 128, 64, 4, 6, 4, 8, 4),
    "conv": boxed(conv, 128, 128, 64, 8, 6, 1, 8, 16),
    "conv, wide": boxed(conv, 128, 256, 64, 8, 3, 1, 16, 8),
    "conv with tail, cut": boxed(conv_with_tail, 64, 128, 64, 4, 6, 2, 8, 4),
    "up": boxed(up_conv, 128, 128, 64, 8, 3, 1, 16, 8),
    "gated": boxed(gated, 128, 64, 64, 4, 3, 1, 1, 128),
    "linear": boxed(linear, 64, 32, 64, 4, 8, 1, 1, 64),
}


FP8_BOXES = {
    "conv with tail, cut": boxed(fp8_conv_with_tail, 64, 128, 64, 4, 6, 2, 8, 4),
    "conv with tail, long blocks": boxed(fp8_conv_with_tail, 128, 64, 128, 8, 3, 2, 8, 8),
    "up": boxed(fp8_up_conv, 128, 128, 64, 8, 4, 1, 16, 8),
    "gated": boxed(fp8_gated, 128, 64, 64, 8, 4, 1, 1, 128),
    "linear": boxed(fp8_linear, 64, 32, 64, 4, 8, 1, 1, 64),
}


@pytest.mark.parametrize("name", FP8_BOXES)
def test_fp8_boxes(compiled: Callable[..., List[Compiled]], name: str, tmp_path: Path) -> None:
    """The map goes through the registers, where it is converted, and products are under way meanwhile."""
    pytest.importorskip("triton.experimental.gluon")
    (found,) = compiled(90, FP8_BOXES[name])
    check(found, 90)
    assert found.kernel.metadata.name == "tma_matmul_kernel"
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", found.ptx)
    assert "cvt.rn.satfinite.e4m3x2.f16x2" in found.ptx and "cp.async.bulk.tensor" in found.ptx
    assert "serialized" not in _assembler_notes(found.ptx, tmp_path)


def _assembler_notes(ptx: str, folder: Path) -> str:
    """What the assembler says of a kernel for compute capability 9.0."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    source = folder / "kernel.ptx"
    source.write_text(ptx, encoding="utf-8")
    command = [str(tool), "-arch=sm_90a", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("name", BOXES)
def test_boxes(compiled: Callable[..., List[Compiled]], name: str) -> None:
    """Tiles come by TMA, and warp groups multiply them where they lie."""
    pytest.importorskip("triton.experimental.gluon")
    (found,) = compiled(90, BOXES[name])
    check(found, 90)
    assert found.kernel.metadata.name == "tma_matmul_kernel"
    assert "wgmma.mma_async.sync" in found.ptx and "cp.async.bulk.tensor" in found.ptx
    operands, _, results = found.ptx.rpartition("wgmma.mma_async.sync")
    assert "ldmatrix" not in operands, "operands go through registers"
    assert "st.global.v4" in results or "st.global.L1::no_allocate.v4" in results, "narrow stores"


def residual_added(run: Fused) -> None:
    """What is read ahead of a cut sum, and added behind it."""
    added = {"residual": maps(2, 1, 8, 12, 1280), "shift": (maps(2 * 1280), 1280)}
    run.matmul(maps(2, 2, 8, 12, 1280), weights(2, 1280, 9 * 1280, taps=9), act="silu", **added)


FED = {
    "strided": (strided, Config(64, 128, 64, 4, 6, 1, 4, 8, feeder=1)),
    "conv": (conv, Config(128, 128, 64, 8, 6, 1, 8, 16, feeder=1)),
    "conv with tail, cut": (conv_with_tail, Config(64, 64, 64, 4, 10, 6, 8, 4, feeder=1)),
    "conv with tail, long blocks": (conv_with_tail, Config(64, 64, 128, 4, 5, 2, 8, 4, feeder=1)),
    "all that is added, cut": (residual_added, Config(128, 64, 64, 4, 6, 4, 8, 8, feeder=1)),
    "up": (up_conv, Config(64, 128, 64, 4, 4, 1, 8, 8, feeder=1)),
    "gated": (gated, Config(128, 64, 64, 4, 5, 1, 1, 128, feeder=1)),
    "linear": (linear, Config(64, 32, 64, 4, 10, 1, 1, 64, feeder=1)),
    "columns": (conv, Config(128, 128, 64, 8, 4, 1, 16, 8, 3, feeder=1)),
    "columns with tail, cut": (conv_with_tail, Config(64, 64, 64, 4, 6, 3, 8, 8, 5, feeder=1)),
    "columns, all that is added, cut": (residual_added, Config(64, 64, 64, 4, 6, 4, 4, 8, 3, feeder=1)),
    "columns, up": (up_conv, Config(128, 64, 64, 4, 8, 1, 16, 8, 3, feeder=1)),
}


@pytest.mark.parametrize("name", FED)
def test_fed(compiled: Callable[..., List[Compiled]], name: str, tmp_path: Path) -> None:
    """The products' loop has one barrier, of the warps that multiply; warps that feed have none."""
    pytest.importorskip("triton.experimental.gluon")
    call, config = FED[name]
    found, problem = compiled_with(compiled, call, config)
    assert found.kernel.metadata.name == ("fed_column_conv_kernel" if config.columns else "fed_matmul_kernel")
    assert found.kernel.metadata.num_warps == config.warps + 4, "those that feed, and what fills their group up"
    assert found.usage["REG"] == fed_registers(problem, config) <= 65536 // (32 * (config.warps + 4))
    assert 0 <= shared_bytes(problem, config) - found.kernel.metadata.shared < 384
    operands = re.findall(r"wgmma\.mma_async\.sync[^}]*}, (%\w+), (%\w+)", found.ptx)
    assert operands and all(one.startswith("%rd") for pair in operands for one in pair), "no descriptors"
    assert "st.global.v4" in found.ptx or "st.global.L1::no_allocate.v4" in found.ptx, "narrow stores"
    assert "serialized" not in _assembler_notes(found.ptx, tmp_path)
    loops = sorted((part for part in _loops(found.ptx) if "mbarrier.try_wait" in part), key=len)
    products = next(part for part in loops if "wgmma.mma_async" in part)
    feeding = [part for part in loops if "cp.async.bulk.tensor" in part][: 2 if config.columns else 1]
    assert "cp.async.bulk.tensor" not in products and not any("wgmma" in part for part in feeding)
    assert re.findall(r"\bbar(?:rier)?\.sync\s+([^;]*);", products) == [f"0, {32 * config.warps}"]
    assert not any(re.search(r"\bbar(rier)?\.sync", part) for part in feeding)
    behind = products[products.index("wgmma.wait_group") :]
    assert behind.index("bar.sync") < behind.index("mbarrier.arrive"), "given back before all warps are done"


def _loops(ptx: str) -> List[str]:
    """What lies between a label and a later line that branches back to it."""
    lines = ptx.splitlines()
    places = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L__BB\w+:", line)}
    branches = [(i, re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) for i, line in enumerate(lines)]
    ends = [(places[found.group(1)], i) for i, found in branches if found]
    return ["\n".join(lines[begin : end + 1]) for begin, end in ends if begin < end]


COLUMNS = {
    "conv": boxed(conv, 128, 64, 64, 4, 4, 1, 16, 8, 3),
    "conv, wide": boxed(conv, 256, 128, 64, 8, 4, 1, 16, 8, 3),
    "conv with tail, cut": boxed(conv_with_tail, 64, 128, 64, 4, 8, 2, 4, 8, 3),
    "up": boxed(up_conv, 128, 128, 64, 8, 6, 1, 16, 8, 3),
    "upright, cut": boxed(conv_with_tail, 64, 128, 64, 4, 8, 2, 8, 4, 3),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(compiled: Callable[..., List[Compiled]], name: str, tmp_path: Path) -> None:
    """A box for the taps of a column, read where it lies, with products under way."""
    pytest.importorskip("triton.experimental.gluon")
    (found,) = compiled(90, COLUMNS[name])
    check(found, 90)
    assert found.kernel.metadata.name == "column_conv_kernel"
    assert "wgmma.mma_async.sync" in found.ptx and "cp.async.bulk.tensor.5d" in found.ptx
    assert "ldmatrix" not in found.ptx.rpartition("wgmma.mma_async.sync")[0], "operands go through registers"
    assert "serialized" not in _assembler_notes(found.ptx, tmp_path)


def gated_ragged(run: Fused) -> None:
    """Neither the rows, nor the channels, nor the sum are whole tiles."""
    run.matmul(maps(2, 1, 10, 10, 456), weights(2, 208, 456, gated=True))


def activated(run: Fused) -> None:
    run.matmul(maps(2, 2, 32, 48, 320), weights(2, 960, 320), shift=(maps(2 * 960), 960), act="gelu")


RESIDENT = {
    "gated": (gated, Config(128, 64, 64, 4, 6, by=1, bx=128, walk=4)),
    "gated, two teams": (gated, Config(128, 64, 64, 4, 4, by=1, bx=128, teams=2, walk=4)),
    "gated, two large teams": (gated, Config(256, 32, 64, 8, 3, by=1, bx=256, teams=2, walk=8)),
    "gated, ragged": (gated_ragged, Config(64, 32, 64, 4, 5, by=1, bx=64, walk=3)),
    "activated": (activated, Config(128, 128, 64, 4, 4, by=1, bx=128, teams=2, walk=4)),
    "linear": (linear, Config(64, 64, 64, 4, 3, by=1, bx=64, walk=1)),
}


@pytest.mark.parametrize("name", RESIDENT)
def test_resident(compiled: Callable[..., List[Compiled]], name: str, tmp_path: Path) -> None:
    """Both operands are read where they lie, products are under way together, and it takes the memory it says."""
    pytest.importorskip("triton.experimental.gluon")
    call, config = RESIDENT[name]
    found, problem = compiled_with(compiled, call, config)
    assert found.kernel.metadata.name == "resident_matmul_kernel"
    assert found.kernel.metadata.num_warps == config.warps * config.teams
    assert 0 <= shared_bytes(problem, config) - found.kernel.metadata.shared < 1024
    operands = re.findall(r"wgmma\.mma_async\.sync[^}]*}, (%\w+), (%\w+)", found.ptx)
    assert operands and all(one.startswith("%rd") for pair in operands for one in pair), "no descriptors"
    assert "cp.async.bulk.tensor.4d" in found.ptx and "serialized" not in _assembler_notes(found.ptx, tmp_path)
    assert "st.global.v4" in found.ptx or "st.global.L1::no_allocate.v4" in found.ptx, "narrow stores"


# Length, keys, channels of a head; the tile.
FLASH = {
    "large": (1536, 1536, 40, AttentionConfig(192, 128, 4, 4, 3)),
    "large, with polynomials": (1536, 1536, 40, AttentionConfig(192, 128, 4, 4, 3, 2)),
    "large, short blocks": (1536, 1536, 40, AttentionConfig(192, 64, 4, 6, 3)),
    "two teams": (1536, 1536, 40, AttentionConfig(128, 128, 4, 4, 2)),
    "one team": (1536, 1536, 64, AttentionConfig(64, 64, 4, 4, 1)),
    "wide heads": (384, 384, 80, AttentionConfig(192, 64, 4, 4, 3)),
    "wide heads, one team": (384, 384, 80, AttentionConfig(64, 32, 4, 5, 1)),
    "keys that end in a block": (384, 77, 72, AttentionConfig(128, 64, 4, 3, 2, 1)),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention(compiled: Callable[..., List[Compiled]], name: str, tmp_path: Path) -> None:
    """Scores from shared memory, weights from registers, exponentials beside the products, and the memory it says."""
    pytest.importorskip("triton.experimental.gluon")
    length, keys, dim, config = FLASH[name]
    heads = 8

    def call(run: Fused) -> None:
        rows = maps(2, 2, keys, 2 * heads * dim)
        k, v = rows[..., : heads * dim], rows[..., heads * dim :]
        run.attention(maps(2, 2, 1, length, heads * dim), k, v, heads, config=config)

    (found,) = compiled(90, call)
    check(found, 90)
    assert found.kernel.metadata.name == "flash_attention_kernel"
    problem = AttentionProblem(length, keys, dim, heads, 4)
    assert 0 <= flash_bytes(problem, config) - found.kernel.metadata.shared < 512
    products = re.findall(r"wgmma\.mma_async\.sync[^}]*}, ({[^}]*}|%\w+), %rd", found.ptx)
    of_registers = [first for first in products if first.startswith("{")]
    # Scores and results, in the loop and around it, of each team.
    blocks = config.bn // 16
    assert len(of_registers) == 2 * blocks * config.teams
    assert len(products) - len(of_registers) == 2 * -(-dim // 16) * config.teams
    notes = _assembler_notes(found.ptx, tmp_path)
    assert "serialized" not in notes and "0 bytes spill stores" in notes
    assert "cp.async.bulk.tensor.5d" in found.ptx and "st.global.v4" in found.ptx
    assert _beside_products(found.kernel, tmp_path) > 0.7 * (1 - config.polynomials / 8) * config.bn / 2


def test_blocks_of_other_lengths_are_compiled_apart() -> None:
    """Launches that are put off are one of each compilation: the length of a block is only in the descriptors."""
    pytest.importorskip("triton.experimental.gluon")
    run, rows = Fused(Tuning(CARDS[90])), maps(1, 1, 384, 640)
    with run.putting_off() as launches:
        for keys in (64, 128, 64):
            run.attention(maps(1, 1, 16, 24, 640), rows, rows, 8, config=AttentionConfig(64, keys, 4, 3, 1))
    assert len(launches) == 2


@pytest.mark.parametrize("polynomials", [0, 3, 8])
def test_powers_of_two(polynomials: int) -> None:
    """The assembly carried out by NumPy: all eight numbers, down to where powers no longer count."""
    pytest.importorskip("triton.experimental.gluon")
    from runtime.fused.flash import _exponentials

    x = np.linspace(-140, 0, 8 * 4001).reshape(-1, 8).T.astype(np.float32)
    found = _carried_out(_exponentials(polynomials), list(x))
    wanted = np.exp2(x.astype(np.float64))
    error = np.abs(found - wanted)
    bounds = np.where(np.arange(8) < polynomials, 8e-5, 3e-7)[:, None]
    assert np.all(error <= bounds * wanted + 2.0**-125)
    assert np.array_equal(error.max(axis=1) > 5e-5, np.arange(8) < polynomials), "not as many polynomials"


def _carried_out(ptx: str, inputs: List[np.ndarray]) -> np.ndarray:
    """What a few lines of PTX without branches make of float32 inputs, which stand behind as many results."""
    registers: Dict[str, np.ndarray] = {f"${len(inputs) + i}": value for i, value in enumerate(inputs)}

    def value(name: str, kind: type) -> Any:
        if name in registers:
            return registers[name].view(kind)
        return np.uint32(int(name[2:], 16)).view(kind) if name.startswith("0f") else kind(int(name))

    operations = {
        "max": np.maximum,
        "add": np.add,
        "sub": np.subtract,
        "fma": lambda a, b, c: a.astype(np.float64) * b + c,
        "ex2": np.exp2,
        "shl": np.left_shift,
        "mov": lambda a: a,
    }
    for line in ptx.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith("."):
            kind = np.float32 if name.endswith("f32") else np.uint32
            out, *sources = (operand.strip() for operand in operands.split(","))
            registers[out] = operations[name.split(".")[0]](*(value(one, kind) for one in sources)).astype(kind)
    return np.stack([registers[f"${i}"].view(np.float32) for i in range(len(inputs))]).astype(np.float64)


def _beside_products(kernel: Any, folder: Path) -> int:
    """Exponentials between a loop's wait for its scores and that for its other product, in the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    code = subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    between = code[re.search(r"DEPBAR\.LE gsb0, 0x1", code).end() :]
    return between[: re.search(r"DEPBAR\.LE gsb0, 0x0", between).start()].count("MUFU.EX2")


def test_configurations_of_attention_fit_what_they_say(compiled: Callable[..., List[Compiled]]) -> None:
    """The estimate of shared memory is not below what the compiler takes, or a candidate could not be launched."""
    config = AttentionConfig(64, 32, 4, 2)

    def call(run: Fused) -> None:
        rows = maps(1, 1, 384, 640)
        run.attention(maps(1, 1, 16, 24, 640), rows, rows, 8, config=config)

    for capability in (86, 90):
        (found,) = compiled(capability, call)
        dim = 80
        assert found.kernel.metadata.shared <= 2 * 2 * dim * (config.bm + 2 * config.bn * config.stages)


def test_attention_copies_all_that_it_multiplies_ahead(compiled: Callable[..., List[Compiled]]) -> None:
    """Also of rows that begin at odd multiples of 16 bytes; of a loop that does not, 9.0 gets wrong code."""
    for margin, stages in itertools.product((0, 8), (2, 3)):
        rows = maps(1, 2, 100, 3 * 80 + margin)

        def call(run: Fused, rows: torch.Tensor = rows, stages: int = stages) -> None:
            config = AttentionConfig(64, 64, 4, stages)
            run.attention(rows[:, :, None, :, :80], rows[..., 80:160], rows[..., 160:240], 2, config=config)

        (found,) = compiled(90, call)
        loop = found.kernel.asm["ttgir"].split("scf.for")[1]
        # Keys and values, each in two parts of a head of 40.
        assert loop.count("async_copy_global_to_local") == 4 and "= tt.load" not in loop, margin
