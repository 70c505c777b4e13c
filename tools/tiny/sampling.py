"""Many different pictures in one batch: the sampler of the tiny model's measurements.

The same algorithm as `cldm.reference.Reference` and the deployable graphs. Scenes, prompts, seeds, strengths and
guidance scales may differ from image to image, and what does not change from step to step is computed once.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
import torch
from tqdm import tqdm

from cldm.model import ControlLDM
from cldm.noise import draw_noise
from cldm.reference import to_uint8
from cldm.request import Request
from deploy.graphs import cast_copy
from ldm.attention import Conditioning
from ldm.exact import exact_fp32
from ldm.schedule import ddim_coefficients
from scoring.runner import CONTEST_REQUEST

ADDED_PROMPT, NEGATIVE_PROMPT = CONTEST_REQUEST.added_prompt, CONTEST_REQUEST.negative_prompt

T = TypeVar("T")
Numbers = Union[float, Sequence[float]]
Texts = Union[str, Sequence[str]]


def to_images(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]: the inverse of `cldm.reference.to_uint8`."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


class _Batch(NamedTuple):
    """What one batch keeps from step to step; the doubled batch is [conditional, unconditional].

    Attributes
    ----------
    keys_values : pair of lists
        Of the UNet's and of the ControlNet's cross-attentions, for the doubled batch.
    hint : (2B, C, h, w) tensor
        Encoded hint.
    scales : (num_controls, 2B, 1, 1, 1) tensor
    guidance : (B, 1, 1, 1) float32 tensor
    """

    keys_values: Tuple[List[Any], List[Any]]
    hint: torch.Tensor
    scales: torch.Tensor
    guidance: torch.Tensor


class Sampler:
    """Samples and decodes with one model in one precision.

    In half precision the types are those of the deployable graphs: networks in `dtype`; norms, time biases, guidance
    and the sampler's update in FP32.

    Parameters
    ----------
    model : ControlLDM
        In FP32; moved to `device`.
    tokenizer : callable
        `cldm.tokenizer.Tokenizer`, or what else turns a list of texts into ids and warnings.
    batch : int
        Images at a time; the networks see twice as many.
    """

    def __init__(
        self,
        model: ControlLDM,
        tokenizer: Any,
        device: Union[str, torch.device] = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int = 64,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.config = model.config
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch = batch
        self.model = model.to(self.device)
        self._cast = self.model if dtype == torch.float32 else cast_copy(self.model, dtype)

    @torch.no_grad()
    @exact_fp32()
    def generate(
        self,
        canny: np.ndarray,
        prompts: Texts,
        negative: Texts,
        seeds: Union[int, Sequence[int]],
        *,
        guidance: Numbers = 9.0,
        strength: Numbers = 1.0,
        steps: int = 20,
        guess_mode: bool = False,
        added_prompt: str = ADDED_PROMPT,
        progress: Optional[str] = None,
    ) -> Tuple[np.ndarray, np.ndarray]:
        """`generate` of this module, with this sampler's model."""
        number = len(canny)
        _check_canny(canny, self.config.size_multiple)
        prompts = _each(prompts, number, "prompts")
        negative = _each(negative, number, "negative")
        seeds = _each(seeds, number, "seeds")
        scales = _each(guidance, number, "guidance")
        strengths = _each(strength, number, "strength")
        requests = [
            Request(p, added_prompt, n, ddim_steps=steps, guess_mode=guess_mode, strength=s, guidance_scale=g, seed=k)
            for p, n, s, g, k in zip(prompts, negative, strengths, scales, seeds)
        ]
        if any(request.seed < 0 for request in requests):
            raise ValueError("seeds must be 0 or more: -1 would draw another one in every run")
        images, latents = [], []
        silent = True if progress is None else None  # None: silent where nobody watches
        with tqdm(total=number * steps, desc=progress, unit="eval", disable=silent, leave=False) as bar:
            for start in range(0, number, self.batch):
                part = slice(start, start + self.batch)
                latent = self._sample(canny[part], requests[part], bar.update)
                latents.append(latent.cpu().numpy())
                images.append(self.decode(latent))
        return np.concatenate(images), np.concatenate(latents)

    @torch.no_grad()
    @exact_fp32()
    def decode(self, latent: torch.Tensor) -> np.ndarray:
        """(N, 4, h, w) float32 latents to (N, 8h, 8w, 3) uint8 RGB images."""
        autoencoder = self._cast.first_stage_model
        pieces = []
        for part in latent.split(self.batch):
            z = (part.to(self.device) / autoencoder.config.scale_factor).to(self.dtype)
            pieces.append(to_uint8(autoencoder.decoder(autoencoder.post_quant_conv(z))))
        return np.concatenate(pieces)

    @torch.no_grad()
    @exact_fp32()
    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB images through the autoencoder: encoded to the mean of their latent, and decoded."""
        autoencoder = self._cast.first_stage_model
        pieces = []
        for start in range(0, len(images), self.batch):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + self.batch])).to(self.device)
            mean, _ = autoencoder.encode(to_images(pixels).to(self.dtype))
            pieces.append(self.decode(mean.float() * autoencoder.config.scale_factor))
        return np.concatenate(pieces)

    def _sample(self, canny: np.ndarray, requests: Sequence[Request], advance: Callable[[int], Any]) -> torch.Tensor:
        """(B, 4, h, w) float32 latents by DDIM, eta 0."""
        steps = requests[0].ddim_steps
        latent = self._noise(requests, canny.shape[1:])
        batch = self._prepare(canny, requests)
        timesteps, rows = ddim_coefficients(self.config.schedule, steps, 0.0)
        for timestep, (a, b, _) in zip(timesteps, rows):
            cond, uncond = self._predict(torch.cat([latent, latent]), int(timestep), batch).float().chunk(2)
            noise = uncond + batch.guidance * (cond - uncond)
            latent = float(a) * latent + float(b) * noise
            advance(len(requests))
        return latent

    def _noise(self, requests: Sequence[Request], size: Tuple[int, ...]) -> torch.Tensor:
        """Initial latents, each from its own seed, drawn on the CPU as for one picture."""
        shape = (1, self.config.autoencoder.latent_channels, size[0] // 8, size[1] // 8)
        drawn = [draw_noise(r.seed, shape, r.ddim_steps, 0.0, "cpu")[0] for r in requests]
        return torch.cat(drawn).to(self.device)

    def _prepare(self, canny: np.ndarray, requests: Sequence[Request]) -> _Batch:
        model, device = self._cast, self.device
        texts = [r.conditional_text for r in requests] + [r.negative_prompt for r in requests]
        distinct = sorted(set(texts))
        ids, _ = self.tokenizer(distinct)
        context = model.encode_text(torch.from_numpy(ids).long().to(device))
        context = context[torch.tensor([distinct.index(text) for text in texts], device=device)]
        gray = (torch.from_numpy(np.ascontiguousarray(canny)).to(device).float() / 255.0).to(self.dtype)
        hint = model.control_model.encode_hint(gray[:, None].expand(-1, 3, -1, -1))
        halves = np.array([r.control_scales(self.config.num_controls) for r in requests])  # (B, 2, num_controls)
        scales = torch.from_numpy(halves.transpose(2, 1, 0).reshape(self.config.num_controls, -1))
        return _Batch(
            (model.unet.keys_values(context), model.control_model.keys_values(context)),
            torch.cat([hint, hint]),
            scales.to(device, self.dtype)[:, :, None, None, None],
            torch.tensor([r.guidance_scale for r in requests], dtype=torch.float32, device=device)[:, None, None, None],
        )

    def _predict(self, x: torch.Tensor, timestep: int, batch: _Batch) -> torch.Tensor:
        """The noise in the doubled batch: `ControlLDM.predict_noise` behind its conditioning."""
        t = torch.tensor([timestep], device=self.device)
        exact = (self.model.unet, self.model.control_model)
        for_unet, for_control = (
            Conditioning([bias.to(self.dtype) for bias in network.time_biases(t)], keys_values)
            for network, keys_values in zip(exact, batch.keys_values)
        )
        x = x.to(self.dtype)
        controls = self._cast.control_model.residuals(x, for_control, batch.hint)
        controls = [control * scale for control, scale in zip(controls, batch.scales)]
        return self._cast.unet.denoise(x, for_unet, controls)


def generate(
    model: ControlLDM,
    tokenizer: Any,
    canny: np.ndarray,
    prompts: Texts,
    negative: Texts = NEGATIVE_PROMPT,
    seeds: Union[int, Sequence[int], None] = None,
    *,
    guidance: Numbers = 9.0,
    strength: Numbers = 1.0,
    steps: int = 20,
    guess_mode: bool = False,
    added_prompt: str = ADDED_PROMPT,
    device: Union[str, torch.device] = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 64,
    progress: Optional[str] = None,
) -> Tuple[np.ndarray, np.ndarray]:
    """Images for edges, prompts and seeds, each its own, by DDIM with guidance.

    Image `i` is what the pipeline makes of one picture with these arguments, up to rounding.

    Parameters
    ----------
    model : ControlLDM
        In FP32; moved to `device`.
    canny : (N, H, W) uint8 array
        Edge maps, 0 or 255.
    prompts : N texts, or one for all
        Each is followed by a comma and `added_prompt`.
    negative : N texts, or one for all
    seeds : N ints, or one for all; default 0 .. N - 1
    guidance, strength : N numbers, or one for all
        Guidance scale and factor of the control.
    dtype : torch.dtype
        float32 (exact: no TF32), float16 or bfloat16.
    batch : int
        Images at a time.
    progress : str, optional
        Title of a progress bar, shown on a terminal only.

    Returns
    -------
    images : (N, H, W, 3) uint8 array, RGB
    latents : (N, 4, H/8, W/8) float32 array

    Raises
    ------
    TypeError, ValueError
        Arrays of the wrong kind, lists of the wrong length, or values out of the range of `cldm.request.Request`.
    """
    sampler = Sampler(model, tokenizer, device, dtype, batch)
    return sampler.generate(
        canny,
        prompts,
        negative,
        range(len(canny)) if seeds is None else seeds,
        guidance=guidance,
        strength=strength,
        steps=steps,
        guess_mode=guess_mode,
        added_prompt=added_prompt,
        progress=progress,
    )


def _check_canny(canny: np.ndarray, multiple: int) -> None:
    if not isinstance(canny, np.ndarray) or canny.dtype != np.uint8:
        kind = canny.dtype if isinstance(canny, np.ndarray) else type(canny).__name__
        raise TypeError(f"canny must be an array of uint8, got {kind}")
    if canny.ndim != 3 or not len(canny):
        raise ValueError(f"canny must be N x H x W with N at least 1, got shape {canny.shape}")
    if canny.shape[1] % multiple or canny.shape[2] % multiple:
        raise ValueError(f"edge maps must be multiples of {multiple} high and wide, got {canny.shape[1:]}")


def _each(values: Union[T, Iterable[T]], number: int, name: str) -> List[T]:
    """One value for each image."""
    if isinstance(values, str) or np.ndim(values) == 0:
        return [values] * number
    listed = list(values)
    if len(listed) != number:
        raise ValueError(f"{name}: {len(listed)} values for {number} images")
    return listed
