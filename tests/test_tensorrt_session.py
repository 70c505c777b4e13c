"""Running TensorRT's plans, on doubles of 8.6, 10 and 11 whose engines compute by PyTorch what the plan's name says.

A call that a version does not have, or takes otherwise, is refused by its double. The engines read and write memory by
the addresses that they are given, as TensorRT does, so whole images come out, and have to be those of PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest
import torch

from cldm.checkpoint import load_model
from cldm.model import ControlLDM
from cldm.request import Request
from cldm.tokenizer import Tokenizer
from cldm.weights import Weights, find_weights
from deploy.graphs import build_graph
from deploy.manifest import ArtefactError
from deploy.plan_manifest import Machine, plan_path
from deploy.plugin_library import PluginLibrary
from deploy.spec import STEPS, Build, GraphSpec, graph_specs
from deploy.tensorrt_versions import TensorRTError
from deploy.toolchain import Gpu
from runtime import backends, tensorrt_backend, tensorrt_session
from runtime.backends import BackendError, choose_backend
from runtime.cuda_runtime import CudaError
from runtime.pipeline import About, Pipeline
from runtime.tensorrt_backend import TensorRTBackend
from runtime.tensorrt_session import TensorRTRuntime, TensorRTSession
from runtime.torch_session import TorchSession
from runtime.workspace import aligned_rows
from tests import tensorrt_bindings
from tests.builder_double import install_plans, make_library
from tests.small_model import small_config
from tests.tape import TapeGraphs
from tests.tensorrt_double import Call, TensorRTDouble

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 64
BUILD = Build(small_config(), SIZE, SIZE)
SPECS = graph_specs(BUILD)
STREAM = 94
GPU = Gpu("NVIDIA Double", "9.0")
SOURCE = "0123456789abcdef"
# Bytes of activation memory; the largest is not the first.
ACTIVATIONS = {"text": 1000, "hint": 300, "time": 0, "step": 5000, "decode": 4000}
TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "uint8": "UINT8"}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return find_weights(BUILD.config)


@pytest.fixture(scope="module")
def model(weights: Weights) -> ControlLDM:
    return load_model(BUILD.config, weights)


@pytest.fixture(scope="module")
def modules(model: ControlLDM) -> Dict[str, Any]:
    return {name: build_graph(name, model, "fp32", 1) for name in SPECS}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Blocks with clear edges."""
    coarse = np.random.default_rng(3).integers(0, 2, (SIZE // 16, SIZE // 16, 3), dtype=np.uint8) * 200
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


class Engines:
    """Scripts a double: a plan's content is the name of its graph, and its engine runs that graph's module.

    Attributes
    ----------
    says : list of str
        What TensorRT tells its logger at the next call that fails.
    """

    def __init__(self, double: TensorRTDouble, modules: Dict[str, Any]) -> None:
        self.double = double
        self.specs: Dict[str, GraphSpec] = dict(SPECS)
        self.says: List[str] = []
        self.memory: List[Tuple[int, int]] = []
        self._modules = modules
        self._logger: Any = None
        double.returns("Runtime", self._keep_logger)
        double.returns("Runtime.deserialize_cuda_engine", self._deserialise)

    def fail(self, target: str, answer: Any, *words: str) -> None:
        """Let a call fail, and TensorRT say why."""

        def failing(call: Call) -> Any:
            self.tell(*words)
            return answer

        self.double.returns(target, failing)

    def tell(self, *words: str) -> None:
        error = self.double.module.ILogger.Severity.ERROR
        for text in words:
            self._logger.log(error, text)

    def _keep_logger(self, call: Call) -> None:
        self._logger = call["logger"]

    def _deserialise(self, call: Call) -> Any:
        name = bytes(call["serialized_engine"]).decode()
        if name not in self.specs:
            self.tell("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed", "magicTag")
            return None
        spec, double, trt = self.specs[name], self.double, self.double.module
        names = list(spec.tensors)
        size = "device_memory_size" if double.major == 8 else "device_memory_size_v2"
        engine = double.make("ICudaEngine", num_io_tensors=len(names), **{size: ACTIVATIONS[name]})
        modes = trt.TensorIOMode
        answers = {
            "get_tensor_name": lambda call: names[call["index"]],
            "get_tensor_mode": lambda call: modes.INPUT if call["name"] in spec.inputs else modes.OUTPUT,
            "get_tensor_dtype": lambda call: getattr(trt.DataType, TYPES[spec.tensors[call["name"]].dtype]),
            "get_tensor_shape": lambda call: tuple(
                -1 if dim == STEPS else dim for dim in spec.tensors[call["name"]].shape
            ),
            ("create_execution_context_without_device_memory" if double.major == 8 else "create_execution_context"): (
                lambda call: self._context(name)
            ),
        }
        for method, answer in answers.items():
            double.returns(f"ICudaEngine.{method}", answer, on=engine)
        return engine

    def _context(self, name: str) -> Any:
        context = self.double.make("IExecutionContext")
        addresses: Dict[str, int] = {}
        shapes: Dict[str, Tuple[int, ...]] = {}

        def set_address(call: Call) -> bool:
            addresses[call["name"]] = call["memory"]
            return True

        def set_shape(call: Call) -> bool:
            shapes[call["name"]] = tuple(call["shape"])
            return True

        def execute(call: Call) -> bool:
            assert call["stream_handle"] == STREAM
            self._run(name, addresses, shapes)
            return True

        for method, answer in (
            ("set_tensor_address", set_address),
            ("set_input_shape", set_shape),
            ("execute_async_v3", execute),
        ):
            self.double.returns(f"IExecutionContext.{method}", answer, on=context)
        return context

    def _run(self, name: str, addresses: Dict[str, int], shapes: Dict[str, Tuple[int, ...]]) -> None:
        spec = self.specs[name]
        steps = next((shape[0] for shape in shapes.values()), None)

        def tensor(key: str) -> torch.Tensor:
            described = spec.tensors[key]
            shape = [steps if dim == STEPS else dim for dim in described.shape]
            kind = np.dtype(described.dtype)
            memory = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(addresses[key])
            return torch.from_numpy(np.frombuffer(memory, dtype=kind).reshape(shape))

        buffers = {key: tensor(key) for key in spec.tensors}
        TorchSession(self._modules[name], spec).bind(buffers).enqueue()

    def activations(self) -> List[Tuple[int, Optional[int]]]:
        """Address and size of what contexts were given to work in; 8.6 is told no size."""
        if self.double.major == 8:
            return [(call["value"], None) for call in self.double.calls_of("IExecutionContext.device_memory=")]
        return [(call["memory"], call["size"]) for call in self.double.calls_of("IExecutionContext.set_device_memory")]


@pytest.fixture(params=tensorrt_bindings.MAJORS)
def engines(request: Any, modules: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    reason = tensorrt_bindings.missing_reason(request.param)
    if reason:
        pytest.skip(reason)
    double = TensorRTDouble.load(request.param)
    monkeypatch.setattr(tensorrt_session, "current_stream", lambda device: STREAM)
    with double.installed():
        yield Engines(double, modules)
    assert not double.refused


def write_plans(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in SPECS.items():
        plan_path(folder, spec).write_text(name, encoding="ascii")
    return folder


def make_sessions(folder: Path, runtime: TensorRTRuntime) -> Dict[str, TensorRTSession]:
    return {name: TensorRTSession(plan_path(folder, spec), spec, runtime) for name, spec in SPECS.items()}


def buffers_of(name: str, steps: int = 3) -> Dict[str, torch.Tensor]:
    return {
        key: torch.zeros(
            [steps if dim == STEPS else int(dim) for dim in tensor.shape], dtype=getattr(torch, tensor.dtype)
        )
        for key, tensor in SPECS[name].tensors.items()
    }


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_graph", [False, True])
def test_images_are_those_of_torch(
    with_graph: bool, engines: Engines, modules: Dict[str, Any], picture: np.ndarray, tmp_path: Path
) -> None:
    """Through the pipeline: every schedule length, number of samples and kind of noise, enqueued and replayed."""
    tokenizer, about = Tokenizer(BUILD.config), About("seeded", "tensorrt", "test")
    sessions = make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))
    ours = Pipeline(BUILD, sessions, tokenizer, about, graphs=TapeGraphs() if with_graph else None)
    theirs = Pipeline(BUILD, {n: TorchSession(modules[n], s) for n, s in SPECS.items()}, tokenizer, about)
    for steps, samples, eta, strength in ((2, 1, 0.0, 1.0), (3, 2, 0.5, 0.4), (2, 1, 0.0, 0.7)):
        request = Request(
            "a bird", image_resolution=SIZE, ddim_steps=steps, num_samples=samples, eta=eta, strength=strength, seed=1
        )
        found, wanted = ours.generate(picture, request), theirs.generate(picture, request)
        assert np.array_equal(found.latent, wanted.latent)
        assert all(np.array_equal(one, other) for one, other in zip(found.images, wanted.images))
        assert not found.receipt.warnings
    ours.close()
    with pytest.raises(RuntimeError, match="the session of step is closed"):
        sessions["step"].bind(buffers_of("step"))


def test_all_engines_work_in_one_memory(engines: Engines, tmp_path: Path) -> None:
    """As large as the largest needs; nothing is allocated by TensorRT, and the last to leave frees it."""
    runtime = TensorRTRuntime("cpu")
    sessions = make_sessions(write_plans(tmp_path), runtime)
    for name, session in sessions.items():
        session.bind(buffers_of(name)).enqueue()
    ((address, size),) = set(engines.activations())
    assert size in (None, 5000)
    assert len(engines.activations()) == len(SPECS)
    memory = runtime._activations
    assert memory is not None
    assert memory.address() == (address, 5000)
    made = engines.double.calls_of("ICudaEngine.create_execution_context")
    strategies = [] if engines.double.major == 8 else [call["strategy"].name for call in made]
    assert strategies == [] if engines.double.major == 8 else ["USER_MANAGED"] * 5
    for session in sessions.values():
        assert memory._memory is not None
        session.close()
        session.close()
    assert memory._memory is None


def test_memory_in_use_does_not_move(engines: Engines, tmp_path: Path) -> None:
    """A captured graph knows its address: an engine that needs more gets another."""
    folder = write_plans(tmp_path)
    runtime = TensorRTRuntime("cpu")
    text = TensorRTSession(plan_path(folder, SPECS["text"]), SPECS["text"], runtime)
    text.bind(buffers_of("text")).enqueue()
    step, hint = (TensorRTSession(plan_path(folder, SPECS[name]), SPECS[name], runtime) for name in ("step", "hint"))
    step.bind(buffers_of("step")).enqueue()
    hint.bind(buffers_of("hint")).enqueue()
    first, second, third = (address for address, _ in engines.activations())
    assert first != second
    assert third == second
    text.bind(buffers_of("text")).enqueue()
    assert len(engines.activations()) == 3


def test_bindings_of_one_session_take_turns(engines: Engines, tmp_path: Path) -> None:
    """Addresses are set where the other binding ran last, and only there."""
    session = make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))["time"]
    one, two = buffers_of("time", 2), buffers_of("time", 5)
    one["timesteps"].copy_(torch.tensor([7, 900]))
    two["timesteps"].copy_(torch.tensor([1, 2, 3, 4, 5]))
    bound_one, bound_two = session.bind(one), session.bind(two)
    counts = []
    for bound in (bound_one, bound_one, bound_two, bound_one):
        bound.enqueue()
        counts.append(len(engines.double.calls_of("IExecutionContext.set_tensor_address")))
    assert counts == [2, 2, 4, 6]
    shapes = [tuple(call["shape"]) for call in engines.double.calls_of("IExecutionContext.set_input_shape")]
    assert shapes == [(2,), (5,), (2,)]
    assert torch.count_nonzero(one["time_biases"]) > 0
    assert not torch.equal(one["time_biases"][0], two["time_biases"][0])


