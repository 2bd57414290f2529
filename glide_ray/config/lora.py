"""Low-rank adapters (LoRA): which are added to a model, and what an adapter's file says of itself.

An adapter changes the layer with weight W to W + scale * alpha / rank * up @ down (Hu et al. 2021).
"""

from __future__ import annotations

import math

from pydantic import Field

from ..errors import ConfigError
from .models import Frozen

SUFFIX = ".safetensors"


class Lora(Frozen):
    """An adapter that is added to a model, and how strongly."""

    path: str = Field(description="file of the adapter")
    scale: float = Field(1.0, description="strength: 0 leaves the model as it is, 1 is as trained")

    def __str__(self) -> str:
        return self.path if self.scale == 1 else f"{self.path}:{self.scale:g}"


class NamedLora(Lora):
    """An adapter that a request names, and the model that it changes."""

    name: str = Field(description="name under which it was loaded")
    sha256: str = Field(description="SHA-256 of the file")
    role: str = Field(description="kind of the model that it changes: base or upsampler")


class AdapterConfig(Frozen):
    """What an adapter was trained on. Stored in its file."""

    base: str = Field(description="name of the model that it was trained on")
    base_sha256: str = Field(description="SHA-256 of that model's weights file")
    role: str = Field(description="kind of that model: base or upsampler")
    rank: int = Field(gt=0, description="largest rank of a layer's change")
    alpha: float = Field(gt=0, description="the change is multiplied by alpha / rank")


def read_lora(text: str) -> Lora:
    """FILE or FILE:SCALE as a Lora. Raises ConfigError for a scale that is not a finite number."""
    path, colon, scale = text.rpartition(":")
    if not colon or not path.endswith(SUFFIX):
        return Lora(path=text)
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(
            f"{text}: the scale {scale!r} of the adapter is not a number; write {path}:0.8, for "
            "example, or leave it out for 1."
        )
    return Lora(path=path, scale=number)
