"""Figures of the demo, and the drawings that its pictures start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ... import storage
from ...data.images import encode
from ...evaluation.report import contact_sheet, grid, show_hole, stairs
from .plan import Sketch

SHEET, BEFORE_AFTER, EDIT = "things-by-styles.png", "before-after.png", "edit.png"
SKETCH, SCENE, LOSS = "sketch.png", "scene.png", "loss.png"
SIZE = 256  # side of a drawing in pixels
Draw = Callable[[ImageDraw.ImageDraw], None]


def draw_pairs(
    out: Path, prompts: Sequence[str], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> None:
    """Write BEFORE_AFTER: one column per prompt."""
    _put(grid([before, after], prompts, ["before", "after"]), out / BEFORE_AFTER)


def draw_edit(
    out: Path, before: np.ndarray, known: np.ndarray, after: np.ndarray, prompts: Sequence[str]
) -> None:
    """Write EDIT: a picture, the same with its hole, and the edited picture.

    `prompts`: that of the first and that of the last.
    """
    _put(
        contact_sheet(
            [before, show_hole(before, known), after],
            [prompts[0], "to be painted", prompts[1]],
            columns=3,
            size=256,
        ),
        out / EDIT,
    )


def draw_sketches(
    out: Path,
    sketches: Sequence[Sketch],
    pictures: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]],
) -> None:
    """Write SKETCH: each drawing, followed by the pictures that started from it."""
    images, labels = [], []
    for sketch, (drawing, answers) in zip(sketches, pictures, strict=True):
        images += [drawing, *answers]
        labels += [
            "sketch",
            *(f"{prompt}; strength {strength:g}" for prompt, strength, _ in sketch.answers),
        ]
    columns = 1 + max(len(sketch.answers) for sketch in sketches)
    _put(contact_sheet(images, labels, columns=columns), out / SKETCH)


def draw_scene(out: Path, strips: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
    """Write SCENE: the growing picture, one row per step."""
    _put(stairs(strips, prompts), out / SCENE)


def _put(image: Image.Image, path: Path) -> None:
    storage.put(encode(np.asarray(image)), path)


# -- drawings ------------------------------------------------------------------------------------


def draw_sketch(name: str) -> np.ndarray:
    """One of DRAWINGS by name, on white: (SIZE, SIZE, 3) uint8."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    DRAWINGS[name](ImageDraw.Draw(image))
    return np.asarray(image)


def _mushroom(pencil: ImageDraw.ImageDraw) -> None:
    pencil.rounded_rectangle((100, 120, 156, 236), 20, fill=(245, 222, 179))
    pencil.pieslice((24, 24, 232, 248), 180, 360, fill=(214, 40, 40))
    for x, y, radius in ((88, 92, 16), (136, 60, 20), (180, 104, 16)):
        pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")


def _fish(pencil: ImageDraw.ImageDraw) -> None:
    pencil.polygon([(176, 128), (240, 68), (240, 188)], fill=(240, 150, 30))
    pencil.ellipse((20, 66, 196, 190), fill=(40, 130, 220))
    pencil.rectangle((100, 70, 124, 186), fill=(250, 215, 50))
    pencil.ellipse((52, 104, 72, 124), fill="white")
    pencil.ellipse((57, 109, 67, 119), fill="black")


DRAWINGS: Mapping[str, Draw] = {"mushroom": _mushroom, "fish": _fish}
