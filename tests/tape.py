"""A CUDA graph on a CPU: what PyTorch does while it is captured, done again on the same memory at each launch.

As with a CUDA graph, numbers that Python has at the time of the capture are in the graph for good, and only what
tensors hold is read anew. Unlike with one, the work is also done while it is captured.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Op(NamedTuple):
    function: Any
    arguments: Any
    options: Any
    result: Any


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: List[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append(Op(func, args, kwargs or {}, result))
        return result


class Tape:
    """`runtime.cuda_graph.CapturedGraph` of recorded operations."""

    def __init__(self, ops: List[Op]) -> None:
        self.ops: Optional[List[Op]] = ops
        self.nodes: Optional[int] = len(ops)
        self.launches = 0

    def launch(self) -> None:
        assert self.ops is not None, "launched after close()"
        self.launches += 1
        with torch.no_grad():
            for op in self.ops:
                again = op.function(*op.arguments, **op.options)
                for old, new in zip(tree_leaves(op.result), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def close(self) -> None:
        self.ops = None


class TapeGraphs:
    """`runtime.cuda_graph.GraphCapture` that records tapes.

    Parameters
    ----------
    error : Exception, optional
        Raised at the end of each capture.
    loses : callable, optional
        Says of an operation whether it is missing on the tapes.
    """

    def __init__(self, error: Optional[Exception] = None, loses: Callable[[Op], bool] = lambda op: False) -> None:
        self.tapes: List[Tape] = []
        self.attempts = 0
        self._error = error
        self._loses = loses

    def capture(self, enqueue: Callable[[], None]) -> Tape:
        self.attempts += 1
        with _Recorder() as recorder:
            enqueue()
        if self._error is not None:
            raise self._error
        self.tapes.append(Tape([op for op in recorder.ops if not self._loses(op)]))
        return self.tapes[-1]

    @property
    def launches(self) -> int:
        return sum(tape.launches for tape in self.tapes)
