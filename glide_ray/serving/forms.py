"""Multipart forms: text fields and uploaded images of edits and variations."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from ..config.serving import ServeConfig
from ..data.images import centre_crop, flatten, load, open_image, to_srgb, unblended
from ..data.masks import (
    centre_crop_mask,
    check_in_square,
    check_sizes,
    mask_of,
    mask_of_transparency,
)
from ..errors import UserError, nearest
from ..sampling.job import Source
from .errors import ApiError, refusal
from .schema import ImageFields

FILES = ("image", "mask")
JSON_FIELDS = ("loras",)  # fields of a form whose text is JSON
Form = TypeVar("Form", bound=ImageFields)


async def read_form(
    request: Request, kind: type[Form], config: ServeConfig
) -> tuple[Form, dict[str, bytes]]:
    """Read and validate the fields and files of a multipart form. Raises ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "Send images as multipart/form-data, each image as a file.")
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=4, max_fields=40) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                name = name.removesuffix("[]")  # clients write image[] for a list of files
                files[name] = await _read_file(name, value, files, config.max_upload_bytes)
            elif name in FILES:
                raise ApiError(400, f"{name} must be a file, not text.", name)
            elif name in fields:
                raise ApiError(400, f"{name} is given twice; send it once.", name)
            else:
                fields[name] = _from_json(name, value) if name in JSON_FIELDS else value
    if "image" not in files:
        raise ApiError(400, "image is missing; send it as a file.", "image")
    try:
        return kind.model_validate(fields, strict=False), files
    except ValidationError as error:
        raise refusal(error.errors(), [*kind.model_fields, *FILES]) from None


def _from_json(name: str, text: str) -> Any:
    """The value of a field in JSON. Raises ApiError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, f"{name} is not valid JSON.", name, "invalid_json") from None


async def _read_file(
    name: str, file: UploadFile, earlier: dict[str, bytes], max_bytes: int
) -> bytes:
    """Content of an uploaded file. `earlier`: files of the form before this one."""
    if name not in FILES:
        raise ApiError(400, f"There is no file field {name!r}; {nearest(name, FILES)}", name)
    if name in earlier:
        raise ApiError(400, f"Only one {name} per request; send a request for each.", name)
    content = await file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ApiError(
            413, f"The {name} is larger than {max_bytes / 2**20:.3g} MiB; make it smaller.", name
        )
    return content


def read_source(files: dict[str, bytes], config: ServeConfig, size: int, vary: bool) -> Source:
    """Decode an image and its mask, centre-crop both and resize them to `size` pixels.

    `vary`: without a mask, no pixel is known (for variations); otherwise the pixels of the image
    that are not opaque are unknown. Raises ApiError.
    """
    param = "image"
    try:
        image = to_srgb(load(open_image(files["image"], config.max_pixels)))
        if vary and "mask" not in files:
            return Source(centre_crop(flatten(image), size), np.zeros((size, size), bool))
        if "mask" in files:
            param = "mask"
            mask = load(open_image(files["mask"], config.max_pixels))
            check_sizes(image, mask)
            known = mask_of(mask)
        else:
            known = mask_of_transparency(image)
        check_in_square(known, "crop the image and its mask to a square around it")
    except UserError as error:
        raise ApiError(400, str(error), param) from None
    return Source(centre_crop(unblended(image, known), size), centre_crop_mask(known, size))
