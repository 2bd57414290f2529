"""The Gaussian diffusion process (sec. 2.1): noising, posterior, conversions of eps and x_0.

Every function receives per-sample indices i (B,) into a `Schedule`; images are (B, 3, H, W).
"""

from __future__ import annotations

from torch import Tensor

from .schedule import Schedule


def q_sample(schedule: Schedule, x0: Tensor, i: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0), from standard normal noise (Ho et al. 2020, eq. 4)."""
    alpha_bar = schedule.at("alpha_bar", i)
    return alpha_bar.sqrt().float() * x0 + (1 - alpha_bar).sqrt().float() * noise


def x0_from_eps(schedule: Schedule, x: Tensor, i: Tensor, eps: Tensor) -> Tensor:
    """The x_0 that x and its predicted noise eps imply."""
    alpha_bar = schedule.at("alpha_bar", i)
    return (1 / alpha_bar).sqrt().float() * x - (1 / alpha_bar - 1).sqrt().float() * eps


def eps_from_x0(schedule: Schedule, x: Tensor, i: Tensor, x0: Tensor) -> Tensor:
    """The noise that x and its predicted x_0 imply."""
    alpha_bar = schedule.at("alpha_bar", i)
    return ((1 / alpha_bar).sqrt().float() * x - x0) / (1 / alpha_bar - 1).sqrt().float()


def posterior_mean(schedule: Schedule, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    return schedule.at("x0_weight", i).float() * x0 + schedule.at("xt_weight", i).float() * x


def learned_log_variance(schedule: Schedule, variance: Tensor, i: Tensor) -> Tensor:
    """Learned log variance: `variance` in [-1, 1] interpolates between two bounds.

    In log space, from the posterior's (-1) to beta's (+1) (Nichol & Dhariwal 2021, eq. 15).
    """
    fraction = (variance + 1) / 2
    return (
        fraction * schedule.at("max_log_variance", i).float()
        + (1 - fraction) * schedule.at("min_log_variance", i).float()
    )
