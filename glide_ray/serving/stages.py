"""The stages of a model as deployments: each replica has one network and an engine that batches at every step."""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from ray import serve

from ..config.sampling import SampleOptions
from ..data.images import to_tensor, to_uint8
from ..models.clip_scorer import fetch_clip
from ..pretrained import shipped
from ..sampling import cascade
from ..sampling.engine import Engine
from ..sampling.request import SampleRequest
from ..storage import fingerprint
from .metrics import StageLoad
from .schema import Job

LANES = 2  # samples that a CPU advances at once, each with its part of the cores


@dataclass(frozen=True)
class StageResult:
    """A stage's image (S, S, 3) uint8, the SHA-256 of the weights that made it, and the seconds it took, its wait included."""

    pixels: np.ndarray
    sha256: str
    seconds: float


class Stage(ABC):
    """One network in a replica, warm before the replica takes requests."""

    role: str
    yields: int  # niceness on a CPU: what is nearer to its end goes first

    def __init__(
        self, model: str, path: str, precision: str, max_in_flight: int, clip: str | None = None
    ):
        if not torch.cuda.is_available():  # all stages share the cores, whatever Ray counts: a lane's threads do not wait for each other
            torch.set_num_threads(os.cpu_count() or 1)
            os.nice(self.yields)
        local = shipped.fetch(path, self.role)
        stepper = cascade.load_stepper(
            local, self.role, precision, max_in_flight, fetch_clip(clip) if clip else None, LANES
        )
        self.config, self.critic, self.device = stepper.config, stepper.critic, stepper.device
        stepper.warm(self._first())
        self._model, self._sha256, self._engine = model, fingerprint(local), Engine(stepper)

    @abstractmethod
    def _first(self) -> SampleRequest:
        """A sample of one step, to warm up with."""

    @abstractmethod
    def _request(self, job: Job, *inputs) -> SampleRequest:
        """The sample of a job, from what the stage before it made."""

    async def make(self, job: Job, *inputs) -> StageResult:
        """The stage's image of a job. When the caller leaves, the sample does too, before the next step."""
        began = time.monotonic()
        return await self._sampled(await asyncio.to_thread(self._request, job, *inputs), began)

    async def watch(self, job: Job, *inputs) -> AsyncIterator[np.ndarray | StageResult]:
        """The same, with what is predicted on the way: `job.previews` images (S, S, 3), then what was made."""
        began, loop, seen = time.monotonic(), asyncio.get_running_loop(), asyncio.Queue()
        request = replace(
            await asyncio.to_thread(self._request, job, *inputs),
            previews=job.previews,
            watch=lambda image: loop.call_soon_threadsafe(seen.put_nowait, to_uint8(image)),
        )
        made = asyncio.ensure_future(self._sampled(request, began))
        made.add_done_callback(seen.put_nowait)
        try:
            while (item := await seen.get()) is not made:
                yield item
            yield made.result()
        finally:
            made.cancel()

    async def _sampled(self, request: SampleRequest, began: float) -> StageResult:
        return self._made(await asyncio.wrap_future(self._engine.submit(request)), began)

    def _made(self, image: torch.Tensor, began: float) -> StageResult:
        return StageResult(to_uint8(image), self._sha256, time.monotonic() - began)

    def check_health(self) -> None:
        """Serve asks every few seconds, and replaces a replica that says several times that it can answer nothing any more."""
        self._engine.check()

    def state(self) -> StageLoad:
        """What this replica has to do and has done."""
        return StageLoad(
            self._model, self.role, serve.get_replica_context().replica_tag, self._engine.load
        )


class Base(Stage):
    """Prompt, or an image and what is known of it, to the base model's image."""

    role = "base"
    yields = 10

    def _first(self) -> SampleRequest:
        return cascade.base_request(self.config, "", 0, SampleOptions(steps=1))

    def _request(self, job: Job) -> SampleRequest:
        if job.source is None:
            made = cascade.base_request(
                self.config, job.prompt, job.seed, job.options, critic=self.critic
            )
        else:
            image, known = job.source.image, job.source.known_mask
            made = cascade.edit_request(
                self.config,
                image,
                known,
                job.prompt,
                job.seed,
                job.options,
                critic=self.critic,
                start=None if job.strength is None else image,
                strength=job.strength or 1.0,
            )
        return replace(made, group=job.request)

    async def score(self, images: list[np.ndarray], prompt: str) -> list[float]:
        """CLIP's logit of each image with the prompt."""
        return await asyncio.to_thread(
            cascade.clip_scores,
            self.critic,
            self.device,
            to_tensor(np.stack(images)),
            [prompt] * len(images),
        )


class Upsampler(Stage):
    """The base model's image to one four times as large."""

    role = "upsampler"
    yields = 0

    def _first(self) -> SampleRequest:
        size = self.config.low_res_size
        return cascade.upsampler_request(
            self.config, "", 0, torch.zeros(3, size, size), SampleOptions(upsampler_steps=1)
        )

    def _request(self, job: Job, low_res: np.ndarray) -> SampleRequest:
        known = (None, None) if job.source is None else (job.source.image, job.source.known_mask)
        made = cascade.upsampler_request(
            self.config,
            job.prompt,
            job.seed,
            to_tensor(low_res),
            job.options,
            known=known[0],
            known_mask=known[1],
        )
        return replace(made, group=job.request)
