"""GroupNorms of exported graphs as plugin nodes: counts, form, numbers on the CPU, look-alikes and the command."""

from __future__ import annotations

import io
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import deploy.surgery as surgery
from cldm.checkpoint import load_model
from cldm.config import load_config
from cldm.files import write_json
from cldm.weights import find_weights
from deploy.export import example_inputs, export_all
from deploy.graphs import build_graph
from deploy.manifest import manifest_path, read_manifest
from deploy.onnx_files import simplify
from deploy.spec import Build, GraphSpec, graph_specs
from deploy.surgery import FusionReport, SurgeryError, check_complete, fuse_file, fuse_group_norms
from deploy.tracing import fast_half_convolution
from ldm.norm import GroupNorm
from tests.micro_model import shared_build, shared_config
from tests.small_model import small_config

FLOAT = TensorProto.FLOAT
NAMES = ("text", "hint", "time", "step", "decode")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def micro_file(base: Path, name: str, precision: str = "fp32", samples: int = 1) -> Tuple[Path, GraphSpec, Build]:
    build = shared_build(base, precision, samples)
    spec = graph_specs(build)[name]
    return base / "micro-build" / build.folder_name / spec.file, spec, build


# -- what a rewritten graph must be ----------------------------------------------------------------------------------


def plugins_of(model: onnx.ModelProto) -> List[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupNormSiLU"]


def attributes_of(node: onnx.NodeProto) -> Dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def check_form(model: onnx.ModelProto, file: Optional[Path] = None) -> None:
    """Whole, in order, nothing left over, and every plugin node as TensorRT's parser wants it."""
    graph = model.graph
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:
        assert set(node.input) <= known, f"{node.name} reads what was not made yet"
        known |= set(node.output)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= read, "dangling initialisers"
    assert all(set(node.output) & read for node in graph.node), "orphan nodes"
    names = [node.name for node in graph.node]
    assert len(names) == len(set(names)) and all(names)
    assert all(node.op_type != "InstanceNormalization" for node in graph.node)
    types = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
    parameters = {tensor.name: tensor for tensor in graph.initializer}
    for node in plugins_of(model):
        values = attributes_of(node)
        assert node.domain == "canny2image" and values["plugin_namespace"] == b"canny2image"
        assert values["plugin_version"] == b"1" and values["activation"] in (0, 1)
        assert len(node.input) == 3 + values["has_bias"] and len(node.output) == 1
        x, y = types[node.input[0]], types[node.output[0]]
        assert x == y and x.elem_type != 0
        batch, channels = (dim.dim_value for dim in x.shape.dim[:2])
        assert channels % values["groups"] == 0
        for name in node.input[1:3]:
            assert list(parameters[name].dims) == [channels] and parameters[name].data_type == FLOAT
        for name in node.input[3:]:
            assert types[name].elem_type == x.elem_type
            assert [dim.dim_value for dim in types[name].shape.dim] == [batch, channels]
    if file is not None:
        onnx.save(model, str(file))
        onnx.checker.check_model(str(file), full_check=True)


def run(model: Any, inputs: Dict[str, np.ndarray]) -> List[np.ndarray]:
    """All outputs of a model, or of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def with_last_convolution(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, giving its last convolution's result too: the decoder's image before it becomes bytes."""
    conv = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    if conv.output[0] not in {value.name for value in model.graph.output}:
        model.graph.output.extend(v for v in model.graph.value_info if v.name == conv.output[0])
    return model


def check_file(file: Path, spec: GraphSpec, build: Build, network: nn.Module, folder: Path) -> FusionReport:
    """Fuse a file's graph; its count, form, and its numbers against those before."""
    before = with_last_convolution(onnx.load(str(file)))
    after = onnx.load(str(file))
    report = fuse_group_norms(after, network)
    check_form(after, folder / f"{spec.name}.onnx")
    assert len(plugins_of(after)) == len(report.norms) == surgery.count_group_norms(network)
    assert report.nodes_before == len(before.graph.node) and report.nodes_after == len(after.graph.node)
    assert {norm.dtype for norm in report.norms} == {build.dtype}
    inputs = example_inputs(spec, build, seed=5)
    found = run(with_last_convolution(surgery.with_reference_function(after)), inputs)
    for mine, wanted in zip(found, run(before, inputs)):
        if mine.dtype == np.uint8:
            assert np.abs(mine.astype(int) - wanted.astype(int)).max() <= (1 if build.precision == "fp32" else 2)
        else:
            error = relative(mine, wanted)
            print(f"{build.folder_name} {spec.name}: {report}; relative error {error:.1e}")
            # In FP16 the graph rounds the biased sum, the norm and the sigmoid, which the plugin does not.
            assert error < (1e-5 if build.precision == "fp32" else 1e-2)
    return report


# -- the project's graphs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "samples"), [("fp32", 1), ("fp16", 1), ("fp16", 2)])
def test_micro_graphs(precision: str, samples: int, base: Path, tmp_path: Path) -> None:
    config = shared_config(base)
    model = load_model(config, find_weights(config))
    for name in ("step", "decode"):
        file, spec, build = micro_file(base, name, precision, samples)
        network = build_graph(name, model, precision, samples)
        report = check_file(file, spec, build, network, tmp_path)
        blocks = len(model.unet.res_blocks()) + len(model.control_model.res_blocks())
        assert report.with_bias == (blocks if name == "step" else 0)
        transformers = len(model.unet.transformer_blocks()) + len(model.control_model.transformer_blocks())
        plain = transformers if name == "step" else 1
        assert report.with_silu == len(report.norms) - plain
        epsilons = {np.float32(norm.epsilon) for norm in report.norms}
        assert epsilons == {np.float32(1e-6)} | ({np.float32(1e-5)} if name == "step" else set())
    after = onnx.load(str(tmp_path / "step.onnx"))
    expands = [node for node in after.graph.node if node.op_type == "Expand"]
    assert [node.input[0] for node in expands] == ["time_bias"], "one for all biases"
    if precision == "fp16":
        around = {name for node in plugins_of(after) for name in node.input[:1]}
        assert not any(node.op_type == "Cast" and node.output[0] in around for node in after.graph.node[2:])


@pytest.mark.parametrize("name", ["text", "hint", "time"])
def test_graphs_without_group_norms_stay(name: str, base: Path) -> None:
    file, _, build = micro_file(base, name, "fp16")
    before, model = onnx.load(str(file)), onnx.load(str(file))
    report = fuse_group_norms(model, build_graph(name, load_model(build.config, find_weights(build.config)), "fp16", 1))
    assert report.norms == () and report.nodes_before == report.nodes_after
    assert list(model.graph.node) == list(before.graph.node) and model.opset_import == before.opset_import
    assert list(model.graph.initializer) == list(before.graph.initializer)


@pytest.mark.parametrize(("name", "precision"), [("small", "fp32"), ("tiny", "fp16")])
def test_other_graphs(name: str, precision: str, tmp_path: Path) -> None:
    config = small_config() if name == "small" else load_config("tiny")
    size = 2 * config.size_multiple
    build, weights = Build(config, size, size, 1, precision), find_weights(config, random_seed=3)
    model = load_model(config, weights)
    rows = export_all(
        build, weights, lambda: model, tmp_path, check=False, names=["step", "decode"], report=lambda line: None
    )
    for row in rows:
        network = build_graph(row.graph, model, precision, 1)
        report = check_file(row.file, graph_specs(build)[row.graph], build, network, tmp_path)
        if name == "tiny":
            counts = (len(report.norms), report.with_silu, report.with_bias)
            assert counts == ((81, 65, 32) if row.graph == "step" else (30, 29, 0))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sd15_graphs(precision: str, tmp_path: Path) -> None:
    """Of 64 x 64 pixels: the norms are the same at any size. Takes 10 GB of memory, 10 GB of disk and minutes."""
    config = load_config("sd15")
    build, weights = Build(config, 64, 64, 1, precision), find_weights(config, random_seed=3)
    model: List[Any] = []

    def load() -> Any:
        model.append(load_model(config, weights))
        return model[0]

    rows = export_all(build, weights, load, tmp_path, check=False, names=["hint", "step", "decode"])
    counts = {}
    for row in rows:
        report = fuse_file(row.file, row.file.with_name("fused.onnx"), surgery.network_of(row.file))
        counts[row.graph] = (len(report.norms), report.with_silu, report.with_bias)
        check_form(onnx.load(str(row.file.with_name("fused.onnx")), load_external_data=False))
    assert counts == {"hint": (0, 0, 0), "step": (88, 65, 32), "decode": (30, 29, 0)}
    del model[:]
    step, fused = rows[1].file, rows[1].file.with_name("fused.onnx")
    fuse_file(step, fused)
    onnx.save(surgery.with_reference_function(onnx.load(str(fused), load_external_data=False)), str(fused))
    inputs = example_inputs(graph_specs(build)["step"], build, seed=5)
    for found, wanted in zip(run(fused, inputs), run(step, inputs)):
        print(f"sd15 {precision} step: relative error {relative(found, wanted):.1e}")
        assert relative(found, wanted) < (1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_either_order_of_operands(precision: str, base: Path) -> None:
    file, spec, build = micro_file(base, "step", precision)
    model, swapped = onnx.load(str(file)), onnx.load(str(file))
    for node in swapped.graph.node:
        if node.op_type in ("Mul", "Add"):
            node.input[:] = list(node.input)[::-1]
    assert fuse_group_norms(swapped) == fuse_group_norms(model)
    check_form(swapped)
    inputs = example_inputs(spec, build)
    for found, wanted in zip(*(run(surgery.with_reference_function(m), inputs) for m in (model, swapped))):
        assert relative(found, wanted) < (1e-5 if precision == "fp32" else 1e-2)  # the runtime fuses them unlike


# -- small networks around one norm ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a norm with random parameters, and what a test puts around them."""

    def __init__(self, forward: Callable[..., Any], groups: int = 4, channels: int = 8, eps: float = 1e-5) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = GroupNorm(groups, channels, eps)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)
        self.body = forward

    def forward(self, image: torch.Tensor, bias: Optional[torch.Tensor] = None) -> Any:
        return self.body(self, self.conv(image), bias)


def traced(net: nn.Module, half: bool = False, bias_shape: Optional[Sequence[int]] = None) -> Tuple[Any, Any]:
    """A network as the project's exporter writes it, and inputs for it."""
    rng = np.random.default_rng(1)
    dtype = np.float16 if half else np.float32
    inputs = {"image": rng.standard_normal((2, 3, 6, 5)).astype(dtype)}
    if bias_shape is not None:
        inputs["bias"] = rng.standard_normal(bias_shape).astype(dtype)
    if half:
        net.conv.half()
    net.eval().requires_grad_(False)
    content = io.BytesIO()
    arguments = tuple(torch.from_numpy(value) for value in inputs.values())
    with torch.no_grad(), fast_half_convolution(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, arguments, content, input_names=list(inputs), opset_version=17, dynamo=False)
    return simplify(onnx.load_from_string(content.getvalue())), inputs


def fused(net: nn.Module, half: bool = False, bias_shape: Optional[Sequence[int]] = None) -> Tuple[Any, Dict[str, Any]]:
    """The rewritten graph of a network with one norm, its numbers compared, and the attributes of its plugin node."""
    before, inputs = traced(net, half, bias_shape)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    fuse_group_norms(after, net)
    check_form(after)
    onnx.checker.check_model(after)
    for found, wanted in zip(run(surgery.with_reference_function(after), inputs), run(before, inputs)):
        assert found.dtype == wanted.dtype and relative(found, wanted) < (2e-3 if half else 1e-6)
    (node,) = plugins_of(after)
    return after, attributes_of(node)


def operators(model: onnx.ModelProto) -> List[str]:
    return [node.op_type for node in model.graph.node]


precisions = pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])


