"""Search for the timesteps at which UniPC follows the ODE of a model most closely.

The measure is the distance of pictures to those of many DDIM steps from the same noise. The first
candidates are the named grids and a family of mixed ones; the best of them is then refined, one
timestep after another. As in Align Your Steps (Sabour et al. 2024), timesteps belong to a model and
a number of steps; unlike there, the measure is the final picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor

from ..config.models import ModelConfig
from ..config.sampling import SampleOptions
from ..diffusion.schedule import (
    Schedule,
    even_timesteps,
    grid,
    listed,
    make_schedule,
    mixed_level,
)
from .job import base_request, upsampler_request
from .request import SampleRequest
from .stepper import Stepper

TRUTH = ("ddim", "250")  # sampler and respacing whose pictures are the aim
# Candidates to begin with: shares of lambda in a mixed grid, and its ends as shares of the process
LAMBDA_SHARES = (0.25, 0.5, 0.75)
NOISIEST = (1.0, 0.996)
CLEANEST = (0.0, 0.005)
MOVES = (0.3, 0.1)  # distances that a timestep is moved, as shares of the gap to its neighbour

# Requests for the same pictures by a sampler and a respacing
Requests = Callable[[str, str], Sequence[SampleRequest]]
Progress = Callable[[int, int], None]  # grids tried, and the number of them


@dataclass
class GridSearch:
    """Distances of the grids that were tried so far, by respacing."""

    stepper: Stepper
    requests: Requests
    truth: Tensor
    distances: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, stepper: Stepper, requests: Requests) -> GridSearch:
        """Make the pictures of `TRUTH`, to which all others are compared."""
        return cls(stepper, requests, stepper.run(requests(*TRUTH)))

    def distance(self, respacing: str, sampler: str = "unipc") -> float:
        """RMSE of the pictures of a respacing to the truth, in [-1, 1]."""
        key = f"{sampler} {respacing}"
        if key not in self.distances:
            pictures = self.stepper.run(self.requests(sampler, respacing))
            self.distances[key] = (pictures - self.truth).square().mean().sqrt().item()
        return self.distances[key]


def tune_grid(
    search: GridSearch, steps: int, progress: Progress | None = None
) -> tuple[str, float]:
    """Search the best respacing for UniPC with `steps` steps. Returns it and its RMSE."""
    config = search.stepper.config.diffusion
    process = make_schedule(config.schedule, config.steps)
    candidates = starting_grids(process, steps)
    tried, most = 0, len(candidates) + 2 * steps * len(MOVES)
    best, least = candidates[0], float("inf")

    def better(kept: list[int]) -> bool:
        nonlocal best, least, tried
        distance = search.distance(listed(kept))
        tried += 1
        if distance < least:
            best, least = kept, distance
        if progress:
            progress(tried, most)
        return best is kept

    for candidate in candidates:
        better(candidate)
    for share in MOVES:
        for index in reversed(range(steps)):  # in the order of sampling, the noisiest first
            for direction in (-1, 1):
                kept = moved(best, index, direction * share, len(process))
                if kept is not None and better(kept):
                    break  # the other direction leads back
    if progress:
        progress(most, most)
    return listed(best), least


def starting_grids(process: Schedule, steps: int) -> list[list[int]]:
    """Different grids of `steps` timesteps to begin the search with.

    Raises ScheduleError for a number that the named grids do not have.
    """
    found = [grid(process, f"{name}{steps}") for name in ("lambda", "mixed", "edm")]
    for share, noisiest, cleanest in product(LAMBDA_SHARES, NOISIEST, CLEANEST):
        first, last = (round(end * (len(process) - 1)) for end in (cleanest, noisiest))
        level = mixed_level(process.lambdas[first : last + 1], share)
        if len(level) >= steps:
            found.append([first + timestep for timestep in even_timesteps(level, steps)])
    return [kept for n, kept in enumerate(found) if kept not in found[:n]]


def moved(kept: list[int], index: int, share: float, total: int) -> list[int] | None:
    """The grid with a timestep moved by a share of the gap to its neighbour on that side.

    At least by 1; None where there is no room.
    """
    neighbour = index + (1 if share > 0 else -1)
    if neighbour < 0:
        limit = -1
    elif neighbour == len(kept):
        limit = total
    else:
        limit = kept[neighbour]
    gap = limit - kept[index]
    if abs(gap) <= 1:
        return None
    distance = max(1, round(abs(share * gap))) * (1 if share > 0 else -1)
    return [*kept[:index], kept[index] + distance, *kept[index + 1 :]]


def base_requests(
    config: ModelConfig, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None = None
) -> Requests:
    """Requests to a base model, a prompt and a seed for each picture.

    `guidance`: classifier-free guidance scale, by default the model's own.
    """

    def requests(sampler: str, respacing: str) -> list[SampleRequest]:
        options = SampleOptions(sampler=sampler, steps=respacing, guidance_scale=guidance)
        pairs = zip(prompts, seeds, strict=True)
        return [base_request(config, prompt, seed, options) for prompt, seed in pairs]

    return requests


def upsampler_requests(
    config: ModelConfig, prompts: Sequence[str], seeds: Sequence[int], low_res: Tensor
) -> Requests:
    """Requests to an upsampler. `low_res` (N, 3, h, w): pictures of the base model."""

    def requests(sampler: str, respacing: str) -> list[SampleRequest]:
        options = SampleOptions(upsampler_sampler=sampler, upsampler_steps=respacing)
        rows = zip(prompts, seeds, low_res, strict=True)
        return [upsampler_request(config, *row, options) for row in rows]

    return requests
