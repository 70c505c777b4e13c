"""The UNet of Stable Diffusion 1.5, split where its inputs change at different rates.

`time_biases` depends on the timestep alone and `keys_values` on the text alone, so a sampler that repeats the network
can compute both outside its loop; `denoise` is what is left. `forward` joins the three.
"""

from __future__ import annotations

import math
from typing import Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ldm.attention import BasicTransformerBlock, Conditioning, SpatialTransformer
from ldm.layout import Block, UNetConfig, decoder_layout, encoder_layout, middle_channels
from ldm.norm import GroupNorm


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal embedding of timesteps, cosines first (arXiv:1706.03762, sec. 3.5).

    Parameters
    ----------
    timesteps : (B,) tensor
        Any real or integer type.
    dim : int
        Even.

    Returns
    -------
    (B, dim) float32 tensor
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def project_timesteps(
    time_embed: nn.Sequential, projections: Iterable[nn.Module], timesteps: torch.Tensor
) -> List[torch.Tensor]:
    """The (B, C_i) time biases of ResBlocks for (B,) timesteps: each projection applied to the one embedding."""
    first = time_embed[0]
    embedding = time_embed(timestep_embedding(timesteps, first.in_features).to(first.weight.dtype))
    return [projection(embedding) for projection in projections]


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a bias from the timestep between them, and a residual."""

    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(norm_groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the checkpoint's numbering counts a dropout here
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.index = -1  # place in Conditioning.time_biases, set by the network that holds the block

    def forward(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        bias = conditioning.time_biases[self.index]
        h = self.in_layers(x) + bias[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """(B, C, H, W) to (B, C, H / 2, W / 2): a strided convolution padded on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) to (B, C, 2 H, 2 W): each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class BlockSequence(nn.Sequential):
    """A sequence that hands the conditioning to the layers that take it."""

    def forward(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        for layer in self:
            takes = isinstance(layer, (ResBlock, SpatialTransformer))
            x = layer(x, conditioning) if takes else layer(x)
        return x


class UNetEncoder(nn.Module):
    """Time embedding, input blocks and middle block: what the UNet and the ControlNet have in common."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.time_embed_dim
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self.input_blocks = nn.ModuleList(self._make_block(block) for block in encoder_layout(config))
        channels = middle_channels(config)
        self.middle_block = BlockSequence(
            self._res_block(channels, channels), self._transformer(channels), self._res_block(channels, channels)
        )

    def _res_block(self, in_channels: int, out_channels: int) -> ResBlock:
        return ResBlock(in_channels, out_channels, self.config.time_embed_dim, self.config.norm_groups)

    def _transformer(self, channels: int) -> SpatialTransformer:
        c = self.config
        return SpatialTransformer(channels, c.num_heads, c.transformer_depth, c.context_dim, c.norm_groups)

    def _make_block(self, block: Block) -> BlockSequence:
        if block.kind == "conv":
            return BlockSequence(nn.Conv2d(block.in_channels, block.out_channels, 3, padding=1))
        if block.kind == "down":
            return BlockSequence(Downsample(block.out_channels))
        layers: List[nn.Module] = [self._res_block(block.in_channels, block.out_channels)]
        if block.attention:
            layers.append(self._transformer(block.out_channels))
        if block.upsample:
            layers.append(Upsample(block.out_channels))
        return BlockSequence(*layers)

    def number_blocks(self) -> None:
        """Give each block its place in the `Conditioning`; registration order is execution order."""
        for index, block in enumerate(self.res_blocks()):
            block.index = index
        for index, transformer in enumerate(self.transformer_blocks()):
            transformer.index = index

    def res_blocks(self) -> List[ResBlock]:
        return [m for m in self.modules() if isinstance(m, ResBlock)]

    def transformer_blocks(self) -> List[BasicTransformerBlock]:
        return [m for m in self.modules() if isinstance(m, BasicTransformerBlock)]

    def time_biases(self, timesteps: torch.Tensor) -> List[torch.Tensor]:
        """The (B, C_i) biases of all ResBlocks for (B,) timesteps."""
        return project_timesteps(self.time_embed, [block.emb_layers for block in self.res_blocks()], timesteps)

    def keys_values(self, context: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
        """The (B, L, C_j) keys and values of all cross-attentions for a (B, L, context_dim) context."""
        return [block.attn2.project(context) for block in self.transformer_blocks()]

    def condition(self, timesteps: torch.Tensor, context: torch.Tensor) -> Conditioning:
        return Conditioning(self.time_biases(timesteps), self.keys_values(context))


class UNet(UNetEncoder):
    """Predicts the noise in a latent.

    Checkpoint prefix: `model.diffusion_model`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.output_blocks = nn.ModuleList(self._make_block(block) for block in decoder_layout(config))
        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, config.model_channels),
            nn.SiLU(),
            nn.Conv2d(config.model_channels, config.out_channels, 3, padding=1),
        )
        self.number_blocks()

    def denoise(
        self, x: torch.Tensor, conditioning: Conditioning, controls: Optional[Sequence[torch.Tensor]] = None
    ) -> torch.Tensor:
        """The network behind its conditioning.

        Parameters
        ----------
        x : (B, 4, h, w) tensor
            h and w divisible by 8 for four levels.
        conditioning : Conditioning
        controls : sequence of tensors, optional
            A ControlNet's residuals: one for each input block, then one for the middle block.

        Returns
        -------
        (B, 4, h, w) tensor
        """
        skips = []
        h = x
        for block in self.input_blocks:
            h = block(h, conditioning)
            skips.append(h)
        h = self.middle_block(h, conditioning)
        if controls is not None:
            h = h + controls[-1]
            skips = [skip + control for skip, control in zip(skips, controls)]
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), conditioning)
        return self.out(h)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        controls: Optional[Sequence[torch.Tensor]] = None,
    ) -> torch.Tensor:
        return self.denoise(x, self.condition(timesteps, context), controls)
