"""A model as small as the classes allow, for tests that run whole pipelines.

Beside `tests.micro_model`, which is a config file with an export ready made: this is a config in memory whose UNet has
SD1.5's traits that the micro model leaves out, as a level whose width does not change and a last level without
attention.
"""

from __future__ import annotations

import dataclasses

from cldm.config import ModelConfig, load_config


def small_config() -> ModelConfig:
    """Three UNet levels of 16, 32 and 32 channels; images are multiples of 32 pixels. The tiny model's vocabulary."""
    tiny = load_config("tiny")
    return dataclasses.replace(
        tiny,
        name="small",
        checkpoint=("small.safetensors",),
        seed=7,
        unet=dataclasses.replace(
            tiny.unet,
            model_channels=16,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            num_heads=2,
            context_dim=32,
            norm_groups=8,
        ),
        hint=dataclasses.replace(tiny.hint, channels=(4, 4, 8, 8, 8, 8, 16)),
        autoencoder=dataclasses.replace(tiny.autoencoder, channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1),
        text=dataclasses.replace(tiny.text, width=32, layers=2, heads=2, mlp_width=64),
    )
