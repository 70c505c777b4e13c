"""Every tensor of a pipeline, by name, allocated once."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Tuple

import numpy as np

from deploy.spec import GraphSpec


class Workspace:
    """Named tensors on one device.

    They are torch tensors; on a CPU they share their memory with NumPy and with ONNX Runtime's bindings, on a GPU
    their addresses go to TensorRT.

    Parameters
    ----------
    device : str
        "cpu", "cuda", "cuda:1", ...
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._tensors: Dict[str, Any] = {}

    def add(self, name: str, shape: Tuple[int, ...], dtype: str) -> Any:
        """Allocate a tensor of zeros; a name of the same shape and type is kept as it is.

        Raises
        ------
        ValueError
            The name is taken by a tensor of another shape or type.
        """
        import torch

        tensor = self._tensors.get(name)
        if tensor is None:
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)
            self._tensors[name] = tensor
        elif tuple(tensor.shape) != tuple(shape) or str(tensor.dtype) != f"torch.{dtype}":
            raise ValueError(
                f"two graphs disagree about {name}: {tensor.dtype} {tuple(tensor.shape)} and {dtype} {tuple(shape)}"
            )
        return tensor

    def add_graph(self, spec: GraphSpec, skip: Iterable[str] = ()) -> None:
        """Allocate the tensors of a graph that have a fixed shape."""
        left_out = set(skip)
        for name, tensor in spec.tensors.items():
            if name not in left_out and not any(isinstance(dim, str) for dim in tensor.shape):
                self.add(name, tuple(int(dim) for dim in tensor.shape), tensor.dtype)

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def write(self, name: str, value: Any) -> None:
        """Copy an array or tensor of the same shape into a tensor."""
        import torch

        target = self._tensors[name]
        source = torch.as_tensor(value)
        if source.shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(target.shape)}, got {tuple(source.shape)}")
        target.copy_(source)

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor, once what is enqueued before has run; half precision comes as float32."""
        tensor = self._tensors[name].detach()
        if tensor.is_floating_point():
            tensor = tensor.float()
        host = tensor.cpu()
        return (host.clone() if host.data_ptr() == self._tensors[name].data_ptr() else host).numpy()

    def clear(self) -> None:
        self._tensors.clear()
