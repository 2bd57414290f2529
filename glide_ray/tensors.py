"""Data types passed between packages. B batch, C channels, H W pixels, K text tokens.

`models/` and `diffusion/` both use them and never import each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound="Rows")


@dataclass(frozen=True)
class Rows:
    """A dataclass of tensors with a common first axis: rows can be joined, selected and moved."""

    def map(self: R, function: Callable[[Tensor], Tensor]) -> R:
        return replace(
            self, **{f.name: _map(getattr(self, f.name), function) for f in fields(self)}
        )

    def __getitem__(self: R, index: slice | Tensor) -> R:
        """Rows by slice, index tensor or boolean mask; always a batch, never a single row."""
        return self.map(lambda tensor: tensor[index])

    def to(self: R, *args: Any, **kwargs: Any) -> R:
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def floats_to(self: R, dtype: torch.dtype) -> R:
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    @classmethod
    def join(cls: type[R], parts: Sequence[R]) -> R:
        """Concatenate along the batch axis.

        Raises ValueError unless all parts have the same fields set.
        """
        return cls(
            **{f.name: _join([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        )


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_map(item, function) for item in value)
    return value.map(function) if isinstance(value, Rows) else function(value)


def _join(values: list[Any]) -> Any:
    first = values[0]
    if any(value is None for value in values):
        if any(value is not None for value in values):
            raise ValueError("rows with and without a condition cannot share a batch")
        return None
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*values, strict=True))
    return type(first).join(values) if isinstance(first, Rows) else torch.cat(values)


@dataclass(frozen=True)
class TextFeatures(Rows):
    """Encoded caption, the U-Net's text input; constant over the steps of a sample."""

    pooled: Tensor  # (B, 4C), added to the timestep embedding
    sequence: Tensor  # (B, K, W), the text for attention
    # per attention layer: key and value, each (B, heads, K, D)
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None

    def plus(self, other: TextFeatures, factor: float) -> TextFeatures:
        """self + factor * other, tensor by tensor."""
        pairs = zip(self.keys_values or (), other.keys_values or (), strict=True)
        return TextFeatures(
            self.pooled + factor * other.pooled,
            self.sequence + factor * other.sequence,
            tuple(
                (key + factor * other_key, value + factor * other_value)
                for (key, value), (other_key, other_value) in pairs
            )
            or None,
        )


@dataclass(frozen=True)
class Conditioning(Rows):
    """Conditioning of the samples.

    Images are float in [-1, 1]; `known_mask` is 1 where the pixel is known.
    """

    tokens: Tensor  # (B, K) int64
    mask: Tensor  # (B, K) bool, true for tokens of the caption
    low_res: Tensor | None = None  # (B, 3, h, w), for upsamplers
    known: Tensor | None = None  # (B, 3, H, W)
    known_mask: Tensor | None = None  # (B, 1, H, W)


@dataclass(frozen=True)
class ModelOutput(Rows):
    """Output of one network call."""

    eps: Tensor  # (B, 3, H, W), the predicted noise
    variance: Tensor  # (B, 3, H, W), -1 lower to 1 upper bound of the log variance


@dataclass(frozen=True)
class ClipOutput:
    """Embeddings of images and captions by CLIP, of length 1."""

    image: Tensor  # (B, E)
    text: Tensor  # (B, E)
    scale: Tensor  # one element: scale of the logits


@dataclass(frozen=True)
class Batch(Rows):
    """Input of a training step."""

    image: Tensor  # (B, 3, H, W) in [-1, 1]
    conditioning: Conditioning
    rows: Tensor | None = None  # (B,) int64: row numbers in the corpus


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device` without waiting for pending GPU work.

    A plain `to` would wait.
    """
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


# (x (B, 3, H, W), timestep (B,)) -> ModelOutput; guidance wraps one denoiser in another.
Denoiser = Callable[[Tensor, Tensor], ModelOutput]
