"""Sampling options: of a single request, and of bulk generation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .models import SHIPPED, Frozen


class SampleOptions(Frozen):
    """Sampling of one request. None: the model's own `SamplingConfig`."""

    noise_scheme: Literal[1, 2] = Field(
        2, description="how noise is drawn from the seed; 1: as before version 0.2"
    )
    sampler: str | None = Field(None, description="sampler of the base model")
    steps: int | str | None = Field(
        None, description="steps of the base model: a number, or a respacing such as 10,10,3,2,2"
    )
    upsampler_sampler: str | None = Field(None, description="sampler of the upsampler")
    upsampler_steps: int | str | None = Field(
        None, description="steps of the upsampler: a number or a respacing"
    )
    guidance_scale: float | None = Field(
        None, description="classifier-free guidance scale of the base model"
    )
    upsampler_guidance_scale: float | None = Field(
        None, description="classifier-free guidance scale of the upsampler"
    )
    negative_prompt: str = Field(
        "",
        description="text that guidance leads away from, in place of the empty caption; needs a "
        "guidance scale other than 1",
    )
    clip_scale: float = Field(0.0, description="CLIP guidance scale; 0: none")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="interval of the timesteps with guidance, where 1 is the noisiest"
    )


class BulkConfig(Frozen):
    """Bulk generation. Weights are paths that all nodes can read, `s3://` URLs, or `emoji`."""

    base: str = Field(SHIPPED, description="weights of the base model")
    upsampler: str | None = Field(None, description="weights of the upsampler; none: no upsampling")
    clip: str | None = Field(None, description="weights of the CLIP for CLIP guidance")
    loras: tuple[str, ...] = Field(
        (), description="adapters of the base model and the upsampler, each as FILE or FILE:SCALE"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="device of a worker; auto: GPUs if the cluster has any; gpu: wait for "
        "the autoscaler to add them",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="precision of the networks; auto: fp16 on a GPU, fp32 on a CPU"
    )
    options: SampleOptions = Field(SampleOptions(), description="sampling options")
    seed: int = Field(0, description="seed of the first picture; each picture adds one")
    per_prompt: int = Field(1, gt=0, description="pictures of each prompt")