class Misplaced:
    """A tensor of a GPU that does not begin where TensorRT wants it."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor, offset: int) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._offset = offset

    def is_contiguous(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return 4096 + self._offset


def test_addresses_that_tensorrt_does_not_take(engines: Engines, tmp_path: Path) -> None:
    session = make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))["hint"]
    buffers: Dict[str, Any] = buffers_of("hint")
    session.bind({**buffers, "canny": Misplaced(buffers["canny"], 256)})
    with pytest.raises(ValueError, match="hint: tensor canny must begin at a multiple of 256 bytes"):
        session.bind({**buffers, "canny": Misplaced(buffers["canny"], 12)})
    with pytest.raises(ValueError, match="canny must be contiguous uint8"):
        session.bind({**buffers, "canny": buffers["canny"].float()})


@pytest.mark.parametrize(("width", "dtype"), [(3, "float32"), (29760, "float16"), (64, "float32"), (1, "float16")])
def test_rows_of_a_schedule_begin_where_tensorrt_wants_them(width: int, dtype: str) -> None:
    rows = aligned_rows(4, width, dtype, "cpu")
    assert rows.shape == (4, width)
    for i in range(4):
        row = rows[i : i + 1]
        assert row.is_contiguous()
        assert (row.data_ptr() - rows.data_ptr()) % 256 == 0
    assert rows.untyped_storage().nbytes() < 4 * (width * rows.element_size() + 256)


# -- what TensorRT refuses ---------------------------------------------------------------------------------------------

OUT_OF_MEMORY = "Error Code 2: OutOfMemory (Requested size was 123 bytes.)"


def enqueue_step(folder: Path) -> None:
    session = TensorRTSession(plan_path(folder, SPECS["step"]), SPECS["step"], TensorRTRuntime("cpu"))
    try:
        session.bind(buffers_of("step")).enqueue()
    finally:
        session.close()
        assert session._context is None
        assert session._engine is None


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("set_tensor_address", "bad pointer", "the engine of step does not take the address of latent .bad pointer"),
        ("execute_async_v3", "cuDNN failure", "the engine of step does not run .cuDNN failure"),
        ("execute_async_v3", OUT_OF_MEMORY, "the GPU has too little memory for step .*OutOfMemory.*fewer samples"),
    ],
)
def test_a_call_that_answers_false(target: str, words: str, message: str, engines: Engines, tmp_path: Path) -> None:
    context = engines._context

    def refusing(name: str) -> Any:
        made = context(name)

        def answer(call: Call) -> bool:
            engines.tell(words)
            return False

        engines.double.returns(f"IExecutionContext.{target}", answer, on=made)
        return made

    engines._context = refusing  # type: ignore[method-assign]
    with pytest.raises(TensorRTError, match=message):
        enqueue_step(write_plans(tmp_path))


def test_a_schedule_length_that_was_not_built(engines: Engines, tmp_path: Path) -> None:
    engines.fail("IExecutionContext.set_input_shape", False, "5000 is not in [1, 1000]")
    context = engines._context

    def refusing(name: str) -> Any:
        made = context(name)
        engines.double.returns("IExecutionContext.set_input_shape", False, on=made)
        return made

    engines._context = refusing  # type: ignore[method-assign]
    session = make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))["time"]
    with pytest.raises(TensorRTError, match=r"engine of time was not built for timesteps of shape \(7,\)"):
        session.bind(buffers_of("time", 7)).enqueue()


@pytest.mark.parametrize(("words", "message"), [("bad", "makes no context of .*bad"), (OUT_OF_MEMORY, "too little")])
def test_no_context(words: str, message: str, engines: Engines, tmp_path: Path) -> None:
    def none(name: str) -> None:
        engines.tell(words)

    engines._context = none  # type: ignore[method-assign]
    with pytest.raises(TensorRTError, match=message):
        enqueue_step(write_plans(tmp_path))


def fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no room for activations."""
    empty = torch.empty

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.uint8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 5000 bytes")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", full)


