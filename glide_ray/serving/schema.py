"""Schemas of requests and responses: OpenAI's fields and extensions, validated before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..config.models import SamplerName
from ..config.serving import ServeConfig
from ..sampling.checks import MAX_SCALE

MAX_LORAS = 8  # adapters of a request
MAX_LORA_SCALE = 10.0
LORA_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# No name in the path begins with a dot, so that it cannot lead out of the folder.
LORA_PATH = r"^([A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors$"
MAX_BEST_OF = 64  # as in the paper, app. E


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


class LoraUse(BaseModel):
    """An adapter of GET /v1/loras, and how strongly it changes the image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=200, description="Name under which it was loaded.")
    scale: float = Field(
        1.0,
        ge=-MAX_LORA_SCALE,
        le=MAX_LORA_SCALE,
        allow_inf_nan=False,
        description="0 leaves the model as it is, 1 is as trained.",
    )


class ImageFields(BaseModel):
    """Common fields of generations, edits and variations."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None, max_length=200, description="A model of GET /v1/models; default: the first."
    )
    n: int | None = Field(1, ge=1)
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="url returns a data: URL that contains the image itself."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg and webp; default: 95."
    )
    stream: bool | None = Field(False, description="Respond with server-sent events.")
    partial_images: int | None = Field(
        0,
        ge=0,
        le=3,
        description="With stream: number of previews of the unfinished image.",
    )
    # Sent by OpenAI's clients; without effect here.
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(
        None, description="Accepted and ignored; set steps instead."
    )
    background: Literal["auto", "opaque"] | None = Field(
        None, description="Accepted and ignored: images are opaque."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted and ignored.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted and ignored.")
    user: str | None = Field(None, max_length=512, description="Accepted and ignored.")
    safety_identifier: str | None = Field(None, max_length=512, description="Accepted and ignored.")
    # Extensions to OpenAI's fields.
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="The same seed gives the same image. With n, the seeds count up from it.",
    )
    steps: int | None = Field(None, ge=1)
    upsampler_steps: int | None = Field(None, ge=1)
    sampler: SamplerName | None = Field(None, description="Sampler of the base model.")
    upsampler_sampler: SamplerName | None = Field(None, description="Sampler of the upsampler.")
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_SCALE,
        allow_inf_nan=False,
        description="Classifier-free guidance scale; 1: none, 3: a common value.",
    )
    upsampler_guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_SCALE,
        allow_inf_nan=False,
        description="Classifier-free guidance scale of the upsampler.",
    )
    negative_prompt: str | None = Field(
        None,
        max_length=32_000,
        description="What the image should not show; needs a guidance scale other than 1.",
    )
    loras: list[LoraUse] | None = Field(
        None,
        max_length=MAX_LORAS,
        description="Adapters of GET /v1/loras for these images, which add up. In a form: one "
        "field with this JSON array as its text.",
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
        None,
        ge=0,
        le=MAX_SCALE,
        allow_inf_nan=False,
        description="CLIP guidance scale; 0: none.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_BEST_OF,
        description="Candidates per image; the one with the highest CLIP score is returned.",
    )


class Generation(ImageFields):
    """Generate images from a prompt."""

    prompt: str = Field(max_length=32_000)


class Edit(Generation):
    """Inpaint the part of the image that the mask leaves to be painted.

    A mask with transparency: all but its opaque pixels. A black-and-white mask: all but its black
    pixels. No mask: the pixels of the image itself that are not opaque. The centred square of the
    image and of its mask is used.
    """

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Accepted and ignored: known pixels are kept exactly."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Start the unknown part from the image plus noise (SDEdit) instead of from "
        "noise; fraction of the schedule to run, 1: all.",
    )


class Variation(ImageFields):
    """Make a variation of an image (SDEdit)."""

    prompt: str | None = Field("", max_length=32_000)
    strength: float | None = Field(
        0.6,
        gt=0,
        le=1,
        description="Distance from the image, as the fraction of the schedule to run; 1: keeps "
        "nothing of it.",
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


# -- adapters --------------------------------------------------------------------------------------


class LoraFile(BaseModel):
    """Load an adapter (LoRA) from the server's folder under a name for the field `loras`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=LORA_NAME, description="Name for the field loras of requests.")
    path: str = Field(
        pattern=LORA_PATH, max_length=500, description="File, relative to the server's lora_folder."
    )


class LoraEntry(BaseModel):
    """A loaded adapter."""

    object: Literal["lora"] = "lora"
    name: str
    path: str = Field(description="File, relative to the server's lora_folder.")
    sha256: str = Field(description="SHA-256 of the file.")
    bytes: int = Field(description="Size of the file.")
    rank: int = Field(description="Largest rank of a layer's change.")
    base: str = Field(description="Name of the model that it was trained on.")
    base_sha256: str = Field(description="SHA-256 of that model's weights file.")
    role: str = Field(description="Kind of that model: base or upsampler.")
    created: int = Field(description="When it was loaded, in seconds since 1970.")
    licence: list[str] = Field(
        description="Licences of its training images, if its file names them."
    )
    sources: list[dict[str, str]] = Field(description="Authors of its training images to credit.")


class LoraList(BaseModel):
    """The loaded adapters, by name."""

    object: Literal["list"] = "list"
    data: list[LoraEntry]


class LoraDeleted(BaseModel):
    """An adapter that is no longer loaded. Its file stays."""

    object: Literal["lora"] = "lora"
    name: str
    deleted: Literal[True] = True


Form = TypeVar("Form", bound=ImageFields)


def narrowed(
    kind: type[Form],
    config: ServeConfig,
    sizes: Sequence[int],
    clip: bool,
    timesteps: tuple[int, int],
) -> type[Form]:
    """A form with the limits of this server, which appear in its OpenAPI schema.

    `clip`: whether to add `ClipFields`. `timesteps`: the maximum of any base model and of any
    upsampler.
    """
    literal: Any = Literal  # type checkers accept no computed choices
    names = ("auto", *(f"{size}x{size}" for size in sorted(sizes)))
    any_size: Any = literal[names]
    bases: tuple[type[BaseModel], ...] = (kind, ClipFields) if clip else (kind,)
    form = create_model(
        kind.__name__,
        __base__=bases,
        __doc__=kind.__doc__,
        n=(
            Annotated[int, Field(ge=1, le=config.max_images)] | None,
            Field(1, description="Number of images."),
        ),
        size=(
            any_size | None,
            Field("auto", description="Pixels of the image; auto: the model's largest size."),
        ),
        steps=(
            int | None,
            Field(None, ge=1, le=timesteps[0], description="Denoising steps of the base model."),
        ),
        upsampler_steps=(
            int | None,
            Field(None, ge=1, le=timesteps[1], description="Denoising steps of the upsampler."),
        ),
    )
    return cast(type[Form], form)  # its first base is `kind`
