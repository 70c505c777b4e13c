"""Model configurations: a YAML file under models/ becomes one frozen dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar

from ldm.layout import AutoencoderConfig, TextConfig, UNetConfig, encoder_layout
from ldm.schedule import ScheduleConfig

MODELS_DIR = Path(__file__).resolve().parent.parent / "models"

T = TypeVar("T")


@dataclass(frozen=True)
class HintConfig:
    """Channels of the hint encoder's convolutions before the last; every second one after the first halves the map."""

    channels: Tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.channels) != 7:
            raise ValueError(f"hint.channels: the hint encoder has 7 convolutions before its last, got {self.channels}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that names and shapes one model.

    Attributes
    ----------
    name : str
        A plain word: folders and receipts are named after it.
    checkpoint : tuple of str
        File names under models/ that hold its weights, the first that exists is used.
    tokenizer : str
        Folder under models/ with the CLIP vocabulary.
    tokenizer_hub : str or None
        Name under which transformers may have that tokenizer in its local cache.
    seed : int or None
        If not None, weights drawn from this seed stand in while no checkpoint file exists.
    """

    name: str
    checkpoint: Tuple[str, ...]
    tokenizer: str
    unet: UNetConfig
    hint: HintConfig
    autoencoder: AutoencoderConfig
    text: TextConfig
    schedule: ScheduleConfig = ScheduleConfig()
    tokenizer_hub: Optional[str] = None
    seed: Optional[int] = None
    folder: str = dataclasses.field(default=str(MODELS_DIR), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                f"name: {self.name!r} is not a plain word; letters, digits, '.', '_' and '-' after the first are wanted"
            )
        names = self.checkpoint
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.name}: checkpoint must be a list of file names, got {names!r}")
        if self.unet.context_dim != self.text.width:
            raise ValueError(
                f"{self.name}: unet.context_dim {self.unet.context_dim} is not text.width {self.text.width}"
            )
        if self.unet.in_channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"{self.name}: unet.in_channels {self.unet.in_channels} is not the autoencoder's latent_channels"
                f" {self.autoencoder.latent_channels}"
            )
        if self.autoencoder.factor != 8:
            raise ValueError(
                f"{self.name}: the hint encoder downsamples by 8, the autoencoder by {self.autoencoder.factor}"
            )

    @property
    def num_controls(self) -> int:
        return self.unet.num_controls

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this: the autoencoder's factor times the UNet's."""
        downs = sum(block.kind == "down" for block in encoder_layout(self.unet))
        return self.autoencoder.factor * 2**downs

    def checkpoint_path(self) -> Optional[Path]:
        """The first of the checkpoint files that exists, or None."""
        for name in self.checkpoint:
            path = Path(self.folder) / name
            if path.is_file():
                return path
        return None

    def digest(self) -> str:
        """Hash over everything that decides the networks and the schedule, not over names and places."""
        parts = {
            key: dataclasses.asdict(getattr(self, key)) for key in ("unet", "hint", "autoencoder", "text", "schedule")
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(cls: Type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping; every key must be a field, and every field without a default be there."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values)
    if unknown or missing:
        raise ValueError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    converted = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def available_models() -> List[str]:
    return sorted(path.stem for path in MODELS_DIR.glob("*.yaml"))


def load_config(name: str) -> ModelConfig:
    """The configuration of a model.

    Parameters
    ----------
    name : str
        "sd15", "tiny", or the path of a YAML file; files that it names are looked for beside it.

    Raises
    ------
    FileNotFoundError
        No such model; the message lists those there are.
    ValueError
        Unknown or missing keys, or sizes that do not fit together.
    """
    import yaml

    path = Path(name) if str(name).endswith((".yaml", ".yml")) else MODELS_DIR / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"no model config {path}; models here: {', '.join(available_models())}")
    try:
        values: Dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping at the top")
    sections = {
        "unet": UNetConfig,
        "hint": HintConfig,
        "autoencoder": AutoencoderConfig,
        "text": TextConfig,
        "schedule": ScheduleConfig,
    }
    for key, cls in sections.items():
        if key in values:
            values[key] = _build(cls, values[key], f"{path}: {key}")
    values["folder"] = str(path.resolve().parent)
    return _build(ModelConfig, values, str(path))