def test_no_room_for_activations(engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_plans(tmp_path)
    fill_memory(monkeypatch)
    with pytest.raises(TensorRTError, match="no 0.00 GB left for the engines to work in: end other programs"):
        enqueue_step(folder)


def test_an_error_of_an_earlier_run_is_not_told_again(engines: Engines, tmp_path: Path) -> None:
    """Nor taken for the reason: the one before it was of memory."""
    session = make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))["hint"]
    bound = session.bind(buffers_of("hint"))
    engines.tell(OUT_OF_MEMORY)
    bound.enqueue()
    engines.tell(OUT_OF_MEMORY)
    engines.double.returns("IExecutionContext.execute_async_v3", False, on=session._context)
    with pytest.raises(TensorRTError, match="^the engine of hint does not run$"):
        bound.enqueue()


@pytest.mark.parametrize("content", [b"", b"ste", b"another TensorRT's plan", None])
def test_a_plan_that_is_none(content: Optional[bytes], engines: Engines, tmp_path: Path) -> None:
    path = plan_path(write_plans(tmp_path), SPECS["step"])
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    message = "does not take .*magicTag.*build it anew" if content else "control_unet.plan cannot be read"
    with pytest.raises(ArtefactError, match=message):
        enqueue_step(tmp_path)


def test_no_room_for_an_engine(engines: Engines, tmp_path: Path) -> None:
    engines.fail("Runtime.deserialize_cuda_engine", None, OUT_OF_MEMORY)
    with pytest.raises(TensorRTError, match="too little memory for deserialising .*control_unet.plan"):
        enqueue_step(write_plans(tmp_path))


