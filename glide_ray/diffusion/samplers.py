"""One reverse step per sampler: from x at per-sample indices i (B,) to the next less noisy index.

A sampler is a function of tensors: it receives a `StepInput` and returns the next x and the
predicted x_0. `known` pixels overwrite those of the predicted x_0, so they are exact at the end;
`renoise_known` is the constraint for models that were not trained for inpainting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
class Known(Rows):
    """Known pixels, for inpainting.

    image (B, 3, H, W) in [-1, 1]; mask (B, 1, H, W), 1 where the pixel is known.
    """

    image: Tensor
    mask: Tensor


@dataclass(frozen=True)
class History(Rows):
    """Predictions of each sample's last three steps, newest first, for multistep samplers.

    Zeros where there was no such step.
    """

    past: Tensor  # (B, 3 steps, 3 channels, H, W)
    x: Tensor  # (B, 3, H, W), from which the last step started
    count: Tensor  # (B,) number of earlier steps

    @classmethod
    def none(cls, x: Tensor) -> History:
        """Empty history of samples x (B, 3, H, W) before their first step."""
        return cls(
            x.new_zeros(len(x), 3, *x.shape[1:]),
            torch.zeros_like(x),
            torch.zeros(len(x), dtype=torch.int64, device=x.device),
        )

    def then(self, step: Step) -> History:
        """The history after one more step."""
        past = torch.cat([step.remembered[:, None], self.past[:, :-1]], dim=1)
        return History(past, step.start, self.count + 1)


@dataclass(frozen=True)
class StepInput:
    """Input of one reverse step of B samples. Each sampler reads the fields that it needs."""

    schedule: Schedule
    output: ModelOutput  # of the network at x, with classifier-free guidance
    x: Tensor  # (B, 3, H, W), at the indices i
    i: Tensor  # (B,) int64, indices into the schedule
    noise: Tensor  # (B, 3, H, W), fresh standard normal noise
    known: Known | None = None
    # (B, 3, H, W), gradient of a log-probability with respect to x: CLIP guidance
    gradient: Tensor | None = None
    history: History | None = None  # for multistep samplers; None: no earlier steps

    def rows(self, index: Tensor) -> StepInput:
        """The same step for the samples that `index` (int64) selects."""
        return replace(
            self,
            output=self.output[index],
            x=self.x[index],
            i=self.i[index],
            noise=self.noise[index],
            known=None if self.known is None else self.known[index],
            gradient=None if self.gradient is None else self.gradient[index],
            history=None if self.history is None else self.history[index],
        )


@dataclass(frozen=True)
class Step(Rows):
    """Result of one reverse step, each (B, 3, H, W)."""

    x: Tensor
    x0: Tensor
    remembered: Tensor  # x_0, or eps in PLMS, for the `History` of later steps
    start: Tensor  # from which the step started: the input, in UniPC after its correction


def ancestral_step(step_input: StepInput) -> Step:
    """x_{t-1} ~ p(x_{t-1} | x_t) with the learned variance (sec. 2.1).

    The step that ends at x_0 adds no noise. A `gradient` shifts the mean by variance * gradient
    (sec. 2.2, 2.4).
    """
    schedule, x, i, known = step_input.schedule, step_input.x, step_input.i, step_input.known
    x0 = predict_x0(schedule, step_input.output, x, i, known)
    log_variance = learned_log_variance(schedule, step_input.output.variance, i)
    mean = posterior_mean(schedule, x0, x, i)
    if step_input.gradient is not None:
        mean = mean + log_variance.exp() * step_input.gradient
    moved = torch.where(
        ~schedule.at("last", i), mean + (0.5 * log_variance).exp() * step_input.noise, mean
    )
    return Step(_exact_at_last(schedule, moved, i, known), x0, x0, x)


def ddim_step(step_input: StepInput, eta: float = 0.0) -> Step:
    """DDIM (Song et al. 2020, eq. 12).

    Deterministic at eta 0, as noisy as ancestral sampling at eta 1. A `gradient` moves the
    predicted x_0 (Dhariwal & Nichol 2021, algorithm 2).
    """
    x0 = _guided_x0(step_input)
    return Step(_towards(step_input, x0, eta), x0, x0, step_input.x)


def plms_step(step_input: StepInput) -> Step:
    """PLMS (Liu et al. 2022, eq. 12), for evenly spaced steps.

    DDIM with eps extrapolated from up to four steps by Adams-Bashforth. A sample's first three
    steps have orders 1 to 3; every step, also these, makes one network call.
    """
    schedule, x, i = step_input.schedule, step_input.x, step_input.i
    history = History.none(x) if step_input.history is None else step_input.history
    eps = eps_from_x0(schedule, x, i, _guided_x0(step_input))
    weights = to_device_async(torch.tensor(ADAMS_BASHFORTH), x.device)[history.count.clamp(max=3)][
        ..., None, None, None
    ]
    combined = (weights * torch.cat([eps[:, None], history.past], dim=1)).sum(1)
    x0 = _settle(x0_from_eps(schedule, x, i, combined), step_input.known)
    return Step(_towards(step_input, x0, 0.0), x0, eps, x)


def dpm_solver_step(step_input: StepInput) -> Step:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), for 15 to 30 steps.

    Second order in lambda = log(signal / noise). The first step is first order and equals DDIM's;
    the last, whose lambda is infinite, returns the predicted x_0.
    """
    return _dpm_solver(step_input, noisy=False)


