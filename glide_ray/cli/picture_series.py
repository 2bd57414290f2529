"""Write the pictures of a command as they are done, and keep those that are there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ..sampling.recipe import Recipe


@dataclass(frozen=True)
class Wanted:
    """A picture to make: its file, its recipe with the inputs, and a remark that is printed."""

    path: Path
    recipe: Recipe
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    remark: str = ""

    @property
    def line(self) -> str:
        return f"{self.path}  seed {self.recipe.seed}{self.remark}"


def write_missing(
    wanted: Sequence[Wanted],
    make: Callable[[Sequence[Wanted]], Sequence[np.ndarray]],
    at_once: int,
    keep: bool,
) -> None:
    """Make pictures in groups of `at_once`, and write each group when it is done.

    `make` returns the pixels of a group. `keep`: files with the same recipe and inputs are not made
    again.
    """
    missing = [one for one in wanted if not (keep and is_there(one))]
    for start in range(0, len(missing), at_once):
        group = missing[start : start + at_once]
        for one, pixels in zip(group, make(group), strict=True):
            write(one, pixels)


def is_there(one: Wanted) -> bool:
    """Whether the file has this recipe and these inputs already; says so."""
    from ..sampling.recipe import stored_picture

    if stored_picture(one.path, one.recipe, one.inputs) is None:
        return False
    print(f"{one.line}, already there")
    return True


def write(one: Wanted, pixels: np.ndarray) -> None:
    """Write a picture with its recipe and inputs, and print its line."""
    from ..sampling.recipe import save_picture

    save_picture(pixels, one.path, one.recipe, one.inputs)
    print(one.line, flush=True)
