"""Everything in which running differs between TensorRT 8.6, 10 and 11; for building that is `deploy.tensorrt_versions`.

====================  ============================================  ===========================================
\\                     8.6                                           10 and 11
====================  ============================================  ===========================================
activation memory     device_memory_size                            device_memory_size_v2
context without it    create_execution_context_without_device_...   create_execution_context with USER_MANAGED
setting it            property device_memory                        set_device_memory, with the size
====================  ============================================  ===========================================

11 has nothing of the left column; 10 has all of it, most of it deprecated. `tensorrt` is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Protocol

if TYPE_CHECKING:
    import tensorrt


class Execution(Protocol):
    """What running asks of one major version."""

    def activation_bytes(self, engine: tensorrt.ICudaEngine) -> int:
        """Size of the device memory that a context of the engine works in."""

    def make_context(self, engine: tensorrt.ICudaEngine) -> Optional[tensorrt.IExecutionContext]:
        """A context without that memory; None where TensorRT refuses."""

    def set_activations(self, context: tensorrt.IExecutionContext, address: int, num_bytes: int) -> None:
        """Give a context its memory; it stays the caller's."""


class Execution8:
    """`Execution` of 8.6."""

    def activation_bytes(self, engine: tensorrt.ICudaEngine) -> int:
        return int(engine.device_memory_size)

    def make_context(self, engine: tensorrt.ICudaEngine) -> Optional[tensorrt.IExecutionContext]:
        return engine.create_execution_context_without_device_memory()

    def set_activations(self, context: tensorrt.IExecutionContext, address: int, num_bytes: int) -> None:
        context.device_memory = address


class Execution10:
    """`Execution` of 10 and 11."""

    def activation_bytes(self, engine: tensorrt.ICudaEngine) -> int:
        return int(engine.device_memory_size_v2)

    def make_context(self, engine: tensorrt.ICudaEngine) -> Optional[tensorrt.IExecutionContext]:
        import tensorrt

        return engine.create_execution_context(tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def set_activations(self, context: tensorrt.IExecutionContext, address: int, num_bytes: int) -> None:
        context.set_device_memory(address, num_bytes)


def execution_of(major: int) -> Execution:
    """The differences of a major version that `deploy.tensorrt_versions.find_version` lets through."""
    return Execution8() if major == 8 else Execution10()
