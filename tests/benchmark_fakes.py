"""Contenders of the image benchmark that only pretend: they start at once, as they import no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional


class Fake:
    """A contender that does as it is told.

    Of its options only "refuse" says anything: an error for `prepare` to raise.
    """

    def __init__(self, options: Dict[str, Any]) -> None:
        self._options = options

    def prepare(self) -> Dict[str, Any]:
        print("a library's noise")
        if "refuse" in self._options:
            raise RuntimeError(self._options["refuse"])
        return {"summary": "fake", "variable": os.environ.get("FAKE_VARIABLE")}

    def images(self, count: int) -> List[float]:
        return [2.0] * count

    def memory(self) -> Optional[Dict[str, Any]]:
        return None

    def parts(self, repeats: int) -> Dict[str, List[float]]:
        return {"text": [0.5] * repeats, "steps": [1.0] * repeats}

    def latent(self) -> List[float]:
        return [0.0]

    def die(self) -> None:
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)

    def hang(self) -> None:
        time.sleep(600)

    def hang_with_child(self, note: str) -> None:
        """Write the numbers of this process and of one that it starts into the file `note`, and do nothing."""
        child = subprocess.Popen(["sleep", "600"])
        with open(note, "w", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)


class FakeDevice:
    """`benchmarks.device.Device` of a card that is not there."""

    def __init__(self, options: Dict[str, Any]) -> None:
        self._options = options

    def about(self) -> Dict[str, Any]:
        return {"device": os.environ.get("FAKE_CARD", "a card"), "torch": "2"}

    def rates(self, rounds: int) -> Dict[str, Any]:
        return {"flops_a_second": 720e12, "bytes_a_second": 4.3e12}


class FakeOurs(Fake):
    """`benchmarks.contenders.Ours` on such a card."""

    _broken = False

    def prepare(self) -> Dict[str, Any]:
        if os.environ.get("FAKE_OURS_REFUSES"):
            raise RuntimeError(os.environ["FAKE_OURS_REFUSES"])
        scaled = self._options.get("scaled_from")
        return {
            "summary": "fake of ours",
            "height": 64,
            "width": 96,
            "import_seconds": 1.0,
            "initialise_seconds": 8.0 if self._is_first() else 2.0,
            "tile_sizes": scaled and "scaled",
        }

    def _is_first(self) -> bool:
        """Whether the compilers' folder is empty; it is not afterwards."""
        kept = os.environ["TRITON_CACHE_DIR"]
        first = not os.path.isdir(kept)
        os.makedirs(kept, exist_ok=True)
        return first

    def images(self, count: int) -> List[float]:
        return [1.5 * self._options.get("samples", 1)] * count

    def latent(self) -> List[float]:
        return [1.0]

    def memory(self) -> Dict[str, Any]:
        sizes = {"allocated": 1.0, "reserved": 2.0, "process": 3.0, "card_used": 4.0, "card_total": 5.0}
        return {**sizes, "process_is": "a guess"}

    def receipts(self, count: int) -> Dict[str, Any]:
        return {"milliseconds": {"total": [1.5] * count}, "sampling": "20 of 20", "warnings": []}

    def stages(self) -> List[str]:
        return ["text", "hint", "time", "decode", "step", "chain"]

    def stage(self, name: str, repeats: int) -> List[float]:
        """The time graph's leaves the process of no more use, as errors of CUDA do."""
        self._broken = self._broken or name == "time"
        if self._broken:
            raise RuntimeError("CUDA error: this stage cannot be captured")
        return [{"chain": 1.0, "step": 0.03}.get(name, 0.1)] * repeats

    def host(self, repeats: int) -> Dict[str, List[float]]:
        return {"launch": [0.25] * repeats}

    def kernels(self) -> Dict[str, Any]:
        row = {"name": "tma_matmul_kernel", "kind": "matrix product", "launches": 3, "microseconds": 6.0}
        sums = {"launches": 3, "microseconds": 6.0, "busy_microseconds": 5.0, "span_microseconds": 7.0}
        return {"rows": [row], **sums}
