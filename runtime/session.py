"""What runs one graph. The pipeline cannot tell which kind it has.

A session knows the names it reads and writes. Bound to buffers it becomes a call without arguments: `enqueue`.
"""

from __future__ import annotations

from typing import Any, Mapping, Protocol

from deploy.spec import GraphSpec


class Bound(Protocol):
    """A session with its buffers."""

    def enqueue(self) -> None:
        """Run once, or on a GPU put one run into the stream; nothing is waited for."""


class Session(Protocol):
    """One graph, ready to run.

    Attributes
    ----------
    spec : GraphSpec
        The names, shapes and types of its tensors.
    """

    spec: GraphSpec

    def bind(self, buffers: Mapping[str, Any]) -> Bound:
        """Fix which memory the graph's tensors are, by name.

        Parameters
        ----------
        buffers : mapping
            For every tensor of `spec` a torch tensor of its shape and type on the session's device, contiguous. The
            session keeps a reference to them.

        Raises
        ------
        ValueError
            A tensor is missing or does not fit.
        """

    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards."""


def check_buffers(spec: GraphSpec, buffers: Mapping[str, Any]) -> None:
    """Raise ValueError unless the buffers are what `Session.bind` wants."""
    for name, tensor in spec.tensors.items():
        if name not in buffers:
            raise ValueError(f"{spec.name}: no buffer for tensor {name}")
        buffer = buffers[name]
        fits = len(buffer.shape) == len(tensor.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(tensor.shape, buffer.shape)
        )
        if not fits or str(buffer.dtype) != f"torch.{tensor.dtype}" or not buffer.is_contiguous():
            raise ValueError(
                f"{spec.name}: tensor {name} must be contiguous {tensor.dtype} {tensor.shape},"
                f" got {buffer.dtype} {tuple(buffer.shape)}"
            )
