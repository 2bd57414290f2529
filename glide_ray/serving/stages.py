"""The stages of a model as Ray Serve deployments.

Each replica has one network, and an engine that forms a new batch at every denoising step.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ray import serve

from ..config.lora import Lora
from ..config.sampling import SampleOptions
from ..data.images import to_tensor, to_uint8
from ..errors import UserError
from ..models.adapter_cache import AdapterCache
from ..models.clip_scorer import fetch_clip
from ..pretrained import shipped
from ..sampling.cascade import clip_scores, load_stepper
from ..sampling.checks import RequestError
from ..sampling.engine import Engine
from ..sampling.job import Job, base_request, upsampler_request
from ..sampling.request import SampleRequest
from ..storage import fingerprint
from .metrics import StageLoad

LANES = 2  # samples that a CPU replica advances in parallel, each on its share of the cores


@dataclass(frozen=True)
class StageResult:
    """Output of a stage for one job.

    `pixels`: (S, S, 3) uint8. `sha256`: of the weights that made it. `seconds`: waiting included.
    """

    pixels: np.ndarray
    sha256: str
    seconds: float


class Stage(ABC):
    """A replica with one network, warmed up before it accepts requests."""

    role: str
    niceness: int  # of the process on a CPU; lower for the later stage, which finishes images

    def __init__(
        self,
        model: str,
        path: str,
        precision: str,
        max_in_flight: int,
        clip: str | None = None,
        loras: Sequence[Lora] = (),
        lora_bytes: int = 0,
    ):
        if not torch.cuda.is_available():
            # Stages share all cores, however many Ray assigns to each: with lanes, stages do not
            # wait for each other's threads.
            torch.set_num_threads(os.cpu_count() or 1)
            os.nice(self.niceness)
        local = shipped.fetch(path, self.role)
        stepper = load_stepper(
            local,
            self.role,
            precision,
            max_in_flight,
            fetch_clip(clip) if clip else None,
            LANES,
            loras=loras,
        )
        self.config, self.critic, self.device = stepper.config, stepper.critic, stepper.device
        stepper.warm(self._warm_up_request())
        self._model, self._sha256, self._engine = model, fingerprint(local), Engine(stepper)
        self._adapters = AdapterCache(stepper.model, self._sha256, lora_bytes)

    @abstractmethod
    def _warm_up_request(self) -> SampleRequest:
        """A request with one step, for warming up."""

    @abstractmethod
    def _request(self, job: Job, low_res: np.ndarray | None = None) -> SampleRequest:
        """The sample request of a job. `low_res`: image of the previous stage, if there is one."""

    async def make(self, job: Job, low_res: np.ndarray | None = None) -> StageResult:
        """Run this stage for a job.

        If the caller cancels, the sample is dropped before the next step.
        """
        began = time.monotonic()
        request = await asyncio.to_thread(self._adapted_request, job, low_res)
        return await self._sampled(request, began)

    async def make_with_previews(
        self, job: Job, low_res: np.ndarray | None = None
    ) -> AsyncIterator[np.ndarray | StageResult]:
        """As `make`, with previews.

        Yields `job.previews` predicted images (S, S, 3) uint8, then the StageResult.
        """
        began, loop = time.monotonic(), asyncio.get_running_loop()
        previews: asyncio.Queue[np.ndarray | None] = asyncio.Queue()  # None: no more will come

        def on_preview(image: torch.Tensor) -> None:  # called in the engine's thread
            loop.call_soon_threadsafe(previews.put_nowait, to_uint8(image))

        request = replace(
            await asyncio.to_thread(self._adapted_request, job, low_res),
            previews=job.previews,
            on_preview=on_preview,
        )
        sampling = asyncio.ensure_future(self._sampled(request, began))
        sampling.add_done_callback(lambda _: previews.put_nowait(None))
        try:
            while (preview := await previews.get()) is not None:
                yield preview
            yield sampling.result()
        finally:
            sampling.cancel()

    def _adapted_request(self, job: Job, low_res: np.ndarray | None) -> SampleRequest:
        """The sample request of a job with its adapters, whose files are read at their first use.

        So replicas that are started later have them too. Raises RequestError for an adapter that
        cannot be used.
        """
        try:
            adapters = self._adapters.scaled([one for one in job.loras if one.role == self.role])
        except UserError as error:
            raise RequestError(str(error), "loras") from error
        return replace(self._request(job, low_res), adapters=adapters)

    async def _sampled(self, request: SampleRequest, began: float) -> StageResult:
        return self._made(await asyncio.wrap_future(self._engine.submit(request)), began)

    def _made(self, image: torch.Tensor, began: float) -> StageResult:
        return StageResult(to_uint8(image), self._sha256, time.monotonic() - began)

    def check_health(self) -> None:
        """Called by Serve every few seconds; after several failures Serve replaces the replica.

        Raises RuntimeError if the engine can serve no further request.
        """
        self._engine.check()

    def state(self) -> StageLoad:
        """Load and counters of this replica."""
        return StageLoad(
            self._model,
            self.role,
            serve.get_replica_context().replica_tag,
            self._engine.load,
            self._adapters.size,
        )

    def release_adapter(self, sha256: str) -> None:
        """Free the memory of an adapter that is no longer loaded in the server."""
        self._adapters.release(sha256)


class Base(Stage):
    """Base stage: from a prompt, with an image and its known pixels for an edit."""

    role = "base"
    niceness = 10

    def _warm_up_request(self) -> SampleRequest:
        return base_request(self.config, "", 0, SampleOptions(steps=1))

    def _request(self, job: Job, low_res: np.ndarray | None = None) -> SampleRequest:
        return job.base_request(self.config, self.critic)

    async def score(self, images: list[np.ndarray], prompt: str) -> list[float]:
        """CLIP logit of each image (S, S, 3) uint8 with the prompt."""
        if self.critic is None:
            raise ValueError("This base stage has no CLIP model to score images with.")
        return await asyncio.to_thread(
            clip_scores,
            self.critic,
            self.device,
            to_tensor(np.stack(images)),
            [prompt] * len(images),
        )


class Upsampler(Stage):
    """Upsampler stage: from the base model's image to one four times as large."""

    role = "upsampler"
    niceness = 0

    def _warm_up_request(self) -> SampleRequest:
        size = self.config.low_res_size or 0
        return upsampler_request(
            self.config, "", 0, torch.zeros(3, size, size), SampleOptions(upsampler_steps=1)
        )

    def _request(self, job: Job, low_res: np.ndarray | None = None) -> SampleRequest:
        if low_res is None:
            raise ValueError("The upsampler stage needs the image of the base stage.")
        return job.upsampler_request(self.config, to_tensor(low_res))
