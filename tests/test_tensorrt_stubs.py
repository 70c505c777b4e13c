"""mypy over the code that calls TensorRT, against stubs made from the bindings of each version."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

from tests import tensorrt_bindings, tensorrt_stubs

ROOT = Path(__file__).resolve().parent.parent
# The majors that a module or a class is for, by the number at the end of its name; without one it is for all.
MAJORS_OF = {8: {8}, 10: {10, 11}, 11: {11}}
FLAGS = ["--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent", "--check-untyped-defs"]

needs_mypy = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="needs mypy, which requirements-dev.txt has"
)


@pytest.fixture(params=tensorrt_bindings.MAJORS, ids=lambda major: f"tensorrt{major}")
def major(request: pytest.FixtureRequest) -> int:
    reason = tensorrt_bindings.missing_reason(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def _callers() -> List[Path]:
    """The modules that import TensorRT."""
    files = [*(ROOT / "deploy").glob("*.py"), *(ROOT / "runtime").glob("*.py")]
    return [file for file in files if re.search(r"^\s+import tensorrt$", file.read_text(encoding="utf-8"), re.M)]


def _mypy(stubs: Path, files: List[Path]) -> List[Tuple[Path, int, str]]:
    """File, line and text of each error."""
    cache = ROOT / "build" / "mypy"
    command = [sys.executable, "-m", "mypy", *FLAGS, "--no-incremental", "--cache-dir", str(cache)]
    command += ["--no-error-summary", "--config-file", "", "--show-absolute-path", *map(str, files)]
    environment = {"MYPYPATH": str(stubs), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=str(ROOT), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [re.match(r"(.*?):(\d+): error: (.*)", line) for line in done.stdout.splitlines()]
    return [(Path(match.group(1)), int(match.group(2)), match.group(3)) for match in found if match]


@functools.lru_cache(maxsize=None)
def _classes(file: Path) -> Dict[str, Tuple[int, int]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return {node.name: (node.lineno, node.end_lineno or node.lineno) for node in found}


def _majors(file: Path, line: int) -> Set[int]:
    """The majors that a line is for."""
    names = [file.stem, *(name for name, (first, last) in _classes(file).items() if first <= line <= last)]
    numbers = [int(match.group(1)) for match in map(re.compile(r".*?(\d+)$").match, names) if match]
    return MAJORS_OF[numbers[-1]] if numbers else set(tensorrt_bindings.MAJORS)


PLANTED = """
def use() -> None:
    import tensorrt

    builder = tensorrt.Builder(tensorrt.Logger())
    config = builder.create_builder_config()
    config.set_flagg(tensorrt.BuilderFlag.TF32)
    config.set_flag("TF32")
    config.max_aux_streams = "none"
    config.num_optimization_profiles = 1
    tensorrt.BuilderFlag.NO_SUCH_FLAG
    config.set_timing_cache(config.create_timing_cache(b""))
    config.max_aux_streams = 1
    tuple(builder.create_network(0).get_input(0).shape)
"""


@needs_mypy
def test_every_call_is_one_of_that_version(major, tmp_path):
    stubs = tensorrt_stubs.write_stubs(major, tmp_path)
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED, encoding="utf-8")
    callers = _callers()
    assert {"engine_build.py", "tensorrt_8.py", "tensorrt_10.py", "tensorrt_session.py"} <= {f.name for f in callers}
    errors = _mypy(stubs, [*callers, planted])
    assert [line for file, line, _ in errors if file == planted] == [7, 8, 9, 10, 11, 12]
    ours = [(file, line, text) for file, line, text in errors if file != planted]
    wrong = [f"{file}:{line}: {text}" for file, line, text in ours if major in _majors(file, line)]
    assert not wrong, "\n".join(wrong)
    # What is for other versions does not fit this one, which shows that mypy looked.
    others = {file.name for file, line, _ in ours if major not in _majors(file, line)}
    assert ("tensorrt_10.py" if major == 8 else "tensorrt_8.py") in others or major == 10


@pytest.mark.parametrize("name", ["tensorrt_8", "tensorrt_10"])
def test_a_module_s_number_says_whom_it_is_for(name):
    assert _majors(ROOT / "deploy" / f"{name}.py", 1) == MAJORS_OF[int(name.rpartition("_")[2])]
    assert _majors(ROOT / "deploy" / "engine_build.py", 1) == {8, 10, 11}


def test_the_stubs_are_python_and_hold_what_the_bindings_have(major):
    description = tensorrt_bindings.load(major).describe()
    tree = ast.parse(tensorrt_stubs.StubWriter(description).text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert set(classes) == {name for name in description["classes"] if "." not in name}
    members = set(_names(classes["BuilderFlag"]))
    assert set(description["classes"]["BuilderFlag"]["members"]) <= members
    assert ("FP16" in members) == (major != 11)
    assert set(description["functions"]) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    setters = [
        node.name
        for node in classes["ITensor"].body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list)
    ]
    assert ("dtype" in setters) == (major != 11) and "name" in setters


def _names(node: ast.ClassDef) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ([("self", "X", "positional"), ("a", "int", "either")], "self, a: builtins.int"),
        ([("self", "X", "positional"), ("arg0", "int", "positional")], "self, arg0: builtins.int, /"),
        ([("self", "X", "positional"), ("a", "Dims", "keyword", "None")], "self, *, a: typing.Optional["),
        (
            [("self", "X", "positional"), ("a", "int", "either", "0"), ("b", "int", "either")],
            "self, a: builtins.int, b: ",
        ),
        ([("self", "X", "positional"), ("in", "List[Dims]", "either")], "self, in_: Sequence[Union[Dims, "),
        (
            [("self", "X", "positional"), ("a", "no.such<type>", "either"), ("k", "object", "**")],
            "self, a: Any, **k: Any",
        ),
    ],
)
def test_parameters_are_written_as_python_has_them(parameters, text):
    fields = ("name", "type", "kind", "default")
    writer = tensorrt_stubs.StubWriter({"classes": {}, "functions": {}, "constants": {}})
    assert writer._parameters([dict(zip(fields, one)) for one in parameters], True).startswith(text)
