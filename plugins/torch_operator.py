#!/usr/bin/env python3
"""`canny2image::group_norm_silu`: activation(group_norm(x + channel_bias) * gamma + beta) as one PyTorch operator.

Importing this module registers the operator with its CPU and fake implementations, and takes no time. The CUDA
kernel comes from a shared library of `torch_operator.cpp` and the kernels beside it. It is compiled ahead with

    python3 -m plugins.torch_operator --build

or at the first call with a CUDA tensor, and kept under build/plugins/. The library talks to PyTorch's dispatcher
alone, no Python, so one file serves every Python version.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cldm.files import atomic_path, locked, source_digest, write_json  # noqa: E402 (after the path is set)

HERE = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "plugins"
SOURCES = (HERE / "torch_operator.cpp", HERE / "group_norm_kernels.cu")
# Compute capabilities for a library that is built on a machine without a GPU; the last is embedded as PTX too.
DEFAULT_ARCHITECTURES = (80, 86, 89, 90)
COMPILER_FLAGS = ("-std=c++17", "-O3", "--threads=4", "-Xcompiler", "-fPIC,-fvisibility=hidden")
COMPILE_SECONDS = 900
SCHEMA = (
    "group_norm_silu(Tensor x, Tensor gamma, Tensor beta, Tensor? channel_bias, int groups, float epsilon,"
    " str activation) -> Tensor"
)
ACTIVATIONS = ("none", "silu")
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class BuildError(RuntimeError):
    """The operator's CUDA library cannot be built or loaded; says why and what to do."""


# The operator: schema, formula and fake implementation.


def group_norm_silu(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    channel_bias: Optional[torch.Tensor] = None,
    groups: int = 32,
    epsilon: float = 1e-5,
    activation: str = "silu",
) -> torch.Tensor:
    """activation(group_norm(x + channel_bias, groups, epsilon) * gamma + beta), with FP32 statistics.

    Runs on the current stream and in CUDA graphs; call `load` or run it once before the capture, which must not wait
    for a compiler.

    NaN and infinity in `x` or `channel_bias` make their group NaN. SiLU of minus infinity, which then only an infinite
    gamma or beta gives, is NaN as in PyTorch; but float16 and bfloat16 elements that the CUDA kernels take in pairs, as
    they do where the layout and the addresses allow, become its limit, -0 (in bfloat16 -3.5e-17).

    Parameters
    ----------
    x : (N, C, H, W) tensor
        float32, float16 or bfloat16; on a CPU float64 too, then with float64 statistics. Contiguous and channels_last
        inputs run as they are, others are copied.
    gamma, beta : (C,) or (R, C) tensors
        Both float32 or both of the type of `x`. R divides N; each row serves N / R samples, one after the other:
        several networks in one batch.
    channel_bias : (N, C) or (1, C) tensor, optional
        float32 or the type of `x`. The sum with `x` is not rounded to that type.
    groups : int
        Divides C.
    epsilon : float
        Added to the variance.
    activation : "none" or "silu"

    Returns
    -------
    (N, C, H, W) tensor of the type of `x`; channels_last where `x` is, else contiguous

    Raises
    ------
    ValueError
        Shapes, types, devices, groups or activation are wrong.
    RuntimeError
        A gradient is asked for: the operator has none.
    BuildError
        `x` lies on a CUDA device and the kernels cannot be compiled or loaded.
    """
    return torch.ops.canny2image.group_norm_silu(x, gamma, beta, channel_bias, groups, epsilon, activation)


