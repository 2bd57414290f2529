"""Every number that fixes an endpoint, as frozen pydantic models: which models, their replicas, and what requests may ask for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from .config import SHIPPED, Frozen


class Scale(Frozen):
    """How many replicas a stage has, between the two as its queue wants, and what each takes."""

    min_replicas: int = Field(1, gt=0)
    max_replicas: int = Field(1, gt=0)
    cpus: float = Field(1, gt=0)
    gpus: float | None = Field(None, ge=0)             # 0.5: two replicas share one; None: a whole one, or equal parts where there are too few
    up_after: float = Field(3, ge=0)                   # seconds of too long a queue until there is one more
    down_after: float = Field(60, ge=0)                # and of too short a one until there is one fewer

    @model_validator(mode="after")
    def _order(self) -> Scale:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}")
        return self


class ServedModel(Frozen):
    """The weights of one model that clients can name, and the replicas of its stages. Weights are local paths, `s3://`, or
    `emoji`, the weights that ship with the package."""

    base: str = SHIPPED
    upsampler: str | None = SHIPPED                    # None: pictures of the base model's size
    clip: str | None = None                            # for clip_scale and best_of
    base_scale: Scale = Scale()
    upsampler_scale: Scale = Scale()


class ServeConfig(ServedModel):
    """The endpoint: which models, how much they take on at once, what a request may ask for. See docs/serving.md."""

    more_models: dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")], ServedModel] = {}    # by the names that clients give
    ingress_scale: Scale = Scale(cpus=0.5, gpus=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_in_flight: int = Field(8, gt=0)                # samples that a replica has on the way
    max_waiting: int = Field(4, ge=0)                  # images for each replica beyond those that a step advances; then 429 is answered
    max_images: int = Field(4, gt=0)                   # the largest `n`
    max_upload_bytes: int = Field(8 * 2**20, gt=0)
    max_pixels: int = Field(16 * 10**6, gt=0)          # of an uploaded image, checked before it is decoded
    keys: str | None = None                            # file that `glide key` writes; without keys only this machine is answered
    log_prompts: bool = False
    drain_seconds: float = Field(300, gt=0)            # that a replica may take to finish what it has, when it is to go
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, lt=65536)
