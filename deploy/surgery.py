"""Graph surgery on the way to TensorRT: each GroupNorm, with what surrounds it, becomes one plugin node.

The exporter writes a GroupNorm as

    Reshape (N, G, -1), InstanceNormalization by ones and zeros, Reshape (N, C, H, W), Mul gamma, Add beta

and stands casts to FP32 and back around it in half-precision graphs. Behind it there may be a SiLU (x * Sigmoid(x)),
before it the addition of a (B, C, 1, 1) time bias. All of that is one node of the operator `GroupNormSiLU`:

    y = activation(group_norm(x + channel_bias, groups, epsilon) * gamma + beta)

==============  ======  ============================================================================================
input           shape   x: (N, C, H, W) of the graph's type, as y; gamma, beta: (C,) FP32 initialisers;
                        channel_bias, last and optional: (N, C) of the graph's type
attribute       type    groups: int; epsilon: float, the module's; activation: int, 1 for SiLU; has_bias: int
for the parser  string  plugin_version "1", plugin_namespace "canny2image"
==============  ======  ============================================================================================

TensorRT's ONNX parser takes an operator that it does not know for a plugin: the name is the node's `op_type`, version
and namespace are the attributes `plugin_version` and `plugin_namespace`, and the node's domain is not looked at
(`FallbackPluginImporter` in github.com/onnx/onnx-tensorrt, the same in 8.6 and 10.1). So the node's domain is free to
be one of ours, which ONNX's own checker wants of operators that it does not know.

The work is done on a copy of the graph without its weights; those stay where they are, in memory or on disk.
`python3 -m deploy.surgery IN.onnx OUT.onnx` does it to a file.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor
from onnx_graphsurgeon.ir.tensor import LazyValues

from cldm.files import atomic_path, naming_full_disk, require_room
from cldm.machine import peak_memory_text
from deploy.manifest import ArtefactError, manifest_path, read_manifest
from deploy.onnx_files import NotOnnxError, gather_external, has_external, is_external, load_graph

if TYPE_CHECKING:  # torch takes seconds to import, and only counting a network's modules needs it
    from torch import nn

OP = "GroupNormSiLU"
VERSION = "1"
NAMESPACE = "canny2image"  # the plugin's, and the ONNX domain of the node
DOMAIN_VERSION = 1
# Constants of at most this many elements come along into the copy that is worked on: all shapes, and the scales of
# InstanceNormalization, one a group.
SMALL = 4096
HALF_TYPES = ("float16", "bfloat16")


class SurgeryError(ValueError):
    """A graph is not what the exporter writes, or does not hold what its network does; it was left as it was."""


@dataclass(frozen=True)
class FusedNorm:
    """One plugin node: its name, attributes, and NumPy's name of the type of x and y."""

    name: str
    channels: int
    groups: int
    epsilon: float
    activation: bool
    has_bias: bool
    dtype: str


@dataclass(frozen=True)
class FusionReport:
    """What the surgery did: the plugin nodes in the order of execution, and the graph's nodes before and after."""

    norms: Tuple[FusedNorm, ...]
    nodes_before: int
    nodes_after: int

    @property
    def with_silu(self) -> int:
        return sum(norm.activation for norm in self.norms)

    @property
    def with_bias(self) -> int:
        return sum(norm.has_bias for norm in self.norms)

    def __str__(self) -> str:
        return (
            f"{len(self.norms)} GroupNorms, {self.with_silu} with SiLU, {self.with_bias} with a time bias;"
            f" {self.nodes_before} nodes before, {self.nodes_after} after"
        )


