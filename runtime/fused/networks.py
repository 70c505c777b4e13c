"""The deployable graphs on the fused kernels.

The UNet's encoder and the ControlNet run as two nets of the same launches. A decoder block's input is a concatenation;
the maps that it consists of are written into it by the layers that make them, so nothing is copied together.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from cldm.model import ControlLDM
from ldm.attention import BasicTransformerBlock, SpatialTransformer
from ldm.autoencoder import AttnBlock, ResnetBlock
from ldm.exact import exact_fp32
from ldm.layout import key_value_widths, time_bias_widths
from ldm.unet import Downsample, ResBlock, Upsample, timestep_embedding
from runtime.fused.fp8 import Ranges
from runtime.fused.ops import Fused, Weights
from runtime.fused.packing import Packer

Tensors = Dict[str, torch.Tensor]


class Conditioning(NamedTuple):
    """The step's inputs that blocks cut their parts from."""

    keys_values: torch.Tensor
    time_bias: torch.Tensor
    images: int  # both halves of guidance


class Part(NamedTuple):
    """Where in a packed row a block's numbers lie, and how far on the next net's."""

    start: int
    step: int


class FusedResBlock:
    """Two norms and two convolutions; a 1x1 convolution of the input runs inside the second.

    Parameters
    ----------
    blocks : sequence of ResBlock
        One a net.
    time : Part
        Its biases in the packed row.
    """

    def __init__(self, pack: Packer, blocks: Sequence[ResBlock], time: Part) -> None:
        self.time = time
        self.norm1 = pack.group_norm([block.in_layers[0] for block in blocks])
        self.conv1 = pack.conv([block.in_layers[2] for block in blocks])
        self.norm2 = pack.group_norm([block.out_layers[0] for block in blocks])
        skips = [block.skip_connection for block in blocks]
        tails = None if isinstance(skips[0], nn.Identity) else skips
        self.conv2 = pack.conv([block.out_layers[3] for block in blocks], tails)

    @property
    def out_channels(self) -> int:
        return self.conv2.out_channels

    def __call__(
        self, run: Fused, x: torch.Tensor, given: Conditioning, out: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        shift = given.time_bias[0, self.time.start :]
        h = run.matmul(run.group_norm(x, self.norm1), self.conv1, shift=(shift, self.time.step))
        h = run.group_norm(h, self.norm2)
        if self.conv2.tail:
            return run.matmul(h, self.conv2, out, tail=x)
        return run.matmul(h, self.conv2, out, residual=x)


class FusedTransformer:
    """A spatial transformer; `keys` say where the blocks' keys lie in the packed row, their values follow."""

    def __init__(self, pack: Packer, modules: Sequence[SpatialTransformer], keys: Sequence[Part]) -> None:
        self.norm = pack.group_norm([module.norm for module in modules])
        self.proj_in = pack.conv([module.proj_in for module in modules])
        self.proj_out = pack.conv([module.proj_out for module in modules])
        layers = zip(*(module.transformer_blocks for module in modules))
        self.blocks = [FusedTransformerBlock(pack, blocks, part) for blocks, part in zip(layers, keys)]

    @property
    def out_channels(self) -> int:
        return self.proj_out.out_channels

    def __call__(
        self, run: Fused, x: torch.Tensor, given: Conditioning, out: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        h = run.matmul(run.group_norm(x, self.norm, "none"), self.proj_in)
        for block in self.blocks:
            h = block(run, h, given)
        return run.matmul(h, self.proj_out, out, residual=x)


class FusedTransformerBlock:
    """Self-attention with one product for query, key and value, cross-attention, and the gated feed-forward."""

    def __init__(self, pack: Packer, blocks: Sequence[BasicTransformerBlock], keys: Part) -> None:
        self.keys = keys
        self.heads = blocks[0].attn1.heads
        self.norms = [
            pack.layer_norm([getattr(block, name) for block in blocks]) for name in ("norm1", "norm2", "norm3")
        ]
        self.qkv = pack.side_by_side([(b.attn1.to_q, b.attn1.to_k, b.attn1.to_v) for b in blocks])
        self.out1 = pack.linear([block.attn1.to_out[0] for block in blocks])
        self.q2 = pack.linear([block.attn2.to_q for block in blocks])
        self.out2 = pack.linear([block.attn2.to_out[0] for block in blocks])
        self.gated = pack.linear([block.ff.net[0].proj for block in blocks], gated=True)
        self.out3 = pack.linear([block.ff.net[2] for block in blocks])

    def __call__(self, run: Fused, h: torch.Tensor, given: Conditioning) -> torch.Tensor:
        """Of (nets, B, H, W, C) maps, B samples or twice that; the result always has both halves of guidance."""
        channels = h.shape[-1]
        qkv = run.matmul(run.layer_norm(h, self.norms[0]), self.qkv)
        rows = qkv.flatten(2, 3)
        q, k, v = qkv[..., :channels], rows[..., channels : 2 * channels], rows[..., 2 * channels :]
        h = run.matmul(run.attention(q, k, v, self.heads), self.out1, residual=h)
        q = run.matmul(run.layer_norm(h, self.norms[1]), self.q2)
        k, v = self._text(given.keys_values, h.shape[0], channels)
        h = run.matmul(run.attention(q, k, v, self.heads, images=given.images), self.out2, residual=h)
        gated = run.matmul(run.layer_norm(h, self.norms[2]), self.gated)
        return run.matmul(gated, self.out3, residual=h)

    def _text(self, packed: torch.Tensor, nets: int, channels: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (nets, 2, L, C) views of the packed (2, L, K)."""
        size = (nets, *packed.shape[:2], channels)
        stride = (self.keys.step, *packed.stride())
        start = packed.storage_offset() + self.keys.start
        return packed.as_strided(size, stride, start), packed.as_strided(size, stride, start + channels)


class _Parts:
    """Hands out the parts of a packed row in order."""

    def __init__(self, widths: Sequence[int], step: int) -> None:
        self._widths = list(widths)
        self._step = step
        self._next = 0
        self._start = 0

    def take(self) -> Part:
        part = Part(self._start, self._step)
        self._start += self._widths[self._next]
        self._next += 1
        return part


class FusedStep:
    """The step graph: ControlNet, UNet, guidance and the sampler's update.

    Parameters
    ----------
    model : ControlLDM
    run : Fused
    device : str
    apart : Fused, optional
        Launches on a stream of its own: nothing else may use it while a step runs. Default: one without tuning.
    ranges : mapping of modules to floats, optional
        Of `fp8.input_ranges`: the large products are of FP8.
    """

    def __init__(
        self,
        model: ControlLDM,
        run: Fused,
        device: str,
        apart: Optional[Fused] = None,
        ranges: Optional[Ranges] = None,
    ) -> None:
        self.run = run
        self.apart = apart or Fused(run.tuning, run.dtype)
        self._stream: Optional[torch.cuda.Stream] = None
        pack = Packer(device, run.dtype, ranges)
        config, unet, control = model.config.unet, model.unet, model.control_model
        times = _Parts(time_bias_widths(config, True), sum(time_bias_widths(config, True)))
        pairs = [2 * width for width in key_value_widths(config, True)]
        keys = _Parts(pairs, sum(pairs))
        self.first = pack.conv([unet.input_blocks[0][0], control.input_blocks[0][0]])
        encoders = list(zip(unet.input_blocks, control.input_blocks))[1:] + [(unet.middle_block, control.middle_block)]
        self.encoder = [self._block(pack, list(zip(*blocks)), times, keys) for blocks in encoders]
        zero_convs = [*control.zero_convs, control.middle_block_out]
        self.zero_convs = [pack.conv([sequence[0]]) for sequence in zero_convs]
        self.decoder = [self._block(pack, [(layer,) for layer in block], times, keys) for block in unet.output_blocks]
        self.norm = pack.group_norm([unet.out[0]])
        self.last = pack.conv([unet.out[2]])

    @staticmethod
    def _block(pack: Packer, layers: Sequence[Sequence[nn.Module]], times: _Parts, keys: _Parts) -> List[Any]:
        made: List[Any] = []
        for nets in layers:
            layer = nets[0]
            if isinstance(layer, ResBlock):
                made.append(FusedResBlock(pack, nets, times.take()))
            elif isinstance(layer, SpatialTransformer):
                made.append(FusedTransformer(pack, nets, [keys.take() for _ in layer.transformer_blocks]))
            elif isinstance(layer, (Downsample, Upsample)):
                up = isinstance(layer, Upsample)
                made.append(_Resize(pack.up_conv(layer.conv) if up else pack.conv([net.op for net in nets])))
            else:
                raise TypeError(f"no fused form of {type(layer).__name__}")
        return made

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        """Tensors by the names of the step graph."""
        run, samples = self.run, inputs["latent"].shape[0]
        given = Conditioning(inputs["keys_values"], inputs["time_bias"], 2 * samples)
        # The halves of guidance differ in the text alone: up to the first cross-attention one of them will do.
        h = run.first_conv(inputs["latent"], self.first, samples, added=inputs["hint_features"])
        skips = _Skips(self, inputs["control_scales"], given.images)
        for block in self.encoder:
            skips.add(h)
            for layer in block:
                h = layer(run, h, given)
        places = skips.join(h)
        for i, block in enumerate(self.decoder):
            h = places[i]
            for layer in block[:-1]:
                h = layer(run, h, given)
            out = places[i + 1][..., : block[-1].out_channels] if i + 1 < len(places) else None
            h = block[-1](run, h, given, out)
        h = run.group_norm(h, self.norm)
        predicted = torch.empty(*h.shape[:4], self.last.out_channels, dtype=torch.float32, device=h.device)
        run.guide(
            run.matmul(h, self.last, predicted),
            inputs["latent"],
            inputs["noise_last"],
            inputs["guidance_scale"],
            inputs["coefficients"],
            outputs["latent_next"],
            outputs["noise"],
        )

    @contextlib.contextmanager
    def aside(self, x: torch.Tensor) -> Iterator[None]:
        """Inside, launches go to a second stream, behind all that the first has now."""
        if not x.is_cuda:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self, x: torch.Tensor) -> None:
        """What follows on the first stream waits for the second."""
        if x.is_cuda and self._stream is not None:
            torch.cuda.current_stream(x.device).wait_stream(self._stream)


class _Skips:
    """Puts the encoder's maps and the ControlNet's residuals where the decoder's blocks read them.

    Small products that nothing waits for until the decoder begins: they run beside the encoder.
    """

    def __init__(self, step: FusedStep, scales: torch.Tensor, images: int) -> None:
        self._step = step
        self._scales = scales
        self._images = images
        self._maps: List[torch.Tensor] = []  # kept until both streams have met
        self._places: List[torch.Tensor] = []

    def add(self, stacked: torch.Tensor) -> None:
        """The next map of both encoders, up to those of the middle block, which takes no part."""
        step, nth = self._step, len(self._maps)
        block = len(step.decoder) - 1 - nth
        before = (step.decoder[block - 1] if block > 0 else step.encoder[-1])[-1].out_channels
        _, _, height, width, channels = stacked.shape
        place = step.run.empty(stacked, 1, self._images, height, width, before + channels)
        with step.aside(stacked):
            self._control(stacked, nth, place[..., before:])
        self._maps.append(stacked)
        self._places.append(place)

    def join(self, middle: torch.Tensor) -> List[torch.Tensor]:
        """The inputs of the decoder's blocks, the first with the map of the middle block."""
        self._step.join(middle)
        places = self._places[::-1]
        # Not with programmatic launch, which is for a kernel with one before it, and this one follows two streams.
        self._control(middle, len(self._maps), places[0][..., : middle.shape[-1]])
        return places

    def _control(self, stacked: torch.Tensor, nth: int, out: torch.Tensor) -> None:
        """The UNet's map plus the ControlNet's residual, in both halves of guidance: they have their own scales."""
        step, scales, count = self._step, self._scales, stacked.shape[1]
        parts = out.shape[1] // count  # two where the map is one for both halves
        for half in range(parts):
            rows = scales[half : half + 1] if parts > 1 else scales
            images = out[:, half * count : (half + 1) * count]
            step.apart.matmul(stacked[1:], step.zero_convs[nth], images, residual=stacked[:1], scale=rows[:, nth])


class _Resize:
    """A strided convolution, or one of a map whose pixels count four times."""

    def __init__(self, conv: Weights) -> None:
        self.conv = conv

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def __call__(
        self, run: Fused, x: torch.Tensor, given: Optional[Conditioning] = None, out: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        return run.matmul(x, self.conv, out)


class FusedText:
    """The text graph: CLIP's text encoder, then all keys and values in one product."""

    def __init__(self, model: ControlLDM, run: Fused, device: str) -> None:
        self.run = run
        pack = Packer(device, run.dtype)
        text = model.text_model
        self.heads = text.config.heads
        # Rounded on the device, which is quicker at it.
        self.tokens = text.embeddings.token_embedding.weight.detach().to(device).to(run.dtype)
        self.positions = text.embeddings.position_embedding.weight.detach().to(device).to(run.dtype)
        self.layers = [
            (
                pack.layer_norm([layer.layer_norm1]),
                pack.side_by_side([(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]),
                pack.linear([layer.self_attn.out_proj]),
                pack.layer_norm([layer.layer_norm2]),
                pack.linear([layer.mlp.fc1]),
                pack.linear([layer.mlp.fc2]),
            )
            for layer in text.encoder.layers
        ]
        self.norm = pack.layer_norm([text.final_layer_norm])
        blocks = model.unet.transformer_blocks() + model.control_model.transformer_blocks()
        self.projection = pack.side_by_side([[p for b in blocks for p in (b.attn2.to_k, b.attn2.to_v)]])

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        run = self.run
        h = run.embed(inputs["token_ids"], self.tokens, self.positions)
        channels = h.shape[-1]
        for norm1, qkv_weights, out_weights, norm2, up, down in self.layers:
            qkv = run.matmul(run.layer_norm(h, norm1), qkv_weights)
            rows = qkv.flatten(2, 3)
            q, k, v = qkv[..., :channels], rows[..., channels : 2 * channels], rows[..., 2 * channels :]
            h = run.matmul(run.attention(q, k, v, self.heads, causal=True), out_weights, residual=h)
            h = run.matmul(run.matmul(run.layer_norm(h, norm2), up, act="quick_gelu"), down, residual=h)
        packed = outputs["keys_values"]
        run.matmul(run.layer_norm(h, self.norm), self.projection, packed[None, :, None])


class FusedTime:
    """The time graph: all ResBlocks' projections of a timestep as one product a network, by PyTorch in FP32.

    What is projected is the same for every picture and there are a thousand timesteps: it is made of all of them once,
    and takes no more memory than the layers that it is made by.
    """

    def __init__(self, model: ControlLDM, device: str) -> None:
        pack = Packer(device, torch.float32)
        timesteps = torch.arange(model.config.schedule.train_steps, device=device)
        embedding = timestep_embedding(timesteps, model.config.unet.model_channels)
        networks = (model.unet, model.control_model)
        with torch.no_grad(), exact_fp32():
            hidden = [F.silu(copy.deepcopy(network.time_embed).to(device)(embedding)) for network in networks]
        self.hidden = torch.stack(hidden)
        layers = [[block.emb_layers[1] for block in network.res_blocks()] for network in networks]
        self.projections = [pack.side_by_side([of_network]) for of_network in layers]

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        """Timesteps are those of the model's schedule, 0 .. train_steps - 1."""
        hidden = self.hidden.index_select(1, inputs["timesteps"])
        places = outputs["time_biases"].split([weights.out_channels for weights in self.projections], dim=1)
        with exact_fp32():
            for place, rows, weights in zip(places, hidden, self.projections):
                place.copy_(F.linear(rows, weights.matrix[0], weights.bias[0]))


class FusedHint:
    """The hint graph: the canny map's features."""

    def __init__(self, model: ControlLDM, run: Fused, device: str) -> None:
        self.run = run
        pack = Packer(device, run.dtype)
        convs = [layer for layer in model.control_model.input_hint_block if isinstance(layer, nn.Conv2d)]
        self.convs = [pack.conv([conv]) for conv in convs]

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        run, canny = self.run, inputs["canny"]
        h = run.first_conv(canny.expand(1, 3, *canny.shape), self.convs[0], 1, factor=1 / 255, act="silu")
        for conv in self.convs[1:-1]:
            h = run.matmul(h, conv, act="silu")
        # (1, C, h, w) is asked for: copied, a megabyte once an image.
        outputs["hint_features"].copy_(run.matmul(h, self.convs[-1])[0].permute(0, 3, 1, 2))


class FusedDecode:
    """The decode graph: the autoencoder's decoder, to uint8 pixels; `ranges` as the step's."""

    def __init__(self, model: ControlLDM, run: Fused, device: str, ranges: Optional[Ranges] = None) -> None:
        self.run = run
        pack = Packer(device, run.dtype, ranges)
        autoencoder = model.first_stage_model
        decoder = autoencoder.decoder
        self.factor = 1.0 / autoencoder.config.scale_factor
        post = autoencoder.post_quant_conv
        self.post_weight = (post.weight.detach().flatten(1).float() * self.factor).to(device)
        self.post_bias = post.bias.detach().float().to(device)
        self.first = pack.conv([decoder.conv_in])
        self.middle1 = _Resnet(pack, decoder.mid.block_1)
        self.attention = _WideAttention(pack, decoder.mid.attn_1)
        self.middle2 = _Resnet(pack, decoder.mid.block_2)
        self.levels: List[List[Any]] = []
        for level in reversed(decoder.up):
            layers: List[Any] = [_Resnet(pack, block) for block in level.block]
            if hasattr(level, "upsample"):
                layers.append(_Resize(pack.up_conv(level.upsample.conv)))
            self.levels.append(layers)
        self.norm = pack.group_norm([decoder.norm_out])
        self.last = pack.conv([decoder.conv_out])

    def __call__(self, inputs: Tensors, outputs: Tensors) -> None:
        run, latent = self.run, inputs["latent"]
        # Four numbers a pixel: a product too small for a kernel of its own. Padding happens behind it, as in the model.
        # Not where shapes alone are asked for: PyTorch imports its compiler for arithmetic on them, a second or two.
        z = latent
        if not latent.is_meta:
            z = torch.einsum("oc,nchw->nohw", self.post_weight, latent) + self.post_bias[:, None, None]
        h = run.first_conv(z, self.first, latent.shape[0])
        h = self.middle2(run, self.attention(run, self.middle1(run, h)))
        for level in self.levels:
            for layer in level:
                h = layer(run, h)
        run.pixels(run.group_norm(h, self.norm), self.last, outputs["image"])


class _Resnet:
    """A residual block of the autoencoder."""

    def __init__(self, pack: Packer, block: ResnetBlock) -> None:
        self.norm1 = pack.group_norm([block.norm1])
        self.conv1 = pack.conv([block.conv1])
        self.norm2 = pack.group_norm([block.norm2])
        shortcut = getattr(block, "nin_shortcut", None)
        self.conv2 = pack.conv([block.conv2], None if shortcut is None else [shortcut])

    def __call__(self, run: Fused, x: torch.Tensor) -> torch.Tensor:
        h = run.matmul(run.group_norm(x, self.norm1), self.conv1)
        h = run.group_norm(h, self.norm2)
        if self.conv2.tail:
            return run.matmul(h, self.conv2, tail=x)
        return run.matmul(h, self.conv2, residual=x)


class _WideAttention:
    """One head as wide as the channels: too wide for a fused kernel, so the scores are written out, an image at a time.

    The value's bias comes behind the weighted sum, which changes nothing: the weights of a row sum to 1.
    """

    def __init__(self, pack: Packer, block: AttnBlock) -> None:
        channels = block.q.in_channels
        self.norm = pack.group_norm([block.norm])
        self.qk = pack.side_by_side([(block.q, block.k)], (channels**-0.5, 1.0))
        self.value = pack.conv([block.v])
        self.out = pack.conv([block.proj_out])

    def __call__(self, run: Fused, x: torch.Tensor) -> torch.Tensor:
        _, batch, height, width, channels = x.shape
        h = run.group_norm(x, self.norm, "none")
        qk = run.matmul(h, self.qk)
        mixed = run.empty(x, *x.shape)
        values = self.value.matrix[:, None, None]  # (1, 1, 1, C, C): the value's transpose is W h^T
        for i in range(batch):
            rows = h[:, i].flatten(1, 2)
            pairs = qk[:, i : i + 1]
            keys = pairs.flatten(1, 3)[..., channels:]
            scores = run.softmax(
                run.matmul(pairs[..., :channels], Weights(keys, static=False)).flatten(1, 3)[:, None, None]
            )
            transposed = run.matmul(values, Weights(rows, static=False))
            weights = Weights(transposed[:, 0, 0], self.value.bias, static=False)
            run.matmul(scores, weights, mixed[:, i : i + 1].flatten(2, 3)[:, :, None])
        return run.matmul(mixed, self.out, residual=x)
