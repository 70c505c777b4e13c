"""The autoencoder's training: reconstruction, gradients, KL, and a critic that needs no pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ldm.autoencoder import AutoencoderKL
from tools.tiny.measures import HIGH_THRESHOLD
from tools.tiny.sampling import to_images

KL_WEIGHT = 3e-4
GRADIENT_WEIGHT = 1.0
EDGE_WEIGHT = 0.3
# What Canny's upper threshold is on images in [-1, 1], and a margin.
EDGE_STRENGTH = 1.2 * HIGH_THRESHOLD / 127.5
# Share of the critic's gradient, by norm, in what the decoder is told about its image.
CRITIC_SHARE = 0.2
CRITIC_FROM = 0.5
CRITIC_RATE = 3e-4


class Critic(nn.Module):
    """(B, 3, H, W) images to a map of scores, one a patch of about 34 pixels (PatchGAN, arXiv:1611.07004)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def make_critic(device: torch.device) -> Tuple[Critic, torch.optim.Optimizer]:
    """A fresh critic, the same in every run, and its optimiser."""
    torch.manual_seed(1)
    critic = Critic().to(device, memory_format=torch.channels_last)
    return critic, torch.optim.Adam(critic.parameters(), lr=CRITIC_RATE, betas=(0.5, 0.9))


def gradient_loss(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of horizontal and vertical differences at three scales: edges in the right place."""
    error = image - target
    total = error.new_zeros(())
    for scale in (1, 2, 4):
        e = error if scale == 1 else F.avg_pool2d(error, scale)
        total = total + (e[..., 1:, :] - e[..., :-1, :]).abs().mean() + (e[..., 1:] - e[..., :-1]).abs().mean()
    return total / 3


def sobel_strength(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to the (B, H, W) edge strength that Canny thresholds.

    Sum of the absolute horizontal and vertical Sobel responses, of the channel in which it is largest, as in OpenCV.
    """
    smooth = image.new_tensor([1.0, 2.0, 1.0])
    slope = image.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, slope), torch.outer(slope, smooth)])[:, None]
    batch, channels, height, width = image.shape
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate").reshape(batch * channels, 1, height + 2, width + 2)
    responses = F.conv2d(padded, kernels).abs().sum(1)
    return responses.reshape(batch, channels, height, width).amax(1)


