"""Group norm, modulation and SiLU with gradients, fused for training on a GPU.

PyTorch's group norm on CUDA writes contiguous memory, so that convolutions transpose around it, and
each operation between two convolutions is another round trip to memory. Here the forward pass reads
x twice and writes once; the backward pass reads x and the gradient twice and writes once. Only x
and a few numbers per channel are kept for it.

The gradient, with n the normalised x, g = weight (1 + scale), d the gradient before SiLU, r the
reciprocal deviation and E the mean over a group's pixels and channels:
    r (g d - E[g d] - n E[g d n]).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .kernels import BLOCK, CHUNKS, SAME, chunked, factors_of
from .triton_gradients import gradient_apply, gradient_factors, gradient_sums
from .triton_kernels import norm_apply

ROWS = 64  # pixels that a program reads at once


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Group norm of x (B, C, H, W), times 1 + `scale` plus `shift` (B, C), through SiLU if asked.

    Statistics and sums are float32. Has gradients with respect to all tensors.
    """
    return _Norm.apply(x, groups, weight, bias, eps, scale, shift, silu)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        b, channels, height, width = x.shape
        if scale is not None and shift is not None:
            scale, shift = scale.contiguous(), shift.contiguous()
        statistics = torch.empty(b, 2, channels, dtype=torch.float32, device=x.device)
        lines = factors_of(x, groups, weight, bias, eps, scale, shift, statistics=statistics)
        out = torch.empty_like(x)
        grid = triton.cdiv(height * width, ROWS), triton.cdiv(channels, BLOCK), b
        norm_apply[grid](x, out, lines, height * width, width, channels, BLOCK, ROWS, silu, SAME)
        ctx.save_for_backward(x, weight, bias, scale, lines, statistics)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, lines, statistics = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        b, channels, height, width = x.shape
        pixels, each = height * width, channels // ctx.groups
        chunks, rows = chunked(pixels, b, channels)
        blocks, small = triton.cdiv(channels, BLOCK), {"dtype": torch.float32, "device": x.device}
        sums = torch.empty(b, 2, chunks, channels, **small)
        gradient_sums[blocks, chunks, b](
            x, gradient, lines, statistics, sums, pixels, channels, rows, chunks,
            BLOCK, ROWS, ctx.silu,
        )  # fmt: skip
        totals = torch.empty(b, 2, channels, **small)
        factors = torch.empty(b, 3, channels, **small)
        gradient_factors[ctx.groups, b](
            sums, statistics, weight, x if scale is None else scale, totals, factors,
            0 if scale is None else scale.stride(0), pixels, chunks,
            ctx.groups, each, triton.next_power_of_2(each), CHUNKS, scale is not None,
        )  # fmt: skip
        to_x = torch.empty_like(x)
        gradient_apply[triton.cdiv(pixels, ROWS), blocks, b](
            x, gradient, to_x, lines, factors, pixels, channels, BLOCK, ROWS, ctx.silu
        )
        total, product = totals.unbind(1)
        to_scale = to_shift = None
        if scale is not None:
            to_scale = (weight.float() * product + bias.float() * total).to(scale.dtype)
            to_shift = total.to(scale.dtype)
            total, product = ((1 + scale.float()) * part for part in (total, product))
        to_weight, to_bias = (part.sum(0).to(weight.dtype) for part in (product, total))
        return to_x, None, to_weight, to_bias, None, to_scale, to_shift, None
