"""The order of the cascade: base model, choice of the best candidate by CLIP, upsampler.

It is a generator, so that `Cascade`, which runs the stages in this process, and the server, which
awaits replicas, follow the same one: it yields calls and receives their results.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from .job import Job

SEEDS = 2**63  # seeds count up from the request's and wrap around here
T = TypeVar("T")  # image of a stage, in whatever form its runner returns


@dataclass(frozen=True)
class StageCall(Generic[T]):
    """Run a stage for these jobs; the result is a sequence of their images, in order.

    `low_res`: for the upsampler, the image of the base model for each job.
    """

    stage: Literal["base", "upsampler"]
    jobs: Sequence[Job]
    low_res: Sequence[T] = ()


@dataclass(frozen=True)
class ScoreCall(Generic[T]):
    """Score images of the base model by CLIP; the result is a sequence of floats, in order."""

    images: Sequence[T]
    prompt: str


@dataclass(frozen=True)
class CascadeImage(Generic[T]):
    """A finished image.

    `seed`: of the best candidate. `scores`: CLIP score of each candidate by seed, empty for a
    single one.
    """

    small: T  # of the base model
    large: T | None  # of the upsampler, if it ran
    seed: int
    scores: dict[int, float]


# Yields calls and receives their results; returns the finished images.
CascadeOrder = Generator[StageCall[T] | ScoreCall[T], Any, list[CascadeImage[T]]]


def image_jobs(job: Job, n: int) -> list[Job]:
    """The jobs of a request for `n` images, with disjoint candidates."""
    return [replace(job, seed=(job.seed + k * job.best_of) % SEEDS) for k in range(n)]


def candidates(job: Job) -> list[Job]:
    """The jobs whose base images are the candidates of a job: `job.best_of` seeds."""
    return [replace(job, seed=(job.seed + k) % SEEDS, best_of=1) for k in range(job.best_of)]


def split_previews(previews: int, upsample: bool) -> tuple[int, int]:
    """Number of previews from the base model, and from the upsampler.

    With an upsampler, one of the previews is the finished base image.
    """
    if not upsample:
        return previews, 0
    return previews // 2, max(0, previews - previews // 2 - 1)


def run_order(images: Sequence[Sequence[Job]], upsample: bool) -> CascadeOrder[T]:
    """Make images, each from its candidates; yields the calls to the stages, receives results.

    The base model runs for all candidates, without previews where there are several; CLIP chooses
    the best; only these are upsampled, if `upsample`.
    """
    jobs = [
        replace(job, previews=split_previews(job.previews, upsample)[0] if len(own) == 1 else 0)
        for own in images
        for job in own
    ]
    smalls: list[T] = list((yield StageCall("base", jobs)))
    best: list[tuple[Job, CascadeImage[T]]] = []
    for own in images:
        made, smalls = smalls[: len(own)], smalls[len(own) :]
        scores: Sequence[float] = (yield ScoreCall(made, own[0].prompt)) if len(own) > 1 else ()
        chosen = int(np.argmax(scores)) if len(own) > 1 else 0
        by_seed = {job.seed: score for job, score in zip(own, scores, strict=False)}
        best.append((own[chosen], CascadeImage(made[chosen], None, own[chosen].seed, by_seed)))
    if not upsample:
        return [image for _, image in best]
    larges: Sequence[T] = yield StageCall(
        "upsampler",
        [replace(job, previews=split_previews(job.previews, True)[1]) for job, _ in best],
        [image.small for _, image in best],
    )
    return [replace(image, large=large) for (_, image), large in zip(best, larges, strict=True)]
