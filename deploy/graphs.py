"""The five deployable graphs: what changes at different rates, apart.

The text enters the UNet only through the keys and values of cross-attention, the timestep only through a bias a
ResBlock, and the hint only through its features; so all three leave the sampler's loop. What remains, the step, also
holds guidance and the sampler's update, so that the host has nothing to compute between two steps.

In FP16 the types are written into the graph: norms, the time embedding, guidance and the update are FP32.
"""

from __future__ import annotations

import copy
from typing import Callable, Dict, List, Sequence, Tuple, TypeVar

import torch
from torch import nn

from cldm.controlnet import ControlNet
from cldm.model import ControlLDM
from deploy.spec import PRECISIONS
from ldm.attention import Conditioning
from ldm.layout import key_value_widths, time_bias_widths
from ldm.norm import GroupNorm, LayerNorm
from ldm.unet import UNet, project_timesteps

Module = TypeVar("Module", bound=nn.Module)
Network = TypeVar("Network", UNet, ControlNet)


def cast_copy(module: Module, dtype: torch.dtype) -> Module:
    """A copy in `dtype` whose norms stay FP32; parameters that keep their type are shared, not copied."""
    kept = {id(p) for m in module.modules() if isinstance(m, (GroupNorm, LayerNorm)) for p in m.parameters()}
    memo: Dict[int, nn.Parameter] = {}
    for parameter in module.parameters():
        same = parameter.dtype == dtype or id(parameter) in kept
        memo[id(parameter)] = parameter if same else nn.Parameter(parameter.data.to(dtype), requires_grad=False)
    return copy.deepcopy(module, memo)


def _without_conditioning(network: Network, dtype: torch.dtype) -> Network:
    """A `cast_copy` without the layers that the text and time graphs have taken over."""
    copied = cast_copy(network, dtype)
    copied.time_embed = nn.Identity()
    for res_block in copied.res_blocks():
        res_block.emb_layers = nn.Identity()
    for transformer in copied.transformer_blocks():
        transformer.attn2.to_k = transformer.attn2.to_v = nn.Identity()
    return copied


class TextGraph(nn.Module):
    """(2, 77) token ids to all cross-attention keys and values, packed (2, 77, K): UNet's, then ControlNet's."""

    def __init__(self, model: ControlLDM, dtype: torch.dtype) -> None:
        super().__init__()
        self.text_model = cast_copy(model.text_model, dtype)
        blocks = model.unet.transformer_blocks() + model.control_model.transformer_blocks()
        self.projections = nn.ModuleList(
            cast_copy(projection, dtype) for block in blocks for projection in (block.attn2.to_k, block.attn2.to_v)
        )

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        context = self.text_model(token_ids)
        return torch.cat([projection(context) for projection in self.projections], dim=-1)


