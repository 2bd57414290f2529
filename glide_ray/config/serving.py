"""Serving configs: models, replicas and request limits of an endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .models import SHIPPED, Frozen


class Scale(Frozen):
    """Replicas of a stage, autoscaled by the length of its queue."""

    min_replicas: int = Field(1, gt=0, description="fewest replicas")
    max_replicas: int = Field(1, gt=0, description="most replicas")
    cpus: float = Field(1, gt=0, description="logical CPUs of a replica")
    gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of a replica; 0.5: two replicas share "
        "one; none: one, or equal parts if there are too few",
    )
    up_after: float = Field(
        3, ge=0, description="seconds of a long queue before a replica is added"
    )
    down_after: float = Field(
        60, ge=0, description="seconds of a short queue before a replica is removed"
    )

    @model_validator(mode="after")
    def _order(self) -> Scale:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}"
            )
        return self


class ServedModel(Frozen):
    """A model that clients can name. Weights are local paths, `s3://` URLs, or `emoji`."""

    base: str = Field(SHIPPED, description="weights of the base model")
    upsampler: str | None = Field(
        SHIPPED, description="weights of the upsampler; none: pictures of the base model's size"
    )
    clip: str | None = Field(None, description="weights of the CLIP for clip_scale and best_of")
    loras: tuple[str, ...] = Field(
        (), description="adapters of the base model and the upsampler, each as FILE or FILE:SCALE"
    )
    base_scale: Scale = Field(Scale(), description="replicas of the base model")
    upsampler_scale: Scale = Field(Scale(), description="replicas of the upsampler")


class ServeConfig(ServedModel):
    """The endpoint. See docs/serving.md."""

    more_models: dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")], ServedModel
    ] = Field({}, description="more models, by the names that clients use")
    ingress_scale: Scale = Field(
        Scale(cpus=0.5, gpus=0), description="replicas of the HTTP ingress"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the networks; auto: fp16 on a GPU, fp32 on a CPU"
    )
    max_in_flight: int = Field(8, gt=0, description="samples that a replica denoises at once")
    max_waiting: int = Field(
        4,
        ge=0,
        description="images in the queue of each replica; further requests are answered with 429",
    )
    max_images: int = Field(4, gt=0, description="largest n of a request")
    max_upload_bytes: int = Field(8 * 2**20, gt=0, description="largest request body, in bytes")
    max_pixels: int = Field(
        16 * 10**6,
        gt=0,
        description="largest uploaded image, in pixels; checked before it is decoded",
    )
    keys: str | None = Field(
        None,
        description="file of API keys, written by `glide key`; none: only this machine is served",
    )
    lora_folder: str | None = Field(
        None,
        description="folder or `s3://` prefix with the adapters that POST /v1/loras may load, "
        "which all nodes can read and the ingress can write; none: no adapters by request",
    )
    max_loras: int = Field(64, gt=0, description="most adapters loaded by request at a time")
    lora_bytes: int = Field(
        512 * 2**20,
        gt=0,
        description="adapters by request that a replica keeps in memory, in bytes; the least "
        "recently used leave first, and a larger file is refused",
    )
    log_prompts: bool = Field(False, description="write prompts to the request log")
    drain_seconds: float = Field(
        300, gt=0, description="seconds for a replica to finish its requests before it is stopped"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, lt=65536, description="port to listen on; 0: any free port")
