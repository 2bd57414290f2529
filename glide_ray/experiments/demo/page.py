"""The demo's HTML page, and its pictures for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from ... import storage
from ...data.images import decode, encode
from ...errors import UserError
from .figures import BEFORE_AFTER, EDIT, LOSS, SCENE, SHEET, SKETCH
from .plan import STYLE
from .results import Results

PAGE, TEMPLATE = "index.html", Path(__file__).with_name("page.html")
STAGES = ("sheet", "corpus", "tuning", "answers")
PICTURES = (SHEET, BEFORE_AFTER, EDIT, SKETCH, SCENE, LOSS)
MAX_BYTES = 1_500_000  # limit for all copies together: they are in every clone of the repository
QUALITIES = (92, 85, 75, 60)  # of WebP, tried in order until the copies are small enough


def write_page(out: Path) -> None:
    """Write PAGE to `out` with the results so far. The page needs no network."""
    results = Results(out)
    stages: dict[str, Any] = {stage: results.read(stage) for stage in STAGES}
    text = _template().render(
        **stages, out=out, style=STYLE, curve=LOSS, credits=_credits(stages["answers"])
    )
    storage.put(text.encode(), out / PAGE)


def _template():
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text())


def _credits(answers: dict[str, Any] | None) -> list[dict[str, str]]:
    """Sources that the served models name, each package once."""
    found = {
        source["package"]: source
        for model in (answers or {"models": []})["models"]
        for source in model["sources"]
    }
    return [found[package] for package in sorted(found)]


def copy_pictures(out: Path, folder: Path) -> list[Path]:
    """Copy the demo's pictures in `out` to `folder` as small WebP files. Returns their paths.

    Raises UserError if one is missing or they cannot be made small enough.
    """
    missing = [name for name in PICTURES if not (out / name).exists()]
    if missing:
        raise UserError(f"{out} has no {missing[0]}; run `glide demo` to its end first.")
    pixels = {name: np.asarray(decode((out / name).read_bytes())) for name in PICTURES}
    for quality in QUALITIES:
        encoded = {name: encode(image, "webp", quality=quality) for name, image in pixels.items()}
        if sum(map(len, encoded.values())) <= MAX_BYTES:
            break
    else:
        raise UserError(
            f"The pictures in {out} take more than {MAX_BYTES:,} bytes even at WebP's "
            f"quality {quality}; make smaller ones."
        )
    paths = [folder / Path(name).with_suffix(".webp") for name in encoded]
    for path, data in zip(paths, encoded.values(), strict=True):
        storage.put(data, path)
    return paths
