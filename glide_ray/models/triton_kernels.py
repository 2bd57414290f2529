"""Triton programs behind `kernels.py`: group normalisation, sums and attention inputs.

All arithmetic is float32 and rounded once. Images are (B, C, H, W) in channels-last memory, of any
float type. The kernels have no gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float32(pointer, here):
    """Values at `pointer` as float32; 0 where `here` is false."""
    return tl.load(pointer, mask=here, other=0.0).to(tl.float32)


@triton.jit
def shifted_sums(
    x, middle, first, last, channels, lane, inside, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Each channel's sums of x - middle and of (x - middle)^2 over the pixels first to last - 1."""
    sums, squares = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    for start in range(first, last, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = (row < last) & inside[None, :]
        values = load_float32(x + row * channels + lane[None, :], here)
        away = tl.where(here, values - middle[None, :], 0.0)
        sums += away
        squares += away * away
    return tl.sum(sums, 0), tl.sum(squares, 0)


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
    eps,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Normalisation of some channels of one group, as factor and offset of x.

    x does not include the bias `before` yet. `scale` and `shift` are those of the image.
    """
    factor = load_float32(weight + channels, inside) / tl.sqrt(variance + eps)
    offset = load_float32(bias + channels, inside) - mean * factor
    if BEFORE:
        offset += load_float32(before + channels, inside) * factor
    if MODULATED:
        by = 1.0 + load_float32(scale + channels, inside)
        offset = offset * by + load_float32(shift + channels, inside)
        factor *= by
    return factor, offset


@triton.jit
def apply_factors(pointer, here, factor, offset, SILU: tl.constexpr):
    """Normalised values at `pointer` as float32, after SiLU if asked."""
    y = load_float32(pointer, here) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


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
    scale += image * stride
    shift += image * stride
    middle = load_float32(x + (pixels // 2) * (GROUPS * EACH) + channels, inside)
    sums, squares = shifted_sums(
        x, middle, 0, pixels, GROUPS * EACH, channels, inside, ROWS, PADDED
    )
    if BEFORE:
        middle += load_float32(before + channels, inside)
    mean, variance = group_moments(sums, squares, middle, pixels, inside, EACH)
    factor, offset = channel_factors(
        mean, variance, weight, bias, before, scale, shift, channels, inside, eps, BEFORE, MODULATED
    )
    for start in range(0, pixels, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = (row < pixels) & inside[None, :]
        place = row * (GROUPS * EACH) + channels[None, :]
        y = apply_factors(x + place, here, factor, offset, SILU)
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
    middle = load_float32(x + (pixels // 2) * channels + lane, inside)
    last = tl.minimum((chunk + 1) * rows, pixels)
    total, squares = shifted_sums(
        x, middle, chunk * rows, last, channels, lane, inside, ROWS, BLOCK
    )
    at = sums + ((image * 2) * chunks + chunk) * channels + lane
    tl.store(at, total, mask=inside)
    tl.store(at + chunks * channels, squares, mask=inside)


@triton.jit(do_not_specialize=["stride", "pixels", "chunks", "eps"])
def norm_factors(
    x,
    sums,
    lines,
    statistics,
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
    KEPT: tl.constexpr,
    BEFORE: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Factor and offset of each channel of one group of one image: `lines` (B, 2, C) float32.

    `statistics`: mean and reciprocal deviation of each channel's group, in the same form, if KEPT.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    lane, part = tl.arange(0, PADDED), tl.arange(0, CHUNKS)[:, None]
    inside = lane < EACH
    channels = group * EACH + lane
    scale += image * stride
    shift += image * stride
    here = (part < chunks) & inside[None, :]
    at = sums + ((image * 2) * chunks + part) * (GROUPS * EACH) + channels[None, :]
    total = tl.sum(load_float32(at, here), 0)
    squares = tl.sum(load_float32(at + chunks * (GROUPS * EACH), here), 0)
    at_middle = (image.to(tl.int64) * pixels + pixels // 2) * (GROUPS * EACH)
    middle = load_float32(x + at_middle + channels, inside)
    if BEFORE:
        middle += load_float32(before + channels, inside)
    mean, variance = group_moments(total, squares, middle, pixels, inside, EACH)
    if KEPT:
        at = statistics + image * 2 * (GROUPS * EACH) + channels
        tl.store(at, mean + tl.zeros([PADDED], tl.float32), mask=inside)
        deviation = 1.0 / tl.sqrt(variance + eps)
        tl.store(at + GROUPS * EACH, deviation + tl.zeros([PADDED], tl.float32), mask=inside)
    factor, offset = channel_factors(
        mean, variance, weight, bias, before, scale, shift, channels, inside, eps, BEFORE, MODULATED
    )
    tl.store(lines + image * 2 * (GROUPS * EACH) + channels, factor, mask=inside)
    tl.store(lines + (image * 2 + 1) * (GROUPS * EACH) + channels, offset, mask=inside)


@triton.jit
def box_corner(row, width, channels, lane):
    """Offset of the upper left pixel of box `row` of 2 x 2 pixels; `width` in boxes."""
    return ((row // width) * 4 * width + (row % width) * 2) * channels + lane[None, :]


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
    place, below = (image * pixels + row) * channels + lane[None, :], 2 * width * channels
    if RESAMPLE == 2:
        box = x + image * 4 * pixels * channels + box_corner(row, width, channels, lane)
        y = apply_factors(box, here, factor, offset, SILU)
        y += apply_factors(box + channels, here, factor, offset, SILU)
        y += apply_factors(box + below, here, factor, offset, SILU)
        y += apply_factors(box + below + channels, here, factor, offset, SILU)
        tl.store(out + place, (y * 0.25).to(out.dtype.element_ty), mask=here)
    else:
        y = apply_factors(x + place, here, factor, offset, SILU).to(out.dtype.element_ty)
        if RESAMPLE == 1:
            box = out + image * 4 * pixels * channels + box_corner(row, width, channels, lane)
            tl.store(box, y, mask=here)
            tl.store(box + channels, y, mask=here)
            tl.store(box + below, y, mask=here)
            tl.store(box + below + channels, y, mask=here)
        else:
            tl.store(out + place, y, mask=here)


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
    added = load_float32(bias + lane, inside)
    if OTHER:
        added += load_float32(other + lane, inside)
    y = load_float32(h + place, here) + added[None, :]
    if RESAMPLE == 0:
        y += load_float32(skip + place, here)
    elif RESAMPLE == 1:
        skip += image * (pixels // 4) * channels
        source = (row // width // 2) * (width // 2) + row % width // 2
        y += load_float32(skip + source * channels + lane[None, :], here)
    else:
        below = 2 * width * channels
        box = skip + image * 4 * pixels * channels + box_corner(row, width, channels, lane)
        total = load_float32(box, here) + load_float32(box + channels, here)
        total += load_float32(box + below, here)
        total += load_float32(box + below + channels, here)
        y += total * 0.25
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
