"""What this process runs on: processor, cores, memory. No torch here."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import List, Optional, Tuple

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
# Packages in the place of that in `tensorrt_command`.
OTHER_TENSORRT = "or tensorrt-cu12 with a driver for CUDA 12, or tensorrt==8.6.1 on Python 3.11 at most"


def tensorrt_command(python: str = sys.executable) -> str:
    """The command that installs TensorRT for an interpreter; `OTHER_TENSORRT` says what else it may be."""
    return f"{shlex.quote(python)} -m pip install tensorrt-cu13"


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


def available_cores(cgroup: Path = CGROUP) -> int:
    """Cores that this process may use, at least 1: those of its affinity, and no more than its container's quota.

    Parameters
    ----------
    cgroup : Path
        Where the control groups are mounted, of version 2 (`cpu.max`) or 1 (`cpu/cpu.cfs_*_us`).
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    quota = _cpu_quota(cgroup)
    return cores if quota is None else min(cores, quota)


def _cpu_quota(cgroup: Path) -> Optional[int]:
    """Processor time a period in whole cores, rounded up; None where nothing limits it."""
    found = _numbers([cgroup / "cpu.max"]) or _numbers(
        [cgroup / "cpu" / name for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    )
    if found is None or found[0] <= 0 or found[1] <= 0:  # version 1 writes -1 for no limit
        return None
    return -(-found[0] // found[1])


def _numbers(files: List[Path]) -> Optional[Tuple[int, int]]:
    """Quota and period in microseconds; None where a file is absent or, as version 2 has it, the quota is "max"."""
    try:
        quota, period = " ".join(file.read_text(encoding="ascii") for file in files).split()
        return int(quota), int(period)
    except (OSError, ValueError):
        return None


def peak_memory_gb() -> Optional[float]:
    """The most memory that this process has held so far, in 1e9 bytes; None on Windows, which does not tell it so."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux kilobytes


def peak_memory_text() -> str:
    """`peak_memory_gb` for a report."""
    peak = peak_memory_gb()
    return "peak memory not known here" if peak is None else f"peak memory {peak:.1f} GB"
