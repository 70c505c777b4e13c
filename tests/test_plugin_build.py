"""The TensorRT faces of the plugin: their names, the build script, and the sources against TensorRT's own headers.

The headers are not in the repository. CANNY2IMAGE_TENSORRT_HEADERS names a folder with one subfolder a version, each
with the files of that version's include/; without it, g++ or CUDA's headers those tests are skipped.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "plugins"
BUILD = PLUGINS / "build.sh"
ATTRIBUTES = {"groups", "epsilon", "activation", "has_bias"}
HEADERS = os.environ.get("CANNY2IMAGE_TENSORRT_HEADERS", "")
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Stands in for the kernels and for the one function of the CUDA runtime that the glue calls.
STUB = r"""
#include "group_norm.h"
namespace canny2image {
char const* checkGroupNorm(GroupNormParams const&) noexcept { return nullptr; }
size_t groupNormWorkspaceSize(GroupNormParams const& params) noexcept {
    return static_cast<size_t>(params.batch * params.groups * 8);
}
cudaError_t launchGroupNorm(GroupNormParams const&, void*, size_t, cudaStream_t) noexcept { return cudaErrorUnknown; }
}
extern "C" char const* CUDARTAPI cudaGetErrorString(cudaError_t) { return "stub"; }
"""

# Says that it is a CUDA compiler, and "compiles" by writing its arguments to the output.
FAKE_NVCC = r"""#!/usr/bin/env bash
case "$1" in
    --version) echo "Cuda compilation tools, release ${FAKE_CUDA:-11.8}, V${FAKE_CUDA:-11.8}.89" ;;
    --list-gpu-arch) printf 'compute_%s\n' ${FAKE_ARCHITECTURES:-35 75 80 86 87 89 90} ;;
    *)
        output="" previous=""
        for word in "$@"; do
            [ "$previous" != -o ] || output="$word"
            previous="$word"
        done
        echo "$*" >"$output"
        [ -z "${FAKE_FAIL:-}" ] || { echo "fake nvcc: no" >&2; exit 1; }
        ;;
esac
"""
FAKE_SMI = '#!/usr/bin/env bash\necho "${FAKE_GPUS:-}" | tr " " "\\n"\n'


# ---- Names that the sources and the graph surgery share


def _constants() -> Dict[str, str]:
    text = (PLUGINS / "tensorrt_common.h").read_text(encoding="utf-8")
    return dict(re.findall(r'constexpr char const\* (k\w+) = "([^"]*)"', text))


def test_attribute_names_of_the_sources():
    constants = _constants()
    assert {value for name, value in constants.items() if name.endswith("Field")} == ATTRIBUTES
    assert constants["kPluginName"] == "GroupNormSiLU"
    assert constants["kPluginVersion"] == "1"
    assert constants["kPluginNamespace"] == "canny2image"


def test_surgery_writes_the_names_that_the_plugin_reads():
    path = ROOT / "deploy" / "surgery.py"
    if not path.exists():
        pytest.skip("there is no deploy/surgery.py")
    strings = {node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_string(node)}
    wanted = ATTRIBUTES | {"plugin_version", "plugin_namespace"}
    assert wanted | {"GroupNormSiLU", "1", "canny2image"} <= strings


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_facts_name_the_same_plugin_and_state_version():
    text = (PLUGINS / "tensorrt_common.cpp").read_text(encoding="utf-8")
    header = (PLUGINS / "tensorrt_common.h").read_text(encoding="utf-8")
    constants = _constants()
    for key, name in (
        ("plugin", "kPluginName"),
        ("plugin_version", "kPluginVersion"),
        ("namespace", "kPluginNamespace"),
    ):
        assert f'\\"{key}\\": \\"{constants[name]}\\"' in text
    version = re.search(r"kStateVersion = (\d+)", header)
    assert version and f'\\"state_version\\": {version.group(1)},' in text


# ---- build.sh, with stand-ins for nvcc and nvidia-smi


class Script:
    """build.sh in a folder of its own, where nvcc and nvidia-smi are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.output, self.headers = folder / "bin", folder / "out", folder / "trt"
        for path in (self.bin, self.headers / "include"):
            path.mkdir(parents=True)
        for name, text in (("nvcc", FAKE_NVCC), ("nvidia-smi", FAKE_SMI)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.kernels = folder / "kernels.cu"
        self.kernels.write_text("// none\n")
        self.write_headers(10)

    def write_headers(self, major: int, minor: int = 13) -> None:
        lines = [f"#define TRT_MAJOR_ENTERPRISE {major}", "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< Major."]
        if major < 10:
            lines = [f"#define NV_TENSORRT_MAJOR {major} //!< Major."]
        lines += [f"#define NV_TENSORRT_MINOR {minor}", "#define NV_TENSORRT_PATCH 3", "#define NV_TENSORRT_BUILD 9"]
        (self.headers / "include" / "NvInferVersion.h").write_text("\n".join(lines) + "\n")
        (self.headers / "include" / "NvInferRuntime.h").write_text("")

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "PYTHON": sys.executable}
        variables.update({"TENSORRT_ROOT": str(self.headers), "NVCC": str(self.bin / "nvcc"), **environment})
        command = ["bash", str(BUILD), "--output", str(self.output), "--kernels", str(self.kernels), *options]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    def library(self, major: int = 10) -> Path:
        return self.output / f"libgroup_norm_trt{major}.so"

    def manifest(self, major: int = 10) -> Dict[str, object]:
        return json.loads(Path(f"{self.library(major)}.json").read_text())


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@needs_bash
def test_build_writes_library_and_manifest(script):
    from cldm.files import sha256

    result = script.run()
    assert result.returncode == 0, result.stderr
    line = script.library().read_text()
    for arch in (80, 86, 89, 90):
        assert f"-gencode arch=compute_{arch},code=sm_{arch}" in line
    assert "-gencode arch=compute_90,code=compute_90" in line
    assert "tensorrt_v3.cpp" in line and "tensorrt_v2.cpp" not in line
    manifest = script.manifest()
    assert manifest["tensorrt"] == "10.13.3.9" and manifest["tensorrt_major"] == 10
    assert manifest["architectures"] == ["80", "86", "89", "90"] and manifest["ptx"] == "90"
    assert manifest["nvcc"] == "11.8.89" and str(manifest["source"]) in line
    files = {script.library().name: {"bytes": script.library().stat().st_size, "sha256": sha256(script.library())}}
    assert manifest["files"] == files
    assert sorted(path.name for path in script.output.iterdir()) == [
        script.library().name,
        script.library().name + ".json",
    ]


