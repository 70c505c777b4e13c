"""Building engines, on the double of each TensorRT: every call that the builder makes is one that version takes."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List, Tuple

import numpy as np
import pytest

import build_engines
from cldm.weights import find_weights
from deploy import engine_build, engine_builds, plugin_library, surgery, tensorrt_versions, toolchain
from deploy.build_progress import BuildProgress, heartbeat
from deploy.engine_build import BuildError, PlanJob, build_plan, existing_plan, timing_cache_path
from deploy.engine_options import HARDWARE_COMPATIBILITY, EngineOptions
from deploy.manifest import ArtefactError, manifest_path, read_manifest
from deploy.operators import OperatorError
from deploy.plan_manifest import engine_words
from deploy.plugin_library import PluginError, ensure_plugin, find_plugin, library_path
from deploy.spec import graph_specs
from deploy.tensorrt_10 import TensorRT10
from deploy.tensorrt_versions import TensorRTError, find_version
from deploy.toolchain import find_gpu, find_toolchain
from tests import micro_model, tensorrt_bindings
from tests.builder_double import FREE_BYTES, GPU, PLAN, BuilderDouble, make_library

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
MAJORS = tensorrt_bindings.MAJORS


@pytest.fixture(params=MAJORS, ids=lambda major: f"tensorrt{major}")
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A builder of each major, installed as `tensorrt`; no call of the test may have been refused."""
    reason = tensorrt_bindings.missing_reason(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(engine_build, "free_memory", lambda: FREE_BYTES)
    made = BuilderDouble(request.param)
    with made.double.installed():
        yield made
    assert not made.double.refused


@pytest.fixture
def make_job(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PlanJob]:
    """Jobs on a copy of the micro model's export, which the tests share."""

    def make(graph: str, precision: str = "fp16", **options: Any) -> PlanJob:
        base = tmp_path_factory.getbasetemp()
        build = micro_model.shared_build(base, precision, 1)
        folder = tmp_path / "build"
        for source in (base / "micro-build" / build.folder_name).glob("*"):
            target = folder / build.folder_name / source.name
            if source.is_file() and source.name != ".lock" and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(str(source), str(target))
        weights = find_weights(build.config)
        return PlanJob(build, graph_specs(build)[graph], weights, EngineOptions(**options), folder)

    return make


def build(builder: BuilderDouble, job: PlanJob, check: Any = None) -> Tuple[Any, List[str]]:
    """Build a plan with the plugin where it is needed; the row and what was reported."""
    lines: List[str] = []
    plugin = None
    if job.options.groupnorm == "plugin":
        make_library(job.folder, builder.major)
        plugin = find_plugin(job.folder, builder.major, GPU.compute_capability)
    return build_plan(job, builder.toolchain(plugin), check, lines.append), lines


# ---- The whole way


@pytest.mark.parametrize("graph", ["text", "hint", "time", "step", "decode"])
def test_every_graph_is_built_and_put_in_place(builder, make_job, graph):
    job = make_job(graph)
    row, _ = build(builder, job)
    assert row.file == job.plan and job.plan.read_bytes() == PLAN and row.error is None
    manifest = read_manifest(job.plan)
    assert manifest["tensorrt"] == builder.double.version and manifest["gpu"] == GPU.name
    assert manifest["options"]["opt_level"] == 5
    with_norms = graph in ("step", "decode")
    assert (manifest["plugin"] is not None) == with_norms == bool(builder.calls("IPluginRegistry.load_library"))
    operators = {node.op_type for node in builder.parsed.graph.node}
    assert (surgery.OP in operators) == with_norms and "InstanceNormalization" not in operators
    assert existing_plan(job, builder.toolchain(_plugin(job, builder)).machine).file == job.plan
    assert not _scratch(job)


def _plugin(job: PlanJob, builder: BuilderDouble) -> Any:
    return find_plugin(job.folder, builder.major, GPU.compute_capability)


def _scratch(job: PlanJob) -> List[str]:
    """What a build must not leave behind."""
    return [path.name for path in job.target.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_precision_is_told_as_each_version_wants_it(builder, make_job):
    module = builder.double.module
    build(builder, make_job("step"))
    (network,) = builder.calls("Builder.create_network")
    kinds = module.NetworkDefinitionCreationFlag
    expected = {
        8: lambda: 1 << int(kinds.EXPLICIT_BATCH),
        10: lambda: 1 << int(kinds.STRONGLY_TYPED),
        11: lambda: 0,
    }
    assert network["flags"] == expected[builder.major]()
    assert sorted(builder.flags()) == (["FP16", "OBEY_PRECISION_CONSTRAINTS"] if builder.major == 8 else [])
    assert [call["flag"].name for call in builder.calls("IBuilderConfig.clear_flag")] == ["TF32"]


def test_version_8_holds_what_the_graph_has_in_fp32_and_nothing_else(builder, make_job):
    job = make_job("text")
    build(builder, job)
    if builder.major != 8:
        assert not hasattr(builder.double.module.ILayer, "precision") or not builder.assigned("ILayer.precision")
        return
    types = engine_build.tensor_types(job.onnx)
    held = {call.receiver.name for call in builder.calls("ILayer.precision=")}
    nodes = [node for node in builder.parsed.graph.node if node.op_type not in ("Constant", "Cast", "Shape")]
    wanted = {node.name for node in nodes if types.get(node.output[0]) == "float32"}
    free = {node.name for node in nodes if types.get(node.output[0]) == "float16"}
    assert held == wanted and wanted and free
    assert set(builder.assigned("ILayer.precision")) == {builder.double.module.float32}
    assert {call["dtype"] for call in builder.calls("ILayer.set_output_type")} == {builder.double.module.float32}
    # The outputs, which are otherwise FP32 there whatever the graph says.
    assert [value.name for value in builder.assigned("ITensor.dtype")] == ["HALF"]


def test_version_8_leaves_fp32_graphs_alone(builder, make_job):
    build(builder, make_job("text", precision="fp32"))
    assert not builder.flags()
    if builder.major == 8:
        assert not builder.assigned("ILayer.precision")


@pytest.mark.parametrize("builder", [8], indirect=True, ids=["tensorrt8"])
def test_layers_that_the_parser_adds_go_with_their_node(builder):
    double = builder.double
    trt = double.module

    def layer(name: str, output: str, dtype: Any, kind: Any = None, execution: bool = True) -> Any:
        made = builder.made("ILayer", name=name, type=kind or trt.LayerType.UNARY, num_outputs=1)
        tensor = builder.made("ITensor", name=output, dtype=dtype, is_execution_tensor=execution)
        double.returns("ILayer.get_output", tensor, on=made)
        return made

    layers = [
        layer("norm helper", "(Unnamed Layer* 1)", trt.float32),
        layer("norm shape", "(Unnamed Layer* 2)", trt.int32, execution=False),
        layer("norm constant", "(Unnamed Layer* 3)", trt.float32, trt.LayerType.CONSTANT),
        layer("norm", "statistics", trt.float32),
        layer("helper of half", "(Unnamed Layer* 4)", trt.float16),
        layer("half", "features", trt.float16),
    ]
    network = double.make("INetworkDefinition", num_layers=len(layers), num_outputs=0)
    double.returns("INetworkDefinition.get_layer", lambda call: layers[call["index"]])
    config = double.make("IBuilderConfig")
    find_version().set_precision(network, config, {"statistics": "float32", "features": "float16"})
    assert [call.receiver.name for call in builder.calls("ILayer.precision=")] == ["norm helper", "norm"]


@pytest.mark.parametrize(
    ("options", "call", "value"),
    [
        ({"opt_level": 3}, "IBuilderConfig.builder_optimization_level", 3),
        ({}, "IBuilderConfig.builder_optimization_level", 5),
        ({}, "IBuilderConfig.max_aux_streams", 0),
        ({"aux_streams": 2}, "IBuilderConfig.max_aux_streams", 2),
        ({"profiling_verbosity": "detailed"}, "IBuilderConfig.profiling_verbosity", "DETAILED"),
        ({"profiling_verbosity": "none"}, "IBuilderConfig.profiling_verbosity", "NONE"),
        ({}, "IBuilderConfig.profiling_verbosity", "LAYER_NAMES_ONLY"),
        ({"hardware_compatibility": "ampere-plus"}, "IBuilderConfig.hardware_compatibility_level", "AMPERE_PLUS"),
        ({}, "IBuilderConfig.hardware_compatibility_level", "NONE"),
    ],
)
def test_options_reach_the_configuration(builder, make_job, options, call, value):
    build(builder, make_job("hint", **options))
    (found,) = builder.assigned(call)
    assert getattr(found, "name", found) == value


def test_the_workspace_comes_from_the_option_or_from_free_memory(builder, make_job):
    build(builder, make_job("hint", workspace_mib=256))
    build(builder, make_job("hint"))
    given, by_share = (call.arguments for call in builder.calls("IBuilderConfig.set_memory_pool_limit"))
    assert given["pool"].name == "WORKSPACE" and given["pool_size"] == 256 << 20
    assert by_share["pool_size"] == int(0.8 * FREE_BYTES)


def test_tf32_only_where_it_is_asked_for(builder, make_job):
    build(builder, make_job("hint", tf32=("hint",)))
    assert "TF32" in builder.flags() and not builder.calls("IBuilderConfig.clear_flag")


def test_a_hardware_level_that_a_version_lacks_is_refused(builder, make_job):
    job = make_job("hint", hardware_compatibility="same-compute-capability")
    if builder.major == 8:
        with pytest.raises(BuildError, match=r"8\.6\.1 has no hardware compatibility same-compute-capability"):
            build(builder, job)
        return
    build(builder, job)
    (level,) = builder.assigned("IBuilderConfig.hardware_compatibility_level")
    assert level.name == "SAME_COMPUTE_CAPABILITY"


def test_the_free_axis_gets_a_profile(builder, make_job):
    build(builder, make_job("time"))
    (call,) = builder.calls("IOptimizationProfile.set_shape")
    shapes = [tuple(call[name]) for name in ("min", "opt", "max")]
    assert (call["input"], shapes) == ("timesteps", [(1,), (20,), (1000,)])
    (added,) = builder.calls("IBuilderConfig.add_optimization_profile")
    assert added["profile"] is call.receiver
    builder.double.returns("IBuilderConfig.add_optimization_profile", -1)
    with pytest.raises(BuildError, match="refused the shapes"):
        build(builder, make_job("time"))


@pytest.mark.parametrize("builder", [10, 11], indirect=True, ids=["tensorrt10", "tensorrt11"])
def test_native_group_norm_where_the_version_has_it(builder, make_job):
    job = make_job("decode", groupnorm="native")
    build(builder, job)
    assert "InstanceNormalization" in {node.op_type for node in builder.parsed.graph.node}
    assert [call["flag"].name for call in builder.calls("OnnxParser.set_flag")] == ["NATIVE_INSTANCENORM"]
    assert not builder.calls("IPluginRegistry.load_library")
    assert read_manifest(job.plan)["plugin"] is None


# ---- The plugin


def test_the_creator_is_looked_up_as_the_version_has_it(builder, make_job):
    build(builder, make_job("decode"))
    calls = builder.calls(builder.creator_call)
    assert calls and all(list(call.arguments.values()) == list(tensorrt_versions.PLUGIN) for call in calls)
    (loaded,) = builder.calls("IPluginRegistry.load_library")
    assert loaded["plugin_path"].endswith(f"libgroup_norm_trt{builder.major}.so")
    build(builder, make_job("step"))  # it is registered by now
    assert len(builder.calls("IPluginRegistry.load_library")) == 1


def test_running_knows_the_plugin_by_the_names_of_the_surgery():
    assert tensorrt_versions.PLUGIN == (surgery.OP, surgery.VERSION, surgery.NAMESPACE)
    code = "import sys, deploy.toolchain; print(sorted({'torch', 'onnx', 'tensorrt', 'polygraphy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(ROOT), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("fails", ["library", "creator"])
def test_a_plugin_that_tensorrt_does_not_take(builder, make_job, fails):
    if fails == "library":
        builder.double.returns("IPluginRegistry.load_library", None)
    else:
        builder.double.returns(builder.creator_call, None)
    with pytest.raises(TensorRTError, match=r"did not load the plugin .*plugins/build.sh --force"):
        build(builder, make_job("decode"))


def test_a_graph_that_needs_the_plugin_without_one(builder, make_job):
    with pytest.raises(TensorRTError, match=r"needs the plugin library.*plugins/build.sh"):
        build_plan(make_job("decode"), builder.toolchain(None), None, print)


# ---- What TensorRT answers where it fails


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("Builder.create_network", "did not make a network"),
        ("Builder.create_builder_config", "did not make a configuration"),
        ("Builder.create_optimization_profile", "did not make an optimisation profile"),
        ("Builder.build_serialized_network", "did not build time: it gave no reason"),
    ],
)
def test_none_from_a_call_is_an_error_that_names_it(builder, make_job, target, words):
    builder.double.returns(target, None)
    job = make_job("time")
    with pytest.raises(BuildError, match=words):
        build(builder, job)
    assert not job.plan.exists() and not _scratch(job)