@pytest.mark.parametrize("change", ["shape", "type", "name", "direction"])
def test_an_engine_with_other_tensors(change: str, engines: Engines, tmp_path: Path) -> None:
    spec = SPECS["decode"]
    wider = graph_specs(Build(BUILD.config, SIZE, 2 * SIZE))["decode"]
    half = graph_specs(Build(BUILD.config, SIZE, SIZE, precision="fp16"))["hint"].outputs["hint_features"]
    engines.specs["decode"] = {
        "shape": wider,
        "type": GraphSpec("decode", spec.file, {"latent": half}, spec.outputs),
        "name": GraphSpec("decode", spec.file, {"z": spec.inputs["latent"]}, spec.outputs),
        "direction": GraphSpec("decode", spec.file, {}, spec.tensors),
    }[change]
    words = {"shape": r"\(1, 64, 128, 3\)", "type": "float16", "name": "not there", "direction": "an output of float32"}
    with pytest.raises(ArtefactError, match=f"is not the plan of decode: .*{words[change]}.*was wanted"):
        make_sessions(write_plans(tmp_path), TensorRTRuntime("cpu"))


def test_tensorrt_does_not_start(engines: Engines) -> None:
    engines.double.raises("Runtime", TypeError("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(TensorRTError, match="does not start; the driver may be too old"):
        TensorRTRuntime("cpu")


def test_a_closed_runtime(engines: Engines, tmp_path: Path) -> None:
    runtime = TensorRTRuntime("cpu")
    runtime.close()
    runtime.close()
    with pytest.raises(TensorRTError, match="closed"):
        make_sessions(write_plans(tmp_path), runtime)


def script_registry(engines: Engines, found: List[Any], handle: Any) -> None:
    """The plugin's creator is what `found` has, one after the other, and loading a library answers `handle`."""
    double = engines.double
    name = "IPluginRegistry.get_plugin_creator" if double.major == 8 else "IPluginRegistry.get_creator"
    double.returns_each(name, found)
    double.returns("IPluginRegistry.load_library", handle)


def test_the_plugin_is_loaded_once(engines: Engines, tmp_path: Path) -> None:
    creator = engines.double.make("IPluginCreator" if engines.double.major == 8 else "IPluginCreatorV3One")
    script_registry(engines, [None, creator, creator], object())
    for _ in range(2):
        TensorRTRuntime("cpu").load_plugin(tmp_path / "libgroup_norm.so")
    (call,) = engines.double.calls_of("IPluginRegistry.load_library")
    assert call["plugin_path"] == str(tmp_path / "libgroup_norm.so")


def test_a_plugin_that_does_not_load(engines: Engines, tmp_path: Path) -> None:
    """What TensorRT says of it comes to our logger, which the runtime brings, and what the loader says as well."""
    script_registry(engines, [None, None, None], None)
    engines.fail("IPluginRegistry.load_library", None, "undefined symbol: cudaLaunchKernelExC")
    message = "did not load the plugin .*libgroup_norm.so .undefined symbol: cudaLaunch.*: .*No such file.*build.sh"
    with pytest.raises(TensorRTError, match=message):
        TensorRTRuntime("cpu").load_plugin(tmp_path / "libgroup_norm.so")
    names = engines.double.names()
    assert names.index("Runtime") < names.index("IPluginRegistry.load_library")


@pytest.mark.parametrize("status", [0, 2])
def test_a_plugin_that_registers_itself(
    status: int, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading gave no creator of our namespace; the library's own function does, or answers why not."""
    creator = engines.double.make("IPluginCreator" if engines.double.major == 8 else "IPluginCreatorV3One")
    script_registry(engines, [None, None, None if status else creator], object())
    opened: List[str] = []

    def library(file: str) -> Any:
        opened.append(file)
        return SimpleNamespace(canny2imageRegister=lambda: status)

    monkeypatch.setattr(ctypes, "CDLL", library)
    refused = pytest.raises(TensorRTError, match="did not load .*: registering it answers 2; build it anew")
    with refused if status else contextlib.nullcontext():
        TensorRTRuntime("cpu").load_plugin(tmp_path / "libgroup_norm.so")
    assert opened == [str(tmp_path / "libgroup_norm.so")]


# -- the backend -------------------------------------------------------------------------------------------------------


class Driver:
    """`CudaRuntime` of a machine that has one."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as choosing a backend goes; sessions run on the CPU."""

    def runtime(device: str, **options: Any) -> TensorRTRuntime:
        assert device == "cuda"
        return TensorRTRuntime("cpu", **options)

    monkeypatch.setattr(tensorrt_backend, "TensorRTRuntime", runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(backends, "cuda_problem", lambda: None)
    monkeypatch.setattr(tensorrt_backend, "find_gpu", lambda: GPU)
    monkeypatch.setattr(tensorrt_backend, "driver_problem", lambda: None)
    monkeypatch.setattr(tensorrt_backend, "CudaRuntime", Driver)


def install(folder: Path, weights: Weights, version: str, gpu: Gpu = GPU, plugin: Optional[str] = None) -> Path:
    return install_plans(folder, BUILD, weights, Machine(version, gpu.name, gpu.compute_capability, plugin))


def choose(folder: Path, weights: Weights, name: Optional[str] = None, build: Build = BUILD) -> Tuple[Any, str]:
    return choose_backend(name, None, weights, lambda: None, folder, wanted=lambda precision: build)


def test_tensorrt_is_preferred_where_its_engines_are(
    engines: Engines, gpu: None, weights: Weights, tmp_path: Path
) -> None:
    install(tmp_path, weights, engines.double.version)
    backend, reason = choose(tmp_path, weights)
    assert isinstance(backend, TensorRTBackend)
    assert "engines are built" in reason
    assert (backend.name, backend.device, backend.precisions) == ("tensorrt", "cuda", ("fp16", "fp32"))
    assert backend.graphs() is not None
    sessions = backend.sessions(BUILD)
    assert list(sessions) == list(SPECS)
    assert len(engines.double.calls_of("Runtime.deserialize_cuda_engine")) == 5, "loaded again after the choice"
    memory = engines.activations()
    assert len(memory) == 5, "each has the memory that it works in"
    assert len(set(memory)) == 1
    sessions["hint"].bind(buffers_of("hint")).enqueue()
    assert engines.activations() == memory
    other = backend.sessions(BUILD)
    assert len(engines.double.calls_of("Runtime.deserialize_cuda_engine")) == 10, "they are a pipeline's own"
    assert len(engines.double.calls_of("Runtime")) == 1
    for session in (*sessions.values(), *other.values()):
        session.close()
    backend.close()
    backend.close()


def remove(target: Path) -> None:
    for spec in SPECS.values():
        plan_path(target, spec).unlink()
        plan_path(target, spec).with_name(plan_path(target, spec).name + ".json").unlink()


def truncate(target: Path) -> None:
    plan_path(target, SPECS["step"]).write_text("st", encoding="ascii")


def corrupt(target: Path) -> None:
    plan_path(target, SPECS["step"]).write_text("sTep", encoding="ascii")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "clip.plan was not made.*build it with: python3 build_engines.py .*--height 64 --width 64"),
        ("truncated", "control_unet.plan is truncated"),
        ("corrupt", "control_unet.plan is corrupt"),
        ("tensorrt", "tensorrt is 9.9.9, wanted"),
        ("gpu", "gpu is NVIDIA Other, wanted NVIDIA Double"),
        ("weights", "weights is .* wanted"),
        ("no plugin", "needs the plugin library, which is not built for TensorRT"),
        ("other plugin", "was built with another plugin"),
        ("size", "was not made.*build_engines.py .*--height 64 --width 128"),
        ("samples", "was not made.*build_engines.py .*--samples 2"),
        ("bf16", "it runs fp16, fp32, not bf16"),
    ],
)
def test_plans_that_cannot_run_here(
    case: str,
    message: str,
    engines: Engines,
    gpu: None,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where TensorRT was asked for the message is an error, else the reason for PyTorch; nothing is deserialised."""
    other_gpu = Gpu("NVIDIA Other", "9.0")
    of_case = {"tensorrt": ("9.9.9", GPU, None), "gpu": (engines.double.version, other_gpu, None)}
    with_plugin = (engines.double.version, GPU, SOURCE)
    of_case.update({"no plugin": with_plugin, "other plugin": with_plugin})
    target = install(tmp_path, weights, *of_case.get(case, (engines.double.version, GPU, None)))
    {"missing": remove, "truncated": truncate, "corrupt": corrupt}.get(case, lambda target: None)(target)
    if case == "other plugin":
        found = PluginLibrary(tmp_path / "lib.so", "fedcba9876543210", engines.double.version)
        monkeypatch.setattr(tensorrt_backend, "find_plugin", lambda *_: found)
    build = {
        "size": Build(BUILD.config, SIZE, 2 * SIZE),
        "samples": Build(BUILD.config, SIZE, SIZE, 2),
        "bf16": Build(BUILD.config, SIZE, SIZE, precision="bf16"),
    }.get(case, BUILD)
    if case == "weights":
        weights = Weights(None, 99, "0" * 16)
    backend, reason = choose(tmp_path, weights, "tensorrt", build)
    assert reason == "asked for"
    with pytest.raises(ArtefactError, match=message):
        backend.sessions(build)
    fallback, reason = choose(tmp_path, weights, None, build)
    assert (fallback.name, fallback.device) == ("torch", "cuda")
    with pytest.raises(ArtefactError) as refusal:
        backend.check(build)
    assert reason == f"first that can run; tensorrt: {refusal.value}"
    assert not engines.double.calls_of("Runtime.deserialize_cuda_engine")


@pytest.mark.parametrize("needed", [False, True])
def test_a_plugin_that_is_broken_is_loaded_only_for_plans_that_need_it(
    needed: bool, engines: Engines, gpu: None, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = PluginLibrary(tmp_path / "lib.so", SOURCE, engines.double.version)
    monkeypatch.setattr(tensorrt_backend, "find_plugin", lambda *_: library)
    script_registry(engines, [None, None, None], None)
    install(tmp_path, weights, engines.double.version, plugin=SOURCE if needed else None)
    backend, reason = choose(tmp_path, weights)
    assert backend.name == ("torch" if needed else "tensorrt")
    assert ("did not load the plugin" in reason) == needed
    assert len(engines.double.calls_of("IPluginRegistry.load_library")) == int(needed)
    backend.close()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:2"])
def test_the_command_that_builds_names_the_device(
    device: str, engines: Engines, gpu: None, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [0]

    @contextlib.contextmanager
    def on(name: str) -> Iterator[None]:
        current.append(torch.device(name).index or 0)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(tensorrt_backend, "find_gpu", lambda: Gpu(GPU.name, GPU.compute_capability, current[-1]))
    with pytest.raises(ArtefactError, match="build it with: python3 build_engines.py") as refusal:
        TensorRTBackend(weights, tmp_path, device).check(BUILD)
    assert str(refusal.value).endswith(" --device 2") == (device == "cuda:2")
    assert ("--device" in str(refusal.value)) == (device == "cuda:2")


def test_why_there_is_no_plugin_is_told(engines: Engines, gpu: None, weights: Weights, tmp_path: Path) -> None:
    make_library(tmp_path, engines.double.major, source="of yesterday")
    install(tmp_path, weights, engines.double.version, plugin=SOURCE)
    with pytest.raises(ArtefactError, match=r"needs the plugin library, .* \(.*source is of yesterday.*\); build it"):
        TensorRTBackend(weights, tmp_path, "cuda").check(BUILD)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """Names of the sessions that are closed, as they are."""
    names: List[str] = []
    close = TensorRTSession.close
    monkeypatch.setattr(TensorRTSession, "close", lambda self: (names.append(self.spec.name), close(self)))
    return names


@pytest.mark.parametrize("what", ["plan", "memory", "activations"])
def test_a_plan_that_does_not_load_is_a_reason_for_torch(
    what: str,
    engines: Engines,
    gpu: None,
    weights: Weights,
    tmp_path: Path,
    closed: List[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its manifest fits, so that only loading it shows it; what was loaded is freed, as torch needs the room."""
    freed = []
    close = TensorRTRuntime.close
    monkeypatch.setattr(TensorRTRuntime, "close", lambda self: (freed.append(self), close(self)))
    install(tmp_path, weights, engines.double.version)
    message = "does not take .*control_unet.plan.*magicTag.*build it anew with --force"
    if what == "plan":
        del engines.specs["step"]
    elif what == "activations":
        fill_memory(monkeypatch)
        message = "the GPU has no 0.00 GB left for the engines to work in: end other programs"
    else:
        engines.fail("Runtime.deserialize_cuda_engine", None, "Error Code 2: OutOfMemory (Requested size was 9.)")
        message = "too little memory for deserialising .*clip.plan.*end other programs"
    backend, reason = choose(tmp_path, weights)
    assert (backend.name, backend.device) == ("torch", "cuda")
    assert re.search(f"^first that can run; tensorrt: .*{message}", reason), reason
    assert len(freed) == 1
    assert closed == {"plan": ["time", "hint", "text"], "memory": [], "activations": list(SPECS)[::-1]}[what]
    with pytest.raises((ArtefactError, TensorRTError), match=message):  # no reason where it was asked for
        choose(tmp_path, weights, "tensorrt")[0].sessions(BUILD)


def test_loaded_sessions_that_nobody_took_are_closed(
    engines: Engines, gpu: None, weights: Weights, tmp_path: Path, closed: List[str]
) -> None:
    install(tmp_path, weights, engines.double.version)
    backend, _ = choose(tmp_path, weights)
    with pytest.raises(ArtefactError, match="was not made"):
        backend.sessions(Build(BUILD.config, SIZE, 2 * SIZE))
    assert closed == []
    backend.load(BUILD)
    assert closed == list(SPECS)
    backend.close()
    assert closed == 2 * list(SPECS)


def test_a_session_that_fails_closes_those_before_it(
    engines: Engines, gpu: None, weights: Weights, tmp_path: Path, closed: List[str]
) -> None:
    install(tmp_path, weights, engines.double.version)
    backend, _ = choose(tmp_path, weights, "tensorrt")
    del engines.specs["step"]
    with pytest.raises(ArtefactError, match="does not take .*control_unet.plan"):
        backend.sessions(BUILD)
    assert closed == ["time", "hint", "text"]


@pytest.mark.parametrize("problem", ["driver", "cuda-python", "version"])
def test_machines_that_cannot_run_it(
    problem: str,
    engines: Engines,
    gpu: None,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking() -> Any:
        raise CudaError("the package cuda-python is not installed")

    words = {
        "driver": "the driver runs CUDA 11.4 at most",
        "cuda-python": "cuda-python is not installed",
        "version": "TensorRT 9.2.0 is not supported",
    }[problem]
    if problem == "driver":
        monkeypatch.setattr(tensorrt_backend, "driver_problem", lambda: words)
    elif problem == "cuda-python":
        monkeypatch.setattr(tensorrt_backend, "CudaRuntime", lacking)
    else:
        engines.double.module.__version__ = "9.2.0"
    install(tmp_path, weights, engines.double.version)
    with pytest.raises(BackendError, match=f"tensorrt cannot run here: .*{words}"):
        choose(tmp_path, weights, "tensorrt")
    backend, reason = choose(tmp_path, weights)
    assert (backend.name, words in reason) == ("torch", True)


def test_without_tensorrt(gpu: None, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    backend, reason = choose(tmp_path, weights)
    assert backend.name == "torch"
    assert "package tensorrt cannot be imported" in reason
    with pytest.raises(BackendError, match="package tensorrt cannot be imported"):
        choose(tmp_path, weights, "tensorrt")


def test_without_a_gpu(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cuda_problem", lambda: "no CUDA device")
    monkeypatch.setattr(backends, "driver_problem", lambda: "the driver runs CUDA 11.4 at most")
    with pytest.raises(BackendError, match="tensorrt cannot run here: the driver runs CUDA 11.4"):
        choose(tmp_path, weights, "tensorrt")
    with pytest.raises(BackendError, match="not on the CPU"):
        choose_backend("tensorrt", "cpu", weights, lambda: None, tmp_path)
    backend, reason = choose(tmp_path, weights)
    assert backend.name == "onnxruntime"
    assert reason == "first that can run; tensorrt and torch on CUDA: the driver runs CUDA 11.4 at most"


def test_graphs_are_those_of_the_backend() -> None:
    from runtime.cuda_graph import TorchGraphs
    from runtime.torch_backend import TorchBackend

    unused: Any = SimpleNamespace()
    assert TorchBackend(unused, lambda: None, "cpu", Path(), print).graphs() is None
    assert isinstance(TorchBackend(unused, lambda: None, "cuda:1", Path(), print).graphs(), TorchGraphs)
