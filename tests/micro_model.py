"""A model that exports in seconds, as a config file of its own with checkpoints made beside it, for tests.

Beside `tests.small_model`, which needs no file: this is what a user's own model is, a YAML file with a vocabulary and
checkpoints beside it, in a folder of its own; and the tests of exported files share one build of it.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Dict

import torch

from cldm.checkpoint import load_model
from cldm.config import MODELS_DIR, ModelConfig, load_config
from cldm.weights import Weights, find_weights
from deploy.export import export_all
from deploy.spec import Build

SIZE = 64
_YAML = """
name: micro
checkpoint: [micro.safetensors]
seed: 7
tokenizer: vocabulary
unet: {model_channels: 16, channel_mult: [1, 2], num_res_blocks: 1, attention_levels: [1], num_heads: 2,
       context_dim: 32, norm_groups: 8}
hint: {channels: [4, 4, 8, 8, 8, 8, 16]}
autoencoder: {channels: 8, channel_mult: [1, 1, 1, 2], num_res_blocks: 1, scale_factor: 0.18215, norm_groups: 4}
text: {vocab_size: TINY, width: 32, layers: 1, heads: 2, mlp_width: 64}
"""


def micro_text() -> str:
    """The config file's content; as wide as the tiny model for the same vocabulary."""
    return _YAML.replace("TINY", str(load_config("tiny").text.vocab_size))


def write_micro(folder: Path) -> Path:
    """The config file of the model, with a copy of the tiny model's vocabulary beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(MODELS_DIR / "tiny_tokenizer", folder / "vocabulary")
    path = folder / "micro.yaml"
    path.write_text(micro_text(), encoding="utf-8")
    return path


def micro_config(folder: Path) -> ModelConfig:
    return load_config(str(write_micro(folder)))


def state_of(config: ModelConfig, seed: int = 7) -> Dict[str, torch.Tensor]:
    """A fresh checkpoint's content: seeded random weights by name."""
    model = load_model(config, Weights(None, seed, ""))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@functools.lru_cache(maxsize=None)
def shared_config(base: Path) -> ModelConfig:
    """The config below pytest's folder of this run, the same for all test files."""
    return micro_config(base / "micro-model")


@functools.lru_cache(maxsize=None)
def shared_build(base: Path, precision: str, samples: int) -> Build:
    """A build of seeded random weights, exported under `base`/micro-build on first use."""
    config = shared_config(base)
    build = Build(config, SIZE, SIZE, samples, precision)
    weights = find_weights(config)
    folder = base / "micro-build"
    export_all(build, weights, lambda: load_model(config, weights), folder, report=lambda line: None)
    return build