def _say(call: Any, builder: BuilderDouble, text: str, severity: str = "ERROR") -> None:
    """Let TensorRT tell the logger of a builder or a parser something."""
    (made,) = builder.calls("Builder")
    made["logger"].log(getattr(builder.double.module.ILogger.Severity, severity), text)


def test_out_of_memory_says_what_to_do(builder, make_job):
    def fail(call: Any) -> None:
        _say(call, builder, "a warning of no interest", "WARNING")
        _say(call, builder, "[requestedSize] Error Code 2: OutOfMemory (no further information)")

    builder.double.returns("Builder.build_serialized_network", fail)
    job = make_job("hint", workspace_mib=1000)
    with pytest.raises(BuildError, match=r"OutOfMemory.*nvidia-smi.*--workspace 500, --opt-level 3") as raised:
        build(builder, job)
    assert "no interest" not in str(raised.value)
    builder.double.raises("Builder.build_serialized_network", MemoryError())
    with pytest.raises(BuildError, match="out of memory on the host"):
        build(builder, job)
    assert not job.plan.exists() and not manifest_path(job.plan).exists() and not _scratch(job)


def test_without_a_gpu_the_builder_says_so(builder, make_job):
    def fail(call: Any) -> None:
        call["logger"].log(builder.double.module.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    builder.double.returns("Builder", fail)
    with pytest.raises(BuildError, match=r"cannot start \(CUDA initialization.*35\).*driver is too old"):
        build(builder, make_job("hint"))


def test_what_the_parser_refuses_is_told(builder, make_job):
    error = builder.double.make("ParserError")
    builder.double.returns("OnnxParser.parse_from_file", False)
    builder.double.returns("OnnxParser.num_errors", 1)
    builder.double.returns("OnnxParser.get_error", error)
    builder.double.returns("ParserError.node", 12)
    builder.double.returns("ParserError.desc", "no importer")
    with pytest.raises(BuildError, match=r"cannot parse .*hint\.onnx \(node 12: no importer\)"):
        build(builder, make_job("hint"))
    builder.double.returns("OnnxParser.num_errors", 0)
    with pytest.raises(BuildError, match=r"cannot parse .*hint\.onnx$"):
        build(builder, make_job("hint"))


def test_a_network_with_other_tensors_is_refused(builder, make_job):
    job = make_job("hint")
    tensor = dataclasses.replace(job.spec.outputs["hint_features"], dtype="float32")
    job = dataclasses.replace(job, spec=dataclasses.replace(job.spec, outputs={"hint_features": tensor}))
    plan = BuildProgress("hint", None)
    with pytest.raises(BuildError, match=r"read hint_features as .*'float16'.*float32"):
        engine_build.serialise(job, job.onnx, builder.toolchain(), plan, print)


# ---- Progress


def test_the_monitor_tells_progress_where_there_is_one(builder, make_job, monkeypatch):
    monkeypatch.setattr(engine_build, "INTERVAL_SECONDS", 0.02)
    seen: List[bool] = []

    def work(call: Any) -> bytes:
        if builder.major != 8:
            (monitor,) = builder.assigned("IBuilderConfig.progress_monitor")
            monitor.phase_start("Building", None, 4)
            seen.append(monitor.step_complete("Building", 0))
            monitor.phase_start("Timing", "Building", 10)
            seen.append(monitor.step_complete("Timing", 4))
            monitor.phase_finish("Timing")
            monitor.phase_start("Timing", "Building", 10)
            monitor.step_complete("Timing", 4)
        threading.Event().wait(0.2)
        return PLAN

    builder.double.returns("Builder.build_serialized_network", work)
    _, lines = build(builder, make_job("hint"))
    told = [line for line in lines if line.startswith("hint: ")]
    assert told
    if builder.major == 8:
        assert not any("%" in line for line in told)
    else:
        assert seen == [True, True] and any("Building 38 %" in line and "left" in line for line in told)


def test_progress_estimates_from_the_last_time_or_from_the_fraction():
    now = [0.0]
    progress = BuildProgress("step", None, lambda: now[0])
    now[0] = 30.0
    assert progress.line() == "step: 30 s"
    progress.phase_start("Building", None, 4)
    progress.step_complete("Building", 0)
    assert progress.line() == "step: 30 s, Building 25 %, about 90 s left"
    progress.phase_start("Timing", "Building", 2)
    progress.step_complete("Timing", 0)
    progress.step_complete("no such phase", 3)
    assert progress.line() == "step: 30 s, Building 38 %, about 50 s left"
    progress.phase_finish("Timing")
    progress.phase_finish("Building")
    assert progress.line() == "step: 30 s"
    again = BuildProgress("step", 100.0, lambda: now[0])
    now[0] = 40.0
    assert again.line() == "step: 10 s, about 90 s left, as it took 100 s the last time"
    now[0] = 140.0
    assert again.line() == "step: 110 s"


def test_the_heartbeat_ends_with_the_block_also_after_an_error():
    lines: List[str] = []
    with pytest.raises(ZeroDivisionError), heartbeat(BuildProgress("x", None), lines.append, 0.01):
        while not lines:
            pass
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name == "build progress"]


