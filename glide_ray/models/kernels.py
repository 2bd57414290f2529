"""Triton kernels for the U-Net's operations between convolutions and attention, for GPU inference.

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
import triton.language as tl
from torch import Tensor

BLOCK = 64  # channels per program, in kernels that do not work by group
# One program normalises a group of an image of up to this many values; 3 launches are slower.
WHOLE = 1 << 17
PROGRAMS = 1024  # target per launch: eight for each multiprocessor of the largest GPUs
CHUNKS = 128  # most chunks of pixels over which an image's sums are split
# Resampling: none, nearest neighbour to twice the size, 2 x 2 box filter to half the size.
SAME, UP, DOWN = 0, 1, 2


@triton.jit
def _moments(sums, squares, shift, pixels, inside, EACH: tl.constexpr):
    """Mean and variance of a group, from its channels' sums of x - shift and of (x - shift)^2.

    Shifts lie near the channels' means, so little precision is lost where the means are far from 0.
    """
    means = shift + sums / pixels
    mean = tl.sum(tl.where(inside, means, 0.0), 0) / EACH
    away = means - mean
    variance = (
        tl.sum(tl.where(inside, (squares - sums * sums / pixels) / pixels + away * away, 0.0), 0)
        / EACH
    )
    return mean, variance


@triton.jit
def _line(
    mean,
    variance,
    weight,
    bias,
    before,
    scale,
    shift,
    channels,
    inside,
    image,
    stride,
    eps,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Normalisation of some channels of one group, as factor and offset of x.

    x does not include the bias `before` yet.
    """
    factor = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(
        variance + eps
    )
    offset = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32) - mean * factor
    if BEFORE:
        offset += tl.load(before + channels, mask=inside, other=0.0).to(tl.float32) * factor
    if MODULATED:
        by = 1.0 + tl.load(scale + image * stride + channels, mask=inside, other=0.0).to(tl.float32)
        offset = offset * by + tl.load(
            shift + image * stride + channels, mask=inside, other=0.0
        ).to(tl.float32)
        factor *= by
    return factor, offset


