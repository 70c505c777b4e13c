#!/usr/bin/env python3
"""A contender in a process of its own, which takes orders: it cannot take the others down, or hold up a benchmark.

The two talk in lines of JSON. Started as a script this is the contender's side; what libraries print there goes into a
log. A contender leads a process group of its own, which is ended whole, and ends by itself when the other side is gone,
whatever it was doing: nothing may go on using the card unseen.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

LOG_LINES = 6  # of the log that an error shows
CLOSING_SECONDS = 10.0  # that a contender with nothing to do has to end by itself


class WorkerError(RuntimeError):
    """A contender failed, died or took too long."""


class Worker:
    """Starts a contender; `ask` has it do something, and waits.

    Parameters
    ----------
    contender : str
        "module:Class", whose instances are made of the options; their public methods are what `ask` calls.
    options : mapping
        Goes to the contender as JSON.
    log : Path
        File for what it prints.
    environment : mapping, optional
        Variables to set on top of this process's.
    """

    def __init__(
        self, contender: str, options: Mapping[str, Any], log: Path, environment: Optional[Mapping[str, str]] = None
    ) -> None:
        self.contender = contender
        self._log = log
        self._answers: queue.Queue[str] = queue.Queue()
        self._working = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **(environment or {})},
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        self._send({"contender": contender, "options": dict(options)})

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")  # the end, which a waiting `ask` must see

    def _send(self, message: Dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: `ask` says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, what: str, timeout: float, **arguments: Any) -> Any:
        """What the contender's method `what` returns.

        Raises
        ------
        WorkerError
            It raised, or the process died, or `timeout` seconds were over: then the process is ended. The message has
            the end of its log.
        """
        self._send({"do": what, "arguments": arguments})
        self._working = True
        try:
            line = self._answers.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.close()
            raise WorkerError(f"{what} was not done in {timeout:.0f} s{self._tail()}") from None
        self._working = False
        if not line:
            code = self._process.wait()
            self._answers.put("")
            raise WorkerError(f"the process ended with status {code} during {what}{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def _tail(self) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return "".join(f"\n    | {line}" for line in lines[-LOG_LINES:])

    def close(self) -> None:
        """End the process and those that it started; its memory on the card is free afterwards."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # one that waits for an order ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0.0 if self._working else CLOSING_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # none of the group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Orders:
    """Lines from standard input, read beside the work: their end ends the process, also amid an order."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str] = queue.Queue()
        self._working = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        if self._working:
            os._exit(1)  # nobody waits for the answer
        self._lines.put("")

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        for line in iter(self._lines.get, ""):
            self._working = True
            yield json.loads(line)
            self._working = False


def serve() -> int:
    """The contender's side: orders from standard input, answers to what standard output was."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not speak in between
    orders = iter(_Orders())
    setup = next(orders)
    contender: Any = None
    for order in orders:
        try:
            if contender is None:  # made at the first order, whose answer can say what went wrong
                module, name = setup["contender"].split(":")
                contender = getattr(importlib.import_module(module), name)(setup["options"])
            answer: Dict[str, Any] = {"value": getattr(contender, order["do"])(**order["arguments"])}
        except Exception as error:  # the other side decides what a failure means
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(serve())
