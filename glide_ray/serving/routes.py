"""The OpenAI Images API as FastAPI routes over any backend. Independent of Ray, for testing.

Generations, edits and variations, whole or streamed; models, adapters, health and metrics. Fields
beyond OpenAI's: seed, steps, sampler, guidance scale, strength and others, see `schema.py`. Every
error is in OpenAI's format.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from ..config.sampling import SampleOptions
from ..config.serving import ServeConfig
from ..data.tokenizer import Tokenizer
from ..errors import nearest
from ..pretrained.card import credits, licences
from ..sampling.cascade_calls import image_jobs
from ..sampling.checks import TIMESTEPS, check_negative, check_options
from ..sampling.job import Job, Source
from ..sampling.prompt import check_prompt, is_cut, plain_text
from .admission import ANONYMOUS
from .docs_page import add_docs
from .errors import ApiError, handle_errors
from .forms import FILES, read_form, read_source
from .image_response import ImageMaker
from .loras import LoraFolder
from .metrics import exposition
from .middleware import RequestMiddleware
from .openapi import (
    ERRORS,
    IMAGES,
    KEY_ERRORS,
    LORA_BODY_ERRORS,
    LORA_ERRORS,
    ImagesApi,
    multipart_body,
)
from .schema import (
    Edit,
    Generation,
    LoraDeleted,
    LoraEntry,
    LoraFile,
    LoraList,
    Variation,
    narrowed,
)
from .state import Backend, ServerState
from .streaming import stream_events

GENERATIONS, LORAS = "/v1/images/generations", "/v1/loras"
Form = Generation | Variation
State = Callable[[], ServerState]


def build_api(
    state: State,
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
    api = ImagesApi(
        title="glide_ray",
        description="Text-to-image generation and editing with GLIDE, as the OpenAI Images API.",
        docs_url=None,
        redoc_url=None,
    )
    add_docs(api)
    generation = narrowed(Generation, config, sizes, clip, timesteps)
    edit = narrowed(Edit, config, sizes, clip, timesteps)
    variation = narrowed(Variation, config, sizes, clip, timesteps)
    loras = LoraFolder(config)
    bodies = {GENERATIONS: list(generation.model_fields), LORAS: list(LoraFile.model_fields)}
    handle_errors(api, bodies)
    api.add_middleware(RequestMiddleware, state=state, config=config)
    _add_generations(api, state, config, loras, generation)
    _add_multipart_route(api, state, config, loras, "edits", edit)
    _add_multipart_route(api, state, config, loras, "variations", variation)
    _add_models(api, state)
    _add_loras(api, state, loras)
    _add_health(api, state)
    return api


def _add_generations(
    api: FastAPI, state: State, config: ServeConfig, loras: LoraFolder, form: type[Generation]
) -> None:
    async def generations(request: Request, body: Generation) -> Response:
        return await _answer(state(), config, loras, request, body)

    generations.__annotations__["body"] = form  # FastAPI validates with the annotated class
    api.post(
        GENERATIONS,
        description=form.__doc__ or "",
        responses=IMAGES | ERRORS,
        response_model=None,
    )(generations)


def _add_multipart_route(
    api: FastAPI,
    state: State,
    config: ServeConfig,
    loras: LoraFolder,
    name: str,
    form: type[Form],
) -> None:
    """Add /v1/images/`name`, which makes images from an uploaded image and its mask."""

    async def from_image(request: Request) -> Response:
        fields, files = await read_form(request, form, config)
        backend = _backend(state(), fields.model)[1]
        source = await asyncio.to_thread(
            read_source, files, config, backend.sizes[-1], issubclass(form, Variation)
        )
        return await _answer(state(), config, loras, request, fields, source)

    api.post(
        f"/v1/images/{name}",
        name=name,
        description=form.__doc__ or "",
        responses=IMAGES | ERRORS,
        response_model=None,
        openapi_extra=multipart_body(form, FILES),
    )(from_image)


def _add_models(api: FastAPI, state: State) -> None:
    @api.get("/v1/models", responses=KEY_ERRORS)
    async def models() -> dict[str, Any]:
        """List the served models, with the sources of their training images and the licences."""
        return {
            "object": "list",
            "data": [_model_entry(name, backend) for name, backend in state().models.items()],
        }


def _add_loras(api: FastAPI, state: State, loras: LoraFolder) -> None:
    """Add the list of adapters, and how to load and unload them."""

    @api.get(LORAS, responses=KEY_ERRORS)
    async def list_loras() -> LoraList:
        """List the adapters (LoRA) that requests can name in the field loras."""
        return LoraList(data=await asyncio.to_thread(loras.entries))

    async def load_lora(body: LoraFile) -> LoraEntry:
        served = [backend.model_set for backend in state().models.values()]
        return await asyncio.to_thread(loras.load, body, served)

    api.post(LORAS, description=LoraFile.__doc__ or "", responses=LORA_BODY_ERRORS)(load_lora)

    @api.delete(f"{LORAS}/{{name}}", responses=LORA_ERRORS)
    async def unload_lora(name: str) -> LoraDeleted:
        """Unload an adapter. Its file stays, and requests under way keep the adapter."""
        entry = await asyncio.to_thread(loras.unload, name)
        await state().release_adapter(entry.sha256)
        return LoraDeleted(name=name)


def _add_health(api: FastAPI, state: State) -> None:
    """Add liveness, readiness and metrics."""

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
                "A stage has no ready replica; try again in a few seconds.",
                code="not_ready",
                headers={"Retry-After": "5"},
            )
        return {"status": "ready"}

    @api.get("/metrics", responses=KEY_ERRORS, response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counts, times and loads of all replicas, in Prometheus' text format."""
        texts, (loads, _) = await asyncio.gather(state().texts(), state().stages())
        return PlainTextResponse(
            exposition(texts, loads), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _model_entry(name: str, backend: Backend) -> dict[str, Any]:
    """Entry of OpenAI's list of models, plus the training sources and licences in the weights."""
    sources = backend.model_set.sources
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "glide_ray",
        "licence": licences(sources),
        "sources": credits(sources),
    }