@needs_bash
@pytest.mark.parametrize("major, minor, glue", [(8, 6, "v2"), (10, 0, "v3"), (11, 1, "v3")])
def test_glue_by_major(script, major, minor, glue):
    script.write_headers(major, minor)
    assert script.run().returncode == 0
    assert f"tensorrt_{glue}.cpp" in script.library(major).read_text()


@needs_bash
def test_what_matches_is_kept_and_what_differs_is_built_again(script):
    assert script.run().returncode == 0
    script.library().touch()
    again = script.run()
    assert again.returncode == 0 and "matches" in again.stdout and "building" not in again.stdout
    assert "building" in script.run("--force").stdout
    assert "building" in script.run("--arch", "80").stdout
    assert "building" in script.run("--arch", "80", FAKE_CUDA="12.4").stdout
    kept = ("--arch", "80")
    assert "matches" in script.run(*kept, FAKE_CUDA="12.4").stdout
    script.kernels.write_text("// changed\n")
    assert "building" in script.run(*kept, FAKE_CUDA="12.4").stdout
    script.library().write_text("damaged")
    assert "building" in script.run(*kept, FAKE_CUDA="12.4").stdout


@needs_bash
@pytest.mark.parametrize(
    "gpus, known, machine_code, ptx",
    [
        ("9.0", None, ["90"], "90"),
        ("8.6 8.6", None, ["86"], "86"),
        ("8.0 8.9", None, ["80", "89"], "89"),
        ("12.0", None, [], "90"),  # newer than CUDA 11.8 knows: PTX of the newest that it does
        ("12.0", "80 90 100 120", ["120"], "120"),
        ("[N/A]", None, ["80", "86", "89", "90"], "90"),  # an old driver
    ],
)
def test_architectures_of_the_gpus(script, gpus, known, machine_code, ptx):
    environment = {"FAKE_GPUS": gpus, **({"FAKE_ARCHITECTURES": known} if known else {})}
    result = script.run(**environment)
    assert result.returncode == 0, result.stderr
    assert script.manifest()["architectures"] == machine_code and script.manifest()["ptx"] == ptx


@needs_bash
def test_failed_compilation_leaves_the_old_library_and_no_rest(script):
    assert script.run().returncode == 0
    before = {path.name: path.read_bytes() for path in script.output.iterdir()}
    result = script.run("--force", FAKE_FAIL="1")
    assert result.returncode == 1 and "nvcc could not build the plugin" in result.stderr
    assert {path.name: path.read_bytes() for path in script.output.iterdir()} == before


@needs_bash
@pytest.mark.parametrize(
    "options, environment, message",
    [
        (["--what"], {}, "unknown option '--what'"),
        (["--arch"], {}, "--arch needs a value"),
        (["--arch", "sm_80"], {}, "'sm_80' is no compute capability"),
        (["--arch", "75"], {}, "compute capability 75 is too old"),
        ([], {"FAKE_GPUS": "7.5"}, "compute capability 75 is too old"),
        (["--tensorrt", "/nowhere"], {}, "no TensorRT headers"),
        ([], {"TENSORRT_ROOT": "/nowhere"}, "under: /nowhere"),
        (["--kernels", "/nowhere.cu"], {}, "there is no /nowhere.cu"),
        ([], {"PYTHON": "/nowhere/python"}, "no '/nowhere/python'"),
    ],
)
def test_bad_input_is_named(script, options, environment, message):
    result = script.run(*options, **environment)
    assert result.returncode in (1, 2) and message in result.stderr
    assert not script.library().exists()


