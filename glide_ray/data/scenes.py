"""Scenes composed from pictures of the corpus, with exact labels.

A scene shows a background, a colour, a count or a relation. It depends only on its seed and number:
any number of scenes can be made, and they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .captions import NUMBERS, in_style, plural, with_article
from .render import SIZE
from .splits import is_held_out_colour
from .sprites import COLOURS, Box, Sprite, Sprites, fit, mean_colour, paste, recolour

# kind of scene -> share of the scenes; each kind is a method of `_Draft`
KINDS = {"background": 0.3, "recolour": 0.3, "count": 0.2, "relation": 0.2}
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
NEAR = 90  # distance in RGB above which an object stands out from its background
WHOLE = (0, 0, SIZE, SIZE)  # the cell of the whole picture


@dataclass(frozen=True)
class Scene:
    """An RGB picture of SIZE pixels, its captions and its labels.

    Labels: `scene` (its kind), `style`, `objects` ({"emoji", "name"} each), `boxes` (one per
    object: left, top, right, bottom in pixels), and `colour`, `background`, `count` and `relation`,
    None where they do not apply. `emoji`, `group`, `author`, `licence` and `source` are those of
    the first object.
    """

    image: Image.Image
    captions: tuple[str, ...]
    labels: Mapping[str, Any]

    @property
    def held_out(self) -> bool:
        """Whether an object has a colour or background that training never shows it with."""
        colours = [self.labels[name] for name in ("colour", "background") if self.labels[name]]
        things = [thing["emoji"] for thing in self.labels["objects"]]
        return any(is_held_out_colour(thing, colour) for thing in things for colour in colours)


def compose(sprites: Sprites, seed: int, number: int) -> Scene:
    """Compose scene `number` of a seed."""
    rng = np.random.default_rng([seed, number])
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    styles = list(sprites.styles)
    draft = _Draft(sprites, styles[rng.integers(len(styles))], rng)
    return getattr(draft, kind)()


class _Draft:
    """A scene under construction: style, pictures and random generator. One method per kind."""

    def __init__(self, sprites: Sprites, style: str, rng: np.random.Generator):
        self._sprites, self._style, self._rng = sprites, style, rng

    def background(self) -> Scene:
        """Any picture except a flag, on a background colour that it stands out from."""
        choice = self._sprites.styles[self._style]
        sprite = self._one([one for one in choice if one.group != "Flags"])
        picture = self._fitted(sprite, SIZE, 0.55, 0.9)
        background = self._unlike(mean_colour(picture))
        image = _canvas(background)
        box = paste(image, picture, WHOLE, self._rng)
        captions = self._on_background(sprite.name.lower(), background)
        return self._scene(image, captions, "background", [sprite], [box], background=background)

    def recolour(self) -> Scene:
        """A plain object in a new colour, on white; a white object on another colour."""
        sprite = self._one(self._sprites.counted[self._style])
        colour = self._one(list(COLOURS))
        picture = recolour(self._fitted(sprite, SIZE, 0.7, 0.95), colour)
        background = self._unlike(COLOURS[colour]) if colour == "white" else None
        image = _canvas(background or "white")
        box = paste(image, picture, WHOLE, self._rng)
        name = f"{colour} {sprite.name.lower()}"
        captions = self._on_background(name, background) if background else self._alone(name)
        return self._scene(
            image, captions, "recolour", [sprite], [box], colour=colour, background=background
        )

    def count(self) -> Scene:
        """One to four copies of an object, all of the same size."""
        sprite, count = self._one(self._sprites.counted[self._style]), int(self._rng.integers(1, 5))
        image, cells = _canvas("white"), self._cells(count)
        side = min(min(right - left, bottom - top) for left, top, right, bottom in cells)
        picture = self._fitted(sprite, side, 0.75, 0.95)
        boxes = [paste(image, picture, cell, self._rng) for cell in cells]
        name = sprite.name.lower()
        things, style = f"{NUMBERS[count]} {name if count == 1 else plural(name)}", self._style
        captions = (
            f"{things}, {style}",
            f"{things} emoji, {style}",
            in_style(things, style),
            things,
        )
        return self._scene(image, captions, "count", [sprite] * count, boxes, count=count)

    def relation(self) -> Scene:
        """Two objects, one left of, right of, above or below the other."""
        choice, style = self._sprites.counted[self._style], self._style
        first, second = (choice[n] for n in self._rng.choice(len(choice), 2, replace=False))
        relation = self._one(list(OPPOSITE))
        image = _canvas("white")
        boxes = [
            paste(image, self._fitted(sprite, SIZE // 2, 0.8, 0.96), cell, self._rng)
            for sprite, cell in zip((first, second), _places(relation), strict=True)
        ]
        a, b = (with_article(sprite.name.lower()) for sprite in (first, second))
        pair = f"{a} {relation} {b}"
        captions = (
            f"{pair}, {style}",
            f"{b} {OPPOSITE[relation]} {a}, {style}",
            in_style(pair, style),
            pair,
        )
        return self._scene(image, captions, "relation", [first, second], boxes, relation=relation)

    def _scene(
        self,
        image: Image.Image,
        captions: tuple[str, ...],
        kind: str,
        objects: Sequence[Sprite],
        boxes: Sequence[Box],
        **known: Any,
    ) -> Scene:
        first = objects[0]
        things = [{"emoji": sprite.emoji, "name": sprite.name} for sprite in objects]
        labels = {
            "scene": kind,
            "style": self._style,
            "objects": things,
            "boxes": [list(box) for box in boxes],
            "colour": None,
            "background": None,
            "count": None,
            "relation": None,
            **known,
        }
        of_first = ("emoji", "group", "author", "licence", "source")
        return Scene(image, captions, labels | {name: getattr(first, name) for name in of_first})

    def _one(self, choice: Sequence[Any]) -> Any:
        return choice[int(self._rng.integers(len(choice)))]

    def _fitted(self, sprite: Sprite, side: int, least: float, most: float) -> Image.Image:
        """A picture whose longer side is a random share of `side`, from `least` to `most`."""
        return fit(self._sprites.picture(sprite), int(side * self._rng.uniform(least, most)))

    def _unlike(self, colour: Sequence[float] | np.ndarray) -> str:
        """Name of a random colour that stands out from this one."""
        return self._one(
            [
                name
                for name, other in COLOURS.items()
                if np.linalg.norm(np.subtract(other, colour)) > NEAR
            ]
        )

    def _alone(self, name: str) -> tuple[str, ...]:
        thing, style = with_article(name), self._style
        return f"{thing}, {style}", f"{name} emoji, {style}", in_style(thing, style), thing

    def _on_background(self, name: str, background: str) -> tuple[str, ...]:
        thing, on = with_article(name), f"on {with_article(background)} background"
        style = self._style
        return (
            f"{thing}, {style}, {on}",
            f"{thing} {on}, {style}",
            f"{in_style(thing, style)} {on}",
            f"{thing} {on}",
        )

    def _cells(self, count: int) -> list[Box]:
        """Cells for `count` objects, without overlap: a row, a column, or quarters."""
        half, margin = SIZE // 2, SIZE // 6
        if count == 1:
            return [WHOLE]
        if count < 4 and self._rng.random() < 0.5:
            step = SIZE // count
            row = [(n * step, margin, (n + 1) * step, SIZE - margin) for n in range(count)]
            column = [(top, left, bottom, right) for left, top, right, bottom in row]
            return row if self._rng.random() < 0.5 else column
        quarters = [(x, y, x + half, y + half) for y in (0, half) for x in (0, half)]
        return [quarters[n] for n in sorted(self._rng.choice(4, count, replace=False))]


def _canvas(colour: str) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), COLOURS[colour])


def _places(relation: str) -> list[Box]:
    """Cells of two objects in this relation, narrow enough to align the objects roughly."""
    half, margin = SIZE // 2, SIZE // 5
    if relation in ("to the left of", "to the right of"):
        cells = [(0, margin, half, SIZE - margin), (half, margin, SIZE, SIZE - margin)]
    else:
        cells = [(margin, 0, SIZE - margin, half), (margin, half, SIZE - margin, SIZE)]
    return cells if relation in ("to the left of", "above") else cells[::-1]
