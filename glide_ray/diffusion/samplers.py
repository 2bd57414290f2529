"""One reverse step each: from x at per-sample indices i (B,) to the next less noisy index.

A sampler is one flat function of tensors: the guided model output, x and fresh noise in; the next x and the predicted
x_0 out. Multistep samplers also read the sample's `History`. `known` pixels are put into the predicted x_0, so that they come
out exactly at the end; `renoise_known` is the constraint for models that were not trained for inpainting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors import ModelOutput, Rows, to_device_async
from .process import eps_from_x0, learned_log_variance, posterior_mean, x0_from_eps
from .schedule import Schedule

ADAMS_BASHFORTH = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class Known:
    """Pixels that are given: image (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) with 1 where the pixel is known."""

    image: Tensor
    mask: Tensor


@dataclass(frozen=True)
class History(Rows):
    """What each sample's earlier steps remembered, newest first; zeros where there was no such step."""

    past: Tensor  # (B, 3, 3, H, W)
    count: Tensor  # (B,) how many earlier steps

    @classmethod
    def none(cls, x: Tensor) -> History:
        """Of samples x (B, 3, H, W) that have not taken a step."""
        return cls(
            x.new_zeros(len(x), 3, *x.shape[1:]),
            torch.zeros(len(x), dtype=torch.int64, device=x.device),
        )

    def then(self, remembered: Tensor) -> History:
        """After one more step."""
        return History(torch.cat([remembered[:, None], self.past[:, :-1]], dim=1), self.count + 1)


@dataclass(frozen=True)
class Step(Rows):
    """What one reverse step gives, each (B, 3, H, W)."""

    x: Tensor
    x0: Tensor
    remembered: Tensor  # for the `History` of the steps after it


def ancestral_step(
    schedule: Schedule,
    output: ModelOutput,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    known: Known | None = None,
    gradient: Tensor | None = None,
    history: History | None = None,
) -> Step:
    """x_{t-1} ~ p(x_{t-1} | x_t) with the learned variance (sec. 2.1). No noise is added where the step ends at x_0.

    `gradient` of a log-probability with respect to x shifts the mean by variance * gradient (sec. 2.2, 2.4).
    """
    x0 = predict_x0(schedule, output, x, i, known)
    log_variance = learned_log_variance(schedule, output.variance, i)
    mean = posterior_mean(schedule, x0, x, i)
    if gradient is not None:
        mean = mean + log_variance.exp() * gradient
    moved = torch.where(~schedule.at("last", i), mean + (0.5 * log_variance).exp() * noise, mean)
    return Step(_exact_at_last(schedule, moved, i, known), x0, x0)


def ddim_step(
    schedule: Schedule,
    output: ModelOutput,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    known: Known | None = None,
    gradient: Tensor | None = None,
    history: History | None = None,
    eta: float = 0.0,
) -> Step:
    """Song et al. (2020), eq. 12: deterministic at eta 0, as noisy as ancestral sampling at eta 1.

    A `gradient` edits eps instead of the mean (Dhariwal & Nichol 2021, algorithm 2).
    """
    x0 = _guided_x0(schedule, output, x, i, known, gradient)
    return Step(_towards(schedule, x0, eps_from_x0(schedule, x, i, x0), i, noise, eta), x0, x0)


def plms_step(
    schedule: Schedule,
    output: ModelOutput,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    known: Known | None = None,
    gradient: Tensor | None = None,
    history: History | None = None,
) -> Step:
    """DDIM with eps extrapolated from up to four steps by Adams-Bashforth (Liu et al. 2022, eq. 12), for evenly spaced steps.

    A sample's first three steps are of the orders 1 to 3, and ask the network once each as all others do.
    """
    history = History.none(x) if history is None else history
    eps = eps_from_x0(schedule, x, i, _guided_x0(schedule, output, x, i, known, gradient))
    weights = to_device_async(torch.tensor(ADAMS_BASHFORTH), x.device)[history.count.clamp(max=3)][
        ..., None, None, None
    ]
    combined = (weights * torch.cat([eps[:, None], history.past], dim=1)).sum(1)
    x0 = _settle(x0_from_eps(schedule, x, i, combined), known)
    return Step(_towards(schedule, x0, eps_from_x0(schedule, x, i, x0), i, noise, 0.0), x0, eps)


