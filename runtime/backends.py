"""The ways to run a build, in order of preference, and why one cannot run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Protocol, Tuple

from cldm.weights import Weights
from deploy.manifest import ArtefactError, check_artefact, export_command, identity
from deploy.spec import Build, graph_specs
from runtime.choose import cuda_problem
from runtime.cuda_graph import GraphCapture
from runtime.cuda_runtime import driver_problem
from runtime.session import Session
from runtime.torch_backend import TorchBackend

Report = Callable[[str], None]
# Gives the build that is to run, in the precision that a backend prefers where the user names none.
Wanted = Callable[[str], Build]


class BackendError(RuntimeError):
    """The backend asked for cannot run here, or not as asked."""


class Backend(Protocol):
    """Makes the sessions of a build.

    Attributes
    ----------
    name : str
    device : str
        Where its sessions run.
    precisions : tuple of str
        Those it runs, the default first.
    """

    name: str
    device: str
    precisions: Tuple[str, ...]

    def sessions(self, build: Build) -> Mapping[str, Session]:
        """Sessions for the graphs of a build, by graph name."""

    def graphs(self) -> Optional[GraphCapture]:
        """What captures the work of one pipeline's sessions as CUDA graphs; None where they are not on a GPU."""

    def close(self) -> None:
        """Free what the sessions share."""


class OnnxRuntimeBackend:
    """Exported graphs on the CPU; what is not exported yet is exported on first use.

    Parameters
    ----------
    folder : Path
        Where the builds are.
    export : bool
        Export what is missing or does not match; False raises with the command that does.
    report : callable
        Takes lines of progress.
    """

    name = "onnxruntime"
    device = "cpu"
    precisions = ("fp32", "fp16")

    def __init__(self, weights: Weights, load: Callable[[], Any], folder: Path, export: bool, report: Report) -> None:
        self._weights = weights
        self._load = load
        self._folder = folder
        self._export = export
        self._report = report

    def sessions(self, build: Build) -> Mapping[str, Session]:
        from runtime.ort_session import OrtSession

        specs = graph_specs(build)
        target = self._folder / build.folder_name
        cache = self._folder / ".hashes.json"
        try:
            for spec in specs.values():
                check_artefact(target / spec.file, identity(build, spec, self._weights), cache)
        except ArtefactError as reason:
            if not self._export:
                command = export_command(build, self._weights, self._folder)
                raise ArtefactError(f"{reason}; make it with: {command}") from reason
            lacking = [name for name in ("onnx", "polygraphy") if importlib.util.find_spec(name) is None]
            if lacking:
                raise BackendError(
                    f"{reason}, and to export it {', '.join(lacking)} is missing: run bash preprocess.sh"
                ) from reason
            from deploy.export import export_all

            export_all(build, self._weights, self._load, self._folder, report=self._report)
        return {name: OrtSession(target / spec.file, spec) for name, spec in specs.items()}

    def graphs(self) -> Optional[GraphCapture]:
        return None

    def close(self) -> None:
        """Its sessions share nothing."""


def onnxruntime_problem() -> Optional[str]:
    """Why ONNX Runtime cannot run here, or None."""
    return None if importlib.util.find_spec("onnxruntime") else "the package onnxruntime is not installed"


