"""FP8 (e4m3) products of the fast path: how large the maps get, and weights in steps of their rows.

A weight row has an FP32 step; a map has one factor a layer, a power of two that a run of the graphs on seeded inputs
settles before the weights are packed. Maps stay in memory in half precision; the kernels convert what they load. The
layers' sums, norms, attention, residuals and everything of the text and the hint are as without FP8.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from cldm.model import ControlLDM
from deploy.graphs import build_graph
from deploy.spec import Build, graph_specs
from ldm.autoencoder import AttnBlock
from ldm.plans import exact_plan
from runtime.fused.ops import Scaling

LARGEST = 448.0
# The largest number seen is brought to between an eighth and a quarter of the largest that there is.
HEADROOM = 4.0
# FP16 has to hold the factor.
MOST_EXPONENT = 14
# A tensor core takes 32 of the sum's channels; smaller layers are not worth their error.
BLOCK = 32
LEAST_DEPTH = 256
LEAST_CHANNELS = 64
# The run that shows how large the maps get. The same for all pictures, so that one model has one set of weights.
HEIGHT, WIDTH, STEPS, SEED, GUIDANCE = 256, 384, 4, 0, 9.0

Ranges = Mapping[nn.Module, float]


def worthwhile(n: int, cin: int, taps: int, tail: int) -> bool:
    """Whether a layer's product is large enough, and cut into blocks without a rest."""
    whole = cin % BLOCK == 0 and tail % BLOCK == 0
    return whole and n >= LEAST_CHANNELS and taps * cin + tail >= LEAST_DEPTH


def factor_of(largest: float) -> float:
    """The power of two that leaves a map of numbers up to `largest` its headroom.

    Raises
    ------
    ValueError
        `largest` is NaN or infinity.
    """
    if not math.isfinite(largest):
        raise ValueError(f"a layer's input reaches {largest}: FP8 has no factor for it; take precision fp32")
    if largest <= 0:
        return 1.0
    exponent = math.floor(math.log2(LARGEST / (HEADROOM * largest)))
    return 2.0 ** max(-MOST_EXPONENT, min(MOST_EXPONENT, exponent))


