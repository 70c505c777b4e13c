"""The CUDA runtime by cuda-python, every return code checked. Imported where it is used; no torch here."""

from __future__ import annotations

import importlib
from typing import Any, Optional

# Where cuda-python has its runtime API: since 12.3, and before.
MODULES = ("cuda.bindings.runtime", "cuda.cudart")


class CudaError(RuntimeError):
    """A CUDA call failed; the message has the call, the error's name and CUDA's own words."""


class CudaRuntime:
    """The calls that capture and replay a graph.

    Streams, graphs and executable graphs are what cuda-python gives, or addresses as integers.

    Parameters
    ----------
    module : module, optional
        cuda-python's runtime API; found by itself by default.

    Raises
    ------
    CudaError
        cuda-python is not installed.
    """

    def __init__(self, module: Any = None) -> None:
        self._module = load_module() if module is None else module

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the runtime API gives beside its status: nothing, one value, or a tuple.

        Raises
        ------
        CudaError
            The status is not success.
        """
        status, *values = getattr(self._module, name)(*arguments)
        if status != self._module.cudaError_t.cudaSuccess:
            raise CudaError(f"{name} failed: {self._describe(status)}")
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def _describe(self, status: Any) -> str:
        known, text = self._module.cudaGetErrorString(status)
        words = text.decode() if known == self._module.cudaError_t.cudaSuccess else "no description"
        return f"{getattr(status, 'name', status)} ({words})"

    def begin_capture(self, stream: int) -> None:
        """Record what this thread enqueues on the stream from now on in place of running it."""
        mode = self._module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:
        """The graph of what was enqueued since `begin_capture`; the stream runs again, also where that fails."""
        try:
            return self.call("cudaStreamEndCapture", stream)
        except CudaError:
            self._forget_error()
            raise

    def abandon_capture(self, stream: int) -> None:
        """End a capture that failed, so that the stream runs again. Raises nothing: the failure itself is the news."""
        status, graph = self._module.cudaStreamEndCapture(stream)
        if status == self._module.cudaError_t.cudaSuccess and graph:
            self._module.cudaGraphDestroy(graph)
        self._forget_error()

    def _forget_error(self) -> None:
        """A failure that was told would come up again at the next call that asks for the last one."""
        self._module.cudaGetLastError()

    def count_nodes(self, graph: Any) -> int:
        """Kernels, copies and fills of a graph."""
        return int(self.call("cudaGraphGetNodes", graph)[1])

    def instantiate(self, graph: Any) -> Any:
        """The executable form of a graph; it needs the graph no longer."""
        return self.call("cudaGraphInstantiateWithFlags", graph, 0)

    def launch(self, executable: Any, stream: int) -> None:
        self.call("cudaGraphLaunch", executable, stream)

    def destroy_graph(self, graph: Any) -> None:
        self.call("cudaGraphDestroy", graph)

    def destroy_executable(self, executable: Any) -> None:
        self.call("cudaGraphExecDestroy", executable)

    def driver_version(self) -> int:
        """The newest CUDA that the driver runs, as 1000 * major + 10 * minor; 0 without a driver."""
        return int(self.call("cudaDriverGetVersion"))


def load_module() -> Any:
    """cuda-python's runtime API; raises `CudaError` where it is not installed."""
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise CudaError("the package cuda-python is not installed; it captures CUDA graphs: pip install cuda-python")


def driver_problem() -> Optional[str]:
    """Why the driver is too old for torch's CUDA, or None; None as well where that cannot be asked."""
    import torch

    try:
        driver = CudaRuntime().driver_version()
    except CudaError:
        return None
    # Within a major version of CUDA an older driver runs what was built for a newer one. 0 is no driver at all.
    if torch.version.cuda is None or driver == 0 or driver // 1000 >= int(torch.version.cuda.split(".")[0]):
        return None
    runs = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"the driver runs CUDA {runs} at most, and this torch is for CUDA {torch.version.cuda}: update the driver"


def current_stream(device: str) -> int:
    """Address of the stream that torch enqueues on.

    Raises
    ------
    CudaError
        It is the default stream, which can be neither captured nor run beside others.
    """
    import torch

    stream = int(torch.cuda.current_stream(torch.device(device)).cuda_stream)
    if stream == 0:
        raise CudaError("work would go to the default stream of CUDA; enter a stream of its own first")
    return stream
