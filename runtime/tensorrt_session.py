"""Sessions on TensorRT: a plan deserialised once, run on the workspace's addresses, allocating nothing as it runs.

TensorRT answers failure with False or None and tells its logger why; here every such answer raises with those words.
`tensorrt` and torch are imported where they are used.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np

from deploy.manifest import ArtefactError
from deploy.spec import STEPS, GraphSpec
from deploy.tensorrt_versions import TensorRTError, find_version, load_plugin, make_logger, said
from runtime.cuda_runtime import current_stream
from runtime.session import check_buffers
from runtime.tensorrt_execution import execution_of
from runtime.workspace import ALIGNMENT

if TYPE_CHECKING:
    import tensorrt

MEMORY_ADVICE = (
    "end other programs that hold the GPU's memory (nvidia-smi lists them), or build for fewer samples or a smaller"
    " size"
)


class TensorRTRuntime:
    """What the engines of one device share: the plugin, the deserialiser, and the memory that they work in.

    Engines of one runtime never run at the same time: they work in the same memory.

    Parameters
    ----------
    device : str
        "cuda", "cuda:1", ...
    logger : tensorrt.ILogger, optional
        As `deploy.tensorrt_versions.make_logger` gives, which is the default.

    Raises
    ------
    TensorRTError
        TensorRT is missing, of an unknown version, or does not start.
    """

    def __init__(self, device: str, logger: Any = None) -> None:
        import tensorrt

        self.version = find_version()
        self.execution = execution_of(self.version.major)
        self.device = device
        self.logger = make_logger() if logger is None else logger
        self._activations: Optional[_Activations] = None
        with self.on_device():
            try:
                runtime: Any = tensorrt.Runtime(self.logger)
            except TypeError as error:  # so the bindings say that none was made
                raise TensorRTError(
                    f"TensorRT {self.version.version} does not start{said(self.logger)}; the driver may be too old for"
                    " it: nvidia-smi shows the newest CUDA that it runs"
                ) from error
        self._runtime: Optional[tensorrt.Runtime] = runtime

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """TensorRT works on the device that is current."""
        import torch

        with torch.cuda.device(self.device) if self.device.startswith("cuda") else contextlib.nullcontext():
            yield

    def load_plugin(self, library: Path) -> None:
        """For engines that need it, before they are deserialised; again is no fault.

        TensorRT's runtime is there by then, so that what it says of the library comes to our logger.

        Raises
        ------
        TensorRTError
            TensorRT does not take the library.
        """
        with self.on_device():
            load_plugin(self.version, self.logger, library)

    def deserialise(self, plan: Path) -> tensorrt.ICudaEngine:
        """The engine of a plan file.

        Raises
        ------
        TensorRTError
            The runtime is closed, or the device has no room.
        ArtefactError
            The file is missing or empty, or TensorRT does not take it.
        """
        if self._runtime is None:
            raise TensorRTError("the TensorRT runtime is closed")
        self.logger.errors.clear()
        try:
            # Mapped, not read: a plan of SD1.5's step has gigabytes, and TensorRT copies what it keeps.
            with self.on_device(), plan.open("rb") as file, _mapped(file) as content:
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:  # the latter of an empty file
            raise ArtefactError(f"{plan} cannot be read: {error}; build it anew") from error
        if engine is None:
            self.raise_if_out_of_memory(f"deserialising {plan}")
            raise ArtefactError(
                f"TensorRT {self.version.version} does not take {plan}{said(self.logger)}; build it anew with --force"
            )
        return engine

    def raise_if_out_of_memory(self, what: str) -> None:
        """Raise `TensorRTError` where the logger has heard of memory."""
        words = " ".join(self.logger.errors).lower().replace(" ", "")
        if "outofmemory" in words or "cudaerrormemoryallocation" in words:
            raise TensorRTError(f"the GPU has too little memory for {what}{said(self.logger)}: {MEMORY_ADVICE}")

    def stream(self) -> int:
        """Address of the current stream."""
        return current_stream(self.device)

    def join(self, num_bytes: int) -> _Activations:
        """A share in memory of at least this size. Memory in use stays where it is: captured graphs hold addresses."""
        shared = self._activations
        if shared is None or not shared.takes(num_bytes):
            shared = self._activations = _Activations(self.device)
        shared.join(num_bytes)
        return shared

    def close(self) -> None:
        """No engine can be deserialised afterwards; those that were live on until they are closed themselves."""
        self._runtime = None
        self._activations = None


class _Activations:
    """Device memory of the size of the largest share, allocated when it is first asked for."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._size = 0
        self._users = 0
        self._memory: Any = None

    def takes(self, num_bytes: int) -> bool:
        return self._memory is None or num_bytes <= self._size

    def join(self, num_bytes: int) -> None:
        self._users += 1
        self._size = max(self._size, num_bytes)

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._memory, self._size = None, 0

    def address(self) -> Tuple[int, int]:
        """Where it is, and its size in bytes.

        Raises
        ------
        TensorRTError
            The device has no room for it.
        """
        import torch

        if self._memory is None:
            try:
                self._memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
            except torch.cuda.OutOfMemoryError as error:
                raise TensorRTError(
                    f"the GPU has no {self._size / 1e9:.2f} GB left for the engines to work in: {MEMORY_ADVICE}"
                ) from error
            if self._device.startswith("cuda"):
                # Torch may have given what work still waiting on this stream uses, and engines run on other streams.
                torch.cuda.synchronize(self._device)
        return int(self._memory.data_ptr()), self._size