def quantise(matrix: torch.Tensor, tail: int, factor: float, tail_factor: float = 1.0) -> Tuple[torch.Tensor, Scaling]:
    """Weights for maps times `factor`, and behind them `tail` channels for one times `tail_factor`.

    Parameters
    ----------
    matrix : (nets, rows, K) tensor

    Returns
    -------
    (nets, rows, K) float8_e4m3fn tensor
        To the nearest, in steps that bring the largest of a row to 448.
    Scaling
    """
    scaled = matrix.detach().float()
    main = scaled.shape[2] - tail
    scaled = torch.cat([scaled[..., :main] / factor, scaled[..., main:] / tail_factor], dim=2)
    largest = scaled.abs().amax(dim=2)
    steps = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    # The division may come out above 448 by a rounding, and torch makes NaN of what is too large.
    numbers = (scaled / steps[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return numbers, Scaling(steps.contiguous(), factor, tail_factor)


class _Watch:
    """Notes the largest magnitude that layers of a graph are given, under the model's own modules."""

    def __init__(self) -> None:
        self._largest: Dict[nn.Module, torch.Tensor] = {}

    def on(self, copied: nn.Module, original: nn.Module) -> None:
        """Watch the convolutions and linear layers of a copy of `original`, but for the autoencoder's attention."""
        originals = dict(original.named_modules())
        apart = {id(part) for module in copied.modules() if isinstance(module, AttnBlock) for part in module.modules()}
        for name, module in copied.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and id(module) not in apart:
                module.register_forward_pre_hook(self._hook(originals[name]))

    def _hook(self, key: nn.Module) -> Callable[[nn.Module, Tuple[torch.Tensor, ...]], None]:
        def note(module: nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().amax().float()
            before = self._largest.get(key)
            self._largest[key] = largest if before is None else torch.maximum(before, largest)

        return note

    def ranges(self) -> Dict[nn.Module, float]:
        return {key: float(largest) for key, largest in self._largest.items()}


def input_ranges(
    model: ControlLDM, device: str, precision: str = "fp16", size: Tuple[int, int] = (HEIGHT, WIDTH)
) -> Dict[nn.Module, float]:
    """Largest magnitudes of the inputs of the step's and the decoder's layers, in a short run on seeded inputs.

    Parameters
    ----------
    model : ControlLDM
        Is not changed; its graphs' copies are on the device for the time of the run.
    device : str
    precision : {"fp16", "bf16", "fp32"}
        Of the run.
    size : (int, int)
        Height and width of the picture.

    Returns
    -------
    dict of the model's modules
        Those of the networks' layers that were run.
    """
    build = Build(model.config, *size, 1, precision)
    plan = exact_plan(model.config.schedule, STEPS)
    watch = _Watch()
    with torch.no_grad(), torch.backends.cudnn.flags(deterministic=True):
        inputs = _conditions(model, build, plan.timesteps, device)
        step = _graph("step", model, precision, device)
        watch.on(step.unet, model.unet)
        watch.on(step.control_model, model.control_model)
        for i, row in enumerate(plan.rows):
            inputs["time_bias"] = inputs["time_biases"][i : i + 1]
            inputs["coefficients"] = torch.tensor(row[None], dtype=torch.float32, device=device)
            inputs["latent"], inputs["noise_last"] = step(*(inputs[name] for name in graph_specs(build)["step"].inputs))
        del step
        decode = _graph("decode", model, precision, device)
        watch.on(decode.decoder, model.first_stage_model.decoder)
        decode(inputs["latent"])
    return watch.ranges()


def _conditions(model: ControlLDM, build: Build, timesteps: np.ndarray, device: str) -> Dict[str, Any]:
    """What a run's steps are given but for their own rows: a text of random words, and lines across the picture."""
    draw = np.random.RandomState(SEED)
    text = model.config.text
    ids = np.full((2, text.max_length), text.vocab_size - 1)
    ids[:, 0] = text.vocab_size - 2
    for row, words in zip(ids, (20, 40)):
        row[1 : 1 + words] = draw.randint(0, text.vocab_size - 2, len(row[1 : 1 + words]))
    lines = (draw.rand(build.height, 1) > 0.95) | (draw.rand(1, build.width) > 0.95)
    given: Dict[str, np.ndarray] = {
        "token_ids": ids.astype(np.int32),
        "canny": lines.astype(np.uint8) * 255,
        "timesteps": timesteps.astype(np.int32),
        "latent": draw.standard_normal(build.latent_shape).astype(np.float32),
        "noise_last": np.zeros(build.latent_shape, np.float32),
        "control_scales": np.ones((2, model.config.num_controls), np.float32),
        "guidance_scale": np.array([GUIDANCE], np.float32),
    }
    inputs = {name: torch.from_numpy(array).to(device) for name, array in given.items()}
    specs = graph_specs(build)
    for name in ("text", "hint", "time"):
        (source,), (made,) = specs[name].inputs, specs[name].outputs
        inputs[made] = _graph(name, model, build.precision, device)(inputs[source])
    return inputs


def _graph(name: str, model: ControlLDM, precision: str, device: str) -> nn.Module:
    """On the device, as a copy: graphs share parameters with the model, which stays where it is."""
    return copy.deepcopy(build_graph(name, model, precision, 1)).to(device)


def factors_of(
    ranges: Optional[Ranges], layers: Sequence[nn.Module], tails: Optional[Sequence[nn.Module]] = None
) -> Optional[List[float]]:
    """The factors of layers with one input and of those with the tail's; None where one of the inputs is not known."""
    groups = [layers] if tails is None else [layers, tails]
    if ranges is None or not all(layer in ranges for group in groups for layer in group):
        return None
    return [factor_of(max(ranges[layer] for layer in group)) for group in groups]