def fuse_group_norms(
    model: onnx.ModelProto, network: Optional[nn.Module] = None, folder: Optional[Path] = None
) -> FusionReport:
    """Replace each GroupNorm of an exported graph by one plugin node.

    A time bias is fused only where nothing else reads the sum, and a SiLU only where nothing else reads the norm.
    Biases of batch 1 are repeated for a larger batch, once for all where they are pieces of one tensor.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place, all at the end: an error leaves it as it was. Its weights are neither copied nor read, so
        that they may lie in files that were not loaded.
    network : nn.Module, optional
        The module that was exported; the plugin nodes are checked against its GroupNorms with `check_complete`. Its
        weights are not looked at, so it may be on the meta device.
    folder : Path, optional
        Where external data lies. Wanted only for norms of 256 groups and more, whose scales the exporter moves there.

    Raises
    ------
    SurgeryError
        An InstanceNormalization is not a GroupNorm as the exporter writes it, or a GroupNorm of `network` is missing.
    """
    graph = gs.import_onnx(_without_weights(model, folder))
    before = len(graph.nodes)
    surgeon = _Surgeon(graph)
    norms = [surgeon.fuse(node) for node in list(graph.nodes) if node.op == "InstanceNormalization"]
    surgeon.finish()
    report = FusionReport(tuple(norms), before, len(graph.nodes))
    if network is not None:
        check_complete(report, network)
    _write_back(model, gs.export_onnx(graph, do_type_check=False), surgeon.parameters)
    return report


# -- the network's side ----------------------------------------------------------------------------------------------


def group_norms(network: nn.Module) -> Dict[str, Tuple[int, int, float]]:
    """Channels, groups and epsilon, as FP32 holds it, of each GroupNorm module by name."""
    from torch import nn

    return {
        name: (module.num_channels, module.num_groups, float(np.float32(module.eps)))
        for name, module in network.named_modules()
        if isinstance(module, nn.GroupNorm)
    }


def count_group_norms(network: nn.Module) -> int:
    return len(group_norms(network))


def check_complete(report: FusionReport, network: nn.Module) -> None:
    """See that the plugin nodes are the network's GroupNorms: as many, of the same channels, groups and epsilons.

    Raises
    ------
    SurgeryError
        They are not; the message names the first module that was not recognised.
    """
    left = Counter((norm.channels, norm.groups, norm.epsilon) for norm in report.norms)
    wanted = group_norms(network)
    for name, kind in wanted.items():
        left[kind] -= 1
        if left[kind] < 0:
            raise SurgeryError(
                f"GroupNorm {name} ({kind[0]} channels, {kind[1]} groups, epsilon {kind[2]:.3g}) was not recognised:"
                f" the graph has {len(report.norms)}, the network {len(wanted)}"
            )
    surplus = next((kind for kind, count in left.items() if count), None)
    if surplus is not None:
        raise SurgeryError(
            f"the graph has {len(report.norms)} GroupNorms, the network {len(wanted)}: none of the network's has"
            f" {surplus[0]} channels, {surplus[1]} groups and epsilon {surplus[2]:.3g} besides those found"
        )


def network_of(file: Path, model_name: Optional[str] = None) -> nn.Module:
    """The network that an exported file was made from, on the meta device, by the manifest beside the file.

    Parameters
    ----------
    model_name : str, optional
        Name or path of the model's config, for one that is not under models/.

    Raises
    ------
    ArtefactError
        There is no such manifest.
    ValueError
        It names a model that has no config under models/.
    """
    import torch

    from cldm.config import load_config
    from cldm.model import ControlLDM
    from deploy.graphs import build_graph

    manifest = read_manifest(file)
    config = load_config(str(manifest.get("model")) if model_name is None else model_name)
    with torch.device("meta"):
        model = ControlLDM(config)
        return build_graph(str(manifest.get("graph")), model, "fp32", int(manifest.get("samples", 1)))


# -- the graph without weights, and back ------------------------------------------------------------------------------


