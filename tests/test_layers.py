"""The layers import downwards only, light modules stay light, and the contest's Python can read the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Set, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "ldm": set(),
    "cldm": {"ldm"},
    "deploy": {"ldm", "cldm"},
    "runtime": {"ldm", "cldm", "deploy"},
    "scoring": {"ldm", "cldm"},
}
# What stands above all layers; of the others only tests and the doctor's entry import it.
OUTER = ("benchmarks", "tools")
ENTRIES = (
    *("canny2image_TRT.py", "compute_score.py", "export_onnx.py", "build_engines.py", "doctor.py"),
    "environment.py",
)
# Drawn scenes are made in processes of their own by the dozen: torch in each would cost more than the drawing.
DRAWING = ("tools.tiny.scenes", "tools.tiny.measures", "tools.tiny.report", "tools.build_vocabulary")
LIGHT = (
    *("ldm.layout", "ldm.schedule", "cldm.config", "cldm.files", "cldm.image", "cldm.request", "cldm.result"),
    *("cldm.tokenizer", "cldm.weights", "deploy.spec", "deploy.manifest", "runtime.session", "runtime.workspace"),
    *("runtime.pipeline", "runtime.backends", "runtime.choose", "runtime.ort_session", "runtime.torch_session"),
    *("runtime.stream", "runtime.cuda_graph", "runtime.cuda_runtime", "runtime.torch_backend"),
    *("runtime.fused.tuning", "runtime.fused.session", "runtime.fused.build"),
    *("canny2image_TRT", "compute_score", "export_onnx", "build_engines", "environment", "scoring.runner"),
    *("doctor", "tools.doctor.examine", "tools.doctor.files", "deploy.toolchain", "runtime.tensorrt_backend"),
)


def sources() -> List[Path]:
    """Everything that the contest's machine runs, and the tools."""
    files = [ROOT / name for name in ENTRIES]
    for folder in (*LAYERS, *OUTER):
        files += sorted((ROOT / folder).rglob("*.py"))
    return files


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_downwards(layer: str) -> None:
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    entries = {Path(name).stem for name in ENTRIES}
    upwards: Set[str] = set(LAYERS) - LAYERS[layer] - {layer} | {"tests", *OUTER} | entries
    for path in files:
        assert not upwards & set(imported(path)), path


@pytest.mark.parametrize("folder", OUTER)
def test_tools_do_not_need_the_tests_or_each_other(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert not {"tests", *OUTER} - {folder} & set(imported(path)), path


def test_commands_import_no_command() -> None:
    """What two tools share lies in a package: tools/tiny for those of the tiny model."""
    assert (ROOT / "tools" / "tiny" / "scenes.py") in sources()
    commands = {path.stem for path in (ROOT / "tools").glob("*.py")}
    for path in (ROOT / "tools" / "tiny").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not {f"tools.{name}" for name in commands} & {node.module}, path
                assert node.module != "tools" or not commands & {alias.name for alias in node.names}, path


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_python_3_8(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "cv2", "tensorrt", "polygraphy")


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [(LIGHT, HEAVY), (DRAWING, tuple(name for name in HEAVY if name != "cv2"))],
    ids=["pipeline", "drawing"],
)
def test_light_modules_import_nothing_heavy(modules: Tuple[str, ...], heavy: Tuple[str, ...]) -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=str(ROOT), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
    assert not done.stderr
