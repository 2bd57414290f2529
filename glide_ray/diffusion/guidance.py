"""Guidance wraps a denoiser and gives a denoiser (sec. 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..forms import Denoiser, ModelOutput


def classifier_free(paired: Denoiser, scale: Tensor) -> Denoiser:
    """eps(empty) + scale (eps(caption) - eps(empty)), with the variance of the caption's half.

    `paired` answers for a doubled batch, the captions first and the empty captions behind them. `scale` (B,): a sample at
    scale 1 needs no empty half, and the stepper spares it one.
    """
    def guided(x: Tensor, timestep: Tensor) -> ModelOutput:
        both = paired(torch.cat([x, x]), torch.cat([timestep, timestep]))
        caption, empty = both[:len(x)], both[len(x):]
        return ModelOutput(combine(caption.eps, empty.eps, scale), caption.variance)
    return guided


def combine(caption_eps: Tensor, empty_eps: Tensor, scale: Tensor) -> Tensor:
    """Extrapolate from the unconditional prediction through the conditional one. Shapes (B, 3, H, W); scale (B,)."""
    return empty_eps + scale.reshape(-1, 1, 1, 1) * (caption_eps - empty_eps)
