"""What is found out about the machine: quotas of containers, names, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Dict, Optional

import pytest

from cldm import machine
from cldm.machine import available_cores, peak_memory_gb, peak_memory_text, processor_name

ROOT = Path(__file__).resolve().parent.parent
HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write_files(folder: Path, files: Dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def version_1(quota: str, period: str) -> Dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "350000 100000\n"}, 4),
        ({"cpu.max": "300001 100000\n"}, 4),
        ({"cpu.max": "100000 50000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "many 100000\n"}, None),
        ({"cpu.max": "400000\n"}, None),
        ({"cpu.max": "400000 0\n"}, None),
        (version_1("-1\n", "100000\n"), None),
        (version_1("0\n", "100000\n"), None),
        (version_1("300000\n", "100000\n"), 3),
        (version_1("150000\n", "100000\n"), 2),
        (version_1("1000\n", "100000\n"), 1),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, None),
    ],
    ids=str,
)
def test_cores_within_a_container_s_quota(
    files: Dict[str, str], quota: Optional[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert available_cores(write_files(tmp_path, files)) == (16 if quota is None else quota)


def test_affinity_counts_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"cpu.max": "400000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert available_cores(tmp_path) == 2


def test_cores_where_the_system_has_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path) == 1


def test_cores_of_this_process() -> None:
    assert 1 <= available_cores() <= HERE


def test_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Maker Model: 9 @ 2 GHz\n\nmodel name\t: other\n")
    assert processor_name(file) == "Maker Model: 9 @ 2 GHz"
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    file.write_text("Hardware\t: board\n")
    for path in (file, tmp_path / "absent"):
        assert processor_name(path) == "arm"
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor_name(file) == platform.machine()


def test_peak_memory_is_kept_after_it_was_held() -> None:
    pytest.importorskip("resource")
    program = (
        "from cldm.machine import peak_memory_gb\n"
        "before = peak_memory_gb()\n"
        "held = b'x' * 200_000_000\n"
        "del held\n"
        "print(before, peak_memory_gb())\n"
    )
    # A shell between: Linux hands the peak of the process that starts a program, here the tests', on to it.
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, program]
    done = subprocess.run(command, cwd=str(ROOT), capture_output=True, text=True, timeout=60, check=True)
    before, after = (float(word) for word in done.stdout.split())
    assert 0.001 < before < 0.2 and before + 0.19 < after < before + 0.25


@pytest.mark.parametrize(("system", "wanted"), [("linux", 2.048), ("darwin", 0.002)])
def test_unit_of_peak_memory(system: str, wanted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setitem(sys.modules, "resource", fake)
    monkeypatch.setattr(machine.sys, "platform", system)
    assert peak_memory_gb() == pytest.approx(wanted)
    assert peak_memory_text() == f"peak memory {wanted:.1f} GB"


def test_without_the_module_that_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # import fails, as on Windows
    assert peak_memory_gb() is None
    assert peak_memory_text() == "peak memory not known here"
