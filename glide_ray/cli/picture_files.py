"""Files of the commands that make pictures: inputs that are read and names that are written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from ..storage import MissingError, check_writable, exists

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

FORMATS = (".png", ".jpg", ".jpeg", ".webp")  # endings of --out
ANIMATIONS = (".gif", ".webp")  # endings of --frames
JPEG_TEXT = 50_000  # characters of the prompts in EXIF, which has 64 KiB in a JPEG
FRAME, LAST_FRAME = 80, 2000  # duration in milliseconds
Result = TypeVar("Result")


# -- inputs ----------------------------------------------------------------------------------------


def open_picture(path: str) -> Image.Image:
    """A picture from a file, upright and in sRGB. Raises StorageError, and ImageError with path."""
    from ..data.images import load, open_image, to_srgb
    from ..storage import read

    return _with_path(path, lambda: to_srgb(load(open_image(read(path)))))


def crop_square(
    picture: Image.Image, size: int, known: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The centred square of a picture, uint8 (size, size, 3), and of its mask, bool (size, size).

    On white where transparent, except for the pixels that `known` (H, W) leaves to be painted:
    these have their own colours. Without `known`, no pixel is known.
    """
    import numpy as np

    from ..data.images import centre_crop, flatten, unblended
    from ..data.masks import centre_crop_mask

    if known is None:
        return centre_crop(flatten(picture), size), np.zeros((size, size), bool)
    return centre_crop(unblended(picture, known), size), centre_crop_mask(known, size)


def picture_pixels(picture: Image.Image, known: np.ndarray) -> np.ndarray:
    """The pixels of a picture, uint8 (H, W, 3), with the colours of `crop_square`."""
    import numpy as np

    from ..data.images import straight, unblended

    image = unblended(picture, known)
    return straight(np.asarray(image)) if image.mode == "RGBA" else np.asarray(image)


def read_mask(path: str, picture: Image.Image | None = None, invert: bool = False) -> np.ndarray:
    """A mask, bool (H, W), true where pixels are known. `invert`: paint its other part.

    Raises MaskError if it leaves nothing to paint, or has another size than `picture`.
    """
    from ..data.images import load, open_image
    from ..data.masks import check_sizes, mask_of
    from ..storage import read

    mask = _with_path(path, lambda: load(open_image(read(path))))
    if picture is not None:
        check_sizes(picture, mask)
    return _with_path(path, lambda: mask_of(mask, invert))


def check_hole(path: str, known: np.ndarray, remedy: str) -> None:
    """Raise MaskError if the part to paint lies outside of the centred square of the mask."""
    from ..data.masks import check_in_square

    _with_path(path, lambda: check_in_square(known, remedy))


def draw_sketch(path: str, picture: Image.Image) -> Image.Image:
    """A picture, RGB, with the opaque strokes of a sketch laid over it.

    Raises MaskError if the two have different sizes.
    """
    from ..data.images import flatten, lay_over
    from ..data.masks import check_sizes

    sketch = open_picture(path)
    check_sizes(picture, sketch, "sketch")
    return lay_over(flatten(picture), sketch)


def _with_path(path: str, work: Callable[[], Result]) -> Result:
    """The result of `work`; the path is put before its UserErrors, except StorageErrors."""
    from ..storage import StorageError

    try:
        return work()
    except StorageError:
        raise
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def check_inputs(options: Namespace) -> None:
    """Raise UserError for missing files: `image`, `mask`, `sketch`, `picture`, masks of `edit`."""
    names = ("image", "mask", "sketch", "picture")
    paths = [getattr(options, name, None) for name in names]
    for path in [*paths, *(mask for mask, _ in getattr(options, "edit", None) or ())]:
        if path and not exists(path):
            raise MissingError(f"There is no file {path}.")


# -- outputs ---------------------------------------------------------------------------------------


def check_out(
    path: Path,
    option: str = "--out",
    endings: Sequence[str] = FORMATS,
    written: Sequence[Path] = (),
) -> None:
    """Raise UserError for a name of another format, a folder, or a place that is not writable.

    `option`: which gave the path. `written`: files that the command writes in its place. Leaves no
    folder behind.
    """
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give the name of a file in it.")
    if path.suffix.lower() not in endings:
        choices = " or ".join([*filter(None, [", ".join(endings[:-1])]), endings[-1]])
        raise UserError(
            f"{option} {path} does not end in a format that is written; give a name that ends in "
            f"{choices}."
        )
    for name in written:
        if name.is_dir():
            raise UserError(
                f"{name}, a picture of {option} {path}, is a folder; give another name."
            )
    folder = path.parent
    while not folder.exists() and folder != folder.parent:  # it is made with the first picture
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option} {path} lies in {folder}, which is a file; give another folder.")
    check_writable(folder)


def check_recipe_fits(path: Path, texts: Sequence[str]) -> None:
    """Raise UserError if the prompts of a recipe are too long for the EXIF of a JPEG."""
    import json

    length = sum(len(json.dumps(text)) for text in texts)
    if path.suffix.lower() in (".jpg", ".jpeg") and length > JPEG_TEXT:
        raise UserError(
            f"--out {path}: a JPEG has no room for a recipe with so long a prompt ({length:,} "
            f"characters with escapes, of {JPEG_TEXT:,}); give a name that ends in .png."
        )


def unused(path: Path) -> Path:
    """The first of NAME.png, NAME-2.png, NAME-3.png, ... that no command has written."""
    names = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(p for p in chain([path], names) if not (p.exists() or numbered(p, 0).exists()))


def numbered(path: Path, n: int) -> Path:
    """NAME-`n`.png of a path NAME.png."""
    return path.with_stem(f"{path.stem}-{n}")


def save_animation(frames: Sequence[np.ndarray], path: Path) -> None:
    """Write pictures uint8 (s, s, 3) as a GIF or WebP animation of the last one's size."""
    import io

    from PIL import Image

    from ..storage import put

    size = (frames[-1].shape[1], frames[-1].shape[0])
    images = [Image.fromarray(one).resize(size, Image.Resampling.NEAREST) for one in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        path.suffix[1:].upper(),
        save_all=True,
        append_images=images[1:],
        duration=[FRAME] * (len(images) - 1) + [LAST_FRAME],
        loop=0,
    )
    put(buffer.getvalue(), path)
