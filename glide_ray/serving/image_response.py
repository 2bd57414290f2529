"""The images of one request, and the fields of its response."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.images import encode
from ..data.tokenizer import Tokens
from ..sampling.job import Job, shrink_known
from ..sampling.recipe import LoraUsed, png_text
from .schema import GeneratedImage, ImageFields
from .state import Backend, PreviewCallback, ServerState
from .tasks import gather_or_cancel


@dataclass
class ImageMaker:
    """Makes the images of one request and encodes them as its fields ask.

    `model`: name of the model. `log_fields`: fields of the request's log line, extended here.
    """

    state: ServerState
    model: str
    backend: Backend
    fields: ImageFields
    prompt: Tokens
    log_fields: dict[str, Any]

    async def make(self, job: Job, on_preview: PreviewCallback | None = None) -> GeneratedImage:
        """Make one image and record its time in each stage. `on_preview` receives the previews."""
        image = await self.backend.make(job, on_preview)
        self.state.metrics.image(self.model, job.task, image.seconds)
        self.log_fields["images"] = self.log_fields.get("images", 0) + 1
        slowest = self.log_fields.get("stages", {})
        self.log_fields["stages"] = {
            stage: round(max(seconds, slowest.get(stage, 0)), 4)
            for stage, seconds in image.seconds.items()
        }
        return image

    async def body(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Make all images; returns the body of a response without streaming."""
        images = await gather_or_cancel([self.make(job) for job in jobs])
        data = [
            await asyncio.to_thread(self.item, job, image)
            for job, image in zip(jobs, images, strict=True)
        ]
        return {
            "created": int(time.time()),
            "data": data,
            **self.format_fields(jobs[0]),
            "usage": self.usage,
            **self.warnings,
        }

    @property
    def output_format(self) -> str:
        return self.fields.output_format or "png"

    def format_fields(self, job: Job) -> dict[str, str]:
        """OpenAI's fields that describe the images."""
        return {
            "size": f"{job.size}x{job.size}",
            "output_format": self.output_format,
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
                f"The prompt is longer than {len(self.prompt.tokens)} tokens; the rest was ignored."
            ]
        }

    def item(self, job: Job, image: GeneratedImage) -> dict[str, Any]:
        """The entry of one finished image: its encoded pixels and its seed."""
        encoded = base64.b64encode(
            encode(
                image.pixels,
                self.output_format,
                self._recipe(job, image),
                self.fields.output_compression,
                fast=True,
            )
        ).decode()
        if self.fields.response_format == "url":
            return {"url": f"data:image/{self.output_format};base64,{encoded}", "seed": image.seed}
        return {"b64_json": encoded, "seed": image.seed}

    def _recipe(self, job: Job, image: GeneratedImage) -> dict[str, str] | None:
        """PNG text chunks for `glide reproduce`; None for other formats.

        Model hashes are those that the replicas reported for this image.
        """
        if self.output_format != "png":
            return None
        model_set = self.backend.model_set
        inputs: dict[str, np.ndarray] = {}
        models = {
            role: used.model_copy(update={"sha256": image.models.get(role, used.sha256)})
            for role, used in model_set.models.items()
        }
        if job.size != self.backend.sizes[-1]:  # the upsampler took no part
            model_set = replace(model_set, upsampler=None)
        loras = tuple(
            LoraUsed(name=lora.name, path="", sha256=lora.sha256, scale=lora.scale)
            for lora in job.loras
            if lora.role == "base" or model_set.upsampler is not None
        )
        if model_set.upsampler is None:
            models.pop("upsampler", None)
        if job.source is not None:
            source, known = shrink_known(job.source.image, job.source.known_mask, job.size)
            inputs = {"image": source, "mask": known}
        return png_text(
            replace(model_set, models=models, loras=model_set.loras + loras).recipe(
                job.task, job.prompt, image.seed, job.options, job.strength or 1.0
            ),
            inputs,
        )