def edge_loss(image: torch.Tensor, target: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Mean over edge pixels of what the image's edge lacks in strength: edges must not fade.

    Edges that Canny sees only just are to become clear ones. A batch without edges gives 0.

    Parameters
    ----------
    edges : (B, H, W) tensor of 0 and 1
        The target's Canny map.
    """
    wanted = sobel_strength(target).clamp(min=EDGE_STRENGTH)
    # An edge may lie one pixel aside: the strongest of the neighbourhood counts.
    found = F.max_pool2d(sobel_strength(image)[:, None], 3, stride=1, padding=1)[:, 0]
    return (F.relu(wanted - found) * edges).sum() / edges.sum().clamp(min=1.0)


def reconstruction_loss(image: torch.Tensor, target: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """What the decoder is trained on, but for the critic; (B, H, W) `edges` as in `edge_loss`."""
    error = image - target
    near = F.max_pool2d(edges[:, None], 5, stride=1, padding=2)  # where the eye looks, errors count threefold
    pixels = (error.abs() * (1.0 + 2.0 * near)).mean() + 2.0 * error.square().mean()
    return pixels + GRADIENT_WEIGHT * gradient_loss(image, target) + EDGE_WEIGHT * edge_loss(image, target, edges)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL divergence from a standard normal, in nats a latent element (arXiv:1312.6114, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()


@dataclass
class AutoencoderStep:
    """One step's losses and gradients.

    The decoder's image receives the gradient of the reconstruction and, from `CRITIC_FROM` of the steps on, the
    critic's, scaled so that its norm has a fixed ratio to the former's: no weight has to be found by hand.

    Attributes
    ----------
    forward : callable
        (images, noise) to (reconstruction, mean, log-variance); compiled or not.
    images : (N, H, W, 3) uint8
    edges : (N, H, W / 8) uint8
        Packed bits.
    """

    forward: Callable[[torch.Tensor, torch.Tensor], Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    images: torch.Tensor
    edges: torch.Tensor
    critic: Critic
    critic_optimizer: torch.optim.Optimizer
    batch: int
    steps: int
    amp: bool

    def __call__(self, generator: torch.Generator, step: int) -> Dict[str, torch.Tensor]:
        device = self.images.device
        picks = torch.randint(len(self.images), (self.batch,), generator=generator, device=device)
        x = to_images(self.images[picks]).contiguous(memory_format=torch.channels_last)
        flip = torch.rand(self.batch, 1, 1, 1, generator=generator, device=device) < 0.5
        x = torch.where(flip, x.flip(3), x)
        edges = unpack_edges(self.edges[picks])
        edges = torch.where(flip, edges.flip(3), edges)[:, 0]
        h, w = x.shape[2] // 8, x.shape[3] // 8
        noise = torch.randn(self.batch, 4, h, w, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            y, mean, log_variance = self.forward(x, noise)
        y, mean, log_variance = y.float(), mean.float(), log_variance.float()
        seen = y.detach().requires_grad_(True)
        reconstruction = reconstruction_loss(seen, x, edges)
        (gradient,) = torch.autograd.grad(reconstruction, seen)
        figures = {"rec": reconstruction.detach(), "mse": (seen.detach().clamp(-1, 1) - x).square().mean()}
        if step >= CRITIC_FROM * self.steps:
            gradient = gradient + self._critic_gradient(seen, gradient)
            figures["critic"] = self._train_critic(x, y.detach())
        kl = kl_divergence(mean, log_variance)
        figures["kl"] = kl.detach()
        torch.autograd.backward([y, kl], [gradient, torch.full_like(kl, KL_WEIGHT)])
        return figures

    def _critic_gradient(self, image: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.amp):
            score = self.critic(image)
        (toward_real,) = torch.autograd.grad(-score.float().mean(), image)
        return toward_real * (CRITIC_SHARE * gradient.norm() / (toward_real.norm() + 1e-12))

    def _train_critic(self, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """Hinge loss (arXiv:1705.02894)."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        with torch.autocast(real.device.type, torch.bfloat16, enabled=self.amp):
            good, bad = self.critic(real), self.critic(made)
        loss = F.relu(1.0 - good.float()).mean() + F.relu(1.0 + bad.float()).mean()
        loss.backward()
        self.critic_optimizer.step()
        return loss.detach()


def make_step(
    autoencoder: AutoencoderKL,
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    edges: torch.Tensor,
    batch: int,
    steps: int,
    compiled: bool,
    amp: bool,
) -> AutoencoderStep:
    """The step for an autoencoder and its critic; images and edges are the stores on the device."""
    scale = autoencoder.config.scale_factor

    def forward(x: torch.Tensor, noise: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = autoencoder.encode(x)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return autoencoder.decode(z * scale), mean, log_variance

    return AutoencoderStep(
        torch.compile(forward) if compiled else forward, images, edges, critic, optimizer, batch, steps, amp
    )


def unpack_edges(packed: torch.Tensor) -> torch.Tensor:
    """(B, H, W / 8) bits, the highest first, to (B, 1, H, W) edges in {0, 1}, float32."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(2).float()[:, None]


def batches(images: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    for first in range(0, len(images), size):
        yield to_images(images[first : first + size]).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def standardise_latents(autoencoder: AutoencoderKL, images: torch.Tensor, batch: int = 50) -> Tuple[float, float]:
    """Fold shift and scale into the 1x1 convolutions around the latent, so that `scale_factor` times it is standard.

    Diffusion starts from a standard normal; `z = (mean - m) / s` goes into `quant_conv` and its inverse into
    `post_quant_conv`, channel by channel, so pictures stay what they were.

    Returns
    -------
    The largest shift and the ratio of the largest to the smallest scale that were taken out.
    """
    samples = torch.cat(
        [autoencoder.encode(x)[0].float().transpose(0, 1).flatten(1) for x in batches(images, batch)], 1
    )
    target = 1.0 / autoencoder.config.scale_factor
    shift, scale = samples.mean(1), samples.std(1) / target
    channels = autoencoder.config.latent_channels
    quant, post = autoencoder.quant_conv, autoencoder.post_quant_conv
    post.bias.add_((post.weight[:, :, 0, 0] * shift).sum(1))
    post.weight.mul_(scale[None, :, None, None])
    quant.weight[:channels].div_(scale[:, None, None, None])
    quant.bias[:channels].sub_(shift).div_(scale)
    quant.bias[channels:].sub_(2.0 * scale.log())
    return float(shift.abs().max()), float(scale.max() / scale.min())


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, images: torch.Tensor, batch: int = 50) -> float:
    """Mean PSNR in dB of `decode(mean)` over (N, H, W, 3) uint8 images, levels rounded and clipped."""
    scale = autoencoder.config.scale_factor
    values = []
    for x in batches(images, batch):
        y = autoencoder.decode(autoencoder.encode(x)[0] * scale).clamp(-1, 1)
        error = ((y - x) * 127.5).round().square().mean(dim=(1, 2, 3))
        values.append(10.0 * torch.log10(255.0**2 / error.clamp_min(1e-6)))
    return float(torch.cat(values).mean())
