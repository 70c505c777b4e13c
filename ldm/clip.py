"""The text encoder of CLIP (arXiv:2103.00020), as Stable Diffusion 1.5 uses it."""

from __future__ import annotations

import torch
from torch import nn

from ldm.attention import split_heads
from ldm.layout import TextConfig
from ldm.norm import LayerNorm

# Added to the scores of later tokens. Finite, because minus infinity turns an FP16 softmax into NaN in some runtimes,
# and far beyond any score: exp(-1e4) is exactly 0 in FP32.
MASKED = -1.0e4


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 x)`, the GELU approximation that CLIP was trained with (arXiv:1606.08415, sec. 2)."""
    return x * torch.sigmoid(1.702 * x)


class CLIPAttention(nn.Module):
    """Self-attention over (B, L, width) features; the (L, L) mask is added to its scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        head_dim = x.shape[-1] // self.heads
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        scores = torch.matmul(q * head_dim**-0.5, k.transpose(-1, -2)) + mask
        return self.out_proj(torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """(B, L, width) to (B, L, width) through a hidden layer with quick GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Attention and MLP over (B, L, width) features, each behind a layer norm and a residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.width, config.heads)
        self.layer_norm1 = LayerNorm(config.width)
        self.mlp = CLIPMLP(config.width, config.mlp_width)
        self.layer_norm2 = LayerNorm(config.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """(B, L) token ids to the (B, L, width) sums of token and position embedding."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CLIPEncoder(nn.Module):
    """The layers one after the other: (B, L, width) to (B, L, width), with an (L, L) mask."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class CLIPTextModel(nn.Module):
    """Checkpoint prefix: `cond_stage_model.transformer.text_model`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids to (B, L, width) features after the final layer norm; L at most `max_length`."""
        x = self.embeddings(ids)
        length = ids.shape[1]
        # Made in FP32, in which every runtime can fold it into a constant.
        mask = torch.full((length, length), MASKED, device=x.device).triu(1).to(x.dtype)
        return self.final_layer_norm(self.encoder(x, mask))
