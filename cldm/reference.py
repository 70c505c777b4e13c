"""The original algorithm, plainly: PyTorch FP32, two network calls a step, nothing taken out of the loop.

Everything faster in this repository is measured against this.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, List, Optional, Tuple

import numpy as np
import torch

from cldm.image import canny_map
from cldm.model import ControlLDM
from cldm.noise import choose_seed, draw_noise
from cldm.request import Request
from cldm.result import Receipt, Result
from cldm.tokenizer import Tokenizer
from ldm.exact import exact_fp32
from ldm.plans import exact_plan
from ldm.schedule import ddim_alpha_bars, ddim_sigmas, ddim_timesteps


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(N, 3, H, W) images in [-1, 1] to (N, H, W, 3) uint8: clipped, and truncated as the original does."""
    scaled = images.float().permute(0, 2, 3, 1) * 127.5 + 127.5
    return scaled.cpu().numpy().clip(0, 255).astype(np.uint8)


class Reference:
    """Makes images as the original PyTorch pipeline does.

    Parameters
    ----------
    model : ControlLDM
        In FP32.
    tokenizer : Tokenizer
    weights : str
        For the receipt.
    device : str
        Where the networks run and the noise is drawn.
    """

    def __init__(self, model: ControlLDM, tokenizer: Tokenizer, weights: str, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.weights = weights
        self.device = device

    @torch.no_grad()
    @exact_fp32()
    def generate(
        self,
        image: Any,
        request: Request,
        latents: Optional[Any] = None,
        progress: Optional[Callable[[int, int], None]] = None,
    ) -> Result:
        """One call of the original `process`.

        Parameters
        ----------
        image : H x W x {1, 3, 4} uint8 array
        latents : (N, 4, H/8, W/8) array, optional
            Initial noise to use in place of the seed's.
        progress : callable, optional
            Called with (steps done, steps) after each step.
        """
        start = time.perf_counter()
        request = replace(request, seed=choose_seed(request.seed))
        canny = canny_map(image, request.image_resolution, request.low_threshold, request.high_threshold)
        num, (height, width) = request.num_samples, canny.shape
        hint = torch.from_numpy(canny).to(self.device).float()[None, None].repeat(num, 3, 1, 1) / 255.0
        ids, warnings = self.tokenizer([request.conditional_text, request.negative_prompt])
        tokens = torch.from_numpy(ids).long().to(self.device)
        context = self.model.encode_text(tokens[:1].repeat(num, 1))
        uncond = self.model.encode_text(tokens[1:].repeat(num, 1))
        shape = (num, self.model.config.autoencoder.latent_channels, height // 8, width // 8)
        x, noise = draw_noise(request.seed, shape, request.ddim_steps, request.eta, self.device, latents)
        x = self._sample(x, noise, context, uncond, hint, request, progress)
        images = to_uint8(self.model.decode(x))
        receipt = Receipt(
            model=self.model.config.name,
            weights=self.weights,
            backend="reference",
            backend_reason="the original algorithm",
            precision="fp32",
            device=self.device,
            height=height,
            width=width,
            num_samples=num,
            seed=request.seed,
            evaluations=request.ddim_steps,
            sampling=str(exact_plan(self.model.config.schedule, request.ddim_steps, request.eta)),
            milliseconds={"total": 1e3 * (time.perf_counter() - start)},
            warnings=tuple(warnings),
        )
        return Result(list(images), canny, x.cpu().numpy(), receipt)

    def _sample(
        self,
        x: torch.Tensor,
        step_noise: Optional[torch.Tensor],
        context: torch.Tensor,
        uncond: torch.Tensor,
        hint: torch.Tensor,
        request: Request,
        progress: Optional[Callable[[int, int], None]],
    ) -> torch.Tensor:
        """DDIM (arXiv:2010.02502, eq. 12) with classifier-free guidance (arXiv:2207.12598, eq. 6)."""
        schedule = self.model.config.schedule
        timesteps, rows = _ddim_table(schedule, request.ddim_steps, request.eta)
        scales = request.control_scales(self.model.config.num_controls)[0]
        uncond_hint = None if request.guess_mode else hint
        for i, (timestep, (alpha, alpha_prev, sigma)) in enumerate(zip(timesteps, rows)):
            t = torch.full((x.shape[0],), timestep, dtype=torch.long, device=x.device)
            e = self.model.predict_noise(x, t, context, hint, scales)
            if request.guidance_scale != 1:
                e_uncond = self.model.predict_noise(x, t, uncond, uncond_hint, scales)
                e = e_uncond + request.guidance_scale * (e - e_uncond)
            pred_x0 = (x - (1 - alpha) ** 0.5 * e) / alpha**0.5
            x = alpha_prev**0.5 * pred_x0 + max(1 - alpha_prev - sigma**2, 0.0) ** 0.5 * e
            if step_noise is not None:
                x = x + sigma * step_noise[i]
            if progress is not None:
                progress(i + 1, request.ddim_steps)
        return x


def _ddim_table(schedule: Any, steps: int, eta: float) -> Tuple[List[int], List[Tuple[float, float, float]]]:
    """Timesteps and (alpha-bar, previous alpha-bar, sigma), noisiest first."""
    timesteps = ddim_timesteps(steps, schedule.train_steps)
    now, prev = ddim_alpha_bars(schedule, timesteps)
    sigma = ddim_sigmas(now, prev, eta)
    rows = [(float(a), float(b), float(s)) for a, b, s in zip(now, prev, sigma)]
    return [int(t) for t in timesteps][::-1], rows[::-1]
