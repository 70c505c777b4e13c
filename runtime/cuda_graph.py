"""A whole image as one CUDA graph: capture once, launch for every later image. No torch here.

Two ways to capture, one call. PyTorch's own is for sessions that allocate while they run: the allocator must know of
the capture, so that what it hands out stays the graph's. That of the CUDA runtime is for sessions that allocate
nothing, as TensorRT's.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Protocol

from runtime.cuda_runtime import CudaError, CudaRuntime

Enqueue = Callable[[], None]


class CapturedGraph(Protocol):
    """Enqueued work that can be launched again and again, on the memory that it was captured with.

    Attributes
    ----------
    nodes : int or None
        Kernels, copies and fills in it, where that can be known.
    """

    nodes: Optional[int]

    def launch(self) -> None:
        """Put all of it into the current stream."""

    def close(self) -> None:
        """Free the graph and its memory; nothing of it may still be running."""


class GraphCapture(Protocol):
    """Makes graphs of what runs on one stream, one after the other and never two at once."""

    def capture(self, enqueue: Enqueue) -> CapturedGraph:
        """The graph of what `enqueue` puts into the current stream, which must not be the default one.

        The same work must have run before: what is set up on first use cannot be captured. If it raises, whatever it
        raises, the stream can be used as before.
        """


# Graphs of PyTorch whose capture did not end well stay alive: its allocator may go on asking them which memory is
# theirs.
_unfinished: List[Any] = []


class TorchGraphs:
    """Captures by PyTorch. The graphs share one pool of memory: what one leaves there the next may overwrite."""

    def __init__(self) -> None:
        self._live: List[_TorchGraph] = []

    def capture(self, enqueue: Enqueue) -> CapturedGraph:
        import torch

        graph = _new_torch_graph()
        # A pool is there as long as a graph that uses it; another name for it would not survive its last graph.
        pool = self._live[-1].graph.pool() if self._live else None
        stream = torch.cuda.current_stream()
        # The capture sees this thread only: others of the program may go on with CUDA calls of their own.
        _unfinished.append(graph)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            enqueue()
        _unfinished.remove(graph)
        captured = _TorchGraph(graph, self._live)
        self._live.append(captured)
        return captured


def _new_torch_graph() -> Any:
    """A graph that keeps what was captured, to be counted; PyTorch before 2.8 cannot."""
    import torch

    try:
        return torch.cuda.CUDAGraph(keep_graph=True)
    except TypeError:
        return torch.cuda.CUDAGraph()


class _TorchGraph:
    def __init__(self, graph: Any, live: List[_TorchGraph]) -> None:
        self.graph = graph
        self.nodes = _count_nodes(graph)
        if hasattr(graph, "instantiate"):
            graph.instantiate()
        self._live = live

    def launch(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        if self in self._live:
            self._live.remove(self)
            self.graph.reset()


def _count_nodes(graph: Any) -> Optional[int]:
    try:
        return CudaRuntime().count_nodes(graph.raw_cuda_graph())
    except (AttributeError, CudaError):  # an older PyTorch, or no cuda-python: the count is for information only
        return None


class CudaRuntimeGraphs:
    """Captures by the CUDA runtime, for sessions whose `enqueue` allocates nothing.

    Parameters
    ----------
    runtime : CudaRuntime
    stream : callable
        Gives the address of the current stream.
    """

    def __init__(self, runtime: CudaRuntime, stream: Callable[[], int]) -> None:
        self._runtime = runtime
        self._stream = stream

    def capture(self, enqueue: Enqueue) -> CapturedGraph:
        stream = self._stream()
        self._runtime.begin_capture(stream)
        try:
            enqueue()
        except BaseException:
            self._runtime.abandon_capture(stream)
            raise
        graph = self._runtime.end_capture(stream)
        try:
            nodes = self._runtime.count_nodes(graph)
            executable = self._runtime.instantiate(graph)
        finally:
            self._runtime.destroy_graph(graph)
        return _CudaRuntimeGraph(self._runtime, self._stream, executable, nodes)


class _CudaRuntimeGraph:
    def __init__(self, runtime: CudaRuntime, stream: Callable[[], int], executable: Any, nodes: int) -> None:
        self.nodes = nodes
        self._runtime = runtime
        self._stream = stream
        self._executable = executable

    def launch(self) -> None:
        self._runtime.launch(self._executable, self._stream())

    def close(self) -> None:
        executable, self._executable = self._executable, None
        if executable is not None:
            self._runtime.destroy_executable(executable)
