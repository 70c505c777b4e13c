"""Attention, feed-forward and the spatial transformer of Stable Diffusion."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ldm.norm import GroupNorm, LayerNorm


class Conditioning(NamedTuple):
    """What the blocks of a UNet take besides the image, one entry a block in the order of execution.

    Attributes
    ----------
    time_biases : sequence of (B or 1, C_i) tensors
        Added to each ResBlock's hidden channels: its `emb_layers` applied to the timestep embedding.
    keys_values : sequence of pairs of (B, L, C_j) tensors
        Keys and values of each cross-attention, projected from the text.
    """

    time_biases: Sequence[torch.Tensor]
    keys_values: Sequence[Tuple[torch.Tensor, torch.Tensor]]


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, L, C) to (B, heads, L, C / heads)."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head scaled dot-product attention (arXiv:1706.03762, eq. 1).

    Parameters
    ----------
    query : (B, L, C) tensor
    key, value : (B, M, C) tensors
    heads : int
        Divides C.

    Returns
    -------
    (B, L, C) tensor
    """
    head_dim = query.shape[-1] // heads
    q, k, v = (split_heads(t, heads) for t in (query, key, value))
    if torch.onnx.is_in_onnx_export():
        # Written out: older exporters do not know the fused function, and TensorRT fuses this pattern. The queries
        # are scaled first so that the products stay within FP16's range.
        scores = torch.matmul(q * head_dim**-0.5, k.transpose(-1, -2))
        out = torch.matmul(scores.softmax(dim=-1), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention, or cross-attention where keys and values are given."""

    def __init__(self, query_dim: int, heads: int, context_dim: Optional[int] = None) -> None:
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Identity())

    def project(self, context: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a (B, L, context_dim) context, each (B, L, query_dim)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: torch.Tensor, key_value: Optional[Tuple[torch.Tensor, torch.Tensor]] = None) -> torch.Tensor:
        key, value = self.project(x) if key_value is None else key_value
        return self.to_out(attend(self.to_q(x), key, value, self.heads))


class GEGLU(nn.Module):
    """Linear layer whose first half is multiplied by the GELU of its second (arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, L, dim) to (B, L, dim) through a GEGLU of `mult` times the width."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer norm and a residual."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)
        self.index = -1  # place in Conditioning.keys_values, set by the network that holds the block

    def forward(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), conditioning.keys_values[self.index])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a (B, C, H, W) map."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, conditioning)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))
