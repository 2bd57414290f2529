"""Image bytes to pixels and back: decoding, centre crop (app. A.2), box downsampling, tensors.

Pixels are uint8 (H, W, 3) arrays; tensors are float (3, H, W) in [-1, 1]. torch is imported inside
the functions that make tensors, so that tasks that only read a corpus start without it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64 * 10**6  # pixels of an image in a corpus; checked before decoding
ORIENTATION = 0x0112  # tag of EXIF
ASCII = b"ASCII\0\0\0"  # begins the UserComment of EXIF
# EXIF orientation -> how Pillow turns the image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Editors write megabytes of text into PNGs that are otherwise usable, and Pillow's default limit
# refuses them. Pillow still limits all texts of an image to MAX_TEXT_MEMORY, 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class ImageError(UserError):
    """Bytes that are not a usable image."""


class TooLargeError(ImageError):
    """An image with more pixels than are accepted."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image, reading only its header. Raises ImageError.

    `.size` and `.format` of the result need no decoding.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats(data[:12]))
    except Image.DecompressionBombError:  # above Pillow's own limit, which is far higher
        raise TooLargeError(
            f"The image has more than the {max_pixels:,} pixels that are accepted; make it smaller."
        ) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise ImageError(
            "The file is not an image that can be read; give a PNG, JPEG or WebP."
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(
            f"The image has {width}x{height} pixels, more than the {max_pixels:,} that are "
            f"accepted; make it smaller."
        )
    return image


def _formats(head: bytes) -> tuple[str, ...]:
    """Pillow's name of the format with these first bytes, or the formats that Pillow is to try.

    Trying formats takes three times as long as reading the header. Formats are limited because
    Pillow runs another program for PostScript.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return ("JPEG",)
    if head.startswith(b"\x89PNG"):
        return ("PNG",)
    if head[4:8] == b"ftyp":
        return ("AVIF",)
    return ("WEBP",) if head[8:12] == b"WEBP" else ("GIF", "BMP", "TIFF", "JPEG2000")


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB: EXIF orientation applied, transparency on white.

    Raises ImageError for anything unreadable.
    """
    return flatten(load(open_image(data, max_pixels)))


def load(image: Image.Image) -> Image.Image:
    """Read the pixels of an opened image, 8 bits per channel, and apply its EXIF orientation.

    Raises ImageError if the data is truncated or broken, or has 32 bits per pixel.
    """
    try:
        image.load()
        image = _upright(image)
    except Exception:  # Pillow's decoders raise whatever their format's parser does
        raise ImageError("The image is broken or incomplete; export it again.") from None
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(
            "The image has pixels of 32 bits, whose white may be any number; export it with 8 or "
            "16."
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and ignore other EXIF tags, which are often damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # as Pillow's parsers of EXIF do
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image with an ICC profile, such as Display P3, to the colours of sRGB.

    Without a profile, or with a broken one, the values are taken as sRGB. Alpha stays as it is.
    Corpora are read without this conversion, which takes longer than decoding a small JPEG.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    alpha = image.convert("RGBA").getchannel("A") if has_alpha(image) else None
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    try:
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        converted = image.convert("RGB")
    assert converted is not None  # only a conversion in place returns None
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info.pop("transparency", None)
    return converted


def flatten(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparency on white as the emoji are shown."""
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def has_alpha(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def unblended(image: Image.Image, known: np.ndarray) -> Image.Image:
    """An image to edit whose unknown pixels have their own colours, not blended with white.

    Known pixels, where `known` (H, W) is true, are as viewers show them. The result is RGB, or RGBA
    if some unknown pixel is transparent; its alpha keeps invisible colours out of resized pixels.
    """
    if not has_alpha(image):
        return image.convert("RGB")
    result = image.convert("RGBA")
    result.paste(flatten(image), mask=Image.fromarray(known))
    return result


def lay_over(image: Image.Image, strokes: Image.Image) -> Image.Image:
    """Composite `strokes` over an RGB image of the same size.

    Strokes without an alpha channel cover the image completely.
    """
    return Image.alpha_composite(image.convert("RGBA"), strokes.convert("RGBA")).convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The largest centred square, resized to (size, size, 3).

    Box filter to shrink, bicubic to enlarge. Of an RGBA image, colours are weighted by alpha;
    fully transparent pixels become white, and the others keep their colour.
    """
    pixels = _squares(image, size, (0.5,))[0]
    return straight(pixels) if image.mode == "RGBA" else pixels


def straight(pixels: np.ndarray) -> np.ndarray:
    """RGB of RGBA pixels (H, W, 4), without blending: white where alpha is 0."""
    return np.where(pixels[:, :, 3:] == 0, np.uint8(255), pixels[:, :, :3])


def decode_crop(data: bytes, size: int) -> np.ndarray:
    """Decode the largest centred square of an image in a corpus, resized to (size, size, 3).

    A JPEG that is much larger is decoded at a half, a quarter or an eighth, by the mean of blocks
    of pixels, to no less than twice the size: several times as fast. Raises ImageError.
    """
    image = open_image(data)
    if image.format in ("JPEG", "MPO"):
        shorter = min(image.size)
        if shorter >= 4 * size:
            width, height = (math.ceil(side * 2 * size / shorter) for side in image.size)
            image.draft(None, (width, height))
    return centre_crop(flatten(load(image)), size)


def three_crops(image: Image.Image, size: int) -> list[np.ndarray]:
    """Squares at both ends and the middle of the longer side, resized to `size` pixels (app. F.1).

    A square image gives one crop, since all three are the same.
    """
    return _squares(image, size, (0.5,) if image.width == image.height else (0, 0.5, 1))


def _squares(image: Image.Image, size: int, places: Sequence[float]) -> list[np.ndarray]:
    """The largest squares at these places along the longer side, from 0 (start) to 1 (end)."""
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
    """Downsample square pixels to `size` by the mean of each box: low-res input of an upsampler."""
    if len(pixels) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX))


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Blur uint8 (H, W, 3) with a Gaussian of 3x3 pixels; `sigma` in pixels.

    Augments the low-res input in training, so that an upsampler learns to tolerate the detail that
    base model samples lack (Ho et al. 2021, Cascaded Diffusion Models).
    """
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
    """Round float (..., 3, H, W) in [-1, 1] to values that 8-bit pixels have; returns float32."""
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


def comment_of(image: Image.Image) -> str:
    """The ASCII text in the EXIF UserComment of an opened image; empty if it has none."""
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except Exception:  # as Pillow's parsers of EXIF do
        return ""
    is_text = isinstance(comment, bytes) and comment.startswith(ASCII)
    return comment.removeprefix(ASCII).decode("ascii", "replace") if is_text else ""


def encode(
    pixels: np.ndarray,
    form: str = "png",
    text: Mapping[str, str] | None = None,
    quality: int | None = None,
    fast: bool = False,
    comment: str | None = None,
) -> bytes:
    """Encode uint8 (H, W, 3) or (H, W) as a png, jpeg or webp file.

    `text`: text chunks of a png. `quality`: of jpeg and webp, 95 by default. `fast`: a png in a
    fifth of the time, with a fifth more bytes. `comment`: ASCII text in the EXIF UserComment of a
    jpeg or webp, at most 60,000 characters.
    """
    buffer = io.BytesIO()
    chunks = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        chunks.add_itxt(name, value, zip=True)
    options: dict[str, Any] = (
        {"pnginfo": chunks, "compress_level": 1 if fast else 6}
        if form == "png"
        else {"quality": 95 if quality is None else quality}
    )
    if comment is not None:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = ASCII + comment.encode("ascii")
        options["exif"] = exif
    Image.fromarray(pixels).save(buffer, form.upper(), **options)
    return buffer.getvalue()
