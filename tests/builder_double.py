"""A double of TensorRT that a whole build runs on: its parser reads the ONNX file, and its builder answers a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import onnx

from cldm.weights import Weights
from deploy.engine_options import EngineOptions
from deploy.manifest import write_manifest
from deploy.plan_manifest import Machine, plan_fields, plan_path
from deploy.plugin_library import PluginLibrary, library_path, plugin_digest
from deploy.spec import Build, graph_specs
from deploy.tensorrt_versions import find_version
from deploy.toolchain import Gpu, Toolchain
from tests.tensorrt_double import Call, TensorRTDouble

GPU = Gpu("NVIDIA Test GPU", "9.0")
FREE_BYTES = 10 << 30
PLAN = b"the plan that TensorRT built" * 100
TYPES = {
    **{onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT32: "INT32"},
    **{onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.INT64: "INT32", onnx.TensorProto.BOOL: "BOOL"},
}


class BuilderDouble:
    """One version of TensorRT that builds.

    Attributes
    ----------
    double : TensorRTDouble
    parsed : onnx.ModelProto or None
        The graph of the last file that was parsed, without external weights.
    layers : dict of str to ILayer
        Of the network, by the name of the node.
    """

    def __init__(self, major: int) -> None:
        self.double = TensorRTDouble.load(major)
        self.major = major
        self.parsed: Optional[onnx.ModelProto] = None
        self.layers: Dict[str, Any] = {}
        self._order: List[Any] = []
        self._creator: Any = None
        double = self.double
        double.returns("OnnxParser.parse_from_file", self._parse)
        double.returns("Builder.build_serialized_network", PLAN)
        double.returns("IBuilderConfig.add_optimization_profile", 0)
        double.returns("ITimingCache.serialize", b"timings")
        double.returns("IPluginRegistry.load_library", self._load_library)
        double.returns(self.creator_call, lambda call: self._creator)

    @property
    def creator_call(self) -> str:
        return "IPluginRegistry.get_plugin_creator" if self.major == 8 else "IPluginRegistry.get_creator"

    def toolchain(self, plugin: Optional[PluginLibrary] = None) -> Toolchain:
        """To be made while the double is installed."""
        return Toolchain(find_version(), GPU, plugin)

    def calls(self, name: str) -> List[Call]:
        return self.double.calls_of(name)

    def flags(self) -> List[str]:
        """Names of the builder flags that were set."""
        return [call["flag"].name for call in self.calls("IBuilderConfig.set_flag")]

    def assigned(self, name: str) -> List[Any]:
        """The values that were assigned to a property, such as "IBuilderConfig.max_aux_streams"."""
        return [call["value"] for call in self.calls(f"{name}=")]

    def made(self, cls: str, **properties: Any) -> Any:
        """An object of a class with these properties, one of which may be called "name"."""
        made = self.double.make(cls)
        self.double.give(made, **properties)
        return made

    def _load_library(self, call: Call) -> Any:
        self._creator = self.double.make("IPluginCreator") if self.major == 8 else object()
        return object()

    def _parse(self, call: Call) -> bool:
        self.parsed = onnx.load(call["model"], load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(self.parsed).graph
        tensors = {value.name: self._tensor(value) for value in [*graph.input, *graph.output, *graph.value_info]}
        constants = {tensor.name for tensor in graph.initializer}
        inputs = [tensors[value.name] for value in graph.input if value.name not in constants]
        outputs = [tensors[value.name] for value in graph.output]
        for side, ends in (("input", inputs), ("output", outputs)):
            self.double.returns(f"INetworkDefinition.num_{side}s", len(ends))
            self.double.returns(f"INetworkDefinition.get_{side}", lambda call, ends=ends: ends[call["index"]])
        self._order = [self._layer(node, tensors) for node in graph.node]
        self.double.returns("INetworkDefinition.num_layers", len(self._order))
        self.double.returns("INetworkDefinition.get_layer", lambda call: self._order[call["index"]])
        return True

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        kind = value.type.tensor_type
        shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
        dtype = getattr(self.double.module.DataType, TYPES[kind.elem_type])
        return self.made("ITensor", name=value.name, shape=shape, dtype=dtype, is_execution_tensor=True)

    def _layer(self, node: onnx.NodeProto, tensors: Dict[str, Any]) -> Any:
        kinds = self.double.module.LayerType
        kind = {"Constant": kinds.CONSTANT, "Cast": kinds.CAST, "Shape": kinds.SHAPE}.get(node.op_type, kinds.UNARY)
        outputs = [tensors[name] for name in node.output if name in tensors]
        layer = self.made("ILayer", name=node.name, type=kind, num_outputs=len(outputs))
        self.double.returns("ILayer.get_output", lambda call: outputs[call["index"]], on=layer)
        self.layers[node.name] = layer
        return layer


def make_library(folder: Path, major: int, **changed: Any) -> Path:
    """A file with the manifest that plugins/build.sh gives a library; `changed` are fields that differ."""
    file = library_path(folder, major)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"a library")
    fields = {"kind": "plugin", "tensorrt_major": major, "tensorrt": f"{major}.0.0.1", "source": plugin_digest(major)}
    fields.update({"architectures": ["80", "90"], "ptx": "90", **changed})
    write_manifest(file, fields, [file], None)
    return file


def install_plans(folder: Path, build: Build, weights: Weights, machine: Machine) -> Path:
    """Plans with their manifests, as build_engines.py leaves them, in the build's own folder.

    The content of each is the name of its graph.
    """
    target = folder / build.folder_name
    target.mkdir(parents=True, exist_ok=True)
    options = EngineOptions(groupnorm="native" if machine.plugin is None else "plugin")
    for name, spec in graph_specs(build).items():
        file = plan_path(target, spec)
        file.write_text(name, encoding="ascii")
        write_manifest(file, plan_fields(build, spec, weights, machine, options, "onnx"), [file], None)
    return target
