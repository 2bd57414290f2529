"""Edit masks: which pixels are known and kept, which are painted anew. Bool (H, W), true = known."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..config import UserError


class MaskError(UserError):
    """A mask that cannot be used with its image."""


def mask_of(image: Image.Image) -> np.ndarray:
    """Known pixels of an image with transparency, as the OpenAI Images API means it: what is transparent is to be painted.

    Raises MaskError where nothing is transparent.
    """
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        raise MaskError("The mask has no transparency; make transparent what is to be painted, and save it as a PNG with alpha.")
    known = np.asarray(image.convert("RGBA"))[:, :, 3] >= 128
    if known.all():
        raise MaskError("The mask has no transparent pixel, so there is nothing to paint; make transparent what is to be painted.")
    return known


def check_sizes(image: Image.Image, mask: Image.Image) -> None:
    """Raises MaskError where the mask is of another size than its image."""
    if image.size != mask.size:
        raise MaskError(f"The mask has {mask.size[0]}x{mask.size[1]} pixels and the image {image.size[0]}x{image.size[1]}; they "
                        f"must be of one size.")


def centre_crop_mask(known: np.ndarray, size: int) -> np.ndarray:
    """The centred square of a mask at `size` pixels: known only where all that a pixel covers is known."""
    height, width = known.shape
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(known.astype(np.uint8) * 255)
    return np.asarray(square.resize((size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side))) == 255
