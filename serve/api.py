"""The OpenAI Images API as FastAPI routes over any backend. Free of Ray, so that it can be tried and tested by itself.

`POST /v1/images/generations`, `POST /v1/images/edits`, `GET /v1/models`, `GET /healthz`. Beyond the standard fields: seed,
steps, guidance_scale. Every error has OpenAI's form: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from glide_ray.cascade import RequestError, check_options, shrink_known
from glide_ray.config import SampleOptions, ServeConfig, UserError, nearest
from glide_ray.data.images import centre_crop, encode, flatten, load, open_image
from glide_ray.data.masks import centre_crop_mask, check_sizes, mask_of
from glide_ray.recipe import Maker, png_text
from glide_ray.tokenizer import Tokenizer

MAX_JSON_BYTES = 2**20
log = logging.getLogger("glide.api")


@dataclass(frozen=True)
class Job:
    """One image to make, at `size` pixels. An edit has the image (256, 256, 3) uint8 and what of it is known (256, 256)."""

    prompt: str
    seed: int
    size: int
    guidance_scale: float | None = None
    steps: int | None = None
    image: np.ndarray | None = None
    known_mask: np.ndarray | None = None

    @property
    def options(self) -> SampleOptions:
        return SampleOptions(guidance_scale=self.guidance_scale, steps=self.steps)


class Backend(Protocol):
    """What makes the images; `sizes` are the pixels it can answer with, the largest last."""

    model: str
    sizes: tuple[int, ...]
    context: int
    maker: Maker

    async def make(self, job: Job) -> np.ndarray: ...


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "rate_limit_error" if status == 429 else "server_error"
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ImageRequest(BaseModel):
    """What generations and edits share."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1)
    size: Literal["64x64", "256x256", "auto"] | None = "auto"
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    user: str | None = None                                # accepted as clients send it; not used
    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = None


def build_api(backend: Callable[[], Backend], config: ServeConfig) -> FastAPI:
    """The application. `backend` is called per request: under Ray Serve it exists only once the replica does."""
    api = FastAPI(title="glide_ray", description="Text-to-image generation and editing with GLIDE, as the OpenAI Images API.")
    _handle_errors(api)
    _bound_bodies(api)

    @api.post("/v1/images/generations")
    async def generations(body: ImageRequest) -> dict[str, Any]:
        """Images for a prompt."""
        return await _answer(backend(), config, body)

    @api.post("/v1/images/edits")
    async def edits(request: Request) -> dict[str, Any]:
        """Paint anew the transparent part of `mask` (or of `image` itself) in `image`, as the prompt says; multipart form."""
        fields, files = await _form(request, config)
        try:
            body = ImageRequest.model_validate(fields)
        except ValidationError as error:
            raise _refusal(error.errors(), known=[*ImageRequest.model_fields, "image", "mask"]) from None
        made_from = await asyncio.to_thread(_edit_source, files, config, backend().sizes[-1])
        return await _answer(backend(), config, body, *made_from)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [{"id": backend().model, "object": "model", "created": 0, "owned_by": "glide_ray"}]}

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    return api


# -- answering --------------------------------------------------------------------------------------------------------

async def _answer(backend: Backend, config: ServeConfig, body: ImageRequest, image: np.ndarray | None = None,
                  known_mask: np.ndarray | None = None) -> dict[str, Any]:
    job, warnings = _job(backend, config, body)
    job = replace(job, image=image, known_mask=known_mask)
    jobs = [replace(job, seed=(job.seed + k) % 2**63) for k in range(body.n)]
    pictures = await _all(backend.make, jobs)
    form = body.output_format or "png"
    data = [{"b64_json": base64.b64encode(encode(picture, form, _recipe(backend, made) if form == "png" else None)).decode(), "seed": made.seed}
            for picture, made in zip(pictures, jobs, strict=True)]
    answer = {"created": int(time.time()), "data": data, "size": f"{job.size}x{job.size}", "output_format": form}
    return answer | ({"warnings": warnings} if warnings else {})


def _recipe(backend: Backend, job: Job) -> dict[str, str]:
    """What a PNG answer carries, so that `glide reproduce` can make it again."""
    inputs, maker = {}, backend.maker
    if job.size != backend.sizes[-1]:
        maker = replace(maker, upsampler=None, models={"base": maker.models["base"]})
    if job.image is not None:
        inputs = dict(zip(("image", "mask"), shrink_known(job.image, job.known_mask, job.size), strict=True))
    return png_text(maker.recipe("edit" if inputs else "generate", job.prompt, job.seed, job.options), inputs)


