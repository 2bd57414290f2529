"""Masks of known pixels: from an edit request, or random ones for training inpainting.

Bool (H, W), true = known and kept.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError
from .images import has_alpha

NEAR = 16  # largest distance of an 8-bit value from black or white that still counts as it


class MaskError(UserError):
    """A mask that cannot be used with its image."""


def mask_of(image: Image.Image, invert: bool = False) -> np.ndarray:
    """Known pixels of a mask, bool (H, W). Soft edges are always painted.

    With transparency, opaque pixels (alpha 255) are known, as in the OpenAI Images API. Otherwise
    the mask must be black and white: black pixels are known, white ones are painted. `invert`: the
    fully transparent or the white pixels are known. Raises MaskError if there is nothing to paint,
    or for an opaque mask that is not black and white.
    """
    alpha = _alpha(image)
    if alpha.min() < 255:
        known = alpha == (0 if invert else 255)
    else:
        light = _light(image)
        known = light > 255 - NEAR if invert else light < NEAR
    if known.all():
        name, kinds = (
            ("inverted mask", ("opaque", "black")) if invert else ("mask", ("transparent", "white"))
        )
        raise MaskError(
            f"The {name} has no {kinds[0]} and no {kinds[1]} pixel, so there is nothing to paint; "
            f"make the part to paint {kinds[0]}, or {kinds[1]} in a black-and-white mask."
        )
    return known


def mask_of_transparency(image: Image.Image) -> np.ndarray:
    """Known pixels of an image that is its own mask, bool (H, W): those with alpha 255.

    Raises MaskError if no pixel is transparent.
    """
    known = _alpha(image) == 255
    if known.all():
        raise MaskError(
            "The image has no transparent pixel, so there is nothing to paint; make the part to "
            "paint transparent and save it as a PNG with alpha, or give a mask."
        )
    return known


def _alpha(image: Image.Image) -> np.ndarray:
    """Alpha of an image, uint8 (H, W): 255 everywhere if it has none."""
    if not has_alpha(image):
        return np.full((image.height, image.width), 255, np.uint8)
    return np.asarray(image.convert("RGBA"))[:, :, 3]


def _light(image: Image.Image) -> np.ndarray:
    """Grey values of a black-and-white mask, uint8 (H, W).

    Raises MaskError if one pixel in a hundred has a colour, or half of them are grey: a picture.
    """
    colours = np.asarray(image.convert("RGB"))
    coloured = np.ptp(colours, axis=2) > 2 * NEAR
    light = np.asarray(image.convert("L"))
    grey = (light >= NEAR) & (light <= 255 - NEAR)
    if coloured.mean() > 0.01 or grey.mean() > 0.5:
        raise MaskError(
            "The mask has no transparent pixel and is not black and white, so there is nothing to "
            "paint; make the part to paint transparent, or white on black."
        )
    return light


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
    return resize_mask(known, size, ((width - side) // 2, (height - side) // 2, side))


def resize_mask(known: np.ndarray, size: int, square: tuple[int, int, int]) -> np.ndarray:
    """The square (left, top, side) of a mask, resized to `size` pixels.

    A pixel is known only if everything that it covers is known.
    """
    left, top, side = square
    # As floats: in 8 bits, a small hole in a large square is rounded away.
    unknown = Image.fromarray(np.where(known, 0.0, 1.0).astype(np.float32))
    resized = unknown.resize(
        (size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side)
    )
    return np.asarray(resized) <= 0


def check_in_square(known: np.ndarray, remedy: str) -> None:
    """Raise MaskError if the centred square of a mask has no pixel to paint.

    `remedy`: the end of the message.
    """
    height, width = known.shape
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if known[top : top + side, left : left + side].all():
        raise MaskError(
            f"The part to paint lies outside of the centred square that is used; {remedy}."
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
