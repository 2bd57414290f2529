"""A sheet of pictures over two settings, such as guidance scales and numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..config.sampling import SampleOptions
from ..errors import UserError, nearest
from ..sampling.cascade import Cascade, Progress
from ..sampling.checks import check_options
from ..sampling.prompt import check_prompt
from ..sampling.recipe import ModelSet, save_picture, stored_picture

SETTINGS = ("prompt", "seed", *(name for name in SampleOptions.model_fields))


class PlotError(UserError):
    """An axis that cannot be plotted."""


@dataclass(frozen=True)
class Axis:
    """A setting and its values, one a column or row."""

    name: str  # in SETTINGS
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Axis:
        """Read `guidance-scale=1,2.5,5`; `|` separates values that have commas.

        Raises PlotError for an unknown setting or for no values.
        """
        name, _, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in SETTINGS:
            raise PlotError(f"There is no setting {name!r}; {nearest(name, SETTINGS)}")
        separator = "|" if "|" in values else ","
        found = tuple(value.strip() for value in values.split(separator) if value.strip())
        if not found:
            raise PlotError(f"{text!r} has no values; write them as in guidance-scale=1,2.5,5.")
        return cls(name, found)

    @property
    def labels(self) -> list[str]:
        """A label for each value; prompts stand alone."""
        name = self.name.replace("_", " ")
        return [value if name == "prompt" else f"{name} {value}" for value in self.values]


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet."""

    prompt: str
    seed: int
    options: SampleOptions


def make_cells(
    prompt: str, seed: int, options: SampleOptions, columns: Axis, rows: Axis
) -> list[list[Cell]]:
    """The pictures of each row. Raises PlotError, RequestError for a value that is not valid."""
    if columns.name == rows.name:
        raise PlotError(f"Both axes are {columns.name}; choose another setting for one.")
    return [
        [
            _cell(prompt, seed, options, {columns.name: column, rows.name: row})
            for column in columns.values
        ]
        for row in rows.values
    ]


def _cell(prompt: str, seed: int, options: SampleOptions, chosen: dict[str, str]) -> Cell:
    values: dict[str, Any] = dict(chosen)
    prompt = values.pop("prompt", prompt)
    try:
        seed = int(values.pop("seed", seed))
        if "guidance_interval" in values:
            values["guidance_interval"] = values["guidance_interval"].split()
        filled = SampleOptions.model_validate(options.model_dump() | values)
    except (ValidationError, ValueError):
        shown = ", ".join(f"{name}={value}" for name, value in chosen.items())
        raise PlotError(f"A value of {shown} is not valid for its setting.") from None
    check_options(filled, seed)
    check_prompt(prompt)
    return Cell(prompt, seed, filled)


def make_plot(
    cascade: Cascade, cells: Sequence[Sequence[Cell]], folder: Path, progress: Progress | None
) -> list[list[np.ndarray]]:
    """The picture (S, S, 3) uint8 of each cell, stored in `folder` as ROW-COLUMN.png.

    A picture that is there already, from the same models and options, is not made again.
    """
    model_set, pictures = ModelSet.of(cascade), []
    for y, row in enumerate(cells):
        made = []
        for x, cell in enumerate(row):
            path = folder / f"{y}-{x}.png"
            recipe = model_set.recipe("generate", cell.prompt, cell.seed, cell.options)
            picture = stored_picture(path, recipe)
            if picture is None:
                (picture,) = cascade.generate([cell.prompt], [cell.seed], cell.options, progress)
                save_picture(picture, path, recipe)
            made.append(picture)
        pictures.append(made)
    return pictures