class HintGraph(nn.Module):
    """(H, W) uint8 canny map to the hint's (1, C, H/8, W/8) features."""

    def __init__(self, model: ControlLDM, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = cast_copy(model.control_model.input_hint_block, dtype)
        self.dtype = dtype

    def forward(self, canny: torch.Tensor) -> torch.Tensor:
        gray = (canny.float() / 255.0).to(self.dtype)
        return self.encoder(gray[None, None].expand(1, 3, *canny.shape))


class TimeGraph(nn.Module):
    """(S,) timesteps to all time biases, packed (S, total): UNet's, then ControlNet's. FP32 inside."""

    def __init__(self, model: ControlLDM, dtype: torch.dtype) -> None:
        super().__init__()
        networks = (model.unet, model.control_model)
        self.time_embeds = nn.ModuleList(network.time_embed for network in networks)
        self.projections = nn.ModuleList(
            nn.ModuleList(block.emb_layers for block in network.res_blocks()) for network in networks
        )
        self.dtype = dtype

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        biases = [
            bias
            for time_embed, projections in zip(self.time_embeds, self.projections)
            for bias in project_timesteps(time_embed, projections, timesteps)
        ]
        return torch.cat(biases, dim=-1).to(self.dtype)


class StepGraph(nn.Module):
    """ControlNet, UNet, guidance and the sampler's update `x_next = A x + B e + C n`.

    `n` is `noise_last`: the noise predicted one evaluation ago for multistep schedules, or fresh noise for eta > 0
    (no schedule uses both).
    """

    def __init__(self, model: ControlLDM, dtype: torch.dtype, samples: int) -> None:
        super().__init__()
        self.unet = _without_conditioning(model.unet, dtype)
        self.control_model = _without_conditioning(model.control_model, dtype)
        self.control_model.input_hint_block = nn.Identity()
        self.dtype = dtype
        self.samples = samples
        unet = model.config.unet
        self.bias_widths = [time_bias_widths(unet, decoder) for decoder in (True, False)]
        self.kv_widths = [
            [width for w in key_value_widths(unet, decoder) for width in (w, w)] for decoder in (True, False)
        ]

    def _conditionings(self, keys_values: torch.Tensor, time_bias: torch.Tensor) -> List[Conditioning]:
        """Unpack the conditioning of the UNet and of the ControlNet, for a batch of 2 x samples."""
        per_sample = self._per_sample(keys_values)
        biases = _split(time_bias, self.bias_widths)
        keys_and_values = _split(per_sample, self.kv_widths)
        return [Conditioning(b, list(zip(kv[0::2], kv[1::2]))) for b, kv in zip(biases, keys_and_values)]

    def _per_sample(self, halves: torch.Tensor) -> torch.Tensor:
        """Repeat each of the two halves' rows for every sample: (2, ...) to (2 x samples, ...)."""
        return halves if self.samples == 1 else halves.repeat_interleave(self.samples, dim=0)

    def forward(
        self,
        latent: torch.Tensor,
        noise_last: torch.Tensor,
        keys_values: torch.Tensor,
        hint_features: torch.Tensor,
        time_bias: torch.Tensor,
        control_scales: torch.Tensor,
        guidance_scale: torch.Tensor,
        coefficients: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([latent, latent]).to(self.dtype)
        for_unet, for_control = self._conditionings(keys_values, time_bias)
        scales = self._per_sample(control_scales).to(self.dtype)[:, :, None, None]
        controls = self.control_model.residuals(x, for_control, hint_features)
        controls = [control * scales[:, i : i + 1] for i, control in enumerate(controls)]
        cond, uncond = self.unet.denoise(x, for_unet, controls).float().chunk(2)
        noise = uncond + guidance_scale * (cond - uncond)
        a, b, c = coefficients[0, 0], coefficients[0, 1], coefficients[0, 2]
        return a * latent + b * noise + c * noise_last, noise


class DecodeGraph(nn.Module):
    """(N, 4, h, w) latent to an (N, 8h, 8w, 3) uint8 image."""

    def __init__(self, model: ControlLDM, dtype: torch.dtype) -> None:
        super().__init__()
        autoencoder = model.first_stage_model
        self.post_quant_conv = cast_copy(autoencoder.post_quant_conv, dtype)
        self.decoder = cast_copy(autoencoder.decoder, dtype)
        self.scale_factor = autoencoder.config.scale_factor
        self.dtype = dtype

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        z = (latent / self.scale_factor).to(self.dtype)
        image = self.decoder(self.post_quant_conv(z)).float().permute(0, 2, 3, 1)
        # floor: the original truncates, and a runtime's own conversion to uint8 might round.
        return (image * 127.5 + 127.5).clamp(0.0, 255.0).floor().to(torch.uint8)


def _split(packed: torch.Tensor, widths: Sequence[Sequence[int]]) -> List[List[torch.Tensor]]:
    """Cut the last axis of a packed tensor into the UNet's pieces and the ControlNet's."""
    pieces = list(packed.split([w for group in widths for w in group], dim=-1))
    return [pieces[: len(widths[0])], pieces[len(widths[0]) :]]


def build_graph(name: str, model: ControlLDM, precision: str, samples: int) -> nn.Module:
    """The module of one graph ("text", "hint", "time", "step" or "decode") with the model's weights."""
    dtype = getattr(torch, PRECISIONS[precision])
    makers: Dict[str, Callable[[], nn.Module]] = {
        "text": lambda: TextGraph(model, dtype),
        "hint": lambda: HintGraph(model, dtype),
        "time": lambda: TimeGraph(model, dtype),
        "step": lambda: StepGraph(model, dtype, samples),
        "decode": lambda: DecodeGraph(model, dtype),
    }
    return makers[name]().eval().requires_grad_(False)
