"""The four fused networks beside the deployable graphs; prints their errors as JSON. For `tests.interpreted`."""

from __future__ import annotations

import dataclasses
import json
from typing import Dict, Mapping, Optional, Sequence, Tuple

import torch

from cldm.checkpoint import load_model
from cldm.model import ControlLDM
from cldm.weights import Weights
from deploy.graphs import build_graph
from deploy.spec import Build, GraphSpec, graph_specs
from runtime.fused import fp8, networks
from runtime.fused.ops import Fused
from runtime.fused.tuning import Card, Tuning
from tests.fused_cases import relative
from tests.interpreted import patch_interpreter
from tests.small_model import small_config

Tensors = Dict[str, torch.Tensor]
NETWORKS = {
    **{"text": networks.FusedText, "hint": networks.FusedHint},
    **{"step": networks.FusedStep, "decode": networks.FusedDecode},
}
# Height, width, samples, and the processors of the card: with few of them tiles are large, with more sums are cut. The
# smallest picture has maps of one pixel; what comes before the step knows nothing of samples.
CASES = {
    "32x64 n=1": (32, 64, 1, 1, ("text", "hint", "step")),
    "32x32 n=2": (32, 32, 2, 8, ("step", "decode")),
}


def draw(build: Build, model: ControlLDM) -> Tensors:
    """Inputs of all graphs in FP32; those that other graphs make are theirs."""
    generator = torch.Generator().manual_seed(build.samples)
    text, shape = build.config.text, build.latent_shape
    exact = {name: build_graph(name, model, "fp32", build.samples) for name in ("text", "hint", "time")}
    ids = torch.randint(0, text.vocab_size, (2, text.max_length), generator=generator, dtype=torch.int32)
    canny = (torch.rand(build.height, build.width, generator=generator) > 0.8).to(torch.uint8) * 255
    return {
        "token_ids": ids,
        "canny": canny,
        "latent": torch.randn(shape, generator=generator),
        "noise_last": torch.randn(shape, generator=generator),
        "keys_values": exact["text"](ids),
        "hint_features": exact["hint"](canny),
        "time_bias": exact["time"](torch.tensor([500], dtype=torch.int32)),
        "control_scales": 2 * torch.rand(2, build.config.num_controls, generator=generator),
        "guidance_scale": torch.tensor([9.0]),
        "coefficients": torch.tensor([[0.9, 0.3, 0.1]]),
    }


def of_module(name: str, model: ControlLDM, precision: str, samples: int, spec: GraphSpec, given: Tensors) -> Tensors:
    """The graph's outputs; of a half-precision graph from inputs that are rounded."""
    inputs = [given[key].to(getattr(torch, tensor.dtype)) for key, tensor in spec.inputs.items()]
    results = build_graph(name, model, precision, samples)(*inputs)
    return dict(zip(spec.outputs, results if isinstance(results, tuple) else (results,)))


def of_fused(
    name: str,
    model: ControlLDM,
    run: Fused,
    spec: GraphSpec,
    given: Tensors,
    ranges: Optional[fp8.Ranges] = None,
) -> Tensors:
    inputs = {key: given[key].to(getattr(torch, tensor.dtype)) for key, tensor in spec.inputs.items()}
    device = next(iter(inputs.values())).device
    outputs = {}
    for key, tensor in spec.outputs.items():
        dtype = getattr(torch, tensor.dtype)
        poison = float("nan") if dtype.is_floating_point else 77
        outputs[key] = torch.full(tuple(tensor.shape), poison, dtype=dtype, device=device)
    options = {} if ranges is None else {"ranges": ranges}
    NETWORKS[name](model, run, str(device), **options)(inputs, outputs)
    return outputs


def errors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> Dict[str, float]:
    return {key: relative(found[key], wanted[key].double()) for key in wanted}


def compare(
    build: Build,
    model: ControlLDM,
    run: Fused,
    names: Sequence[str] = tuple(NETWORKS),
    device: str = "cpu",
    ranges: Optional[fp8.Ranges] = None,
) -> Dict[str, Tuple[float, float]]:
    """Relative errors of each output against FP32: the fused network's, and the half-precision graph's.

    The model is left on the device. With `ranges` the fused networks are those of FP8.
    """
    given = {name: tensor.to(device) for name, tensor in draw(build, model.to("cpu")).items()}
    model.to(device)
    specs, exact_specs = graph_specs(build), graph_specs(dataclasses.replace(build, precision="fp32"))
    found = {}
    for name in names:
        wanted = of_module(name, model, "fp32", build.samples, exact_specs[name], given)
        plain = errors(of_module(name, model, build.precision, build.samples, specs[name], given), wanted)
        fused = errors(of_fused(name, model, run, specs[name], given, ranges), wanted)
        found.update({f"{name} {key}": (fused[key], plain[key]) for key in wanted})
    return found


def compare_small(
    height: int, width: int, samples: int, processors: int, names: Sequence[str]
) -> Dict[str, Tuple[float, float]]:
    build = Build(small_config(), height, width, samples, "fp16")
    model = load_model(build.config, Weights(None, build.config.seed, ""))
    return compare(build, model, Fused(Tuning(Card("a processor", 80, processors, 1 << 20))), names)


def compare_fp8() -> Dict[str, Tuple[float, float]]:
    """Step and decoder with all layers in FP8 that the instructions take, however small."""
    fp8.LEAST_DEPTH = fp8.LEAST_CHANNELS = 1
    fp8.BLOCK = 16  # the interpreter takes any
    build = Build(small_config(), 32, 32, 1, "fp8")
    model = load_model(build.config, Weights(None, build.config.seed, ""))
    ranges = fp8.input_ranges(model, "cpu", "fp32", (64, 64))
    run = Fused(Tuning(Card("a processor", 89, 1, 1 << 20)))
    return compare(build, model, run, ("step", "decode"), ranges=ranges)


def main() -> None:
    patch_interpreter()
    found = {name: compare_small(*case) for name, case in CASES.items()}
    print(json.dumps({**found, "fp8": compare_fp8()}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
