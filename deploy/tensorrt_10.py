"""Building with TensorRT 10 (from 10.1) and 11, whose networks take their types from the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Optional

if TYPE_CHECKING:
    import tensorrt

    from deploy.build_progress import BuildProgress


class TensorRT10:
    """`deploy.tensorrt_versions.TensorRTVersion` of 10."""

    major = 10
    has_native_group_norm = True
    has_monitor = True

    def __init__(self, version: str) -> None:
        self.version = version

    def network_flags(self) -> int:
        import tensorrt

        return 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def configure(self, config: tensorrt.IBuilderConfig) -> None:
        """Nothing: 10 leaves cuBLAS and cuDNN out by default, and 11 has no such sources."""

    def set_precision(
        self, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, types: Mapping[str, str]
    ) -> None:
        """Nothing: a strongly typed network refuses precision flags, and needs none."""

    def find_creator(self, registry: tensorrt.IPluginRegistry, name: str, version: str, namespace: str) -> Any:
        return registry.get_creator(name, version, namespace)

    def hardware_level(self, name: str) -> Optional[tensorrt.HardwareCompatibilityLevel]:
        import tensorrt

        levels = tensorrt.HardwareCompatibilityLevel
        if name == "same-compute-capability":
            return getattr(levels, "SAME_COMPUTE_CAPABILITY", None)  # the first versions of 10 have none
        return {"none": levels.NONE, "ampere-plus": levels.AMPERE_PLUS}.get(name)

    def watch(self, config: tensorrt.IBuilderConfig, progress: BuildProgress) -> Any:
        monitor = _make_monitor(progress)
        config.progress_monitor = monitor
        return monitor


class TensorRT11(TensorRT10):
    """`deploy.tensorrt_versions.TensorRTVersion` of 11: all its networks are strongly typed."""

    major = 11

    def network_flags(self) -> int:
        return 0


def _make_monitor(progress: BuildProgress) -> Any:
    import tensorrt

    class Monitor(tensorrt.IProgressMonitor):
        """Hands on what the builder's threads tell. No exception may pass through TensorRT's C++."""

        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            progress.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Whether to go on."""
            progress.step_complete(phase_name, step)
            return not progress.cancelled

        def phase_finish(self, phase_name: str) -> None:
            progress.phase_finish(phase_name)

    return Monitor()
