"""Classifier-free guidance wraps a denoiser and gives a denoiser (sec. 2.3); CLIP guidance is a gradient for the samplers (sec. 2.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors import Denoiser, ModelOutput, to_device_async


def classifier_free(paired: Denoiser, scale: Tensor) -> Denoiser:
    """eps(empty) + scale (eps(caption) - eps(empty)), with the variance of the caption's half. `scale` (B,).

    `paired` is asked for B + G rows: every sample with its caption, then the G samples whose scale is not 1 with the empty
    caption. At scale 1 the empty half would cancel, so it is not computed. With `scale` on the CPU no device is waited for.
    """
    here = scale.ne(1).nonzero()[:, 0]

    def denoise(x: Tensor, timestep: Tensor) -> ModelOutput:
        guided = slice(None) if len(here) == len(scale) else to_device_async(here, x.device)
        both = paired(torch.cat([x, x[guided]]), torch.cat([timestep, timestep[guided]]))
        caption, empty = both[: len(x)], both[len(x) :]
        eps = combine(caption.eps[guided], empty.eps, to_device_async(scale[here], x.device))
        return ModelOutput(
            eps if len(eps) == len(x) else caption.eps.index_copy(0, guided, eps), caption.variance
        )

    return denoise


def combine(caption_eps: Tensor, empty_eps: Tensor, scale: Tensor) -> Tensor:
    """Extrapolate from the unconditional prediction through the conditional one. Shapes (B, 3, H, W); scale (B,)."""
    return empty_eps + scale.reshape(-1, 1, 1, 1) * (caption_eps - empty_eps)


def score_gradient(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    scale: Tensor,
) -> Tensor:
    """scale times the gradient of `score(x, timestep, text)` (B,) with respect to x (B, 3, H, W). `text` (B, E), `scale` (B,).

    What the samplers take as `gradient`: that of a log-probability, such as noised CLIP's score (sec. 2.4).
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, timestep, text = (
            x.clone().requires_grad_(True),
            timestep.clone(),
            text.clone(),
        )  # free of the caller's inference mode
        (gradient,) = torch.autograd.grad(score(x, timestep, text).sum(), x)
    return gradient * scale.reshape(-1, 1, 1, 1)