def test_the_last_build_s_time_is_the_estimate_of_the_next(builder, make_job):
    job = make_job("hint")
    assert engine_build.seconds_before(job) is None
    build(builder, job)
    assert engine_build.seconds_before(job) >= 0


@pytest.mark.parametrize("builder", [10, 11], indirect=True, ids=["tensorrt10", "tensorrt11"])
def test_control_c_ends_a_build_through_the_monitor(builder, make_job):
    before = signal.getsignal(signal.SIGINT)
    answers: List[bool] = []

    def work(call: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        (monitor,) = builder.assigned("IBuilderConfig.progress_monitor")
        answers.append(monitor.step_complete("Building", 0))

    builder.double.returns("Builder.build_serialized_network", work)
    job = make_job("hint")
    with pytest.raises(KeyboardInterrupt):
        build(builder, job)
    assert answers == [False] and signal.getsignal(signal.SIGINT) is before
    assert not job.plan.exists() and not _scratch(job)


@pytest.mark.skipif(sys.platform != "linux", reason="the mutex is that of glibc")
@pytest.mark.parametrize("builder", [10, 11], indirect=True, ids=["tensorrt10", "tensorrt11"])
def test_control_c_is_seen_while_the_main_thread_is_inside_the_builder(builder, make_job):
    """The call holds the main thread in C, where no signal ends it and no handler of Python's runs."""
    library = ctypes.CDLL(None)
    answers: List[bool] = []
    wakeup_before = _wakeup_fd()

    def from_the_builder_s_thread(monitor: Any, mutex: Any) -> None:
        time.sleep(0.2)  # until the main thread waits; a handler would run before
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while (not answers or answers[-1]) and time.monotonic() < deadline:
            answers.append(monitor.step_complete("Building", 0))
        library.pthread_mutex_unlock(mutex)

    def work(call: Any) -> None:
        (monitor,) = builder.assigned("IBuilderConfig.progress_monitor")
        mutex = ctypes.create_string_buffer(128)  # of zeros: one that is free
        library.pthread_mutex_lock(mutex)
        thread = threading.Thread(target=from_the_builder_s_thread, args=(monitor, mutex))
        thread.start()
        library.pthread_mutex_lock(mutex)
        thread.join()

    builder.double.returns("Builder.build_serialized_network", work)
    job = make_job("hint")
    with pytest.raises(KeyboardInterrupt):
        build(builder, job)
    assert answers[-1] is False and not job.plan.exists() and not _scratch(job)
    assert _wakeup_fd() == wakeup_before
    assert not [thread for thread in threading.enumerate() if thread.name == "build interrupt"]


def _wakeup_fd() -> int:
    found = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(found)
    return found


@pytest.mark.parametrize("builder", [10, 11], indirect=True, ids=["tensorrt10", "tensorrt11"])
def test_another_signal_does_not_end_a_build(builder, make_job):
    def work(call: Any) -> bytes:
        os.kill(os.getpid(), signal.SIGUSR1)
        return PLAN

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    builder.double.returns("Builder.build_serialized_network", work)
    try:
        row, _ = build(builder, make_job("hint"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert row.file.exists()


# ---- The tactic sources


def test_version_8_builds_without_the_libraries_of_torch(builder, make_job):
    build(builder, make_job("hint"))
    if builder.major != 8:
        assert not builder.calls("IBuilderConfig.set_tactic_sources")
        return
    (call,) = builder.calls("IBuilderConfig.set_tactic_sources")
    sources = builder.double.module.TacticSource
    kept = {name for name, source in sources.__members__.items() if call["tactic_sources"] & 1 << int(source)}
    assert kept == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"} and call["tactic_sources"] == 0b11000
    builder.double.returns("IBuilderConfig.set_tactic_sources", False)
    with pytest.raises(TensorRTError, match=r"TensorRT 8\.6\.1 refused to do without cuBLAS and cuDNN"):
        build(builder, make_job("hint"))


# ---- The timing cache


def test_the_timing_cache_is_kept_by_version_and_gpu(builder, make_job):
    job = make_job("hint")
    build(builder, job)
    build(builder, make_job("text"))
    first, second = (
        bytes(call["serialized_timing_cache"]) for call in builder.calls("IBuilderConfig.create_timing_cache")
    )
    assert (first, second) == (b"", b"timings")
    assert all(call["ignore_mismatch"] is False for call in builder.calls("IBuilderConfig.set_timing_cache"))
    file = timing_cache_path(job.folder, builder.toolchain().machine)
    assert file.name == f"{builder.double.version}-nvidia-test-gpu-9.0.cache" and file.read_bytes() == b"timings"


@pytest.mark.parametrize("refused", ["create", "set"])
def test_a_timing_cache_that_is_refused_is_started_afresh(builder, make_job, refused):
    job = make_job("hint")
    file = timing_cache_path(job.folder, builder.toolchain().machine)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of another version")
    fresh = builder.double.make("ITimingCache")
    if refused == "create":
        builder.double.returns_each("IBuilderConfig.create_timing_cache", [None, fresh])
    else:
        builder.double.returns_each("IBuilderConfig.set_timing_cache", [False, True])
    _, lines = build(builder, job)
    assert any("refused the timing cache" in line for line in lines)
    assert file.read_bytes() == b"timings" and job.plan.exists()


def test_a_build_does_without_timings_where_none_can_be_had(builder, make_job):
    builder.double.returns("IBuilderConfig.create_timing_cache", None)
    job = make_job("hint")
    _, lines = build(builder, job)
    assert "building without timings" in lines and job.plan.exists()
    assert not timing_cache_path(job.folder, builder.toolchain().machine).exists()


@pytest.mark.parametrize("target", ["IBuilderConfig.get_timing_cache", "ITimingCache.serialize"])
def test_timings_that_cannot_be_had_are_not_kept(builder, make_job, target):
    builder.double.returns(target, None)
    job = make_job("hint")
    build(builder, job)
    assert job.plan.exists() and not timing_cache_path(job.folder, builder.toolchain().machine).exists()


# ---- Installing


def test_a_plan_that_fails_its_check_is_not_installed(builder, make_job):
    job = make_job("hint")
    build(builder, job)
    before = read_manifest(job.plan)
    builder.double.returns("Builder.build_serialized_network", b"another plan")

    def check(plan: Path) -> Any:
        assert plan.read_bytes() == b"another plan"
        raise RuntimeError("too far off")

    with pytest.raises(RuntimeError, match="too far off"):
        build(builder, job, check)
    assert job.plan.read_bytes() == PLAN and read_manifest(job.plan) == before and not _scratch(job)
    row, _ = build(builder, job, lambda plan: {"calls": 1, "outputs": {"a": {"norm": 0.25}, "b": {"norm": 0.5}}})
    assert row.error == 0.5 and job.plan.read_bytes() == b"another plan"
    assert existing_plan(job, builder.toolchain().machine).error == 0.5


def test_a_kill_before_the_new_manifest_leaves_no_old_one(builder, make_job, monkeypatch):
    job = make_job("hint")
    build(builder, job)
    monkeypatch.setattr(engine_build, "write_manifest", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception, match="killed here"):
        build(builder, job)
    assert job.plan.exists() and not manifest_path(job.plan).exists()


def test_what_a_killed_build_left_is_removed_and_never_counts(builder, make_job):
    job = make_job("decode")
    build(builder, job)
    manifest_path(job.plan).unlink()  # a kill between the two renames
    with pytest.raises(ArtefactError, match="not made, or not to its end"):
        existing_plan(job, builder.toolchain(_plugin(job, builder)).machine)
    left = [job.target / f".{job.plan.name}.abc.tmp", job.target / ".vae_decoder.fused.onnx"]
    for path in left:
        path.write_bytes(b"half")
    build(builder, job)
    assert not any(path.exists() for path in left)
    assert existing_plan(job, builder.toolchain(_plugin(job, builder)).machine)


KILLED = """
import os, sys
from pathlib import Path
from deploy import engine_build
from deploy.build_progress import BuildProgress

class Job:
    plan = Path(sys.argv[1]); hashes = None
def check(plan):
    print(plan.name, flush=True)
    os.kill(os.getpid(), 9)
engine_build._install(Job, b"x" * 1000, {}, check, BuildProgress("x", None))
"""


def test_a_build_killed_while_it_writes_leaves_the_old_plan(tmp_path):
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"old")
    manifest_path(plan).write_text("{}")
    done = subprocess.run([sys.executable, "-c", KILLED, str(plan)], cwd=str(ROOT), capture_output=True, check=False)
    assert done.returncode == -9 and done.stdout.startswith(b".x.plan."), done.stderr
    assert plan.read_bytes() == b"old" and manifest_path(plan).exists()


def test_a_disk_that_is_too_full_is_told_before_the_build(builder, make_job, monkeypatch):
    monkeypatch.setattr(engine_build, "PLAN_TO_ONNX", 1e15)
    with pytest.raises(OSError, match="are needed"):
        build(builder, make_job("hint"))
    assert not builder.calls("Builder")


# ---- Bad input


def test_a_missing_onnx_file_is_told_with_the_command_that_exports_it(builder, make_job):
    job = make_job("hint")
    job.onnx.unlink()
    with pytest.raises(ArtefactError, match=r"hint\.onnx is missing; export it with: python3 export_onnx.py --model"):
        build(builder, job)
    manifest_path(job.onnx).unlink()
    with pytest.raises(ArtefactError, match="export it with"):
        build(builder, job)
    assert not builder.calls("Builder")


def test_a_graph_that_the_parser_does_not_take_is_refused_before_building(builder, make_job, monkeypatch):
    from deploy import operators

    table = operators.parser_table(builder.major)
    fewer = {name: row for name, row in table.operators.items() if name != "Conv"}
    monkeypatch.setattr(operators, "parser_table", lambda major: dataclasses.replace(table, operators=fewer))
    with pytest.raises(OperatorError, match="operator Conv is not supported"):
        build(builder, make_job("hint"))
    assert not builder.calls("Builder")


@pytest.mark.parametrize("version", ["7.2.3.4", "8.5.3.1", "9.3.0", "10.0.1", "12.0.1"])
def test_an_unknown_version_is_refused(builder, monkeypatch, version):
    monkeypatch.setattr(builder.double.module, "__version__", version)
    supported = "8.6, 10.1 or a later 10, or 11"
    with pytest.raises(TensorRTError, match=f"TensorRT {version} is not supported; install {supported}"):
        find_version()


@pytest.mark.parametrize("version", ["8.6.0", "10.1.0", "11.0.0"])
def test_the_oldest_versions_are_taken(builder, monkeypatch, version):
    monkeypatch.setattr(builder.double.module, "__version__", version)
    assert (find_version().version, find_version().major) == (version, int(version.split(".")[0]))


def test_a_hardware_level_that_came_with_a_later_version_of_10(monkeypatch):
    """Looking for another level must not trip over it."""
    levels = SimpleNamespace(NONE="none", AMPERE_PLUS="ampere plus")  # as 10.3 has them
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(HardwareCompatibilityLevel=levels))
    found = [TensorRT10("10.3.0").hardware_level(name) for name in HARDWARE_COMPATIBILITY]
    assert found == ["none", "ampere plus", None]


def test_tensorrt_that_is_missing_or_does_not_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TensorRTError, match="cannot be imported.*install TensorRT") as raised:
        find_version()
    assert f"{shlex.quote(sys.executable)} -m pip install tensorrt-cu13 (or tensorrt-cu12 with" in str(raised.value)

    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name == "tensorrt":
                raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(TensorRTError, match="libnvinfer.*LD_LIBRARY_PATH"):
        find_version()


