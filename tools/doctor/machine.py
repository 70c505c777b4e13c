"""Python, its packages, driver, GPU, CUDA and TensorRT. Standard library only until a package is seen to be there."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from typing import Dict, List, NamedTuple, Optional, Tuple

from tools.doctor.rows import DIFFERS, MISSING, OK, Row, first_line

OLDEST_PYTHON = (3, 8)
SMI_SECONDS = 30
INSTALL = "bash preprocess.sh"
# By use: the names that Python imports, each with those that the installer may know it by.
PACKAGES: Dict[str, Dict[str, Tuple[str, ...]]] = {
    "packages to run": {
        "torch": ("torch",),
        "numpy": ("numpy",),
        "cv2": ("opencv-python-headless", "opencv-python"),
        "yaml": ("PyYAML",),
        "transformers": ("transformers",),
        "tqdm": ("tqdm",),
    },
    "packages to export": {
        "onnx": ("onnx",),
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
        "polygraphy": ("polygraphy",),
    },
    "packages to build": {
        "onnx_graphsurgeon": ("onnx-graphsurgeon",),
    },
    "packages of metrics": {
        "torchvision": ("torchvision",),
        "lpips": ("lpips",),
        "pytorch_fid": ("pytorch-fid",),
    },
}


class GpuLine(NamedTuple):
    """A GPU as nvidia-smi tells of it; memory in MiB."""

    name: str
    compute_capability: str
    free: str
    total: str
    driver: str


def check_python() -> Row:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Row("Python", DIFFERS, version, "take Python 3.8 or newer")
    return Row("Python", OK, f"{version} at {sys.executable}")


def check_packages(use: str) -> Row:
    """Whether all packages of one use are there; none is imported."""
    wanted = PACKAGES[use]
    lacking = [name for name in wanted if importlib.util.find_spec(name) is None]
    if lacking:
        return Row(use, MISSING, ", ".join(lacking), INSTALL)
    return Row(use, OK, ", ".join(f"{name} {_version(names)}" for name, names in wanted.items()))


def _version(names: Tuple[str, ...]) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def ask_nvidia_smi() -> List[GpuLine]:
    """The GPUs of this machine.

    Raises
    ------
    FileNotFoundError
        There is no nvidia-smi, which comes with the driver.
    RuntimeError
        It fails; the message has its own words.
    """
    fields = "name,compute_cap,memory.free,memory.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=SMI_SECONDS, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        raise RuntimeError(lines[0] if lines else f"nvidia-smi ended with {done.returncode} and said nothing")
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    if any(len(row) != len(GpuLine._fields) for row in cells):
        raise RuntimeError(f"nvidia-smi answered {lines[0]!r}")
    return [GpuLine(*row) for row in cells]


def check_gpus() -> List[Row]:
    """The driver, and each GPU."""
    try:
        found = ask_nvidia_smi()
    except FileNotFoundError:
        return [Row("driver", MISSING, "no nvidia-smi, so no NVIDIA driver; without a GPU ONNX Runtime runs")]
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return [Row("driver", DIFFERS, first_line(error), "see what nvidia-smi says, and install the driver again")]
    rows = [Row("driver", OK, found[0].driver)]
    for number, gpu in enumerate(found):
        memory = f"{gpu.free} of {gpu.total} MiB free"
        rows.append(Row(f"GPU {number}", OK, f"{gpu.name}, compute capability {gpu.compute_capability}, {memory}"))
    return rows


def cuda_state() -> Optional[str]:
    """Why torch cannot run on a GPU here, or None; torch has to be there."""
    from runtime.choose import cuda_problem
    from runtime.cuda_runtime import driver_problem

    problem = cuda_problem()
    return problem and (driver_problem() or problem)


def check_cuda() -> Row:
    """What torch makes of driver and GPU."""
    import torch

    problem = cuda_state()
    if problem is None:
        return Row("CUDA", OK, f"{torch.version.cuda}, of torch")
    if torch.version.cuda is None:
        return Row("CUDA", MISSING, problem, "on a machine with a GPU, install a torch that was built with CUDA")
    return Row("CUDA", MISSING, f"{problem} (torch is for CUDA {torch.version.cuda})")


def check_cuda_python() -> Row:
    """What TensorRT's engines are captured with; torch's own graphs do without."""
    from runtime.cuda_runtime import CudaError, load_module

    try:
        return Row("cuda-python", OK, load_module().__name__)
    except CudaError:
        return Row("cuda-python", MISSING, "only the tensorrt backend needs it", "pip install cuda-python")


def check_tensorrt() -> Row:
    """Whether it imports, and which code is for it."""
    from cldm.machine import OTHER_TENSORRT, tensorrt_command
    from deploy.tensorrt_versions import SUPPORTED, TensorRTError, find_version

    if importlib.util.find_spec("tensorrt") is None:
        found = f"{sys.executable} has no package tensorrt; only for an NVIDIA GPU ({OTHER_TENSORRT})"
        return Row("TensorRT", MISSING, found, tensorrt_command())
    try:
        version = find_version()
    except TensorRTError as error:
        return Row("TensorRT", DIFFERS, first_line(error), f"install TensorRT {SUPPORTED}: {tensorrt_command()}")
    kind = type(version)
    return Row("TensorRT", OK, f"{version.version}, by {kind.__name__} of {kind.__module__}")
