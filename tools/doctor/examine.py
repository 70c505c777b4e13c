"""The whole table, and whether anything can run."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Tuple

from tools.doctor import machine
from tools.doctor.rows import MISSING, OK, Row, guarded, or_none

TO_RUN = "packages to run"


def examine(
    model: Optional[str], checkpoint: Optional[str], random_weights: Optional[int], folder: Path
) -> Tuple[List[Row], List[str]]:
    """The rows of the table, and the backends that can run: the first is what `initialize` takes.

    Parameters
    ----------
    model, checkpoint, random_weights
        As `canny2image_TRT.hackathon.initialize` takes them.
    folder : Path
        Of all builds.
    """
    rows = guarded("Python", machine.check_python)
    for use in machine.PACKAGES:
        rows += guarded(use, machine.check_packages, use)
    rows += guarded("driver", machine.check_gpus)
    if not rows_ok(rows, TO_RUN):
        rows += guarded("TensorRT", machine.check_tensorrt)
        return [*rows, Row("all else", MISSING, "can be looked at once the packages are there")], []
    rows += guarded("CUDA", machine.check_cuda)
    rows += guarded("cuda-python", machine.check_cuda_python)
    return _with_files(rows, model, checkpoint, random_weights, folder)


def rows_ok(rows: List[Row], what: str) -> bool:
    """Whether the row of that name says so."""
    return any(row.what == what and row.state == OK for row in rows)


def _with_files(
    rows: List[Row], model: Optional[str], checkpoint: Optional[str], random_weights: Optional[int], folder: Path
) -> Tuple[List[Row], List[str]]:
    """What needs the packages to run."""
    from cldm.config import load_config
    from deploy.tensorrt_versions import find_version
    from deploy.toolchain import find_gpu
    from runtime.choose import choose_model
    from tools.doctor import files

    rows += guarded("TensorRT", machine.check_tensorrt)
    config = choose_model(model, checkpoint)
    gpu = or_none(find_gpu) if rows_ok(rows, "CUDA") else None
    place = files.Place(folder, config, checkpoint, random_weights, or_none(find_version), gpu)
    rows += guarded("GroupNorm plugin", files.check_plugin, place)
    rows += guarded("torch operator", files.check_operator, place)
    rows += guarded(f"weights of {config.name}", files.check_checkpoint, place, config)
    if config.name != "sd15" and model is None:
        rows += guarded("weights of sd15", files.check_checkpoint, place, load_config("sd15"))
    rows += guarded("vocabulary", files.check_vocabulary, place)
    rows += guarded("builds", files.check_builds, place)
    rows += guarded("weights of metrics", files.check_metrics)
    rows += guarded("fused networks", files.check_fused, place)
    rows += guarded("calibration", files.check_calibration, place)
    return rows, _backends(rows, config.name) if place.is_complete() else []


def _backends(rows: List[Row], model: str) -> List[str]:
    """Those that can run a model whose weights and vocabulary are there, in order of preference."""
    from runtime.backends import onnxruntime_problem

    ok = {row.what for row in rows if row.state == OK}
    found = []
    if {"CUDA", "TensorRT", "cuda-python"} <= ok and any(what.startswith(f"engines {model}-") for what in ok):
        found.append("tensorrt")
    if "CUDA" in ok:
        found.append("torch on CUDA")
    # Without the packages to export, what is exported already has to do.
    exports = "packages to export" in ok or any(what.startswith(f"ONNX {model}-") for what in ok)
    if exports and onnxruntime_problem() is None:
        found.append("onnxruntime")
    return [*found, "torch on the CPU"]
