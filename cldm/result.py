"""What a run gives back. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Tuple

import numpy as np


@dataclass(frozen=True)
class Receipt:
    """What ran, so that a number can be told apart from another.

    Attributes
    ----------
    model, weights : str
        Config name, and where the weights came from.
    backend, backend_reason : str
        The backend and why it was chosen over those preferred to it.
    precision, device : str
    height, width, num_samples : int
    seed : int
        The seed used, also where -1 asked for any.
    evaluations : int
        Network evaluations an image; one evaluates both halves of the guidance.
    sampling : str
        Which of the schedule's steps they are, such as "20 of 20 evaluations, exact".
    milliseconds : dict of str to float
        Wall time of each stage: "host", "schedule", "text", "hint", "steps", "decode" (with a CUDA graph the last four
        are one, "device", and the call that captures it adds "capture"), and "total". The
        reference has "total" alone.
    warnings : tuple of str
        What the user should know, such as a prompt cut at 77 tokens.
    """

    model: str
    weights: str
    backend: str
    backend_reason: str
    precision: str
    device: str
    height: int
    width: int
    num_samples: int
    seed: int
    evaluations: int
    sampling: str
    milliseconds: Dict[str, float]
    warnings: Tuple[str, ...] = ()

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """Images and how they came about.

    Attributes
    ----------
    images : list of (H, W, 3) uint8 arrays
    canny : (H, W) uint8 array
    latent : (N, 4, H/8, W/8) float32 array
        The final latent, before decoding.
    receipt : Receipt
    """

    images: List[np.ndarray]
    canny: np.ndarray
    latent: np.ndarray
    receipt: Receipt = field(repr=False)
