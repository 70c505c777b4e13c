"""diffusers' DDIM as the original code runs it, the independent reference of the sampler's tests."""

from __future__ import annotations

from typing import Any


def original_scheduler(num_steps: int) -> Any:
    """Its scheduler with the original's betas, last alpha-bar and offset; the number of steps divides 1000."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(num_steps)
    return scheduler
