"""The check of an engine against a recorded FP32 run, and the search for its first wrong layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import onnxruntime
import pytest

from cldm.weights import find_weights
from deploy import bisect, engine_build, gate
from deploy.engine_build import PlanJob
from deploy.engine_options import EngineOptions
from deploy.gate import TOLERANCES, GateError, Recorded, check_engine, check_output, errors_of
from deploy.manifest import ArtefactError
from deploy.plugin_library import find_plugin
from deploy.spec import graph_specs
from deploy.tensorrt_versions import find_version
from runtime import engine_check
from runtime.engine_check import EngineRun, Reference, check_plan_runs
from tests import micro_model, tensorrt_bindings
from tests.builder_double import FREE_BYTES, GPU, BuilderDouble, make_library

pytestmark = pytest.mark.usefixtures("one_thread")

FP16 = TOLERANCES["fp16"]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- Comparing


def test_errors_are_those_of_the_definition():
    reference = np.array([3.0, -4.0, 0.0, 0.0], np.float32)  # root mean square 2.5
    found = reference + np.array([0.3, 0.0, 0.05, -0.1], np.float32)
    errors = errors_of(found, reference)
    assert errors.absolute == pytest.approx((0.3, 0.1125, 0.075), rel=1e-5)
    # Near zero the magnitude is a tenth of 2.5.
    assert errors.relative == pytest.approx((0.4, (0.1 + 0.0 + 0.2 + 0.4) / 4, 0.15), rel=1e-5)
    assert errors.norm == pytest.approx(np.sqrt(0.09 + 0.0025 + 0.01) / 5, rel=1e-5)
    assert errors.peak == pytest.approx(0.3 / 2.5, rel=1e-5)


def test_a_reference_of_zeros_has_no_scale():
    errors = errors_of(np.full((3,), 1e-4), np.zeros(3))
    assert errors.norm == errors.peak == pytest.approx(1e-4)
    assert check_output("x", np.zeros(3, np.float32), np.zeros(3, np.float32), FP16).norm == 0


def test_what_is_wrong_is_named():
    reference = _normal(2, 4, 8, 8)
    bad = reference.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(GateError, match="x holds NaN: 1 of 512"):
        check_output("x", bad, reference, FP16)
    bad[0, 0, 0, 0] = np.inf
    with pytest.raises(GateError, match="x holds infinity: 1 of 512"):
        check_output("x", bad, reference, FP16)
    with pytest.raises(GateError, match="x is flat"):
        check_output("x", np.full_like(reference, 0.5), reference, FP16)
    with pytest.raises(GateError, match=r"x has the shape \(2, 4\)"):
        check_output("x", reference[:, :, 0, 0], reference, FP16)
    with pytest.raises(GateError, match="of its norm"):
        check_output("x", reference * 1.05, reference, FP16)
    wrong = reference.copy()
    wrong[0, 0, 0, 0] += 0.5  # 2 % of the norm, and half the root mean square
    with pytest.raises(GateError, match="at its worst element"):
        check_output("x", wrong, reference, FP16)
    assert check_output("x", reference * 1.01, reference, FP16).norm == pytest.approx(0.01, rel=1e-3)


def test_images_are_compared_in_levels():
    image = np.random.default_rng(0).integers(0, 246, (1, 8, 8, 3)).astype(np.uint8)
    assert check_output("image", image + 8, image, FP16).absolute[0] == 8
    with pytest.raises(GateError, match="off by 9 of 255"):
        check_output("image", image + np.uint8(9), image, FP16)


# ---- An engine


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The recorded run of the micro model, in the folder that the tests share."""
    base = tmp_path_factory.getbasetemp()
    for precision in ("fp16", "fp32"):
        build = micro_model.shared_build(base, precision, 1)
    lines: List[str] = []
    made = Reference(
        dataclasses.replace(build, precision="fp16"), find_weights(build.config), base / "micro-build", lines.append
    )
    made.make()
    return made


