"""Every kernel of the fast path on small operands; prints what came out as JSON. For `tests.interpreted`."""

from __future__ import annotations

import json
from typing import Any, Callable, Dict

import torch
import torch.nn.functional as F
from torch import nn

from runtime.fused.ops import Affine, Fused
from runtime.fused.packing import Packer
from runtime.fused.tuning import AttentionConfig, Tuning
from tests.fused_cases import ATTENTIONS, CARD, MATMULS, Operands, relative
from tests.interpreted import patch_interpreter

HALF = torch.float16
Outcome = Dict[str, Any]


def normal(seed: int, *shape: int) -> torch.Tensor:
    """The same numbers on torch's default device, whichever that is."""
    drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


def pack() -> Packer:
    return Packer(str(torch.get_default_device()), HALF)


def products() -> Dict[str, Outcome]:
    found = {}
    for name, (case, config) in MATMULS.items():
        operands = Operands(case)
        repeats = 2 if config.splits > 1 else 1
        found[name] = {**operands.run(Fused(Tuning(CARD)), config, repeats), "bound": operands.bound()}
    return found


def attentions(run: Fused) -> Dict[str, Outcome]:
    found = {}
    for name, case in ATTENTIONS.items():
        q, k, v = case.operands()
        out = run.attention(q, k, v, case.heads, case.causal, case.images, AttentionConfig(16, 16, 4, 2))
        found[name] = {"error": relative(out, case.wanted(q, k, v)), "bound": 5e-4}
    return found


def layer_norm(run: Fused) -> Outcome:
    # A mean far from 0 beside the deviation: a variance of squares less the squared mean would have lost its digits.
    x = (normal(1, 2, 3, 2, 3, 40) + 30).to(HALF)
    wide = torch.cat([x, x + 1], dim=-1)[..., :40]
    norm = Affine(1 + normal(2, 2, 40), normal(3, 2, 40), 1e-5)
    affine = zip(x.double(), norm.gamma.double(), norm.beta.double())
    wanted = torch.stack([F.layer_norm(net, (40,), gamma, beta, 1e-5) for net, gamma, beta in affine])
    return {"error": relative(run.layer_norm(wide, norm), wanted), "bound": 3e-4}


def softmax(run: Fused) -> Outcome:
    x = (5 * normal(4, 1, 1, 1, 6, 37)).to(HALF)
    return {"error": relative(run.softmax(x), x.double().softmax(-1)), "bound": 3e-4}


def first_conv_latents(run: Fused) -> Outcome:
    """Two nets, the samples once for each half of guidance, and the hint's features for the second net."""
    convs = [nn.Conv2d(4, 24, 3, padding=1).requires_grad_(False) for _ in range(2)]
    for i, conv in enumerate(convs):
        conv.weight.copy_((normal(5 + i, *conv.weight.shape) / 6).to(HALF))
        conv.bias.copy_(normal(7 + i, 24))
    latent = normal(9, 2, 4, 5, 6).to(HALF).float().transpose(2, 3)  # strides that no layout has
    added = normal(10, 1, 24, 6, 5).to(HALF)
    weights = pack().conv(convs)
    found = run.first_conv(latent, weights, 4, added=added)
    twice = latent.double().repeat(2, 1, 1, 1)
    wanted = torch.stack([F.conv2d(twice, c.weight.double(), c.bias.double(), padding=1) for c in convs])
    wanted[1] += added.double()
    return {"error": relative(found, wanted.permute(0, 1, 3, 4, 2)), "bound": 3e-4}


def first_conv_pixels(run: Fused) -> Outcome:
    """One channel of bytes seen as three, a factor and a stride."""
    conv = nn.Conv2d(3, 20, 3, padding=1, stride=2).requires_grad_(False)
    conv.weight.copy_((normal(11, *conv.weight.shape) / 5).to(HALF))
    conv.bias.copy_(normal(12, 20))
    canny = (normal(13, 7, 9) > 0).to(torch.uint8) * 255
    found = run.first_conv(canny.expand(1, 3, 7, 9), pack().conv([conv]), 1, factor=1 / 255, act="silu")
    x = canny.double().expand(1, 3, 7, 9) / 255
    wanted = F.silu(F.conv2d(x, conv.weight.double(), conv.bias.double(), padding=1, stride=2))
    return {"error": relative(found[0], wanted.permute(0, 2, 3, 1)), "bound": 3e-4}


def guide(run: Fused) -> Outcome:
    samples, channels, height, width = 3, 4, 5, 7
    shape = (samples, channels, height, width)
    predicted = normal(14, 1, 2 * samples, height, width, channels)
    latent, noise_last = normal(15, *shape), normal(16, *shape)
    scale, coefficients = torch.tensor([7.5]), torch.tensor([[0.9, -0.3, 0.1]])
    moved, noise = (torch.full(shape, float("nan")) for _ in range(2))
    run.guide(predicted, latent, noise_last, scale, coefficients, moved, noise)
    cond, uncond = predicted[0].double().permute(0, 3, 1, 2).chunk(2)
    guided = uncond + 7.5 * (cond - uncond)
    a, b, c = coefficients[0].double()
    wanted = torch.stack([a * latent.double() + b * guided + c * noise_last.double(), guided])
    return {"error": relative(torch.stack([moved, noise]), wanted), "bound": 3e-7}


def pixels(run: Fused) -> Outcome:
    """Off by one where the value lies on the edge between two bytes, and nowhere else; both ends are met."""
    conv = nn.Conv2d(20, 3, 3, padding=1).requires_grad_(False)
    conv.weight.copy_((normal(17, *conv.weight.shape) / 13).to(HALF))
    conv.bias.copy_(normal(18, 3) / 4)
    x = normal(19, 1, 2, 9, 10, 20).to(HALF)
    out = torch.full((2, 9, 10, 3), 77, dtype=torch.uint8)
    run.pixels(x, pack().conv([conv]), out)
    y = F.conv2d(x[0].double().permute(0, 3, 1, 2), conv.weight.double(), conv.bias.double(), padding=1)
    value = (y * 127.5 + 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    edge = (value - value.round()).abs() < 1e-3
    wrong = (out != value.floor().to(torch.uint8)) & ~edge
    spread = float(((value <= 0) | (value >= 255)).double().mean())
    return {"error": float(wrong.double().mean()), "bound": 0.0, "clamped": spread}


def embed(run: Fused) -> Outcome:
    tokens, positions = normal(20, 50, 24).to(HALF), normal(21, 7, 24).to(HALF)
    ids = torch.tensor([[0, 49, 3, 3, 1, 2, 5], [9, 8, 7, 6, 5, 4, 48]], dtype=torch.int32)
    wanted = (tokens.double()[ids.long()] + positions.double())[None, :, None]
    return {"error": relative(run.embed(ids, tokens, positions), wanted), "bound": 3e-4}


KERNELS: Dict[str, Callable[[Fused], Outcome]] = {
    function.__name__: function
    for function in (layer_norm, softmax, first_conv_latents, first_conv_pixels, guide, pixels, embed)
}


def main() -> None:
    patch_interpreter()
    run = Fused(Tuning(CARD))
    found: Dict[str, Dict[str, Outcome]] = {"products": products(), "attentions": attentions(run)}
    found["kernels"] = {name: function(run) for name, function in KERNELS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
