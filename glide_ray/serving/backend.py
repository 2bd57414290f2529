"""Served models, and calls of their stages on Ray Serve replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ..config.serving import ServeConfig, ServedModel
from ..errors import UserError
from ..sampling.cascade_calls import (
    CascadeCalls,
    CascadeImage,
    ScoreCall,
    StageCall,
    candidates,
    cascade_calls,
)
from ..sampling.checks import RequestError
from ..sampling.finite import NonFiniteError
from ..sampling.job import Job
from ..sampling.recipe import ModelSet
from .errors import ApiError
from .metrics import Metrics
from .schema import GeneratedImage
from .stages import Base, Stage, StageResult, Upsampler
from .state import PreviewCallback
from .tasks import gather_or_cancel

# Attempts per stage call, each after the death of a replica: limits the damage of a request that
# kills every replica that runs it.
MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class ModelInfo:
    """A served model: its config, and the metadata of its weights, without their tensors."""

    name: str
    config: ServedModel
    model_set: ModelSet

    @property
    def clip(self) -> bool:
        return self.config.clip is not None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.model_set.base.image_size,
            *((self.model_set.upsampler.image_size,) if self.model_set.upsampler else ()),
        )

    @classmethod
    def read(cls, config: ServedModel, precision: str, name: str | None = None) -> ModelInfo:
        """Read the metadata of the weights.

        Raises UserError if a file is missing, broken or of the wrong kind.
        """
        model_set = ModelSet.read(
            {role: getattr(config, role) for role in ("base", "upsampler", "clip")},
            precision,
            "server",
            config.loras,
        )
        return cls(name or model_set.base.name, config, model_set)


def read_models(config: ServeConfig) -> dict[str, ModelInfo]:
    """All models, by the names that clients use. The first serves requests that name no model."""
    first = ModelInfo.read(config, config.precision)
    if first.name in config.more_models:
        raise UserError(
            f"more_models has a model named {first.name!r}, which is also the name of the first "
            f"model; give it another name."
        )
    return {first.name: first} | {
        name: ModelInfo.read(model, config.precision, name)
        for name, model in config.more_models.items()
    }


class RayBackend:
    """Calls the stages of one model.

    If a replica dies, its work is repeated on another with the same seed, which gives the same
    image.
    """

    def __init__(
        self,
        served: ModelInfo,
        base: DeploymentHandle[Base],
        upsampler: DeploymentHandle[Upsampler] | None,
        metrics: Metrics,
    ):
        self.name, self.model_set = served.name, served.model_set
        self.sizes, self.clip = served.sizes, served.clip
        self.base, self.upsampler, self._metrics = base, upsampler, metrics

    async def make(self, job: Job, on_preview: PreviewCallback | None = None) -> GeneratedImage:
        """Make the image of a job; `on_preview` receives `job.previews` previews."""
        upsample = self.upsampler is not None and job.size == self.sizes[-1]
        calls: CascadeCalls[StageResult] = cascade_calls([candidates(job)], upsample)
        result: Any = None
        while True:
            try:
                call = calls.send(result)
            except StopIteration as end:
                return _generated(end.value[0])
            if isinstance(call, ScoreCall):
                result = await self._score(call)
            else:
                result = await self._run(call, on_preview if job.previews else None)

    async def _run(
        self, call: StageCall[StageResult], on_preview: PreviewCallback | None
    ) -> list[StageResult]:
        """Run a stage for all jobs of a call at once."""
        inputs: list[tuple[np.ndarray, ...]] = [()] * len(call.jobs)
        if call.stage == "upsampler":
            inputs = [(small.pixels,) for small in call.low_res]
            if on_preview is not None:
                on_preview(call.low_res[0].pixels)  # the finished base image is one of the previews
        return await gather_or_cancel(
            [
                self._stage(call.stage, job, on_preview, *image)
                for job, image in zip(call.jobs, inputs, strict=True)
            ]
        )

    async def _score(self, call: ScoreCall[StageResult]) -> list[float]:
        """CLIP scores of base images, by one replica of the base stage."""
        images = [image.pixels for image in call.images]
        scores: list[float] = await self._call_with_retries(
            "base", lambda: self.base.score.remote(images, call.prompt)
        )
        return scores

    async def _stage(
        self, stage: str, job: Job, on_preview: PreviewCallback | None, *inputs: np.ndarray
    ) -> StageResult:
        """Run a stage ("base" or "upsampler"), on another replica if one dies."""
        handle: DeploymentHandle[Stage] = getattr(self, stage)
        result: StageResult
        if on_preview is None or not job.previews:
            result = await self._call_with_retries(stage, lambda: handle.make.remote(job, *inputs))
            return result
        sent = 0

        async def read_stream(items: AsyncIterator[np.ndarray | StageResult]) -> StageResult:
            nonlocal sent
            received = 0
            async for item in items:
                if isinstance(item, StageResult):
                    return item
                received += 1
                if received > sent:  # a retry on another replica repeats the first previews
                    sent = received
                    on_preview(item)
            raise RuntimeError(f"The {stage} stage ended without a result.")

        result = await self._call_with_retries(
            stage,
            lambda: handle.options(stream=True).make_with_previews.remote(job, *inputs),
            read_stream,
        )
        return result

    async def _call_with_retries(
        self,
        stage: str,
        start: Callable[[], Any],
        wait: Callable[[Any], Awaitable[Any]] = lambda response: response,
    ) -> Any:
        """Result of a call of a stage, which is repeated if the replica is lost.

        `start`: starts the call and returns Serve's response. `wait`: awaits the response's result.
        Raises RequestError for a request that the stage refuses, NonFiniteError for an image that
        is not finite, and ApiError 503.
        """
        for attempt in range(MAX_ATTEMPTS):
            try:
                response = start()
                return await wait(response)
            except asyncio.CancelledError:
                # The client disconnected. Serve stops the replica's work only after a cancel.
                with suppress(Exception):  # the response may have failed at the same moment
                    response.cancel()
                raise
            except (RequestError, NonFiniteError) as error:
                # Unwrap Ray's error, whose message contains the replica's traceback.
                raise getattr(error, "cause", error) from None
            except (RayActorError, DeploymentUnavailableError):
                self._metrics.retry(self.name, stage)
                await asyncio.sleep(min(2.0, 0.05 * 2**attempt))
        raise ApiError(
            503,
            f"The {stage} stage lost its replica {MAX_ATTEMPTS} times during this request; "
            f"try again later.",
            code="replica_lost",
            headers={"Retry-After": "10"},
        )


def _generated(image: CascadeImage[StageResult]) -> GeneratedImage:
    stages = {"base": image.base_image} | (
        {"upsampler": image.upsampled} if image.upsampled else {}
    )
    return GeneratedImage(
        (image.upsampled or image.base_image).pixels,
        image.seed,
        {name: stage.sha256 for name, stage in stages.items()},
        {name: stage.seconds for name, stage in stages.items()},
    )