def _onnx_run(reference: Reference, graph: str, precision: str) -> Any:
    build = dataclasses.replace(reference.build, precision=precision)
    spec = graph_specs(build)[graph]
    file = reference.folder / build.folder_name / spec.file
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        return dict(zip(spec.outputs, session.run(list(spec.outputs), inputs)))

    return spec, run


def test_the_recorded_run_is_a_real_one(reference):
    steps = reference.load("step")
    assert len(steps) == len(engine_check.KEPT_STEPS) == 3
    assert all(len(reference.load(graph)) == 1 for graph in ("text", "hint", "time", "decode"))
    # Each step starts from what another one made, at another time; the last hands on to the decoder.
    assert not np.array_equal(steps[0].inputs["latent"], steps[1].inputs["latent"])
    assert not np.array_equal(steps[0].inputs["time_bias"], steps[1].inputs["time_bias"])
    np.testing.assert_array_equal(steps[2].outputs["latent_next"], reference.load("decode")[0].inputs["latent"])
    np.testing.assert_array_equal(steps[0].inputs["keys_values"], reference.load("text")[0].outputs["keys_values"])
    biases = reference.load("time")[0].outputs["time_biases"]
    np.testing.assert_array_equal(steps[1].inputs["time_bias"], biases[10:11])
    assert np.count_nonzero(reference.load("hint")[0].inputs["canny"]) > 0


