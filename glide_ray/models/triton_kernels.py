"""Triton programs behind `kernels.py`: group normalisation, sums and attention inputs.

All arithmetic is float32 and rounded once. Images are (B, C, H, W) in channels-last memory, of any
float type. The kernels have no gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_moments(sums, squares, shift, pixels, inside, EACH: tl.constexpr):
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
def channel_factors(
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
def norm_group(
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
    mean, variance = group_moments(
        tl.sum(sums, 0), tl.sum(squares, 0), middle, pixels, inside, EACH
    )
    factor, offset = channel_factors(
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
def channel_sums(x, sums, pixels, channels, rows, chunks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
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
def norm_factors(
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
    mean, variance = group_moments(total, squares, middle, pixels, inside, EACH)
    factor, offset = channel_factors(
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
def apply_factors(x, place, here, factor, offset, SILU: tl.constexpr):
    y = tl.load(x + place, mask=here, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit(do_not_specialize=["pixels", "width"])
def norm_apply(
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
        y = apply_factors(x, corner * channels + lane[None, :], here, factor, offset, SILU)
        y += apply_factors(x, (corner + 1) * channels + lane[None, :], here, factor, offset, SILU)
        y += apply_factors(
            x, (corner + 2 * width) * channels + lane[None, :], here, factor, offset, SILU
        )
        y += apply_factors(
            x, (corner + 2 * width + 1) * channels + lane[None, :], here, factor, offset, SILU
        )
        tl.store(
            out + (image * pixels + row) * channels + lane[None, :],
            (y * 0.25).to(out.dtype.element_ty),
            mask=here,
        )
    else:
        y = apply_factors(
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
def add_skip(
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
def join_keys_values(
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
