"""TensorRT 8.6.1, 10.13.3.9 and 11.4.0.106 as their own Python bindings show them, and the double made from those.

Needs the bindings' wheels (3 MB, downloaded once), a C compiler and binutils; without them the tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest

from tests import tensorrt_bindings, tensorrt_probe, tensorrt_recorder
from tests.tensorrt_bindings import MAJORS, PACKAGES, BindingsMissing
from tests.tensorrt_double import NotScripted, TensorRTDouble

ALL = set(MAJORS)


def _bindings(major: int) -> tensorrt_bindings.Bindings:
    reason = tensorrt_bindings.missing_reason(major)
    if reason:
        pytest.skip(reason)
    return tensorrt_bindings.load(major)


@pytest.fixture(params=MAJORS, ids=lambda major: f"tensorrt{major}")
def major(request) -> int:
    _bindings(request.param)
    return request.param


@pytest.fixture
def bindings(major) -> tensorrt_bindings.Bindings:
    return _bindings(major)


@pytest.fixture
def double(major) -> TensorRTDouble:
    return TensorRTDouble.load(major)


# ---- The bindings themselves


def test_the_bindings_import_and_are_of_that_version(bindings):
    code = "import json, tensorrt; print(json.dumps([tensorrt.__version__, tensorrt.tensorrt.__file__]))"
    version, path = bindings.evaluate(code)
    assert version == PACKAGES[bindings.major][1]
    assert path.startswith(str(bindings.folder))


def test_a_plain_interpreter_does_not_see_them(bindings):
    environment = {**bindings.environment(), "PYTHONPATH": "", "LD_LIBRARY_PATH": ""}
    code = "import tensorrt_bindings"
    done = subprocess.run([bindings.python, "-I", "-c", code], env=environment, capture_output=True, check=False)
    if not done.returncode:
        pytest.skip("TensorRT's bindings are installed here")
    assert b"ModuleNotFoundError" in done.stderr


def test_real_bindings_run_a_build_and_a_session_on_hollow_objects(bindings):
    """Code that needs no sensible answers runs on the real bindings, which check every argument."""
    code = """
import json, tensorrt as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network, config = builder.create_network(0), builder.create_builder_config()
config.builder_optimization_level = 5
config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
answers = [trt.OnnxParser(network, logger).parse(b"onnx", path="x.onnx")]
answers.append(builder.build_serialized_network(network, config) is not None)
engine = trt.Runtime(logger).deserialize_cuda_engine(b"plan")
context = engine.create_execution_context()
answers += [context.set_tensor_address("x", 256), context.execute_async_v3(0)]
try:
    context.set_tensor_address("x")
except TypeError:
    answers.append("TypeError")