@pytest.mark.parametrize("graph", ["text", "hint", "time", "step", "decode"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtime_itself_passes(reference, graph, precision):
    """In FP32 it gives what was recorded, and in FP16, which stands for an engine, something near it."""
    spec, run = _onnx_run(reference, graph, precision)
    report = check_engine(spec, run, reference.load(graph), precision)
    assert report.calls == (3 if graph == "step" else 1) and set(report.outputs) == set(spec.outputs)
    assert report.worst < (1e-6 if precision == "fp32" else 1e-2)
    if precision == "fp16" and graph in ("text", "step"):
        assert report.worst > 1e-5
    values = report.to_json()["outputs"][next(iter(spec.outputs))]
    assert values["absolute_max"] >= values["absolute_mean"] and len(report.lines()) == len(spec.outputs)


@pytest.mark.parametrize("graph", ["text", "hint", "step", "decode"])
def test_a_broken_engine_does_not_pass(reference, graph):
    """Of the last recorded call too, and of any output."""
    spec, run = _onnx_run(reference, graph, "fp16")
    recorded = reference.load(graph)
    calls: List[int] = []

    def broken(inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        outputs = run(inputs)
        calls.append(1)
        if len(calls) == len(recorded):
            last = list(spec.outputs)[-1]
            outputs[last] = np.roll(outputs[last], 1, axis=-1)
        return outputs

    with pytest.raises(GateError, match=f"{graph}, recorded call {len(recorded)} of {len(recorded)}: "):
        check_engine(spec, broken, recorded, "fp16")


def test_the_report_has_the_worst_of_all_calls(reference):
    spec, _ = _onnx_run(reference, "step", "fp16")
    recorded = reference.load("step")
    factors = iter((1.001, 1.01, 1.0))
    calls = iter(recorded)

    def run(inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        factor = next(factors)
        return {name: value * np.float32(factor) for name, value in next(calls).outputs.items()}

    report = check_engine(spec, run, recorded, "fp16")
    assert report.worst == pytest.approx(0.01, rel=1e-3)
    assert report.outputs["noise"].absolute[0] == pytest.approx(
        0.01 * np.abs(recorded[1].outputs["noise"]).max(), rel=1e-3
    )


def test_inputs_come_in_the_engine_s_types(reference):
    spec, _ = _onnx_run(reference, "step", "fp16")
    recorded = reference.load("step")
    seen: Dict[str, np.ndarray] = {}

    def run(inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        seen.update(inputs)
        return recorded[0].outputs

    check_engine(spec, run, recorded[:1], "fp16")
    assert {name: str(value.dtype) for name, value in seen.items()} == {n: t.dtype for n, t in spec.inputs.items()}


# ---- Recordings


def test_a_recording_is_made_once(reference, monkeypatch):
    monkeypatch.setattr(Reference, "_run", lambda self: pytest.fail("it is there already"))
    reference.make()


def test_a_recording_of_something_else_is_refused(reference, tmp_path):
    spec = reference.spec("hint")
    other = find_weights(reference.build.config, random_seed=99)
    with pytest.raises(ArtefactError, match="weights is"):
        dataclasses.replace(reference, weights=other).load("hint")
    file = tmp_path / "hint.recorded.npz"
    with pytest.raises(ArtefactError, match="not made"):
        gate.load_recording(file, reference.fp32, spec, reference.weights)
    recorded = reference.load("hint")
    gate.save_recording(file, reference.fp32, spec, reference.weights, recorded, None)
    (again,) = gate.load_recording(file, reference.fp32, spec, reference.weights)
    np.testing.assert_array_equal(again.outputs["hint_features"], recorded[0].outputs["hint_features"])
    gate.save_recording(file, reference.fp32, spec, reference.weights, [], None)
    with pytest.raises(ArtefactError, match="does not hold"):
        gate.load_recording(file, reference.fp32, spec, reference.weights)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="truncated"):
        gate.load_recording(file, reference.fp32, spec, reference.weights)


def test_a_missing_picture_is_told(reference, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_check, "PICTURE", tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="git checkout"):
        reference._run()


# ---- An engine on the double


@pytest.fixture(params=tensorrt_bindings.MAJORS, ids=lambda major: f"tensorrt{major}")
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    reason = tensorrt_bindings.missing_reason(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(engine_build, "free_memory", lambda: FREE_BYTES)
    made = BuilderDouble(request.param)
    with made.double.installed():
        yield made
    assert not made.double.refused


class EngineDouble:
    """An engine of the double that computes with ONNX Runtime what lies at the addresses that it was given."""

    def __init__(self, builder: BuilderDouble, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.memory: Dict[int, Any] = {}
        self.addresses: Dict[str, int] = {}
        self.spec: Any = None
        self.run: Any = None
        double, trt = builder.double, builder.double.module
        monkeypatch.setattr("runtime.tensorrt_session.TensorRTRuntime.stream", lambda self: 7)
        from_numpy, full = torch.from_numpy, torch.full
        monkeypatch.setattr(torch, "from_numpy", lambda value: self._keep(from_numpy(value)))
        monkeypatch.setattr(torch, "full", lambda *args, **kwargs: self._keep(full(*args, **kwargs)))
        tensors = lambda: list(self.spec.tensors.items())  # noqa: E731
        types = {"float32": trt.float32, "float16": trt.float16, "int32": trt.int32, "uint8": trt.uint8}
        modes = {True: trt.TensorIOMode.INPUT, False: trt.TensorIOMode.OUTPUT}
        double.returns("ICudaEngine.num_io_tensors", lambda call: len(tensors()))
        double.returns("ICudaEngine.get_tensor_name", lambda call: tensors()[call["index"]][0])
        double.returns("ICudaEngine.get_tensor_mode", lambda call: modes[call["name"] in self.spec.inputs])
        double.returns("ICudaEngine.get_tensor_dtype", lambda call: types[self.spec.tensors[call["name"]].dtype])
        double.returns(
            "ICudaEngine.get_tensor_shape",
            lambda call: tuple(-1 if dim == "S" else dim for dim in self.spec.tensors[call["name"]].shape),
        )
        double.returns("ICudaEngine.device_memory_size" + ("" if builder.major == 8 else "_v2"), 1024)
        double.returns("IExecutionContext.set_tensor_address", self._address)
        double.returns("IExecutionContext.execute_async_v3", self._execute)

    def _keep(self, tensor: Any) -> Any:
        self.memory[tensor.data_ptr()] = tensor
        return tensor

    def _address(self, call: Any) -> bool:
        self.addresses[call["name"]] = call["memory"]
        return True

    def _execute(self, call: Any) -> bool:
        outputs = self.run({name: self.memory[self.addresses[name]].numpy() for name in self.spec.inputs})
        for name, value in outputs.items():
            self.memory[self.addresses[name]].numpy()[...] = value
        return True


@pytest.fixture
def engine(builder: BuilderDouble, monkeypatch: pytest.MonkeyPatch) -> EngineDouble:
    return EngineDouble(builder, monkeypatch)


def _job(reference: Reference, builder: BuilderDouble, graph: str, tmp_path: Path) -> Any:
    make_library(tmp_path, builder.major)
    tools = builder.toolchain(find_plugin(tmp_path, builder.major, GPU.compute_capability))
    spec = graph_specs(reference.build)[graph]
    return PlanJob(reference.build, spec, reference.weights, EngineOptions(), reference.folder), tools


@pytest.mark.parametrize("graph", ["text", "time", "decode"])
def test_a_plan_is_deserialised_run_and_compared(reference, builder, engine, graph, tmp_path):
    job, tools = _job(reference, builder, graph, tmp_path)
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"plan")
    engine.spec, engine.run = _onnx_run(reference, graph, "fp16")
    found = check_plan_runs(plan, job, tools, reference, "cpu")
    assert found["calls"] == 1 and set(found["outputs"]) == set(job.spec.outputs)
    (ran,) = builder.calls("IExecutionContext.execute_async_v3")
    assert ran["stream_handle"] == 7
    # The library is at hand in each case: a plan that does without is not in need of one that loads.
    assert len(builder.calls("IPluginRegistry.load_library")) == int(job.options.needs_plugin(graph))
    # What an engine does not write is noticed: the buffers held NaN, or the highest level.
    engine.run = lambda inputs: {}
    what = "flat" if graph == "decode" else "NaN"
    with pytest.raises(GateError, match=f"{graph}, .*{what}.*not installed; find .* --bisect {graph}"):
        check_plan_runs(plan, job, tools, reference, "cpu")


def test_a_session_that_cannot_be_made_closes_the_runtime(reference, builder, engine, tmp_path):
    job, tools = _job(reference, builder, "text", tmp_path)
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"plan")
    builder.double.returns("Runtime.deserialize_cuda_engine", None)
    with pytest.raises(ArtefactError, match="does not take"):
        EngineRun(plan, job.spec, None, "cpu")


# ---- The search


def _values(names: Sequence[str], broken: Sequence[str] = ()) -> Dict[str, np.ndarray]:
    return {name: _normal(4, 4, seed=int(name)) * (3.0 if name in broken else 1.0) for name in names}


@pytest.mark.parametrize("first", [0, 1, 15, 16, 17, 255, 998, 999])
@pytest.mark.parametrize("marked", [2, 16])
def test_the_first_wrong_tensor_is_found(first, marked):
    names = [str(number) for number in range(1000)]
    rounds: List[int] = []

    def engine(wanted: Sequence[str]) -> Dict[str, np.ndarray]:
        rounds.append(len(wanted))
        return _values(wanted, names[first:])

    makers = {name: f"node {name}" for name in names}
    found = bisect.first_divergence(names, engine, _values, FP16, makers, lambda line: None, marked)
    assert found is not None and found.reproduced
    assert (found.tensor, found.node) == (str(first), f"node {first}")
    assert found.after == (str(first - 1) if first else None)
    assert max(rounds) <= marked and len(rounds) <= (3 if marked == 16 else 11)


def test_an_engine_without_fault_has_no_wrong_tensor():
    names = [str(number) for number in range(100)]
    assert bisect.first_divergence(names, _values, _values, FP16, {}, lambda line: None) is None


def test_an_error_that_marks_make_vanish_is_told_as_that():
    names = [str(number) for number in range(100)]

    def engine(wanted: Sequence[str]) -> Dict[str, np.ndarray]:
        fused = len(wanted) < 2 or int(wanted[1]) - int(wanted[0]) > 1
        return _values(wanted, names[50:] if fused else ())

    found = bisect.first_divergence(names, engine, _values, FP16, {}, lambda line: None)
    assert found is not None and not found.reproduced
    assert int(found.after) < 50 <= int(found.tensor) and "comes from fusing" in str(found)


def test_the_tensors_of_both_exports_are_the_same_ones(reference):
    """Under one name the FP16 and the FP32 export have one tensor, all the way through the graph."""
    graph = "text"
    spec, _ = _onnx_run(reference, graph, "fp16")
    file = reference.folder / reference.build.folder_name / spec.file
    names = bisect.comparable_tensors(file, reference.onnx(graph))
    assert len(names) > 0.8 * len(bisect._floats(reference.onnx(graph)))
    inputs = reference.load(graph)[0].inputs
    ours, theirs = (engine_check._run_reference(path, inputs, names) for path in (file, reference.onnx(graph)))
    for name in names:
        assert errors_of(ours[name], theirs[name]).norm < 1e-2, name
    assert not list(file.parent.glob(".*.marked"))


@pytest.mark.parametrize("graph", ["text", "decode"])
def test_bisecting_an_engine_names_the_layer(reference, builder, engine, graph, tmp_path, monkeypatch):
    """The engines of the double run on ONNX Runtime; from one tensor on they are wrong."""
    job, tools = _job(reference, builder, graph, tmp_path)
    fp16 = reference.folder / reference.build.folder_name / job.spec.file
    with engine_check.graph_for_tensorrt(job, builder.major) as fused:
        names = bisect.comparable_tensors(fused, reference.onnx(graph))
    wrong = names[len(names) // 3 :]

    def marked_spec(run: EngineRun, plan: Path, spec: Any, plugin: Any, device: str) -> None:
        engine.spec = spec
        original(run, plan, spec, plugin, device)

    def compute(inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        outputs = engine_check._run_reference(fp16, inputs, list(engine.spec.outputs))
        return {name: value * (2 if name in wrong else 1) for name, value in outputs.items()}

    original = EngineRun.__init__
    monkeypatch.setattr(EngineRun, "__init__", marked_spec)
    engine.run = compute
    text = engine_check.bisect(job, tools, reference, "cpu")
    assert f"the first tensor that diverges is {wrong[0]}, made by " in text
    assert f"; {names[len(names) // 3 - 1]} before it agrees" in text
    assert builder.calls("Builder.build_serialized_network") and find_version().major == builder.major
    assert not list(fp16.parent.glob(".*marked*"))
    engine.run = lambda inputs: engine_check._run_reference(fp16, inputs, list(engine.spec.outputs))
    assert "no marked tensor diverges" in engine_check.bisect(job, tools, reference, "cpu")


def test_a_recorder_keeps_copies_of_the_calls_that_are_wanted():
    import torch

    class Session:
        spec = dataclasses.make_dataclass("Spec", ["inputs", "outputs"])({"x": None}, {"y": None})

        def bind(self, buffers: Dict[str, Any]) -> Any:
            def enqueue() -> None:
                buffers["y"].copy_(buffers["x"] + 1)
                buffers["x"].fill_(-1)

            return type("Bound", (), {"enqueue": staticmethod(enqueue)})

        def close(self) -> None:
            self.closed = True

    recorder = gate.Recorder(Session(), (0, 2))
    buffers = {"x": torch.zeros(2), "y": torch.zeros(2)}
    bound = recorder.bind(buffers)
    for value in (1, 2, 3):
        buffers["x"].fill_(value)
        bound.enqueue()
    assert [(call.inputs["x"][0], call.outputs["y"][0]) for call in recorder.kept] == [(1, 2), (3, 4)]
    assert isinstance(recorder.kept[0], Recorded)
    recorder.close()