@needs_bash
@pytest.mark.parametrize("major, minor", [(7, 2), (8, 5), (9, 1), (12, 0)])
def test_unsupported_tensorrt_is_refused(script, major, minor):
    script.write_headers(major, minor)
    result = script.run()
    assert result.returncode == 1 and f"{major}.{minor}" in result.stderr and "8.6" in result.stderr


@needs_bash
def test_missing_nvcc_is_named(script):
    if Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("this machine has an nvcc where the script looks last")
    (script.bin / "nvcc").unlink()
    for name in ("bash", "sed", "dirname", "uname", "awk"):
        os.symlink(shutil.which(name), script.bin / name)
    result = script.run(PATH=str(script.bin), NVCC="", CUDA_HOME="/nowhere")
    assert result.returncode == 1 and "no nvcc; install the CUDA toolkit" in result.stderr


# ---- The sources against the real headers


def _versions() -> List[Path]:
    return sorted(path.parent for path in Path(HEADERS).glob("*/NvInferRuntime.h")) if HEADERS else []


@functools.lru_cache(maxsize=None)
def _cuda_headers() -> Optional[Path]:
    """The folder with CUDA's headers: of a toolkit, or of the packages that torch brings."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(root) / "include" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    candidates += [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    candidates += sorted(Path("/usr/local").glob("cuda-*/include"))
    for folder in sys.path:
        candidates += sorted(Path(folder or ".").glob("nvidia/*/include"))
    return next((path for path in candidates if (path / "cuda_runtime_api.h").exists()), None)


@pytest.fixture(params=_versions() or [None], ids=lambda path: path.name if path else "none")
def compiler(request) -> List[str]:
    """A g++ command line with the headers of one TensorRT and of CUDA."""
    if request.param is None:
        pytest.skip("CANNY2IMAGE_TENSORRT_HEADERS names no folder with TensorRT's headers")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    cuda = _cuda_headers()
    if cuda is None:
        pytest.skip("needs CUDA's headers")
    return ["g++", *WARNINGS, "-I", str(PLUGINS), "-isystem", str(request.param), "-isystem", str(cuda)]


def _glue(compiler: List[str]) -> Path:
    version = Path(compiler[compiler.index("-isystem") + 1]) / "NvInferVersion.h"
    is_eight = re.search(r"#define NV_TENSORRT_MAJOR 8\b", version.read_text(encoding="utf-8"))
    return PLUGINS / ("tensorrt_v2.cpp" if is_eight else "tensorrt_v3.cpp")


def _run(command: List[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_glue_compiles_without_a_warning(compiler):
    for source in (PLUGINS / "tensorrt_common.cpp", _glue(compiler), PLUGINS / "host_check.cpp"):
        _run([*compiler, "-fsyntax-only", str(source)])
    _run([*compiler, "-DCANNY2IMAGE_NO_CUDA", "-fsyntax-only", str(PLUGINS / "host_check.cpp")])


def test_host_check_without_a_gpu(compiler, tmp_path):
    """The library is linked with nothing left open, and everything but enqueue is driven through its interface."""
    stub, library, program = tmp_path / "stub.cpp", tmp_path / "plugin.so", tmp_path / "host_check"
    stub.write_text(STUB)
    glue = [str(PLUGINS / "tensorrt_common.cpp"), str(_glue(compiler)), str(stub)]
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-z,defs"]
    _run([*compiler, *shared, "-o", str(library), *glue, "-ldl"])
    host = ["-DCANNY2IMAGE_NO_CUDA", "-rdynamic", "-o", str(program), str(PLUGINS / "host_check.cpp"), "-ldl"]
    _run([*compiler, *host])
    assert " 0 failed" in _run([str(program), str(library), "--no-gpu"])
    facts, code, errors = _load(library)
    assert facts["plugin"] == "GroupNormSiLU" and str(facts["tensorrt"]).startswith(f"{facts['tensorrt_major']}.")
    assert code == 1 and "no TensorRT" in errors  # loads without TensorRT, and says what is missing


def _load(library: Path) -> Tuple[Dict[str, object], int, str]:
    """The library's facts and what it answers when it is to register itself, in a Python without TensorRT."""
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.canny2imageFacts.restype = ctypes.c_char_p;"
        "print(library.canny2imageFacts().decode()); print(library.canny2imageRegister())"
    )
    command = [sys.executable, "-c", code, str(library)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    facts, answer = result.stdout.splitlines()
    return json.loads(facts), int(answer), result.stderr


@needs_bash
@pytest.mark.slow
def test_library_with_its_kernels(compiler, tmp_path):
    """build.sh with a real nvcc, for one compute capability, and the host check on what it made."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    headers = compiler[compiler.index("-isystem") + 1]
    options = ["--tensorrt", headers, "--output", str(tmp_path), "--arch", "80", "--host-check"]
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(BUILD), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stdout + result.stderr
    (library,) = tmp_path.glob("*.so")
    (program,) = tmp_path.glob("host_check_trt*")
    assert " 0 failed" in _run([str(program), str(library), "--no-gpu"])
