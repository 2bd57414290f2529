"""Arguments of `Cascade`'s methods in all the forms that have one clear meaning.

Every function raises RequestError with the name of the argument for anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image

from ..data.images import flatten, load
from ..data.masks import mask_of
from ..errors import UserError
from .checks import RequestError

Prompts = str | Iterable[str]
Seeds = SupportsIndex | Iterable[SupportsIndex]  # also arrays of whole numbers
Picture = np.ndarray | Image.Image
Mask = np.ndarray | Image.Image


def prompt_of(given: Any, name: str = "prompt") -> str:
    """A prompt as a str."""
    if not isinstance(given, str):
        raise RequestError(f"{name} must be text (given: {type(given).__name__}).", name)
    try:
        given.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not UTF-8; convert it.", name) from None
    return str(given)


def seed_of(given: Any, name: str = "seed") -> int:
    """A seed as an int, from an int or a whole number of numpy or torch."""
    try:
        return operator.index(given)
    except TypeError:
        raise RequestError(f"{name} must be a whole number (given: {given!r}).", name) from None


def seeds_of(given: Any) -> list[int]:
    """Seeds from one whole number, or from an iterable or a flat array of them."""
    try:
        return [operator.index(given)]
    except TypeError:
        pass
    try:
        return [seed_of(one, "seeds") for one in given]
    except TypeError:
        raise RequestError(f"seeds must be whole numbers (given: {given!r}).", "seeds") from None


def pairs_of(prompts: Any, seeds: Any) -> list[tuple[str, int]]:
    """A prompt and a seed for each picture.

    One prompt that is a str goes with every seed, and one seed that is a number with every prompt.
    """
    numbers = seeds_of(seeds)
    if isinstance(prompts, str):
        return [(prompt_of(prompts, "prompts"), number) for number in numbers]
    try:
        texts = [prompt_of(one, "prompts") for one in prompts]
    except TypeError:
        raise RequestError(
            f"prompts must be text or a list of texts (given: {type(prompts).__name__}).", "prompts"
        ) from None
    if not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0:
        numbers = numbers * len(texts)
    if len(numbers) != len(texts):
        raise RequestError(
            f"seeds must be as many as the prompts, or one number (given: {len(numbers)} seeds for "
            f"{len(texts)} prompts).",
            "seeds",
        )
    return list(zip(texts, numbers, strict=True))


def pixels_of(given: Any, name: str = "image") -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a picture.

    `given`: an image of Pillow; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of whole
    numbers from 0 to 255 or of floats from 0 to 1. Transparency is laid on white.
    """
    try:
        if isinstance(given, Image.Image):
            return np.asarray(flatten(load(given)))
    except UserError as error:
        raise RequestError(f"{name}: {error}", name) from None
    pixels = _eight_bits(np.asarray(given), name)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise RequestError(
            f"{name} must be an array (height, width) or (height, width, 1, 3 or 4 channels) "
            f"(given: {list(pixels.shape)}).",
            name,
        )
    if pixels.shape[2] == 4:
        return np.asarray(flatten(Image.fromarray(np.ascontiguousarray(pixels))))
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values uint8: whole numbers from 0 to 255 as they are, floats from 0 to 1 times 255."""
    kind, most = values.dtype.kind, 1 if values.dtype.kind == "f" else 255
    if kind not in "fiu" or not values.size:
        raise RequestError(
            f"{name} must be a picture, whose values are uint8 from 0 to 255 or floats from 0 to 1 "
            f"(given: {values.dtype}, {list(values.shape)}).",
            name,
        )
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # true for NaN, too
        raise RequestError(
            f"{name} has values from {low:g} to {high:g}; give uint8 from 0 to 255, or floats from "
            f"0 to 1.",
            name,
        )
    if kind == "f":
        values = np.round(values * 255.0)
    return np.asarray(values, np.uint8)


def known_of(given: Any, name: str = "known_mask") -> np.ndarray:
    """Known pixels bool (H, W), true = known.

    `given`: an array (H, W) or (H, W, 1) of bool, of 0 and 1, or of 0 and 255; or an image of
    Pillow with these values, or with transparency where to paint.
    """
    if isinstance(given, Image.Image):
        if given.mode not in ("1", "L"):
            try:
                return mask_of(given)
            except UserError as error:
                raise RequestError(f"{name}: {error}", name) from None
        given = np.asarray(given)
    values = np.asarray(given)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2:
        raise RequestError(
            f"{name} must be an array (height, width) (given: {list(values.shape)}).", name
        )
    if values.dtype != bool and not (
        values.dtype.kind in "fiu" and any(np.isin(values, (0, most)).all() for most in (1, 255))
    ):
        raise RequestError(
            f"{name} must hold bool, 0 and 1, or 0 and 255, where the larger one is a known pixel; "
            f"choose a limit, as in {name} > 127.",
            name,
        )
    return values > 0