def test_no_gpu(monkeypatch):
    import torch

    def fail(*_: Any) -> None:
        raise RuntimeError("No CUDA GPUs are available\nmore")

    monkeypatch.setattr(torch.cuda, "current_device", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    for find in (toolchain.find_gpu, toolchain.free_memory):
        with pytest.raises(TensorRTError, match="no CUDA device for TensorRT: No CUDA GPUs are available; nvidia"):
            find()


@pytest.mark.parametrize(
    "options",
    [
        {"groupnorm": "fast"},
        {"opt_level": 6},
        {"aux_streams": -1},
        {"workspace_mib": 0},
        {"hardware_compatibility": "all"},
        {"profiling_verbosity": "loud"},
    ],
)
def test_options_that_do_not_exist(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        EngineOptions(**options)


# ---- The toolchain


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setenv("NVCC", str(tmp_path / "no nvcc"))
    monkeypatch.setattr(toolchain, "find_gpu", lambda: GPU)


def test_the_plugin_is_taken_where_it_is_there(builder, no_compiler, tmp_path):
    file = make_library(tmp_path, builder.major)
    for groupnorm in ("auto", "plugin"):
        tools = find_toolchain(tmp_path, groupnorm, print)
        assert tools.plugin.file == file and tools.machine.plugin == tools.plugin.source


def test_without_the_plugin(builder, no_compiler, tmp_path):
    lines: List[str] = []
    with pytest.raises(PluginError, match="plugins/build.sh: error: no "):
        find_toolchain(tmp_path, "plugin", lines.append)
    if builder.major == 8:
        with pytest.raises(PluginError, match="plugins/build.sh: error: no "):
            find_toolchain(tmp_path, "auto", lines.append)
        with pytest.raises(TensorRTError, match="has no layer for the GroupNorms; build with --groupnorm plugin"):
            find_toolchain(tmp_path, "native", lines.append)
        return
    assert find_toolchain(tmp_path, "native", lines.append).plugin is None
    lines.clear()
    assert find_toolchain(tmp_path, "auto", lines.append).plugin is None
    assert any("TensorRT's own layers normalise" in line and "--groupnorm native" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"source": "of yesterday"}, "source is of yesterday"),
        ({"tensorrt_major": 9}, "tensorrt_major is 9"),
        ({"architectures": ["75"], "ptx": "100"}, "no code for compute capability 9.0"),
        ({"ptx": "old"}, "no code for compute capability 9.0"),
    ],
)
def test_a_library_that_does_not_fit_is_not_found(tmp_path, changed, words):
    make_library(tmp_path, 10, **changed)
    with pytest.raises(ArtefactError, match=words):
        find_plugin(tmp_path, 10, "9.0")


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "12.0"])
def test_a_library_runs_on_its_generation_and_by_ptx_on_later_ones(tmp_path, capability):
    make_library(tmp_path, 10, architectures=["80", "90"], ptx="90")
    assert find_plugin(tmp_path, 10, capability).tensorrt == "10.0.0.1"


