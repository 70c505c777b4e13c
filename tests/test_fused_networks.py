"""The fused networks against the deployable graphs on a CPU, and what they ask for when they are only traced."""

from __future__ import annotations

import copy
import sys
from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cldm.checkpoint import load_model, shape_of_model
from cldm.config import ModelConfig, load_config
from cldm.model import ControlLDM
from cldm.weights import Weights
from deploy.graphs import build_graph
from deploy.spec import Build, graph_specs
from ldm.unet import Upsample
from runtime.fused.build import _meta, fused_problem, require_memory
from runtime.fused.networks import FusedTime
from runtime.fused.ops import Fused
from runtime.fused.packing import Packer
from runtime.fused.session import FusedSession
from runtime.fused.tuning import Card, Problem, Tuning
from tests.fused_network_cases import CASES, NETWORKS
from tests.interpreted import needs_triton, run_interpreted
from tests.small_model import small_config

OUTPUTS = {"text": ["keys_values"], "hint": ["hint_features"], "step": ["latent_next", "noise"], "decode": ["image"]}


@pytest.fixture(scope="module")
def found() -> Dict[str, Dict[str, Tuple[float, float]]]:
    return run_interpreted("tests.fused_network_cases")


def _outputs() -> Iterator[Tuple[str, str]]:
    for case, (*_, names) in CASES.items():
        yield from ((case, f"{name} {output}") for name in names for output in OUTPUTS[name])


@needs_triton
@pytest.mark.parametrize(("case", "output"), list(_outputs()))
def test_error_is_that_of_half_precision(
    found: Dict[str, Dict[str, Tuple[float, float]]], case: str, output: str
) -> None:
    """Against FP32, beside the error of the graph in plain FP16; outputs held NaN, or one byte, before."""
    fused, plain = found[case][output]
    print(f"{case} {output}: {fused:.2e}, plain FP16 {plain:.2e}")
    assert 1e-5 < plain < 1e-2
    assert fused < 1.5 * plain


@needs_triton
@pytest.mark.parametrize(("output", "bound"), [("latent_next", 0.25), ("noise", 0.4), ("image", 0.05)])
def test_error_of_fp8(found: Dict[str, Dict[str, Tuple[float, float]]], output: str, bound: float) -> None:
    """All layers in FP8; guidance multiplies the error of the noise by up to nine."""
    (errors,) = [pair for name, pair in found["fp8"].items() if name.endswith(output)]
    fused, plain = errors
    print(f"{output}: {fused:.3f}, plain FP16 {plain:.2e}")
    assert 10 * plain < fused < bound


# -- tracing: no launch, the shapes alone ------------------------------------------------------------------------------


def traced(model: ControlLDM, device: str, build: Build) -> Fused:
    """What the networks ask for; the weights lie on `device`, the maps on none."""
    run = Fused(Tuning(Card("a card", 80, 108, 164 * 1024)))
    for name, network in NETWORKS.items():
        spec = graph_specs(build)[name]
        network(model, run, device)(_meta(spec.inputs), _meta(spec.outputs))
    return run


def small_model() -> ControlLDM:
    config = small_config()
    return load_model(config, Weights(None, config.seed, ""))


# -- the time graph, which needs no triton -----------------------------------------------------------------------------


class _Launches(TorchDispatchMode):
    """Counts what PyTorch would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: List[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and func.name() != "aten::_unsafe_view":
            self.names.append(func.name())
        return made


def time_biases(model: ControlLDM, precision: str, timesteps: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Those of the fused network, and of the graph's module in the same precision."""
    build = Build(model.config, 64, 64, 1, precision)
    spec = graph_specs(build)["time"]
    width = spec.outputs["time_biases"].shape[1]
    found = torch.full((len(timesteps), width), float("nan"), dtype=getattr(torch, build.dtype))
    session = FusedSession(FusedTime(model, "cpu"), spec)
    session.bind({"timesteps": timesteps, "time_biases": found}).enqueue()
    return found, build_graph("time", model, precision, 1)(timesteps)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_time_biases_are_those_of_fp32(precision: str) -> None:
    """Against FP64 as exact as the module's: what a half precision adds is the rounding of the bias alone."""
    model = small_model()
    timesteps = torch.tensor([999, 951, 500, 1, 0, 500, 2], dtype=torch.int32)
    found, plain = time_biases(model, precision, timesteps)
    wide = copy.deepcopy(model).double()
    networks = (wide.unet, wide.control_model)
    wanted = torch.cat([bias for network in networks for bias in network.time_biases(timesteps)], dim=1)
    ours, theirs = ((each.double() - wanted).norm() / wanted.norm() for each in (found, plain))
    print(f"time biases in {precision}: {ours:.2e}, the module's {theirs:.2e}")
    assert ours < {"fp32": 5e-7, "fp16": 4e-4, "bf16": 3e-3}[precision]
    assert ours < 1.2 * theirs
    torch.testing.assert_close(found[2], found[5])