@precisions
def test_norm_alone(half: bool) -> None:
    after, values = fused(Net(lambda net, x, b: net.norm(x)), half)
    assert operators(after) == ["Conv", "GroupNormSiLU"]
    assert (values["groups"], values["activation"], values["has_bias"]) == (4, 0, 0)
    assert values["epsilon"] == np.float32(1e-5)


@precisions
@pytest.mark.parametrize("order", [0, 1])
def test_silu(half: bool, order: int) -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> torch.Tensor:
        y = net.norm(x)
        return torch.sigmoid(y) * y if order else y * torch.sigmoid(y)

    after, values = fused(Net(body), half)
    assert operators(after) == ["Conv", "GroupNormSiLU"] and values["activation"] == 1


@precisions
def test_silu_read_twice(half: bool) -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> torch.Tensor:
        y = F.silu(net.norm(x))
        return y.flatten(2) @ y.flatten(2).transpose(1, 2)

    after, values = fused(Net(body), half)
    assert values["activation"] == 1 and "Sigmoid" not in operators(after)


@precisions
def test_norm_read_by_more_than_its_silu(half: bool) -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> torch.Tensor:
        y = net.norm(x)
        return F.silu(y) + y

    after, values = fused(Net(body), half)
    assert values["activation"] == 0 and operators(after) == ["Conv", "GroupNormSiLU", "Sigmoid", "Mul", "Add"]


