"""Pictures and masks that commands read from files, at the size of a cascade."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from ..storage import MissingError, check_writable, exists

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Result = TypeVar("Result")


def open_picture(path: str) -> Image.Image:
    """A picture from a file, rotated upright. Raises StorageError, and ImageError with the path."""
    from ..data.images import load, open_image
    from ..storage import read

    return _with_path(path, lambda: load(open_image(read(path))))


def crop_square(picture: Image.Image, size: int) -> np.ndarray:
    """The centred square of a picture, uint8 (size, size, 3), on white where transparent."""
    from ..data.images import centre_crop, flatten

    return centre_crop(flatten(picture), size)


def read_mask(path: str, size: int, picture: Image.Image | None = None) -> np.ndarray:
    """The centred square of a mask, bool (size, size), true where pixels are known.

    Raises MaskError if the mask has no transparent pixels, or another size than `picture`.
    """
    from ..data.masks import centre_crop_mask, check_sizes, mask_of

    mask = open_picture(path)
    if picture is not None:
        check_sizes(picture, mask)
    return centre_crop_mask(_with_path(path, lambda: mask_of(mask)), size)


def read_sketch(path: str, size: int, picture: Image.Image) -> np.ndarray:
    """The centred square of a picture with the opaque strokes of a sketch laid over it.

    Raises MaskError if the two have different sizes.
    """
    from ..data.images import centre_crop, flatten, lay_over
    from ..data.masks import check_sizes

    sketch = open_picture(path)
    check_sizes(picture, sketch, "sketch")
    return centre_crop(lay_over(flatten(picture), sketch), size)


def _with_path(path: str, work: Callable[[], Result]) -> Result:
    """The result of `work`; the path is put before its UserErrors, except StorageErrors."""
    from ..storage import StorageError

    try:
        return work()
    except StorageError:
        raise
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def check_files(options: Namespace) -> None:
    """Raise UserError for inputs that are missing, and for an output that cannot be written.

    Looks at `image`, `mask`, `sketch` and `picture`, where a command has them, and at `out`.
    """
    for name in ("image", "mask", "sketch", "picture"):
        path = getattr(options, name, None)
        if path and not exists(path):
            raise MissingError(f"There is no file {path}.")
    if options.out is None:
        return
    if options.out.suffix.lower() != ".png":
        raise UserError(
            f"--out {options.out} is no PNG, and a picture carries its recipe in one; "
            f"give a name that ends in .png."
        )
    check_writable(options.out.parent)