def choose_backend(
    name: Optional[str],
    device: Optional[str],
    weights: Weights,
    load: Callable[[], Any],
    folder: Path,
    export: bool = True,
    report: Report = print,
    wanted: Optional[Wanted] = None,
) -> Tuple[Backend, str]:
    """The backend asked for, or the first of the preferred ones that can run, and the reason.

    Parameters
    ----------
    name : {"tensorrt", "torch", "onnxruntime", "auto"} or None
    device : str or None
        "cpu", "cuda", "cuda:1", ...; by default a CUDA device where there is one.
    wanted : callable, optional
        Takes a precision and gives the build that TensorRT's plans are looked for of; without it TensorRT is chosen
        only where it is asked for.

    Raises
    ------
    BackendError
        The backend or the device asked for is unknown, cannot run, or the two do not go together.
    """
    if name not in (None, "auto", "tensorrt", "torch", "onnxruntime"):
        raise BackendError(f"unknown backend {name!r}; there are tensorrt, torch and onnxruntime")
    if name == "onnxruntime":
        if device not in (None, "cpu"):
            raise BackendError(f"the onnxruntime backend runs on the CPU, not on {device}")
        problem = onnxruntime_problem()
        if problem:
            raise BackendError(f"onnxruntime cannot run here: {problem}")
        return OnnxRuntimeBackend(weights, load, folder, export, report), "asked for"
    if name == "tensorrt":
        return _tensorrt(device, weights, folder), "asked for"
    if name == "torch":
        return TorchBackend(weights, load, _torch_device(device), folder, report), "asked for"
    # A device that was asked for and is not there is an error, and no reason to take another.
    found = _torch_device(device)
    if found != "cpu":
        return _first_on_cuda(found, weights, load, folder, wanted, report)
    problem = _why_no_cuda() if device is None else "the CPU was asked for"
    return _first_on_cpu([f"tensorrt and torch on CUDA: {problem}"], weights, load, folder, export, report)


def _tensorrt(device: Optional[str], weights: Weights, folder: Path) -> Backend:
    from deploy.tensorrt_versions import TensorRTError
    from runtime.tensorrt_backend import TensorRTBackend

    if device == "cpu":
        raise BackendError("the tensorrt backend runs on a CUDA device, not on the CPU")
    problem = _why_no_cuda()
    if problem:
        raise BackendError(f"tensorrt cannot run here: {problem}")
    try:
        return TensorRTBackend(weights, folder, _torch_device(device))
    except TensorRTError as error:
        raise BackendError(f"tensorrt cannot run here: {error}") from error


def _first_on_cuda(
    device: str,
    weights: Weights,
    load: Callable[[], Any],
    folder: Path,
    wanted: Optional[Wanted],
    report: Report,
) -> Tuple[Backend, str]:
    """TensorRT where its plans are there and load, else PyTorch."""
    from deploy.tensorrt_versions import TensorRTError
    from runtime.tensorrt_backend import TensorRTBackend

    try:
        backend = TensorRTBackend(weights, folder, device)
        if wanted is None:
            raise TensorRTError("it was not asked for")
        backend.load(wanted(backend.precisions[0]))
    except (TensorRTError, ArtefactError) as error:
        return TorchBackend(weights, load, device, folder, report), f"first that can run; tensorrt: {error}"
    return backend, "its engines are built, the first choice on a CUDA device"


def _first_on_cpu(
    passed: List[str], weights: Weights, load: Callable[[], Any], folder: Path, export: bool, report: Report
) -> Tuple[Backend, str]:
    problem = onnxruntime_problem()
    if problem is None:
        backend = OnnxRuntimeBackend(weights, load, folder, export, report)
        return backend, "; ".join(["first that can run", *passed])
    reason = "; ".join(["all that is left", *passed, f"onnxruntime: {problem}"])
    return TorchBackend(weights, load, "cpu", folder, report), reason


def _why_no_cuda() -> Optional[str]:
    """Why there is no CUDA device to run on, or None if there is."""
    problem = cuda_problem()
    return problem and (driver_problem() or problem)


def _torch_device(device: Optional[str]) -> str:
    """A device that torch has; raises `BackendError` for any other."""
    import torch

    problem = _why_no_cuda()
    if device is None:
        return "cpu" if problem else "cuda"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"device {device!r} is not one that torch knows: {str(error).splitlines()[0]}") from error
    if parsed.type == "cuda":
        if problem:
            raise BackendError(f"device {device} was asked for, but {problem}")
        if (parsed.index or 0) >= torch.cuda.device_count():
            raise BackendError(f"device {device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    elif parsed.type != "cpu":
        raise BackendError(f"device must be cpu or cuda, got {device!r}")
    return device