def test_sigmoid_read_by_others_too() -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> Tuple[torch.Tensor, torch.Tensor]:
        y = net.norm(x)
        gate = torch.sigmoid(y)
        return y * gate, gate.exp()

    _, values = fused(Net(body))
    assert values["activation"] == 0


def test_sigmoid_of_something_else_is_no_silu() -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> torch.Tensor:
        y = net.norm(x)
        return y * torch.sigmoid(x) + torch.sigmoid(y)

    _, values = fused(Net(body))
    assert values["activation"] == 0


@precisions
def test_norm_that_is_an_output_too(half: bool) -> None:
    def body(net: Net, x: torch.Tensor, bias: None) -> Tuple[torch.Tensor, torch.Tensor]:
        y = net.norm(x)
        return F.silu(y), y

    after, values = fused(Net(body), half)
    assert values["activation"] == 0 and len(after.graph.output) == 2


def test_casts_that_serve_others_stay() -> None:
    """The FP32 norm is read before it becomes FP16 again: the plugin then works in FP32 between the casts."""

    def body(net: Net, x: torch.Tensor, bias: None) -> Tuple[torch.Tensor, torch.Tensor]:
        norm = net.norm
        y = F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.silu(y.half()), y.exp()

    after, values = fused(Net(body), half=True)
    assert values["activation"] == 0 and operators(after).count("Cast") == 2


