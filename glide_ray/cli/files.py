"""Files of the commands that make pictures, checked before a model is loaded."""

from __future__ import annotations

from argparse import Namespace

from ..errors import UserError
from ..storage import MissingError, check_writable, exists


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
