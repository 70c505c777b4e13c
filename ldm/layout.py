"""Shapes of the networks, and which blocks a UNet consists of, worked out once from its configuration.

The networks are built from these descriptions and the deployable graphs take their packed widths from them, so the two
cannot disagree. No torch here: the runtime reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Tuple


def exact_div(numerator: int, denominator: int, what: str) -> int:
    """`numerator / denominator`, which must be whole; `what` names the quantity in the error."""
    if denominator <= 0 or numerator % denominator:
        raise ValueError(f"{what}: {numerator} is not divisible by {denominator}")
    return numerator // denominator


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a Stable Diffusion UNet (and of the ControlNet that copies its encoder)."""

    model_channels: int
    channel_mult: Tuple[int, ...]
    num_res_blocks: int
    attention_levels: Tuple[int, ...]
    num_heads: int
    context_dim: int
    in_channels: int = 4
    out_channels: int = 4
    transformer_depth: int = 1
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if not self.channel_mult:
            raise ValueError("unet.channel_mult is empty: one number a level is wanted")
        if self.model_channels % 2:
            raise ValueError(f"unet.model_channels: {self.model_channels} is odd, the timestep embedding needs pairs")
        for level, mult in enumerate(self.channel_mult):
            channels = self.model_channels * mult
            exact_div(channels, self.norm_groups, f"unet level {level}: channels by norm_groups")
            if level in self.attention_levels:
                exact_div(channels, self.num_heads, f"unet level {level}: channels by num_heads")
        exact_div(
            self.model_channels * self.channel_mult[-1], self.num_heads, "unet middle block: channels by num_heads"
        )
        for level in self.attention_levels:
            if not 0 <= level < len(self.channel_mult):
                raise ValueError(f"unet.attention_levels: {level} is not one of the {len(self.channel_mult)} levels")

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.model_channels

    @property
    def num_controls(self) -> int:
        """Residuals that a ControlNet adds: one an encoder block and one for the middle (13 for SD1.5)."""
        return len(encoder_layout(self)) + 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of the autoencoder; `scale_factor` divides a latent before it is decoded."""

    channels: int
    channel_mult: Tuple[int, ...]
    num_res_blocks: int
    scale_factor: float
    latent_channels: int = 4
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if not self.channel_mult:
            raise ValueError("autoencoder.channel_mult is empty: one number a level is wanted")
        for mult in self.channel_mult:
            exact_div(self.channels * mult, self.norm_groups, "autoencoder: channels by norm_groups")
        if not self.scale_factor > 0:
            raise ValueError(f"autoencoder.scale_factor: {self.scale_factor} is not positive")

    @property
    def factor(self) -> int:
        """Pixels a latent cell, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Shape of CLIP's text encoder: (B, L) token ids, L at most `max_length`, to (B, L, width) features."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_length: int = 77

    def __post_init__(self) -> None:
        exact_div(self.width, self.heads, "text: width by heads")


@dataclass(frozen=True)
class Block:
    """One entry of `input_blocks` or `output_blocks`."""

    kind: str  # "conv" (the first convolution), "res" or "down"
    in_channels: int
    out_channels: int
    attention: bool = False
    upsample: bool = False


def encoder_layout(config: UNetConfig) -> List[Block]:
    """The `input_blocks`, in order."""
    channels = config.model_channels
    blocks = [Block("conv", config.in_channels, channels)]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            out = mult * config.model_channels
            blocks.append(Block("res", channels, out, attention=level in config.attention_levels))
            channels = out
        if level + 1 < len(config.channel_mult):
            blocks.append(Block("down", channels, channels))
    return blocks


def decoder_layout(config: UNetConfig) -> List[Block]:
    """The `output_blocks`, in order; `in_channels` counts the skip connection that is concatenated."""
    skips = [block.out_channels for block in encoder_layout(config)]
    channels = skips[-1]
    blocks = []
    for level in reversed(range(len(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            out = config.channel_mult[level] * config.model_channels
            blocks.append(
                Block(
                    "res",
                    channels + skips.pop(),
                    out,
                    attention=level in config.attention_levels,
                    upsample=level > 0 and i == config.num_res_blocks,
                )
            )
            channels = out
    return blocks


def middle_channels(config: UNetConfig) -> int:
    return config.model_channels * config.channel_mult[-1]


def time_bias_widths(config: UNetConfig, decoder: bool) -> List[int]:
    """Channels of each ResBlock's time bias in the order of execution; `decoder=False` is a ControlNet."""
    widths = [block.out_channels for block in encoder_layout(config) if block.kind == "res"]
    widths += [middle_channels(config)] * 2
    if decoder:
        widths += [block.out_channels for block in decoder_layout(config)]
    return widths


def key_value_widths(config: UNetConfig, decoder: bool) -> List[int]:
    """Channels of each cross-attention (its keys have as many as its values) in the order of execution."""
    widths = [block.out_channels for block in encoder_layout(config) if block.attention]
    widths += [middle_channels(config)]
    if decoder:
        widths += [block.out_channels for block in decoder_layout(config) if block.attention]
    return [width for width in widths for _ in range(config.transformer_depth)]
