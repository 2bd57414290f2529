"""Served models, and calls of their stages on Ray Serve replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..config.serving import ServeConfig, ServedModel
from ..errors import UserError
from ..sampling.cascade import RequestError
from ..sampling.recipe import Maker
from .errors import ApiError
from .metrics import Metrics
from .schema import GeneratedImage, Job
from .stages import Base, Stage, StageResult, Upsampler
from .state import Show
from .tasks import together

# Attempts per stage call; the death of a replica causes the next attempt. The limit stops a request
# that kills every replica that runs it.
TRIES = 10


@dataclass(frozen=True)
class Served:
    """A served model: its config, and the metadata of its weights, without their tensors."""

    name: str
    config: ServedModel
    maker: Maker

    @property
    def clip(self) -> bool:
        return self.config.clip is not None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.maker.base.image_size,
            *((self.maker.upsampler.image_size,) if self.maker.upsampler else ()),
        )

    @classmethod
    def read(cls, config: ServedModel, precision: str, name: str | None = None) -> Served:
        """Read the metadata of the weights.

        Raises UserError if a file is missing, broken or of the wrong kind.
        """
        maker = Maker.read(
            {role: getattr(config, role) for role in ("base", "upsampler", "clip")},
            precision,
            "server",
        )
        return cls(name or maker.base.name, config, maker)


def read_models(config: ServeConfig) -> dict[str, Served]:
    """All models, by the names that clients use. The first serves requests that name no model."""
    first = Served.read(config, config.precision)
    if first.name in config.more_models:
        raise UserError(
            f"more_models has a model named {first.name!r}, which is also the name of the first "
            f"model; give it another name."
        )
    return {first.name: first} | {
        name: Served.read(model, config.precision, name)
        for name, model in config.more_models.items()
    }


class RayBackend:
    """Calls the stages of one model.

    If a replica dies, its work is repeated on another with the same seed, which gives the same
    image.
    """

    def __init__(
        self,
        served: Served,
        base: DeploymentHandle[Base],
        upsampler: DeploymentHandle[Upsampler] | None,
        metrics: Metrics,
    ):
        self.name, self.maker = served.name, served.maker
        self.sizes, self.clip = served.sizes, served.clip
        self.base, self.upsampler, self._metrics = base, upsampler, metrics

    async def make(self, job: Job, show: Show | None = None) -> GeneratedImage:
        """Make the image of a job.

        With an upsampler, one of the `job.previews` is the finished base image, and the two stages
        share the others.
        """
        both = self.upsampler is not None and job.size == self.sizes[-1]
        in_base = job.previews // 2 if both else job.previews
        if job.best_of > 1:
            job, small = await self._best(job)
        else:
            small = await self._stage("base", replace(job, previews=in_base), show)
        if not both:
            return GeneratedImage(
                small.pixels, job.seed, {"base": small.sha256}, {"base": small.seconds}
            )
        if show is not None and job.previews:
            show(small.pixels)
        large = await self._stage(
            "upsampler",
            replace(job, previews=max(0, job.previews - in_base - 1)),
            show,
            small.pixels,
        )
        return GeneratedImage(
            large.pixels,
            job.seed,
            {"base": small.sha256, "upsampler": large.sha256},
            {"base": small.seconds, "upsampler": large.seconds},
        )

    async def _best(self, job: Job) -> tuple[Job, StageResult]:
        """Make `job.best_of` base images and keep the one with the highest CLIP score.

        Returns the job with the seed of this image, and the image.
        """
        jobs = [replace(job, seed=(job.seed + k) % 2**63, previews=0) for k in range(job.best_of)]
        made = await together([self._stage("base", one, None) for one in jobs])
        scores = await self._again(
            "base", lambda: self.base.score.remote([one.pixels for one in made], job.prompt)
        )
        best = int(np.argmax(scores))
        return replace(jobs[best], previews=job.previews), made[best]

    async def _stage(
        self, stage: str, job: Job, show: Show | None, *inputs: np.ndarray
    ) -> StageResult:
        """Run a stage ("base" or "upsampler"), on another replica if one dies."""
        handle: DeploymentHandle[Stage] = getattr(self, stage)
        result: StageResult
        if show is None or not job.previews:
            result = await self._again(stage, lambda: handle.make.remote(job, *inputs))
            return result
        shown = 0

        async def watched(items: AsyncIterator[np.ndarray | StageResult]) -> StageResult:
            nonlocal shown
            seen = 0
            async for item in items:
                if isinstance(item, StageResult):
                    return item
                seen += 1
                if seen > shown:  # a retry on another replica repeats the first previews
                    shown = seen
                    show(item)
            raise RuntimeError(f"The {stage} stage ended without a result.")

        result = await self._again(
            stage, lambda: handle.options(stream=True).watch.remote(job, *inputs), watched
        )
        return result

    async def _again(
        self,
        stage: str,
        ask: Callable[[], Any],
        read: Callable[[Any], Awaitable[Any]] = lambda response: response,
    ) -> Any:
        """Result of a call of a stage, which is repeated if the replica is lost.

        `ask`: starts the call and returns Serve's response. `read`: awaits the response's result.
        Raises RequestError for a request that the stage refuses, and ApiError 503.
        """
        for attempt in range(TRIES):
            try:
                response = ask()
                return await read(response)
            except asyncio.CancelledError:
                # The client left. Without an explicit cancel, Serve lets the replica go on.
                with suppress(Exception):  # the response may have failed at the same moment
                    response.cancel()
                raise
            except RequestError as error:
                # Unwrap Ray's error, whose message contains the replica's traceback.
                raise getattr(error, "cause", error) from None
            except (RayActorError, DeploymentUnavailableError):
                self._metrics.retry(self.name, stage)
                await asyncio.sleep(min(2.0, 0.05 * 2**attempt))
        raise ApiError(
            503,
            f"The {stage} stage lost its replica {TRIES} times during this request; "
            f"try again later.",
            code="replica_lost",
            headers={"Retry-After": "10"},
        )