@precisions
@pytest.mark.parametrize("eps", [1e-6, 3e-4, 0.5])
def test_epsilon_is_the_modules(half: bool, eps: float) -> None:
    _, values = fused(Net(lambda net, x, b: F.silu(0.1 * net.norm(x)), eps=eps), half)
    assert values["epsilon"] == np.float32(eps)


@precisions
@pytest.mark.parametrize("groups, channels", [(1, 8), (8, 8), (1, 1), (3, 9), (5, 35)])
def test_group_counts(half: bool, groups: int, channels: int) -> None:
    _, values = fused(Net(lambda net, x, b: F.silu(net.norm(x)), groups, channels), half)
    assert values["groups"] == groups


# -- biases ----------------------------------------------------------------------------------------------------------


def biased(net: Net, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(net.norm(x + bias[:, :, None, None]))


@precisions
@pytest.mark.parametrize("batch", [1, 2])
def test_bias(half: bool, batch: int) -> None:
    after, values = fused(Net(biased), half, (batch, 8))
    assert values["has_bias"] == 1
    assert operators(after) == ["Conv", *["Expand"] * (batch == 1), "GroupNormSiLU"]


@precisions
@pytest.mark.parametrize("batch", [1, 2])
def test_bias_that_comes_with_four_axes(half: bool, batch: int) -> None:
    after, values = fused(Net(lambda net, x, bias: net.norm(bias + x)), half, (batch, 8, 1, 1))
    assert values["has_bias"] == 1
    assert operators(after) == ["Conv", "Reshape", *["Expand"] * (batch == 1), "GroupNormSiLU"]


@precisions
def test_bias_that_is_constant(half: bool) -> None:
    column = torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1).to(torch.float16 if half else torch.float32)
    _, values = fused(Net(lambda net, x, bias: net.norm(torch.exp(x) + column)), half)
    assert values["has_bias"] == 1


