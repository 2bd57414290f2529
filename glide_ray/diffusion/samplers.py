"""One reverse step each: from x at per-sample indices i (B,) to the next less noisy index.

A sampler is one flat function of tensors: the guided model output, x and fresh noise in; the next x and the predicted
x_0 out. `known` pixels are put into the predicted x_0, so that they come out exactly at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forms import ModelOutput
from .process import eps_from_x0, learned_log_variance, posterior_mean, x0_from_eps
from .schedule import Schedule


@dataclass(frozen=True)
class Known:
    """Pixels that are given: image (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) with 1 where the pixel is known."""

    image: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Step:
    """What one reverse step gives, each (B, 3, H, W)."""

    x: Tensor
    x0: Tensor


def ancestral_step(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor, noise: Tensor,
                   known: Known | None = None, gradient: Tensor | None = None) -> Step:
    """x_{t-1} ~ p(x_{t-1} | x_t) with the learned variance (sec. 2.1). No noise is added where the step ends at x_0.

    `gradient` of a log-probability with respect to x shifts the mean by variance * gradient (sec. 2.2, 2.4).
    """
    x0 = predict_x0(schedule, output, x, i, known)
    log_variance = learned_log_variance(schedule, output.variance, i)
    mean = posterior_mean(schedule, x0, x, i)
    if gradient is not None:
        mean = mean + log_variance.exp() * gradient
    moving = ~schedule.at("last", i)
    return Step(torch.where(moving, mean + (0.5 * log_variance).exp() * noise, mean), x0)


def ddim_step(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor, noise: Tensor,
              known: Known | None = None, gradient: Tensor | None = None, eta: float = 0.0) -> Step:
    """Song et al. (2020), eq. 12: deterministic at eta 0, as noisy as ancestral sampling at eta 1.

    A `gradient` edits eps instead of the mean (Dhariwal & Nichol 2021, algorithm 2).
    """
    x0 = predict_x0(schedule, output, x, i, known)
    alpha_bar, previous = schedule.at("alpha_bar", i), schedule.at("alpha_bar_prev", i)
    if gradient is not None:
        eps = eps_from_x0(schedule, x, i, x0) - (1 - alpha_bar).sqrt().float() * gradient
        x0 = x0_from_eps(schedule, x, i, eps)
    eps = eps_from_x0(schedule, x, i, x0)
    sigma = eta * ((1 - previous) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / previous).sqrt()
    mean = x0 * previous.sqrt().float() + (1 - previous - sigma**2).clamp(min=0).sqrt().float() * eps
    return Step(torch.where(~schedule.at("last", i), mean + sigma.float() * noise, x0), x0)


def ddim_inversion_step(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor) -> Step:
    """The DDIM ODE run backwards: from x at i to the next noisier index (Song et al. 2020, sec. 4.3)."""
    x0 = predict_x0(schedule, output, x, i, None)
    eps = eps_from_x0(schedule, x, i, x0)
    following = schedule.at("alpha_bar_next", i)
    return Step(x0 * following.sqrt().float() + (1 - following).sqrt().float() * eps, x0)


def predict_x0(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor, known: Known | None) -> Tensor:
    """The image under the noise, clipped to [-1, 1], with the known pixels in their place."""
    return _settle(x0_from_eps(schedule, x, i, output.eps), known)


def _settle(x0: Tensor, known: Known | None) -> Tensor:
    x0 = x0.clamp(-1, 1)
    return x0 if known is None else torch.where(known.mask > 0.5, known.image, x0)


SAMPLERS: dict[str, Callable[..., Step]] = {"ancestral": ancestral_step, "ddim": ddim_step}
