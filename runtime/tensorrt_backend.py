"""The backend that runs TensorRT's plans, which build_engines.py makes. No torch and no TensorRT at import."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from cldm.weights import Weights
from deploy.manifest import ArtefactError
from deploy.plan_manifest import check_plan, plan_path
from deploy.plugin_library import find_plugin
from deploy.spec import Build, graph_specs
from deploy.tensorrt_versions import TensorRTError, find_version
from deploy.toolchain import Toolchain, find_gpu
from runtime.cuda_graph import CudaRuntimeGraphs, GraphCapture
from runtime.cuda_runtime import CudaError, CudaRuntime, current_stream, driver_problem
from runtime.session import Session
from runtime.tensorrt_session import TensorRTRuntime, TensorRTSession


class TensorRTBackend:
    """Plans that fit this machine; none is built here.

    Parameters
    ----------
    weights : Weights
    folder : Path
        Where the builds are.
    device : str
        "cuda", "cuda:1", ...

    Raises
    ------
    TensorRTError
        TensorRT is missing or of an unknown version, the driver is too old, or cuda-python is not installed.
    """

    name = "tensorrt"
    precisions = ("fp16", "fp32")

    def __init__(self, weights: Weights, folder: Path, device: str) -> None:
        self.device = device
        self._weights = weights
        self._folder = folder
        self._tools = _find_tools(folder, device)
        self._cuda = _cuda_runtime()
        self._runtime: Optional[TensorRTRuntime] = None
        self._loaded: Optional[Tuple[Build, Dict[str, TensorRTSession]]] = None

    def check(self, build: Build) -> None:
        """Look at every plan of a build; nothing is deserialised.

        Raises
        ------
        ArtefactError
            One is missing, damaged or not for this machine; the message has the command that builds it.
        """
        self._manifests(build)

    def _manifests(self, build: Build) -> List[Dict[str, Any]]:
        """Of the plans of a build, each of which was checked."""
        if build.precision not in self.precisions:
            raise ArtefactError(f"it runs {', '.join(self.precisions)}, not {build.precision}")
        target = self._folder / build.folder_name
        hashes = self._folder / ".hashes.json"
        return [
            check_plan(plan_path(target, spec), build, spec, self._weights, self._tools.machine, hashes)
            for spec in graph_specs(build).values()
        ]

    def load(self, build: Build) -> None:
        """Make the sessions of a build ahead, which the next `sessions` gives; after an error all is freed.

        Raises what `check`, `TensorRTRuntime` and `TensorRTSession` raise.
        """
        manifests = self._manifests(build)
        self._drop_loaded()
        try:
            self._loaded = build, self._make_sessions(build, manifests)
        except BaseException:
            self.close()
            raise

    def sessions(self, build: Build) -> Mapping[str, Session]:
        """As `Backend.sessions`; raises what `load` raises."""
        if self._loaded is not None and self._loaded[0] == build:
            (_, loaded), self._loaded = self._loaded, None
            return loaded
        return self._make_sessions(build, self._manifests(build))

    def _make_sessions(self, build: Build, manifests: List[Dict[str, Any]]) -> Dict[str, TensorRTSession]:
        if self._runtime is None:
            self._runtime = TensorRTRuntime(self.device)
        # Only then, so that a library that does not load is in the way of no plan that does without.
        if any(manifest.get("plugin") is not None for manifest in manifests):
            self._runtime.load_plugin(self._tools.plugin_file())
        target = self._folder / build.folder_name
        made: Dict[str, TensorRTSession] = {}
        with contextlib.ExitStack() as on_failure:
            for name, spec in graph_specs(build).items():
                made[name] = TensorRTSession(plan_path(target, spec), spec, self._runtime)
                on_failure.callback(made[name].close)
            for session in made.values():
                session.take_memory()
            on_failure.pop_all()
        return made

    def graphs(self) -> Optional[GraphCapture]:
        return CudaRuntimeGraphs(self._cuda, lambda: current_stream(self.device))

    def _drop_loaded(self) -> None:
        loaded, self._loaded = self._loaded, None
        for session in loaded[1].values() if loaded is not None else ():
            session.close()

    def close(self) -> None:
        self._drop_loaded()
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.close()


def _find_tools(folder: Path, device: str) -> Toolchain:
    """TensorRT, the GPU, and the plugin library if one is there; none is built.

    Where there is none a plan that needs it is refused, and says why.
    """
    import torch

    version = find_version()
    with torch.cuda.device(device):
        gpu = find_gpu()
    try:
        return Toolchain(version, gpu, find_plugin(folder, version.major, gpu.compute_capability))
    except ArtefactError as error:
        return Toolchain(version, gpu, plugin_problem=str(error))


def _cuda_runtime() -> CudaRuntime:
    """The CUDA runtime, once the driver is seen to be new enough."""
    problem = driver_problem()
    if problem:
        raise TensorRTError(problem)
    try:
        return CudaRuntime()
    except CudaError as error:
        raise TensorRTError(str(error)) from error
