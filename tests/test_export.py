"""Exported graphs: form, numbers against PyTorch, what is skipped or made anew, kills, and export_onnx.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

import deploy.export as export_module
import deploy.onnx_files as onnx_files
import export_onnx
from cldm.checkpoint import load_model
from cldm.config import ModelConfig
from cldm.files import locked
from cldm.weights import Weights, find_weights
from deploy.export import ExportError, export_all
from deploy.graphs import build_graph
from deploy.manifest import check_artefact, identity, manifest_path, read_manifest
from deploy.spec import Build, GraphSpec, graph_specs
from deploy.tracing import fast_half_convolution
from tests.micro_model import SIZE, shared_build, shared_config

ROOT = Path(__file__).resolve().parent.parent
# Bytes from which the tests put a tensor into a file of its own; the exporter does from 1024. Shapes stay inside.
EXTERNAL = 300
# Operators that the graphs may hold: all of them are in the table of supported operators of the ONNX parser of
# TensorRT 8.6 GA (docs/operators.md of onnx-tensorrt), for FP32 and FP16. Anything that computes with shapes at run
# time (Shape, Mod, Trilu, ConstantOfShape, Range, Where, ...) should have been folded, and is not here.
ALLOWED = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Cos", "Div", "Erf", "Expand", "Flatten", "Floor", "Gather", "Gemm"),
    *("InstanceNormalization", "LayerNormalization", "MatMul", "Mul", "Reshape", "Resize", "Sigmoid", "Sin", "Slice"),
    *("Softmax", "Split", "Sub", "Tile", "Transpose", "Unsqueeze"),
}
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
builds = pytest.mark.parametrize(
    "precision, samples", [("fp32", 1), ("fp32", 2), ("fp16", 1), ("fp16", 2)], ids=lambda value: str(value)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def config(base: Path) -> ModelConfig:
    return shared_config(base)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Any:
    return load_model(config, find_weights(config))


def file_of(base: Path, build: Build, spec: GraphSpec) -> Path:
    return base / "micro-build" / build.folder_name / spec.file


def graphs_of(base: Path, precision: str, samples: int) -> Iterator[Tuple[GraphSpec, Path, onnx.ModelProto]]:
    build = shared_build(base, precision, samples)
    for spec in graph_specs(build).values():
        yield spec, file_of(base, build, spec), onnx.load(str(file_of(base, build, spec)))


def inferred_types(proto: onnx.ModelProto) -> Dict[str, int]:
    """Element types of all tensors of a graph."""
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.input, *inferred.output, *inferred.value_info]}
    return {**types, **{tensor.name: tensor.data_type for tensor in inferred.initializer}}


# -- form ------------------------------------------------------------------------------------------------------------


@builds
def test_form(precision: str, samples: int, base: Path) -> None:
    for spec, file, proto in graphs_of(base, precision, samples):
        onnx.checker.check_model(str(file), full_check=True)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)], spec.name
        assert not proto.functions and {node.domain for node in proto.graph.node} == {""}
        assert [value.name for value in proto.graph.input] == list(spec.inputs)
        assert [value.name for value in proto.graph.output] == list(spec.outputs)
        for value in [*proto.graph.input, *proto.graph.output]:
            tensor = spec.tensors[value.name]
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert dims == list(tensor.shape), value.name
            assert onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) == np.dtype(tensor.dtype)


@builds
def test_operators_are_those_that_tensorrt_parses(precision: str, samples: int, base: Path) -> None:
    for spec, _, proto in graphs_of(base, precision, samples):
        assert {node.op_type for node in proto.graph.node} <= ALLOWED, spec.name
        constants = {tensor.name for tensor in proto.graph.initializer}
        types = inferred_types(proto)
        for node in proto.graph.node:
            if node.op_type in ("Unsqueeze", "Slice", "Reshape", "Expand", "Tile", "Split", "Clip", "Resize"):
                assert all(name in constants for name in node.input[1:] if name), (spec.name, node.name)
            # No arithmetic on shapes is left: that is INT64.
            assert {types[name] for name in node.output} <= {FLOAT, HALF, TensorProto.UINT8, TensorProto.INT32}
            # TensorRT takes bytes at the ends of a graph, and there only to convert them.
            touched = {types[name] for name in [*node.input, *node.output] if name}
            assert TensorProto.UINT8 not in touched or node.op_type == "Cast", (spec.name, node.name)


@builds
def test_all_shapes_inside_are_fixed(precision: str, samples: int, base: Path) -> None:
    for spec, _, proto in graphs_of(base, precision, samples):
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        for value in inferred.graph.value_info:
            dims = value.type.tensor_type.shape.dim
            fixed = [dim.dim_value > 0 for dim in dims]
            assert all(fixed) or (spec.name == "time" and all(fixed[1:])), (spec.name, value.name, dims)


@pytest.mark.parametrize("samples", [1, 2])
def test_half_precision_types(samples: int, base: Path) -> None:
    """Matrix work in FP16, norm statistics in FP32; the time embedding in FP32 altogether."""
    for spec, _, proto in graphs_of(base, "fp16", samples):
        types = inferred_types(proto)
        seen: Set[str] = set()
        for node in proto.graph.node:
            used = {types[name] for name in node.input if name}
            if node.op_type in ("Conv", "MatMul", "Gemm"):
                assert used == {FLOAT if spec.name == "time" else HALF}, (spec.name, node.name)
            elif node.op_type in ("InstanceNormalization", "LayerNormalization", "Sin", "Cos"):
                assert used == {FLOAT}, (spec.name, node.name)
            seen.add(node.op_type)
        stored = {
            tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) > 1 and max(tensor.dims) > 1
        }
        assert HALF in stored or spec.name == "time", spec.name
        assert seen & {"Conv", "MatMul", "Gemm"}


def test_half_precision_files_are_smaller(base: Path) -> None:
    sizes = {}
    for precision in ("fp32", "fp16"):
        sizes[precision] = {
            spec.name: len(proto.SerializeToString()) for spec, _, proto in graphs_of(base, precision, 1)
        }
    for name in ("text", "step"):
        assert sizes["fp16"][name] < 0.75 * sizes["fp32"][name], name


# -- numbers ---------------------------------------------------------------------------------------------------------


def fresh_inputs(spec: GraphSpec, config: ModelConfig) -> Dict[str, np.ndarray]:
    """Inputs of this test's own; 7 timesteps where the trace had 20."""
    rng = np.random.default_rng(2024)
    shapes = {name: tuple(7 if isinstance(dim, str) else dim for dim in t.shape) for name, t in spec.inputs.items()}
    values = {name: rng.normal(0.0, 0.8, shape) for name, shape in shapes.items()}
    makers: Dict[str, Callable[[Tuple[int, ...]], np.ndarray]] = {
        "token_ids": lambda shape: rng.integers(0, config.text.vocab_size, shape),
        "timesteps": lambda shape: np.array([999, 801, 602, 403, 204, 5, 0]),
        "canny": lambda shape: np.kron(rng.integers(0, 2, (shape[0] // 8, shape[1] // 8)), np.ones((8, 8))) * 255,
        "control_scales": lambda shape: rng.uniform(0.0, 2.0, shape),
        "guidance_scale": lambda shape: np.array([7.5]),
        "coefficients": lambda shape: np.array([[0.9, -0.3, 0.2]]),
    }
    values.update({name: make(shapes[name]) for name, make in makers.items() if name in shapes})
    return {name: np.ascontiguousarray(values[name], dtype=t.dtype) for name, t in spec.inputs.items()}


def run_ort(file: Path, spec: GraphSpec, inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(list(spec.outputs), inputs)


def check_close(found: np.ndarray, wanted: np.ndarray, bound: float) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if found.dtype == np.uint8:
        apart = np.abs(found.astype(int) - wanted.astype(int))
        # A level apart where rounding crosses a step between two levels: seldom in FP32, and never two.
        assert apart.max() <= (1 if bound < 1e-3 else 4) and (apart > 0).mean() < (0.01 if bound < 1e-3 else 0.5)
        assert found.std() > 40, "a flat picture would agree with anything"
    else:
        found, wanted = found.astype(np.float64), wanted.astype(np.float64)
        assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)


@pytest.mark.parametrize("samples", [1, 2])
@torch.no_grad()
def test_onnx_runtime_computes_what_torch_does(samples: int, base: Path, model: Any) -> None:
    for spec, file, _ in graphs_of(base, "fp32", samples):
        inputs = fresh_inputs(spec, model.config)
        module = build_graph(spec.name, model, "fp32", samples)
        wanted = module(*(torch.from_numpy(value) for value in inputs.values()))
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for found, tensor in zip(run_ort(file, spec, inputs), wanted):
            check_close(found, tensor.numpy(), 1e-4)


@pytest.mark.parametrize("samples", [1, 2])
def test_half_precision_is_close_to_full(samples: int, base: Path, model: Any) -> None:
    full = {spec.name: (spec, file) for spec, file, _ in graphs_of(base, "fp32", samples)}
    for spec, file, _ in graphs_of(base, "fp16", samples):
        full_spec, full_file = full[spec.name]
        inputs = fresh_inputs(full_spec, model.config)
        half_inputs = {name: inputs[name].astype(tensor.dtype) for name, tensor in spec.inputs.items()}
        for found, wanted in zip(run_ort(file, spec, half_inputs), run_ort(full_file, full_spec, inputs)):
            check_close(found.astype(wanted.dtype), wanted, 2e-2)


def test_manifest_tells_how_it_was_made(base: Path) -> None:
    for precision, bound in (("fp32", 1e-4), ("fp16", 2e-2)):
        for spec, file, proto in graphs_of(base, precision, 1):
            value = read_manifest(file)
            assert value["nodes"] == len(proto.graph.node)
            assert 0 <= value["error"] < (1 / 32 if spec.name == "decode" else bound)
            assert value["made_with"] == {"torch": torch.__version__, "onnx": onnx.__version__, "opset": 17}
            assert value["weights_source"] == "random weights, seed 7"


def test_replaced_convolution_is_put_back() -> None:
    x, weight = torch.randn(1, 4, 6, 6).half(), torch.randn(4, 4, 3, 3).half()
    before = torch.nn.functional.conv2d(x, weight)
    with fast_half_convolution():
        inside = torch.nn.functional.conv2d(x, weight)
    assert torch.equal(torch.nn.functional.conv2d(x, weight), before)
    assert inside.dtype == torch.float16 and torch.allclose(inside.float(), before.float(), rtol=2e-3, atol=2e-2)


# -- weights beside the graph ----------------------------------------------------------------------------------------


@pytest.fixture
def scattered(base: Path, tmp_path: Path) -> Tuple[GraphSpec, Path, Path]:
    """The hint graph as the exporter writes one beyond 2 GB: a file a tensor; and the same graph in one piece."""
    spec, file, proto = next(item for item in graphs_of(base, "fp32", 1) if item[0].name == "hint")
    folder = tmp_path / "traced"
    folder.mkdir()
    onnx.save_model(
        proto,
        str(folder / "hint.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=EXTERNAL,
        convert_attribute=False,
    )
    assert len(list(folder.iterdir())) >= 8
    return spec, folder, file


def test_weights_are_gathered_into_one_file(scattered: Tuple[GraphSpec, Path, Path], config: ModelConfig) -> None:
    spec, folder, whole = scattered
    target = folder.parent / "moved"
    target.mkdir()
    proto = onnx_files.simplify(onnx.load(str(folder / "hint.onnx"), load_external_data=False))
    assert onnx_files.has_external(proto)
    onnx_files.check_tensors(proto, spec)
    written = onnx_files.gather_external(proto, folder, target / "hint.onnx.data")
    onnx.save(proto, str(target / "hint.onnx"))
    shutil.rmtree(folder)
    assert sorted(path.name for path in target.iterdir()) == ["hint.onnx", "hint.onnx.data"]
    assert (target / "hint.onnx.data").stat().st_size == written
    for tensor in proto.graph.initializer:
        if onnx_files.is_external(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "hint.onnx.data" and int(entries["offset"]) % onnx_files.ALIGNMENT == 0
    onnx.checker.check_model(str(target / "hint.onnx"))
    inputs = fresh_inputs(spec, config)
    for found, wanted in zip(run_ort(target / "hint.onnx", spec, inputs), run_ort(whole, spec, inputs)):
        assert np.array_equal(found, wanted)


def test_tensors_at_an_offset_of_one_file_are_gathered(base: Path, config: ModelConfig, tmp_path: Path) -> None:
    spec, whole, proto = next(item for item in graphs_of(base, "fp32", 1) if item[0].name == "hint")
    (tmp_path / "traced").mkdir()
    onnx.save_model(proto, str(tmp_path / "traced" / "a.onnx"), save_as_external_data=True, size_threshold=EXTERNAL)
    proto = onnx.load(str(tmp_path / "traced" / "a.onnx"), load_external_data=False)
    onnx_files.gather_external(proto, tmp_path / "traced", tmp_path / "hint.onnx.data")
    onnx.save(proto, str(tmp_path / "hint.onnx"))
    shutil.rmtree(tmp_path / "traced")
    inputs = fresh_inputs(spec, config)
    assert np.array_equal(run_ort(tmp_path / "hint.onnx", spec, inputs)[0], run_ort(whole, spec, inputs)[0])


def test_weights_that_end_early_are_told(scattered: Tuple[GraphSpec, Path, Path]) -> None:
    _, folder, _ = scattered
    proto = onnx.load(str(folder / "hint.onnx"), load_external_data=False)
    largest = max((p for p in folder.iterdir() if p.name != "hint.onnx"), key=lambda p: p.stat().st_size)
    for tensor in filter(onnx_files.is_external, proto.graph.initializer):
        location = next(entry.value for entry in tensor.external_data if entry.key == "location")
        if not any(entry.key == "length" for entry in tensor.external_data):  # the format leaves it open
            entry = tensor.external_data.add()
            entry.key, entry.value = "length", str((folder / location).stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(100)
    with pytest.raises(OSError, match="ended .* bytes early"):
        onnx_files.gather_external(proto, folder, folder.parent / "hint.onnx.data")


def test_graph_with_other_tensors_is_refused(base: Path) -> None:
    spec, _, proto = next(item for item in graphs_of(base, "fp32", 1) if item[0].name == "hint")
    onnx_files.check_tensors(proto, spec)
    half = graph_specs(dataclasses.replace(shared_build(base, "fp32", 1), precision="fp16"))["hint"]
    with pytest.raises(ValueError, match="the exported graph hint has tensors"):
        onnx_files.check_tensors(proto, half)


# -- what is made, and when ------------------------------------------------------------------------------------------


def make(build: Build, weights: Weights, folder: Path, loads: List[str], **options: Any) -> List[Any]:
    """`export_all` of the two smallest graphs; each call of `load` is written down."""

    def load() -> Any:
        loads.append(weights.digest)
        return load_model(build.config, weights)

    options = {"names": ["hint", "time"], "report": lambda line: None, **options}
    return export_all(build, weights, load, folder, **options)


def stamps(folder: Path) -> Dict[str, Tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.onnx*")}


def test_skipped_forced_and_remade(config: ModelConfig, tmp_path: Path) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    target = tmp_path / build.folder_name
    first = make(build, weights, tmp_path, loads)
    assert [row.graph for row in first] == ["hint", "time"] and not any(row.skipped for row in first)
    assert loads == [weights.digest]
    before = stamps(target)
    assert set(before) == {"hint.onnx", "hint.onnx.json", "time.onnx", "time.onnx.json"}
    again = make(build, weights, tmp_path, loads)
    assert all(row.skipped for row in again) and len(loads) == 1 and stamps(target) == before
    for one, two in zip(first, again):
        assert (one.num_bytes, one.nodes, one.error, one.file) == (two.num_bytes, two.nodes, two.error, two.file)
        assert one.num_bytes == one.file.stat().st_size
    forced = make(build, weights, tmp_path, loads, force=True)
    assert not any(row.skipped for row in forced) and len(loads) == 2
    assert all(stamps(target)[name] != before[name] for name in before)
    other = find_weights(config, random_seed=8)
    lines: List[str] = []
    remade = make(build, other, tmp_path, loads, report=lines.append)
    assert not any(row.skipped for row in remade) and loads[2:] == [other.digest]
    assert any(f"weights is {weights.digest}, wanted {other.digest}" in line for line in lines)
    for row in remade:
        check_artefact(row.file, identity(build, graph_specs(build)[row.graph], other))


def test_only_the_damaged_graph_is_remade(config: ModelConfig, tmp_path: Path) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    target = tmp_path / build.folder_name
    make(build, weights, tmp_path, loads)
    good = (target / "hint.onnx").read_bytes()
    for damage in (b"", good[: len(good) // 2], good[:-1] + bytes([good[-1] ^ 1]), None):
        (target / "hint.onnx").unlink()
        if damage is not None:
            (target / "hint.onnx").write_bytes(damage)
        lines: List[str] = []
        hint, time = make(build, weights, tmp_path, loads, report=lines.append)
        assert not hint.skipped and time.skipped and any("hint.onnx" in line for line in lines)
        onnx.checker.check_model(str(target / "hint.onnx"))
    manifest_path(target / "time.onnx").write_text('{"format": 1')
    hint, time = make(build, weights, tmp_path, loads)
    assert hint.skipped and not time.skipped


def test_manifest_without_the_table_s_numbers_is_enough(config: ModelConfig, tmp_path: Path) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    make(build, weights, tmp_path, loads)
    path = manifest_path(tmp_path / build.folder_name / "hint.onnx")
    value = json.loads(path.read_text())
    del value["nodes"], value["error"]
    path.write_text(json.dumps(value))
    assert all(row.skipped for row in make(build, weights, tmp_path, loads))


def test_leftovers_of_a_killed_run_go(config: ModelConfig, tmp_path: Path) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    target = tmp_path / build.folder_name
    rubbish = target / ".export-abc" / "traced"
    rubbish.mkdir(parents=True)
    (rubbish / "hint.onnx").write_bytes(b"half")
    (target / "time.onnx").write_bytes(b"whole for all one knows, but without a manifest")
    make(build, weights, tmp_path, loads)
    assert sorted(p.name for p in target.iterdir() if p.name != ".lock") == sorted(stamps(target))
    onnx.checker.check_model(str(target / "time.onnx"))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import deploy.export
import export_onnx

def stop(*args, **options):
    print("ready", flush=True)
    sys.stdin.read()

setattr(deploy.export, sys.argv[2], stop)
sys.exit(export_onnx.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("point", ["compare", "write_manifest"])
def test_killed_export(point: str, config: ModelConfig, tmp_path: Path) -> None:
    """Before the file is in place, and between that and its manifest; with an older whole file there, and without."""
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    target = tmp_path / build.folder_name
    make(build, find_weights(config, random_seed=8), tmp_path, loads, names=["hint"])
    arguments = ["--model", str(Path(config.folder) / "micro.yaml"), "--output", str(tmp_path), "--graphs", "hint"]
    arguments += ["--height", str(SIZE), "--width", str(SIZE), "--precision", "fp32"]
    command = [sys.executable, "-c", KILLED, str(ROOT), point, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert any(line == b"ready\n" for line in process.stdout)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    spec = graph_specs(build)["hint"]
    with pytest.raises(Exception, match="not made|made for something else"):
        check_artefact(target / "hint.onnx", identity(build, spec, weights))
    if point == "compare":
        assert list(target.glob(".export-*")), "the kill came too late to test anything"
    else:
        assert (target / "hint.onnx").exists() and not manifest_path(target / "hint.onnx").exists()
    assert export_onnx.main(arguments) == 0
    check_artefact(target / "hint.onnx", identity(build, spec, weights))
    onnx.checker.check_model(str(target / "hint.onnx"))
    assert not list(target.glob(".export-*")) and not list(target.glob(".*.tmp"))


def test_a_second_run_waits_and_finds_the_work_done(base: Path, config: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    build, weights = shared_build(base, "fp32", 1), find_weights(config)
    target = tmp_path / build.folder_name
    lines, results, waiting = [], [], threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        waiting.set()

    def second() -> None:
        results.extend(make(build, weights, tmp_path, lines, report=report))

    thread = threading.Thread(target=second)
    with locked(target, lambda: None):
        thread.start()
        assert waiting.wait(30)
        for name in ("hint.onnx", "time.onnx"):
            for file in (name, name + ".json"):
                shutil.copy(file_of(base, build, graph_specs(build)["hint"]).with_name(file), target / file)
    thread.join(30)
    assert [row.skipped for row in results] == [True, True]
    assert len(lines) == 1 and "another process is exporting" in lines[0]


def test_graph_that_computes_something_else_is_refused(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    target = tmp_path / build.folder_name
    make(build, weights, tmp_path, loads)
    before = stamps(target)
    honest = onnx_files.simplify

    def spoil(proto: onnx.ModelProto) -> onnx.ModelProto:
        proto = honest(proto)
        weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.CopyFrom(numpy_helper.from_array(1.02 * numpy_helper.to_array(weight).astype(np.float32), weight.name))
        return proto

    monkeypatch.setattr(onnx_files, "simplify", spoil)
    with pytest.raises(ExportError, match="hint: ONNX Runtime differs from PyTorch by .*; not installed"):
        make(build, weights, tmp_path, loads, force=True)
    assert stamps(target) == before and not list(target.glob(".export-*"))
    assert all(row.skipped for row in make(build, weights, tmp_path, loads)), "the older, right ones are still whole"
    fresh = tmp_path / "fresh"
    with pytest.raises(ExportError):
        make(build, weights, fresh, loads)
    assert stamps(fresh / build.folder_name) == {}
    assert not make(build, weights, fresh, loads, check=False)[0].skipped, "unchecked on request"


def test_weights_that_hold_nan_are_not_exported(config: ModelConfig, tmp_path: Path) -> None:
    build, weights = Build(config, SIZE, SIZE), find_weights(config)

    def load() -> Any:
        model = load_model(config, weights)
        model.control_model.input_hint_block[0].weight[0, 0, 0, 0] = float("nan")
        return model

    with pytest.raises(ExportError, match="hint: PyTorch's own output holds NaN or infinity; the weights are broken"):
        export_all(build, weights, load, tmp_path, names=["hint"], report=lambda line: None)
    assert stamps(tmp_path / build.folder_name) == {}


def test_output_of_zeros_is_exported(config: ModelConfig, tmp_path: Path) -> None:
    """The last convolution of the hint encoder starts at zero: a ControlNet before its training."""
    build, weights = Build(config, SIZE, SIZE), find_weights(config)

    def load() -> Any:
        model = load_model(config, weights)
        for parameter in model.control_model.input_hint_block[-1].parameters():
            parameter.zero_()
        return model

    (row,) = export_all(build, weights, load, tmp_path, names=["hint"], report=lambda line: None)
    assert row.error == 0


def test_disk_that_fills_up(config: ModelConfig, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(OSError, match="cannot write .*hint.onnx: .*; choose another folder or free it"):
            make(build, weights, tmp_path, loads)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    target = tmp_path / build.folder_name
    assert stamps(target) == {} and not list(target.glob(".export-*"))
    assert not any(row.skipped for row in make(build, weights, tmp_path, loads))


def test_room_is_asked_for_first(config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, weights, loads = Build(config, SIZE, SIZE), find_weights(config), []
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match=r"0 MB free, .* MB are needed"):
        make(build, weights, tmp_path, loads)
    assert loads == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_room_is_asked_for_the_missing_graphs_only(
    precision: str, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough for the files and for the exporter's own copy of the largest, not much more."""
    build, weights = Build(config, SIZE, SIZE, 1, precision), find_weights(config)
    asked: List[int] = []
    monkeypatch.setattr(export_module, "require_room", lambda folder, num_bytes: asked.append(num_bytes))
    rows = make(build, weights, tmp_path, [])
    hint, time = (sum(len(t.raw_data) for t in onnx.load(str(row.file)).graph.initializer) for row in rows)
    assert asked == [pytest.approx(1.1 * (hint + time + max(hint, time)), rel=0.02)]
    (tmp_path / build.folder_name / "time.onnx").unlink()
    make(build, weights, tmp_path, [])
    assert asked[1:] == [pytest.approx(2.2 * time, rel=0.02)]


# -- export_onnx.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(config: ModelConfig, tmp_path: Path) -> List[str]:
    words = ["--model", str(Path(config.folder) / "micro.yaml"), "--output", str(tmp_path / "my build")]
    return [*words, "--height", str(SIZE), "--width", str(SIZE), "--precision", "fp32", "--graphs", "hint", "time"]


def test_command_prints_progress_and_a_table(
    arguments: List[str], config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert export_onnx.main(arguments) == 0
    out = capsys.readouterr().out
    target = tmp_path / "my build" / f"micro-{SIZE}x{SIZE}-n1-fp32"
    assert "loading micro: random weights, seed 7" in out and f"[2/2] time: exporting {target}" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("graph", "hint ", "time "))}
    assert rows["graph"].split() == ["graph", "MB", "nodes", "seconds", "error", "file"]
    for name in ("hint", "time"):
        words = rows[name].split(maxsplit=5)
        nodes = len(onnx.load(str(target / f"{name}.onnx")).graph.node)
        assert int(words[2]) == nodes and float(words[4]) < 1e-4 and words[5] == str(target / f"{name}.onnx")
    assert "peak memory" in out
    assert export_onnx.main(arguments) == 0
    out = capsys.readouterr().out
    assert "loading" not in out and out.count(" there ") == 2
    assert export_onnx.main([*arguments, "--force", "--no-check"]) == 0
    out = capsys.readouterr().out
    assert "loading" in out and " - " in out
    assert export_onnx.main([*arguments, "--random-weights", "3"]) == 0
    assert "random weights, seed 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, said",
    [
        (["--height", "100"], "height must be a positive multiple of 16, got 100"),
        (["--width", "0"], "width must be a positive multiple of 16, got 0"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--model", "nope"], "no model config"),
        (["--model", "nope.yaml"], "no model config nope.yaml"),
        (["--checkpoint", "/absent.pth"], "no checkpoint at /absent.pth"),
        (["--checkpoint", __file__], "unknown kind of checkpoint"),
        (["--random-weights", "-5"], "seed of random weights"),
        (["--output", __file__], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_with_bad_arguments(
    change: List[str], said: str, arguments: List[str], capsys: pytest.CaptureFixture
) -> None:
    assert export_onnx.main([*arguments, *change]) == 1
    err = capsys.readouterr().err
    assert err.startswith("export_onnx.py: ") and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("change", [["--precision", "bf16"], ["--height", "tall"], ["--graphs", "unet"]])
def test_command_with_unknown_choices(change: List[str], arguments: List[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        export_onnx.main([*arguments, *change])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert change[0] in last and change[1] in last and "invalid" in last


def test_interrupted_command_says_so_in_one_line(
    arguments: List[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export_module._put_in_place

    def interrupted(file: Path, members: List[Path]) -> List[Path]:
        if file.name == "time.onnx":
            raise KeyboardInterrupt
        return original(file, members)

    monkeypatch.setattr(export_module, "_put_in_place", interrupted)
    assert export_onnx.main(arguments) == 130
    err = capsys.readouterr().err
    assert err == "export_onnx.py: interrupted; files that were finished are kept\n"
    target = tmp_path / "my build" / f"micro-{SIZE}x{SIZE}-n1-fp32"
    assert sorted(path.name for path in target.glob("[!.]*")) == ["hint.onnx", "hint.onnx.json"]
    assert not list(target.glob(".export-*"))


def test_command_with_a_truncated_checkpoint(
    arguments: List[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert export_onnx.main([*arguments, "--checkpoint", str(tmp_path / "a.safetensors")]) == 1
    err = capsys.readouterr().err
    assert "truncated" in err and len(err.splitlines()) == 1


def test_bound_is_the_promised_one() -> None:
    assert export_module.TOLERANCE["fp32"] <= 1e-4 and export_module.OPSET == 17
