"""ControlNet (arXiv:2302.05543): a copy of the UNet's encoder that turns a hint into residuals."""

from __future__ import annotations

from typing import List

import torch
from torch import nn

from cldm.config import HintConfig
from ldm.attention import Conditioning
from ldm.layout import UNetConfig, encoder_layout, middle_channels
from ldm.unet import BlockSequence, UNetEncoder


def zero_conv(channels: int) -> BlockSequence:
    """A 1x1 convolution that starts at zero, so that an untrained ControlNet changes nothing."""
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return BlockSequence(conv)


def hint_encoder(hint: HintConfig, out_channels: int) -> nn.Sequential:
    """Convolutions from the (B, 3, 8h, 8w) hint to (B, out_channels, h, w), SiLU between them."""
    widths = [3, *hint.channels, out_channels]
    layers: List[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
        halves = i in (2, 4, 6)
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=2 if halves else 1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class ControlNet(UNetEncoder):
    """Checkpoint prefix: `control_model`."""

    def __init__(self, config: UNetConfig, hint: HintConfig) -> None:
        super().__init__(config)
        self.zero_convs = nn.ModuleList(zero_conv(block.out_channels) for block in encoder_layout(config))
        self.input_hint_block = hint_encoder(hint, config.model_channels)
        self.middle_block_out = zero_conv(middle_channels(config))
        self.number_blocks()

    def encode_hint(self, hint: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8h, 8w) hint in [0, 1] to its (B, model_channels, h, w) features."""
        return self.input_hint_block(hint)

    def residuals(self, x: torch.Tensor, conditioning: Conditioning, hint_features: torch.Tensor) -> List[torch.Tensor]:
        """What to add to the UNet: a tensor for each input block, then one for the middle block."""
        controls = []
        h = x
        for i, (block, zero) in enumerate(zip(self.input_blocks, self.zero_convs)):
            h = block(h, conditioning)
            if i == 0:
                h = h + hint_features
            controls.append(zero(h, conditioning))
        h = self.middle_block(h, conditioning)
        controls.append(self.middle_block_out(h, conditioning))
        return controls

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, hint: torch.Tensor
    ) -> List[torch.Tensor]:
        return self.residuals(x, self.condition(timesteps, context), self.encode_hint(hint))
