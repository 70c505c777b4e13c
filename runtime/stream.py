"""The order in which a pipeline's work runs, and its time: the host's own, or that of a CUDA stream. No torch here."""

from __future__ import annotations

import contextlib
import time
from typing import Any, ContextManager, Dict, Iterator, List, Protocol, Tuple


class Stream(Protocol):
    """Work in order."""

    def entered(self) -> ContextManager[None]:
        """Within it, work goes into this stream, after what the caller's own stream was given before."""

    def now(self) -> Any:
        """A point in the order of the work; nothing is waited for."""

    def milliseconds(self, earlier: Any, later: Any) -> float:
        """Time between two points that the stream has passed."""

    def wait(self) -> None:
        """Return once all work of the stream is done."""

    def close(self) -> None:
        """Let others have the stream; no work goes into it afterwards."""


class HostStream:
    """Work that is done when the call that asks for it returns."""

    def entered(self) -> ContextManager[None]:
        return contextlib.nullcontext()

    def now(self) -> float:
        return time.perf_counter()

    def milliseconds(self, earlier: float, later: float) -> float:
        return 1e3 * (later - earlier)

    def wait(self) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to give back."""


# CUDA streams that were given back, by device. Libraries keep memory for each stream that they have seen, so a program
# that makes and closes pipelines in turn must not use up a new one each time.
_idle: Dict[str, List[Any]] = {}


class CudaStream:
    """A stream of its own on a CUDA device: the default stream can be neither captured nor run beside others."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        idle = _idle.setdefault(str(self._device), [])
        self._stream: Any = idle.pop() if idle else torch.cuda.Stream(self._device)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        import torch

        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield

    def now(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def milliseconds(self, earlier: Any, later: Any) -> float:
        return float(earlier.elapsed_time(later))

    def wait(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            _idle[str(self._device)].append(stream)


def make_stream(device: str) -> Stream:
    """The stream for a pipeline on "cpu", "cuda", "cuda:1", ..."""
    return CudaStream(device) if device.startswith("cuda") else HostStream()


class StageClock:
    """Wall time between marks. On a GPU they are events in the stream, and only `milliseconds` waits for them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._start = time.perf_counter()
        self._marks: List[Tuple[str, Any]] = []
        self._first = stream.now()

    def mark(self, stage: str) -> None:
        """The time since the last mark belongs to `stage`."""
        self._marks.append((stage, self._stream.now()))

    def milliseconds(self) -> Dict[str, float]:
        """Time of each stage, and "total": from the start until now."""
        self._stream.wait()
        total = 1e3 * (time.perf_counter() - self._start)
        spent: Dict[str, float] = {}
        before = self._first
        for stage, now in self._marks:
            spent[stage] = spent.get(stage, 0.0) + self._stream.milliseconds(before, now)
            before = now
        spent["total"] = total
        return spent
