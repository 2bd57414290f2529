"""Fused operations of the U-Net between convolutions and attention, for GPU inference.

The kernels themselves are in `triton_kernels.py`.

On one image, a large U-Net is limited by everything but its convolutions: PyTorch's group
normalisation needs contiguous memory, which costs channels-last images two copies, and each
addition, SiLU and resampling is another round trip to memory. These are fused here:

- a block's first normalisation, SiLU and resampling;
- the first convolution's bias, the second normalisation, the embedding and SiLU;
- the second convolution's bias and the sum with the skip.

All arithmetic is float32 and rounded once. Images are (B, C, H, W) in channels-last memory, of any
float type. The kernels have no gradients.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .triton_kernels import (
    add_skip,
    channel_sums,
    join_keys_values,
    norm_apply,
    norm_factors,
    norm_group,
)

BLOCK = 64  # channels per program, in kernels that do not work by group
# One program normalises a group of an image of up to this many values; 3 launches are slower.
WHOLE = 1 << 17
PROGRAMS = 1024  # target per launch: eight for each multiprocessor of the largest GPUs
CHUNKS = 128  # most chunks of pixels over which an image's sums are split
# Resampling: none, nearest neighbour to twice the size, 2 x 2 box filter to half the size.
SAME, UP, DOWN = 0, 1, 2


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    resample: int = SAME,
) -> Tensor:
    """Group norm with bias, modulation, SiLU and resampling: (B, C, H', W').

    x (B, C, H, W) plus `before` (C,), normalised in groups, times 1 + `scale` plus `shift` (B, C),
    through SiLU, resampled (SAME, UP or DOWN).
    """
    b, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    if scale is not None and shift is not None and scale.stride() != shift.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    line, form = _arguments(x, weight, bias, before, scale, shift)
    if resample == SAME and height * width * channels // groups <= WHOLE:
        return _norm_small(x, groups, line, eps, form, silu)
    return _norm_large(x, groups, line, eps, form, silu, resample)


def factors_of(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    statistics: Tensor,
) -> Tensor:
    """Factor and offset of each channel that normalise and modulate x: (B, 2, C) float32.

    Writes mean and reciprocal deviation of each channel's group to `statistics` (B, 2, C).
    """
    line, form = _arguments(x, weight, bias, None, scale, shift)
    return _factors(x, groups, line, eps, form, statistics)


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    before: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[tuple, dict[str, bool]]:
    """Arguments that the kernels of group norm share; x stands for tensors that are not there."""
    line = (
        weight,
        bias,
        x if before is None else before,
        x if scale is None else scale,
        x if shift is None else shift,
        0 if scale is None else scale.stride(0),
        x.shape[2] * x.shape[3],
    )
    return line, {"BEFORE": before is not None, "MODULATED": scale is not None}


def _norm_small(
    x: Tensor, groups: int, line: tuple, eps: float, form: dict[str, bool], silu: bool
) -> Tensor:
    """Group norm in one launch: a program for each group of each image."""
    b, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    padded = triton.next_power_of_2(each)
    out = torch.empty_like(x)
    rows = min(triton.next_power_of_2(pixels), max(1, 16384 // padded))
    warps = min(16, max(4, rows * padded // 1024))
    norm_group[groups, b](
        x, out, *line, eps, groups, each, padded, rows, SILU=silu, num_warps=warps, **form
    )
    return out


def _norm_large(
    x: Tensor,
    groups: int,
    line: tuple,
    eps: float,
    form: dict[str, bool],
    silu: bool,
    resample: int,
) -> Tensor:
    """Group norm in three launches: sums of chunks of pixels, factors of channels, result."""
    b, channels, height, width = x.shape
    lines = _factors(x, groups, line, eps, form)
    size = (
        (height, width)
        if resample == SAME
        else (height * 2, width * 2)
        if resample == UP
        else (height // 2, width // 2)
    )
    out = torch.empty(
        b, channels, *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    pixels = height * width
    pixels, width = (pixels // 4, width // 2) if resample == DOWN else (pixels, width)
    norm_apply[triton.cdiv(pixels, 64), triton.cdiv(channels, BLOCK), b](
        x, out, lines, pixels, width, channels, BLOCK, 64, silu, resample
    )
    return out


def _factors(
    x: Tensor,
    groups: int,
    line: tuple,
    eps: float,
    form: dict[str, bool],
    statistics: Tensor | None = None,
) -> Tensor:
    """Sums of chunks of pixels, and from them the factors of each channel: (B, 2, C) float32."""
    b, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    chunks, rows = chunked(pixels, b, channels)
    sums = torch.empty(b, 2, chunks, channels, dtype=torch.float32, device=x.device)
    lines = torch.empty(b, 2, channels, dtype=torch.float32, device=x.device)
    channel_sums[triton.cdiv(channels, BLOCK), chunks, b](
        x, sums, pixels, channels, rows, chunks, BLOCK, 64
    )
    kept, padded = lines if statistics is None else statistics, triton.next_power_of_2(each)
    norm_factors[groups, b](
        x,
        sums,
        lines,
        kept,
        *line,
        chunks,
        eps,
        groups,
        each,
        padded,
        CHUNKS,
        statistics is not None,
        **form,
    )
    return lines


def chunked(pixels: int, images: int, channels: int) -> tuple[int, int]:
    """(chunks, pixels of each) over which the sums of an image are split."""
    blocks = triton.cdiv(channels, BLOCK)
    chunks = min(CHUNKS, triton.cdiv(pixels, 64), triton.cdiv(PROGRAMS, images * blocks))
    rows = triton.cdiv(triton.cdiv(pixels, chunks), 64) * 64
    return triton.cdiv(pixels, rows), rows


def add(
    h: Tensor, skip: Tensor, bias: Tensor, other: Tensor | None = None, resample: int = SAME
) -> Tensor:
    """h (B, C, H, W) plus the biases (C,) plus the skip, resampled to h's size."""
    b, channels, height, width = h.shape
    h, skip = (image.contiguous(memory_format=torch.channels_last) for image in (h, skip))
    out = torch.empty_like(h)
    add_skip[triton.cdiv(height * width, 64), triton.cdiv(channels, BLOCK), b](
        h,
        skip,
        out,
        bias,
        bias if other is None else other,
        height * width,
        width,
        channels,
        BLOCK,
        64,
        other is not None,
        resample,
    )
    return out


def keys_values(qkv: Tensor, text_key: Tensor, text_value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads, K + N, D): first K text tokens, then N pixels.

    The text tokens are (B, heads, K, D), the pixels' qkv is (B, N, heads, 3, D).
    """
    b, pixels, heads, _, each = qkv.shape
    words = text_key.shape[2]
    text_key, text_value = text_key.contiguous(), text_value.contiguous()
    out = torch.empty(2, b, words + pixels, heads, each, dtype=qkv.dtype, device=qkv.device)
    lanes = triton.next_power_of_2(heads * each)
    rows = max(1, 4096 // lanes)
    join_keys_values[triton.cdiv(words + pixels, rows), b](
        qkv, text_key, text_value, out[0], out[1], words, pixels, heads, each, rows, lanes
    )
    return out[0].transpose(1, 2), out[1].transpose(1, 2)
