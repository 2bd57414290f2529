"""The square of a large picture that an edit paints at the model's size, and its way back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.masks import MaskError, resize_mask

Square = tuple[int, int, int]  # left, top and side in pixels of the picture; may extend beyond it
CONTEXT = 2  # side of the square, in sides of the part to paint


@dataclass(frozen=True)
class Part:
    """A square of a picture at the model's size S.

    `image`: uint8 (S, S, 3). `known`: bool (S, S); false outside of the picture.
    """

    square: Square
    image: np.ndarray
    known: np.ndarray


def part_to_paint(image: np.ndarray, known: np.ndarray, size: int) -> Part:
    """The part of a picture around its unknown pixels, at the model's `size` in pixels.

    `image`: uint8 (H, W, 3). `known`: bool (H, W). Raises MaskError if there is nothing to paint.
    """
    square = square_around(known, size)
    if square == (0, 0, size) and image.shape[:2] == (size, size):
        return Part(square, image, known)
    left, top, side = square
    pixels, inside = _cut(image, square, "edge"), _cut(known, square, "constant")
    filtering = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    return Part(
        square,
        np.asarray(Image.fromarray(pixels).resize((size, size), filtering)),
        resize_mask(inside, size, (0, 0, side)),
    )


def square_around(known: np.ndarray, size: int) -> Square:
    """The square around the unknown pixels of a mask (H, W).

    Twice as wide as these pixels, and no smaller than the model's `size`, as far as the shorter
    side of the picture permits. It extends beyond the picture only if these pixels do not fit into
    a square inside. Raises MaskError if there is nothing to paint.
    """
    rows, columns = np.flatnonzero(~known.all(1)), np.flatnonzero(~known.all(0))
    if not len(rows):
        raise MaskError("The mask has no unknown pixel, so there is nothing to paint.")
    height, width = known.shape
    hole = max(int(places[-1] - places[0]) + 1 for places in (rows, columns))
    side = max(hole, min(height, width, max(size, CONTEXT * hole)))
    return _start(columns, side, width), _start(rows, side, height), side


def paste(image: np.ndarray, known: np.ndarray, square: Square, painted: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) with its unknown pixels taken from the painted square (S, S, 3).

    Every pixel that `known` (H, W) keeps has exactly its value in `image`.
    """
    left, top, side = square
    filtering = Image.Resampling.BOX if side <= len(painted) else Image.Resampling.BICUBIC
    pixels = np.asarray(
        Image.fromarray(painted).resize((side, side), filtering)
        if side != len(painted)
        else painted
    )
    height, width = known.shape
    rows = slice(max(top, 0), min(top + side, height))
    columns = slice(max(left, 0), min(left + side, width))
    inside = pixels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    result: np.ndarray = image.copy()
    result[rows, columns] = np.where(known[rows, columns, None], image[rows, columns], inside)
    return result


def _start(places: np.ndarray, side: int, length: int) -> int:
    """First pixel of a square of this side around places along one axis of this length."""
    if side > length:
        return (length - side) // 2
    return min(max((int(places[0] + places[-1]) + 1 - side) // 2, 0), length - side)


def _cut(pixels: np.ndarray, square: Square, mode: str) -> np.ndarray:
    """The square of pixels (H, W, ...). Beyond the picture: its edge, or zeros ("constant")."""
    left, top, side = square
    height, width = pixels.shape[:2]
    before, after = (
        (max(-top, 0), max(-left, 0)),
        (max(top + side - height, 0), max(left + side - width, 0)),
    )
    inside = pixels[max(top, 0) : top + side, max(left, 0) : left + side]
    beyond = [*zip(before, after, strict=True), *[(0, 0)] * (pixels.ndim - 2)]
    result: np.ndarray = np.pad(inside, beyond, mode=mode)  # type: ignore[call-overload]
    return result