FAKE_BUILD = """#!/usr/bin/env bash
echo "run $*" >>"$(dirname "$0")/log"
exec '{python}' -c "
import sys; sys.path.insert(0, '{root}')
from pathlib import Path
from tests.builder_double import make_library
make_library(Path(sys.argv[2]).parent, int(open('{major}').read()))
" "$@"
"""


def test_a_stale_library_is_built_anew_and_one_that_fits_is_kept(tmp_path, monkeypatch):
    script = tmp_path / "build.sh"
    script.write_text(FAKE_BUILD.format(python=sys.executable, root=ROOT, major=tmp_path / "major"))
    (tmp_path / "major").write_text("10")
    monkeypatch.setattr(plugin_library, "BUILD_SCRIPT", script)
    lines: List[str] = []
    make_library(tmp_path, 10, source="of yesterday")
    assert ensure_plugin(tmp_path, 10, "9.0", lines.append).source == plugin_library.plugin_digest(10)
    assert "source is of yesterday" in lines[0]
    ensure_plugin(tmp_path, 10, "9.0", lines.append)
    assert (tmp_path / "log").read_text().splitlines() == [f"run --output {tmp_path}/plugins"]
    # Headers of another TensorRT than the one that runs.
    with pytest.raises(PluginError, match="no library for TensorRT 11 .*TENSORRT_ROOT; or do without it"):
        ensure_plugin(tmp_path, 11, "9.0", lines.append)