def fused_group_norm(
    x: torch.Tensor, norm: nn.GroupNorm, activation: str = "silu", channel_bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """What a network calls in the place of activation(norm(x + channel_bias)).

    The operator runs where it can: on a CUDA device, without gradients, with an affine `norm` and once its library
    has been found to load. Elsewhere plain PyTorch runs, which can be trained and exported.

    Parameters
    ----------
    x : (N, C, H, W) tensor
    norm : nn.GroupNorm
    activation : "none" or "silu"
    channel_bias : (N, C) or (1, C) tensor, optional
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if _fuses(x, norm, channel_bias):
        return group_norm_silu(x, norm.weight, norm.bias, channel_bias, norm.num_groups, norm.eps, activation)
    y = norm(x if channel_bias is None else x + channel_bias[:, :, None, None])
    return F.silu(y) if activation == "silu" else y


def _fuses(x: torch.Tensor, norm: nn.GroupNorm, channel_bias: Optional[torch.Tensor]) -> bool:
    if not x.is_cuda or x.dim() != 4 or x.dtype == torch.float64 or norm.weight is None:
        return False
    tensors = (x, norm.weight, norm.bias) if channel_bias is None else (x, norm.weight, norm.bias, channel_bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if any(tensor.dtype not in (torch.float32, x.dtype) for tensor in tensors):
        return False
    # A tracer cannot follow the compiler's run; the first call of what it makes loads the library, or says why not.
    return _state.why_not is None if _tracing() else unavailable_reason() is None


def _tracing() -> bool:
    compiler = getattr(torch, "compiler", None)
    if hasattr(compiler, "is_compiling"):
        return compiler.is_compiling()
    return torch._dynamo.is_compiling()  # PyTorch 2.0


def _check(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    channel_bias: Optional[torch.Tensor],
    groups: int,
    activation: str,
) -> None:
    """Refuse what the CUDA kernel refuses, in much the same words."""
    if x.dim() != 4:
        raise ValueError(f"group_norm_silu: x must be (N, C, H, W), got {list(x.shape)}")
    if x.dtype not in TYPES or (x.is_cuda and x.dtype == torch.float64):
        raise ValueError(f"group_norm_silu: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"group_norm_silu: activation must be 'none' or 'silu', got {activation!r}")
    batch, channels = x.shape[:2]
    if groups <= 0 or groups > channels or channels % groups:
        raise ValueError(f"group_norm_silu: {channels} channels cannot be split into {groups} groups")
    rows = gamma.shape[0] if gamma.dim() == 2 else 1
    fits = gamma.dim() in (1, 2) and gamma.shape[-1] == channels and rows > 0 and batch % rows == 0
    if not fits or beta.shape != gamma.shape:
        raise ValueError(
            f"group_norm_silu: gamma and beta must be ({channels}) or (rows, {channels}) with rows dividing the batch"
            f" {batch}, got {list(gamma.shape)} and {list(beta.shape)}"
        )
    if gamma.dtype != beta.dtype:
        raise ValueError(f"group_norm_silu: gamma is {gamma.dtype} and beta {beta.dtype}; they must have one type")
    others = [("gamma", gamma), ("beta", beta)]
    if channel_bias is not None:
        shape = channel_bias.shape
        if len(shape) != 2 or shape[1] != channels or (shape[0] != 1 and shape[0] != batch):
            raise ValueError(
                f"group_norm_silu: channel_bias must be ({batch}, {channels}) or (1, {channels}), got {list(shape)}"
            )
        others.append(("channel_bias", channel_bias))
    _check_beside(x, others)


def _check_beside(x: torch.Tensor, others: Sequence[Tuple[str, torch.Tensor]]) -> None:
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is on {tensor.device} and x on {x.device}")
        if tensor.dtype not in (torch.float32, x.dtype):
            raise ValueError(
                f"group_norm_silu: {name} is {tensor.dtype}; it must be float32 or the type of x, {x.dtype}"
            )
    for name, tensor in [("x", x), *others]:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"group_norm_silu has no gradient and {name} requires one: call it under torch.no_grad() or"
                " torch.inference_mode(), or use fused_group_norm"
            )


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Memory for the result: with the strides of `x` if that is contiguous in one of the two layouts."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    channel_bias: Optional[torch.Tensor],
    groups: int,
    epsilon: float,
    activation: str,
) -> torch.Tensor:
    _check(x, gamma, beta, channel_bias, groups, activation)
    return _empty_like(x)


def _without_kernel(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    channel_bias: Optional[torch.Tensor],
    groups: int,
    epsilon: float,
    activation: str,
) -> torch.Tensor:
    """What the dispatcher calls for a device without a kernel: the CPU, and CUDA as long as the library is not loaded.

    The library's kernel is for CUDA alone and comes before this one, so the second call below goes to it.
    """
    if x.is_cuda:
        load()
        return group_norm_silu(x, gamma, beta, channel_bias, groups, epsilon, activation)
    _check(x, gamma, beta, channel_bias, groups, activation)
    y = _empty_like(x)
    if y.numel() == 0:
        return y
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.to(wide)
    if channel_bias is not None:
        h = h + channel_bias.to(wide)[:, :, None, None]
    h = h.reshape(x.shape[0], groups, -1)
    centred = h - h.mean(dim=-1, keepdim=True)
    # What rounding left in the mean; it shows where the mean is large against the deviation.
    centred = centred - centred.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    h = (centred * torch.rsqrt(variance + epsilon)).reshape(x.shape)
    scale, shift = (_per_sample(tensor.to(wide), x.shape[0]) for tensor in (gamma, beta))
    h = h * scale + shift
    return y.copy_(F.silu(h) if activation == "silu" else h)


def _per_sample(parameter: torch.Tensor, batch: int) -> torch.Tensor:
    """(C,) or (R, C) to (1 or batch, C, 1, 1)."""
    rows = parameter.reshape(-1, parameter.shape[-1])
    rows = rows if rows.shape[0] == 1 else rows.repeat_interleave(batch // rows.shape[0], dim=0)
    return rows[:, :, None, None]


def _register() -> torch.library.Library:
    library = torch.library.Library("canny2image", "DEF")
    tags = [
        getattr(torch.Tag, name)
        # Compilers may not change the strides of what comes in: the layout of the result follows from them.
        for name in ("pt2_compliant_tag", "needs_fixed_stride_order")
        if hasattr(torch.Tag, name)
    ]
    if tags:
        library.define(SCHEMA, tags=tags)
    else:
        library.define(SCHEMA)
    library.impl("group_norm_silu", _without_kernel, "CompositeExplicitAutograd")
    name = "canny2image::group_norm_silu"
    if hasattr(torch.library, "register_fake"):  # PyTorch 2.4
        torch.library.register_fake(name, _fake, lib=library)
    elif hasattr(torch.library, "impl_abstract"):  # 2.1
        torch.library.impl_abstract(name, lib=library)(_fake)
    else:
        library.impl("group_norm_silu", _fake, "Meta")
    return library


_library = _register()  # the operator lives as long as this


# The library: built, found and loaded.


class _State:
    """What this process knows of the library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded: Optional[Path] = None
        self.why_not: Optional[str] = None


_state = _State()


def load() -> Path:
    """Load the CUDA kernel into this process, after building it if need be; the path of the library.

    A failure is remembered: the compiler runs once a process.

    Raises
    ------
    BuildError
        There is no CUDA device or compiler, the compiler fails, or the library does not load.
    """
    with _state.lock:
        if _state.loaded is not None:
            return _state.loaded
        if _state.why_not is None:
            try:
                path = _find() or build([_device_architecture()])
                torch.ops.load_library(str(path))
                _state.loaded = path
                return path
            except (BuildError, OSError) as error:
                _state.why_not = str(error)
        raise BuildError(_state.why_not)


def unavailable_reason() -> Optional[str]:
    """Why the CUDA kernel cannot run here, or None after loading it; what callers with another way ask first."""
    if _state.loaded is not None:
        return None
    known = _state.why_not
    try:
        load()
    except BuildError as error:
        if known is None:
            print(f"the GroupNorm kernel cannot be used, PyTorch's own runs instead: {error}", file=sys.stderr)
        return str(error)
    return None


def _find() -> Optional[Path]:
    """A library for the present GPU that was built before."""
    own = _device_architecture()
    wanted = [[own]]
    if own >= DEFAULT_ARCHITECTURES[0]:  # machine code of the same major version, or PTX, runs on it
        wanted.append(list(DEFAULT_ARCHITECTURES))
    paths = [library_path(architectures) for architectures in wanted]
    return next((path for path in paths if path.is_file()), None)


def _device_architecture() -> int:
    if not torch.cuda.is_available():
        raise BuildError("PyTorch finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def library_path(architectures: Sequence[int], build_dir: Path = BUILD_DIR) -> Path:
    """Where the library for these compute capabilities (as 90 for 9.0) belongs; its name holds all it depends on."""
    try:
        sources = [*SOURCES, *sorted(HERE.glob("group_norm*.h")), *sorted(HERE.glob("*.cuh"))]
        digest = source_digest(sources)
    except OSError as error:
        raise BuildError(f"the operator's sources are incomplete: {error}") from error
    key = (
        digest,
        torch.__version__,
        str(torch.version.cuda),
        str(torch._C._GLIBCXX_USE_CXX11_ABI),
        platform.machine(),
        " ".join(map(str, architectures)),
        " ".join(COMPILER_FLAGS),
    )
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    return Path(build_dir) / f"torch_operator-{name}.so"


def build(
    architectures: Optional[Sequence[int]] = None,
    build_dir: Path = BUILD_DIR,
    report: Optional[Callable[[str], None]] = None,
) -> Path:
    """Compile the library unless it is there; its path. Of several processes one compiles and the others wait.

    Parameters
    ----------
    architectures : sequence of int, optional
        Compute capabilities, as 90 for 9.0; the last is embedded as PTX too. Default: that of the GPU, or
        `DEFAULT_ARCHITECTURES` on a machine without one.
    build_dir : Path
    report : callable, optional
        Takes lines of progress; default: standard error.

    Raises
    ------
    BuildError
        There is no compiler, PyTorch was built without CUDA, or the compiler fails; with its last lines.
    """
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    if torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} was built without CUDA")
    if architectures is None:
        architectures = [_device_architecture()] if torch.cuda.is_available() else DEFAULT_ARCHITECTURES
    path = library_path(architectures, build_dir)
    with locked(path.parent, lambda: say("another process compiles the GroupNorm kernel; waiting for it")):
        if path.is_file():
            return path
        say(f"compiling the GroupNorm kernel for compute capability {', '.join(map(str, architectures))}")
        start = time.monotonic()
        compiler = find_compiler()
        flags = _architecture_flags(compiler, architectures)
        with tempfile.TemporaryDirectory(prefix="torch_operator-") as folder, atomic_path(path) as temporary:
            _compile(compiler, flags, Path(folder), temporary)
        seconds = time.monotonic() - start
        write_json(
            path.with_suffix(".json"),
            {
                "architectures": list(architectures),
                "compiler": _run([compiler, "--version"]).strip().splitlines()[-1],
                "seconds": round(seconds, 1),
                "torch": torch.__version__,
            },
        )
        say(f"compiled in {seconds:.0f} s: {path}")
        return path


def find_compiler() -> str:
    """The path of nvcc.

    Raises
    ------
    BuildError
        There is none.
    """
    found = [shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found += [shutil.which(str(Path(home) / "bin" / "nvcc")) for home in homes if home]
    for path in found:
        if path:
            return path
    raise BuildError("no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda; install the CUDA toolkit or name it")


def _architecture_flags(compiler: str, architectures: Sequence[int]) -> List[str]:
    """Machine code for each architecture that the compiler knows, and PTX of the newest for later ones."""
    known = {int(line.split("_")[1]) for line in _run([compiler, "--list-gpu-arch"]).split() if line[-1].isdigit()}
    usable = sorted(set(architectures) & known)
    # A GPU newer than the compiler runs PTX, which the driver translates.
    ptx = max((number for number in known if number <= max(architectures)), default=None)
    if ptx is None:
        raise BuildError(f"{compiler} cannot compile for compute capability {max(architectures)}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in usable]
    return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def _compile(compiler: str, architecture_flags: Sequence[str], folder: Path, output: Path) -> None:
    """Both sources at the same time, then the link."""
    headers = Path(torch.__file__).resolve().parent / "include"
    libraries = headers.parent / "lib"
    # nvcc gives the host compiler the CUDA headers, so it compiles the C++ source too.
    common = [compiler, *COMPILER_FLAGS, f"-I{HERE}"]
    for folder_of_headers in (headers, headers / "torch" / "csrc" / "api" / "include"):
        common += ["-isystem", str(folder_of_headers)]
    common.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    objects = [folder / f"{source.name}.o" for source in SOURCES]
    commands = [
        [*common, *architecture_flags, "-c", str(source), "-o", str(out)] for source, out in zip(SOURCES, objects)
    ]
    threads = [_Compilation(command) for command in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    # CUDA's runtime is linked in (nvcc's default): only handles cross to PyTorch's own, so versions may differ.
    names = ["-lc10", "-lc10_cuda", "-ltorch_cpu"]
    _run([compiler, "-shared", "-o", str(output), *map(str, objects), f"-L{libraries}", *names])


class _Compilation(threading.Thread):
    """One run of the compiler beside others."""

    def __init__(self, command: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.command = command
        self.error: Optional[BuildError] = None

    def run(self) -> None:
        try:
            _run(self.command)
        except BuildError as error:
            self.error = error


def _run(command: Sequence[str]) -> str:
    """The output of a command; a failure becomes a `BuildError` with its last lines."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise BuildError(f"{' '.join(command)} failed with code {done.returncode}; its last lines:\n{last}")
    return done.stdout


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Build the operator's CUDA library ahead of its first use.")
    parser.add_argument("--build", action="store_true", help="compile it, unless it is there")
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        metavar="90",
        help="compute capabilities; default: the GPU's, or 80 86 89 90 without one",
    )
    args = parser.parse_args(argv)
    if not args.build:
        parser.error("nothing to do: pass --build")
    try:
        print(build(args.architectures))
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
