"""Layers of the ADM U-Net (Dhariwal & Nichol 2021, app. B) with text attention (GLIDE sec. 4.1).

Images are (B, C, H, W) in channels-last memory, so an attention layer sees their (B, HW, C) tokens
without a copy. `fused` blocks compute the same with `kernels.py`, for GPU inference
(`GlideUNet.fuse`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Keep a network's convolution weights in channels-last memory."""
    # torch's annotations of `to` lack this argument.
    moved: Network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build networks on the meta device: parameters have shapes and no values.

    Initialisation is skipped: on meta tensors it would import PyTorch's compiler, which takes 1.2 s
    in each process (PyTorch 2.13).
    """
    with torch.device("meta"), _WithoutInitialisation():
        yield


class _WithoutInitialisation(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def timestep_embedding(timestep: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (B,) -> (B, width) float32.

    Cosines, then sines, of decreasing frequency.
    """
    half = width // 2
    frequency = torch.exp(
        -math.log(max_period)
        * torch.arange(half, dtype=torch.float32, device=timestep.device)
        / half
    )
    angle = timestep.float()[:, None] * frequency[None]
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over (B, heads, length, D), with float32 softmax sums.

    `causal`: each query sees the keys up to its own position. In 16 bits on a CPU the backward pass
    of PyTorch's own attention is ten times slower than explicit matrix products (17.4 ms against
    1.7 ms for 32 x 2 heads x 48 x 64 on one core, PyTorch 2.13).
    """
    if query.device.type == "cpu" and trains_in_16_bits(query) and not causal:
        return attend_by_products(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def trains_in_16_bits(tensor: Tensor) -> bool:
    return tensor.dtype != torch.float32 and tensor.requires_grad


def attend_by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two matrix products; the scores are kept for the backward pass."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


class GroupNorm(nn.GroupNorm):
    """Group normalisation with float32 statistics at any precision.

    Keeps fp16 training stable (sec. 4.1).
    """

    fused = False  # without gradients, for inference
    trains_fused = False  # with gradients, for training

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        silu: bool = False,
    ) -> Tensor:
        """The norm of x (B, C, ...), times 1 + `scale` plus `shift` (B, C, 1, 1), through SiLU."""
        if self.trains_fused:
            from .norm_training import norm

            scale, shift = (None if one is None else one.flatten(1) for one in (scale, shift))
            weight, bias = self.weight, self.bias
            return norm(x, self.num_groups, weight, bias, self.eps, scale, shift, silu)
        if self.fused and scale is None:
            return self.fused_norm(x, silu=silu)
        x = self.normalised(x)
        if scale is not None and shift is not None:
            x = torch.addcmul(shift, x, 1 + scale)
        return F.silu(x) if silu else x

    def fused_norm(self, x: Tensor, **and_more) -> Tensor:
        """GPU normalisation, fused with the further options of `kernels.group_norm`."""
        from . import kernels  # Triton comes only with PyTorch's GPU builds

        return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, **and_more)

    def normalised(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype != torch.float32 and x.requires_grad:
            return _HalfGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        # The CPU kernel accumulates in float32 at any precision.
        if x.device.type == "cpu" or x.dtype == torch.float32:
            return super().forward(x)
        return F.group_norm(
            x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class _HalfGroupNorm(torch.autograd.Function):
    """PyTorch's CPU group norm in 16 bits, with contiguous memory in the backward pass.

    The backward pass takes 40 times as long in channels-last as in contiguous memory (20.5 ms
    against 0.5 ms for 8 x 64 x 64 x 64 on two cores, PyTorch 2.13), and copies there and back are
    cheap.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = x.shape[0], x.shape[1], x.shape[2:].numel(), groups
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *shape, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, mean, rstd, weight = ctx.saved_tensors
        layout = (
            torch.channels_last
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(),
            x.contiguous(),
            mean,
            rstd,
            weight,
            *ctx.shape,
            [True, True, True],
        )
        return to_x.contiguous(memory_format=layout), to_weight, to_bias, None, None


