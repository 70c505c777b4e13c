"""Model configurations: what is read, and what the error of a bad one says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import yaml

from cldm.config import MODELS_DIR, HintConfig, ModelConfig, available_models, load_config
from ldm.layout import AutoencoderConfig, TextConfig, UNetConfig, exact_div


@pytest.fixture
def values() -> Dict[str, Any]:
    return yaml.safe_load((MODELS_DIR / "tiny.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], ModelConfig]:
    def write_and_load(content: Any) -> ModelConfig:
        path = tmp_path / "model.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return load_config(str(path))

    return write_and_load


def test_sd15() -> None:
    config = load_config("sd15")
    assert config.name == "sd15"
    assert config.unet == UNetConfig(320, (1, 2, 4, 4), 2, (0, 1, 2), 8, 768)
    assert config.unet.time_embed_dim == 1280 and config.unet.norm_groups == 32
    assert config.hint == HintConfig((16, 16, 32, 32, 96, 96, 256))
    assert config.autoencoder == AutoencoderConfig(128, (1, 2, 4, 4), 2, 0.18215)
    assert config.text == TextConfig(49408, 768, 12, 12, 3072, 77)
    assert config.num_controls == 13 and config.size_multiple == 64 and config.autoencoder.factor == 8
    assert config.seed is None
    assert (config.schedule.linear_start, config.schedule.linear_end, config.schedule.train_steps) == (
        0.00085,
        0.012,
        1000,
    )


def test_tiny(tiny_config: ModelConfig) -> None:
    """Stable Diffusion's layout and noise, and weights that may lie in the repository."""
    import torch

    from cldm.model import ControlLDM

    sd15 = load_config("sd15")
    assert tiny_config.num_controls == sd15.num_controls and tiny_config.size_multiple == sd15.size_multiple
    assert tiny_config.unet.num_res_blocks == sd15.unet.num_res_blocks
    assert tiny_config.schedule == sd15.schedule and tiny_config.text.max_length == sd15.text.max_length
    with torch.device("meta"):
        size = sum(2 * parameter.numel() for parameter in ControlLDM(tiny_config).parameters())
    assert size < 16 * 2**20, "in FP16, the names' table not counted"
    assert isinstance(tiny_config.seed, int)


def test_all_shipped_configs_load() -> None:
    assert {"sd15", "tiny"} <= set(available_models())
    for name in available_models():
        assert load_config(name).name == name


