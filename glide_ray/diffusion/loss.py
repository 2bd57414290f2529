"""Hybrid loss of a model that learns its variance (Nichol & Dhariwal 2021, sec. 3.1)."""

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
    """Loss of each sample, (B,) float32."""

    total: Tensor  # mse + vb, both weighted
    mse: Tensor  # of eps, unweighted
    # variational-bound term at i in bits per dimension, times S/1000, unweighted
    vb: Tensor


def hybrid_loss(
    schedule: Schedule,
    output: ModelOutput,
    x0: Tensor,
    x_t: Tensor,
    i: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
) -> HybridLoss:
    """MSE of eps plus the variational-bound term.

    The bound term trains the variance only: eps enters it detached. x0, x_t, noise (B, 3, H, W); i
    (B,). `weight` (B,) multiplies the MSE and, clamped to 1, the bound term; None: 1. Computed in
    float32 at any network precision.
    """
    eps, variance = output.eps.float(), output.variance.float()
    mse = _mean(torch.square(noise - eps))
    vb = variational_term(schedule, ModelOutput(eps.detach(), variance), x0, x_t, i) * (
        len(schedule) / 1000
    )
    if weight is None:
        return HybridLoss(mse + vb, mse, vb)
    # Clamped: at almost pure noise weights are unbounded, and the bound term does not vanish.
    return HybridLoss(mse * weight + vb * weight.clamp(max=1), mse, vb)


def min_snr_weight(schedule: Schedule, i: Tensor, most: float, least: float = 0.0) -> Tensor:
    """Weight of eps' error at the indices i that gives x_0's error min(SNR + least, most).

    (B,) float32. eps' error is SNR times x_0's, so uniform weights on eps favour low noise, where
    details are learnt; `most` limits this (Min-SNR, Hang et al. 2023). `least` = 1 gives v's error,
    which does not vanish at almost pure noise, where colour and shape are decided from the caption
    alone (Salimans & Ho 2022).
    """
    power = schedule.alpha_bar.to(i.device)[i]
    snr = power / (1 - power)
    return ((snr + least).clamp(max=most) / snr).float()


def variational_term(
    schedule: Schedule, output: ModelOutput, x0: Tensor, x_t: Tensor, i: Tensor
) -> Tensor:
    """Term of the variational bound at i: (B,) in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at i = 0.
    """
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
    """KL(N1 || N2) of diagonal Gaussians, elementwise, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + torch.exp(log_variance1 - log_variance2)
        + torch.square(mean1 - mean2) * torch.exp(-log_variance2)
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, in nats, of 8-bit pixels x in [-1, 1] under a Gaussian.

    Integrated over each pixel's bin of width 2/255; the outermost bins reach to infinity (Ho et al.
    2020, eq. 13). The CDF is the tanh approximation of Page (1977), as in the released losses: the
    golden numbers agree with it and not with erf.
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
