"""The error of a picture with NaN or infinite values, and the search for its cause.

Finished pictures are checked where they are copied to the CPU anyway, so that a GPU is not waited
for at every step. Only after a failed check are the weights looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.row_adapters import ScaledAdapter
from ..precision import DTYPES
from ..tensors import ModelOutput

CODE = "picture_not_finite"  # in the server's error responses


class NonFiniteError(UserError):
    """A picture with NaN or infinite values. The message names the weights or the precision."""


def finite_rows(images: Tensor) -> list[bool]:
    """Whether each image of (N, ...) has finite values only. Waits for the device."""
    finite: list[bool] = images.isfinite().flatten(1).all(1).tolist()
    return finite


def zero_or_nan(output: ModelOutput) -> Tensor:
    """Zeros (B, 1, 1, 1), and NaN for samples whose model output is not finite.

    Added to x, it keeps an overflow visible to the end of sampling: clipping the predicted x_0
    would turn an infinite eps into a finite black or white pixel.
    """
    total = output.eps.float().sum((1, 2, 3)) + output.variance.float().sum((1, 2, 3))
    return (total * 0).reshape(-1, 1, 1, 1)


def fault_of_weights(model: nn.Module, name: str) -> str | None:
    """What is wrong with the weights of the model called `name`; None if they are finite."""
    bad = {key: value for key, value in model.named_parameters() if not value.isfinite().all()}
    if not bad:
        return None
    first, weight = next(iter(bad.items()))
    if weight.dtype == torch.float16 and not any(value.isnan().any() for value in bad.values()):
        return (
            f"{name} makes no picture in fp16, because its weight {first} is too large for it; "
            f"{_other_precisions()}."
        )
    return (
        f"{name} makes no picture, because its weights hold NaN or infinite numbers, first in "
        f"{first} ({len(bad)} of {len(list(model.parameters()))} tensors); copy or export them "
        f"again, or use a checkpoint from before."
    )


def fault_of_adapters(adapters: Iterable[ScaledAdapter]) -> str | None:
    """What is wrong with the adapters of a sample; None if they are finite."""
    for scaled in adapters:
        matrices = [matrix for pair in scaled.adapter.layers.values() for matrix in pair]
        if not all(matrix.isfinite().all() for matrix in matrices):
            return (
                f"The adapter with the SHA-256 {scaled.adapter.sha256[:16]}... makes no picture, "
                f"because it holds NaN or infinite numbers; leave it out, or train it again."
            )
    return None


def fault_of_precision(name: str, dtype: torch.dtype, clip: bool) -> str:
    """The remaining causes, with finite weights. `clip`: whether the sample has CLIP guidance."""
    precision = next(key for key, value in DTYPES.items() if value == dtype)
    if dtype == torch.float16:
        return f"{name} makes no picture in fp16, which overflows; {_other_precisions()}."
    remedy = "leave out CLIP guidance, or " if clip else ""
    return (
        f"{name} makes no picture in {precision}: its output is not finite, though its weights "
        f"are; {remedy}use weights from before its training diverged."
    )


def _other_precisions() -> str:
    return "try --precision bf16 or fp32 (for a server, the setting precision)"
