"""The text of the GroupNorm kernels on a machine without a GPU: compiled for the host and run thread by thread.

tests/emulation/ stands in for the GPU. Its program judges every result by sums in double precision, with the case code
of plugins/kernel_cases.h that judges the kernels on a GPU, and checks what every plan must keep. Needs g++ and CUDA's
headers, of a toolkit or of a Python package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Optional

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins"
EMULATION = ROOT / "tests" / "emulation"
HEADERS = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "vector_functions.h", "crt/host_defines.h")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS = [
    "-std=c++17",
    "-O1",
    *WARNINGS,
    "-U_FORTIFY_SOURCE",  # the threads' stacks are changed by longjmp, which it takes for a mistake
    "-fsanitize=alignment",  # as a GPU sees to
    "-fsanitize-undefined-trap-on-error",
]
CASES = 120
SEEDS = (1, 2)
SIZES = 60000
# Shapes and stages of plans; slices are for maps that fit on chip.
PATHS = [
    f"{shape}, {stage}"
    for shape in ("run", "columns", "slices")
    for stage in ("held by a block", "held by a cluster", "grid", "two kernels")
    if shape != "slices" or stage.startswith("held")
]


def cuda_headers() -> Optional[Path]:
    """A folder with CUDA's headers: of a toolkit, or of the packages that torch brings."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    candidates = [Path(root) / "include" for root in roots if root]
    for folder in sys.path:
        for pattern in ("nvidia/*/include", "triton/backends/nvidia/include"):
            candidates += sorted(Path(folder or ".").glob(pattern))
    return next((path for path in candidates if all((path / name).exists() for name in HEADERS)), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """tests/emulation/ compiled, without a warning."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    headers = cuda_headers()
    if headers is None:
        pytest.skip(f"needs CUDA's headers: no folder with {', '.join(HEADERS)} in a toolkit or a Python package")
    folder = tmp_path_factory.mktemp("emulation")
    include = ["-I", str(PLUGINS), "-isystem", str(headers), "-idirafter", str(EMULATION / "headers")]
    # The largest first: there may be fewer cores than files.
    sources = sorted(EMULATION.glob("*.cpp"), key=lambda path: path.name != "kernels.cpp")
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [["g++", *FLAGS, *include, "-c", str(file), "-o", str(to)] for file, to in zip(sources, objects)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    _run(["g++", "-o", str(folder / "check"), *map(str, objects)])
    return folder / "check"


def _run(command: List[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}{result.stderr[-6000:]}"
    return result.stdout


def test_every_plan_covers_its_elements_and_fits_its_device(program):
    output = _run([str(program), "--cases", "0", "--plans", str(SIZES)])
    plans = re.search(rf"^{SIZES} sizes, (\d+) plans, 0 faults$", output, re.MULTILINE)
    assert plans and int(plans.group(1)) > 5 * SIZES
    assert f"{SIZES} divisors, 0 faults" in output


def test_kernels_compute_group_norm(program):
    """Right within bounds, within their memory, the same bits whatever the order of threads, in graphs and in place."""
    commands = [[str(program), "--plans", "0", "--cases", str(CASES), "--seed", str(seed)] for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(_run, commands))
    ran = set()
    for output in outputs:
        assert f"{CASES} cases by two plans each, 0 failed" in output
        kernels = re.search(r"^(\d+) of (\d+) kernels were launched$", output, re.MULTILINE)
        assert kernels and kernels.group(1) == kernels.group(2), output
        ran.update(re.findall(r"^[1-9]\d* of (\w+, [\w ]+), .* (fp32|fp16|bf16)$", output, re.MULTILINE))
    assert ran == {(path, kind) for path in PATHS for kind in ("fp32", "fp16", "bf16")}