@triton.jit(do_not_specialize=["stride", "pixels", "eps"])
def _norm_whole(
    x,
    out,
    weight,
    bias,
    before,
    scale,
    shift,
    stride,
    pixels,
    eps,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
    SILU: tl.constexpr,
):
    """Normalise one group of one image in a single program."""
    group, image = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, PADDED)
    inside = lane < EACH
    channels = group * EACH + lane
    x += image.to(tl.int64) * pixels * (GROUPS * EACH)
    out += image.to(tl.int64) * pixels * (GROUPS * EACH)
    rows = tl.arange(0, ROWS)[:, None]
    middle = tl.load(x + (pixels // 2) * (GROUPS * EACH) + channels, mask=inside, other=0.0).to(
        tl.float32
    )
    sums, squares = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(0, pixels, ROWS):
        here = (start + rows < pixels) & inside[None, :]
        values = tl.load(
            x + (start + rows) * (GROUPS * EACH) + channels[None, :], mask=here, other=0.0
        ).to(tl.float32)
        away = tl.where(here, values - middle[None, :], 0.0)
        sums += away
        squares += away * away
    if BEFORE:
        middle += tl.load(before + channels, mask=inside, other=0.0).to(tl.float32)
    mean, variance = _moments(tl.sum(sums, 0), tl.sum(squares, 0), middle, pixels, inside, EACH)
    factor, offset = _line(
        mean,
        variance,
        weight,
        bias,
        before,
        scale,
        shift,
        channels,
        inside,
        image,
        stride,
        eps,
        BEFORE,
        MODULATED,
    )
    for start in range(0, pixels, ROWS):
        here = (start + rows < pixels) & inside[None, :]
        place = (start + rows) * (GROUPS * EACH) + channels[None, :]
        y = (
            tl.load(x + place, mask=here, other=0.0).to(tl.float32) * factor[None, :]
            + offset[None, :]
        )
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(out + place, y.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["pixels", "rows", "chunks"])
def _sums(x, sums, pixels, channels, rows, chunks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Each channel's sums of x - m and of (x - m)^2 over one chunk of `rows` pixels.

    m is the channel's value at the middle pixel of the image. `sums`: (B, 2, chunks, C).
    """
    chunk, image = tl.program_id(1), tl.program_id(2)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels
    x += image.to(tl.int64) * pixels * channels
    middle = tl.load(x + (pixels // 2) * channels + lane, mask=inside, other=0.0).to(tl.float32)
    total, squares = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum((chunk + 1) * rows, pixels)
    for start in range(chunk * rows, last, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = (row < last) & inside[None, :]
        values = tl.load(x + row * channels + lane[None, :], mask=here, other=0.0).to(tl.float32)
        away = tl.where(here, values - middle[None, :], 0.0)
        total += away
        squares += away * away
    at = sums + ((image * 2) * chunks + chunk) * channels + lane
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + chunks * channels, tl.sum(squares, 0), mask=inside)


@triton.jit(do_not_specialize=["stride", "pixels", "chunks", "eps"])
def _lines(
    x,
    sums,
    lines,
    weight,
    bias,
    before,
    scale,
    shift,
    stride,
    pixels,
    chunks,
    eps,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Factor and offset of each channel of one group of one image: `lines` (B, 2, C) float32."""
    group, image = tl.program_id(0), tl.program_id(1)
    lane, part = tl.arange(0, PADDED), tl.arange(0, CHUNKS)[:, None]
    inside = lane < EACH
    channels = group * EACH + lane
    here = (part < chunks) & inside[None, :]
    at = sums + ((image * 2) * chunks + part) * (GROUPS * EACH) + channels[None, :]
    total = tl.sum(tl.load(at, mask=here, other=0.0), 0)
    squares = tl.sum(tl.load(at + chunks * (GROUPS * EACH), mask=here, other=0.0), 0)
    middle = tl.load(
        x + (image.to(tl.int64) * pixels + pixels // 2) * (GROUPS * EACH) + channels,
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    if BEFORE:
        middle += tl.load(before + channels, mask=inside, other=0.0).to(tl.float32)
    mean, variance = _moments(total, squares, middle, pixels, inside, EACH)
    factor, offset = _line(
        mean,
        variance,
        weight,
        bias,
        before,
        scale,
        shift,
        channels,
        inside,
        image,
        stride,
        eps,
        BEFORE,
        MODULATED,
    )
    tl.store(lines + image * 2 * (GROUPS * EACH) + channels, factor, mask=inside)
    tl.store(lines + (image * 2 + 1) * (GROUPS * EACH) + channels, offset, mask=inside)


@triton.jit
def _on_line(x, place, here, factor, offset, SILU: tl.constexpr):
    y = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit(do_not_specialize=["pixels", "width"])
def _norm_apply(
    x,
    out,
    lines,
    pixels,
    width,
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """Apply `lines` to some pixels, then SiLU and resampling.

    `pixels` and `width` are those of x, or of the result when resampling down.
    """
    image = tl.program_id(2)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    here = (row < pixels) & inside[None, :]
    factor = tl.load(lines + image * 2 * channels + lane, mask=inside, other=0.0)
    offset = tl.load(lines + (image * 2 + 1) * channels + lane, mask=inside, other=0.0)
    image = image.to(tl.int64)
    if RESAMPLE == 2:
        x += image * 4 * pixels * channels
        corner = (row // width) * 4 * width + (row % width) * 2
        y = _on_line(x, corner * channels + lane[None, :], here, factor, offset, SILU)
        y += _on_line(x, (corner + 1) * channels + lane[None, :], here, factor, offset, SILU)
        y += _on_line(
            x, (corner + 2 * width) * channels + lane[None, :], here, factor, offset, SILU
        )
        y += _on_line(
            x, (corner + 2 * width + 1) * channels + lane[None, :], here, factor, offset, SILU
        )
        tl.store(
            out + (image * pixels + row) * channels + lane[None, :],
            (y * 0.25).to(out.dtype.element_ty),
            mask=here,
        )
    else:
        y = _on_line(
            x + image * pixels * channels,
            row * channels + lane[None, :],
            here,
            factor,
            offset,
            SILU,
        ).to(out.dtype.element_ty)
        if RESAMPLE == 1:
            out += image * 4 * pixels * channels
            corner = (row // width) * 4 * width + (row % width) * 2
            tl.store(out + corner * channels + lane[None, :], y, mask=here)
            tl.store(out + (corner + 1) * channels + lane[None, :], y, mask=here)
            tl.store(out + (corner + 2 * width) * channels + lane[None, :], y, mask=here)
            tl.store(out + (corner + 2 * width + 1) * channels + lane[None, :], y, mask=here)
        else:
            tl.store(out + (image * pixels + row) * channels + lane[None, :], y, mask=here)


@triton.jit(do_not_specialize=["pixels", "width"])
def _sum(
    h,
    skip,
    out,
    bias,
    other,
    pixels,
    width,
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OTHER: tl.constexpr,
    RESAMPLE: tl.constexpr,
):
    """h + bias (+ other) + skip, with the skip resampled to h's pixels and width."""
    image = tl.program_id(2).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    here = (row < pixels) & inside[None, :]
    place = (image * pixels + row) * channels + lane[None, :]
    added = tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    if OTHER:
        added += tl.load(other + lane, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(h + place, mask=here, other=0.0).to(tl.float32) + added[None, :]
    if RESAMPLE == 0:
        y += tl.load(skip + place, mask=here, other=0.0).to(tl.float32)
    elif RESAMPLE == 1:
        skip += image * (pixels // 4) * channels
        source = (row // width // 2) * (width // 2) + row % width // 2
        y += tl.load(skip + source * channels + lane[None, :], mask=here, other=0.0).to(tl.float32)
    else:
        skip += image * 4 * pixels * channels
        corner = (row // width) * 4 * width + (row % width) * 2
        box = tl.load(skip + corner * channels + lane[None, :], mask=here, other=0.0).to(tl.float32)
        box += tl.load(skip + (corner + 1) * channels + lane[None, :], mask=here, other=0.0).to(
            tl.float32
        )
        box += tl.load(
            skip + (corner + 2 * width) * channels + lane[None, :], mask=here, other=0.0
        ).to(tl.float32)
        box += tl.load(
            skip + (corner + 2 * width + 1) * channels + lane[None, :], mask=here, other=0.0
        ).to(tl.float32)
        y += box * 0.25
    tl.store(out + place, y.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["words", "pixels"])
def _behind_text(
    qkv,
    text_key,
    text_value,
    key,
    value,
    words,
    pixels,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Copy keys and values of some tokens: text tokens first, then the pixels, from qkv."""
    image = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    head, within = lane // EACH, lane % EACH
    there = lane < HEADS * EACH
    word, pixel = (token < words) & there, (token >= words) & (token < words + pixels) & there
    text = ((image * HEADS + head) * words + token) * EACH + within
    own = ((image * pixels + token - words) * HEADS + head) * (3 * EACH) + EACH + within
    out = (image * (words + pixels) + token) * (HEADS * EACH) + lane
    keys = tl.load(text_key + text, mask=word, other=0.0) + tl.load(
        qkv + own, mask=pixel, other=0.0
    )
    tl.store(key + out, keys, mask=word | pixel)
    values = tl.load(text_value + text, mask=word, other=0.0) + tl.load(
        qkv + own + EACH, mask=pixel, other=0.0
    )
    tl.store(value + out, values, mask=word | pixel)


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
    pixels, each = height * width, channels // groups
    padded, modulated = triton.next_power_of_2(each), scale is not None
    if modulated and scale.stride() != shift.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    line = (
        weight,
        bias,
        x if before is None else before,
        scale if modulated else x,
        shift if modulated else x,
        scale.stride(0) if modulated else 0,
        pixels,
    )
    form = {"BEFORE": before is not None, "MODULATED": modulated}
    if resample == SAME and pixels * each <= WHOLE:
        out, rows = (
            torch.empty_like(x),
            min(triton.next_power_of_2(pixels), max(1, 16384 // padded)),
        )
        _norm_whole[groups, b](
            x,
            out,
            *line,
            eps,
            groups,
            each,
            padded,
            rows,
            SILU=silu,
            num_warps=min(16, max(4, rows * padded // 1024)),
            **form,
        )
        return out
    blocks = triton.cdiv(channels, BLOCK)
    chunks = min(CHUNKS, triton.cdiv(pixels, 64), triton.cdiv(PROGRAMS, b * blocks))
    rows = triton.cdiv(triton.cdiv(pixels, chunks), 64) * 64
    chunks = triton.cdiv(pixels, rows)
    sums = torch.empty(b, 2, chunks, channels, dtype=torch.float32, device=x.device)
    lines = torch.empty(b, 2, channels, dtype=torch.float32, device=x.device)
    _sums[blocks, chunks, b](x, sums, pixels, channels, rows, chunks, BLOCK, 64)
    _lines[groups, b](x, sums, lines, *line, chunks, eps, groups, each, padded, CHUNKS, **form)
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
    pixels, width = (pixels // 4, width // 2) if resample == DOWN else (pixels, width)
    _norm_apply[triton.cdiv(pixels, 64), blocks, b](
        x, out, lines, pixels, width, channels, BLOCK, 64, silu, resample
    )
    return out


def add(
    h: Tensor, skip: Tensor, bias: Tensor, other: Tensor | None = None, resample: int = SAME
) -> Tensor:
    """h (B, C, H, W) plus the biases (C,) plus the skip, resampled to h's size."""
    b, channels, height, width = h.shape
    h, skip = (image.contiguous(memory_format=torch.channels_last) for image in (h, skip))
    out = torch.empty_like(h)
    _sum[triton.cdiv(height * width, 64), triton.cdiv(channels, BLOCK), b](
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
    _behind_text[triton.cdiv(words + pixels, rows), b](
        qkv, text_key, text_value, out[0], out[1], words, pixels, heads, each, rows, lanes
    )
    return out[0].transpose(1, 2), out[1].transpose(1, 2)
