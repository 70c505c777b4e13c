"""Sessions on the fused networks."""

from __future__ import annotations

from typing import Any, Mapping, Optional

from deploy.spec import GraphSpec
from runtime.session import check_buffers


class FusedSession:
    """Runs one graph's fused network, which reads and writes the buffers in place.

    Parameters
    ----------
    network : callable
        One of `runtime.fused.networks`: takes inputs and outputs by name.
    spec : GraphSpec
    """

    def __init__(self, network: Any, spec: GraphSpec) -> None:
        self.spec = spec
        self._network: Optional[Any] = network

    def bind(self, buffers: Mapping[str, Any]) -> BoundFused:
        check_buffers(self.spec, buffers)
        if self._network is None:
            raise RuntimeError(f"the session of {self.spec.name} is closed")
        inputs = {name: buffers[name] for name in self.spec.inputs}
        return BoundFused(self._network, inputs, {name: buffers[name] for name in self.spec.outputs})

    def close(self) -> None:
        self._network = None


class BoundFused:
    """A `FusedSession` with its buffers."""

    def __init__(self, network: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._network = network
        self._inputs = inputs
        self._outputs = outputs

    def enqueue(self) -> None:
        import torch

        with torch.no_grad():
            self._network(self._inputs, self._outputs)
