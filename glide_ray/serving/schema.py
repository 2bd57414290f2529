"""Schemas of requests and responses: OpenAI's fields and extensions, validated before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from starlette.datastructures import UploadFile

from ..config.serving import ServeConfig
from ..data.images import centre_crop, flatten, load, open_image
from ..data.masks import centre_crop_mask, check_sizes, mask_of
from ..errors import UserError, nearest
from ..sampling.checks import MAX_SCALE
from ..sampling.job import Source
from .errors import ApiError, refusal

MAX_BEST_OF = 64  # as in the paper, app. E
FILES = ("image", "mask")


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image.

    `pixels`: (S, S, 3) uint8. `models`: SHA-256 of the weights of each stage. `seconds`: time in
    each stage, waiting included.
    """

    pixels: np.ndarray
    seed: int
    models: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class ImageFields(BaseModel):
    """Common fields of generations, edits and variations."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None, max_length=200, description="One of GET /v1/models; the first where it is left out."
    )
    n: int | None = Field(1, ge=1)
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="A url is a data: URL, which holds the image itself."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="The quality of jpeg and webp; 95 where it is left out."
    )
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        0, ge=0, le=3, description="With stream: how many predictions to show on the way."
    )
    # Sent by OpenAI's clients; without effect here.
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(
        None, description="Accepted, not used: see steps."
    )
    background: Literal["auto", "opaque"] | None = Field(
        None, description="Accepted, not used: pictures are opaque."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted, not used.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted, not used.")
    user: str | None = Field(None, max_length=512, description="Accepted, not used.")
    safety_identifier: str | None = Field(None, max_length=512, description="Accepted, not used.")
    # Extensions to OpenAI's fields.
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="The same seed gives the same picture. With n, the seeds count up from it.",
    )
    steps: int | None = Field(None, ge=1)
    upsampler_steps: int | None = Field(None, ge=1)
    sampler: Literal["ancestral", "ddim", "plms", "dpm++"] | None = Field(
        None, description="Of the base model."
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=MAX_SCALE, allow_inf_nan=False, description="1 is none, 3 usual."
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        """Convert floats such as 2.0 to int: some clients cannot write whole numbers otherwise."""
        if not isinstance(given, dict):
            return given
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }


class ClipFields(BaseModel):
    """Additional fields on servers with a CLIP model."""

    clip_scale: float | None = Field(
        None, ge=0, le=MAX_SCALE, allow_inf_nan=False, description="Of CLIP guidance; 0 is none."
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_BEST_OF,
        description="Make so many for each image and answer the one that CLIP scores highest.",
    )


class Generation(ImageFields):
    """Generate images from a prompt."""

    prompt: str = Field(max_length=32_000)


class Edit(Generation):
    """Inpaint the transparent part of the mask, or of the image itself if there is no mask."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Accepted, not used: what is known is kept exactly."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Begin the painted part from the image under noise, so much of the way.",
    )


class Variation(ImageFields):
    """Make a variation of an image (SDEdit)."""

    prompt: str | None = Field("", max_length=32_000)
    strength: float | None = Field(
        0.6, gt=0, le=1, description="How far from the image: 1 keeps nothing of it."
    )


# -- responses -------------------------------------------------------------------------------------


class Image(BaseModel):
    """One image, as base64 or as a data: URL, and the seed that reproduces it."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    """Body of a response without streaming; docs/serving.md describes the events of a stream."""

    created: int
    data: list[Image]
    size: str
    output_format: Literal["png", "jpeg", "webp"]
    quality: Literal["auto"]
    background: Literal["opaque"]
    usage: dict[str, Any]
    warnings: list[str] = []


def narrowed(
    kind: type[ImageFields],
    config: ServeConfig,
    sizes: Sequence[int],
    clip: bool,
    timesteps: tuple[int, int],
) -> type[ImageFields]:
    """A form with the limits of this server, which appear in its OpenAPI schema.

    `clip`: whether to add `ClipFields`. `timesteps`: the maximum of any base model and of any
    upsampler.
    """
    bases = (kind, ClipFields) if clip else kind
    return create_model(
        kind.__name__,
        __base__=bases,
        __doc__=kind.__doc__,
        n=(Annotated[int, Field(ge=1, le=config.max_images)] | None, 1),
        size=(Literal[("auto", *(f"{size}x{size}" for size in sorted(sizes)))] | None, "auto"),
        steps=(int | None, Field(None, ge=1, le=timesteps[0], description="Of the base model.")),
        upsampler_steps=(int | None, Field(None, ge=1, le=timesteps[1])),
    )


# -- multipart forms -------------------------------------------------------------------------------


def form_schema(kind: type[ImageFields], files: Sequence[str]) -> dict:
    """OpenAPI request body of a multipart form with these files. Only the first is required."""
    schema = kind.model_json_schema()
    schema["properties"] = {
        **{name: {"type": "string", "format": "binary"} for name in files},
        **schema["properties"],
    }
    schema["required"] = [files[0], *schema.get("required", [])]
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


async def read_form(
    request: Request, kind: type[ImageFields], config: ServeConfig
) -> tuple[ImageFields, dict[str, bytes]]:
    """Read and validate the fields and files of a multipart form. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "Images are sent as multipart/form-data, with the image as a file.")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    known = [*kind.model_fields, *FILES]
    async with request.form(max_files=4, max_fields=40) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")  # clients write image[] for a list of files
                if name not in FILES:
                    raise ApiError(
                        400, f"There is no field {name!r} for a file; {nearest(name, FILES)}", name
                    )
                if name in files:
                    raise ApiError(
                        400,
                        f"Only one {name} can be used at a time; send a request for each.",
                        name,
                    )
                files[name] = await value.read(config.max_upload_bytes + 1)
                if len(files[name]) > config.max_upload_bytes:
                    raise ApiError(
                        413,
                        f"The {name} is larger than {config.max_upload_bytes / 2**20:.3g} MiB; "
                        f"make it smaller.",
                        name,
                    )
            elif name in FILES:
                raise ApiError(400, f"{name} must be a file, not text.", name)
            elif name in fields:
                raise ApiError(400, f"{name} is given twice.", name)
            else:
                fields[name] = value
    if "image" not in files:
        raise ApiError(400, "image is missing; send it as a file.", "image")
    try:
        return kind.model_validate(fields, strict=False), files
    except ValidationError as error:
        raise refusal(error.errors(), known) from None


def read_source(files: dict[str, bytes], config: ServeConfig, size: int, whole: bool) -> Source:
    """Decode an image and its mask, centre-crop both and resize them to `size` pixels.

    `whole`: without a mask, no pixel is known (for variations); otherwise the transparent part of
    the image is unknown. Raises ApiError.
    """
    param = "image"
    try:
        image = load(open_image(files["image"], config.max_pixels))
        if whole and "mask" not in files:
            return Source(centre_crop(flatten(image), size), np.zeros((size, size), bool))
        param = "mask" if "mask" in files else "image"
        mask = load(open_image(files[param], config.max_pixels)) if "mask" in files else image
        check_sizes(image, mask)
        known = mask_of(mask)
    except UserError as error:
        raise ApiError(400, str(error), param) from None
    # Without a mask, unknown pixels are the image's transparent ones, which have no colour to show.
    if "mask" not in files:
        image = image.convert("RGBA")
    return Source(centre_crop(flatten(image), size), centre_crop_mask(known, size))
