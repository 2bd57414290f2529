"""The calls of the cascade in their order: base model, choice of the best by CLIP, upsampler.

A generator yields the calls and receives their results. It is shared by `Cascade`, which runs the
stages in this process, and by the server, which awaits replicas.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from .job import Job
from .prompt import plain_text

SEED_COUNT = 2**63  # seeds count up from the request's, modulo this
T = TypeVar("T")  # image of a stage: a tensor in `Cascade`, a StageResult in the server


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

    base_image: T
    upsampled: T | None  # None: the upsampler did not run
    seed: int
    scores: dict[int, float]


# Yields calls and receives their results; returns the finished images.
CascadeCalls = Generator[StageCall[T] | ScoreCall[T], Any, list[CascadeImage[T]]]


def image_jobs(job: Job, n: int) -> list[Job]:
    """The jobs of a request for `n` images, with disjoint candidates."""
    return [replace(job, seed=(job.seed + k * job.best_of) % SEED_COUNT) for k in range(n)]


def candidates(job: Job) -> list[Job]:
    """The jobs whose base images are the candidates of a job: `job.best_of` seeds."""
    return [replace(job, seed=(job.seed + k) % SEED_COUNT, best_of=1) for k in range(job.best_of)]


def split_previews(previews: int, upsample: bool) -> tuple[int, int]:
    """Number of previews from the base model, and from the upsampler.

    With an upsampler, one of the previews is the finished base image.
    """
    if not upsample:
        return previews, 0
    return previews // 2, max(0, previews - previews // 2 - 1)


def cascade_calls(image_candidates: Sequence[Sequence[Job]], upsample: bool) -> CascadeCalls[T]:
    """Yield the calls that generate images, receive their results, and return the images.

    `image_candidates`: for each image, the jobs of its candidates. The base model runs for all
    candidates, without previews where an image has several. CLIP chooses the best candidate of each
    image. Only these are upsampled, if `upsample`.
    """
    base_jobs = [
        replace(job, previews=split_previews(job.previews, upsample)[0] if len(jobs) == 1 else 0)
        for jobs in image_candidates
        for job in jobs
    ]
    base_images: list[T] = list((yield StageCall("base", base_jobs)))
    best_jobs: list[Job] = []
    best_images: list[CascadeImage[T]] = []
    for jobs in image_candidates:
        candidate_images, base_images = base_images[: len(jobs)], base_images[len(jobs) :]
        scores: Sequence[float] = ()
        if len(jobs) > 1:
            scores = yield ScoreCall(candidate_images, plain_text(jobs[0].prompt))
        best = int(np.argmax(scores)) if len(jobs) > 1 else 0
        by_seed = {job.seed: score for job, score in zip(jobs, scores, strict=False)}
        best_jobs.append(jobs[best])
        best_images.append(CascadeImage(candidate_images[best], None, jobs[best].seed, by_seed))
    if not upsample:
        return best_images
    previews = [split_previews(job.previews, True)[1] for job in best_jobs]
    upsampled: Sequence[T] = yield StageCall(
        "upsampler",
        [replace(job, previews=count) for job, count in zip(best_jobs, previews, strict=True)],
        [image.base_image for image in best_images],
    )
    return [
        replace(image, upsampled=large) for image, large in zip(best_images, upsampled, strict=True)
    ]
