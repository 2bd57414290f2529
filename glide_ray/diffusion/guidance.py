"""Classifier-free guidance (sec. 2.3) and CLIP guidance (sec. 2.4).

Classifier-free guidance wraps one denoiser in another; CLIP guidance is a gradient for the
samplers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..tensors import Denoiser, ModelOutput, to_device_async


def classifier_free(paired: Denoiser, scale: Tensor) -> Denoiser:
    """A denoiser that returns eps(empty) + scale * (eps(caption) - eps(empty)).

    `scale` (B,). The variance is that of the captioned rows. `paired` receives B + G rows: all B
    samples with their captions, then the G samples whose scale is not 1 with the empty caption. At
    scale 1 the empty-caption terms cancel, so they are not computed. With `scale` on the CPU, the
    host never waits for the GPU.
    """
    guided_rows = scale.ne(1).nonzero()[:, 0]

    def denoise(x: Tensor, timestep: Tensor) -> ModelOutput:
        guided = (
            slice(None)
            if len(guided_rows) == len(scale)
            else to_device_async(guided_rows, x.device)
        )
        both = paired(torch.cat([x, x[guided]]), torch.cat([timestep, timestep[guided]]))
        caption, empty = both[: len(x)], both[len(x) :]
        eps = combine(caption.eps[guided], empty.eps, to_device_async(scale[guided_rows], x.device))
        if not isinstance(guided, slice):
            eps = caption.eps.index_copy(0, guided, eps)
        return ModelOutput(eps, caption.variance)

    return denoise


def combine(caption_eps: Tensor, empty_eps: Tensor, scale: Tensor) -> Tensor:
    """Extrapolate from the empty-caption eps through the captioned eps.

    Shapes (B, 3, H, W); scale (B,).
    """
    return empty_eps + scale.reshape(-1, 1, 1, 1) * (caption_eps - empty_eps)


def score_gradient(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    timestep: Tensor,
    text: Tensor,
    scale: Tensor,
) -> Tensor:
    """scale * gradient of `score(x, timestep, text)` (B,) with respect to x: (B, 3, H, W).

    x (B, 3, H, W), timestep (B,), `text` (B, E), `scale` (B,). The samplers receive it as
    `gradient`: the gradient of a log-probability, such as noised CLIP's score (sec. 2.4).
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Clones: tensors from the caller's inference mode cannot enter autograd.
        x, timestep, text = x.clone().requires_grad_(True), timestep.clone(), text.clone()
        (gradient,) = torch.autograd.grad(score(x, timestep, text).sum(), x)
    return gradient * scale.reshape(-1, 1, 1, 1)
