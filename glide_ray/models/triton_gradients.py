"""Triton programs of the gradient of group norm, modulation and SiLU; see `norm_training.py`.

All arithmetic is float32 and rounded once. Images are (B, C, H, W) in channels-last memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import load_float32


@triton.jit
def before_silu(x, gradient, place, here, factor, offset, SILU: tl.constexpr):
    """Values of x, and the gradient before SiLU, at `place`: both float32, 0 outside."""
    values = load_float32(x + place, here)
    incoming = load_float32(gradient + place, here)
    if SILU:
        z = values * factor[None, :] + offset[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        incoming = incoming * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return values, incoming


@triton.jit(do_not_specialize=["pixels", "rows", "chunks"])
def gradient_sums(
    x,
    gradient,
    lines,
    statistics,
    sums,
    pixels,
    channels,
    rows,
    chunks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Each channel's sums of the gradient, and of the gradient times the normalised x.

    Over one chunk of `rows` pixels. `lines`: factor and offset of x, `statistics`: mean and
    reciprocal deviation, both (B, 2, C). `sums`: (B, 2, chunks, C).
    """
    chunk, image = tl.program_id(1), tl.program_id(2)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels
    at_lines = image * 2 * channels + lane
    factor, offset = (
        load_float32(lines + at_lines, inside),
        load_float32(lines + at_lines + channels, inside),
    )
    mean, deviation = (
        load_float32(statistics + at_lines, inside),
        load_float32(statistics + at_lines + channels, inside),
    )
    total, product = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum((chunk + 1) * rows, pixels)
    first_pixel = image.to(tl.int64) * pixels
    for start in range(chunk * rows, last, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        here = (row < last) & inside[None, :]
        place = (first_pixel + row) * channels + lane[None, :]
        values, incoming = before_silu(x, gradient, place, here, factor, offset, SILU)
        total += incoming
        product += incoming * (values - mean[None, :]) * deviation[None, :]
    at = sums + ((image * 2) * chunks + chunk) * channels + lane
    tl.store(at, tl.sum(total, 0), mask=inside)
    tl.store(at + chunks * channels, tl.sum(product, 0), mask=inside)


@triton.jit(do_not_specialize=["stride", "pixels", "chunks"])
def gradient_factors(
    sums,
    statistics,
    weight,
    scale,
    totals,
    factors,
    stride,
    pixels,
    chunks,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNKS: tl.constexpr,
    MODULATED: tl.constexpr,
):
    """Totals of each channel of one group, and the factors that give the gradient of x.

    `totals` (B, 2, C): sums over all chunks. `factors` (B, 3, C): those of the incoming gradient,
    of x, and the constant.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    lane, part = tl.arange(0, PADDED), tl.arange(0, CHUNKS)[:, None]
    inside = lane < EACH
    channels = group * EACH + lane
    here = (part < chunks) & inside[None, :]
    at = sums + ((image * 2) * chunks + part) * (GROUPS * EACH) + channels[None, :]
    total = tl.sum(load_float32(at, here), 0)
    product = tl.sum(load_float32(at + chunks * (GROUPS * EACH), here), 0)
    line = image * 2 * (GROUPS * EACH) + channels
    tl.store(totals + line, total, mask=inside)
    tl.store(totals + line + GROUPS * EACH, product, mask=inside)
    gain = load_float32(weight + channels, inside)
    if MODULATED:
        gain *= 1.0 + load_float32(scale + image * stride + channels, inside)
    mean = load_float32(statistics + line, inside)
    deviation = load_float32(statistics + line + GROUPS * EACH, inside)
    of_group = tl.sum(gain * total, 0) / (pixels * EACH)
    along_x = tl.sum(gain * product, 0) / (pixels * EACH)
    of_x = -deviation * deviation * along_x
    line = image * 3 * (GROUPS * EACH) + channels
    tl.store(factors + line, deviation * gain, mask=inside)
    tl.store(factors + line + GROUPS * EACH, of_x, mask=inside)
    tl.store(factors + line + 2 * GROUPS * EACH, -mean * of_x - deviation * of_group, mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def gradient_apply(
    x,
    gradient,
    out,
    lines,
    factors,
    pixels,
    channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """The gradient of x for some pixels."""
    image = tl.program_id(2)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < channels
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    here = (row < pixels) & inside[None, :]
    line = lines + image * 2 * channels + lane
    factor, offset = load_float32(line, inside), load_float32(line + channels, inside)
    line = factors + image * 3 * channels + lane
    of_gradient, of_x, constant = (
        load_float32(line, inside),
        load_float32(line + channels, inside),
        load_float32(line + 2 * channels, inside),
    )
    place = (image.to(tl.int64) * pixels + row) * channels + lane[None, :]
    values, incoming = before_silu(x, gradient, place, here, factor, offset, SILU)
    result = incoming * of_gradient[None, :] + values * of_x[None, :] + constant[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=here)