print(json.dumps(answers))
"""
    assert bindings.evaluate(code) == [True, True, True, True, "TypeError"]


def test_an_error_in_the_interpreter_is_reported(bindings):
    with pytest.raises(RuntimeError, match=r"status 1: [\s\S]*no_such_name"):
        bindings.evaluate("import tensorrt; tensorrt.no_such_name")


# ---- What the project relies on, by major. A name that a version lacks raises AttributeError there.

# With the majors that have the name, and what follows from that for the builder or the session.
NAMES = {
    # Precision: 8 is told by a flag and constraints of layers; 10 may be; 11 goes by the types in the graph alone.
    "BuilderFlag.FP16": {8, 10},
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": {8, 10},
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS": {8, 10},
    "BuilderFlag.BF16": {10},
    "BuilderFlag.INT8": {8, 10},
    "BuilderFlag.TF32": ALL,  # so "TF32 off for text" is clear_flag in all three
    "ILayer.precision": {8, 10},
    "ILayer.set_output_type": {8, 10},
    "ITensor.dtype": ALL,  # read-only in 11, see PROPERTIES
    "Builder.platform_has_fast_fp16": {8, 10},
    "DataType.INT64": {10, 11},  # 8 has INT32 only, so token ids and timesteps are int32
    # The kind of network: 8 needs EXPLICIT_BATCH; 10 ignores it, 11 has no such member and ignores STRONGLY_TYPED.
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": {8, 10},
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": {10, 11},
    "INetworkDefinition.get_flag": {10, 11},
    "INetworkDefinition.has_implicit_batch_dimension": ALL,
    "ICudaEngine.has_implicit_batch_dimension": {8, 10},
    # Building
    "Builder.build_serialized_network": ALL,
    "Builder.build_engine": {8},
    "Builder.build_engine_with_config": {10, 11},
    "IBuilderConfig.builder_optimization_level": ALL,
    "IBuilderConfig.max_aux_streams": ALL,
    "IBuilderConfig.profiling_verbosity": ALL,
    "IBuilderConfig.hardware_compatibility_level": ALL,
    "IBuilderConfig.max_workspace_size": {8},  # set_memory_pool_limit is in all three
    "IBuilderConfig.set_memory_pool_limit": ALL,
    "MemoryPoolType.WORKSPACE": ALL,
    "IBuilderConfig.progress_monitor": {10, 11},  # 8 gets a heartbeat
    "IProgressMonitor.step_complete": {10, 11},
    "HardwareCompatibilityLevel.AMPERE_PLUS": ALL,
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": {10, 11},
    "ProfilingVerbosity.DETAILED": ALL,
    "ProfilingVerbosity.LAYER_NAMES_ONLY": ALL,
    "ProfilingVerbosity.DEFAULT": {8},
    "BuilderFlag.VERSION_COMPATIBLE": ALL,
    "PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805": {8},
    "PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10": {10, 11},
    "TacticSource.CUDNN": {8, 10},
    "TacticSource.EDGE_MASK_CONVOLUTIONS": ALL,
    "BuilderFlag.REJECT_EMPTY_ALGORITHMS": {8, 10},
    # The timing cache
    "IBuilderConfig.create_timing_cache": ALL,
    "IBuilderConfig.set_timing_cache": ALL,
    "IBuilderConfig.get_timing_cache": ALL,
    "ITimingCache.combine": ALL,
    "ITimingCache.serialize": ALL,
    "BuilderFlag.EDITABLE_TIMING_CACHE": {10, 11},
    # The parser
    "OnnxParser.parse": ALL,
    "OnnxParser.parse_from_file": ALL,  # finds external weights beside the file
    "OnnxParser.supports_operator": ALL,
    "OnnxParser.supports_model": {8, 10},
    "OnnxParser.supports_model_v2": {10, 11},
    "OnnxParserFlag.NATIVE_INSTANCENORM": ALL,
    "OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE": {11},
    "ParserError.desc": ALL,
    "ParserError.node": ALL,
    "ParserError.node_name": {10, 11},
    # Plugins: the library is loaded the same way; creators are looked up by the old name or the new.
    "get_plugin_registry": ALL,
    "init_libnvinfer_plugins": ALL,
    "IPluginRegistry.load_library": ALL,
    "IPluginRegistry.deregister_library": ALL,
    "IPluginRegistry.get_plugin_creator": {8, 10},
    "IPluginRegistry.get_creator": {10, 11},
    "IPluginRegistry.plugin_creator_list": {8, 10},
    "IPluginRegistry.all_creators": {10, 11},
    "IPluginCreatorV3One.create_plugin": {10, 11},
    "IBuilderConfig.plugins_to_serialize": ALL,
    # Running: addresses by name in all three, so bindings by index are never needed
    "Runtime.deserialize_cuda_engine": ALL,
    "Runtime.max_threads": ALL,
    "ICudaEngine.num_io_tensors": ALL,
    "ICudaEngine.get_tensor_name": ALL,
    "ICudaEngine.get_tensor_mode": ALL,
    "ICudaEngine.get_tensor_dtype": ALL,
    "ICudaEngine.get_tensor_shape": ALL,
    "ICudaEngine.get_tensor_format": ALL,
    "ICudaEngine.get_tensor_location": ALL,
    "ICudaEngine.num_bindings": {8},
    "ICudaEngine.num_aux_streams": ALL,
    "IExecutionContext.set_tensor_address": ALL,
    "IExecutionContext.get_tensor_address": ALL,
    "IExecutionContext.execute_async_v3": ALL,
    "IExecutionContext.execute_async_v2": {8},
    "IExecutionContext.execute_v2": ALL,
    "IExecutionContext.set_input_shape": ALL,
    "IExecutionContext.infer_shapes": ALL,
    "IExecutionContext.set_aux_streams": ALL,
    "IExecutionContext.enqueue_emits_profile": ALL,
    "IExecutionContext.nvtx_verbosity": ALL,
    # Activation memory that engines share: size and context by two names each, and 10 has both of each
    "ICudaEngine.device_memory_size": {8, 10},
    "ICudaEngine.device_memory_size_v2": {10, 11},
    "ICudaEngine.create_execution_context": ALL,
    "ICudaEngine.create_execution_context_without_device_memory": {8, 10},
    "ExecutionContextAllocationStrategy.USER_MANAGED": {10, 11},
    "ICudaEngine.create_runtime_config": {10, 11},
    "IExecutionContext.set_device_memory": {10, 11},
    "IExecutionContext.device_memory": ALL,
    "IExecutionContext.update_device_memory_size_for_shapes": {10, 11},
    # What engines say of themselves
    "ICudaEngine.create_engine_inspector": ALL,
    "EngineInspector.get_engine_information": ALL,
    "LayerInformationFormat.JSON": ALL,
    "ICudaEngine.get_engine_stat": {11},
    "IErrorRecorder.report_error": ALL,
    "IHostMemory.nbytes": ALL,
}

# Class, property and, by major, whether it can be "r"ead and "w"ritten.
PROPERTIES = {
    ("IExecutionContext", "device_memory"): {8: "w", 10: "w", 11: "w"},
    ("IExecutionContext", "active_optimization_profile"): {8: "rw", 10: "r", 11: "r"},
    ("ITensor", "dtype"): {8: "rw", 10: "rw", 11: "r"},
    ("IBuilderConfig", "progress_monitor"): {10: "rw", 11: "rw"},
    ("IBuilderConfig", "builder_optimization_level"): {8: "rw", 10: "rw", 11: "rw"},
    ("IBuilderConfig", "max_aux_streams"): {8: "rw", 10: "rw", 11: "rw"},
    ("IExecutionContext", "name"): {8: "rw", 10: "rw", 11: "rw"},
    ("ICudaEngine", "name"): {8: "r", 10: "r", 11: "r"},
    ("OnnxParser", "num_errors"): {8: "r", 10: "r", 11: "r"},
}

# Parameter names of every overload, without self; "=" after those that have a default.
SIGNATURES = {
    "Builder.create_network": {major: [["flags="]] for major in MAJORS},  # 8 means implicit batch by the default
    "Builder.build_serialized_network": {
        8: [["network", "config"]],
        10: [["network", "config"], ["network", "config", "kernel_text"]],
        11: [["network", "config"], ["network", "config", "kernel_text"]],
    },
    "IBuilderConfig.set_timing_cache": {major: [["cache", "ignore_mismatch"]] for major in MAJORS},
    "IBuilderConfig.set_memory_pool_limit": {major: [["pool", "pool_size"]] for major in MAJORS},
    "OnnxParser.parse": {major: [["model", "path="]] for major in MAJORS},
    "OnnxParser.parse_from_file": {major: [["model"]] for major in MAJORS},
    # An engine can be read through a stream in 10 and 11, by an interface that 11 has in its second form only.
    "Runtime.deserialize_cuda_engine": {
        8: [["serialized_engine"]],
        10: [["serialized_engine"], ["stream_reader"], ["stream_reader_v2"]],
        11: [["serialized_engine"], ["stream_reader_v2"]],
    },
    "ICudaEngine.create_execution_context": {
        8: [[]],
        10: [["strategy="], ["runtime_config="]],
        11: [["strategy="], ["runtime_config="]],
    },
    "IExecutionContext.set_device_memory": {10: [["memory", "size"]], 11: [["memory", "size"]]},
    "IExecutionContext.set_tensor_address": {major: [["name", "memory"]] for major in MAJORS},
    "IExecutionContext.execute_async_v3": {major: [["stream_handle"]] for major in MAJORS},
    "IExecutionContext.set_aux_streams": {major: [["aux_streams"]] for major in MAJORS},
    "IPluginRegistry.load_library": {major: [["plugin_path"]] for major in MAJORS},
    "IPluginRegistry.get_plugin_creator": {major: [["type", "version", "plugin_namespace="]] for major in (8, 10)},
    "IPluginRegistry.get_creator": {major: [["type", "version", "plugin_namespace="]] for major in (10, 11)},
    "IProgressMonitor.phase_start": {major: [["phase_name", "parent_phase", "num_steps"]] for major in (10, 11)},
    "IProgressMonitor.step_complete": {major: [["phase_name", "step"]] for major in (10, 11)},
    "init_libnvinfer_plugins": {major: [["logger", "namespace"]] for major in MAJORS},
}


def test_names_that_the_project_relies_on(bindings):
    code = """