def _without_weights(model: onnx.ModelProto, folder: Optional[Path]) -> onnx.ModelProto:
    """A copy with all shapes inferred whose large constants are stubs: name, shape and type."""
    if model.functions or any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute):
        raise SurgeryError("the graph has local functions or branches, which the exporter does not write")
    if any(node.op_type == OP for node in model.graph.node):
        raise SurgeryError(f"the graph has {OP} nodes already")
    scales = {name for n in model.graph.node if n.op_type == "InstanceNormalization" for name in n.input[1:]}
    if folder is None and any(is_external(t) for t in model.graph.initializer if t.name in scales):
        raise SurgeryError(
            "scales of InstanceNormalization lie in an external file; the folder where it is must be given"
        )
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(bare.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        bare.graph.initializer.append(_small_or_stub(tensor, folder if tensor.name in scales else None))
    return onnx.shape_inference.infer_shapes(bare, data_prop=True)


def _small_or_stub(tensor: TensorProto, folder: Optional[Path]) -> TensorProto:
    """A copy of a small tensor, read from `folder` if that is given and it lies there, or else a stub."""
    if math.prod(tensor.dims) <= SMALL and (folder is not None or not is_external(tensor)):
        copied = TensorProto()
        copied.CopyFrom(tensor)
        if is_external(tensor):
            load_external_data_for_tensor(copied, str(folder))
            copied.data_location = TensorProto.DEFAULT
            del copied.external_data[:]
        return copied
    return _stub(tensor.name, tensor.dims, tensor.data_type)


def _stub(name: str, dims: Tuple[int, ...], data_type: int) -> TensorProto:
    return TensorProto(name=name, dims=dims, data_type=data_type, data_location=TensorProto.EXTERNAL)


def _write_back(model: onnx.ModelProto, done: onnx.ModelProto, parameters: Dict[str, str]) -> None:
    """Put the nodes of `done` into `model`, whose weights stay.

    Parameters
    ----------
    parameters : dict
        For each new (C,) initialiser the (C, 1, 1) one that it is made from.
    """
    graph = model.graph
    originals = {tensor.name: tensor for tensor in graph.initializer}
    added = []
    for tensor in done.graph.initializer:
        if tensor.name in parameters:
            flat = TensorProto()
            flat.CopyFrom(originals[parameters[tensor.name]])  # an external one's place in its file comes along
            flat.name, flat.dims[:] = tensor.name, tensor.dims
            added.append(flat)
        elif tensor.name not in originals:
            added.append(tensor)
    kept = {tensor.name for tensor in done.graph.initializer}
    for i in reversed([i for i, tensor in enumerate(graph.initializer) if tensor.name not in kept]):
        del graph.initializer[i]
    graph.initializer.extend(added)
    for field in ("node", "value_info"):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(getattr(done.graph, field))
    if parameters and all(entry.domain != NAMESPACE for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, DOMAIN_VERSION))


# -- recognising and replacing ----------------------------------------------------------------------------------------


@dataclass
class _Match:
    """A GroupNorm in a graph, growing to what surrounds it: it reads `x` and `bias`, and makes `y`."""

    x: gs.Tensor
    y: gs.Tensor
    first: gs.Node  # what reads x
    groups: int
    gamma: gs.Constant
    beta: gs.Constant
    bias: Optional[gs.Tensor] = None
    silu: bool = False


