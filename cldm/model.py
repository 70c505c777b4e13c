"""The whole model: text encoder, UNet, ControlNet and autoencoder under the checkpoint's names."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import nn

from cldm.config import ModelConfig
from cldm.controlnet import ControlNet
from ldm.autoencoder import AutoencoderKL
from ldm.clip import CLIPTextModel
from ldm.unet import UNet


class _Namespace(nn.Module):
    """A level of the checkpoint's names that holds modules and does nothing."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ControlLDM(nn.Module):
    """Stable Diffusion with a ControlNet; `state_dict()` has the names and shapes of `control_sd15_canny.pth`.

    Under `torch.device("meta")` it takes no memory. New instances hold PyTorch's default initial weights; see
    `cldm.checkpoint` for loading.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Namespace(diffusion_model=UNet(config.unet))
        self.control_model = ControlNet(config.unet, config.hint)
        self.first_stage_model = AutoencoderKL(config.autoencoder)
        self.cond_stage_model = _Namespace(transformer=_Namespace(text_model=CLIPTextModel(config.text)))

    @property
    def unet(self) -> UNet:
        return self.model.diffusion_model

    @property
    def text_model(self) -> CLIPTextModel:
        return self.cond_stage_model.transformer.text_model

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, 77) token ids to (B, 77, context_dim) features, after the final layer norm."""
        return self.text_model(ids)

    def predict_noise(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        hint: Optional[torch.Tensor] = None,
        control_scales: Union[Sequence[float], torch.Tensor, None] = None,
    ) -> torch.Tensor:
        """The noise in a latent.

        Parameters
        ----------
        x : (B, 4, h, w) tensor
        t : (B,) tensor
            Timesteps, 0 .. 999.
        context : (B, 77, context_dim) tensor
        hint : (B, 3, 8h, 8w) tensor in [0, 1], optional
            Without it the ControlNet does not run.
        control_scales : `config.num_controls` factors of the ControlNet's residuals, default 1

        Returns
        -------
        (B, 4, h, w) tensor

        Raises
        ------
        ValueError
            The number of control scales is wrong.
        """
        if hint is None:
            return self.unet(x, t, context)
        controls = self.control_model(x, t, context, hint)
        if control_scales is not None:
            if len(control_scales) != len(controls):
                raise ValueError(f"expected {len(controls)} control scales, got {len(control_scales)}")
            controls = [control * scale for control, scale in zip(controls, control_scales)]
        return self.unet(x, t, context, controls)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, 4, h, w) latent to a (B, 3, 8h, 8w) image in about [-1, 1]."""
        return self.first_stage_model.decode(z)
