"""The application on Ray Serve: ingress (CPU) -> base -> upsampler, each stage a stepper that batches at every step.

`serve run serve.app:app` from the checkout, `serve deploy serve/config.yaml`, or `glide serve`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError

from glide_ray import cascade
from glide_ray.config import SampleOptions, ServeConfig, UserError
from glide_ray.settings import validate
from glide_ray.data.images import to_uint8
from glide_ray.engine import Engine
from glide_ray.models.weights import load_config
from glide_ray.recipe import Maker, ModelUsed, fingerprint, versions
from glide_ray.storage import fetch

from .api import ApiError, Job, build_api

APP = "glide"
START_SECONDS = 180      # for all replicas to have loaded their weights


class Stage:
    """One model in a replica: its engine, warm before the replica takes requests."""

    def __init__(self, path: str, role: str, precision: str, max_in_flight: int):
        if not torch.cuda.is_available():       # Ray gives a replica one thread for its one CPU; a laptop has no other use for its cores
            torch.set_num_threads(os.cpu_count() or 1)
        stepper = cascade.load_stepper(fetch(path), role, precision, max_in_flight)
        self.config, self._engine = stepper.config, Engine(stepper)
        size = self.config.low_res_size
        if role == "base":
            request = cascade.base_request(self.config, "", 0, SampleOptions(steps=1))
        else:
            request = cascade.upsampler_request(self.config, "", 0, torch.zeros(3, size, size), SampleOptions(upsampler_steps=1))
        self._engine.submit(request).result()

    def load(self) -> tuple[int, int]:
        """Samples in flight and waiting."""
        return self._engine.in_flight, self._engine.queued

    async def sample(self, request) -> torch.Tensor:
        """(3, H, W). When the caller leaves, its future is cancelled and the sample with it, before the next step."""
        return await asyncio.wrap_future(self._engine.submit(request))


@serve.deployment
class Base(Stage):
    async def __call__(self, job: Job) -> torch.Tensor:
        known = (None, None) if job.image is None else cascade.shrink_known(job.image, job.known_mask, self.config.image_size)
        return await self.sample(cascade.base_request(self.config, job.prompt, job.seed, job.options, known=known[0], known_mask=known[1]))


@serve.deployment
class Upsampler(Stage):
    async def __call__(self, job: Job, low_res: torch.Tensor) -> torch.Tensor:
        return await self.sample(cascade.upsampler_request(self.config, job.prompt, job.seed, low_res, known=job.image,
                                                           known_mask=job.known_mask))


class RayBackend:
    """The two stages as the API's backend."""

    def __init__(self, base, upsampler, maker: Maker):
        self.maker, self.model, self.context = maker, maker.base.name, maker.base.context
        self.sizes = (maker.base.image_size, maker.upsampler.image_size)
        self._base, self._upsampler = base, upsampler

    async def make(self, job: Job) -> np.ndarray:
        try:
            image = self._base.remote(job)          # passed on unawaited: it goes from stage to stage, not through here
            if job.size == self.sizes[-1]:
                image = self._upsampler.remote(job, image)
            return to_uint8(await image)
        except BackPressureError:
            raise ApiError(429, "All places are taken; try again soon.", code="rate_limit_exceeded", headers={"Retry-After": "2"}) from None


class Ingress:
    """The HTTP face; `build` binds it to the API's routes."""

    def __init__(self, base, upsampler, maker: Maker):
        self.backend = RayBackend(base, upsampler, maker)


def build(config: ServeConfig) -> serve.Application:
    """The application for these weights. Raises UserError where they are missing, broken or of the wrong kind."""
    configs, used = {}, {}
    for role, path in (("base", config.base), ("upsampler", config.upsampler)):
        local = fetch(path)
        configs[role] = load_config(local)
        cascade.check_role(configs[role], role, path)
        used[role] = ModelUsed(name=configs[role].name, path="", sha256=fingerprint(local))     # where weights lie is not the clients' concern
    cascade.check_pair(configs["base"], configs["upsampler"])
    options = {"ray_actor_options": {"num_cpus": 1, "num_gpus": 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 2 else 0},
               "max_ongoing_requests": 4 * config.max_in_flight, "max_queued_requests": 8 * config.max_in_flight,
               "health_check_period_s": 5}
    stages = [stage.options(name=role, **options).bind(_absolute(path), role, config.precision, config.max_in_flight)
              for stage, role, path in ((Base, "base", config.base), (Upsampler, "upsampler", config.upsampler))]
    ingress = serve.deployment(serve.ingress(_routes(config))(Ingress))
    return ingress.options(name="ingress", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.5}).bind(
        *stages, Maker(configs["base"], configs["upsampler"], used, config.precision, versions("server")))


def app(args: dict[str, Any]) -> serve.Application:
    """For `serve run serve.app:app base=... upsampler=...` and config.yaml: the fields of ServeConfig."""
    return build(validate(ServeConfig, args))


def _routes(config: ServeConfig) -> FastAPI:
    return build_api(lambda: serve.get_replica_context().servable_object.backend, config)


def _absolute(path: str) -> str:
    return path if path.startswith("s3://") else os.path.abspath(path)


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serve on this machine while the context lasts; gives the base URL. Ray must be connected."""
    application = build(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        serve.run(application, name=APP, route_prefix="/", blocking=False, logging_config={"log_level": "WARNING"})
        _wait_until_running()
        yield f"http://{config.host}:{config.port}"
    finally:
        serve.delete(APP)       # and not `serve.shutdown`, which ends the applications of others on a shared cluster


def _wait_until_running() -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = serve.status().applications[APP]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            break
        time.sleep(0.2)
    raise UserError(f"The application did not start: {serve.status().applications[APP].message[-500:]}")
