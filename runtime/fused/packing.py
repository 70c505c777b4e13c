"""A ControlLDM's weights in the layouts of the fused kernels; of several nets, the UNet's come first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import nn

from ldm.norm import GroupNorm, LayerNorm
from runtime.fused.fp8 import Ranges, factors_of, quantise, worthwhile
from runtime.fused.ops import Affine, Weights


class Packer:
    """Packs modules for one device and type.

    Parameters
    ----------
    device : str
    dtype : torch.dtype
        float16 or bfloat16; biases and norms stay FP32.
    ranges : mapping of modules to floats, optional
        Largest magnitudes of their inputs: layers that are there, and large enough, are packed in FP8.
    """

    def __init__(self, device: str, dtype: torch.dtype, ranges: Optional[Ranges] = None) -> None:
        self.device = device
        self.dtype = dtype
        self.ranges = ranges

    def _weights(
        self,
        matrices: Sequence[torch.Tensor],
        bias: Optional[torch.Tensor],
        layers: Sequence[nn.Module],
        tails: Optional[Sequence[nn.Module]] = None,
        **options: Any,
    ) -> Weights:
        """In FP8 where that is wanted; the layers are those of all nets that have one input."""
        plain = Weights(torch.empty(len(matrices), *matrices[0].shape, device="meta"), bias, **options)
        factors = factors_of(self.ranges, layers, tails)
        if factors is None or not worthwhile(plain.out_channels, plain.in_channels, plain.taps, plain.tail):
            return replace(plain, matrix=self._matrix(matrices))
        wide = torch.stack([matrix.detach().to(self.device, torch.float32) for matrix in matrices])
        matrix, scaling = quantise(wide, plain.tail, *factors)
        return replace(plain, matrix=matrix, fp8=scaling)

    def _matrix(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack([m.detach().to(self.device, self.dtype) for m in matrices]).contiguous()

    def vector(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """(nets, N) float32."""
        return torch.stack([v.detach().to(self.device, torch.float32) for v in vectors]).contiguous()

    def conv(self, convs: Sequence[nn.Conv2d], tails: Optional[Sequence[nn.Conv2d]] = None) -> Weights:
        """1x1 and padded 3x3 convolutions; the 1x1 convolutions `tails`, of another map, are added to them."""
        matrices = [conv_matrix(conv.weight) for conv in convs]
        biases = [conv.bias for conv in convs]
        if tails is not None:
            matrices = [torch.cat([m, conv_matrix(tail.weight)], dim=1) for m, tail in zip(matrices, tails)]
            biases = [bias + tail.bias for bias, tail in zip(biases, tails)]
        first = convs[0]
        return self._weights(
            matrices,
            self.vector(biases),
            convs,
            tails,
            taps=first.kernel_size[0] * first.kernel_size[1],
            tail=0 if tails is None else tails[0].in_channels,
            stride=first.stride[0],
        )

    def up_conv(self, conv: nn.Conv2d) -> Weights:
        """A padded 3x3 convolution of a map whose pixels count four times each, as four 2x2 convolutions of the map.

        Of the three taps in a row, two fall on one input pixel; which two depends on the output pixel's place. Their
        weights are added in FP32.
        """
        weight = conv.weight.detach().float()
        pairs = ((0, 1, 1), (0, 0, 1))  # for an even and an odd place: which of two input pixels each tap falls on
        phases = []
        for rows in pairs:
            for cols in pairs:
                summed = weight.new_zeros(*weight.shape[:2], 2, 2)
                for y in range(3):
                    for x in range(3):
                        summed[:, :, rows[y], cols[x]] += weight[:, :, y, x]
                phases.append(conv_matrix(summed))
        return self._weights(phases, self.vector([conv.bias] * 4), [conv], taps=4)

    def linear(self, layers: Sequence[nn.Linear], gated: bool = False) -> Weights:
        biases = None if layers[0].bias is None else self.vector([layer.bias for layer in layers])
        return self._weights([layer.weight for layer in layers], biases, layers, gated=gated)

    def side_by_side(self, layers: Sequence[Sequence[nn.Module]], scales: Optional[Sequence[float]] = None) -> Weights:
        """Layers of one input as one: for each net a sequence of them, their outputs in order, each times its scale."""
        factors = [1.0] * len(layers[0]) if scales is None else list(scales)
        matrices = [
            torch.cat([_rows(layer.weight) * factor for layer, factor in zip(parts, factors)]) for parts in layers
        ]
        biases = None
        if layers[0][0].bias is not None:
            biases = self.vector(
                [torch.cat([layer.bias * factor for layer, factor in zip(parts, factors)]) for parts in layers]
            )
        return self._weights(matrices, biases, [layer for parts in layers for layer in parts])

    def group_norm(self, norms: Sequence[GroupNorm]) -> Affine:
        gamma, beta = self._affine(norms)
        return Affine(gamma, beta, norms[0].eps, norms[0].num_groups)

    def layer_norm(self, norms: Sequence[LayerNorm]) -> Affine:
        gamma, beta = self._affine(norms)
        return Affine(gamma, beta, norms[0].eps)

    def _affine(self, norms: Sequence[nn.Module]) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.vector([norm.weight for norm in norms]), self.vector([norm.bias for norm in norms])


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) from a linear layer or a 1x1 convolution."""
    return weight.flatten(1)


def conv_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(N, C, kh, kw) to (N, kh * kw * C): the taps outermost, as channels-last maps are read."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1)
