"""The doctor's table: on this machine, on a bare Python, and on machines that doubles stand for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import torch

import doctor
import environment
from cldm.config import MODELS_DIR, ModelConfig, load_config
from cldm.weights import Weights, find_weights
from deploy.manifest import identity, write_manifest
from deploy.plan_manifest import Machine, plan_path
from deploy.plugin_library import library_path, plugin_digest
from deploy.spec import Build, graph_specs
from deploy.tensorrt_versions import find_version
from deploy.toolchain import Gpu
from scoring import backbones
from tests import tensorrt_bindings
from tests.builder_double import install_plans, make_library
from tests.small_model import small_config
from tests.tensorrt_double import TensorRTDouble
from tools.doctor import examine, files, machine
from tools.doctor.rows import DIFFERS, MISSING, OK, Row, format_rows, guarded

ROOT = Path(__file__).resolve().parent.parent
GPU = Gpu("NVIDIA Double", "9.0")
CONFIG = small_config()
BUILD = Build(CONFIG, 64, 64, 1, "fp16")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return find_weights(CONFIG)


@pytest.fixture(params=tensorrt_bindings.MAJORS, ids=lambda major: f"tensorrt{major}")
def double(request: pytest.FixtureRequest) -> Iterator[TensorRTDouble]:
    reason = tensorrt_bindings.missing_reason(request.param)
    if reason:
        pytest.skip(reason)
    made = TensorRTDouble.load(request.param)
    with made.installed():
        yield made


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without GPU, TensorRT and weights of metrics; the folder of its builds."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(backbones, "backbone_folders", lambda: [tmp_path / "metrics"])
    # As find_spec sees a module that is none.
    real = machine.importlib.util.find_spec
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None if name == "tensorrt" else real(name))
    return tmp_path / "build"


def place_of(folder: Path, **changed: Any) -> files.Place:
    return dataclasses.replace(files.Place(folder, CONFIG), **changed)


def write_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int = 0) -> None:
    """A program nvidia-smi that says this."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncase \"$1\" in --query-gpu=*) ;; *) exit 3 ;; esac\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/bin{os.pathsep}/usr/bin")


def states(rows: List[Row]) -> Dict[str, str]:
    return {row.what: row.state for row in rows}


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu(nothing: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--model", "tiny", "--build-dir", str(nothing)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nruns here: (onnxruntime, )?torch on the CPU\n$", out)
    table = dict(re.findall(r"^(\S.*?)  +(ok|missing|differs)  ", out, re.M))
    ok = {"Python", "packages to run", "weights of tiny", "vocabulary", "calibration"}
    of_this_python = {"cuda-python", "packages to export", "packages to build", "packages of metrics"}
    assert {what for what, state in table.items() if state == OK} - of_this_python == ok
    lacking = {"driver", "CUDA", "TensorRT", "GroupNorm plugin", "torch operator", "ONNX exports", "engines"}
    lacking |= {"weights of PD", "weights of LPIPS", "fused networks"}
    assert {what for what, state in table.items() if state == MISSING} - of_this_python == lacking
    assert DIFFERS not in table.values()
    assert f"fix: {shlex.quote(sys.executable)} -m pip install tensorrt-cu13\n" in out and "tensorrt-cu12" in out
    assert max(map(len, out.splitlines())) <= 160


def test_without_a_model_named_the_checkpoint_of_sd15_is_looked_for(nothing: Path, tmp_path: Path) -> None:
    rows, backends = examine.examine(None, None, None, nothing)
    if not (MODELS_DIR / "control_sd15_canny.pth").is_file():
        found = {row.what: row for row in rows}["weights of sd15"]
        assert found.state == MISSING
        assert re.fullmatch(r"put control_sd15_canny.* into .*models.*", found.fix)
    assert backends