def test_configs_are_frozen(tiny_config: ModelConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config.unet.num_heads = 1


def test_path_and_name_give_the_same(tiny_config: ModelConfig) -> None:
    by_path = load_config(str(MODELS_DIR / "tiny.yaml"))
    assert by_path == tiny_config and by_path.folder == tiny_config.folder == str(MODELS_DIR)


def test_files_are_looked_for_beside_the_config(values: Dict[str, Any], load: Callable, tmp_path: Path) -> None:
    values["checkpoint"] = ["first.safetensors", "second.pth"]
    config = load(values)
    assert Path(config.folder) == tmp_path.resolve()
    assert config.checkpoint_path() is None
    (tmp_path / "second.pth").write_bytes(b"x")
    assert config.checkpoint_path() == tmp_path.resolve() / "second.pth"
    (tmp_path / "first.safetensors").write_bytes(b"x")
    assert config.checkpoint_path() == tmp_path.resolve() / "first.safetensors"


def test_digest_is_of_the_networks_alone(values: Dict[str, Any], load: Callable) -> None:
    digest = load(values).digest()
    assert digest == load(copy.deepcopy(values)).digest() == load_config("tiny").digest()
    assert load({**values, "name": "other", "checkpoint": ["x.pth"], "tokenizer": "y", "seed": 1}).digest() == digest
    changed = [
        {"unet": {**values["unet"], "num_res_blocks": values["unet"]["num_res_blocks"] + 1}},
        {"hint": {"channels": [*values["hint"]["channels"][:-1], values["hint"]["channels"][-1] + 16]}},
        {"autoencoder": {**values["autoencoder"], "scale_factor": 1.1 * values["autoencoder"]["scale_factor"]}},
        {"text": {**values["text"], "layers": values["text"]["layers"] + 1}},
        {"schedule": {"linear_end": 1.1 * load(values).schedule.linear_end}},
    ]
    digests = {load({**values, **change}).digest() for change in changed}
    assert len(digests) == len(changed) and digest not in digests


def test_unknown_model() -> None:
    with pytest.raises(FileNotFoundError, match=r"no model config .*sd21.yaml; models here: .*sd15.*tiny"):
        load_config("sd21")
    with pytest.raises(FileNotFoundError, match="no model config nowhere/x.yaml"):
        load_config("nowhere/x.yaml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("unet: [1, 2", "not valid YAML"),
        ("", "expected a mapping at the top"),
        ("- unet", "expected a mapping at the top"),
        ("just text", "expected a mapping at the top"),
        ("name: x", r"missing keys \['autoencoder', 'checkpoint', 'hint', 'text', 'tokenizer', 'unet'\]"),
        ("unet: 3", "unet: expected a mapping, got int"),
        ("unet: [1, 2]", "unet: expected a mapping, got list"),
    ],
)
def test_not_a_config(content: str, said: str, load: Callable) -> None:
    with pytest.raises(ValueError, match=said):
        load(content)


# Sizes of the tiny model itself stand as {fields of its config}.
BAD_VALUES = [
    ("unet", "context_dim", 7, "unet.context_dim 7 is not text.width {text.width}"),
    ("unet", "in_channels", 8, "unet.in_channels 8 is not the autoencoder's latent_channels 4"),
    ("unet", "model_channels", 33, "model_channels: 33 is odd"),
    ("unet", "norm_groups", 23, "unet level 0: channels by norm_groups: {level_0} is not divisible by 23"),
    ("unet", "norm_groups", 0, "unet level 0: channels by norm_groups: {level_0} is not divisible by 0"),
    ("unet", "num_heads", 23, "unet level {attends}: channels by num_heads: {level_attends} is not divisible by 23"),
    ("unet", "attention_levels", [0, 4], "attention_levels: 4 is not one of the 4 levels"),
    ("unet", "attention_levels", [-1], "attention_levels: -1 is not one of the 4 levels"),
    ("unet", "channel_mult", 4, "unet: .*not iterable"),
    ("unet", "channel_mult", [], "unet.channel_mult is empty"),
    ("autoencoder", "channel_mult", [], "autoencoder.channel_mult is empty"),
    ("unet", "head_dim", 8, r"unet: unknown keys \['head_dim'\], missing keys \[\]"),
    ("hint", "channels", [8, 8], r"hint encoder has 7 convolutions before its last, got \(8, 8\)"),
    ("autoencoder", "channel_mult", [1, 2, 4], "hint encoder downsamples by 8, the autoencoder by 4"),
    (
        *("autoencoder", "norm_groups", 23),
        "autoencoder: channels by norm_groups: {autoencoder.channels} is not divisible by 23",
    ),
    ("autoencoder", "scale_factor", 0, "autoencoder.scale_factor: 0 is not positive"),
    ("autoencoder", "scale_factor", float("nan"), "autoencoder.scale_factor: nan is not positive"),
    ("text", "heads", 23, "text: width by heads: {text.width} is not divisible by 23"),
]


@pytest.mark.parametrize(("section", "key", "value", "said"), BAD_VALUES)
def test_sizes_that_do_not_fit(
    section: str, key: str, value: Any, said: str, values: Dict[str, Any], load: Callable, tiny_config: ModelConfig
) -> None:
    unet, attends = tiny_config.unet, min(tiny_config.unet.attention_levels)
    levels = [unet.model_channels * factor for factor in unet.channel_mult]
    facts = {name: getattr(tiny_config, name) for name in ("autoencoder", "text")}
    facts.update(attends=attends, level_0=levels[0], level_attends=levels[attends])
    values[section][key] = value
    with pytest.raises(ValueError, match=said.format(**facts)):
        load(values)


@pytest.mark.parametrize(
    ("section", "key"),
    [("unet", "num_heads"), ("hint", "channels"), ("autoencoder", "scale_factor"), ("text", "heads")],
)
def test_missing_key_is_named(section: str, key: str, values: Dict[str, Any], load: Callable) -> None:
    del values[section][key]
    with pytest.raises(ValueError, match=rf"model.yaml: {section}: unknown keys \[\], missing keys \['{key}'\]"):
        load(values)


def test_unknown_key_is_named(values: Dict[str, Any], load: Callable) -> None:
    with pytest.raises(ValueError, match=r"model.yaml: unknown keys \['sampler'\]"):
        load({**values, "sampler": "ddim"})


def test_bad_schedule(values: Dict[str, Any], load: Callable) -> None:
    with pytest.raises(ValueError, match="schedule: betas"):
        load({**values, "schedule": {"linear_start": 0.5, "linear_end": 0.1}})


@pytest.mark.parametrize("checkpoint", ["tiny.safetensors", [], [3], None])
def test_checkpoint_is_a_list_of_names(checkpoint: Any, values: Dict[str, Any], load: Callable) -> None:
    with pytest.raises(ValueError, match="tiny: checkpoint must be a list of file names"):
        load({**values, "checkpoint": checkpoint})


@pytest.mark.parametrize(
    "name", ["", "a b", "../x", "a/b", "a\\b", ".hidden", "-x", "a\n", "naïve", 15, None, ["a"]], ids=repr
)
def test_name_is_a_plain_word(name: Any, values: Dict[str, Any], load: Callable) -> None:
    with pytest.raises(ValueError, match="name: .* is not a plain word"):
        load({**values, "name": name})


@pytest.mark.parametrize("name", ["a", "15", "my-model_v1.5"])
def test_plain_names(name: str, values: Dict[str, Any], load: Callable) -> None:
    assert load({**values, "name": name}).name == name


def test_exact_div() -> None:
    assert exact_div(320, 32, "groups") == 10
    with pytest.raises(ValueError, match="groups: 320 is not divisible by 7"):
        exact_div(320, 7, "groups")
