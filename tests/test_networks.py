"""The networks against diffusers and transformers, the checkpoint's names, and what ControlLDM promises."""

from __future__ import annotations

import gc
import gzip
import json
import math
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import pytest
import torch
from torch import nn

from cldm.config import HintConfig, ModelConfig, load_config
from cldm.controlnet import ControlNet
from cldm.model import ControlLDM
from cldm.request import Request
from ldm.autoencoder import AutoencoderKL
from ldm.clip import MASKED, CLIPTextModel
from ldm.layout import AutoencoderConfig, TextConfig, UNetConfig, key_value_widths, time_bias_widths
from ldm.unet import UNet

# fp32 on both sides; only the order of additions differs.
BOUND = 1e-5

UNETS = {
    "three levels, one block": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_levels=(0, 2),
        num_heads=4,
        context_dim=24,
        norm_groups=8,
    ),
    "sd15's levels, two transformers": UNetConfig(
        model_channels=48,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_levels=(0, 1, 2),
        num_heads=6,
        context_dim=40,
        transformer_depth=2,
        norm_groups=16,
    ),
}
HINTS = {
    "three levels, one block": HintConfig((8, 8, 12, 12, 20, 20, 28)),
    "sd15's levels, two transformers": HintConfig((16, 16, 32, 32, 48, 48, 64)),
}
AUTOENCODERS = {
    "three levels": AutoencoderConfig(
        channels=24, channel_mult=(1, 2, 2), num_res_blocks=1, scale_factor=0.3, norm_groups=4
    ),
    "four levels": AutoencoderConfig(
        channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=2, scale_factor=0.18215, norm_groups=8
    ),
}
TEXTS = {
    "three layers": TextConfig(vocab_size=100, width=48, layers=3, heads=4, mlp_width=96),
    "short, two layers": TextConfig(vocab_size=60, width=64, layers=2, heads=8, mlp_width=200, max_length=20),
}
Rename = Callable[[str], str]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module with random weights that keep activations near 1; norms, biases and zero convolutions included."""
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if name in norms:
            parameter.mul_(0.2).add_(1.0)
        elif parameter.ndim == 1:
            parameter.mul_(0.2)
        elif "embedding.weight" not in name:
            parameter.mul_(1 / math.sqrt(parameter[0].numel()))
    return module


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = relative_error(ours, theirs)
    print(f"{what}: relative error {error:.2e}")
    assert error < BOUND, what


def transplant(ours: nn.Module, theirs: nn.Module, rename: Rename) -> nn.Module:
    """Give `theirs` the tensors of `ours`, all of them and no others, without a copy; norms must agree in epsilon."""
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    renamed: Dict[str, torch.Tensor] = {}
    for name, tensor in ours.state_dict().items():
        target = rename(name)
        assert target not in renamed, f"{name} and another name both became {target}"
        assert target in shapes, f"{name} became {target}, which the reference does not have"
        # The reference may hold a 1x1 convolution as a linear layer.
        renamed[target] = tensor.reshape(shapes[target]) if tensor.ndim == 4 else tensor
    assert set(renamed) == set(shapes)
    theirs.load_state_dict(renamed, strict=True, assign=True)
    for name, module in ours.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            other = theirs.get_submodule(rename(f"{name}.weight")[: -len(".weight")])
            assert module.eps == other.eps, name
            assert getattr(module, "num_groups", None) == getattr(other, "num_groups", None), name
    return theirs.eval().requires_grad_(False)


def prefix_rename(prefixes: Iterable[Tuple[str, str]]) -> Rename:
    """Replace the one prefix that fits; each is tried with its full stop, so `1.` never matches `10.`."""
    table = dict(prefixes)

    def rename(name: str) -> str:
        fitting = [prefix for prefix in table if name.startswith(prefix + ".")]
        assert len(fitting) == 1, f"{name}: {fitting}"
        return table[fitting[0]] + name[len(fitting[0]) :]

    return rename


# --- UNet and ControlNet against diffusers ---


def res_prefixes(ours: str, theirs: str) -> List[Tuple[str, str]]:
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return [(f"{ours}.{ours_part}", f"{theirs}.{theirs_part}") for ours_part, theirs_part in parts.items()]


def encoder_prefixes(config: UNetConfig) -> List[Tuple[str, str]]:
    pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.1", "mid_block.attentions.0"),
    ]
    pairs += res_prefixes("middle_block.0", "mid_block.resnets.0")
    pairs += res_prefixes("middle_block.2", "mid_block.resnets.1")
    index = 1
    for level in range(len(config.channel_mult)):
        for i in range(config.num_res_blocks):
            pairs += res_prefixes(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{i}")
            pairs.append((f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{i}"))
            index += 1
        pairs.append((f"input_blocks.{index}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        index += 1
    return pairs


def decoder_prefixes(config: UNetConfig) -> List[Tuple[str, str]]:
    pairs = [("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    per_level = config.num_res_blocks + 1
    for index in range(len(config.channel_mult) * per_level):
        level, i = divmod(index, per_level)
        attends = len(config.channel_mult) - 1 - level in config.attention_levels
        pairs += res_prefixes(f"output_blocks.{index}.0", f"up_blocks.{level}.resnets.{i}")
        if attends:
            pairs.append((f"output_blocks.{index}.1", f"up_blocks.{level}.attentions.{i}"))
        pairs.append((f"output_blocks.{index}.{1 + attends}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return pairs


def control_prefixes(config: UNetConfig) -> List[Tuple[str, str]]:
    blocks = len(config.channel_mult) * (config.num_res_blocks + 1)
    pairs = [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(blocks)]
    pairs.append(("middle_block_out.0", "controlnet_mid_block"))
    pairs.append(("input_hint_block.0", "controlnet_cond_embedding.conv_in"))
    pairs += [(f"input_hint_block.{2 * i + 2}", f"controlnet_cond_embedding.blocks.{i}") for i in range(6)]
    pairs.append(("input_hint_block.14", "controlnet_cond_embedding.conv_out"))
    return pairs


def diffusers_arguments(config: UNetConfig) -> dict:
    levels = range(len(config.channel_mult))
    return {
        "in_channels": config.in_channels,
        "block_out_channels": tuple(config.model_channels * mult for mult in config.channel_mult),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if level in config.attention_levels else "DownBlock2D" for level in levels
        ),
        "layers_per_block": config.num_res_blocks,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads,  # diffusers' name for the number of heads in these models
        "transformer_layers_per_block": config.transformer_depth,
        "norm_num_groups": config.norm_groups,
    }


def diffusers_unet(ours: UNet) -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = ours.config
    up_types = tuple(
        "CrossAttnUpBlock2D" if level in config.attention_levels else "UpBlock2D"
        for level in reversed(range(len(config.channel_mult)))
    )
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            up_block_types=up_types, out_channels=config.out_channels, **diffusers_arguments(config)
        )
    return transplant(ours, theirs, prefix_rename(encoder_prefixes(config) + decoder_prefixes(config)))


def diffusers_controlnet(ours: ControlNet, hint: HintConfig) -> nn.Module:
    from diffusers import ControlNetModel

    config = ours.config
    with torch.device("meta"):
        theirs = ControlNetModel(conditioning_embedding_out_channels=hint.channels[::2], **diffusers_arguments(config))
    return transplant(ours, theirs, prefix_rename(encoder_prefixes(config) + control_prefixes(config)))


def network_inputs(config: UNetConfig, batch: int, height: int, width: int, length: int = 77) -> Tuple:
    return (
        noise(batch, config.in_channels, height, width, seed=1),
        torch.tensor([981, 7][:batch]),
        noise(batch, length, config.context_dim, seed=2),
    )


def check_unet(config: UNetConfig, batch: int, height: int, width: int) -> None:
    ours = seeded(lambda: UNet(config), seed=10)
    theirs = diffusers_unet(ours)
    x, t, context = network_inputs(config, batch, height, width)
    out = ours(x, t, context)
    assert out.shape == x.shape and 0.1 < out.std() < 10
    assert_close(out, theirs(x, t, context).sample, "UNet")


def check_controlnet(config: UNetConfig, hint_config: HintConfig, batch: int, height: int, width: int) -> None:
    ours = seeded(lambda: ControlNet(config, hint_config), seed=11)
    theirs = diffusers_controlnet(ours, hint_config)
    x, t, context = network_inputs(config, batch, height, width)
    hint = torch.rand(batch, 3, 8 * height, 8 * width, generator=torch.Generator().manual_seed(3))
    controls = ours(x, t, context, hint)
    expected = theirs(x, t, encoder_hidden_states=context, controlnet_cond=hint)
    references = [*expected.down_block_res_samples, expected.mid_block_res_sample]
    assert len(controls) == len(references) == config.num_controls
    for i, (control, reference) in enumerate(zip(controls, references)):
        assert_close(control, reference, f"ControlNet residual {i}")


@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_diffusers(name: str) -> None:
    check_unet(UNETS[name], batch=2, height=16, width=8)


@pytest.mark.parametrize("name", UNETS)
def test_controlnet_equals_diffusers(name: str) -> None:
    check_controlnet(UNETS[name], HINTS[name], batch=2, height=8, width=16)


@pytest.mark.parametrize("name", UNETS)
def test_unet_with_residuals_equals_diffusers(name: str) -> None:
    config = UNETS[name]
    ours = seeded(lambda: UNet(config), seed=12)
    control = seeded(lambda: ControlNet(config, HINTS[name]), seed=13)
    theirs = diffusers_unet(ours)
    x, t, context = network_inputs(config, 2, 8, 16)
    controls = control(x, t, context, noise(2, 3, 64, 128, seed=4).abs())
    expected = theirs(
        x, t, context, down_block_additional_residuals=controls[:-1], mid_block_additional_residual=controls[-1]
    ).sample
    out = ours(x, t, context, controls)
    assert relative_error(ours(x, t, context), expected) > 0.05
    assert_close(out, expected, "UNet with residuals")


# --- Autoencoder against diffusers ---


def block_prefixes(ours: str, theirs: str) -> List[Tuple[str, str]]:
    parts = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    return [(f"{ours}.{ours_part}", f"{theirs}.{theirs_part}") for ours_part, theirs_part in parts.items()]


def autoencoder_prefixes(config: AutoencoderConfig) -> List[Tuple[str, str]]:
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    levels = len(config.channel_mult)
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.{part}", f"{half}.{part}") for part in ("conv_in", "conv_out")]
        pairs.append((f"{half}.norm_out", f"{half}.conv_norm_out"))
        for i in (0, 1):
            pairs += block_prefixes(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        pairs += [
            (f"{half}.mid.attn_1.{ours}", f"{half}.mid_block.attentions.0.{theirs}")
            for ours, theirs in attention.items()
        ]
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(config.num_res_blocks):
            pairs += block_prefixes(f"encoder.down.{level}.block.{i}", f"{down}.resnets.{i}")
        for i in range(config.num_res_blocks + 1):
            pairs += block_prefixes(f"decoder.up.{level}.block.{i}", f"{up}.resnets.{i}")
        pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return pairs


def check_autoencoder(config: AutoencoderConfig, batch: int, height: int, width: int) -> None:
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    ours = seeded(lambda: AutoencoderKL(config), seed=14)
    # Log-variances far out, so that both ends of their range are met.
    ours.quant_conv.bias[config.latent_channels] = 60.0
    ours.quant_conv.bias[config.latent_channels + 1] = -60.0
    levels = len(config.channel_mult)
    with torch.device("meta"):
        theirs = DiffusersAutoencoderKL(
            block_out_channels=tuple(config.channels * mult for mult in config.channel_mult),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.num_res_blocks,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
        )
    transplant(ours, theirs, prefix_rename(autoencoder_prefixes(config)))

    latent = noise(batch, config.latent_channels, height, width, seed=5)
    image = ours.decode(latent)
    assert image.shape == (batch, 3, config.factor * height, config.factor * width)
    assert 0.1 < image.std() < 10
    assert_close(image, theirs.decode(latent / config.scale_factor).sample, "autoencoder, decode")

    mean, log_variance = ours.encode(image)
    distribution = theirs.encode(image).latent_dist
    assert mean.shape == latent.shape
    assert log_variance.min() == -30 and log_variance.max() == 20
    assert_close(mean, distribution.mean, "autoencoder, encode, mean")
    assert_close(log_variance[:, 2:], distribution.logvar[:, 2:], "autoencoder, encode, log-variance")
    assert torch.equal(log_variance[:, :2], distribution.logvar[:, :2])


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_equals_diffusers(name: str) -> None:
    check_autoencoder(AUTOENCODERS[name], batch=2, height=6, width=4)


# --- Text encoder against transformers ---


def token_ids(config: TextConfig, batch: int, seed: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, config.max_length), generator=generator)


def check_text_model(config: TextConfig, batch: int) -> None:
    from transformers import CLIPTextConfig
    from transformers import CLIPTextModel as TransformersCLIPTextModel

    ours = seeded(lambda: CLIPTextModel(config), seed=15)
    theirs = TransformersCLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_length,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    # transformers 4 keeps the encoder one level down, under the name that the checkpoint uses too.
    prefix = "text_model." if any(name.startswith("text_model.") for name in theirs.state_dict()) else ""
    transplant(ours, theirs, lambda name: prefix + name)
    ids = token_ids(config, batch)
    features = ours(ids)
    assert features.shape == (batch, config.max_length, config.width)
    assert_close(features, theirs(input_ids=ids).last_hidden_state, "text encoder")


@pytest.mark.parametrize("name", TEXTS)
def test_text_model_equals_transformers(name: str) -> None:
    check_text_model(TEXTS[name], batch=2)


# --- The same at full size ---


@pytest.mark.slow
@pytest.mark.parametrize("network", ["unet", "controlnet", "autoencoder", "text"])
def test_full_size_equals_references(network: str) -> None:
    config = load_config("sd15")
    checks = {
        "unet": lambda: check_unet(config.unet, batch=1, height=32, width=48),
        "controlnet": lambda: check_controlnet(config.unet, config.hint, batch=1, height=32, width=48),
        "autoencoder": lambda: check_autoencoder(config.autoencoder, batch=1, height=16, width=16),
        "text": lambda: check_text_model(config.text, batch=2),
    }
    checks[network]()
    gc.collect()


# --- Names, shapes and sizes ---

# Derived values in the checkpoint that a model does not hold.
SCHEDULE_TABLES = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture(scope="module")
def sd15_meta() -> ControlLDM:
    with torch.device("meta"):
        return ControlLDM(load_config("sd15"))


def test_sd15_has_the_checkpoints_names_and_shapes(sd15_meta: ControlLDM) -> None:
    path = Path(__file__).parent / "data" / "control_sd15_canny_keys.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        expected = {name: tuple(shape) for name, shape in json.load(file).items()}
    assert len(expected) == 1483
    derived = SCHEDULE_TABLES | {POSITION_IDS}
    assert derived <= set(expected)
    wanted = {name: shape for name, shape in expected.items() if name not in derived}
    ours = {name: tuple(tensor.shape) for name, tensor in sd15_meta.state_dict().items()}
    assert sorted(wanted.keys() - ours.keys()) == []
    assert sorted(ours.keys() - wanted.keys()) == []
    assert ours == wanted
    assert all(tensor.is_meta for tensor in sd15_meta.state_dict().values())


def test_packed_widths_of_sd15(sd15_meta: ControlLDM) -> None:
    config = sd15_meta.config.unet
    assert sum(key_value_widths(config, decoder=True) + key_value_widths(config, decoder=False)) == 36480 // 2
    assert config.num_controls == sd15_meta.config.num_controls == 13


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_packed_widths_are_the_modules(config: UNetConfig) -> None:
    hint = HintConfig((8, 8, 8, 8, 8, 8, 8))
    with torch.device("meta"):
        networks = [(UNet(config), True), (ControlNet(config, hint), False)]
    x, t, context = (tensor.to("meta") for tensor in network_inputs(config, 2, 8, 8))
    for network, decoder in networks:
        conditioning = network.condition(t, context)
        assert [bias.shape[1] for bias in conditioning.time_biases] == time_bias_widths(config, decoder)
        widths = key_value_widths(config, decoder)
        assert [(key.shape[2], value.shape[2]) for key, value in conditioning.keys_values] == [(w, w) for w in widths]
        emb_layers = [m for name, m in network.named_modules() if name.endswith("emb_layers.1")]
        assert [layer.out_features for layer in emb_layers] == time_bias_widths(config, decoder)
    assert len(networks[1][0].zero_convs) + 1 == config.num_controls


def test_tiny_is_small(tiny_config: ModelConfig) -> None:
    with torch.device("meta"):
        model = ControlLDM(tiny_config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 1_000_000 < count <= 8_000_000


def test_new_controlnet_changes_nothing() -> None:
    name = "three levels, one block"
    network = ControlNet(UNETS[name], HINTS[name]).eval()
    x, t, context = network_inputs(UNETS[name], 2, 8, 8)
    with torch.no_grad():
        controls = network(x, t, context, noise(2, 3, 64, 64).abs())
    assert all(not control.any() for control in controls)


# --- ControlLDM ---


@pytest.fixture(scope="module")
def tiny(tiny_config: ModelConfig) -> ControlLDM:
    return seeded(lambda: ControlLDM(tiny_config), seed=16)


@pytest.fixture(scope="module")
def tiny_inputs(tiny: ControlLDM) -> Tuple[torch.Tensor, ...]:
    hint = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    return (*network_inputs(tiny.config.unet, 2, 8, 8), hint)


def test_predict_noise_without_hint_is_the_unet(tiny: ControlLDM, tiny_inputs: Tuple[torch.Tensor, ...]) -> None:
    x, t, context, hint = tiny_inputs
    plain = tiny.unet(x, t, context)
    assert torch.equal(tiny.predict_noise(x, t, context), plain)
    assert torch.equal(tiny.predict_noise(x, t, context, None, [1.0] * 13), plain)
    assert torch.equal(tiny.predict_noise(x, t, context, hint, [0.0] * 13), plain)
    assert relative_error(tiny.predict_noise(x, t, context, hint), plain) > 0.05


def test_predict_noise_scales_each_residual(tiny: ControlLDM, tiny_inputs: Tuple[torch.Tensor, ...]) -> None:
    x, t, context, hint = tiny_inputs
    residuals = tiny.control_model(x, t, context, hint)
    assert len(residuals) == 13
    scales = [0.1 * (i + 1) for i in range(13)]
    expected = tiny.unet(x, t, context, [r * s for r, s in zip(residuals, scales)])
    assert relative_error(tiny.predict_noise(x, t, context, hint, scales), expected) < 1e-6
    assert relative_error(tiny.predict_noise(x, t, context, hint, torch.tensor(scales)), expected) < 1e-6
    assert torch.equal(
        tiny.predict_noise(x, t, context, hint, [1.0] * 13), tiny.predict_noise(x, t, context, hint, None)
    )


@pytest.mark.parametrize("count", [0, 12, 14])
def test_predict_noise_refuses_a_wrong_number_of_scales(
    tiny: ControlLDM, tiny_inputs: Tuple[torch.Tensor, ...], count: int
) -> None:
    x, t, context, hint = tiny_inputs
    with pytest.raises(ValueError, match=f"expected 13 control scales, got {count}"):
        tiny.predict_noise(x, t, context, hint, [1.0] * count)


def test_samples_of_a_batch_do_not_mix(tiny: ControlLDM, tiny_inputs: Tuple[torch.Tensor, ...]) -> None:
    x, t, context, hint = tiny_inputs
    both = tiny.predict_noise(x, t, context, hint)
    for i in range(2):
        one = tiny.predict_noise(x[i : i + 1], t[i : i + 1], context[i : i + 1], hint[i : i + 1])
        assert relative_error(both[i : i + 1], one) < BOUND


def test_whole_model_has_the_documented_shapes(tiny: ControlLDM) -> None:
    ids = token_ids(tiny.config.text, 2)
    assert tiny.encode_text(ids).shape == (2, 77, tiny.config.unet.context_dim)
    assert tiny.decode(noise(2, 4, 4, 8)).shape == (2, 3, 32, 64)


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_control_scales_of_a_request(guess_mode: bool, strength: float) -> None:
    scales = Request("a bird", strength=strength, guess_mode=guess_mode).control_scales(13)
    faded = [strength * 0.825 ** (12 - i) for i in range(13)]
    expected = [faded, [0.0] * 13] if guess_mode else [[strength] * 13] * 2
    assert scales == [pytest.approx(row, rel=1e-12) for row in expected]


# --- Masking and half precision ---


def test_text_mask_is_finite_and_causal() -> None:
    assert torch.tensor(MASKED, dtype=torch.float16).isfinite()
    config = TEXTS["three layers"]
    model = seeded(lambda: CLIPTextModel(config), seed=17)
    ids = token_ids(config, 1)
    changed = ids.clone()
    changed[0, 40] = (changed[0, 40] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert relative_error(after[:, :40], before[:, :40]) < 1e-6
    assert ((after - before).abs().amax(dim=-1) > 1e-3)[0, 40:].all()


def half_error(module: nn.Module, call: Callable[[nn.Module, Optional[torch.dtype]], torch.Tensor]) -> float:
    """Relative error of half precision against single; the module is half precision afterwards."""
    expected = call(module, torch.float32)
    out = call(module.half(), torch.float16)
    assert out.dtype == torch.float16 and out.isfinite().all()
    return relative_error(out.float(), expected)


def test_text_model_in_half_precision() -> None:
    config = TEXTS["three layers"]
    model = seeded(lambda: CLIPTextModel(config), seed=18)
    assert half_error(model, lambda m, dtype: m(token_ids(config, 2))) < 1e-2


def test_unet_in_half_precision() -> None:
    config = UNETS["three levels, one block"]
    model = seeded(lambda: UNet(config), seed=19)
    x, t, context = network_inputs(config, 2, 8, 8)
    assert half_error(model, lambda m, dtype: m(x.to(dtype), t, context.to(dtype))) < 2e-2


def test_norms_in_single_precision_beside_half_precision_data() -> None:
    from ldm.norm import GroupNorm, LayerNorm

    # Squares of 300 are beyond FP16, so statistics in FP16 would be infinite.
    x = (300 + 5 * noise(2, 16, 5, 7)).half()
    for norm in (GroupNorm(4, 16).requires_grad_(False), LayerNorm(7).requires_grad_(False)):
        out = norm(x)
        assert out.dtype == torch.float16
        assert relative_error(out.float(), norm(x.float())) < 1e-3