def dpm_solver_step(
    schedule: Schedule,
    output: ModelOutput,
    x: Tensor,
    i: Tensor,
    noise: Tensor,
    known: Known | None = None,
    gradient: Tensor | None = None,
    history: History | None = None,
) -> Step:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): of second order in lambda = log(signal / noise), for 15 to 30 steps.

    The first step is of first order (then it is DDIM's), and the last, whose lambda is infinite, is the predicted image.
    """
    history = History.none(x) if history is None else history
    x0 = _guided_x0(schedule, output, x, i, known, gradient)
    alpha_bar, previous = schedule.at("alpha_bar", i), schedule.at("alpha_bar_prev", i)
    last = schedule.at("last", i)
    here, there, before = (
        _half_log_snr(level) for level in (alpha_bar, previous, schedule.at("alpha_bar_next", i))
    )
    h = torch.where(last, 1.0, there - here)
    # 1 / 2r of the paper, with r the ratio of the step before to this one, but at most 1/2: evenly spaced timesteps end in steps
    # that are long in lambda, over which a straight line leads astray (measured on normal data: farther off than DDIM).
    weight = torch.where(
        (history.count > 0).reshape(-1, 1, 1, 1), (h / (2 * (here - before))).clamp(max=0.5), 0.0
    ).float()
    direction = x0 + weight * (x0 - history.past[:, 0])
    moved = ((1 - previous) / (1 - alpha_bar)).sqrt().float() * x - (
        previous.sqrt() * torch.expm1(-h)
    ).float() * direction
    return Step(torch.where(last, x0, moved), x0, x0)


def renoise_known(schedule: Schedule, x: Tensor, i: Tensor, noise: Tensor, known: Known) -> Tensor:
    """Implicit inpainting (sec. 4.3; app. E): after a step from i, the known pixels as q(x_{t-1} | x_0) has them."""
    previous = schedule.at("alpha_bar_prev", i)
    noised = previous.sqrt().float() * known.image + (1 - previous).sqrt().float() * noise
    return torch.where(known.mask > 0.5, noised, x)


def ddim_inversion_step(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor) -> Step:
    """The DDIM ODE run backwards: from x at i to the next noisier index (Song et al. 2020, sec. 4.3)."""
    x0 = predict_x0(schedule, output, x, i, None)
    eps = eps_from_x0(schedule, x, i, x0)
    following = schedule.at("alpha_bar_next", i)
    return Step(x0 * following.sqrt().float() + (1 - following).sqrt().float() * eps, x0, x0)


def predict_x0(
    schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor, known: Known | None
) -> Tensor:
    """The image under the noise, clipped to [-1, 1], with the known pixels in their place."""
    return _settle(x0_from_eps(schedule, x, i, output.eps), known)


def _settle(x0: Tensor, known: Known | None) -> Tensor:
    return _keep(x0.clamp(-1, 1), known)


def _keep(x0: Tensor, known: Known | None) -> Tensor:
    return x0 if known is None else torch.where(known.mask > 0.5, known.image, x0)


def _guided_x0(
    schedule: Schedule,
    output: ModelOutput,
    x: Tensor,
    i: Tensor,
    known: Known | None,
    gradient: Tensor | None,
) -> Tensor:
    """The predicted image, moved by a gradient's edit of eps: -sqrt(1 - alpha_bar) gradient. Where that is 0, so is the move."""
    x0 = predict_x0(schedule, output, x, i, known)
    if gradient is None:
        return x0
    alpha_bar = schedule.at("alpha_bar", i)
    return _keep(x0 + ((1 - alpha_bar) / alpha_bar.sqrt()).float() * gradient, known)


def _towards(
    schedule: Schedule, x0: Tensor, eps: Tensor, i: Tensor, noise: Tensor, eta: float
) -> Tensor:
    """The state one step on along eps, of which `eta` is drawn anew; x_0 itself at the last step."""
    alpha_bar, previous = schedule.at("alpha_bar", i), schedule.at("alpha_bar_prev", i)
    sigma = eta * ((1 - previous) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / previous).sqrt()
    mean = (
        x0 * previous.sqrt().float() + (1 - previous - sigma**2).clamp(min=0).sqrt().float() * eps
    )
    return torch.where(~schedule.at("last", i), mean + sigma.float() * noise, x0)


def _exact_at_last(schedule: Schedule, x: Tensor, i: Tensor, known: Known | None) -> Tensor:
    """A gradient moves known pixels too; at the end they are what they were."""
    return torch.where(schedule.at("last", i), _keep(x, known), x)


def _half_log_snr(alpha_bar: Tensor) -> Tensor:
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


SAMPLERS: dict[str, Callable[..., Step]] = {
    "ancestral": ancestral_step,
    "ddim": ddim_step,
    "plms": plms_step,
    "dpm++": dpm_solver_step,
}