class _Surgeon:
    """Puts plugin nodes into a graph; what they replace goes in `finish`.

    Attributes
    ----------
    parameters : dict
        For each new (C,) constant the (C, 1, 1) one that it is made from.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.parameters: Dict[str, str] = {}
        self._outputs: Set[int] = {id(tensor) for tensor in graph.outputs}
        self._before: Dict[int, List[gs.Node]] = {}  # new nodes, by the old node in whose place they stand

    def fuse(self, norm: gs.Node) -> FusedNorm:
        """Replace one InstanceNormalization and what belongs to it; refuse one that is not part of a GroupNorm."""
        try:
            match = self._match(norm)
        except SurgeryError as reason:
            raise SurgeryError(f"{norm.name or norm.outputs[0].name} is not a GroupNorm: {reason}") from None
        self._grow(match)
        return self._replace(norm, match)

    def finish(self) -> None:
        """Put the new nodes into their places and remove what nothing reads any more."""
        self.graph.nodes[:] = [
            node for old in self.graph.nodes for node in [*self._before.get(id(old), []), old]
        ]  # the order of execution stays
        self.graph.cleanup()
        _repeat_before_split(self.graph, self._outputs)
        self.graph.cleanup()

    def _match(self, norm: gs.Node) -> _Match:
        """The bare GroupNorm around an InstanceNormalization.

        Raises
        ------
        SurgeryError
            There is none; the message says what differs.
        """
        first = _producer(norm.inputs[0], "Reshape")
        _require(first is not None, "its input is not reshaped")
        x = first.inputs[0]
        shape = _static_shape(x)
        _require(len(shape) == 4, f"what it normalises has the shape {x.shape}, not (N, C, H, W)")
        groups = _groups(shape, _static_shape(norm.inputs[0]))
        scale, shift = norm.inputs[1:3]
        _require(_is_all(scale, 1.0) and _is_all(shift, 0.0), "its own scale and shift are not ones and zeros")
        back = self._only_reader(norm.outputs[0], "Reshape")
        _require(_static_shape(back.outputs[0]) == shape, f"its output is reshaped to {back.outputs[0].shape}")
        scaled = self._only_reader(back.outputs[0], "Mul")
        shifted = self._only_reader(scaled.outputs[0], "Add")
        gamma = _per_channel(scaled, back.outputs[0], shape[1])
        beta = _per_channel(shifted, scaled.outputs[0], shape[1])
        return _Match(x, shifted.outputs[0], first, groups, gamma, beta)

    def _grow(self, match: _Match) -> None:
        """Take in the casts, the SiLU and the bias that stand around a GroupNorm, as far as nothing else uses them."""
        self._take_silu(match)
        alone = self._reader(match.first.outputs[0], "InstanceNormalization") is not None
        into, out = _producer(match.x, "Cast"), self._reader(match.y, "Cast")
        if into is not None and out is not None:
            half = _type(into.inputs[0])
            if half in HALF_TYPES and _type(match.x) == "float32" and _type(out.outputs[0]) == half:
                alone = alone and self._reader(match.x, "Reshape") is not None
                match.x, match.first, match.y = into.inputs[0], into, out.outputs[0]
                self._take_silu(match)
        add = _producer(match.x, "Add")
        if add is not None and alone and self._reader(match.x, match.first.op) is not None:
            shape = _static_shape(match.x)
            for bias, data in (add.inputs, add.inputs[::-1]):
                fits = _dims(bias) in ([1, shape[1], 1, 1], [shape[0], shape[1], 1, 1]) and _dims(data) == list(shape)
                if fits and match.bias is None:
                    match.x, match.bias = data, bias

    def _take_silu(self, match: _Match) -> None:
        readers = {node.op: node for node in match.y.outputs}
        if (
            match.silu
            or id(match.y) in self._outputs
            or len(match.y.outputs) != 2
            or set(readers) != {"Sigmoid", "Mul"}
        ):
            return
        # The product's two factors are then the norm and, as nothing else reads the sigmoid, the sigmoid.
        if self._reader(readers["Sigmoid"].outputs[0], "Mul") is readers["Mul"]:
            match.y, match.silu = readers["Mul"].outputs[0], True

    def _reader(self, tensor: gs.Tensor, op: str) -> Optional[gs.Node]:
        """The one node that reads a tensor, if it is of this kind and the tensor is no output of the graph."""
        alone = id(tensor) not in self._outputs and len(tensor.outputs) == 1 and tensor.outputs[0].op == op
        return tensor.outputs[0] if alone else None

    def _only_reader(self, tensor: gs.Tensor, op: str) -> gs.Node:
        node = self._reader(tensor, op)
        readers = [reader.op for reader in tensor.outputs] + ["the caller"] * (id(tensor) in self._outputs)
        _require(node is not None, f"{tensor.name} is read by {', '.join(readers)}, where one {op} was expected")
        return node

    def _replace(self, norm: gs.Node, match: _Match) -> FusedNorm:
        name = (norm.name or match.y.name).rpartition("/")[0] + f"/{OP}"
        if any(node.name == name for nodes in self._before.values() for node in nodes):
            name = f"{match.y.name}/{OP}"
        channels = int(match.x.shape[1])
        inputs = [match.x, self._flat(match.gamma, f"{name}/gamma", channels)]
        inputs.append(self._flat(match.beta, f"{name}/beta", channels))
        new: List[gs.Node] = []
        if match.bias is not None:
            inputs.append(_rows(match.bias, name, int(match.x.shape[0]), channels, new))
        epsilon = float(np.float32(norm.attrs.get("epsilon", 1e-5)))  # 1e-5 is the operator's default
        attributes = {"groups": match.groups, "epsilon": epsilon, "activation": int(match.silu)}
        attributes.update({"has_bias": int(match.bias is not None)})
        attributes.update({"plugin_version": VERSION, "plugin_namespace": NAMESPACE})
        place = match.y.inputs[0]
        match.y.inputs.clear()
        new.append(gs.Node(OP, name, attributes, inputs, [match.y], domain=NAMESPACE))
        self._before[id(place)] = new
        return FusedNorm(name, channels, match.groups, epsilon, match.silu, match.bias is not None, _type(match.x))

    def _flat(self, constant: gs.Constant, name: str, channels: int) -> gs.Constant:
        """A stub of a (C, 1, 1) constant as a (C,) one of its own, since others may read the old one."""
        self.parameters[name] = constant.name
        return gs.Constant(name, LazyValues(_stub(name, (channels,), TensorProto.FLOAT)))


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SurgeryError(otherwise)


def _type(tensor: gs.Tensor) -> str:
    return str(np.dtype(tensor.dtype)) if tensor.dtype is not None and not isinstance(tensor.dtype, int) else "unknown"


def _producer(tensor: gs.Tensor, op: str) -> Optional[gs.Node]:
    return tensor.inputs[0] if len(tensor.inputs) == 1 and tensor.inputs[0].op == op else None


def _dims(tensor: gs.Tensor) -> List[object]:
    """A shape as a list, empty where it is not known."""
    return list(tensor.shape) if tensor.shape is not None else []


def _static_shape(tensor: gs.Tensor) -> Tuple[int, ...]:
    shape = tensor.shape
    fixed = shape is not None and all(isinstance(dim, int) and dim > 0 for dim in shape)
    _require(fixed, f"the shape of {tensor.name} is {shape}; only fixed shapes are known here")
    return tuple(shape)


def _groups(shape: Tuple[int, ...], grouped: Tuple[int, ...]) -> int:
    batch, channels, height, width = shape
    as_groups = len(grouped) == 3 and grouped[0] == batch and channels % grouped[1] == 0
    _require(as_groups, f"{list(shape)} is reshaped to {list(grouped)}, which are no groups of channels")
    return grouped[1]


def _is_all(tensor: gs.Tensor, value: float) -> bool:
    known = isinstance(tensor, gs.Constant) and math.prod(tensor.shape) <= SMALL
    return known and bool((tensor.values == value).all())


def _per_channel(node: gs.Node, data: gs.Tensor, channels: int) -> gs.Constant:
    """The (C, 1, 1) FP32 constant that a Mul or Add, either way round, joins with `data`."""
    other = node.inputs[1] if node.inputs[0] is data else node.inputs[0]
    _require(isinstance(other, gs.Constant), f"{node.name}: {other.name} is no constant")
    as_channels = list(other.shape)[-3:] == [channels, 1, 1] and math.prod(other.shape) == channels
    _require(as_channels, f"{node.name}: {other.name} has the shape {other.shape}, not one value a channel")
    _require(_type(other) == "float32", f"{node.name}: {other.name} is {_type(other)}; the exporter keeps it in FP32")
    return other


def _rows(bias: gs.Tensor, name: str, batch: int, channels: int, new: List[gs.Node]) -> gs.Tensor:
    """A (B or 1, C, 1, 1) bias as (B, C), from before it was given its last two axes, where that can be seen."""
    rows, source = [int(bias.shape[0]), channels], bias
    while _dims(source) != rows and _producer(source, "Unsqueeze") is not None:
        source = source.inputs[0].inputs[0]
    if _dims(source) != rows:
        source = _reshaping("Reshape", bias, rows, f"{name}/bias_rows", new)
    if rows[0] != batch:
        source = _reshaping("Expand", source, [batch, channels], f"{name}/bias_of_all", new)
    return source


def _reshaping(op: str, tensor: gs.Tensor, shape: List[int], name: str, new: List[gs.Node]) -> gs.Tensor:
    result = gs.Variable(name, tensor.dtype, shape)
    constant = gs.Constant(f"{name}/shape", np.array(shape, dtype=np.int64))
    new.append(gs.Node(op, f"{name}/{op}", {}, [tensor, constant], [result]))
    return result


def _repeat_before_split(graph: gs.Graph, outputs: Set[int]) -> None:
    """Repeat the rows of biases before they are cut from one packed tensor, where all of them are repeated after it.

    One node then does what would be a launch for each ResBlock.
    """
    for split in [node for node in graph.nodes if node.op == "Split"]:
        packed = split.inputs[0]
        readers = [node for piece in split.outputs for node in piece.outputs]
        alone = all(len(piece.outputs) == 1 and id(piece) not in outputs for piece in split.outputs)
        by_columns = len(_dims(packed)) == 2 and split.attrs.get("axis", 0) in (1, -1)
        if not alone or not by_columns or {node.op for node in readers} != {"Expand"}:
            continue
        batch = readers[0].outputs[0].shape[0]
        if any(_dims(node.outputs[0]) != [batch, *_dims(node.inputs[0])[1:]] for node in readers):
            continue
        new: List[gs.Node] = []
        wide = _reshaping("Expand", packed, [batch, packed.shape[1]], f"{packed.name}/of_all", new)
        split.inputs[0] = wide
        for piece, node in zip(split.outputs, readers):
            piece.shape = node.outputs[0].shape
            for reader in list(node.outputs[0].outputs):
                reader.inputs = [piece if tensor is node.outputs[0] else tensor for tensor in reader.inputs]
            node.outputs.clear()
        place = next(i for i, node in enumerate(graph.nodes) if node is split)
        graph.nodes[place:place] = new


# -- the operator on a machine without the plugin ---------------------------------------------------------------------

_FUNCTION = """
<domain: "{domain}", opset_import: ["" : 17]>
{op} <groups, epsilon, activation, has_bias, plugin_version, plugin_namespace> (x, gamma, beta{bias_input}) => (y)
{{
    data = Cast <to = 1> (x)
    {add_bias}
    one_group = Constant <value_int: int = @groups> ()
    first = Constant <value_ints = [0]> ()
    last_two = Constant <value_ints = [1, 2]> ()
    groups_axis = Unsqueeze (one_group, first)
    rest = Constant <value_ints = [-1]> ()
    grouped_shape = Concat <axis = 0> (first, groups_axis, rest)
    grouped = Reshape (biased, grouped_shape)
    mean = ReduceMean <axes = [2], keepdims = 1> (grouped)
    centred = Sub (grouped, mean)
    squares = Mul (centred, centred)
    variance = ReduceMean <axes = [2], keepdims = 1> (squares)
    small = Constant <value_float: float = @epsilon> ()
    variance_and_small = Add (variance, small)
    deviation = Sqrt (variance_and_small)
    normal_groups = Div (centred, deviation)
    shape = Shape (x)
    normal = Reshape (normal_groups, shape)
    wide_gamma = Cast <to = 1> (gamma)
    wide_beta = Cast <to = 1> (beta)
    column_gamma = Unsqueeze (wide_gamma, last_two)
    column_beta = Unsqueeze (wide_beta, last_two)
    scaled = Mul (normal, column_gamma)
    shifted = Add (scaled, column_beta)
    {activate}
    y = CastLike (active, x)
}}
"""
_ADD_BIAS = """bias = Cast <to = 1> (channel_bias)
    pixel_axes = Constant <value_ints = [2, 3]> ()
    column_bias = Unsqueeze (bias, pixel_axes)
    biased = Add (data, column_bias)"""
_SILU = """gate = Sigmoid (shifted)
    active = Mul (shifted, gate)"""


def with_reference_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the plugin nodes are local functions, so that any ONNX runtime can run it. For tests only.

    The functions are the operator's formula, in FP32 with statistics in two passes, and owe nothing to what the
    exporter wrote. There is one for each mix of SiLU and bias, under names of their own: TensorRT's parser would take
    a local function called as the plugin for the plugin. External data is neither read nor copied: the copy is to be
    saved beside its file.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    used = set()
    for node in copied.graph.node:
        if node.op_type == OP and node.domain == NAMESPACE:
            values = {attribute.name: attribute.i for attribute in node.attribute}
            kind = (bool(values["has_bias"]), bool(values["activation"]))
            used.add(kind)
            node.op_type = _function_name(*kind)
    for has_bias, silu in sorted(used):
        text = _FUNCTION.format(
            domain=NAMESPACE,
            op=_function_name(has_bias, silu),
            bias_input=", channel_bias" if has_bias else "",
            add_bias=_ADD_BIAS if has_bias else "biased = Identity (data)",
            activate=_SILU if silu else "active = Identity (shifted)",
        )
        copied.functions.append(onnx.parser.parse_function(text))
    return copied


def _function_name(has_bias: bool, silu: bool) -> str:
    return f"Reference{'Bias' if has_bias else ''}GroupNorm{'SiLU' if silu else ''}"


# -- files ------------------------------------------------------------------------------------------------------------


def fuse_file(source: Path, target: Path, network: Optional[nn.Module] = None) -> FusionReport:
    """Write the graph of one ONNX file, its GroupNorms fused, to another, whole or not at all.

    External data is shared where both lie in the same folder, and copied beside `target` where they do not.

    Raises
    ------
    SurgeryError
        The graph is not what it should be (see `fuse_group_norms`), `source` is no ONNX file, or is `target` itself.
    OSError
        A file cannot be read or written.
    """
    if target.exists() and target.resolve() == source.resolve():
        raise SurgeryError(f"{target} is the file that is read; name another")
    try:
        model = load_graph(source)
    except NotOnnxError as error:
        raise SurgeryError(f"{source} is no ONNX file: {error}") from error
    if not model.graph.node:
        raise SurgeryError(f"{source} is no ONNX file, or an empty one")
    report = fuse_group_norms(model, network, source.parent)
    same_folder = target.parent.resolve() == source.parent.resolve()
    if same_folder or not has_external(model):
        with atomic_path(target) as temporary:
            _save(model, temporary)
    else:
        _save_with_data(model, source.parent, target)
    return report


def _save(model: onnx.ModelProto, file: Path) -> None:
    onnx.save(model, str(file))
    onnx.checker.check_model(str(file))


def _save_with_data(model: onnx.ModelProto, folder: Path, target: Path) -> None:
    sizes = (entry for tensor in model.graph.initializer if is_external(tensor) for entry in tensor.external_data)
    require_room(target.parent, sum(int(entry.value) for entry in sizes if entry.key == "length"))
    with naming_full_disk(target):
        scratch = Path(tempfile.mkdtemp(prefix=".surgery-", dir=str(target.parent)))
        try:
            data = scratch / f"{target.name}.data"
            gather_external(model, folder, data)
            _save(model, scratch / target.name)
            for file in (data, scratch / target.name):  # the graph last: with it the file is there
                os.replace(str(file), str(target.parent / file.name))
        finally:
            shutil.rmtree(str(scratch), ignore_errors=True)


# -- the command ------------------------------------------------------------------------------------------------------


def _run(source: Path, target: Path, check: bool, model_name: Optional[str]) -> Iterator[str]:
    """Do the work of the command; gives the lines of its report."""
    network = None
    if check and not manifest_path(source).exists():
        yield f"{source} has no manifest: its GroupNorms are not compared with the network's"
    elif check:
        network = network_of(source, model_name)
    report = fuse_file(source, target, network)
    yield f"{target}: {report}"
    if network is not None:
        yield f"the network has {count_group_norms(network)} GroupNorms, each is one {OP} node; {peak_memory_text()}"
    else:
        yield peak_memory_text()


def main(argv: Optional[List[str]] = None) -> int:
    """The exit status: 0, or 1 after an error, with a line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python3 -m deploy.surgery", description="Replace each GroupNorm of an exported graph by one plugin node."
    )
    parser.add_argument("source", type=Path, metavar="IN.onnx", help="as export_onnx.py makes it")
    parser.add_argument("target", type=Path, metavar="OUT.onnx")
    parser.add_argument("--model", help="the network's config, where IN's manifest names one that is not under models/")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare with the network that IN's manifest names"
    )
    args = parser.parse_args(argv)
    try:
        for line in _run(args.source, args.target, not args.no_check, args.model):
            print(line)
    except (SurgeryError, ArtefactError, ValueError, OSError) as error:
        print(f"deploy.surgery: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