class Upsample(nn.Module):
    """Nearest neighbour, to twice the size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Box filter, to half the size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Residual block, modulated by the embedding of timestep and text.

    norm, SiLU, [resample], conv; norm scaled and shifted by the embedding, SiLU, dropout, conv;
    plus the skip. The embedding (B, E) is the sum of timestep and text, through SiLU.
    """

    fused: slice | None = None  # columns of its scale and shift in those of all blocks

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        groups: int,
        dropout: float,
        resample: type[Upsample] | type[Downsample] | None = None,
    ):
        super().__init__()
        self.in_norm = GroupNorm(groups, channels)
        self.resample = resample() if resample else nn.Identity()
        self.in_conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * out_channels)
        self.out_norm = GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels, out_channels, 1) if out_channels != channels else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.fused:
            return self._fused(x, *embedding[:, self.fused].chunk(2, dim=1))
        h = self.in_conv(self.resample(self.in_norm(x, silu=True)))  # (B, out, H', W')
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.out_norm(h, scale, shift, silu=True)
        return self.skip(self.resample(x)) + self.out_conv(self.dropout(h))

    def _fused(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Fused forward: convolutions run without bias, and the kernel after each adds it."""
        from . import kernels

        resample = {Upsample: kernels.UP, Downsample: kernels.DOWN, nn.Identity: kernels.SAME}[
            type(self.resample)
        ]
        h = F.conv2d(
            self.in_norm.fused_norm(x, silu=True, resample=resample), self.in_conv.weight, padding=1
        )
        h = self.out_norm.fused_norm(
            h, before=self.in_conv.bias, scale=scale, shift=shift, silu=True
        )
        h = F.conv2d(h, self.out_conv.weight, padding=1)
        bias = self.out_conv.bias
        assert bias is not None
        if isinstance(self.skip, nn.Identity):
            return kernels.add(h, x, bias, resample=resample)
        # No resampling: no block both resamples and changes its channels.
        return kernels.add(h, F.conv2d(x, self.skip.weight), bias, self.skip.bias)


class PixelHead(nn.Module):
    """Convolutions at full resolution that correct a prediction made in patches.

    Pixels on the two sides of a patch's edge come from different features; without these layers
    the edges show as a grid. Modulated by the embedding (B, E) of timestep and text.
    """

    def __init__(self, in_channels: int, channels: int, embedding: int):
        super().__init__()
        self.in_conv = nn.Conv2d(3 + in_channels, channels, 3, padding=1)
        self.embedding = nn.Linear(embedding, 2 * channels)
        self.middle_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out_conv = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, prediction: Tensor, inputs: Tensor, embedding: Tensor) -> Tensor:
        """prediction (B, 3, H, W) float32, inputs (B, C, H, W) -> corrected prediction, float32."""
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.in_conv(torch.cat([prediction.to(inputs), inputs], dim=1))
        h = self.middle_conv(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return prediction + self.out_conv(F.silu(h)).float()


class AttentionBlock(nn.Module):
    """Self-attention over pixels (sec. 4.1).

    The projected text precedes the pixels' keys and values.
    """

    fused = False

    def __init__(self, channels: int, head_channels: int, text_width: int, groups: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)  # per head: query, key, value
        self.text_kv = nn.Linear(text_width, 2 * channels)  # per head: key, value
        self.out = nn.Linear(channels, channels)

    def text_keys_values(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, K, W) -> key and value, each (B, heads, K, D).

        The same at every step of a sample.
        """
        b, k, _ = sequence.shape
        key, value = self.text_kv(sequence).view(b, k, self.heads, 2, -1).permute(3, 0, 2, 1, 4)
        return key, value

    def forward(self, x: Tensor, text_key: Tensor, text_value: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        qkv = self.qkv(tokens).view(b, height * width, self.heads, 3, -1)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        if self.fused:
            from . import kernels

            key, value = kernels.keys_values(qkv, text_key, text_value)
        else:
            key, value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
        attended = attend(query, key, value)
        attended = self.out(attended.transpose(1, 2).reshape(b, height * width, c))
        return x + attended.view(b, height, width, c).permute(0, 3, 1, 2)