import json, sys, tensorrt
def has(name):
    found = tensorrt
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None
print(json.dumps([name for name in json.load(sys.stdin) if has(name)]))
"""
    found = set(bindings.evaluate(code, text=json.dumps(sorted(NAMES))))
    expected = {name for name, majors in NAMES.items() if bindings.major in majors}
    assert found == expected


def test_names_are_those_of_the_double(double):
    for name, majors in NAMES.items():
        found: Any = double.module
        for part in name.split("."):
            found = getattr(found, part, None)
        assert (found is not None) == (double.major in majors), name


def test_properties_that_the_project_relies_on(bindings):
    code = """
import json, sys, tensorrt
found = []
for cls, name in json.load(sys.stdin):
    accessors = getattr(getattr(tensorrt, cls), name, None)
    found.append(accessors and ("r" if accessors.fget else "") + ("w" if accessors.fset else ""))
print(json.dumps(found))
"""
    found = bindings.evaluate(code, text=json.dumps(list(PROPERTIES)))
    assert found == [modes.get(bindings.major) for modes in PROPERTIES.values()]


def test_signatures_that_the_project_relies_on(bindings):
    description = bindings.describe()
    for name, by_major in SIGNATURES.items():
        owner, _, method = name.rpartition(".")
        known = description["classes"].get(owner, {}).get("methods", {}) if owner else description["functions"]
        assert [_names(signature) for signature in known.get(method, [])] == by_major.get(bindings.major, []), name


def _names(signature: Dict[str, Any]) -> List[str]:
    return [
        parameter["name"] + ("=" if "default" in parameter else "")
        for parameter in signature["parameters"]
        if parameter["name"] != "self"
    ]


def test_values_of_flags_differ_between_majors():
    """So a flag is always asked for by its name: the number of TF32 in 8 is that of another flag in 10."""
    values = {major: _bindings(major).describe()["classes"]["BuilderFlag"]["members"] for major in MAJORS}
    assert values[8]["TF32"] != values[10]["TF32"]
    assert values[10]["VERSION_COMPATIBLE"] != values[11]["VERSION_COMPATIBLE"]


# ---- The recorder


@pytest.mark.parametrize(
    "line, parameters, returns",
    [
        ("f() -> None", [], "None"),
        ("f(self: tensorrt_bindings.tensorrt.X, a: int) -> bool", [("self", "X"), ("a", "int")], "bool"),
        ("f(arg0: str, /, *, b: float = 0.5) -> str", [("arg0", "str"), ("b", "float", "0.5")], "str"),
        ("f(a: List[Tuple[int, str]] = [(1, ')')]) -> int", [("a", "List[Tuple[int, str]]", "[(1, ')')]")], "int"),
        ("f(a: tensorrt.E = <E.A: 0>, b: str = ', ') -> E", [("a", "E", "<E.A: 0>"), ("b", "str", "', '")], "E"),
        (
            "f(a: nvinfer1::v_1_0::I, *args, **kwargs) -> list[int]",
            [("a", "I"), ("args", "object"), ("kwargs", "object")],
            "list[int]",
        ),
        ("f(a: Callable[[int], bool]) -> typing.SupportsInt", [("a", "Callable[[int], bool]")], "SupportsInt"),
    ],
)
def test_signatures_are_read_from_docstrings(line, parameters, returns):
    signature = tensorrt_recorder.parse_signature(line)
    assert signature["returns"] == returns
    found = [(one["name"], one["type"], one.get("default")) for one in signature["parameters"]]
    assert found == [(*one, None)[:3] for one in parameters]


def test_overloads_are_read_in_order():
    text = "f(*args, **kwargs)\nOverloaded function.\n\n1. f(a: int) -> None\n\n  More: f(x)\n\n2. f(b: str) -> bool\n"
    found = tensorrt_recorder.parse_docstring(text)
    assert [(one["parameters"][0]["name"], one["returns"]) for one in found] == [("a", "None"), ("b", "bool")]


def test_a_docstring_without_a_signature_has_none():
    for text in (None, "", "Initialize self.  See help(type(self)) for accurate signature.", "No signature (here)."):
        assert tensorrt_recorder.parse_docstring(text) == []


# ---- The double against the bindings


def test_the_double_takes_and_refuses_what_the_bindings_do(bindings, double):
    """Thousands of right and wrong calls and assignments, each made on both."""
    cases = tensorrt_probe.cases_of(bindings.describe())
    double.returns("Builder.build_serialized_network", b"plan")
    prober = tensorrt_probe.Prober(double.module)
    expected = [_outcome_on_double(prober, case) for case in cases]
    for case, outcome in zip(cases, expected):
        case["child"] = outcome == tensorrt_probe.ACCEPTED
    done = bindings.run("-c", Path(tensorrt_probe.__file__).read_text(encoding="utf-8"), text=json.dumps(cases))
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases), f"the probe ended at {cases[len(found)]}: {done.stderr[-2000:]}"
    different = [(case, real, ours) for case, real, ours in zip(cases, found, expected) if real != ours]
    assert not different
    assert expected.count(tensorrt_probe.ACCEPTED) > 450
    assert expected.count("TypeError") > 900


def _outcome_on_double(prober: tensorrt_probe.Prober, case: Dict[str, Any]) -> str:
    try:
        prober.action(case)()
    except NotScripted:
        return tensorrt_probe.ACCEPTED
    except (AttributeError, TypeError) as error:
        return type(error).__name__
    return tensorrt_probe.ACCEPTED


def test_values_work_as_those_of_the_bindings(bindings, double):
    """Expressions whose answers need no library: enums, shapes, loggers, the functions written in Python."""
    expressions = [
        "int(trt.BuilderFlag.TF32)",
        "str(trt.BuilderFlag.TF32) + repr(trt.BuilderFlag.TF32)",
        "trt.BuilderFlag.TF32 == int(trt.BuilderFlag.TF32)",
        "trt.BuilderFlag.TF32 == trt.BuilderFlag.TF32 and trt.BuilderFlag.TF32 in {trt.BuilderFlag.TF32}",
        "trt.BuilderFlag(int(trt.BuilderFlag.TF32)).name",
        "1 << int(trt.BuilderFlag.TF32)",
        "1 << trt.BuilderFlag.TF32",
        "trt.BuilderFlag.TF32 | trt.BuilderFlag.DEBUG",
        "sorted(trt.DataType.__members__)",
        "[trt.float32.name, trt.float16.name, trt.float32 == trt.DataType.FLOAT, trt.float16.itemsize]",
        "[trt.nptype(trt.float16).__name__, trt.nptype(trt.bool).__name__]",
        "trt.nptype(trt.fp8)",
        "trt.Logger.WARNING == trt.ILogger.Severity.WARNING == trt.Logger.Severity.WARNING",
        "[trt.Logger.VERBOSE > trt.Logger.ERROR, trt.BuilderFlag.TF32 > 1]",
        "trt.BuilderFlag.TF32 > 1",
        "list(trt.Dims((2, 3)))",
        "[len(trt.Dims([2, 3])), trt.Dims((2, 3))[1], trt.Dims((2, 3))[0:1], trt.Dims((2, 3)) == (2, 3)]",
        "list(trt.Dims4(1, 2, 3, 4)) + list(trt.Dims2((5, 6)))",
        "[trt.volume((2, 3)), trt.volume(trt.Dims((4, 5))), trt.volume(())]",
        "hash(trt.Dims((1,)))",
        "trt.Dims('x')",
        "trt.Logger(2)",
        "trt.Logger(min_severity=trt.Logger.ERROR) is not None",
        "trt.ICudaEngine()",
        "trt.Builder(None)",
        "trt.no_such_name",
        "trt.BuilderFlag.no_such_flag",
        "isinstance(trt.Logger(), trt.ILogger)",
        "type('Mine', (trt.ILogger,), {'__init__': lambda self: None})()",
        "type('Mine', (trt.ILogger,), {'__init__': lambda self: trt.ILogger.__init__(self)})().anything",
        "setattr(type('Mine', (trt.ILogger,), {})(), 'mine', 1)",
        "setattr(trt.Logger(), 'mine', 1)",
    ]
    code = f"import json, sys, tensorrt\n{EVALUATE}\nprint(json.dumps(evaluate(tensorrt, json.load(sys.stdin))))"
    real = bindings.evaluate(code, text=json.dumps(expressions))
    scope: Dict[str, Any] = {}
    exec(EVALUATE, scope)
    ours = json.loads(json.dumps(scope["evaluate"](double.module, expressions)))  # tuples become lists
    assert dict(zip(expressions, ours)) == dict(zip(expressions, real))


EVALUATE = """
def evaluate(trt, expressions):
    answers = []
    for expression in expressions:
        try:
            answers.append(eval(expression, {"trt": trt}))
        except Exception as error:
            answers.append(type(error).__name__)
    return answers