@pytest.mark.parametrize("major", MAJORS)
def test_the_hash_of_the_sources_is_the_build_script_s(tmp_path, major):
    """Run by bash up to where it knows its sources, with a compiler and headers that are not used."""
    (tmp_path / "nvcc").write_text(
        '#!/usr/bin/env bash\n[ "$1" = --version ] && echo "release 12.4, V12.4.1" || echo compute_90\n'
    )
    (tmp_path / "nvcc").chmod(0o755)
    names = {"MAJOR": major, "MINOR": 6, "PATCH": 1, "BUILD": 6}
    header = "".join(f"#define NV_TENSORRT_{name} {value}\n" for name, value in names.items())
    (tmp_path / "NvInferVersion.h").write_text(header)
    (tmp_path / "NvInferRuntime.h").write_text("")
    script = (ROOT / "plugins" / "build.sh").read_text(encoding="utf-8")
    script = script.replace('HERE="$(CDPATH', f'HERE="{ROOT}/plugins" #').split("\nmkdir -p")[0]
    script += '\nlibrary="$output/x.so"\nmanifest digest\n'
    done = subprocess.run(
        ["bash", "-s", "--", "--tensorrt", str(tmp_path), "--output", str(tmp_path), "--arch", "90"],
        input=script,
        env=dict(os.environ, NVCC=str(tmp_path / "nvcc"), PYTHON=sys.executable),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[-1:] == [plugin_library.plugin_digest(major)], done.stderr


# ---- The command


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> List[List[str]]:
    """The command's other processes, which are written down, and run in this one where they build."""
    started: List[List[str]] = []

    class Process:
        def __init__(self, command: List[str]) -> None:
            assert command[:2] == [sys.executable, str(ROOT / "build_engines.py")]
            started.append(command[2:])

        def wait(self, timeout: Any = None) -> int:
            return build_engines.main(started[-1]) if "--in-process" in started[-1] else 0

    monkeypatch.setattr(engine_builds.subprocess, "Popen", Process)
    monkeypatch.setattr(toolchain, "find_gpu", lambda: GPU)
    return started


def _arguments(job: PlanJob, *words: str) -> List[str]:
    return [*engine_words(job.build, job.weights, job.folder, None), *words]


def test_the_command_builds_each_graph_in_a_process_and_skips_what_is_there(builder, make_job, children, capsys):
    job = make_job("hint", groupnorm="plugin")
    make_library(job.folder, builder.major)
    arguments = _arguments(job, "--no-check", "--opt-level", "2", "--graphs", "hint", "decode")
    assert build_engines.main(arguments) == 0
    assert [words[words.index("--graphs") + 1] for words in children] == ["hint", "decode"]
    assert all("--no-check" in words and words[words.index("--groupnorm") + 1] == "plugin" for words in children)
    assert builder.assigned("IBuilderConfig.builder_optimization_level") == [2, 2]
    out = capsys.readouterr().out
    assert "[1/2] hint: building" in out and "hint.plan" in out and "there" not in out
    children.clear()
    assert build_engines.main(arguments) == 0
    assert not children and "there" in capsys.readouterr().out
    assert build_engines.main([*arguments, "--graphs", "hint", "--force"]) == 0
    assert len(children) == 1
    children.clear()
    # Other options make another plan.
    assert build_engines.main([*arguments, "--aux-streams", "1"]) == 0
    assert len(children) == 2 and "options is" in capsys.readouterr().out


def test_the_command_records_before_it_builds(builder, make_job, children, monkeypatch):
    job = make_job("hint")
    make_library(job.folder, builder.major)
    checked: List[Tuple[str, str]] = []
    monkeypatch.setattr("runtime.engine_check.Reference.make", lambda self: None)
    monkeypatch.setattr(
        "runtime.engine_check.check_plan_runs",
        lambda plan, job, tools, reference, device: checked.append((job.spec.name, device)) or {"outputs": {}},
    )
    assert build_engines.main(_arguments(job, "--graphs", "hint")) == 0
    assert [("--record-only" in words, "--in-process" in words) for words in children] == [(True, False), (False, True)]
    assert checked == [("hint", "cuda:0")]


def test_all_graphs_are_looked_at_before_the_first_is_built(builder, make_job, children, capsys):
    job = make_job("decode")
    make_library(job.folder, builder.major)
    job.onnx.unlink()
    assert build_engines.main(_arguments(job, "--no-check", "--graphs", "hint", "decode")) == 1
    assert "export it with" in capsys.readouterr().err and not children


@pytest.mark.parametrize(
    ("status", "words"), [(1, "failed and says why above"), (-9, "killed by signal 9.*want of memory")]
)
def test_a_process_that_fails_ends_the_command(builder, make_job, children, monkeypatch, capsys, status, words):
    job = make_job("hint")
    make_library(job.folder, builder.major)
    monkeypatch.setattr(engine_builds.subprocess.Popen, "wait", lambda self: status)
    assert build_engines.main(_arguments(job, "--no-check", "--graphs", "hint", "text")) == 1
    err = capsys.readouterr().err
    assert len(children) == 1 and "finished" in err
    assert re.search(words, err)


@pytest.mark.parametrize("builder", [8], indirect=True, ids=["tensorrt8"])
def test_control_c_during_a_build_of_version_8_ends_its_process(builder, make_job, monkeypatch):
    """There is no monitor to say it: while the builder works, the signal has the system's own meaning."""
    seen: List[Any] = []
    builder.double.returns(
        "Builder.build_serialized_network", lambda call: seen.append(signal.getsignal(signal.SIGINT)) or PLAN
    )
    build(builder, make_job("hint"))
    assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


@pytest.mark.parametrize("child", ["ends", "hangs", "hangs and is interrupted again"])
def test_control_c_lets_the_process_end_before_it_is_killed(builder, make_job, children, monkeypatch, capsys, child):
    job = make_job("hint")
    make_library(job.folder, builder.major)
    events: List[Any] = []

    def wait(self: Any, timeout: Any = None) -> int:
        events.append(timeout)
        if len(events) == 1 or (timeout and child == "hangs and is interrupted again"):
            raise KeyboardInterrupt
        if timeout and child == "hangs":
            raise subprocess.TimeoutExpired("build_engines.py", timeout)
        return 130

    monkeypatch.setattr(engine_builds.subprocess.Popen, "wait", wait)
    monkeypatch.setattr(engine_builds.subprocess.Popen, "kill", lambda self: events.append("kill"), raising=False)
    assert build_engines.main(_arguments(job, "--no-check", "--graphs", "hint")) == 130
    assert events == [None, 30, "kill", None] and "interrupted" in capsys.readouterr().err


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """Two alike, as torch sees them; the current one is the last of the list."""
    import torch

    current = [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    properties = SimpleNamespace(name=GPU.name, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return current


def test_the_device_is_made_current_and_handed_to_the_processes(builder, make_job, children, monkeypatch, two_gpus):
    monkeypatch.setattr(toolchain, "find_gpu", find_gpu)  # the real one
    job = make_job("hint")
    make_library(job.folder, builder.major)
    checked: List[str] = []
    monkeypatch.setattr("runtime.engine_check.Reference.make", lambda self: None)
    monkeypatch.setattr(
        "runtime.engine_check.check_plan_runs",
        lambda plan, job, tools, reference, device: checked.append(device) or {"outputs": {}},
    )
    assert build_engines.main(_arguments(job, "--graphs", "hint")) == 0
    assert two_gpus == [0] and not any("--device" in words for words in children)
    children.clear()
    assert build_engines.main(_arguments(job, "--graphs", "hint", "--force", "--device", "1")) == 0
    assert [words[words.index("--device") + 1] for words in children] == ["1", "1"]
    assert two_gpus == [0, 1, 1] and checked == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize("device", [2, -1])
def test_a_device_that_does_not_exist(builder, make_job, two_gpus, capsys, device):
    assert build_engines.main(_arguments(make_job("hint"), "--device", str(device))) == 1
    assert f"there is no GPU {device}; torch sees 0 to 1" in capsys.readouterr().err and two_gpus == [0]


@pytest.mark.parametrize(
    ("words", "compares"),
    [
        ([], True),
        (["--no-check"], False),
        (["--no-check", "--bisect", "step"], True),
        (["--no-check", "--record-only"], True),
    ],
)
def test_onnxruntime_is_asked_for_only_where_something_is_compared(words, compares):
    needed = build_engines.needed_packages(build_engines.parse_arguments(words))
    assert ("onnxruntime" in needed) == compares and "onnx_graphsurgeon" in needed


def test_errors_are_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_engines.main(["--model", "tiny"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("build_engines.py: Python's package tensorrt cannot be imported") and err.count("\n") == 1


def test_the_options_of_a_command_are_those_that_it_was_given(make_job):
    options = EngineOptions("native", 3, 1, 100, "ampere-plus", "detailed", ("text", "step"))
    args = build_engines.parse_arguments(options.words())
    assert build_engines.options_of(args, args.groupnorm) == options
    assert json.loads(json.dumps(options.of_graph("text")))["tf32"] is True
    assert options.of_graph("text")["groupnorm"] is None and not options.of_graph("hint")["tf32"]
    assert not tensorrt_versions.said(type("Logger", (), {"errors": []}))
    assert np.all([library_path(Path("x"), major).suffix == ".so" for major in MAJORS])