def test_the_time_graph_is_a_handful_of_launches() -> None:
    """Rows of a table, and for each network a product and its rounding; a product is one launch with its bias."""
    model, timesteps = small_model(), torch.arange(20, dtype=torch.int32)
    network = FusedTime(model, "cpu")
    module = build_graph("time", model, "fp16", 1)
    places = torch.zeros(20, sum(weights.out_channels for weights in network.projections), dtype=torch.float16)
    with torch.no_grad(), _Launches() as ours:
        network({"timesteps": timesteps}, {"time_biases": places})
    with torch.no_grad(), _Launches() as theirs:
        places.copy_(module(timesteps))
    print(f"time graph: {len(ours.names)} launches, the module {len(theirs.names)}")
    assert ours.names == ["aten::index_select", *2 * ["aten::addmm", "aten::copy_"]]
    assert len(theirs.names) > 8 * len(ours.names)


def test_the_time_graph_holds_no_more_than_its_weights() -> None:
    """Its table takes the place of the layers that it is made by; SD1.5's are 16.4 MB, and its table 10.2."""
    with torch.device("meta"):
        model = shape_of_model(load_config("sd15"))
        network = FusedTime(model, "meta")
    held = [network.hidden, *(part for weights in network.projections for part in (weights.matrix, weights.bias))]
    module = build_graph("time", model, "fp16", 1)
    ours, theirs = (sum(4 * tensor.numel() for tensor in each) for each in (held, module.parameters()))
    assert all(tensor.dtype == torch.float32 for tensor in held)
    assert 150e6 < ours < theirs < 175e6


# -- packing -----------------------------------------------------------------------------------------------------------


def half(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.half() for part in parts])


def taps_last(conv: torch.nn.Conv2d) -> torch.Tensor:
    """(N, kh * kw * C), a tap after the other."""
    return torch.cat(
        [conv.weight[:, :, y, x] for y in range(conv.kernel_size[0]) for x in range(conv.kernel_size[1])], 1
    )


def test_packed_weights_are_the_layers_bit_by_bit() -> None:
    """Put in order and rounded once to the nearest, whatever device does it."""
    model = small_model()
    pack = Packer("cpu", torch.float16)
    unet, control = model.unet, model.control_model
    blocks = [network.input_blocks[2][0].op for network in (unet, control)]
    found = pack.conv(blocks)
    assert torch.equal(found.matrix, half(*map(taps_last, blocks)))
    assert (found.taps, found.stride, found.tail) == (9, 2, 0) and found.matrix.is_contiguous()
    block = unet.output_blocks[0][0]
    found = pack.conv([block.out_layers[3]], [block.skip_connection])
    assert torch.equal(
        found.matrix, half(torch.cat([taps_last(block.out_layers[3]), taps_last(block.skip_connection)], 1))
    )
    assert torch.equal(found.bias[0], block.out_layers[3].bias + block.skip_connection.bias)
    attention = model.first_stage_model.decoder.mid.attn_1
    found = pack.side_by_side([(attention.q, attention.k)], (0.3, 1.0))
    assert torch.equal(found.matrix, half(torch.cat([attention.q.weight * 0.3, attention.k.weight]).flatten(1)))
    assert torch.equal(found.bias[0], torch.cat([attention.q.bias * 0.3, attention.k.bias]))
    layers = [network.input_blocks[1][1].transformer_blocks[0].ff.net[0].proj for network in (unet, control)]
    found = pack.linear(layers, gated=True)
    assert torch.equal(found.matrix, half(*(layer.weight for layer in layers))) and found.gated
    assert torch.equal(found.bias, torch.stack([layer.bias for layer in layers]))


def test_packed_upsampling_is_the_sum_of_the_taps_that_meet() -> None:
    (conv,) = [
        layer.conv for block in small_model().unet.output_blocks for layer in block if isinstance(layer, Upsample)
    ][:1]
    weight, found = conv.weight, Packer("cpu", torch.float16).up_conv(conv)
    first, last = (([0], [1, 2]), ([0, 1], [2]))
    for phase, (rows, cols) in enumerate([(first, first), (first, last), (last, first), (last, last)]):
        summed = [sum(weight[:, :, y, x] for y in ys for x in xs) for ys in rows for xs in cols]
        assert torch.equal(found.matrix[phase], torch.cat(summed, 1).half())
    assert found.matrix.shape[0] == found.taps == 4 and torch.equal(found.bias, conv.bias.expand(4, -1))


