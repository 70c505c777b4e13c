"""Training of text encoder and UNet, and of the ControlNet on top of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import nn

from cldm.model import ControlLDM
from ldm.autoencoder import AutoencoderKL
from ldm.schedule import alpha_bars
from ldm.unet import ResBlock
from tools.tiny.sampling import to_images
from tools.tiny.store import Scenes
from tools.tiny.train_autoencoder import unpack_edges
from tools.tiny.training import seed_for

# Losses of low noise levels are kept from drowning the others: min(SNR, 5) / SNR (arXiv:2303.09556, eq. 3).
SNR_LIMIT = 5.0
CAPTION_DROP = 0.1
CONTROL_DROP = 0.1

Predict = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Latents:
    """What the diffusion stages draw from, on the device.

    Attributes
    ----------
    mean, deviation : (2, N, 4, h, w) float16
        Posterior of each scene, as drawn and mirrored; unscaled.
    edges : (N, H, W / 8) uint8
        Packed bits.
    tokens : (N, K, 77) int16
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    edges: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def encode_scenes(
    autoencoder: AutoencoderKL, images: torch.Tensor, scenes: Scenes, amp: bool, batch: int = 125
) -> Latents:
    """Posteriors of all scenes; `images` is `scenes.images` on the device."""
    device = images.device
    means, deviations = [], []
    for mirrored in (False, True):
        mean_parts, deviation_parts = [], []
        for first in range(0, len(images), batch):
            x = to_images(images[first : first + batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                mean, log_variance = autoencoder.encode(x.flip(3) if mirrored else x)
            mean_parts.append(mean.half())
            deviation_parts.append(torch.exp(0.5 * log_variance.float()).half())
        means.append(torch.cat(mean_parts))
        deviations.append(torch.cat(deviation_parts))
    edges, tokens = torch.from_numpy(scenes.edges).to(device), torch.from_numpy(scenes.tokens).to(device)
    return Latents(torch.stack(means), torch.stack(deviations), edges, tokens)


@torch.no_grad()
def check_latents(latents: Latents, autoencoder: AutoencoderKL, scenes: Scenes, count: int = 16) -> None:
    """Encode some scenes again, one by one in FP32, and compare.

    Raises
    ------
    RuntimeError
        A latent is not its picture's.
    """
    device = latents.mean.device
    for index in np.linspace(0, len(scenes.images) - 1, count).astype(int).tolist():
        x = to_images(torch.from_numpy(scenes.images[index : index + 1]).to(device))
        for side, image in enumerate((x, x.flip(3))):
            wanted = autoencoder.encode(image)[0][0]
            error = float((latents.mean[side, index].float() - wanted).norm() / wanted.norm())
            if not error < 0.1:
                raise RuntimeError(f"the latent of scene {index}, side {side}, is off by {100 * error:.0f} %")


def initialise_text(model: ControlLDM) -> None:
    """CLIP's small embeddings in place of PyTorch's, whose unit variance would drown everything after them."""
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.mul_(0.02)
        model.text_model.embeddings.position_embedding.weight.mul_(0.01)


def initialise_unet(network: nn.Module) -> None:
    """Zero the last layer of each residual branch and of the UNet, as the original code does before training."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[3].weight)
                nn.init.zeros_(module.out_layers[3].bias)
            elif hasattr(module, "proj_out"):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        nn.init.zeros_(network.out[2].weight)
        nn.init.zeros_(network.out[2].bias)


def copy_encoder(model: ControlLDM) -> None:
    """Begin the ControlNet as the paper does: the UNet's encoder copied, its outputs behind zero convolutions."""
    source = model.unet.state_dict()
    target = model.control_model.state_dict()
    with torch.no_grad():
        for name, value in target.items():
            if name in source:
                value.copy_(source[name])
            elif name.startswith(("zero_convs", "middle_block_out")):
                value.zero_()


@dataclass
class DiffusionStep:
    """One step of noise prediction.

    Attributes
    ----------
    predict : callable
        (x, t, tokens, edges, keep) to noise, or without the last two where no ControlNet is trained.
    empty : (77,) int16
        Tokens of the empty text, which stands in for a dropped caption.
    """

    predict: Predict
    latents: Latents
    empty: torch.Tensor
    scale: float
    alpha_bar: torch.Tensor
    batch: int
    control: bool
    amp: bool

    def __call__(self, generator: torch.Generator, step: int) -> Dict[str, torch.Tensor]:
        device, size = self.alpha_bar.device, self.batch

        def uniform() -> torch.Tensor:
            return torch.rand(size, generator=generator, device=device)

        picks = torch.randint(len(self.latents.edges), (size,), generator=generator, device=device)
        mirrored = uniform() < 0.5
        x0 = self._clean(picks, mirrored, generator)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        t = torch.randint(len(self.alpha_bar), (size,), generator=generator, device=device)
        alpha = self.alpha_bar[t][:, None, None, None]
        x = alpha.sqrt() * x0 + (1.0 - alpha).sqrt() * noise
        inputs: Tuple[torch.Tensor, ...] = (x, t, self._tokens(picks, uniform(), uniform()))
        keep = uniform() >= CONTROL_DROP
        if self.control:
            edges = unpack_edges(self.latents.edges[picks])
            edges = torch.where(mirrored[:, None, None, None], edges.flip(3), edges)
            inputs += (edges, keep.float())
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            predicted = self.predict(*inputs)
        mse = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        snr = alpha.flatten() / (1.0 - alpha.flatten())
        loss = (mse * snr.clamp(max=SNR_LIMIT) / snr).mean()
        loss.backward()
        return {"loss": loss.detach(), "mse": mse.detach().mean()}

    def _clean(self, picks: torch.Tensor, mirrored: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        side = mirrored.long()
        mean, deviation = self.latents.mean[side, picks].float(), self.latents.deviation[side, picks].float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.scale * (mean + deviation * noise)

    def _tokens(self, picks: torch.Tensor, choice: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        wording = (choice * self.latents.tokens.shape[1]).long()
        tokens = self.latents.tokens[picks, wording]
        return torch.where((drop < CAPTION_DROP)[:, None], self.empty[None], tokens).long()


def make_step(
    model: ControlLDM, latents: Latents, empty: torch.Tensor, batch: int, control: bool, compiled: bool, amp: bool
) -> DiffusionStep:
    """The step of the UNet's stage, or with `control` of the ControlNet's."""

    def plain(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return model.unet(x, t, context)

    def controlled(
        x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, edges: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        controls: List[torch.Tensor] = model.control_model(x, t, context, edges.expand(-1, 3, -1, -1))
        weight = keep[:, None, None, None]
        return model.unet(x, t, context, [c * weight for c in controls])

    networks: Callable[..., torch.Tensor] = controlled if control else plain
    if compiled:
        networks = torch.compile(networks)

    def predict(x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, *control_inputs: torch.Tensor) -> torch.Tensor:
        # The text encoder is a small part of the work and is left as it is.
        return networks(x, t, model.encode_text(tokens), *control_inputs)

    table = torch.from_numpy(alpha_bars(model.config.schedule)).float().to(latents.edges.device)
    return DiffusionStep(predict, latents, empty, model.config.autoencoder.scale_factor, table, batch, control, amp)


def trained_modules(model: ControlLDM, control: bool, locked: bool) -> Dict[str, nn.Module]:
    """What a stage trains, by prefix in the checkpoint; `locked` keeps all but the ControlNet as they are."""
    rest: Dict[str, nn.Module] = {
        "model.diffusion_model": model.unet,
        "cond_stage_model.transformer.text_model": model.text_model,
    }
    if not control:
        return rest
    return {"control_model": model.control_model, **({} if locked else rest)}


def freeze(model: ControlLDM, but: Optional[Dict[str, nn.Module]] = None) -> None:
    """No gradients, but for the given modules."""
    model.requires_grad_(False)
    for module in (but or {}).values():
        module.requires_grad_(True)


@torch.no_grad()
def validate(step: DiffusionStep, held_out: Latents, with_control: bool, count: int = 256) -> Dict[int, float]:
    """Mean squared error of the noise on held-out scenes at a few timesteps, with fixed noise and captions.

    `step` must not be compiled: the batch is another than in training.
    """
    device = step.alpha_bar.device
    count = min(count, len(held_out.edges))
    errors = {}
    for t in (50, 200, 400, 600, 800, 950):
        generator = torch.Generator(device=device).manual_seed(seed_for("validate", t))
        shape = held_out.mean[0, :count].shape
        noise = torch.randn(shape, generator=generator, device=device)
        alpha = float(step.alpha_bar[t])
        x = alpha**0.5 * step.scale * held_out.mean[0, :count].float() + (1.0 - alpha) ** 0.5 * noise
        inputs: Tuple[torch.Tensor, ...] = (
            x,
            torch.full((count,), t, device=device),
            held_out.tokens[:count, 0].long(),
        )
        if step.control:
            keep = torch.full((count,), float(with_control), device=device)
            inputs += (unpack_edges(held_out.edges[:count]), keep)
        with torch.autocast(device.type, torch.bfloat16, enabled=step.amp):
            predicted = step.predict(*inputs)
        errors[t] = float((predicted.float() - noise).square().mean())
    return errors
