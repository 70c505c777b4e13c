"""Normalisation with FP32 statistics whatever the type of the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics are FP32.

    PyTorch's own kernels accumulate half precision in FP32, so a module wholly in one type runs them. Where the
    parameters were left in FP32 beside half-precision data, as the deployable FP16 graphs have it, the casts are
    written out: a runtime that follows the graph's types to the letter then does the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        y = F.group_norm(x.to(self.weight.dtype), self.num_groups, self.weight, self.bias, self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis; types as in `GroupNorm`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        y = F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.to(x.dtype)
