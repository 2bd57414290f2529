"""Image bytes to pixels and back: decoding, the centre crop of app. A.2, box downsampling, tensors.

Pixels are uint8 (H, W, 3) arrays; tensors are float (3, H, W) in [-1, 1]. torch is imported where tensors are made: the many tasks
that only read a corpus start without it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64 * 10**6  # of an image in a corpus; checked before its pixels are decoded


class ImageError(UserError):
    """Bytes that are not an image we can use."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and its pixels not yet: `.size` and `.format` cost nothing. Raises ImageError."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(data[:12]))
    except Image.DecompressionBombError:  # far more than even Pillow accepts
        raise ImageError(
            f"The image has more than the {max_pixels:,} pixels that are accepted; make it smaller."
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise ImageError(
            "The file is not an image that can be read; give a PNG, JPEG or WebP."
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"The image has {width}x{height} pixels, more than the {max_pixels:,} that are accepted; make it smaller."
        )
    return image


def _formats(head: bytes) -> tuple[str, ...]:
    """Pillow's name of the format that begins so, or those it is to try, which takes three times as long as reading the header. Not all that it knows:
    it has PostScript run by another program."""
    if head.startswith(b"\xff\xd8\xff"):
        return ("JPEG",)
    if head.startswith(b"\x89PNG"):
        return ("PNG",)
    return ("WEBP",) if head[8:12] == b"WEBP" else ("GIF", "BMP", "TIFF")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB, upright as its EXIF says, what is transparent laid on white. Raises ImageError for anything unreadable."""
    return flatten(load(open_image(data, max_pixels)))


def load(image: Image.Image) -> Image.Image:
    """Read the pixels of an opened image, of 8 bits each, and turn it upright. Raises ImageError where the data ends or is broken."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception:  # Pillow's decoders raise whatever their format's parser does
        raise ImageError("The image is broken or incomplete; export it again.") from None
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(
            "The image has pixels of 32 bits, whose white may be any number; export it with 8 or 16."
        )
    return image


def flatten(image: Image.Image) -> Image.Image:
    """To RGB; transparency onto white, as the emoji are shown."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def lay_over(image: Image.Image, strokes: Image.Image) -> Image.Image:
    """An RGB image with what is opaque in another of the same size on it; one without transparency covers it."""
    return Image.alpha_composite(image.convert("RGBA"), strokes.convert("RGBA")).convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest centred square, at `size` pixels: (size, size, 3). Box filter downwards, bicubic upwards."""
    return _squares(image, size, (0.5,))[0]


def three_crops(image: Image.Image, size: int) -> list[np.ndarray]:
    """The squares at both ends and in the middle of the longer side, at `size` pixels (app. F.1); one where all three are the same."""
    return _squares(image, size, (0.5,) if image.width == image.height else (0, 0.5, 1))


def _squares(image: Image.Image, size: int, places: Sequence[float]) -> list[np.ndarray]:
    """The largest squares at these places of the longer side, 0 its beginning and 1 its end."""
    side = min(image.size)
    if image.size == (size, size):
        return [np.asarray(image)] * len(places)
    corners = [
        (int((image.width - side) * place), int((image.height - side) * place)) for place in places
    ]
    return [
        np.asarray(
            image.resize(
                (size, size),
                Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC,
                box=(left, top, left + side, top + side),
            )
        )
        for left, top in corners
    ]


def area_downsample(pixels: np.ndarray, size: int) -> np.ndarray:
    """Square pixels to `size` by the mean over each box: the low-resolution half of an upsampler's pair."""
    if len(pixels) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """uint8 (H, W, 3) through a Gaussian of 3x3 pixels: what the low-resolution half of a pair is shown as, so that an upsampler
    learns to forgive what a base model leaves out (Ho et al. 2021, Cascaded Diffusion Models)."""
    side = np.exp(-0.5 / sigma**2)
    weights = np.array([side, 1, side]) / (1 + 2 * side)
    spread = np.pad(pixels.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    spread = sum(weight * spread[n : n + len(pixels)] for n, weight in enumerate(weights))
    spread = sum(weight * spread[:, n : n + pixels.shape[1]] for n, weight in enumerate(weights))
    return spread.round().astype(np.uint8)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (..., 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(pixels)).movedim(-1, -3).float() / 127.5 - 1


def to_8_bits(image: Tensor) -> Tensor:
    """float (..., 3, H, W) in [-1, 1] -> the nearest of the values that 8-bit pixels have, float32."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def to_uint8(image: Tensor) -> np.ndarray:
    """float (3, H, W) in [-1, 1] -> uint8 (H, W, 3), rounded to the nearest value and clipped."""
    return (
        ((image.detach().float() + 1) * 127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .permute(1, 2, 0)
        .cpu()
        .numpy()
    )


def encode(
    pixels: np.ndarray,
    form: str = "png",
    text: Mapping[str, str] | None = None,
    quality: int | None = None,
    fast: bool = False,
) -> bytes:
    """uint8 (H, W, 3) or (H, W) as the bytes of a png, jpeg or webp file. `text`: chunks for a png to carry; `quality`: of the others.

    `fast`: a png in a fifth of the time, with a fifth more bytes.
    """
    buffer = io.BytesIO()
    chunks = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        chunks.add_itxt(name, value, zip=True)
    options = (
        {"pnginfo": chunks, "compress_level": 1 if fast else 6}
        if form == "png"
        else {"quality": 95 if quality is None else quality}
    )
    Image.fromarray(pixels).save(buffer, form.upper(), **options)
    return buffer.getvalue()
