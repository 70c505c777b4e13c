"""Every tensor of a pipeline, by name, allocated once."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Tuple

import numpy as np

from deploy.spec import GraphSpec

# TensorRT wants the address of a tensor to be a multiple of this.
ALIGNMENT = 256


class Workspace:
    """Named tensors on one device.

    They are torch tensors; on a CPU they share their memory with NumPy and with ONNX Runtime's bindings, on a GPU
    their addresses go to TensorRT.

    Parameters
    ----------
    device : str
        "cpu", "cuda", "cuda:1", ...
    staged : bool
        Read and write copies on the host, pinned on a GPU, which `upload` and `download` connect with the tensors: so
        copying waits for nothing, and can be captured. Otherwise the tensors themselves are read and written.
    """

    def __init__(self, device: str, staged: bool = False) -> None:
        self.device = device
        self._staged = staged
        self._tensors: Dict[str, Any] = {}
        self._hosts: Dict[str, Any] = {}

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

    def host(self, name: str) -> Any:
        """What is read and written for a tensor: its copy on the host, made on first use, or the tensor itself."""
        import torch

        if not self._staged:
            return self._tensors[name]
        if name not in self._hosts:
            tensor = self._tensors[name]
            self._hosts[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return self._hosts[name]

    def write(self, name: str, value: Any) -> None:
        """Copy an array or tensor of the same shape into a tensor, or where it is staged into its host copy."""
        target = self.host(name)
        if tuple(value.shape) != tuple(target.shape):
            raise ValueError(f"{name} has shape {tuple(target.shape)}, got {tuple(value.shape)}")
        if isinstance(value, np.ndarray) and target.device.type == "cpu":
            # Not by PyTorch: it wakes threads for a hundred kilobytes, which takes milliseconds.
            np.copyto(target.numpy(), value)
        else:
            import torch

            target.copy_(torch.as_tensor(value))

    def upload(self, name: str) -> None:
        """Enqueue the copy from the host, where tensors are staged."""
        if self._staged:
            self._tensors[name].copy_(self.host(name), non_blocking=True)

    def download(self, name: str) -> None:
        """Enqueue the copy to the host, where tensors are staged."""
        if self._staged:
            self.host(name).copy_(self._tensors[name], non_blocking=True)

    def read(self, name: str) -> np.ndarray:
        """A copy of a tensor, once what is enqueued before has run; half precision comes as float32.

        Where it is staged, a copy of its host copy, as the last `download` left it: that one is to be waited for.
        """
        host = self.host(name).detach()
        array: np.ndarray = (host.float() if host.is_floating_point() else host).cpu().numpy()
        return array.copy()

    def poison(self, harmless: Iterable[str] = ()) -> None:
        """Fill all tensors with what no run writes, NaN or the largest number, and host copies not uploaded from too.

        Parameters
        ----------
        harmless : iterable of str
            Tensors whose host copies are inputs and stay; on the device they become zeros.
        """
        inputs = set(harmless)
        for name, tensor in self._tensors.items():
            if name in inputs:
                tensor.zero_()
            else:
                _fill_with_poison(tensor)
        for name, tensor in self._hosts.items():
            if name not in inputs:
                _fill_with_poison(tensor)

    def clear(self) -> None:
        self._tensors.clear()
        self._hosts.clear()


def aligned_rows(count: int, width: int, dtype: str, device: str) -> Any:
    """A (count, width) tensor of zeros whose rows each begin at an address that TensorRT takes."""
    import torch

    kind = getattr(torch, dtype)
    size = torch.empty((), dtype=kind).element_size()
    padded = -(-width * size // ALIGNMENT) * ALIGNMENT // size
    return torch.zeros((count, padded), dtype=kind, device=device)[:, :width]


def _fill_with_poison(tensor: Any) -> None:
    import torch

    tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
