"""The HTTP API over a cascade in this process."""

import asyncio

import httpx
import numpy as np

from glide_ray.config.serving import ServeConfig
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.recipe import ModelSet
from glide_ray.serving.admission import Admission
from glide_ray.serving.metrics import Metrics
from glide_ray.serving.routes import build_api
from glide_ray.serving.schema import GeneratedImage
from glide_ray.serving.state import ServerState

CONFIG = ServeConfig(max_images=3, max_upload_bytes=200_000, max_pixels=1_000_000)


class CascadeBackend:
    """A backend that runs both stages in this process."""

    def __init__(self, cascade):
        self.cascade, self.jobs, self.model_set, self.clip = (
            cascade,
            [],
            ModelSet.of(cascade),
            cascade.base.critic is not None,
        )
        self.sizes = (16, 64)

    async def make(self, job, on_preview=None):
        self.jobs.append(job)
        options = job.options.model_copy(
            update={"steps": job.options.steps or 2, "upsampler_steps": 2}
        )
        cascade = self.cascade if job.size == 64 else Cascade(self.cascade.base)
        source = job.source
        for _ in range(job.previews):
            on_preview(np.zeros((16, 16, 3), np.uint8))
        if source is None and job.best_of > 1:
            best = cascade.best_of(job.prompt, [job.seed + k for k in range(job.best_of)], options)
            return GeneratedImage(best.image, best.seed)
        if source is None:
            return GeneratedImage(
                cascade.generate([job.prompt], [job.seed], options)[0], job.seed, {}, {"base": 0.1}
            )
        if job.strength is None:
            return GeneratedImage(
                cascade.edit(source.image, source.known_mask, job.prompt, job.seed, options),
                job.seed,
            )
        return GeneratedImage(
            cascade.vary(
                source.image, job.prompt, job.seed, job.strength, source.known_mask, options=options
            ),
            job.seed,
        )


def asking(backend, config=CONFIG, keys=None, capacity=8, client="127.0.0.1"):
    """A function that sends a request to an API over this backend.

    Its `state` is the ServerState behind the routes, `once` its coroutine, `api` the application.
    """
    state = ServerState({"tiny": backend}, Admission(keys or {}, {"tiny": capacity}), Metrics())
    api = build_api(lambda: state, config, backend.sizes, backend.clip)

    async def once(method, path, **content):
        transport = httpx.ASGITransport(api, raise_app_exceptions=False, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://glide") as asker:
            return await asker.request(method, path, **content)

    def send(method, path, **content):
        return asyncio.run(once(method, path, **content))

    send.state, send.once, send.api = state, once, api
    return send
