"""Noise schedule and DDIM coefficients, in float64 NumPy: the host's part of sampling.

Names: `alpha_bar` is the cumulative product of 1 - beta (`alphas_cumprod` in the checkpoint).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

import numpy as np


@dataclass(frozen=True)
class ScheduleConfig:
    """Betas evenly spaced in their square roots between the two ends ("scaled linear")."""

    linear_start: float = 0.00085
    linear_end: float = 0.012
    train_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(f"schedule: betas {self.linear_start} .. {self.linear_end} are not within (0, 1), rising")
        if self.train_steps < 1:
            raise ValueError(f"schedule.train_steps: {self.train_steps} is not positive")


def alpha_bars(config: ScheduleConfig) -> np.ndarray:
    """The (train_steps,) float64 cumulative products of 1 - beta."""
    betas = np.linspace(config.linear_start**0.5, config.linear_end**0.5, config.train_steps) ** 2
    return np.cumprod(1.0 - betas)


def ddim_timesteps(num_steps: int, train_steps: int = 1000) -> np.ndarray:
    """The `num_steps` timesteps of DDIM's uniform schedule, rising, as int64.

    `floor(i * train_steps / num_steps) + 1`. Where `num_steps` divides `train_steps` that is
    `range(0, train_steps, train_steps // num_steps) + 1`, the schedule of the original code. For other counts the
    original takes one step too many or reads behind its table; this takes exactly `num_steps`, spaced as evenly. With
    `num_steps == train_steps` the largest would fall behind the table and is held at its last entry.

    Raises
    ------
    ValueError
        `num_steps` is not in 1 .. train_steps.
    """
    if not 1 <= num_steps <= train_steps:
        raise ValueError(f"DDIM steps must be between 1 and {train_steps}, got {num_steps}")
    steps = np.arange(num_steps, dtype=np.int64) * train_steps // num_steps + 1
    return np.minimum(steps, train_steps - 1)


def ddim_alpha_bars(config: ScheduleConfig, timesteps: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """alpha-bar at each timestep and at the one below; below the first stands `alpha_bars[0]`, as in the original."""
    table = alpha_bars(config)
    now = table[timesteps]
    return now, np.concatenate([table[:1], now[:-1]])


def ddim_sigmas(alpha_bar: np.ndarray, alpha_bar_prev: np.ndarray, eta: float) -> np.ndarray:
    """Standard deviation of the noise that each step adds (arXiv:2010.02502, eq. 16)."""
    return eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / alpha_bar_prev)


def ddim_coefficients(config: ScheduleConfig, num_steps: int, eta: float) -> Tuple[np.ndarray, np.ndarray]:
    """DDIM as rows of `x_next = A x + B e + C n`, in the order in which they run (noisiest first).

    Arises from eq. 12 of arXiv:2010.02502 by collecting x and e. `n` is fresh noise, and C its sigma: 0 for eta 0.

    Returns
    -------
    timesteps : (num_steps,) int64
    rows : (num_steps, 3) float64
        A, B, C.
    """
    timesteps = ddim_timesteps(num_steps, config.train_steps)
    now, prev = ddim_alpha_bars(config, timesteps)
    sigma = ddim_sigmas(now, prev, eta)
    a = np.sqrt(prev / now)
    b = np.sqrt(np.maximum(1 - prev - sigma**2, 0.0)) - a * np.sqrt(1 - now)
    return timesteps[::-1].copy(), np.stack([a, b, sigma], axis=1)[::-1].copy()
