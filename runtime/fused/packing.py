"""A ControlLDM's weights in the layouts of the fused kernels; of several nets, the UNet's come first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import nn

from ldm.norm import GroupNorm, LayerNorm
from runtime.fused.fp8 import Ranges, factors_of, quantise, worthwhile
from runtime.fused.ops import Affine, Weights

# Writes the matrix of a net into the (rows, K) tensor that it is given, of any type: no second copy is made of it.
Write = Callable[[int, torch.Tensor], None]


class Packer:
    """Packs modules for one device and type.

    Parameters
    ----------
    device : str
    dtype : torch.dtype
        float16 or bfloat16, or float32 for PyTorch's products; biases and norms stay FP32.
    ranges : mapping of modules to floats, optional
        Largest magnitudes of their inputs: layers that are there, and large enough, are packed in FP8.
    """

    def __init__(self, device: str, dtype: torch.dtype, ranges: Optional[Ranges] = None) -> None:
        self.device = device
        self.dtype = dtype
        self.ranges = ranges

    def _weights(
        self,
        nets: int,
        shape: Tuple[int, int],
        write: Write,
        bias: Optional[torch.Tensor],
        layers: Sequence[nn.Module],
        tails: Optional[Sequence[nn.Module]] = None,
        **options: Any,
    ) -> Weights:
        """In FP8 where that is wanted; the layers are those of all nets that have one input."""
        plain = Weights(torch.empty(nets, *shape, device="meta"), bias, **options)
        factors = factors_of(self.ranges, layers, tails)
        if factors is None or not worthwhile(plain.out_channels, plain.in_channels, plain.taps, plain.tail):
            return replace(plain, matrix=self._written(nets, shape, self.dtype, write))
        wide = self._written(nets, shape, torch.float32, write)
        matrix, scaling = quantise(wide, plain.tail, *factors)
        return replace(plain, matrix=matrix, fp8=scaling)

    def _written(self, nets: int, shape: Tuple[int, int], dtype: torch.dtype, write: Write) -> torch.Tensor:
        matrices = torch.empty(nets, *shape, dtype=dtype, device=self.device)
        for net, matrix in enumerate(matrices):
            write(net, matrix)
        return matrices

    def _parameter(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter on the device as it is, so that rounding it and putting it in order are the device's work."""
        return parameter.detach().to(self.device)

    def vector(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """(nets, N) float32."""
        return torch.stack([v.detach().to(self.device, torch.float32) for v in vectors]).contiguous()

    def conv(self, convs: Sequence[nn.Conv2d], tails: Optional[Sequence[nn.Conv2d]] = None) -> Weights:
        """1x1 and padded 3x3 convolutions; the 1x1 convolutions `tails`, of another map, are added to them."""
        first = convs[0]
        taps = first.kernel_size[0] * first.kernel_size[1]
        width = taps * first.in_channels
        tail = 0 if tails is None else tails[0].in_channels

        def write(net: int, matrix: torch.Tensor) -> None:
            _write_taps(matrix[:, :width], self._parameter(convs[net].weight))
            if tails is not None:
                _write_taps(matrix[:, width:], self._parameter(tails[net].weight))

        biases = [conv.bias for conv in convs]
        if tails is not None:
            biases = [bias + added.bias for bias, added in zip(biases, tails)]
        return self._weights(
            len(convs),
            (first.out_channels, width + tail),
            write,
            self.vector(biases),
            convs,
            tails,
            taps=taps,
            tail=tail,
            stride=first.stride[0],
        )

    def up_conv(self, conv: nn.Conv2d) -> Weights:
        """A padded 3x3 convolution of a map whose pixels count four times each, as four 2x2 convolutions of the map.

        Of the three taps in a row, two fall on one input pixel; which two depends on the output pixel's place. Their
        weights are added in FP32.
        """
        weight = self._parameter(conv.weight).float()
        pairs = ((0, 1, 1), (0, 0, 1))  # for an even and an odd place: which of two input pixels each tap falls on

        def write(phase: int, matrix: torch.Tensor) -> None:
            rows, cols = pairs[phase // 2], pairs[phase % 2]
            summed = weight.new_zeros(*weight.shape[:2], 2, 2)
            for y in range(3):
                for x in range(3):
                    summed[:, :, rows[y], cols[x]] += weight[:, :, y, x]
            _write_taps(matrix, summed)

        shape = (conv.out_channels, 4 * conv.in_channels)
        return self._weights(4, shape, write, self.vector([conv.bias] * 4), [conv], taps=4)

    def linear(self, layers: Sequence[nn.Linear], gated: bool = False) -> Weights:
        def write(net: int, matrix: torch.Tensor) -> None:
            matrix.copy_(self._parameter(layers[net].weight))

        first = layers[0]
        biases = None if first.bias is None else self.vector([layer.bias for layer in layers])
        return self._weights(len(layers), (first.out_features, first.in_features), write, biases, layers, gated=gated)

    def side_by_side(self, layers: Sequence[Sequence[nn.Module]], scales: Optional[Sequence[float]] = None) -> Weights:
        """Layers of one input as one: for each net a sequence of them, their outputs in order, each times its scale."""
        factors = [1.0] * len(layers[0]) if scales is None else list(scales)
        heights = [len(layer.weight) for layer in layers[0]]

        def write(net: int, matrix: torch.Tensor) -> None:
            for rows, layer, factor in zip(matrix.split(heights), layers[net], factors):
                weight = self._parameter(layer.weight).flatten(1)  # of a linear layer or a 1x1 convolution
                rows.copy_(weight if factor == 1 else weight * factor)

        biases = None
        if layers[0][0].bias is not None:
            biases = self.vector(
                [torch.cat([layer.bias * factor for layer, factor in zip(parts, factors)]) for parts in layers]
            )
        shape = (sum(heights), layers[0][0].weight[0].numel())
        return self._weights(len(layers), shape, write, biases, [layer for parts in layers for layer in parts])

    def group_norm(self, norms: Sequence[GroupNorm]) -> Affine:
        gamma, beta = self._affine(norms)
        return Affine(gamma, beta, norms[0].eps, norms[0].num_groups)

    def layer_norm(self, norms: Sequence[LayerNorm]) -> Affine:
        gamma, beta = self._affine(norms)
        return Affine(gamma, beta, norms[0].eps)

    def _affine(self, norms: Sequence[nn.Module]) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.vector([norm.weight for norm in norms]), self.vector([norm.bias for norm in norms])


def _write_taps(matrix: torch.Tensor, weight: torch.Tensor) -> None:
    """A convolution's (N, C, kh, kw) into (N, kh * kw * C): the taps outermost, as channels-last maps are read."""
    channels, *taps = weight.shape[1:]
    matrix.unflatten(1, (*taps, channels)).copy_(weight.permute(0, 2, 3, 1))