async def _all(make: Callable[[Job], Awaitable[np.ndarray]], jobs: list[Job]) -> list[np.ndarray]:
    """All at once; when one fails or the client leaves, the others are given up too."""
    tasks = [asyncio.ensure_future(make(job)) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _job(backend: Backend, config: ServeConfig, body: ImageRequest) -> tuple[Job, list[str]]:
    """The request as one job and what its sender should know. Raises ApiError or RequestError."""
    if body.model not in (None, backend.model):
        raise ApiError(404, f"There is no model {body.model!r} here; {nearest(body.model, [backend.model])}", "model", "model_not_found")
    if body.n > config.max_images:
        raise ApiError(400, f"n must lie between 1 and {config.max_images} (given: {body.n}).", "n")
    check_options(SampleOptions(guidance_scale=body.guidance_scale, steps=body.steps), body.seed)
    size = backend.sizes[-1] if body.size in (None, "auto") else int(body.size.split("x")[0])
    if size not in backend.sizes:
        raise ApiError(400, f"size {body.size} is not served here; choose one of: "
                       + ", ".join(f"{size}x{size}" for size in backend.sizes) + ".", "size")
    warnings = []
    if Tokenizer(backend.context).encode(body.prompt).cut:
        warnings.append(f"The prompt is longer than {backend.context} tokens; what comes after them was not read.")
    seed = body.seed if body.seed is not None else secrets.randbelow(2**31)
    return Job(body.prompt, seed, size, body.guidance_scale, body.steps), warnings


# -- forms ------------------------------------------------------------------------------------------------------------

async def _form(request: Request, config: ServeConfig) -> tuple[dict[str, str], dict[str, bytes]]:
    """The text fields and the files of a multipart form, within the limits."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "An edit is sent as multipart/form-data with the fields image, mask and prompt.")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=20) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")      # as clients write a list
                if name not in ("image", "mask"):
                    raise ApiError(400, f"There is no field {name!r} for a file; {nearest(name, ['image', 'mask'])}", name)
                if name in files:
                    raise ApiError(400, f"Only one {name} can be edited at a time; send a request for each.", name)
                files[name] = await value.read(config.max_upload_bytes + 1)
                if len(files[name]) > config.max_upload_bytes:
                    raise ApiError(413, f"The {name} is larger than {config.max_upload_bytes // 2**20} MiB; make it smaller.", name)
            elif name in ("image", "mask"):
                raise ApiError(400, f"{name} must be a file, not text.", name)
            else:
                fields[name] = value
    if "image" not in files:
        raise ApiError(400, "image is missing; send the image to edit as a file.", "image")
    return fields, files


def _edit_source(files: dict[str, bytes], config: ServeConfig, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The image and its known pixels at the model's size, both cut to their centred square."""
    param = "image"
    try:
        image = load(open_image(files["image"], config.max_pixels))
        param = "mask" if "mask" in files else "image"
        mask = load(open_image(files[param], config.max_pixels)) if "mask" in files else image
        check_sizes(image, mask)
        known = mask_of(mask)
    except UserError as error:
        raise ApiError(400, str(error), param) from None
    if "mask" not in files:     # what is transparent has no colour that could be kept or shown
        image = image.convert("RGBA")
    return centre_crop(flatten(image), size), centre_crop_mask(known, size)


# -- errors -----------------------------------------------------------------------------------------------------------

def _handle_errors(api: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @api.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError):
        return answer(error)

    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError):
        return answer(ApiError(400, str(error), error.param))

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError):
        return answer(_refusal(error.errors(), known=list(ImageRequest.model_fields)))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        message = {404: f"There is nothing at {request.url.path}; see /docs.",
                   405: f"{request.method} is not answered at {request.url.path}; see /docs."}.get(error.status_code, str(error.detail))
        return answer(ApiError(error.status_code, message, headers=error.headers))

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception):
        log.exception("request %s failed", request.headers.get("x-request-id", "-"))    # the id that Ray Serve gave it
        return answer(ApiError(500, "The server failed at this request; its log has the reason under the answer's x-request-id."))


def _refusal(errors: list[dict], known: list[str]) -> ApiError:
    """pydantic's first finding as one sentence."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    param = path[0] if path else None
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"There is no field {param!r}; {nearest(param, known)}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'The body'} is missing.", param, "missing_required_parameter")
    given = repr(first["input"])
    shown = f" (given: {given[:40]}{'...' if len(given) > 40 else ''})" if not isinstance(first["input"], dict) else ""
    return ApiError(400, f"{param or 'The body'}: {first['msg']}{shown}.", param, "invalid_value")


def _bound_bodies(api: FastAPI) -> None:
    @api.middleware("http")
    async def bound(request: Request, proceed):
        """Refuse bodies that are too long before reading them."""
        limit = MAX_JSON_BYTES if request.headers.get("content-type", "").startswith("application/json") else 2**26
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            error = ApiError(413, f"The body is larger than {limit // 2**20} MiB.")
            return JSONResponse(error.body, error.status)
        return await proceed(request)
