"""The hybrid loss of a model that learns its variance (Nichol & Dhariwal 2021, sec. 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors import ModelOutput
from .process import learned_log_variance, posterior_mean, x0_from_eps
from .schedule import Schedule


@dataclass(frozen=True)
class HybridLoss:
    """Per sample, (B,) float32."""

    total: Tensor  # mse + vb, weighted
    mse: Tensor  # of eps
    vb: Tensor  # the variational bound's term at i, in bits per dimension, times S/1000


def hybrid_loss(
    schedule: Schedule,
    output: ModelOutput,
    x0: Tensor,
    x_t: Tensor,
    i: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> HybridLoss:
    """MSE of eps plus the bound's term, which teaches the variance only: eps enters it without gradient.

    x0, x_t, noise (B, 3, H, W); i (B,). `weight` (B,) of the MSE, and up to 1 of the bound's term; 1 where there is none. Computed in float32 whatever the
    network's precision.
    """
    eps, variance = output.eps.float(), output.variance.float()
    mse = _mean(torch.square(noise - eps))
    vb = variational_term(schedule, ModelOutput(eps.detach(), variance), x0, x_t, i) * (
        len(schedule) / 1000
    )
    if weight is None:
        return HybridLoss(mse + vb, mse, vb)
    # The bound's term does not vanish where there is all but noise, and weights there are without limit.
    return HybridLoss(mse * weight + vb * weight.clamp(max=1), mse, vb)


def min_snr_weight(schedule: Schedule, i: Tensor, most: float, least: float = 0.0) -> Tensor:
    """The weight of eps' error at the indices i, (B,) float32, with which x_0's error has the weight min(SNR + least, most).

    eps' error is SNR times that of x_0. Evenly weighted it teaches details, where there is little noise; `most` limits
    that (Hang et al. 2023, Min-SNR). With `least` 1 it is v's error, which does not vanish where there is all but noise,
    and colour and shape are decided from the caption alone (Salimans & Ho 2022).
    """
    power = schedule.alpha_bar.to(i.device)[i]
    snr = power / (1 - power)
    return ((snr + least).clamp(max=most) / snr).float()


def variational_term(
    schedule: Schedule, output: ModelOutput, x0: Tensor, x_t: Tensor, i: Tensor
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at i = 0; (B,) in bits per dimension."""
    mean = posterior_mean(schedule, x0_from_eps(schedule, x_t, i, output.eps), x_t, i)
    log_variance = learned_log_variance(schedule, output.variance, i)
    true_mean = posterior_mean(schedule, x0, x_t, i)
    kl = _mean(
        gaussian_kl(true_mean, schedule.at("min_log_variance", i).float(), mean, log_variance)
    )
    nll = _mean(-discretised_log_likelihood(x0, mean, log_variance / 2))
    return torch.where(i == 0, nll, kl) / math.log(2)


def gaussian_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """KL(N1 || N2) of diagonal normals, elementwise, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + torch.exp(log_variance1 - log_variance2)
        + torch.square(mean1 - mean2) * torch.exp(-log_variance2)
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit pixels x in [-1, 1] under a normal, integrated over each pixel's bin of 2/255, in nats.

    The outermost bins reach to infinity (Ho et al. 2020, eq. 13). The normal's cumulative function is the tanh
    approximation of Page (1977), as in the released losses: the golden numbers agree with it and not with erf.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf((x - mean + 1 / 255) * inverse_scale)
    lower = _normal_cdf((x - mean - 1 / 255) * inverse_scale)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