# -- images ----------------------------------------------------------------------------------------


async def _answer(
    state: ServerState,
    config: ServeConfig,
    loras: LoraFolder,
    request: Request,
    fields: Form,
    source: Source | None = None,
) -> Response:
    """Make the images of a request; respond whole or streamed.

    Validation and admission come before the first byte of the response.
    """
    job, model = _job(state, config, fields, source, request)
    backend = state.models[model]
    if fields.loras:
        named = await asyncio.to_thread(loras.named, fields.loras, model, backend.model_set)
        job = replace(job, loras=named)
    jobs = image_jobs(job, fields.n or 1)
    log_fields = request.scope["glide"]
    context = backend.model_set.base.context
    tokens = Tokenizer(context).encode(plain_text(job.prompt))
    tokens = replace(tokens, cut=is_cut(job.prompt, context))
    maker = ImageMaker(state, model, backend, fields, tokens, log_fields)
    admitted = ExitStack()
    admitted.enter_context(
        state.admission.admit(log_fields.get("key", ANONYMOUS), model, len(jobs) * job.best_of)
    )
    if fields.stream:
        return StreamingResponse(
            stream_events(maker, jobs, admitted),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
    with admitted:
        body = await maker.body(jobs)
    return JSONResponse(body)


def _backend(state: ServerState, name: str | None) -> tuple[str, Backend]:
    name = next(iter(state.models)) if name is None else name
    if name not in state.models:
        raise ApiError(
            404,
            f"There is no model {name!r}; {nearest(name, state.models)}",
            "model",
            "model_not_found",
        )
    return name, state.models[name]


def _job(
    state: ServerState,
    config: ServeConfig,
    fields: Form,
    source: Source | None,
    request: Request,
) -> tuple[Job, str]:
    """The job of a request's first image, and the name of its model.

    Raises ApiError or RequestError.
    """
    name, backend = _backend(state, fields.model)
    size = _size(fields, name, backend)
    clip_scale, best_of = _clip_options(fields, source, name, backend)
    options = SampleOptions(
        sampler=fields.sampler,
        steps=fields.steps,
        upsampler_sampler=fields.upsampler_sampler,
        upsampler_steps=fields.upsampler_steps,
        guidance_scale=fields.guidance_scale,
        upsampler_guidance_scale=fields.upsampler_guidance_scale,
        negative_prompt=fields.negative_prompt or "",
        clip_scale=clip_scale,
    )
    strength = None if source is None else getattr(fields, "strength", None)
    if isinstance(fields, Variation):
        strength = strength or Variation.model_fields["strength"].default
    check_options(
        options, fields.seed, strength, backend.model_set.base, backend.model_set.upsampler
    )
    check_negative(backend.model_set.base, options)
    prompt = fields.prompt or ""
    check_prompt(prompt)
    seed = fields.seed if fields.seed is not None else secrets.randbelow(2**31)
    log_fields = request.scope["glide"]
    log_fields |= {"model": name, "seed": seed} | ({"prompt": prompt} if config.log_prompts else {})
    previews = (fields.partial_images or 0) if fields.stream else 0
    job = Job(prompt, seed, size, options, source, strength, best_of, previews, log_fields["id"])
    return job, name


def _size(fields: Form, name: str, backend: Backend) -> int:
    """Image side in pixels. Raises ApiError for one that the model `name` does not make."""
    if fields.size is None or fields.size == "auto":
        return backend.sizes[-1]
    size = int(fields.size.split("x")[0])
    if size not in backend.sizes:
        choices = ", ".join(f"{size}x{size}" for size in backend.sizes)
        raise ApiError(
            400, f"{name} does not make size {fields.size}; choose one of: {choices}.", "size"
        )
    return size


def _clip_options(
    fields: Form, source: Source | None, name: str, backend: Backend
) -> tuple[float, int]:
    """CLIP guidance scale and number of candidates. Raises ApiError if they cannot be used."""
    clip_scale = getattr(fields, "clip_scale", None) or 0.0
    best_of = getattr(fields, "best_of", None) or 1
    if (clip_scale or best_of > 1) and not backend.clip:
        param = "clip_scale" if clip_scale else "best_of"
        raise ApiError(400, f"{param} needs a CLIP model, and {name} has none here.", param)
    if best_of > 1 and source is not None:
        raise ApiError(400, "best_of is for generations only.", "best_of")
    return clip_scale, best_of