def dpm_solver_sde_step(step_input: StepInput) -> Step:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, eq. 19): as `dpm_solver_step`, with fresh noise.

    Fresh noise corrects errors of earlier steps, which helps models whose predictions are poor.
    """
    return _dpm_solver(step_input, noisy=True)


def _dpm_solver(step_input: StepInput, noisy: bool) -> Step:
    schedule, x, i = step_input.schedule, step_input.x, step_input.i
    history = History.none(x) if step_input.history is None else step_input.history
    x0 = _guided_x0(step_input)
    alpha_bar, previous = schedule.at("alpha_bar", i), schedule.at("alpha_bar_prev", i)
    last = schedule.at("last", i)
    lambda_now, lambda_next, lambda_previous = (
        _half_log_snr(level) for level in (alpha_bar, previous, schedule.at("alpha_bar_next", i))
    )
    h = torch.where(last, 1.0, lambda_next - lambda_now)
    # The paper's 1 / 2r, where r = size of the previous step / size of this one, clamped to 1/2:
    # evenly spaced timesteps end in steps that are long in lambda, where linear extrapolation fails
    # (measured on Gaussian data: larger error than DDIM).
    weight = torch.where(
        (history.count > 0).reshape(-1, 1, 1, 1),
        (h / (2 * (lambda_now - lambda_previous))).clamp(max=0.5),
        0.0,
    ).float()
    direction = x0 + weight * (x0 - history.past[:, 0])
    # The noise of x shrinks by exp(-h) more in the SDE, and fresh noise makes up for it.
    shrink, decay = (torch.exp(-h), -2 * h) if noisy else (torch.ones_like(h), -h)
    moved = (((1 - previous) / (1 - alpha_bar)).sqrt() * shrink).float() * x - (
        previous.sqrt() * torch.expm1(decay)
    ).float() * direction
    if noisy:
        fresh = ((1 - previous) * -torch.expm1(decay)).sqrt().float()
        moved = moved + fresh * step_input.noise
    return Step(torch.where(last, x0, moved), x0, x0, x)


def unipc_step(step_input: StepInput) -> Step:
    """UniPC of second order, in its B2(h) form (Zhao et al. 2023, algorithms 1 and 2).

    A corrector uses the network output at x to move x itself nearer to the ODE, and a predictor
    steps on from there. Both reuse that one network call.
    """
    history = step_input.history or History.none(step_input.x)
    x0 = _guided_x0(step_input)
    x = _corrected(step_input, history, x0)
    return Step(_predicted(step_input, history, x, x0), x0, x0, x)


def _corrected(step_input: StepInput, history: History, x0: Tensor) -> Tensor:
    """x as the step before would have made it, had it known the prediction x0 at its end.

    First order after a single step, then second. A sample's first step has nothing to correct.
    """
    before, two_before = history.past[:, 0], history.past[:, 1]
    lambdas, levels = _lambdas_from(step_input, 0, 1, 2)
    h = lambdas[0] - lambdas[1]
    # Zhao et al. 2023, eq. 5: R rho = phi / B(h), solved for the two weights.
    first = torch.expm1(-h)
    phi = -first / h - 1
    b1, b2 = phi / first, 2 * (-phi / h - 0.5) / first
    second_order = _as_images(history.count > 1)
    r = torch.where(second_order, (lambdas[2] - lambdas[1]) / h, -1.0)
    rho_before = torch.where(second_order, (b1 - b2) / (1 - r), 0.0)
    rho_now = torch.where(second_order, b1 - rho_before, 0.5)
    slope = (rho_before / r).float() * (two_before - before) + rho_now.float() * (x0 - before)
    moved = ((1 - levels[0]) / (1 - levels[1])).sqrt().float() * history.x - (
        levels[0].sqrt() * first
    ).float() * (before + slope)
    if step_input.known is not None:  # implicit inpainting has drawn its known pixels anew
        moved = torch.where(step_input.known.mask > 0.5, step_input.x, moved)
    return torch.where(_as_images(history.count > 0), moved, step_input.x)


def _predicted(step_input: StepInput, history: History, x: Tensor, x0: Tensor) -> Tensor:
    """The next x, from x and its prediction x0; x0 itself at the last step.

    First order in a sample's first step, then second.
    """
    last = step_input.schedule.at("last", step_input.i)
    lambdas, levels = _lambdas_from(step_input, -1, 0, 1)
    h = torch.where(last, 1.0, lambdas[0] - lambdas[1])
    r = (lambdas[2] - lambdas[1]) / h  # negative
    weight = torch.where(_as_images(history.count > 0), 0.5 / r, 0.0).float()
    moved = ((1 - levels[0]) / (1 - levels[1])).sqrt().float() * x - (
        levels[0].sqrt() * torch.expm1(-h)
    ).float() * (x0 + weight * (history.past[:, 0] - x0))
    return torch.where(last, x0, moved)


def _lambdas_from(step_input: StepInput, *offsets: int) -> tuple[list[Tensor], list[Tensor]]:
    """lambda and alpha_bar (B, 1, 1, 1) of the steps at i + offset.

    Offsets beyond the schedule give any value: they belong to steps that were not made.
    """
    schedule, i = step_input.schedule, step_input.i
    levels = [schedule.at("alpha_bar", (i + k).clamp(0, len(schedule) - 1)) for k in offsets]
    return [_half_log_snr(level) for level in levels], levels


def _as_images(flags: Tensor) -> Tensor:
    return flags.reshape(-1, 1, 1, 1)


def renoise_known(schedule: Schedule, x: Tensor, i: Tensor, noise: Tensor, known: Known) -> Tensor:
    """Implicit inpainting (sec. 4.3; app. E): known pixels drawn from q(x_{t-1} | x_0).

    Applied to x after a step from i.
    """
    previous = schedule.at("alpha_bar_prev", i)
    noised = previous.sqrt().float() * known.image + (1 - previous).sqrt().float() * noise
    return torch.where(known.mask > 0.5, noised, x)


def ddim_inversion_step(schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor) -> Step:
    """DDIM ODE backwards: x at i to the next noisier index (Song et al. 2020, sec. 4.3)."""
    x0 = predict_x0(schedule, output, x, i, None)
    eps = eps_from_x0(schedule, x, i, x0)
    following = schedule.at("alpha_bar_next", i)
    return Step(x0 * following.sqrt().float() + (1 - following).sqrt().float() * eps, x0, x0, x)


def predict_x0(
    schedule: Schedule, output: ModelOutput, x: Tensor, i: Tensor, known: Known | None
) -> Tensor:
    """Predicted x_0, clipped to [-1, 1], with the known pixels filled in."""
    return _settle(x0_from_eps(schedule, x, i, output.eps), known)


def _settle(x0: Tensor, known: Known | None) -> Tensor:
    return _keep(x0.clamp(-1, 1), known)


def _keep(x0: Tensor, known: Known | None) -> Tensor:
    return x0 if known is None else torch.where(known.mask > 0.5, known.image, x0)


def _guided_x0(step_input: StepInput) -> Tensor:
    """Predicted x_0, moved by the gradient and clipped again.

    The move is that of the ancestral step, whose mean moves by variance * gradient: one scale means
    the same in all samplers. The step that ends at x_0 is not moved. A gradient of 0 leaves x_0
    exactly unchanged.
    """
    x0 = predict_x0(
        step_input.schedule, step_input.output, step_input.x, step_input.i, step_input.known
    )
    if step_input.gradient is None:
        return x0
    previous = step_input.schedule.at("alpha_bar_prev", step_input.i)
    moved = x0 + ((1 - previous) / previous.sqrt()).float() * step_input.gradient
    return _settle(moved, step_input.known)


def _towards(step_input: StepInput, x0: Tensor, eta: float) -> Tensor:
    """Next x towards x0, along the eps that x and x0 imply; x0 itself at the last step.

    `eta`: the share of fresh noise.
    """
    schedule, i = step_input.schedule, step_input.i
    eps = eps_from_x0(schedule, step_input.x, i, x0)
    alpha_bar, previous = schedule.at("alpha_bar", i), schedule.at("alpha_bar_prev", i)
    sigma = eta * ((1 - previous) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / previous).sqrt()
    mean = (
        x0 * previous.sqrt().float() + (1 - previous - sigma**2).clamp(min=0).sqrt().float() * eps
    )
    return torch.where(~schedule.at("last", i), mean + sigma.float() * step_input.noise, x0)


def _exact_at_last(schedule: Schedule, x: Tensor, i: Tensor, known: Known | None) -> Tensor:
    """Restore known pixels at the last step, because a gradient moves them too."""
    return torch.where(schedule.at("last", i), _keep(x, known), x)


def _half_log_snr(alpha_bar: Tensor) -> Tensor:
    return 0.5 * (alpha_bar / (1 - alpha_bar)).log()


SAMPLERS: dict[str, Callable[[StepInput], Step]] = {
    "ancestral": ancestral_step,
    "ddim": ddim_step,
    "plms": plms_step,
    "dpm++": dpm_solver_step,
    "dpm++sde": dpm_solver_sde_step,
    "unipc": unipc_step,
}


def step_each(names: Sequence[str], step_input: StepInput) -> Step:
    """One reverse step of every sample by its own sampler; `names`: keys of SAMPLERS, one a row."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    if len(groups) == 1:
        return SAMPLERS[names[0]](step_input)
    device = step_input.x.device
    steps = [
        SAMPLERS[name](step_input.rows(to_device_async(torch.tensor(rows), device)))
        for name, rows in groups.items()
    ]
    order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
    return Step.join(steps)[to_device_async(order, device)]
