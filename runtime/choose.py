"""Which model, precision and backend a machine gets where the user names none."""

from __future__ import annotations

from typing import Optional

from cldm.config import ModelConfig, load_config


def choose_model(name: Optional[str] = None, checkpoint: Optional[str] = None) -> ModelConfig:
    """The named model; without a name sd15 where its checkpoint is at hand, else tiny."""
    if name not in (None, "auto"):
        return load_config(str(name))
    config = load_config("sd15")
    return config if checkpoint or config.checkpoint_path() is not None else load_config("tiny")


def cuda_problem() -> Optional[str]:
    """Why torch has no CUDA device to run on, or None if it has one."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def default_precision() -> str:
    """FP16 where there is a CUDA device, FP32 elsewhere."""
    return "fp32" if cuda_problem() else "fp16"
