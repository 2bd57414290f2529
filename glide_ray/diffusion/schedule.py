"""Noise schedules and respacing.

A `Schedule` holds the tables that a training or sampling step reads, for the S timesteps that are
kept. Step functions index them with a per-sample i (B,), so samples at different timesteps share
one network call. Schedules can be joined, so that samples with different numbers of steps share it
too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from ..config.models import DiffusionConfig
from ..errors import UserError

# The noisiest step of the grids that are even in lambda or sigma has at least this
# lambda = log(signal / noise): on a cosine schedule the last few of 1000 timesteps lie far below,
# where a step changes nothing (Lu et al. 2022b use -5.1 for cosine schedules).
MIN_LAMBDA = -5.1
# Share of lambda in the `mixed` grid. Even in lambda alone, few steps are left where the picture
# takes shape, and the first 4 of 1000 timesteps are missing.
MIXED_LAMBDA = 0.75
EDM_RHO = 7.0  # exponent of the grid of Karras et al. 2022, eq. 5
# Largest share of signal at the first step, which starts from pure noise. Above it, pictures are
# flat (measured: `ddim5` begins at timestep 800 of 1000, with 9%).
MAX_FIRST_SIGNAL = 0.05


class ScheduleError(UserError):
    """An invalid schedule or respacing."""


@dataclass(frozen=True)
class Schedule:
    """Tables of shape (S,), float64 except `timestep` and `last`. Index 0 is the least noisy step.

    The posterior is q(x_{t-1} | x_t, x_0) = N(x0_weight x_0 + xt_weight x_t, posterior_variance)
    (Ho et al. 2020, eq. 6, 7).
    """

    total: int  # timesteps of the training process
    timestep: Tensor  # int64, as the network receives it
    alpha_bar: Tensor  # signal power at this step
    alpha_bar_prev: Tensor  # at the next less noisy step; 1 at index 0
    alpha_bar_next: Tensor  # at the next noisier step; 0 at the noisiest
    posterior_variance: Tensor
    # lower bound of the learned variance: the posterior's; at i=0 that of i=1
    min_log_variance: Tensor
    max_log_variance: Tensor  # upper bound: log beta
    x0_weight: Tensor
    xt_weight: Tensor
    last: Tensor  # bool, true where the step ends at x_0

    def __len__(self) -> int:
        return len(self.timestep)

    @property
    def lambdas(self) -> Tensor:
        """lambda = log(signal / noise) of each step (S,), in amplitudes."""
        return 0.5 * (self.alpha_bar / (1 - self.alpha_bar)).log()

    def at(self, name: str, i: Tensor) -> Tensor:
        """Table `name` at the indices i (B,), shaped (B, 1, 1, 1) for images, on i's device.

        Still float64: a step computes its factors, which reach 1e4, exactly, and rounds each once
        to float32.
        """
        table: Tensor = getattr(self, name)
        return table.to(i.device)[i].reshape(-1, 1, 1, 1)

    def to(self, device: torch.device | str) -> Schedule:
        return Schedule(
            self.total, **{f.name: getattr(self, f.name).to(device) for f in fields(self)[1:]}
        )


def make_schedule(name: str, steps: int = 1000) -> Schedule:
    """The `cosine` or `linear` schedule with all its timesteps. Raises ScheduleError."""
    if name not in ("cosine", "linear"):
        raise ScheduleError(f"There is no noise schedule {name!r}; choose cosine or linear.")
    powers = DiffusionConfig(schedule=name, steps=steps).alpha_bar()
    return _tables(steps, torch.arange(steps), torch.tensor(powers, dtype=torch.float64))


def respace(schedule: Schedule, spacing: str | int) -> Schedule:
    """Keep some of the timesteps, with unchanged alpha_bar and betas recomputed to fit.

    `spacing`: see `grid`. Raises ScheduleError.
    """
    kept = torch.tensor(grid(schedule, spacing))
    return _tables(schedule.total, schedule.timestep[kept], schedule.alpha_bar[kept])


def join(schedules: Sequence[Schedule]) -> Schedule:
    """Concatenate schedules into the same tables.

    Index j of the k-th schedule becomes j plus the lengths of those before it.
    """
    return Schedule(
        schedules[0].total,
        **{
            f.name: torch.cat([getattr(s, f.name) for s in schedules]) for f in fields(Schedule)[1:]
        },
    )


def grid(process: Schedule, spacing: str | int) -> list[int]:
    """The timesteps of a process that a respacing keeps, ascending. Raises ScheduleError.

    - `"even15"`: 15, evenly spaced: as `"15"`, also for samplers to which a number means a grid.
    - `"lambda15"`: 15, even in lambda = log(signal / noise) (Lu et al. 2022b).
    - `"mixed15"`: 15, even in 3/4 lambda + 1/4 timestep, each scaled to 0..1, from first to last.
    - `"edm15"`: 15, even in sigma^(1/7), sigma = noise / signal (Karras et al. 2022, eq. 5).
    - `"t0,90,400,995"`: these timesteps, as `glide tune-sampler` finds them.
    - all others: see `kept_timesteps`.
    """
    total, spacing = len(process), str(spacing).replace(" ", "")
    spacing = spacing.removeprefix("even")
    if spacing == "1":
        return [total - 1]
    if named := re.fullmatch(r"(lambda|mixed|edm)(\d+)", spacing):
        return _even_in_noise(process, named[1], int(named[2]), spacing)
    return _listed(total, spacing) if spacing.startswith("t") else kept_timesteps(total, spacing)


def listed(timesteps: Sequence[int]) -> str:
    """The respacing that lists these timesteps, as `grid` reads it."""
    return "t" + ",".join(map(str, timesteps))


def check_pure_noise(process: Schedule, timestep: int, spacing: str) -> None:
    """Raise ScheduleError if a process still has signal at the timestep where sampling begins."""
    signal = float(process.alpha_bar[timestep])
    if signal > max(MAX_FIRST_SIGNAL, float(process.alpha_bar[-1])):
        raise ScheduleError(
            f"Respacing {spacing!r} begins at timestep {timestep}, where {signal:.0%} of the power "
            f"is signal, but sampling begins from pure noise; use more steps."
        )


def _even_in_noise(process: Schedule, name: str, count: int, spacing: str) -> list[int]:
    """`count` timesteps of the grid `name`: see `grid`."""
    lambdas = process.lambdas
    usable = lambdas if name == "mixed" else lambdas[lambdas >= MIN_LAMBDA]
    if not 2 <= count <= len(usable):
        raise ScheduleError(
            f"Respacing {spacing!r} may have 2 to {len(usable)} steps of this process."
        )
    if name == "edm":
        return even_timesteps((-usable).exp() ** (1 / EDM_RHO), count)
    return even_timesteps(mixed_level(usable, MIXED_LAMBDA if name == "mixed" else 1.0), count)


def mixed_level(lambdas: Tensor, lambda_share: float) -> Tensor:
    """A mixture of lambda and timestep, each scaled to 0..1, for consecutive timesteps (T,)."""
    scaled = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
    return lambda_share * scaled + (1 - lambda_share) * torch.linspace(0, 1, len(lambdas))


def even_timesteps(level: Tensor, count: int) -> list[int]:
    """`count` of the timesteps 0..T-1, ascending, whose levels (T,) are evenly spaced.

    `level` is monotone. Each is rounded to the nearest timestep; where several round to the same,
    the later ones move on to the next.
    """
    wanted = torch.linspace(0, 1, count, dtype=torch.float64)
    wanted = level[0] + wanted * (level[-1] - level[0])
    nearest = (level[None] - wanted[:, None]).abs().argmin(1).tolist()
    kept: list[int] = []
    for n, timestep in enumerate(nearest):
        after_last = kept[-1] + 1 if kept else 0
        kept.append(min(max(timestep, after_last), len(level) - count + n))
    return kept


def _listed(total: int, spacing: str) -> list[int]:
    """The timesteps that a respacing such as `t0,90,400,995` lists."""
    numbers = spacing[1:].split(",")
    kept = [int(number) for number in numbers if number.isdecimal()]
    if len(kept) < len(numbers) or kept != sorted(set(kept)) or kept[-1] >= total:
        raise ScheduleError(
            f"Respacing {spacing!r} must list timesteps from 0 to {total - 1} in ascending order, "
            f"such as 't0,90,400,995'."
        )
    return kept


def kept_timesteps(total: int, spacing: str | int) -> list[int]:
    """The timesteps out of `total` that a released respacing keeps, ascending.

    Raises ScheduleError.

    - `"27"`: 27, evenly spaced from first to last.
    - `"10,10,3,2,2"`: these numbers of evenly spaced timesteps in equal segments, the least noisy
      segment first (app. B.2).
    - `"ddim50"`: 50, every k-th from 0, as in the DDIM paper (Song et al. 2020).
    - `"fast27"`: the 27 steps of the released upsampler: `10,10,3,2,1` and one more just below the
      end, for a process of 1000 steps.
    """
    spacing = str(spacing).replace(" ", "")
    if spacing == "fast27":
        return sorted({*kept_timesteps(total, "10,10,3,2,1")} - {total - 1} | {total - 3})
    if spacing.startswith("ddim"):
        wanted = _positive(spacing[4:], spacing)
        for every in range(1, total):
            if len(range(0, total, every)) == wanted:
                return list(range(0, total, every))
        raise ScheduleError(
            f"No whole stride through {total} timesteps gives {wanted} DDIM steps; "
            f"use {str(wanted)!r} for evenly spaced ones."
        )
    counts = [_positive(count, spacing) for count in spacing.split(",")]
    if len(counts) > total:
        raise ScheduleError(f"Respacing {spacing!r} has more segments than the {total} timesteps.")
    timesteps: list[int] = []
    start = 0
    for segment, count in enumerate(counts):
        size = total // len(counts) + (segment < total % len(counts))
        if count > size:
            raise ScheduleError(
                f"Respacing {spacing!r} wants {count} steps from a segment of {size}; "
                f"ask for fewer."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Accumulate instead of multiplying: the released schedule rounds the running sum.
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride
        start += size
    return timesteps


class RespacedSchedules:
    """Respaced schedules of one process on one device; the last CACHED ones are kept.

    Every strength of a variation has a schedule of its own.
    """

    CACHED = 256  # of up to 90 kB

    def __init__(self, process: Schedule, device: torch.device | str):
        self._process, self._device = process, device
        self._computed = lru_cache(self.CACHED)(self._compute)

    def schedule(self, respacing: str) -> Schedule:
        """The schedule on the device. Raises ScheduleError."""
        return self._computed(respacing)[0]

    def timesteps(self, respacing: str) -> list[int]:
        """Timesteps of the schedule, on the host: reading them waits for no device."""
        return self._computed(respacing)[1]

    def join(self, respacings: Sequence[str]) -> tuple[Schedule, list[int]]:
        """One schedule for samples of several respacings, and the index where each sample's begins.

        `respacings`: one a sample.
        """
        starts: dict[str, int] = {}
        length = 0
        for respacing in dict.fromkeys(respacings):
            starts[respacing] = length
            length += len(self.schedule(respacing))
        schedules = [self.schedule(respacing) for respacing in starts]
        return (
            schedules[0] if len(schedules) == 1 else join(schedules),
            [starts[respacing] for respacing in respacings],
        )

    def _compute(self, respacing: str) -> tuple[Schedule, list[int]]:
        schedule = respace(self._process, respacing)
        return schedule.to(self._device), schedule.timestep.tolist()


def _positive(text: str, spacing: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ScheduleError(
            f"Respacing {spacing!r} is not understood; write '27', 'mixed15', 'lambda15', 'edm15', "
            f"'10,10,3,2,2', 'ddim50' or 'fast27'."
        )
    return int(text)


def _tables(total: int, timestep: Tensor, alpha_bar: Tensor) -> Schedule:
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    following = torch.cat([alpha_bar[1:], alpha_bar.new_zeros(1)])
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # At i=0 the posterior variance is 0 and has no logarithm; use that of i=1 there.
    floor = torch.cat([variance[1:2] if len(variance) > 1 else beta[:1], variance[1:]])
    return Schedule(
        total=total,
        timestep=timestep,
        alpha_bar=alpha_bar,
        alpha_bar_prev=previous,
        alpha_bar_next=following,
        posterior_variance=variance,
        min_log_variance=floor.log(),
        max_log_variance=beta.log(),
        x0_weight=beta * previous.sqrt() / (1 - alpha_bar),
        xt_weight=(1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        last=torch.arange(len(timestep)) == 0,
    )
