"""Building with TensorRT 8.6, which has no strongly typed networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, List, Mapping, Optional

from deploy.tensorrt_versions import TensorRTError

if TYPE_CHECKING:
    import tensorrt

    from deploy.build_progress import BuildProgress


class TensorRT8:
    """`deploy.tensorrt_versions.TensorRTVersion` of 8.6.

    Its networks are weakly typed: with the flag for FP16 a layer takes whichever of FP32 and FP16 is faster, whatever
    the graph says. So each layer that the graph has in FP32 (statistics, softmax, guidance, update) is held to it, and
    the others are left to the builder, which may still take FP32 for one of those.
    """

    major = 8
    has_native_group_norm = False
    has_monitor = False

    def __init__(self, version: str) -> None:
        self.version = version

    def network_flags(self) -> int:
        import tensorrt

        return 1 << int(tensorrt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def configure(self, config: tensorrt.IBuilderConfig) -> None:
        """Build of TensorRT's own kernels only.

        8.6 was made for cuBLAS 11 or 12 and cuDNN 8. The torch in this process brings others, and which of them a
        plan's process finds first is not for us to say.
        """
        import tensorrt

        sources = tensorrt.TacticSource
        kept = (sources.EDGE_MASK_CONVOLUTIONS, sources.JIT_CONVOLUTIONS)
        if not config.set_tactic_sources(sum(1 << int(source) for source in kept)):
            raise TensorRTError(f"TensorRT {self.version} refused to do without cuBLAS and cuDNN")

    def set_precision(
        self, network: tensorrt.INetworkDefinition, config: tensorrt.IBuilderConfig, types: Mapping[str, str]
    ) -> None:
        import tensorrt

        for index in range(network.num_outputs):
            _give_type(network.get_output(index), types)
        if "float16" not in types.values():
            return
        config.set_flag(tensorrt.BuilderFlag.FP16)
        config.set_flag(tensorrt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        for layer in _of_type(network, types, "float32"):
            _hold_to_fp32(layer)

    def find_creator(self, registry: tensorrt.IPluginRegistry, name: str, version: str, namespace: str) -> Any:
        return registry.get_plugin_creator(name, version, namespace)

    def hardware_level(self, name: str) -> Optional[tensorrt.HardwareCompatibilityLevel]:
        import tensorrt

        levels = tensorrt.HardwareCompatibilityLevel
        return {"none": levels.NONE, "ampere-plus": levels.AMPERE_PLUS}.get(name)

    def watch(self, config: tensorrt.IBuilderConfig, progress: BuildProgress) -> Any:
        return None


def _give_type(output: tensorrt.ITensor, types: Mapping[str, str]) -> None:
    """Say that an output of the network is of the graph's floating-point type, which is not known by itself here."""
    import tensorrt

    known = {"float32": tensorrt.float32, "float16": tensorrt.float16}
    wanted = known.get(types.get(output.name, ""))
    if wanted is not None:
        output.dtype = wanted


def _of_type(network: tensorrt.INetworkDefinition, types: Mapping[str, str], wanted: str) -> List[tensorrt.ILayer]:
    """The layers that the graph computes in one type.

    The parser gives the tensors of the graph their names. Layers that it adds in front, on the way from a node's
    inputs to its named output, have names of its own; they belong to the next named tensor.
    """
    found: List[tensorrt.ILayer] = []
    unnamed: List[tensorrt.ILayer] = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        unnamed.append(layer)
        known = [types[name] for name in _output_names(layer) if name in types]
        if known:
            found += unnamed if wanted in known else []
            unnamed = []
    return found


def _output_names(layer: tensorrt.ILayer) -> List[str]:
    return [layer.get_output(index).name for index in range(layer.num_outputs)]


def _hold_to_fp32(layer: tensorrt.ILayer) -> None:
    import tensorrt

    kinds = tensorrt.LayerType
    # These compute nothing, or state their type themselves; the builder refuses or ignores a precision of theirs.
    if layer.type in (kinds.CONSTANT, kinds.SHAPE, kinds.CONCATENATION, kinds.CAST):
        return
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    if not any(_is_float(output) for output in outputs):
        return
    layer.precision = tensorrt.float32
    for index, output in enumerate(outputs):
        if _is_float(output):
            layer.set_output_type(index, tensorrt.float32)


def _is_float(tensor: tensorrt.ITensor) -> bool:
    import tensorrt

    # Shapes and indices are computed on the host, in whole numbers.
    return tensor.is_execution_tensor and tensor.dtype in (tensorrt.float32, tensorrt.float16)