@precisions
def test_bias_whose_sum_is_read_elsewhere(half: bool) -> None:
    def body(net: Net, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x + bias[:, :, None, None]
        return x + F.silu(net.norm(x))

    after, values = fused(Net(body), half, (1, 8))
    assert values["has_bias"] == 0 and operators(after).count("Add") == 2


def test_bias_whose_sum_is_read_elsewhere_in_full_precision() -> None:
    def body(net: Net, x: torch.Tensor, bias: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        norm, wide = net.norm, (x + bias[:, :, None, None]).float()
        return F.silu(F.group_norm(wide, norm.num_groups, norm.weight, norm.bias, norm.eps).half()), wide.exp()

    after, values = fused(Net(body), half=True, bias_shape=(2, 8))
    assert (values["has_bias"], values["activation"]) == (0, 1) and operators(after).count("Add") == 1


@pytest.mark.parametrize("shape", [(2, 8, 6, 5), (2, 1, 6, 5), (1, 8, 6, 1), (2, 1, 1, 1), (1,), (8, 1, 1)])
def test_sums_that_are_no_bias(shape: Tuple[int, ...]) -> None:
    _, values = fused(Net(lambda net, x, bias: net.norm(x + bias)), bias_shape=shape)
    assert values["has_bias"] == 0


def test_packed_biases_that_others_read_too_are_repeated_one_by_one() -> None:
    def body(net: Net, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        one, two = bias.split([8, 4], dim=-1)
        return biased(net, x, one)[:, :4] + two[:, :, None, None]

    after, values = fused(Net(body), bias_shape=(1, 12))
    assert values["has_bias"] == 1
    assert operators(after).index("Expand") > operators(after).index("Split")


# -- what must not be taken for a GroupNorm --------------------------------------------------------------------------


def norm_of(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return F.instance_norm(x.reshape(*shape), eps=1e-5)


LOOK_ALIKES: Dict[str, Tuple[Callable[..., Any], str]] = {
    "no reshape": (lambda net, x, b: F.instance_norm(x) * net.norm.weight[:, None, None], "its input is not reshaped"),
    "own scale": (
        lambda net, x, b: (
            F.instance_norm(x.reshape(2, 4, -1), weight=net.norm.weight[:4], bias=net.norm.bias[:4])
            .reshape(x.shape)
            .mul(net.norm.weight[:, None, None])
            .add(net.norm.bias[:, None, None])
        ),
        "scale and shift are not ones and zeros",
    ),
    "batch among the groups": (
        lambda net, x, b: norm_of(x, (1, 4, -1)).reshape(x.shape).mul(net.norm.weight[:, None, None]).add(1.0),
        "which are no groups of channels",
    ),
    "pixels apart": (
        lambda net, x, b: norm_of(x, (2, 16, 15)).reshape(x.shape).mul(net.norm.weight[:, None, None]).add(1.0),
        "which are no groups of channels",
    ),
    "another shape behind": (
        lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(2, 8, 5, 6).mul(net.norm.weight[:, None, None]).add(1.0),
        "its output is reshaped to",
    ),
    "no scale": (lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(x.shape).exp(), "where one Mul was expected"),
    "no shift": (
        lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(x.shape).mul(net.norm.weight[:, None, None]).exp(),
        "where one Add was expected",
    ),
    "scale of columns": (
        lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(x.shape).mul(net.norm.weight[:5]).add(1.0),
        "not one value a channel",
    ),
    "scalar shift": (
        lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(x.shape).mul(net.norm.weight[:, None, None]).add(1.0),
        "not one value a channel",
    ),
    "scale that is data": (
        lambda net, x, b: norm_of(x, (2, 4, -1)).reshape(x.shape).mul(x[:1, :, :1, :1]).add(1.0),
        "is no constant",
    ),
}


@pytest.mark.parametrize("kind", list(LOOK_ALIKES))
def test_look_alikes_are_refused(kind: str) -> None:
    body, said = LOOK_ALIKES[kind]
    model, _ = traced(Net(body))
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(SurgeryError, match="InstanceNormalization.* is not a GroupNorm: ") as caught:
        fuse_group_norms(model)
    assert said in str(caught.value)
    assert model.SerializeToString(deterministic=True) == before


def test_norm_whose_inside_is_read_is_refused(base: Path) -> None:
    model = onnx.load(str(micro_file(base, "decode")[0]))
    norm = next(node for node in model.graph.node if node.op_type == "InstanceNormalization")
    model.graph.node.append(onnx.helper.make_node("Exp", [norm.output[0]], ["inside"], name="inside"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("inside", FLOAT, None))
    with pytest.raises(SurgeryError, match="norm1/InstanceNormalization is not a GroupNorm: .* read by Reshape, Exp"):
        fuse_group_norms(model)


def test_second_surgery_is_refused(base: Path) -> None:
    model = onnx.load(str(micro_file(base, "decode")[0]))
    fuse_group_norms(model)
    with pytest.raises(SurgeryError, match="has GroupNormSiLU nodes already"):
        fuse_group_norms(model)


def test_missing_norm_is_named(base: Path) -> None:
    file, _, build = micro_file(base, "decode")
    network = build_graph("decode", load_model(build.config, find_weights(build.config)), "fp32", 1)
    report = fuse_group_norms(onnx.load(str(file)), network)
    check_complete(report, network)
    short = FusionReport(report.norms[1:], 0, 0)
    count = len(report.norms)
    with pytest.raises(SurgeryError, match=rf"GroupNorm decoder\..*\(.*the graph has {count - 1}, the network {count}"):
        check_complete(short, network)
    with pytest.raises(SurgeryError, match=f"the graph has {count + 1} GroupNorms, the network {count}"):
        check_complete(FusionReport(report.norms + report.norms[:1], 0, 0), network)
    network.decoder.mid.block_1.norm2.eps = 1e-3
    model = onnx.load(str(file))
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(SurgeryError, match=r"GroupNorm decoder.mid.block_1.norm2 .*epsilon 0.001\) was not recognised"):
        fuse_group_norms(model, network)
    assert model.SerializeToString(deterministic=True) == before


def test_parameters_that_two_norms_share() -> None:
    class Twice(Net):
        def forward(self, image: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
            return F.silu(self.norm(F.silu(self.norm(self.conv(image)))))

    before, inputs = traced(Twice(lambda: None))
    names = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    shared = [name for name, value in names.items() if value.shape == (8, 1, 1)]
    for node in before.graph.node:  # one pair of initialisers for both, whatever the exporter does
        for i, name in enumerate(node.input):
            same = [other for other in shared if name in shared and np.array_equal(names[other], names[name])]
            node.input[i] = same[0] if same else name
    after = onnx.ModelProto()
    after.CopyFrom(before)
    used = {name for node in after.graph.node for name in node.input}
    for tensor in [t for t in after.graph.initializer if t.name not in used]:
        after.graph.initializer.remove(tensor)
    assert len(fuse_group_norms(after).norms) == 2
    check_form(after)
    (found,), (wanted,) = run(surgery.with_reference_function(after), inputs), run(before, inputs)
    assert relative(found, wanted) < 1e-6


# -- against another implementation ----------------------------------------------------------------------------------


class GroupNormSiLU(OpRun):
    """The operator in float64 NumPy, for onnx's reference evaluator, which knows it by this class's name."""

    op_domain = "canny2image"

    def _run(self, x: Any, gamma: Any, beta: Any, bias: Any = None, **attributes: Any) -> Tuple[np.ndarray]:
        def attribute(name: str) -> Any:
            return attributes.get(name) if attributes.get(name) is not None else getattr(self, name)

        assert (bias is not None) == bool(attribute("has_bias"))
        data = x.astype(np.float64) + (0 if bias is None else bias.astype(np.float64)[:, :, None, None])
        groups = data.reshape(x.shape[0], attribute("groups"), -1)
        groups = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(
            groups.var(-1, keepdims=True) + attribute("epsilon")
        )
        y = groups.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]
        return ((y / (1 + np.exp(-y)) if attribute("activation") else y).astype(x.dtype),)


@precisions
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_reference_evaluator(bias: bool, silu: bool, half: bool) -> None:
    def body(net: Net, x: torch.Tensor, rows: Optional[torch.Tensor]) -> torch.Tensor:
        y = net.norm(x if rows is None else x + rows[:, :, None, None])
        return F.silu(y) if silu else y

    before, inputs = traced(Net(body), half, (1, 8) if bias else None)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    (norm,) = fuse_group_norms(after).norms
    assert (norm.activation, norm.has_bias) == (silu, bias)
    (found,) = ReferenceEvaluator(after, new_ops=[GroupNormSiLU]).run(None, inputs)
    for (other,) in (run(surgery.with_reference_function(after), inputs), run(before, inputs)):
        assert found.dtype == other.dtype and relative(found, other) < (2e-3 if half else 1e-6)


# -- weights beside the graph ----------------------------------------------------------------------------------------


@pytest.fixture
def scattered(base: Path, tmp_path: Path) -> Path:
    """The FP16 step graph of the micro model, nearly all its weights in one file beside it."""
    folder = tmp_path / "in"
    folder.mkdir()
    model = onnx.load(str(micro_file(base, "step", "fp16")[0]))
    for tensor in model.graph.initializer:  # no shapes, and no scales of InstanceNormalization, which are shorter
        if tensor.data_type != TensorProto.INT64 and len(tensor.raw_data) >= 64:
            set_external_data(tensor, "a.onnx.data")
    onnx.save(model, str(folder / "a.onnx"))
    return folder / "a.onnx"


def test_weights_outside_are_neither_read_nor_changed(scattered: Path, base: Path) -> None:
    _, spec, build = micro_file(base, "step", "fp16")
    data = scattered.with_name("a.onnx.data")
    content = data.read_bytes()
    model = onnx.load(str(scattered), load_external_data=False)
    data.rename(data.with_name("away"))
    fuse_group_norms(model)
    data.with_name("away").rename(data)
    check_form(model)
    parameters = {tensor.name: tensor for tensor in model.graph.initializer}
    assert any(surgery.is_external(parameters[name]) for node in plugins_of(model) for name in node.input[1:3])
    report = fuse_file(scattered, scattered.with_name("b.onnx"))
    assert data.read_bytes() == content and len(report.norms) == len(plugins_of(model))
    onnx.save(surgery.with_reference_function(model), str(scattered.with_name("c.onnx")))
    inputs = example_inputs(spec, build)
    for found, wanted in zip(run(scattered.with_name("c.onnx"), inputs), run(scattered, inputs)):
        assert relative(found, wanted) < 1e-2


def test_weights_go_along_to_another_folder(scattered: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "fused.onnx"
    target.parent.mkdir()
    fuse_file(scattered, target)
    fuse_file(scattered, scattered.with_name("b.onnx"))
    assert sorted(path.name for path in target.parent.iterdir()) == ["fused.onnx", "fused.onnx.data"]
    shutil.move(str(scattered.with_name("b.onnx")), str(tmp_path / "in" / "kept.onnx"))
    both = [onnx.load(str(path)) for path in (target, tmp_path / "in" / "kept.onnx")]
    values = [{t.name: numpy_helper.to_array(t) for t in model.graph.initializer} for model in both]
    assert values[0].keys() == values[1].keys()
    assert all(np.array_equal(value, values[1][name]) for name, value in values[0].items())


def test_scales_outside_are_read_where_they_lie(tmp_path: Path) -> None:
    model, _ = traced(Net(lambda net, x, b: F.silu(net.norm(x)), groups=256, channels=256))
    file = tmp_path / "a.onnx"
    onnx.save_model(model, str(file), save_as_external_data=True, location="a.onnx.data", size_threshold=1024)
    bare = onnx.load(str(file), load_external_data=False)
    with pytest.raises(SurgeryError, match="the folder where it is must be given"):
        fuse_group_norms(bare)
    (norm,) = fuse_file(file, tmp_path / "b.onnx").norms
    assert norm.groups == 256


# -- the command -----------------------------------------------------------------------------------------------------


def test_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = micro_file(base, "step", "fp16")[0]
    target = tmp_path / "new" / "fused.onnx"
    config = str(Path(shared_config(base).folder) / "micro.yaml")
    assert surgery.main([str(source), str(target), "--model", config]) == 0
    out = capsys.readouterr().out
    count = len(plugins_of(onnx.load(str(target))))
    assert f"{target}: {count} GroupNorms, " in out and f"the network has {count} GroupNorms" in out
    assert "nodes before" in out and "peak memory" in out
    assert [path.name for path in target.parent.iterdir()] == ["fused.onnx"]
    bare = tmp_path / "bare.onnx"
    shutil.copy(source, bare)
    assert surgery.main([str(bare), str(target)]) == 0
    assert "has no manifest" in capsys.readouterr().out
    write_json(manifest_path(bare), {**read_manifest(source), "files": {"bare.onnx": {}}, "graph": "decode"})
    assert surgery.main([str(bare), str(target), "--no-check"]) == 0
    assert surgery.main([str(source), str(target)]) == 1
    assert "no model config" in capsys.readouterr().err


def test_command_with_the_wrong_network(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    shutil.copy(micro_file(base, "decode")[0], source)
    manifest = read_manifest(micro_file(base, "decode")[0])
    write_json(manifest_path(source), {**manifest, "files": {"a.onnx": {}}, "model": "tiny"})
    assert surgery.main([str(source), str(target)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("deploy.surgery: GroupNorm decoder.") and "was not recognised" in err
    assert not target.exists() and len(err.splitlines()) == 1


def test_command_with_bad_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.onnx").write_text("not a graph\n", encoding="utf-8")
    (tmp_path / "empty.onnx").write_bytes(b"")
    source = micro_file(base, "decode")[0]
    cases = [
        (tmp_path / "absent.onnx", tmp_path / "b.onnx", "absent.onnx"),
        (tmp_path / "text.onnx", tmp_path / "b.onnx", "is no ONNX file"),
        (tmp_path / "empty.onnx", tmp_path / "b.onnx", "is no ONNX file"),
        (source, source, "name another"),
        (source, source / "below.onnx", "below.onnx"),
    ]
    before = source.read_bytes()
    for source_file, target, said in cases:
        assert surgery.main([str(source_file), str(target), "--no-check"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("deploy.surgery: ") and said in err and len(err.splitlines()) == 1, err
    assert source.read_bytes() == before and not (tmp_path / "b.onnx").exists()