class TensorRTSession:
    """Runs a plan.

    All bindings of a session share one execution context, so they run one after the other, on one stream.

    Parameters
    ----------
    plan : Path
        Whoever makes a session has checked its manifest (`deploy.plan_manifest.check_plan`).
    spec : GraphSpec
    runtime : TensorRTRuntime

    Raises
    ------
    ArtefactError
        The plan cannot be deserialised, or its tensors are not those of `spec`.
    TensorRTError
        There is no room on the device, or TensorRT makes no context.
    """

    def __init__(self, plan: Path, spec: GraphSpec, runtime: TensorRTRuntime) -> None:
        self.spec = spec
        self._runtime = runtime
        self._context: Any = None
        self._bound: Optional[BoundTensorRT] = None
        self._has_memory = False
        self._engine: Any = runtime.deserialise(plan)
        _check_tensors(plan, spec, self._engine)
        with runtime.on_device():
            self._context = runtime.execution.make_context(self._engine)
        if self._context is None:
            runtime.raise_if_out_of_memory(f"a context of {spec.name}")
            raise TensorRTError(f"TensorRT makes no context of {plan}{said(runtime.logger)}")
        self._activations: Optional[_Activations] = runtime.join(runtime.execution.activation_bytes(self._engine))

    def bind(self, buffers: Mapping[str, Any]) -> BoundTensorRT:
        check_buffers(self.spec, buffers)
        if self._context is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        for name in self.spec.tensors:
            if buffers[name].is_cuda and buffers[name].data_ptr() % ALIGNMENT:
                raise ValueError(f"{self.spec.name}: tensor {name} must begin at a multiple of {ALIGNMENT} bytes")
        return BoundTensorRT(self, dict(buffers))

    def take_memory(self) -> None:
        """Take the shared memory, which is allocated as large as the sessions of the runtime so far need it.

        The first `run` does it otherwise: to be called once all sessions are made, where its lack is to show early.
        Raises `TensorRTError` where the device has no room.
        """
        if self._has_memory:
            return
        if self._activations is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        with self._runtime.on_device():
            self._runtime.execution.set_activations(self._context, *self._activations.address())
        self._has_memory = True

    def run(self, bound: BoundTensorRT) -> None:
        """Enqueue on the buffers of a binding; raises `TensorRTError` where TensorRT refuses."""
        if self._context is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        self._runtime.logger.errors.clear()  # so that an error told is of this run
        self.take_memory()
        if self._bound is not bound:
            self._bound = None  # half set is not set
            self._set_addresses(bound)
            self._bound = bound
        if not self._context.execute_async_v3(self._runtime.stream()):
            self._fail("does not run")

    def _set_addresses(self, bound: BoundTensorRT) -> None:
        for name, shape in bound.shapes:
            if not self._context.set_input_shape(name, shape):
                self._fail(f"was not built for {name} of shape {shape}")
        for name, address in bound.addresses:
            if not self._context.set_tensor_address(name, address):
                self._fail(f"does not take the address of {name}")

    def _fail(self, what: str) -> None:
        self._runtime.raise_if_out_of_memory(self.spec.name)
        raise TensorRTError(f"the engine of {self.spec.name} {what}{said(self._runtime.logger)}")

    def close(self) -> None:
        """Free context and engine, in that order, and leave the shared memory."""
        self._bound = None
        self._context = None
        self._engine = None
        activations, self._activations = self._activations, None
        if activations is not None:
            activations.leave()


class BoundTensorRT:
    """A `TensorRTSession` with its buffers, which it reads and writes in place.

    Attributes
    ----------
    addresses : list of (name, address)
    shapes : list of (name, shape)
        Of the inputs that the plan leaves a dimension of open.
    """

    def __init__(self, session: TensorRTSession, buffers: Dict[str, Any]) -> None:
        spec = session.spec
        self._session = session
        self._buffers = buffers  # TensorRT holds addresses only
        self.addresses: List[Tuple[str, int]] = [(name, int(buffers[name].data_ptr())) for name in spec.tensors]
        self.shapes: List[Tuple[str, Tuple[int, ...]]] = [
            (name, tuple(buffers[name].shape)) for name, tensor in spec.inputs.items() if STEPS in tensor.shape
        ]

    def enqueue(self) -> None:
        self._session.run(self)


def _mapped(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_tensors(plan: Path, spec: GraphSpec, engine: tensorrt.ICudaEngine) -> None:
    """Raise `ArtefactError` unless an engine has exactly the tensors of a graph."""
    import tensorrt

    found = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        is_input = engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
        dtype = np.dtype(tensorrt.nptype(engine.get_tensor_dtype(name))).name
        found[name] = (is_input, tuple(engine.get_tensor_shape(name)), dtype)
    wanted = {
        name: (name in spec.inputs, tuple(-1 if dim == STEPS else dim for dim in tensor.shape), tensor.dtype)
        for name, tensor in spec.tensors.items()
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ArtefactError(
                f"{plan} is not the plan of {spec.name}: tensor {name} is {_shown(found.get(name))} there, and"
                f" {_shown(wanted.get(name))} was wanted; build it anew with --force"
            )


def _shown(tensor: Optional[Tuple[bool, Tuple[Any, ...], str]]) -> str:
    if tensor is None:
        return "not"
    is_input, shape, dtype = tensor
    return f"{'an input' if is_input else 'an output'} of {dtype} {shape}"
