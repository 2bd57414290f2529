"""The text transformer (sec. 4.1): bidirectional attention over the caption's tokens.

Padding positions have learnt embeddings of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.models import TextConfig
from .layers import attend


class TextBlock(nn.Module):
    """Attention, then a GELU MLP of four times the width, each pre-norm and with a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)  # per head: query, key, value
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, K, W)
        b, k, w = x.shape
        query, key, value = (
            self.qkv(self.attention_norm(x)).view(b, k, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        )
        x = x + self.out(attend(query, key, value).transpose(1, 2).reshape(b, k, w))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class TextTransformer(nn.Module):
    """Tokens (B, K) and mask -> the sequence (B, K, W) and its pooled projection (B, `pooled`)."""

    def __init__(self, config: TextConfig, pooled: int):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.padding = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.pool = nn.Linear(config.width, pooled)

    def forward(
        self, tokens: Tensor, mask: Tensor, checkpointing: bool = False
    ) -> tuple[Tensor, Tensor]:
        x = torch.where(mask[..., None], self.token(tokens) + self.position, self.padding)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        x = self.norm(x)
        # Pool at the last position, which is padding except for the longest captions.
        return x, self.pool(x[:, -1])
