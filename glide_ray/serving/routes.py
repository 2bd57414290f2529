"""The OpenAI Images API as FastAPI routes over any backend. Independent of Ray, for testing.

Generations, edits and variations, whole or streamed; models, health and metrics. Fields beyond
OpenAI's: seed, steps, sampler, guidance scale, strength and others, see `schema.py`. Every error is
in OpenAI's format.
"""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from ..config.sampling import SampleOptions
from ..config.serving import ServeConfig
from ..data.images import encode
from ..data.tokenizer import Tokenizer, Tokens
from ..errors import nearest
from ..pretrained.card import credits, licences
from ..sampling.checks import TIMESTEPS, check_options
from ..sampling.job import Job, Source, shrink_known
from ..sampling.order import image_jobs
from ..sampling.recipe import png_text
from .admission import NOBODY
from .errors import ApiError, ErrorBody, answer_of, handle_errors
from .metrics import exposition
from .middleware import RequestMiddleware
from .schema import (
    Edit,
    GeneratedImage,
    Generation,
    ImageFields,
    ImagesResponse,
    Variation,
    form_schema,
    narrowed,
    read_form,
    read_source,
)
from .state import Backend, ServerState, Show

ERRORS = {
    status: {"model": ErrorBody, "description": words}
    for status, words in (
        (400, "The request makes no sense; error.param names the field"),
        (401, "No key, or one that is not known"),
        (403, "No keys are set up, and the client is on another machine"),
        (404, "There is no such model"),
        (408, "The body did not come"),
        (413, "The body or an image is too large"),
        (429, "All places are taken, or the key's own; Retry-After says for how long"),
        (500, "A fault of the server"),
        (503, "No replica is there"),
    )
}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
}
IMAGES = {
    200: {
        "model": ImagesResponse,
        "description": "The images, or with stream the events in which they come",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}
CLOSED = {status: ERRORS[status] for status in (401, 403, 500)}


def build_api(
    state: Callable[[], ServerState],
    config: ServeConfig,
    sizes: Sequence[int] = (64, 256),
    clip: bool = False,
    timesteps: tuple[int, int] = (TIMESTEPS, TIMESTEPS),
) -> FastAPI:
    """Build the FastAPI application.

    `state` is called per request, because under Ray Serve the state exists only inside a replica.
    `sizes`: all image sides, in pixels, that any model can return. `clip`: whether any model has a
    CLIP. `timesteps`: the maximum of any base model and of any upsampler.
    """
    api = FastAPI(
        title="glide_ray",
        description="Text-to-image generation and editing with GLIDE, as the OpenAI Images API.",
        redoc_url=None,
    )
    generation, edit, variation = (
        narrowed(kind, config, sizes, clip, timesteps) for kind in (Generation, Edit, Variation)
    )
    handle_errors(api, list(generation.model_fields))
    api.add_middleware(RequestMiddleware, state=state, config=config)

    async def generations(request: Request, body: generation):
        return await _answer(state(), config, request, body)

    async def edits(request: Request):
        return await _from_image(state(), config, request, edit)

    async def variations(request: Request):
        return await _from_image(state(), config, request, variation)

    for route, form, files in (
        (generations, generation, ()),
        (edits, edit, ("image", "mask")),
        (variations, variation, ("image", "mask")),
    ):
        api.post(
            f"/v1/images/{route.__name__}",
            description=form.__doc__,
            responses=IMAGES | ERRORS,
            response_model=None,
            openapi_extra=form_schema(form, files) if files else None,
        )(route)

    @api.get("/v1/models", responses=CLOSED)
    async def models() -> dict[str, Any]:
        """List the served models, with the sources of their training images and the licences."""
        return {
            "object": "list",
            "data": [_about(name, backend) for name, backend in state().models.items()],
        }

    @api.get("/healthz", responses={500: ERRORS[500]})
    async def healthz() -> dict[str, str]:
        """Liveness check: 200 if the server answers."""
        return {"status": "ok"}

    @api.get("/readyz", responses={500: ERRORS[500], 503: ERRORS[503]})
    async def readyz() -> dict[str, str]:
        """Readiness check: 200 if every stage of every model has a replica with loaded weights."""
        if not (await state().stages())[1]:
            raise ApiError(
                503,
                "A stage has no replica that is ready.",
                code="not_ready",
                headers={"Retry-After": "5"},
            )
        return {"status": "ready"}

    @api.get("/metrics", responses=CLOSED, response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counts, times and loads of all replicas, in Prometheus' text format."""
        texts, (loads, _) = await asyncio.gather(state().texts(), state().stages())
        return PlainTextResponse(
            exposition(texts, loads), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    api.openapi = lambda: _openapi(api)
    return api


def _about(name: str, backend: Backend) -> dict[str, Any]:
    """Entry of OpenAI's list of models, plus the training sources and licences in the weights."""
    sources = backend.maker.sources
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "glide_ray",
        "licence": licences(sources),
        "sources": credits(sources),
    }


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _openapi(api: FastAPI) -> dict:
    """FastAPI's OpenAPI schema without its 422 responses: this API has its own error format."""
    if api.openapi_schema is None:
        schema = get_openapi(
            title=api.title, version="1", description=api.description, routes=api.routes
        )
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        api.openapi_schema = _whole_bounds(schema)
    return api.openapi_schema


def _whole_bounds(schema: Any) -> Any:
    """The same schema with integers as the bounds of integers.

    FastAPI turns every bound into a float. Above 2**53 a client that compares with floats then
    accepts seeds that the server refuses.
    """
    if isinstance(schema, list):
        return [_whole_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    bounds = BOUNDS if schema.get("type") == "integer" else ()
    return {
        key: int(part) if key in bounds else _whole_bounds(part) for key, part in schema.items()
    }


# -- responses -------------------------------------------------------------------------------------


async def _from_image(
    state: ServerState, config: ServeConfig, request: Request, kind: type[ImageFields]
):
    fields, files = await read_form(request, kind, config)
    backend = _backend(state, fields.model)[1]
    source = await asyncio.to_thread(
        read_source, files, config, backend.sizes[-1], issubclass(kind, Variation)
    )
    return await _answer(state, config, request, fields, source)


async def _answer(
    state: ServerState,
    config: ServeConfig,
    request: Request,
    fields: ImageFields,
    source: Source | None = None,
):
    """Make the images of a request; respond whole or streamed.

    Validation and admission come before the first byte of the response.
    """
    job, model = _job(state, config, fields, source, request)
    backend = state.models[model]
    jobs = image_jobs(job, fields.n or 1)
    making = _Making(
        state,
        model,
        backend,
        fields,
        Tokenizer(backend.maker.base.context).encode(job.prompt),
        request.scope["glide"],
    )
    inside = ExitStack()
    inside.enter_context(
        state.admission.admit(
            request.scope["glide"].get("key", NOBODY), model, len(jobs) * job.best_of
        )
    )
    if fields.stream:
        return StreamingResponse(
            making.events(jobs, inside),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
    with inside:
        pictures = await together([making.picture(job) for job in jobs])
        data = [
            await asyncio.to_thread(making.item, job, picture)
            for job, picture in zip(jobs, pictures, strict=True)
        ]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            **making.described(job),
            "usage": making.usage,
            **making.warnings,
        }
    )


@dataclass
class _Making:
    """Makes the images of one request and encodes them as its fields ask."""

    state: ServerState
    model: str
    backend: Backend
    fields: ImageFields
    prompt: Tokens
    told: dict[str, Any]  # fields of the request's log line

    async def picture(self, job: Job, show: Show | None = None) -> GeneratedImage:
        picture = await self.backend.make(job, show)
        self.state.metrics.image(self.model, job.task, picture.seconds)
        self.told["images"] = self.told.get("images", 0) + 1
        self.told["stages"] = {
            stage: round(max(seconds, self.told.get("stages", {}).get(stage, 0)), 4)
            for stage, seconds in picture.seconds.items()
        }
        return picture

    @property
    def form(self) -> str:
        return self.fields.output_format or "png"

    def described(self, job: Job) -> dict[str, str]:
        return {
            "size": f"{job.size}x{job.size}",
            "output_format": self.form,
            "quality": "auto",
            "background": "opaque",
        }

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's usage field. Counts only the prompt's tokens: images have none here."""
        text = sum(self.prompt.mask)
        return {
            "input_tokens": text,
            "output_tokens": 0,
            "total_tokens": text,
            "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        }

    @property
    def warnings(self) -> dict[str, list[str]]:
        """Field `warnings` of the response, if the prompt was truncated; otherwise empty."""
        if not self.prompt.cut:
            return {}
        return {
            "warnings": [
                f"The prompt is longer than {len(self.prompt.tokens)} tokens; "
                f"what comes after them was not read."
            ]
        }

    def item(self, job: Job, picture: GeneratedImage) -> dict[str, Any]:
        encoded = base64.b64encode(
            encode(
                picture.pixels,
                self.form,
                self._recipe(job, picture),
                self.fields.output_compression,
                fast=True,
            )
        ).decode()
        if self.fields.response_format == "url":
            return {"url": f"data:image/{self.form};base64,{encoded}", "seed": picture.seed}
        return {"b64_json": encoded, "seed": picture.seed}

    def _recipe(self, job: Job, picture: GeneratedImage) -> dict[str, str] | None:
        """PNG text chunks for `glide reproduce`; None for other formats.

        Model hashes are those that the replicas reported for this image.
        """
        if self.form != "png":
            return None
        maker, inputs = self.backend.maker, {}
        models = {
            role: used.model_copy(update={"sha256": picture.models.get(role, used.sha256)})
            for role, used in maker.models.items()
        }
        if job.size != self.backend.sizes[-1] or maker.upsampler is None:
            maker, models = (
                replace(maker, upsampler=None),
                {role: used for role, used in models.items() if role != "upsampler"},
            )
        if job.source is not None:
            image, known = shrink_known(job.source.image, job.source.known_mask, job.size)
            inputs = {"image": image, "mask": known}
        return png_text(
            replace(maker, models=models).recipe(
                job.task, job.prompt, picture.seed, job.options, job.strength or 1.0
            ),
            inputs,
        )

    async def events(self, jobs: Sequence[Job], inside: ExitStack) -> AsyncIterator[str]:
        """Server-sent events with OpenAI's names: partial and finished images, as they come."""
        kind = "image_generation" if jobs[0].task == "generate" else "image_edit"
        ready: asyncio.Queue = asyncio.Queue()
        common = {"created_at": int(time.time()), **self.described(jobs[0])}

        async def make(n: int, job: Job) -> None:
            shown = 0

            def show(pixels: np.ndarray) -> None:
                nonlocal shown
                encoded = base64.b64encode(
                    encode(_enlarged(pixels, job.size), self.form, fast=True)
                ).decode()
                ready.put_nowait(
                    {
                        "type": f"{kind}.partial_image",
                        "b64_json": encoded,
                        "partial_image_index": shown,
                        "image_index": n,
                        **common,
                    }
                )
                shown += 1

            picture = await self.picture(job, show if job.previews else None)
            ready.put_nowait(
                {
                    "type": f"{kind}.completed",
                    **await asyncio.to_thread(self.item, job, picture),
                    "image_index": n,
                    **common,
                    "usage": self.usage,
                    **self.warnings,
                }
            )

        with inside:
            whole = asyncio.ensure_future(together([make(n, job) for n, job in enumerate(jobs)]))
            whole.add_done_callback(lambda _: ready.put_nowait(None))
            try:
                while (event := await ready.get()) is not None:
                    yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
                whole.result()
            except Exception as error:  # status 200 is already sent: report the error as an event
                answer = answer_of(self.told["id"], error)
                self.told["error"] = answer.status
                yield f"event: error\ndata: {json.dumps({'type': 'error', **answer.body})}\n\n"
            finally:
                whole.cancel()


async def together(makings: Sequence) -> list:
    """Await all concurrently; if one fails or the client leaves, cancel the others."""
    tasks = [asyncio.ensure_future(making) for making in makings]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _enlarged(pixels: np.ndarray, size: int) -> np.ndarray:
    """Enlarge a preview from the base stage to the requested size, by repeating pixels."""
    return (
        np.kron(pixels, np.ones((size // len(pixels), size // len(pixels), 1), np.uint8))
        if len(pixels) < size
        else pixels
    )


def _backend(state: ServerState, name: str | None) -> tuple[str, Backend]:
    name = next(iter(state.models)) if name is None else name
    if name not in state.models:
        raise ApiError(
            404,
            f"There is no model {name!r} here; {nearest(name, state.models)}",
            "model",
            "model_not_found",
        )
    return name, state.models[name]


def _job(
    state: ServerState,
    config: ServeConfig,
    fields: ImageFields,
    source: Source | None,
    request: Request,
) -> tuple[Job, str]:
    """The job of a request's first image, and the name of its model.

    Raises ApiError or RequestError.
    """
    name, backend = _backend(state, fields.model)
    size = backend.sizes[-1] if fields.size in (None, "auto") else int(fields.size.split("x")[0])
    if size not in backend.sizes:
        raise ApiError(
            400,
            f"size {fields.size} is not made by {name}; choose one of: "
            + ", ".join(f"{size}x{size}" for size in backend.sizes)
            + ".",
            "size",
        )
    clip_scale, best_of = (
        getattr(fields, "clip_scale", None) or 0.0,
        getattr(fields, "best_of", None) or 1,
    )
    if (clip_scale or best_of > 1) and not backend.clip:
        param = "clip_scale" if clip_scale else "best_of"
        raise ApiError(400, f"{param} needs a CLIP model, and {name} has none here.", param)
    if best_of > 1 and source is not None:
        raise ApiError(400, "best_of is for generations only.", "best_of")
    options = SampleOptions(
        sampler=fields.sampler,
        steps=fields.steps,
        upsampler_steps=fields.upsampler_steps,
        guidance_scale=fields.guidance_scale,
        clip_scale=clip_scale,
    )
    strength = None if source is None else getattr(fields, "strength", None)
    if isinstance(fields, Variation):
        strength = strength or Variation.model_fields["strength"].default
    check_options(options, fields.seed, strength, backend.maker.base, backend.maker.upsampler)
    prompt = fields.prompt or ""
    seed = fields.seed if fields.seed is not None else secrets.randbelow(2**31)
    told = request.scope["glide"]
    told |= {"model": name, "seed": seed} | ({"prompt": prompt} if config.log_prompts else {})
    previews = (fields.partial_images or 0) if fields.stream else 0
    return Job(prompt, seed, size, options, source, strength, best_of, previews, told["id"]), name