def test_packing_takes_a_layer_s_memory_beside_the_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter goes to the device as it is, and into its place without a copy in between."""
    made: List[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not func.is_view and func.name() != "aten::copy_":
                made.append(func.name())
            return result

    model = small_model()
    pack, convs = (
        Packer("cpu", torch.float16),
        [network.input_blocks[2][0].op for network in (model.unet, model.control_model)],
    )
    vectors = pack.vector([conv.bias for conv in convs])
    monkeypatch.setattr(pack, "vector", lambda given: vectors)
    with Watch():
        pack.conv(convs)
        pack.linear([model.unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q])
    assert set(made) <= {"aten::empty.memory_format", "aten::detach"}


@needs_triton
def test_tracing_launches_nothing_wherever_the_weights_are() -> None:
    model = small_model()
    build = Build(model.config, 64, 96, 2, "fp16")
    on_cpu, on_meta = (traced(model, device, build) for device in ("cpu", "meta"))
    assert on_cpu.asked == on_meta.asked and len(on_cpu.asked) > 40
    assert on_cpu.asked_attention == on_meta.asked_attention and len(on_cpu.asked_attention) > 5
    assert not on_cpu._scratch, "a kernel was prepared"


@needs_triton
def test_traced_problems_are_the_networks_sizes() -> None:
    """Each number from the layers' own description: 2 x 96 pixels, three levels of 16, 32 and 32 channels."""
    model = small_model()
    run = traced(model, "meta", Build(model.config, 64, 96, 2, "fp16"))
    asked = run.asked
    # The first ResBlock of both encoders, before the text: one half of guidance; the same of the decoder has both.
    assert asked[Problem(2, 2 * 96, 16, 16, 0, 9, 1, False, 8, 12)] == (2, 2, 8, 12, 16)
    assert Problem(1, 4 * 96, 16, 16, 32, 9, 1, False, 8, 12) in asked, "decoder: 16 + 16 channels through the tail"
    assert Problem(2, 4 * 24, 16, 16, 0, 9, 2, False, 4, 6) in asked, "the first downsampling"
    assert Problem(4, 4 * 24, 32, 32, 0, 4, 1, False, 4, 6) in asked, "an upsampling's four sets of weights"
    assert Problem(2, 4 * 96, 64, 16, gated=True, height=8, width=12) in asked, "GEGLU is four times as wide"
    assert Problem(1, 4 * 96, 4, 16, 0, 9, 1, False, 8, 12) in asked, "the predicted noise"
    assert all(shape[1] * shape[2] * shape[3] * 4 >= problem.m for problem, shape in asked.items())


def test_a_session_reads_and_writes_the_buffers_it_was_given() -> None:
    model = small_model()
    build = Build(model.config, 64, 64, 1, "fp16")
    spec = graph_specs(build)["hint"]
    seen: Dict[str, Any] = {}
    session = FusedSession(lambda inputs, outputs: seen.update(inputs=inputs, outputs=outputs), spec)
    buffers = {
        name: torch.zeros(tuple(tensor.shape), dtype=getattr(torch, tensor.dtype))
        for name, tensor in spec.tensors.items()
    }
    session.bind(buffers).enqueue()
    assert seen["inputs"]["canny"] is buffers["canny"]
    assert seen["outputs"]["hint_features"] is buffers["hint_features"]
    with pytest.raises(ValueError, match="canny must be contiguous uint8"):
        session.bind({**buffers, "canny": torch.zeros(64, 64)})
    session.close()
    with pytest.raises(RuntimeError, match="hint is closed"):
        session.bind(buffers)


# -- where they can run ------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("capability", "precision", "variable", "reason"),
    [
        ((8, 0), "fp16", None, None),
        ((8, 9), "bf16", "1", None),
        ((9, 0), "fp16", "0", "HACKATHON_FUSED is 0"),
        ((9, 0), "fp32", None, "no FP32 form"),
        ((7, 5), "fp16", None, "compute capability 8.0, and this GPU has 7.5"),
        ((8, 9), "fp8", None, None),
        ((8, 6), "fp8", None, "FP8 needs compute capability 8.9, and this GPU has 8.6"),
    ],
)
def test_where_they_run(
    monkeypatch: pytest.MonkeyPatch, capability: Tuple[int, int], precision: str, variable: str, reason: str
) -> None:
    monkeypatch.delenv("HACKATHON_FUSED", raising=False)
    if variable is not None:
        monkeypatch.setenv("HACKATHON_FUSED", variable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = fused_problem("cuda", precision)
    assert problem is None if reason is None else problem is not None and reason in problem
    assert "not for cpu" in str(fused_problem("cpu", "fp16")) or variable == "0"


def test_they_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HACKATHON_FUSED", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fused_problem("cuda", "fp16") == "the package triton is not installed"


@needs_triton
def test_they_need_a_triton_that_knows_programmatic_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HACKATHON_FUSED", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setitem(sys.modules, "runtime.fused.kernels", None)
    assert "this version of triton is too old" in str(fused_problem("cuda", "fp16"))


def test_too_little_memory_is_an_error_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD1.5 has 1.43 billion parameters with the ControlNet and without the autoencoder's encoder: 2.9 GB."""
    config: ModelConfig = load_config("sd15")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(3.8e9), int(4e9)))
    with pytest.raises(MemoryError, match=r"sd15 .* needs some 3\.9 GB, and cuda:1 has 3\.8 of its 4\.0 GB free; stop"):
        require_memory(config, "cuda:1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(4.1e9), int(6e9)))
    require_memory(config, "cuda:1")
