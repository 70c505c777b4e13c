"""The plugin library on the disk: whether the one that is there fits, and building it where it does not.

plugins/build.sh builds it and writes its manifest. It needs a CUDA compiler and TensorRT's headers, so a library that
fits is used without asking it. No torch and no TensorRT here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List

from cldm.files import source_digest
from deploy.manifest import ROOT, ArtefactError, check_artefact

PLUGINS = ROOT / "plugins"
BUILD_SCRIPT = PLUGINS / "build.sh"


class PluginError(RuntimeError):
    """There is no plugin library for this TensorRT, and none can be built; the message says why and what to do."""


@dataclass(frozen=True)
class PluginLibrary:
    """A library that fits: its file, the hash of its sources, and the TensorRT whose headers it was built with."""

    file: Path
    source: str
    tensorrt: str


def library_path(folder: Path, major: int) -> Path:
    """Where the library for a major version lies under the folder of all builds."""
    return folder / "plugins" / f"libgroup_norm_trt{major}.so"


def plugin_digest(major: int) -> str:
    """`source` in the manifest of a library that plugins/build.sh would build now."""
    glue = "tensorrt_v2.cpp" if major == 8 else "tensorrt_v3.cpp"
    files = [PLUGINS / name for name in ("build.sh", "tensorrt_common.h", "tensorrt_common.cpp", glue)]
    for pattern in ("group_norm*.cu", "group_norm*.h", "group_norm*.cuh"):
        files += sorted(PLUGINS.glob(pattern))
    return source_digest(files)


def find_plugin(folder: Path, major: int, compute_capability: str) -> PluginLibrary:
    """The library that is there.

    Parameters
    ----------
    compute_capability : str
        Of the GPU that is to run it, such as "9.0".

    Raises
    ------
    ArtefactError
        It is missing, damaged, or was built from other sources, for another TensorRT or for other GPUs.
    """
    file = library_path(folder, major)
    wanted = {"kind": "plugin", "tensorrt_major": major, "source": plugin_digest(major)}
    manifest = check_artefact(file, wanted)
    if not _runs_on(manifest, int(compute_capability.replace(".", ""))):
        raise ArtefactError(f"{file} has no code for compute capability {compute_capability}")
    return PluginLibrary(file, str(manifest["source"]), str(manifest.get("tensorrt")))


def _runs_on(manifest: Dict[str, Any], capability: int) -> bool:
    """Machine code runs on its own generation from its own capability on; PTX is compiled for any later one."""
    try:
        codes = [int(code) for code in manifest["architectures"]]
        ptx = int(manifest["ptx"])
    except (KeyError, TypeError, ValueError):
        return False
    return ptx <= capability or any(code // 10 == capability // 10 and code <= capability for code in codes)


def ensure_plugin(
    folder: Path, major: int, compute_capability: str, report: Callable[[str], None], force: bool = False
) -> PluginLibrary:
    """The library, built first where none is there that fits.

    Raises
    ------
    PluginError
        It cannot be built, or TensorRT's headers that were found are of another major version.
    """
    try:
        if not force:
            return find_plugin(folder, major, compute_capability)
        reason = "it was asked for"
    except ArtefactError as error:
        reason = str(error)
    report(f"building the plugin library: {reason}")
    _run_script(library_path(folder, major).parent, major, force)
    try:
        return find_plugin(folder, major, compute_capability)
    except ArtefactError as error:
        raise PluginError(
            f"plugins/build.sh built no library for TensorRT {major} ({error}); name the folder of that version's"
            f" headers with TENSORRT_ROOT{_way_out(major)}"
        ) from error


def _run_script(output: Path, major: int, force: bool) -> None:
    command = ["bash", str(BUILD_SCRIPT), "--output", str(output), *(["--force"] if force else [])]
    try:
        done = subprocess.run(
            command,
            env=dict(os.environ, PYTHON=sys.executable),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise PluginError(f"plugins/build.sh cannot be run: {error}{_way_out(major)}") from error
    if done.returncode:
        raise PluginError(f"{_last_words(done.stdout)}{_way_out(major)}")


def _last_words(output: str) -> str:
    """What the script said at its end; before that come a compiler's messages."""
    lines: List[str] = output.strip().splitlines() or ["plugins/build.sh failed and said nothing"]
    start = next((i for i in range(len(lines) - 1, -1, -1) if "error:" in lines[i]), len(lines) - 1)
    return "\n".join(lines[max(0, start - 5) :])


def _way_out(major: int) -> str:
    return "" if major == 8 else "; or do without it: --groupnorm native"
