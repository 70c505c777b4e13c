"""A line now and then of how far a build is, and how long it may still take."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, Optional

# Between two lines.
INTERVAL_SECONDS = 15.0


class _Phase:
    def __init__(self, parent: Optional[str], steps: int) -> None:
        self.parent = parent
        self.steps = max(1, steps)
        self.done = 0


class BuildProgress:
    """What is known of a running build: the time, what the last one took, and where the builder tells, its phases.

    The builder calls from threads of its own.

    Parameters
    ----------
    label : str
        What is built.
    before : float or None
        Seconds that the last build of it took.
    clock : callable
        Seconds since any fixed time.
    """

    def __init__(self, label: str, before: Optional[float], clock: Callable[[], float] = time.monotonic) -> None:
        self.cancelled = False
        self._label = label
        self._before = before
        self._clock = clock
        self._start = clock()
        self._phases: Dict[str, _Phase] = {}
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._start

    def phase_start(self, name: str, parent: Optional[str], steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent, steps)

    def step_complete(self, name: str, step: int) -> None:
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:  # steps are told by several threads, in any order
                phase.done = max(phase.done, step + 1)

    def phase_finish(self, name: str) -> None:
        """The phase's step of the phase around it is told apart."""
        with self._lock:
            self._phases.pop(name, None)

    def line(self) -> str:
        """Such as "step: 80 s, building engine 25 %, about 240 s left"."""
        with self._lock:
            root = next((name for name, phase in self._phases.items() if phase.parent not in self._phases), None)
            done = None if root is None else self._fraction(root)
        seconds = self.seconds
        words = [f"{self._label}: {seconds:.0f} s"]
        if root is not None and done is not None:
            words.append(f"{root} {100 * done:.0f} %")
        if self._before is not None and self._before > seconds:
            words.append(f"about {self._before - seconds:.0f} s left, as it took {self._before:.0f} s the last time")
        elif done:
            words.append(f"about {seconds * (1 - done) / done:.0f} s left")
        return ", ".join(words)

    def _fraction(self, name: str) -> float:
        """Done of a phase, a phase inside it counting as the part of a step that it is."""
        phase = self._phases[name]
        inner = [self._fraction(child) for child, other in self._phases.items() if other.parent == name]
        return min(1.0, (phase.done + max(inner, default=0.0)) / phase.steps)


@contextmanager
def heartbeat(
    progress: BuildProgress, report: Callable[[str], None], interval: float = INTERVAL_SECONDS
) -> Iterator[None]:
    """Report the line of `progress` every `interval` seconds from a thread; the builder lets other threads run."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(interval):
            report(progress.line())

    thread = threading.Thread(target=beat, name="build progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
