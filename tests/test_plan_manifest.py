"""A plan is refused before it is deserialised where what it depends on differs, with the command that rebuilds it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Callable

import pytest

import build_engines
from cldm.weights import Weights, find_weights
from deploy import plan_manifest
from deploy.engine_options import EngineOptions
from deploy.manifest import ROOT, ArtefactError, check_artefact, manifest_path, write_manifest
from deploy.plan_manifest import Machine, builder_digest, check_plan, engine_command, plan_fields, plan_path
from deploy.spec import Build, graph_specs
from tests.small_model import small_config

MACHINE = Machine("10.13.3.9", "NVIDIA H200", "9.0", "0123456789abcdef")
BUILD = Build(small_config(), 64, 64, 1, "fp16")
STEP = graph_specs(BUILD)["step"]
WEIGHTS = find_weights(BUILD.config)


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Path]:
    def make(machine: Machine = MACHINE, **options: Any) -> Path:
        file = plan_path(tmp_path / BUILD.folder_name, STEP)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"plan")
        fields = plan_fields(BUILD, STEP, WEIGHTS, machine, EngineOptions(**options), "hash of the ONNX file")
        write_manifest(file, fields, [file], None)
        return file

    return make


def _check(file: Path, machine: Machine = MACHINE, build: Build = BUILD, weights: Weights = WEIGHTS) -> Any:
    return check_plan(file, build, graph_specs(build)["step"], weights, machine)


def test_a_plan_of_this_machine_is_taken(make_plan):
    manifest = _check(make_plan())
    assert manifest["kind"] == "plan" and manifest["tensorrt"] == "10.13.3.9"
    assert manifest["options"]["groupnorm"] == "plugin" and manifest["plugin"] == MACHINE.plugin


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tensorrt": "10.14.0.1"}, "tensorrt is 10.13.3.9, wanted 10.14.0.1"),
        ({"gpu": "NVIDIA L4", "compute_capability": "8.9"}, "gpu is NVIDIA H200, wanted NVIDIA L4; compute_capability"),
        ({"compute_capability": "10.0"}, "compute_capability is 9.0, wanted 10.0"),
        ({"plugin": "f" * 16}, "another plugin: its sources' hash is 0123456789abcdef, that of .* ffffffffffffffff"),
        ({"plugin": None}, "needs the plugin library, which is not built for TensorRT 10.13.3.9"),
    ],
)
def test_a_plan_of_another_machine_is_refused(make_plan, changed, words):
    file = make_plan()
    with pytest.raises(ArtefactError, match=f"{words}.*build it with: python3 build_engines.py --model"):
        _check(file, dataclasses.replace(MACHINE, **changed))


def test_a_plan_without_plugin_nodes_needs_no_plugin(make_plan):
    file = make_plan(groupnorm="native")
    assert _check(file, dataclasses.replace(MACHINE, plugin=None))["plugin"] is None
    assert _check(file, dataclasses.replace(MACHINE, plugin="f" * 16))


def test_a_plan_of_other_weights_size_or_code_is_refused(make_plan, monkeypatch):
    file = make_plan()
    with pytest.raises(ArtefactError, match="weights is .*--random-weights 8"):
        _check(file, weights=find_weights(BUILD.config, random_seed=8))
    with pytest.raises(ArtefactError, match="width is 64, wanted 128"):
        _check(file, build=dataclasses.replace(BUILD, width=128))
    with pytest.raises(ArtefactError, match="precision is fp16, wanted fp32"):
        _check(file, build=dataclasses.replace(BUILD, precision="fp32"))
    monkeypatch.setattr("deploy.manifest.code_digest", lambda: "changed")
    with pytest.raises(ArtefactError, match="code is"):
        _check(file)


@pytest.mark.parametrize(
    ("level", "changed", "words"),
    [
        ("same-compute-capability", {"gpu": "NVIDIA H100"}, None),
        ("same-compute-capability", {"gpu": "NVIDIA L4", "compute_capability": "8.9"}, "compute_capability is 9.0"),
        ("ampere-plus", {"gpu": "NVIDIA L4", "compute_capability": "8.9"}, None),
        ("ampere-plus", {"gpu": "NVIDIA B200", "compute_capability": "10.0"}, None),
        ("ampere-plus", {"gpu": "NVIDIA T4", "compute_capability": "7.5"}, "8.0 or later, and NVIDIA T4 has 7.5"),
        ("ampere-plus", {"tensorrt": "11.4.0.106"}, "tensorrt is"),
    ],
)
def test_hardware_compatible_plans_run_where_they_may(make_plan, level, changed, words):
    file = make_plan(hardware_compatibility=level)
    other = dataclasses.replace(MACHINE, **changed)
    if words is None:
        assert _check(file, other)
        return
    with pytest.raises(ArtefactError, match=words):
        _check(file, other)


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "no plan", "no manifest", "no JSON", "options"])
def test_a_damaged_plan_is_refused(make_plan, damage):
    file = make_plan()
    if damage == "truncated":
        file.write_bytes(b"pl")
    elif damage == "corrupt":
        file.write_bytes(b"p1an")
    elif damage == "no plan":
        file.unlink()
    elif damage == "no manifest":
        manifest_path(file).unlink()
    elif damage == "no JSON":
        manifest_path(file).write_text("{")
    else:
        found = json.loads(manifest_path(file).read_text())
        manifest_path(file).write_text(json.dumps({**found, "options": [], "gpu": None}))
    with pytest.raises(ArtefactError, match="build it with: python3 build_engines.py"):
        _check(file)


def test_what_a_plan_is_built_from_makes_it_stale_but_not_unusable(make_plan, monkeypatch):
    file = make_plan()

    def fields(onnx: str = "hash of the ONNX file", **options: Any) -> Any:
        return plan_fields(BUILD, STEP, WEIGHTS, MACHINE, EngineOptions(**options), onnx)

    assert check_artefact(file, fields())
    for other, words in (
        (fields(opt_level=4), "options is"),
        (fields(tf32=("step",)), "options is"),
        (fields(groupnorm="native"), "plugin is .*options is"),
        (fields(onnx="other"), "onnx is"),
    ):
        with pytest.raises(ArtefactError, match=words):
            check_artefact(file, other)
    assert check_artefact(file, fields(tf32=("text",)))  # of another graph
    monkeypatch.setattr(plan_manifest, "builder_digest", lambda: "changed")
    with pytest.raises(ArtefactError, match="builder is"):
        check_artefact(file, fields())
    assert _check(file)


def test_the_builder_s_sources_have_the_surgery_and_what_differs_by_version(monkeypatch):
    named = []
    monkeypatch.setattr(plan_manifest, "source_digest", lambda files: named.extend(files) or "x")
    assert builder_digest() == "x" and all(file.is_file() for file in named)
    names = {file.name for file in named}
    assert {"surgery.py", "engine_build.py"} | {file.name for file in (ROOT / "deploy").glob("tensorrt_*.py")} <= names


def test_the_command_that_rebuilds_gives_the_same_build(tmp_path, monkeypatch):
    options = EngineOptions("native", 2, 3, 512, "ampere-plus", "detailed", ("text",))
    command = engine_command(BUILD, find_weights(BUILD.config, random_seed=5), tmp_path, options)
    words = command.split()
    assert words[:2] == ["python3", "build_engines.py"]
    args = build_engines.parse_arguments(words[2:])
    assert (args.height, args.width, args.samples, args.precision) == (64, 64, 1, "fp16")
    assert args.random_weights == 5 and args.build_dir == tmp_path and args.tf32 == ["text"]
    assert build_engines.options_of(args, args.groupnorm) == options
    assert args.device == 0 and "--device" not in words
    words = engine_command(BUILD, WEIGHTS, tmp_path, options, device=1).split()
    assert build_engines.parse_arguments(words[2:]).device == 1
    assert "--build-dir" not in engine_command(BUILD, WEIGHTS, ROOT / "build")
    monkeypatch.chdir(ROOT)
    assert "--build-dir" not in engine_command(BUILD, WEIGHTS, Path(os.curdir) / "build")
