"""Where a model's weights come from, decided and named before they are loaded. No torch here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from cldm.config import ModelConfig
from cldm.files import cached_sha256

SUFFIXES = (".safetensors", ".pth", ".ckpt", ".pt")
# To be raised when `cldm.checkpoint` draws other numbers from the same seed: what was made of the old ones, reference
# images among it, then counts as made of other weights.
RANDOM_WEIGHTS_VERSION = 2

# Of the networks that images are compared by: where they are looked for first, and their files' names.
METRICS_DIR = Path(__file__).resolve().parent.parent / "models" / "metrics"
INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
ALEXNET_WEIGHTS = "alexnet-owt-7be5be79.pth"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint file, or a seed for random weights; exactly one of the two.

    Attributes
    ----------
    digest : str
        Changes whenever the weights or the networks' shapes do.
    """

    path: Optional[Path]
    seed: Optional[int]
    digest: str

    def __str__(self) -> str:
        return str(self.path.name) if self.path is not None else f"random weights, seed {self.seed}"


def find_weights(
    config: ModelConfig,
    checkpoint: Optional[str] = None,
    random_seed: Optional[int] = None,
    cache: Optional[Path] = None,
) -> Weights:
    """The weights to use: the random seed or the checkpoint asked for, else the config's own file, else its seed.

    Parameters
    ----------
    cache : Path, optional
        JSON file in which the hashes of checkpoint files are remembered.

    Raises
    ------
    CheckpointError
        The file is not there or has an unknown suffix, or the model has neither file nor seed.
    """
    if checkpoint is not None and random_seed is not None:
        raise CheckpointError("give a checkpoint or random weights, not both")
    if random_seed is not None:
        return _random(config, random_seed)
    path: Optional[Path]
    if checkpoint is not None:
        path = Path(checkpoint)
        if path.is_dir():
            raise CheckpointError(f"{checkpoint} is a folder; name the checkpoint file itself")
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {checkpoint}")
    else:
        path = config.checkpoint_path()
    if path is not None:
        if path.suffix.lower() not in SUFFIXES:
            raise CheckpointError(f"{path}: unknown kind of checkpoint; known are {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty; copy or download it again")
        return Weights(path, None, _combine(config, cached_sha256(path, cache)))
    if config.seed is not None:
        return _random(config, config.seed)
    raise CheckpointError(
        f"no checkpoint of {config.name}: put {config.checkpoint[0]} into {config.folder}, or ask for random weights"
    )


def _random(config: ModelConfig, seed: int) -> Weights:
    if not 0 <= seed < 2**63:
        raise CheckpointError(f"the seed of random weights must be between 0 and 2**63 - 1, got {seed}")
    return Weights(None, seed, _combine(config, f"random-{RANDOM_WEIGHTS_VERSION}-{seed}"))


def _combine(config: ModelConfig, content: str) -> str:
    return hashlib.sha256(f"{config.digest()} {content}".encode()).hexdigest()[:16]
