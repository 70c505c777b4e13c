"""The backend that runs TensorRT's plans, which build_engines.py makes. No torch and no TensorRT at import."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Dict, Mapping, Optional, Tuple

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
        if build.precision not in self.precisions:
            raise ArtefactError(f"it runs {', '.join(self.precisions)}, not {build.precision}")
        target = self._folder / build.folder_name
        for spec in graph_specs(build).values():
            file = plan_path(target, spec)
            check_plan(file, build, spec, self._weights, self._tools.machine, self._folder / ".hashes.json")

    def load(self, build: Build) -> None:
        """Make the sessions of a build ahead, which the next `sessions` gives; after an error all is freed.

        Raises what `check`, `TensorRTRuntime` and `TensorRTSession` raise.
        """
        self.check(build)
        self._drop_loaded()
        try:
            self._loaded = build, self._make_sessions(build)
        except BaseException:
            self.close()
            raise

    def sessions(self, build: Build) -> Mapping[str, Session]:
        """As `Backend.sessions`; raises what `load` raises."""
        if self._loaded is not None and self._loaded[0] == build:
            (_, loaded), self._loaded = self._loaded, None
            return loaded
        self.check(build)
        return self._make_sessions(build)

    def _make_sessions(self, build: Build) -> Dict[str, TensorRTSession]:
        if self._runtime is None:
            plugin = self._tools.plugin
            self._runtime = TensorRTRuntime(self.device, plugin=None if plugin is None else plugin.file)
        target = self._folder / build.folder_name
        made: Dict[str, TensorRTSession] = {}
        with contextlib.ExitStack() as on_failure:
            for name, spec in graph_specs(build).items():
                made[name] = TensorRTSession(plan_path(target, spec), spec, self._runtime)
                on_failure.callback(made[name].close)
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
    """TensorRT, the GPU, and the plugin library if one is there; none is built."""
    import torch

    version = find_version()
    with torch.cuda.device(device):
        gpu = find_gpu()
    plugin = None
    with contextlib.suppress(ArtefactError):  # a plan that needs it is refused, and says so
        plugin = find_plugin(folder, version.major, gpu.compute_capability)
    return Toolchain(version, gpu, plugin)


def _cuda_runtime() -> CudaRuntime:
    """The CUDA runtime, once the driver is seen to be new enough."""
    problem = driver_problem()
    if problem:
        raise TensorRTError(problem)
    try:
        return CudaRuntime()
    except CudaError as error:
        raise TensorRTError(str(error)) from error
