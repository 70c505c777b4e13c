"""The backend that runs the graphs' modules by PyTorch, on a CPU or a CUDA device. No torch at import.

On a CUDA device, in half precision, the fused networks take the modules' place where they can run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from cldm.weights import Weights
from deploy.spec import Build, graph_specs
from runtime.cuda_graph import GraphCapture, TorchGraphs
from runtime.session import Session

Report = Callable[[str], None]


class TorchBackend:
    """The graphs' modules run by PyTorch; modules are shared by the sizes they are asked for.

    Parameters
    ----------
    weights : Weights
    load : callable
        Gives the model in FP32.
    device : str
    folder : Path
        Where compiled kernels and measured tile sizes are kept.
    report : callable
        Takes lines of progress.
    """

    name = "torch"

    def __init__(self, weights: Weights, load: Callable[[], Any], device: str, folder: Path, report: Report) -> None:
        self.device = device
        self.precisions = ("fp32", "fp16", "bf16") if device == "cpu" else ("fp16", "fp32", "bf16", "fp8")
        self._load = load
        self._folder = folder
        self._report = report
        self._modules: Dict[Tuple[str, int], Dict[str, Any]] = {}
        self._fused: Dict[str, Any] = {}
        self._model: Any = None

    def sessions(self, build: Build) -> Mapping[str, Session]:
        if self.device.startswith("cuda"):
            from runtime.fused.build import fused_problem

            problem = fused_problem(self.device, build.precision)
            if problem is None:
                return self._fused_sessions(build)
            if build.precision == "fp8":
                from runtime.backends import BackendError

                raise BackendError(f"fp8 runs on the fused kernels alone: {problem}; take precision fp16")
            if build.precision != "fp32":
                self._report(f"PyTorch's own kernels run, not the fused ones: {problem}")
        return self._module_sessions(build)

    def _fused_sessions(self, build: Build) -> Mapping[str, Session]:
        from runtime.fused.build import FusedNetworks, require_memory

        if build.precision not in self._fused:
            require_memory(build.config, self.device)
            self._fused[build.precision] = FusedNetworks(
                self._load(), self.device, build.precision, self._folder, self._report
            )
        return self._fused[build.precision].sessions(build)

    def _module_sessions(self, build: Build) -> Mapping[str, Session]:
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

    def graphs(self) -> Optional[GraphCapture]:
        return TorchGraphs() if self.device.startswith("cuda") else None

    def close(self) -> None:
        self._modules.clear()
        self._fused.clear()
        self._model = None