def test_a_bare_python_is_told_what_to_run(tmp_path: Path) -> None:
    """-S leaves out all packages; the guard says that .venv was tried."""
    environ = {"PATH": str(tmp_path), environment.GUARD: "1", "HACKATHON_BUILD_DIR": str(tmp_path)}
    command = [sys.executable, "-S", "-B", str(ROOT / "doctor.py")]
    done = subprocess.run(command, env=environ, cwd=str(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^packages to run +missing +torch, numpy, cv2, .*\n +fix: bash preprocess.sh$", done.stdout, re.M)
    assert re.search(r"^TensorRT +missing ", done.stdout, re.M)
    assert done.stdout.endswith("\nnothing can run here yet\n")


@pytest.mark.parametrize("case", ["weights", "vocabulary"])
def test_a_model_that_cannot_be_loaded_runs_nowhere(
    case: str, nothing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny = load_config("tiny")
    changed: Dict[str, Any] = {"checkpoint": ("none.pth",)} if case == "weights" else {"tokenizer": "none"}
    config = dataclasses.replace(tiny, seed=None, tokenizer_hub=None, **changed)
    monkeypatch.setattr("runtime.choose.load_config", lambda name: config)
    assert doctor.main(["--model", "tiny", "--build-dir", str(nothing)]) == 1
    out = capsys.readouterr().out
    assert "nothing can run here yet" in out
    fix = "put none.pth into" if case == "weights" else "copy vocab.json and merges.txt to"
    assert f"fix: {fix} " in out


def test_wrong_options_are_one_line(nothing: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--model", "sd99", "--build-dir", str(nothing)]) == 1
    assert re.fullmatch(r"doctor.py: no model config .*sd99.*\n", capsys.readouterr().err)


# -- the machine -------------------------------------------------------------------------------------------------------


def test_gpus_as_nvidia_smi_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H200, 9.0, 142900, 143771, 580.95.05\nNVIDIA A10, 8.6, 10, 22731, 580.95.05"
    write_smi(tmp_path, monkeypatch, lines)
    assert machine.check_gpus() == [
        Row("driver", OK, "580.95.05"),
        Row("GPU 0", OK, "NVIDIA H200, compute capability 9.0, 142900 of 143771 MiB free"),
        Row("GPU 1", OK, "NVIDIA A10, compute capability 8.6, 10 of 22731 MiB free"),
    ]


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("NVIDIA-SMI has failed because\nit could", 9, "NVIDIA-SMI has failed because"),
        ("", 6, "nvidia-smi ended with 6 and said nothing"),
        ("Field compute_cap is not valid", 0, "nvidia-smi answered 'Field compute_cap is not valid'"),
    ],
)
def test_a_driver_that_does_not_answer(
    text: str, status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_smi(tmp_path, monkeypatch, text, status)
    (row,) = machine.check_gpus()
    assert (row.state, row.found) == (DIFFERS, words)
    assert row.fix


def test_cuda_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.choose.cuda_problem", lambda: None)
    assert machine.check_cuda().state == OK
    monkeypatch.setattr("runtime.choose.cuda_problem", lambda: "no CUDA device")
    monkeypatch.setattr("runtime.cuda_runtime.driver_problem", lambda: "the driver runs CUDA 11.4 at most")
    row = machine.check_cuda()
    assert row.state == MISSING
    assert row.found.startswith("the driver runs CUDA 11.4 at most (torch is for CUDA")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built with CUDA" in machine.check_cuda().fix


def test_tensorrt_and_its_code(double: TensorRTDouble) -> None:
    module = {8: "TensorRT8 of deploy.tensorrt_8", 10: "TensorRT10 of deploy.tensorrt_10"}
    code = module.get(double.major, "TensorRT11 of deploy.tensorrt_10")
    assert machine.check_tensorrt() == Row("TensorRT", OK, f"{double.version}, by {code}")
    double.module.__version__ = "10.0.1"
    row = machine.check_tensorrt()
    assert row.state == DIFFERS
    assert "TensorRT 10.0.1 is not supported" in row.found
    assert "10.1 or a later 10" in row.fix


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_plugin(double: TensorRTDouble, tmp_path: Path) -> None:
    place = place_of(tmp_path, version=find_version(), gpu=GPU)
    (row,) = files.check_plugin(place)
    assert (row.state, row.fix) == (MISSING, f"bash plugins/build.sh --output {tmp_path / 'plugins'}")
    other = 10 if double.major == 8 else 8
    make_library(tmp_path, other)
    (row,) = files.check_plugin(place)
    assert row.state == MISSING
    assert f"built: libgroup_norm_trt{other}.so with TensorRT {other}.0.0.1's headers for sm_80 sm_90" in row.found
    make_library(tmp_path, double.major)
    (row,) = files.check_plugin(place)
    assert (row.state, row.fix) == (OK, "")
    for changed, words in (({"source": "old"}, "source is old"), ({"architectures": ["80"], "ptx": 99}, "no code for")):
        make_library(tmp_path, double.major, **changed)
        (row,) = files.check_plugin(place)
        assert row.state == DIFFERS
        assert words in row.found
        assert row.fix.startswith("bash plugins/build.sh")
    (row,) = files.check_plugin(place_of(tmp_path, version=find_version()))
    assert "there is no GPU" in row.found


def test_the_torch_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins import torch_operator

    real = torch_operator.library_path
    monkeypatch.setattr(torch_operator, "library_path", lambda architectures: real(architectures, tmp_path))
    row = files.check_operator(place_of(tmp_path, gpu=GPU))
    assert (row.state, row.fix) == (MISSING, "python3 -m plugins.torch_operator --build")
    real([90], tmp_path).touch()
    assert files.check_operator(place_of(tmp_path, gpu=GPU)) == Row("torch operator", OK, str(real([90], tmp_path)))
    assert files.check_operator(place_of(tmp_path, gpu=Gpu("other", "8.0"))).state == MISSING


def export(folder: Path, weights: Weights, build: Build = BUILD) -> Path:
    """Files that pass for exported graphs, with their manifests."""
    target = folder / build.folder_name
    target.mkdir(parents=True)
    for spec in graph_specs(build).values():
        (target / spec.file).write_bytes(spec.name.encode())
        write_manifest(target / spec.file, identity(build, spec, weights), [target / spec.file], None)
    return target


def test_exports(tmp_path: Path, weights: Weights) -> None:
    target = export(tmp_path, weights)
    what = f"ONNX {BUILD.folder_name}"
    rows = files.check_builds(place_of(tmp_path))
    assert states(rows) == {what: OK, "engines": MISSING}
    assert rows[0].found == "5 graphs, of random weights, seed 7"
    (target / "hint.onnx").write_bytes(b"hin")
    row = files.check_builds(place_of(tmp_path))[0]
    assert row.state == DIFFERS
    assert "hint.onnx is truncated" in row.found
    assert re.match(r"python3 export_onnx.py --model .* --precision fp16 .*--height 64 --width 64 ", row.fix)
    row = files.check_builds(place_of(tmp_path, random_weights=8))[0]
    assert row.state == DIFFERS
    assert "weights is" in row.found


def test_folders_that_are_no_builds_of_ours(tmp_path: Path) -> None:
    for name in ("sd14-256x384-n1-fp16", f"{CONFIG.name}-60x64-n1-fp16", "notes-n1", "sampler"):
        (tmp_path / name).mkdir()
    rows = files.check_builds(place_of(tmp_path))
    assert states(rows) == {
        "build sd14-256x384-n1-fp16": DIFFERS,
        f"build {CONFIG.name}-60x64-n1-fp16": DIFFERS,
        "ONNX exports": MISSING,
        "engines": MISSING,
    }
    assert "no config of a model sd14" in rows[1].found + rows[0].found


def test_a_build_of_a_checkpoint_that_is_not_here(tmp_path: Path, weights: Weights) -> None:
    export(tmp_path, weights)
    lacking = dataclasses.replace(CONFIG, seed=None)
    row = files.check_builds(place_of(tmp_path, config=lacking))[0]
    assert row.state == DIFFERS
    assert "nothing to compare with: no checkpoint of small" in row.found


def test_engines(double: TensorRTDouble, tmp_path: Path, weights: Weights) -> None:
    place = place_of(tmp_path, version=find_version(), gpu=GPU)
    fits = Machine(double.version, GPU.name, GPU.compute_capability)
    target = install_plans(tmp_path, BUILD, weights, fits)
    row = files.check_builds(place)[0]
    assert (row.what, row.state) == (f"engines {BUILD.folder_name}", OK)
    assert f"5 plans for TensorRT {double.version} on NVIDIA Double" in row.found
    for machine_of, words in (
        (dataclasses.replace(fits, tensorrt="9.9.9"), "tensorrt is 9.9.9"),
        (dataclasses.replace(fits, gpu="NVIDIA Other"), "gpu is NVIDIA Other, wanted NVIDIA Double"),
        (dataclasses.replace(fits, plugin="0" * 16), "needs the plugin library"),
    ):
        install_plans(tmp_path, BUILD, weights, machine_of)
        row = files.check_builds(place)[0]
        assert row.state == DIFFERS
        assert words in row.found
        assert "build it with" not in row.found
        assert re.match(r"python3 build_engines.py --model .* --precision fp16 --samples 1 ", row.fix)
    make_library(tmp_path, double.major)
    install_plans(tmp_path, BUILD, weights, dataclasses.replace(fits, plugin=plugin_digest(double.major)))
    assert library_path(tmp_path, double.major).is_file()
    assert files.check_builds(place)[0].state == OK
    plan_path(target, graph_specs(BUILD)["step"]).unlink()
    assert "control_unet.plan is missing" in files.check_builds(place)[0].found
    without = files.check_builds(place_of(tmp_path, gpu=GPU))[0]
    assert (without.state, without.found, without.fix) == (DIFFERS, "there is no TensorRT to run it", "")


def test_checkpoints_are_compared_with_what_their_authors_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, folder=str(tmp_path), checkpoint=("published.pth",))
    place = place_of(tmp_path / "build", config=config)
    assert "random weights" in files.check_checkpoint(place, config).found
    (tmp_path / "published.pth").write_bytes(b"weights")
    assert "no published hash" in files.check_checkpoint(place, config).found
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(files.PUBLISHED, "published.pth", digest)
    row = files.check_checkpoint(place, config)
    assert (row.state, f"SHA-256 {digest[:16]}, as published" in row.found) == (OK, True)
    (tmp_path / "published.pth").write_bytes(b"weight")
    row = files.check_checkpoint(place, config)
    assert (row.state, f"not the published {digest[:16]}" in row.found) == (DIFFERS, True)
    (tmp_path / "published.pth").write_bytes(b"")
    row = files.check_checkpoint(place, config)
    assert (row.state, "is empty" in row.found) == (DIFFERS, True)


def test_weights_of_metrics(nothing: Path, tmp_path: Path) -> None:
    assert states(files.check_metrics()) == {"weights of PD": MISSING, "weights of LPIPS": MISSING}
    content = b"alexnet"
    file = tmp_path / "metrics" / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    row = files.check_metric("LPIPS", file.name, "torch")
    assert (row.state, row.fix) == (MISSING, f"put it at {file}")
    file.parent.mkdir()
    file.write_bytes(content)
    assert files.check_metric("LPIPS", file.name, "torch") == Row("weights of LPIPS", OK, str(file))
    file.write_bytes(b"other")
    assert files.check_metric("LPIPS", file.name, "torch").state == DIFFERS


def test_fused_networks_and_their_tile_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = files.check_fused(place_of(tmp_path))
    assert (row.state, "for CUDA devices" in row.found) == (MISSING, True)
    monkeypatch.setattr("runtime.fused.build.fused_problem", lambda device, precision: None)
    rows = files.check_fused(place_of(tmp_path, gpu=GPU))
    assert states(rows) == {"fused networks": OK, "tile sizes": MISSING}
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "NVIDIA_Double.json").write_text('{"configs": {"linear": "64 64 32 4 3"}}')
    assert files.check_fused(place_of(tmp_path, gpu=GPU))[1].found.startswith("1 in ")
    (tmp_path / "tuning" / "NVIDIA_Double.json").write_text("{")
    damaged = files.check_fused(place_of(tmp_path, gpu=GPU))[1]
    assert (damaged.state, damaged.fix) == (DIFFERS, "delete it, it is made again")
    shipped = files.check_fused(place_of(tmp_path, gpu=Gpu("NVIDIA H200", "9.0")))[1]
    assert (shipped.state, "tables/NVIDIA_H200.json" in shipped.found) == (OK, True)
    monkeypatch.setattr(
        "runtime.fused.build.fused_problem", lambda device, precision: "the package triton is not installed"
    )
    (row,) = files.check_fused(place_of(tmp_path, gpu=GPU))
    assert (row.state, row.fix) == (MISSING, "pip install triton")


def test_no_calibration_is_told_with_the_command(tmp_path: Path) -> None:
    row = files.check_calibration(place_of(tmp_path))
    assert (row.state, "none was made" in row.found) == (MISSING, True)
    assert re.match(r"python3 tools/calibrate_sampler.py --model .* --steps 20", row.fix)


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ok", "backends"),
    [
        ([], []),
        (["packages to export"], ["onnxruntime"]),
        (["ONNX sd15-256x384-n1-fp32"], ["onnxruntime"]),
        (["ONNX tiny-256x384-n1-fp32"], []),
        (["CUDA", "TensorRT", "cuda-python"], ["torch on CUDA"]),
        (["CUDA", "TensorRT", "cuda-python", "engines tiny-256x384-n1-fp16"], ["torch on CUDA"]),
        (["CUDA", "TensorRT", "cuda-python", "engines sd15-256x384-n1-fp16"], ["tensorrt", "torch on CUDA"]),
        (["CUDA", "TensorRT", "engines sd15-256x384-n1-fp16"], ["torch on CUDA"]),
    ],
)
def test_what_can_run(ok: List[str], backends: List[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.onnxruntime_problem", lambda: None)
    rows = [Row(what, OK, "") for what in ok] + [Row("engines sd15-512x512-n1-fp16", DIFFERS, "")]
    assert examine._backends(rows, "sd15") == [*backends, "torch on the CPU"]
    monkeypatch.setattr("runtime.backends.onnxruntime_problem", lambda: "the package onnxruntime is not installed")
    assert "onnxruntime" not in examine._backends(rows, "sd15")


def test_a_check_that_fails_is_a_row() -> None:
    def fails(text: str) -> Row:
        raise KeyError(text)

    assert guarded("this", fails, "that") == [Row("this", DIFFERS, "KeyError: 'that'")]


def test_rows_are_wrapped_and_fixes_are_not() -> None:
    text = format_rows([Row("a", OK, "word " * 40), Row("longer", MISSING, "b", "c " * 80)])
    lines = text.splitlines()
    assert lines[0].startswith("a       ok       word")
    assert lines[1].startswith(" " * 17 + "word")
    assert lines[-2] == "longer  missing  b"
    assert lines[-1] == " " * 17 + "fix: " + "c " * 80
