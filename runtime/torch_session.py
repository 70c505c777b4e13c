"""Sessions on PyTorch: any device, any precision."""

from __future__ import annotations

from typing import Any, List, Mapping

from deploy.spec import GraphSpec
from runtime.session import check_buffers


class TorchSession:
    """Runs a deployable graph's module eagerly.

    Parameters
    ----------
    module : nn.Module
        Takes the inputs of `spec` in order and returns its outputs.
    spec : GraphSpec
    """

    def __init__(self, module: Any, spec: GraphSpec) -> None:
        self.spec = spec
        self._module = module

    def bind(self, buffers: Mapping[str, Any]) -> BoundModule:
        check_buffers(self.spec, buffers)
        if self._module is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        inputs = [buffers[name] for name in self.spec.inputs]
        return BoundModule(self._module, inputs, [buffers[name] for name in self.spec.outputs])

    def close(self) -> None:
        self._module = None


class BoundModule:
    """A `TorchSession` with its buffers: reads the inputs in place, copies the results into the outputs."""

    def __init__(self, module: Any, inputs: List[Any], outputs: List[Any]) -> None:
        self._module = module
        self._inputs = inputs
        self._outputs = outputs

    def enqueue(self) -> None:
        import torch

        from ldm.exact import exact_fp32

        with torch.no_grad(), exact_fp32():
            results = self._module(*self._inputs)
            for target, value in zip(self._outputs, results if isinstance(results, tuple) else (results,)):
                target.copy_(value)
