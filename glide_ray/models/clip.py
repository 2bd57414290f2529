"""Noised CLIP (sec. 4.4): a text tower g(c) and an image tower f(x_t, t) for noised images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.models import ClipConfig
from ..tensors import ClipOutput
from .layers import attend

# Statistics of CLIP's training pixels, in 8 bits (Radford et al. 2021, release).
CHANNEL_MEANS = (122.77093945, 116.74601272, 104.09373519)
CHANNEL_STDS = (68.50053285, 66.63215831, 70.32316309)
MAX_SCALE = 100.0


class Block(nn.Module):
    """Attention, then a GELU MLP of four times the width, each pre-norm and with a residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        # No bias: it would cancel in the softmax.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, K, W)
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = attend(query, key, value, causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


def _through(blocks: nn.ModuleList, h: Tensor, causal: bool, checkpointing: bool) -> Tensor:
    for block in blocks:
        h = checkpoint(block, h, causal, use_reentrant=False) if checkpointing else block(h, causal)
    return h


class ImageTower(nn.Module):
    """A transformer over a timestep token followed by the patches.

    The embedding is read at the timestep token.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        width = config.image_width
        self.image_size = config.image_size
        self.timestep = nn.Embedding(config.timesteps, width)
        self.patch = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.position = nn.Parameter(
            torch.empty(1 + (config.image_size // config.patch_size) ** 2, width)
        )
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, config.image_heads) for _ in range(config.image_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.embedding, bias=False)

    def forward(self, x: Tensor, timestep: Tensor, checkpointing: bool = False) -> Tensor:
        """x (B, 3, H, W) on the diffusion process's scale, timestep (B,) -> (B, E).

        Raises ValueError for images of another size.
        """
        if x.shape[-1] != self.image_size:
            raise ValueError(
                f"this CLIP reads images of {self.image_size} pixels, not {x.shape[-1]}"
            )
        mean, std = (
            x.new_tensor(values).reshape(1, 3, 1, 1) for values in (CHANNEL_MEANS, CHANNEL_STDS)
        )
        pixels = (((x + 1) * 127.5 - mean) / std).to(self.patch.weight.dtype)
        patches = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, P, W)
        h = self.norm_in(
            torch.cat([self.timestep(timestep)[:, None], patches], dim=1) + self.position
        )
        h = _through(self.blocks, h, False, checkpointing)
        return self.project(self.norm_out(h[:, 0]))


class TextTower(nn.Module):
    """A causal transformer; the embedding is read at the caption's last token."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.text_width)
        self.position = nn.Parameter(torch.empty(config.context, config.text_width))
        self.blocks = nn.ModuleList(
            Block(config.text_width, config.text_heads) for _ in range(config.text_layers)
        )
        self.norm_out = nn.LayerNorm(config.text_width)
        self.project = nn.Linear(config.text_width, config.embedding, bias=False)

    def forward(self, tokens: Tensor, lengths: Tensor, checkpointing: bool = False) -> Tensor:
        """tokens (B, K) int64, the first `lengths` (B,) of them the caption -> (B, E).

        An empty caption is read at position 0.
        """
        h = self.token(tokens) + self.position
        h = _through(self.blocks, h, True, checkpointing)
        last = h[torch.arange(len(h), device=h.device), (lengths - 1).clamp(min=0)]
        return self.project(self.norm_out(last))


class NoisedClip(nn.Module):
    """Both towers and the scale of their logits. Embeddings have length 1."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.image, self.text = ImageTower(config), TextTower(config)
        # One element on one axis: DeepSpeed cannot send a 0-d parameter.
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw every parameter with CLIP's own scales (Radford et al. 2021, sec. 2.4).

        Residual branches shrink with depth.
        """
        if self.log_scale.is_meta:
            return
        towers: tuple[ImageTower | TextTower, ...] = (self.image, self.text)
        for tower in towers:
            width = tower.position.shape[1]
            nn.init.normal_(tower.position, std=0.01 if tower is self.text else width**-0.5)
            nn.init.normal_(tower.project.weight, std=width**-0.5)
            for block in tower.blocks:
                assert isinstance(block, Block)
                for layer in (block.query, block.key, block.value):
                    nn.init.normal_(layer.weight, std=width**-0.5)
                nn.init.normal_(block.mlp_in.weight, std=(2 * width) ** -0.5)
                for layer in (block.out, block.mlp_out):
                    nn.init.normal_(layer.weight, std=width**-0.5 / (2 * len(tower.blocks)))
                for layer in (block.query, block.value, block.out, block.mlp_in, block.mlp_out):
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.text.token.weight, std=0.02)
        nn.init.normal_(self.image.timestep.weight, std=self.config.image_width**-0.5)
        nn.init.normal_(
            self.image.patch.weight,
            std=(2 / (self.config.image_width * self.config.patch_size**2)) ** 0.5,
        )

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor, mask: Tensor) -> ClipOutput:
        """Embed noised images and captions together, for training.

        x (B, 3, H, W) at timestep (B,); tokens (B, K) and their mask (B, K).
        """
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        image, text = (
            self.image(x, timestep, checkpointing),
            self.text(tokens, mask.sum(1), checkpointing),
        )
        # Clamp the scale for stability (Radford et al. 2021, sec. 2.5).
        return ClipOutput(
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
            self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp(),
        )

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Captions (B, K) of `lengths` (B,) tokens -> embeddings (B, E) of length 1."""
        return F.normalize(self.text(tokens, lengths).float(), dim=-1)

    def encode_image(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Noised images (B, 3, H, W) at timesteps (B,) -> embeddings (B, E) of length 1."""
        return F.normalize(self.image(x, timestep).float(), dim=-1)

    def score(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """scale f(x_t, t) . g(c), (B,), for caption embeddings `text` (B, E).

        CLIP guidance follows its gradient (sec. 2.4).
        """
        return self.log_scale.float().exp() * (self.encode_image(x, timestep) * text).sum(-1)
