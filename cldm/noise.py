"""The random numbers of a run, in the order in which the original draws them."""

from __future__ import annotations

import random
from typing import Any, Optional, Tuple

import numpy as np
import torch


def choose_seed(seed: int) -> int:
    """The seed itself, or for -1 one of 0 .. 65535."""
    return random.SystemRandom().randint(0, 65535) if seed == -1 else seed


def draw_noise(
    seed: int, shape: Tuple[int, int, int, int], steps: int, eta: float, device: str, latents: Optional[Any] = None
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Initial latent, and the noise of each step where eta asks for any.

    The same numbers as `torch.manual_seed(seed)` followed by `torch.randn` on that device, without touching the
    process's own generators. Devices of different kinds draw different numbers.

    Parameters
    ----------
    shape : (N, 4, h, w)
    latents : array of that shape, optional
        Initial latent to use instead; then none is drawn.

    Returns
    -------
    initial : (N, 4, h, w) float32 tensor
    step_noise : (steps, N, 4, h, w) float32 tensor, or None for eta 0

    Raises
    ------
    TypeError, ValueError
        `latents` is no array of real numbers, has another shape, or is not finite.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    if latents is None:
        initial = torch.randn(shape, generator=generator, device=device)
    else:
        initial = check_latents(latents, shape).to(device)
    if eta == 0:
        return initial, None
    step_noise = torch.empty((steps, *shape), device=device)
    for noise in step_noise:
        torch.randn(shape, generator=generator, out=noise)
    return initial, step_noise


def check_latents(latents: Any, shape: Tuple[int, int, int, int]) -> torch.Tensor:
    """The given initial latent as a float32 tensor of that shape; raises as `draw_noise` says."""
    if not isinstance(latents, (np.ndarray, torch.Tensor)):
        raise TypeError(f"latents must be a NumPy array or a tensor, got {type(latents).__name__}")
    tensor = torch.as_tensor(latents)
    if not tensor.is_floating_point():
        raise TypeError(f"latents must be real numbers, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"latents must have shape {tuple(shape)} for this picture, got {tuple(tensor.shape)}")
    tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("latents hold NaN or infinity")
    return tensor
