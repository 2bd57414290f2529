"""Masks of known pixels: from an edit request, or random ones for training inpainting.

Bool (H, W), true = known and kept.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError


class MaskError(UserError):
    """A mask that cannot be used with its image."""


def mask_of(image: Image.Image) -> np.ndarray:
    """Known pixels of an image with transparency: the transparent ones are to be painted.

    As in the OpenAI Images API. Raises MaskError if nothing is transparent.
    """
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        raise MaskError(
            "The mask has no transparency; make the part to paint transparent, and save it as "
            "a PNG with alpha."
        )
    known = np.asarray(image.convert("RGBA"))[:, :, 3] >= 128
    if known.all():
        raise MaskError(
            "The mask has no transparent pixel, so there is nothing to paint; make the part to "
            "paint transparent."
        )
    return known


def check_sizes(image: Image.Image, mask: Image.Image, name: str = "mask") -> None:
    """Raise MaskError if a mask, or another image that belongs to `image`, has another size.

    `name`: what the message calls it.
    """
    if image.size != mask.size:
        raise MaskError(
            f"The {name} has {mask.size[0]}x{mask.size[1]} pixels and the image "
            f"{image.size[0]}x{image.size[1]}; they must be of one size."
        )


def centre_crop_mask(known: np.ndarray, size: int) -> np.ndarray:
    """The centred square of a mask, resized to `size` pixels.

    A pixel is known only if everything that it covers is known.
    """
    height, width = known.shape
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(known.astype(np.uint8) * 255)
    return (
        np.asarray(
            square.resize(
                (size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side)
            )
        )
        == 255
    )


# -- training --------------------------------------------------------------------------------------


def random_known(size: int, draw: np.random.Generator) -> np.ndarray:
    """Random mask of known pixels, (`size`, `size`) bool, for training inpainting (sec. 4.3).

    Rectangles, brush strokes, a half, everything or nothing is erased. The paper says "random
    regions"; these kinds and their shares are ours.
    """
    kind = draw.choice(
        ["rectangles", "strokes", "half", "everything", "nothing"], p=[0.4, 0.3, 0.15, 0.1, 0.05]
    )
    known = Image.new("1", (size, size), 0 if kind == "everything" else 1)
    pencil = ImageDraw.Draw(known)
    if kind == "rectangles":
        for _ in range(draw.integers(1, 4)):
            width, height = draw.integers(size // 8, size * 3 // 4, 2, endpoint=True)
            left, top = (
                draw.integers(-width // 2, size - width // 2),
                draw.integers(-height // 2, size - height // 2),
            )
            pencil.rectangle((left, top, left + width - 1, top + height - 1), fill=0)
    elif kind == "strokes":
        for _ in range(draw.integers(1, 5)):
            points = np.clip(
                np.cumsum(draw.normal(0, size / 6, (draw.integers(3, 9), 2)), axis=0)
                + draw.uniform(0, size, 2),
                0,
                size,
            )
            width = int(draw.integers(max(2, size // 16), max(3, size // 5)))
            pencil.line([tuple(point) for point in points], fill=0, width=width, joint="curve")
    elif kind == "half":
        half = np.arange(size) < size // 2
        half = np.broadcast_to(half if draw.random() < 0.5 else half[:, None], (size, size))
        return np.ascontiguousarray(half if draw.random() < 0.5 else ~half)
    return np.asarray(known)
