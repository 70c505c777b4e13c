"""diffusers' ControlNet pipeline as a contender: the same networks by shape, random weights, nothing downloaded."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Mapping, Optional

import numpy as np

from benchmarks.contenders import Job, Memory, mark_parts, time_calls
from benchmarks.device import torch_settings
from cldm.config import ModelConfig, load_config
from cldm.image import canny_map
from deploy.spec import PRECISIONS

WEIGHTS_SEED = 0


def network_arguments(config: ModelConfig) -> Dict[str, Any]:
    """What diffusers' UNet and ControlNet both take."""
    unet = config.unet
    levels = range(len(unet.channel_mult))
    return {
        "in_channels": unet.in_channels,
        "block_out_channels": tuple(unet.model_channels * mult for mult in unet.channel_mult),
        "down_block_types": tuple(
            "CrossAttnDownBlock2D" if level in unet.attention_levels else "DownBlock2D" for level in levels
        ),
        "layers_per_block": unet.num_res_blocks,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": unet.num_heads,  # so diffusers calls the number of heads in these models
        "norm_num_groups": unet.norm_groups,
    }


def build_networks(config: ModelConfig) -> Dict[str, Any]:
    """unet, controlnet, vae and text_encoder in the shapes of a model, with their libraries' own initial weights.

    They are made on torch's default device.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shared = network_arguments(config)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    coder, text = config.autoencoder, config.text
    levels = len(coder.channel_mult)
    return {
        "unet": UNet2DConditionModel(
            up_block_types=tuple(kinds[kind] for kind in reversed(shared["down_block_types"])),
            out_channels=config.unet.out_channels,
            **shared,
        ),
        "controlnet": ControlNetModel(conditioning_embedding_out_channels=config.hint.channels[::2], **shared),
        "vae": AutoencoderKL(
            block_out_channels=tuple(coder.channels * mult for mult in coder.channel_mult),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=coder.num_res_blocks,
            latent_channels=coder.latent_channels,
            norm_num_groups=coder.norm_groups,
            scaling_factor=coder.scale_factor,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=text.mlp_width,
                max_position_embeddings=text.max_length,
                hidden_act="quick_gelu",
                bos_token_id=text.vocab_size - 2,
                eos_token_id=text.vocab_size - 1,
            )
        ),
    }


def build_pipeline(config: ModelConfig, device: str, dtype: Any) -> Any:
    """A StableDiffusionControlNetPipeline in channels-last order, with DDIM as the original sets it up.

    The tiny model's vocabulary stands in for SD1.5's: to random weights all words are alike.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
    from transformers import CLIPTokenizer

    tiny = load_config("tiny")
    torch.manual_seed(WEIGHTS_SEED)
    with torch.device(device):
        networks = build_networks(config)
    schedule = config.schedule
    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.train_steps,
        beta_start=schedule.linear_start,
        beta_end=schedule.linear_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionControlNetPipeline(
        **networks,
        tokenizer=CLIPTokenizer.from_pretrained(f"{tiny.folder}/{tiny.tokenizer}", local_files_only=True),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(device, dtype)
    for name in ("unet", "controlnet", "vae"):
        getattr(pipeline, name).to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compile_networks(pipeline: Any, mode: str, fullgraph: bool) -> None:
    """UNet, ControlNet and the decoder by torch.compile; its modes named in `PEERS` replay them as CUDA graphs."""
    import torch

    for owner, name in ((pipeline, "unet"), (pipeline, "controlnet"), (pipeline.vae, "decoder")):
        network = getattr(owner, name)
        network = getattr(network, "_orig_mod", network)  # a second try must not compile what is compiled
        setattr(owner, name, torch.compile(network, mode=mode, fullgraph=fullgraph))


class Diffusers:
    """`StableDiffusionControlNetPipeline`, eager or compiled, with the host work that ours does too."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._memory = Memory()
        self._job = Job(**options)
        self._image, self._height, self._width = self._job.load_picture()
        self._mark: Callable[[str], None] = lambda stage: None

    def prepare(self) -> Dict[str, Any]:
        """Make the pipeline; compile where asked, which a first image sets off, and say what runs.

        Raises
        ------
        ValueError
            The job leaves device or precision open.
        """
        import diffusers
        import torch

        job = self._job
        self._device, precision = job.fixed_place()
        start = time.perf_counter()
        self._pipeline = build_pipeline(load_config(job.model), self._device, getattr(torch, PRECISIONS[precision]))
        self._put_marks()
        how = f'torch.compile mode="{job.compiled}", {self._compile(job.compiled)}' if job.compiled else "eager"
        if not np.isfinite(self._paint()).all():
            how += ", images not finite"
        return {
            "summary": f"diffusers {diffusers.__version__}, {how}, channels last, on {self._device} in {precision}",
            "device": self._device,
            "precision": precision,
            "initialise_seconds": time.perf_counter() - start,
            **torch_settings(),
        }

    def _compile(self, mode: str) -> str:
        """Compile, as one graph a network where that works."""
        import torch

        compile_networks(self._pipeline, mode, fullgraph=True)
        try:
            self._run()
            return "fullgraph"
        except torch._dynamo.exc.TorchDynamoException as error:
            print(f"not as one graph: {error}")
        torch._dynamo.reset()
        compile_networks(self._pipeline, mode, fullgraph=False)
        self._run()
        return "several graphs"

    def _put_marks(self) -> None:
        """Have the pipeline say when a stage ends: its methods and its decoder's call are wrapped."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        encode, latents, decode = pipeline.encode_prompt, pipeline.prepare_latents, vae.decode

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self._mark("host")
            result = encode(*args, **kwargs)
            self._mark("text")
            return result

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = latents(*args, **kwargs)
            self._mark("host")
            return result

        def decode_latent(*args: Any, **kwargs: Any) -> Any:
            self._mark("steps")
            result = decode(*args, **kwargs)
            self._mark("decode")
            return result

        pipeline.encode_prompt, pipeline.prepare_latents, vae.decode = encode_prompt, prepare_latents, decode_latent

    def _run(self, mark: Callable[[str], None] = lambda stage: None) -> np.ndarray:
        """(N, H, W, 3) uint8 images of the job's picture and request."""
        return np.rint(self._paint(mark) * 255.0).astype(np.uint8)

    def _paint(self, mark: Callable[[str], None] = lambda stage: None) -> np.ndarray:
        """(N, H, W, 3) float32 images from 0 to 1."""
        import torch
        from PIL import Image

        request = self._job.request
        canny = canny_map(self._image, request.image_resolution, request.low_threshold, request.high_threshold)
        self._mark = mark
        with torch.no_grad():
            return self._pipeline(
                request.conditional_text,
                image=Image.fromarray(np.repeat(canny[:, :, None], 3, axis=2)),
                height=self._height,
                width=self._width,
                negative_prompt=request.negative_prompt,
                num_images_per_prompt=request.num_samples,
                num_inference_steps=request.ddim_steps,
                guidance_scale=request.guidance_scale,
                controlnet_conditioning_scale=request.strength,
                generator=torch.Generator(self._device).manual_seed(request.seed),
                output_type="np",
            ).images

    def images(self, count: int) -> List[float]:
        """Milliseconds of each of `count` images, host work and copies included."""
        return time_calls(self._run, count)

    def memory(self) -> Optional[Dict[str, Any]]:
        return self._memory.measure(self._device)

    def parts(self, repeats: int) -> Dict[str, List[float]]:
        """Milliseconds of host, text, steps (all) and decode, with a wait for the device after each."""
        return mark_parts(self._run, repeats, self._device)