"""


# ---- The double by itself


def test_a_double_stands_for_the_module_and_records_in_order(double):
    double.returns("Builder.build_serialized_network", b"the plan")
    with double.installed():
        import tensorrt as trt

        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.TF32)
        config.max_aux_streams = 0
        plan = builder.build_serialized_network(builder.create_network(), config)
        assert sys.modules["tensorrt_bindings"] is trt
    assert sys.modules.get("tensorrt") is not double.module
    assert bytes(plan) == b"the plan" and plan.nbytes == 8
    assert double.names() == [
        *("Logger", "Builder", "Builder.create_builder_config", "IBuilderConfig.set_flag"),
        *("IBuilderConfig.max_aux_streams=", "Builder.create_network", "Builder.build_serialized_network"),
    ]
    (call,) = double.calls_of("IBuilderConfig.set_flag")
    assert call.receiver is config and call["flag"] == double.module.BuilderFlag.TF32
    assert config.max_aux_streams == 0
    assert not double.refused


def test_a_module_that_was_there_is_there_again(double, monkeypatch):
    before = object()
    monkeypatch.setitem(sys.modules, "tensorrt", before)
    with pytest.raises(ZeroDivisionError), double.installed():
        raise ZeroDivisionError
    assert sys.modules["tensorrt"] is before


def test_a_plan_can_be_written_and_read_as_a_buffer(double, tmp_path):
    plan = double.make("IHostMemory", b"abc")
    (tmp_path / "plan").write_bytes(plan)
    assert (tmp_path / "plan").read_bytes() == bytes(memoryview(plan)) == b"abc"
    with pytest.raises(AttributeError):
        plan.decode()
    with pytest.raises(TypeError):
        len(plan)


def test_answers_are_scripted(double):
    names = ["x", "noise"]
    engine = double.make("ICudaEngine", num_io_tensors=2)
    double.returns("Runtime.deserialize_cuda_engine", engine)
    double.returns("ICudaEngine.get_tensor_name", lambda call: names[call["index"]])
    double.returns("ICudaEngine.get_tensor_shape", (1, 4, 32, 48))
    double.raises("ICudaEngine.create_execution_context", MemoryError("out of memory"))
    with double.installed() as trt:
        runtime = trt.Runtime(trt.Logger())
        found = runtime.deserialize_cuda_engine(b"plan")
        assert [found.get_tensor_name(index) for index in range(found.num_io_tensors)] == names
        assert tuple(found.get_tensor_shape("x")) == (1, 4, 32, 48)
        with pytest.raises(MemoryError, match="out of memory"):
            found.create_execution_context()
    contexts = [double.make("IExecutionContext") for _ in range(2)]
    double.returns("IExecutionContext.execute_async_v3", False, on=contexts[1])
    assert [context.execute_async_v3(7) for context in contexts] == [True, False]
    double.returns_each("IExecutionContext.set_tensor_address", [True, False])
    assert [contexts[0].set_tensor_address("x", 256) for _ in range(2)] == [True, False]
    with pytest.raises(NotScripted, match="after the last"):
        contexts[0].set_tensor_address("x", 256)


def test_what_no_script_says_is_an_error_of_the_test(double):
    engine = double.make("ICudaEngine")
    for action in (lambda: engine.num_io_tensors, lambda: engine.get_tensor_name(0)):
        with pytest.raises(NotScripted, match="has to say"):
            action()


def test_scripts_are_checked_too(double):
    for target in ("ICudaEngine.no_such_name", "NoSuchClass", "ICudaEngine.num_io_tensors="):
        with pytest.raises(ValueError, match="defines no"):
            double.returns(target, 1)
    with pytest.raises(ValueError, match="defines no"):
        double.calls_of("IBuilderConfig.set_flagg")
    with pytest.raises(ValueError, match="has no"):
        double.make("ICudaEngine", no_such_property=1)
    double.returns("IExecutionContext.execute_async_v3", "yes")
    with pytest.raises(NotScripted, match="never 'yes'"):
        double.make("IExecutionContext").execute_async_v3(0)


def test_refusals_are_kept_even_where_the_code_handles_them(double):
    config = double.make("IBuilderConfig")
    for action in (
        lambda: config.set_flag("TF32"),
        lambda: config.set_flag(flags=double.module.BuilderFlag.TF32),
        lambda: setattr(config, "optimization_level", 5),
        lambda: setattr(double.make("OnnxParser"), "num_errors", 0),
        lambda: setattr(config, "max_aux_streams", "none"),
    ):
        with pytest.raises((TypeError, AttributeError)):
            action()
    assert len(double.refused) == 5 and not double.calls
    assert all(double.version in text for text in double.refused)


def test_a_subclass_has_to_take_what_it_is_called_with():
    double = TensorRTDouble.load(_bindings(10).major)
    with double.installed() as trt:

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.phases: List[str] = []

            def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
                self.phases.append(phase_name)

        config = double.make("IBuilderConfig")
        config.progress_monitor = monitor = Monitor()
        config.progress_monitor.phase_start("building", None, 3)
        assert monitor.phases == ["building"]
        config.progress_monitor = None
        with pytest.raises(TypeError, match="called with 4 arguments"):
            type("Short", (trt.IProgressMonitor,), {"phase_start": lambda self, phase_name: None})


def test_numbers_of_numpy_are_taken_where_the_bindings_take_them(double):
    context = double.make("IExecutionContext")
    assert context.set_tensor_address("x", np.int64(256))
    with pytest.raises(TypeError):
        context.set_tensor_address("x", 256.0)


# ---- Making them


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tensorrt_bindings, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(tensorrt_bindings, "_interpreters", lambda: [("cp311", sys.executable)])
    return tmp_path / "cache"


def test_without_a_network_the_reason_is_said(empty_cache, monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(BindingsMissing, match=r"cp311: pip got no wheel of tensorrt-bindings: ERROR: .*"):
        tensorrt_bindings._make(8, *PACKAGES[8])
    assert not list(empty_cache.glob("8.6.1*")) and not list(empty_cache.glob(".making-*"))


def test_without_a_compiler_the_reason_is_said(empty_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BindingsMissing, match="there is no cc"):
        tensorrt_bindings._make(10, *PACKAGES[10])


def test_many_at_once_make_them_once_and_leftovers_go(empty_cache, monkeypatch):
    source = _bindings(10)
    downloads = []

    def download(target: Path, *_: str) -> Path:
        downloads.append(target)
        time.sleep(0.1)
        wheel = target / "bindings.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path in (source.folder / "tensorrt_bindings").glob("*.*"):
                archive.write(path, f"tensorrt_bindings/{path.name}")
        return wheel

    monkeypatch.setattr(tensorrt_bindings, "_download", download)
    monkeypatch.setattr(tensorrt_bindings, "_interpreters", lambda: [("cp311", source.python)])
    (empty_cache / ".making-killed").mkdir(parents=True)
    made: List[tensorrt_bindings.Bindings] = []
    threads = [threading.Thread(target=lambda: made.append(tensorrt_bindings._make(10, *PACKAGES[10]))) for _ in "four"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and len(downloads) == 1
    assert sorted(path.name for path in empty_cache.iterdir()) == [".lock", "10.13.3.9-cp311"]
    assert made[0].evaluate("import json, tensorrt; print(json.dumps(tensorrt.__version__))") == "10.13.3.9"
