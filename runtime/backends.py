"""The ways to run a build, in order of preference, and why one cannot run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Protocol, Tuple

from cldm.weights import Weights
from deploy.manifest import ArtefactError, check_artefact, export_command, identity
from deploy.spec import Build, graph_specs
from runtime.choose import cuda_problem
from runtime.session import Session

Report = Callable[[str], None]


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

    def close(self) -> None:
        """Free what the sessions share."""


class TorchBackend:
    """The graphs' modules run by PyTorch; modules are shared by the sizes they are asked for."""

    name = "torch"

    def __init__(self, weights: Weights, load: Callable[[], Any], device: str) -> None:
        self.device = device
        self.precisions = ("fp32", "fp16", "bf16") if device == "cpu" else ("fp16", "fp32", "bf16")
        self._load = load
        self._modules: Dict[Tuple[str, int], Dict[str, Any]] = {}
        self._model: Any = None

    def sessions(self, build: Build) -> Mapping[str, Session]:
        from deploy.graphs import build_graph
        from runtime.torch_session import TorchSession

        specs = graph_specs(build)
        key = (build.precision, build.samples)
        if key not in self._modules:
            model = self._load().to(self.device)
            if build.precision == "fp32":
                self._model = model  # shares its weights with the graphs, and spares the reference a second copy
            self._modules[key] = {name: build_graph(name, model, *key) for name in specs}
        return {name: TorchSession(self._modules[key][name], spec) for name, spec in specs.items()}

    def close(self) -> None:
        self._modules.clear()
        self._model = None


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
) -> Tuple[Backend, str]:
    """The backend asked for, or the first of the preferred ones that can run, and the reason.

    Parameters
    ----------
    name : {"torch", "onnxruntime", "auto"} or None
    device : str or None
        "cpu", "cuda", "cuda:1", ...; by default a CUDA device where there is one.

    Raises
    ------
    BackendError
        The backend or the device asked for is unknown, cannot run, or the two do not go together.
    """
    if name not in (None, "auto", "torch", "onnxruntime"):
        raise BackendError(f"unknown backend {name!r}; there are torch and onnxruntime")
    if name == "onnxruntime":
        if device not in (None, "cpu"):
            raise BackendError(f"the onnxruntime backend runs on the CPU, not on {device}")
        problem = onnxruntime_problem()
        if problem:
            raise BackendError(f"onnxruntime cannot run here: {problem}")
        return OnnxRuntimeBackend(weights, load, folder, export, report), "asked for"
    if name == "torch" or device not in (None, "cpu"):
        return TorchBackend(weights, load, _torch_device(device)), "asked for"
    return _first_that_can_run(device, weights, load, folder, export, report)


def _first_that_can_run(
    device: Optional[str], weights: Weights, load: Callable[[], Any], folder: Path, export: bool, report: Report
) -> Tuple[Backend, str]:
    problem = "the CPU was asked for" if device == "cpu" else cuda_problem()
    if problem is None:
        return TorchBackend(weights, load, _torch_device(device)), "a CUDA device, the first choice here"
    passed = [f"torch on CUDA: {problem}"]
    problem = onnxruntime_problem()
    if problem is None:
        backend = OnnxRuntimeBackend(weights, load, folder, export, report)
        return backend, "; ".join(["first that can run", *passed])
    passed.append(f"onnxruntime: {problem}")
    return TorchBackend(weights, load, "cpu"), "; ".join(["all that is left", *passed])


def _torch_device(device: Optional[str]) -> str:
    """A device that torch has; raises `BackendError` for any other."""
    import torch

    problem = cuda_problem()
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
