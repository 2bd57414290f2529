"""Scenes composed from the corpus's own pictures, with exact labels: backgrounds, colours, counts and relations.

Each is made from its seed and number alone: as many as one likes, the same everywhere.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import UserError
from ..storage import is_remote, list_files, read
from .captions import MASS, NUMBERS, in_style, plural, with_article
from .card import read_card, write_card
from .render import SIZE, in_order, process_pool
from .shards import Sample, begin, finish, read_shard, write_shard
from .splits import SCENE_SPLITS, is_held_out_colour

COLOURS = {"red": (220, 40, 40), "orange": (245, 135, 30), "yellow": (250, 215, 50), "green": (55, 165, 70),
           "blue": (45, 100, 220), "purple": (135, 65, 190), "pink": (250, 135, 185), "brown": (125, 80, 45),
           "black": (30, 30, 30), "white": (255, 255, 255), "grey": (140, 140, 140)}
KINDS = {"background": 0.3, "recolour": 0.3, "count": 0.2, "relation": 0.2}      # and their shares
RELATIONS = ("to the left of", "to the right of", "above", "below")
OPPOSITE = {"to the left of": "to the right of", "to the right of": "to the left of", "above": "below", "below": "above"}
OBJECT_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Last words of names that are no single object to count, or no object at all.
NOT_COUNTED = MASS | frozenset(
    "corn desert park foggy cityscape sunrise sunset night wedding station metro rail motorway track departure "
    "arrival moon way cyclone tornado weather voltage shower wind droplet elevator link umbrellas ceremony arts "
    "knot tilted receiver beans herb green vegetable food milk salad beverage mate microbe coast locked unlocked increasing "
    "decreasing memo high pick hamsa moai placard kaaba japan fuji tower island houses mountains bridge springs suspension "
    "left right up down face nose prints rain snow lightning railway tramway cableway seat hole x-ray dna wing meat done "
    "flying batteries luggage wallet badge liquid pong game wave broccoli".split())
NEAR = 90       # distance of RGB from which on an object stands out from its background
BYTES_PER_ROW = 20_000
ROWS_PER_TASK = 50


class SceneError(UserError):
    """Scenes that cannot be composed."""


@dataclass(frozen=True)
class Sprite:
    """A picture of the corpus that scenes are composed from, and where its bytes lie in the file of all."""

    emoji: str
    name: str
    group: str
    source: str
    author: str
    licence: str
    offset: int
    length: int

    @property
    def counted(self) -> bool:
        """Whether its name is a plain one of a single object, without a colour."""
        name, last = self.name.lower(), self.name.lower().split()[-1]
        return (self.group in OBJECT_GROUPS and re.fullmatch("[a-z]+( [a-z]+)?", name) is not None and last not in NOT_COUNTED
                and with_article(name) != name and not set(name.split()) & COLOURS.keys())

    @property
    def about(self) -> dict[str, str]:
        return {"emoji": self.emoji, "name": self.name}


@dataclass(frozen=True)
class Scene:
    """A picture of SIZE pixels, RGB, its captions, and its labels: see `labels`."""

    image: Image.Image
    captions: tuple[str, ...]
    labels: Mapping[str, Any]

    @property
    def held_out(self) -> bool:
        """Whether it shows a thing in or on a colour that training never shows it with."""
        colours = [self.labels[name] for name in ("colour", "background") if self.labels[name]]
        return any(is_held_out_colour(thing["emoji"], colour) for thing in self.labels["objects"] for colour in colours)


class Sprites:
    """The pictures of a corpus by style, in one file of their bytes that all processes of a machine share."""

    def __init__(self, path: Path, styles: Mapping[str, Sequence[Sprite]]):
        self.path, self.styles = path, dict(styles)
        self._bytes: mmap.mmap | None = None

    def __getstate__(self) -> tuple:
        return self.path, self.styles

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def of(self, style: str, kind: str) -> Sequence[Sprite]:
        """Those of a style that scenes of this kind may show."""
        return self._of(style, kind in ("count", "relation", "recolour"))

    @cache      # noqa: B019  (there is one of these in a process)
    def _of(self, style: str, counted: bool) -> Sequence[Sprite]:
        return [sprite for sprite in self.styles[style] if (sprite.counted if counted else sprite.group != "Flags")]

    def picture(self, sprite: Sprite) -> Image.Image:
        """RGBA, cut to what is not transparent."""
        if self._bytes is None:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._bytes[sprite.offset:sprite.offset + sprite.length]
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
        return image.crop(box) if box else image


def read_sprites(train: str, folder: Path) -> Sprites:
    """The pictures of a split of the corpus, whose bytes are gathered in a file in `folder`."""
    path, styles, offset = folder / "sprites", {}, 0
    with open(path, "wb") as file:
        for shard in list_files(train, (".tar",)):
            for sample in read_shard(read(shard), shard):
                about = {name: sample.meta[name] for name in ("emoji", "name", "group", "source", "author", "licence")}
                styles.setdefault(sample.meta["style"], []).append(Sprite(**about, offset=offset, length=len(sample.image)))
                offset += file.write(sample.image)
    return Sprites(path, {style: sorted(styles[style], key=lambda sprite: sprite.emoji) for style in sorted(styles)})


# -- one scene --------------------------------------------------------------------------------------------------------

def compose(sprites: Sprites, seed: int, number: int) -> Scene:
    """Scene `number` of a seed."""
    rng = np.random.default_rng([seed, number])
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    styles = list(sprites.styles)
    style = styles[rng.integers(len(styles))]
    choice = sprites.of(style, kind)
    return {"background": _on_background, "recolour": _recoloured, "count": _counted, "relation": _related}[kind](sprites, style, choice, rng)


def labels(kind: str, style: str, objects: Sequence[Sprite], boxes: Sequence[Sequence[int]], colour: str | None = None,
           background: str | None = None, count: int | None = None, relation: str | None = None) -> dict[str, Any]:
    """What is in a scene: its kind, style, objects, their boxes (left, top, right, bottom in pixels), and what else is known of it."""
    first = objects[0]
    return {"scene": kind, "style": style, "objects": [sprite.about for sprite in objects], "boxes": [list(map(int, box)) for box in boxes],
            "colour": colour, "background": background, "count": count, "relation": relation, "emoji": first.emoji, "group": first.group,
            "author": first.author, "licence": first.licence, "source": first.source}


def _on_background(sprites: Sprites, style: str, choice: Sequence[Sprite], rng: np.random.Generator) -> Scene:
    sprite = choice[rng.integers(len(choice))]
    picture = _fit(sprites.picture(sprite), int(SIZE * rng.uniform(0.55, 0.9)))
    background = _unlike(_mean(picture), rng)
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[background])
    box = _paste(image, picture, (0, 0, SIZE, SIZE), rng)
    return Scene(image, _background_captions(sprite.name.lower(), style, background),
                 labels("background", style, [sprite], [box], background=background))


def _recoloured(sprites: Sprites, style: str, choice: Sequence[Sprite], rng: np.random.Generator) -> Scene:
    sprite = choice[rng.integers(len(choice))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    picture = recolour(_fit(sprites.picture(sprite), int(SIZE * rng.uniform(0.7, 0.95))), colour)
    # What is white is not seen on white.
    background = _unlike(COLOURS[colour], rng) if colour == "white" else None
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[background or "white"])
    box = _paste(image, picture, (0, 0, SIZE, SIZE), rng)
    name = f"{colour} {sprite.name.lower()}"
    thing = with_article(name)
    captions = _background_captions(name, style, background) if background else (
        f"{thing}, {style}", f"{name} emoji, {style}", in_style(thing, style), thing)
    return Scene(image, captions, labels("recolour", style, [sprite], [box], colour=colour, background=background))


def _counted(sprites: Sprites, style: str, choice: Sequence[Sprite], rng: np.random.Generator) -> Scene:
    sprite, count = choice[rng.integers(len(choice))], int(rng.integers(1, 5))
    image = Image.new("RGB", (SIZE, SIZE), COLOURS["white"])
    cells = _cells(count, rng)
    side = min(min(right - left, bottom - top) for left, top, right, bottom in cells)
    picture = _fit(sprites.picture(sprite), int(side * rng.uniform(0.75, 0.95)))
    boxes = [_paste(image, picture, cell, rng) for cell in cells]
    name = sprite.name.lower()
    things = f"{NUMBERS[count]} {name if count == 1 else plural(name)}"
    return Scene(image, (f"{things}, {style}", f"{things} emoji, {style}", in_style(things, style), things),
                 labels("count", style, [sprite] * count, boxes, count=count))


def _related(sprites: Sprites, style: str, choice: Sequence[Sprite], rng: np.random.Generator) -> Scene:
    first, second = (choice[n] for n in rng.choice(len(choice), 2, replace=False))
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    beside = relation in RELATIONS[:2]
    cells = [(0, 0, SIZE // 2, SIZE), (SIZE // 2, 0, SIZE, SIZE)] if beside else [(0, 0, SIZE, SIZE // 2), (0, SIZE // 2, SIZE, SIZE)]
    image, boxes = Image.new("RGB", (SIZE, SIZE), COLOURS["white"]), []
    for sprite, (left, top, right, bottom) in zip((first, second), cells if relation in ("to the left of", "above") else cells[::-1], strict=True):
        # Beside each other is at about one height, above each other about one line.
        cell = (left, SIZE // 5, right, SIZE - SIZE // 5) if beside else (SIZE // 5, top, SIZE - SIZE // 5, bottom)
        boxes.append(_paste(image, _fit(sprites.picture(sprite), int(SIZE // 2 * rng.uniform(0.8, 0.96))), cell, rng))
    a, b = (with_article(sprite.name.lower()) for sprite in (first, second))
    pair = f"{a} {relation} {b}"
    return Scene(image, (f"{pair}, {style}", f"{b} {OPPOSITE[relation]} {a}, {style}", in_style(pair, style), pair),
                 labels("relation", style, [first, second], boxes, relation=relation))


def _background_captions(name: str, style: str, background: str) -> tuple[str, ...]:
    thing, on = with_article(name), f"on {with_article(background)} background"
    return f"{thing}, {style}, {on}", f"{thing} {on}, {style}", f"{in_style(thing, style)} {on}", f"{thing} {on}"


def recolour(picture: Image.Image, colour: str) -> Image.Image:
    """An RGBA picture in one hue, its light and shade kept: its middle grey becomes the colour, black stays dark and white light."""
    grey, alpha = picture.convert("L"), picture.getchannel("A")
    seen = np.asarray(grey)[np.asarray(alpha) > 128]
    middle = float(np.clip(np.median(seen), 60, 215)) if seen.size else 128.0
    table = _tints(colour, int(middle))
    rgb = Image.merge("RGB", [grey.point(table[:, channel].tolist()) for channel in range(3)])
    rgb.putalpha(alpha)
    return rgb


@cache
def _tints(colour: str, middle: int) -> np.ndarray:
    """What each grey becomes: (256, 3) uint8."""
    target = np.array(COLOURS[colour], float)
    if colour == "white":
        target -= 8
    dark = target * (0.55 if colour == "white" else 0.25)
    light = target + (255 - target) * (0.45 if colour == "black" else 0.8)
    return np.stack([np.interp(np.arange(256), [0, middle, 255], [dark[n], target[n], light[n]]) for n in range(3)], axis=1).round().astype(np.uint8)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """With its longer side `side` pixels."""
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return picture.resize(size, Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR)


def _paste(image: Image.Image, picture: Image.Image, cell: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Lay a picture somewhere in a cell. Returns its box."""
    left, top, right, bottom = cell
    x = left + int(rng.integers(max(0, right - left - picture.width) + 1))
    y = top + int(rng.integers(max(0, bottom - top - picture.height) + 1))
    image.paste(picture, (x, y), picture)
    return x, y, x + picture.width, y + picture.height


def _cells(count: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Places for so many objects, which do not overlap."""
    half, third = SIZE // 2, SIZE // 3
    if count == 1:
        return [(0, 0, SIZE, SIZE)]
    if count < 4 and rng.random() < 0.5:      # a row or a column
        step = SIZE // count
        row = [(n * step, third // 2, (n + 1) * step, SIZE - third // 2) for n in range(count)]
        return row if rng.random() < 0.5 else [(top, left, bottom, right) for left, top, right, bottom in row]
    quarters = [(x, y, x + half, y + half) for y in (0, half) for x in (0, half)]
    return [quarters[n] for n in sorted(rng.choice(4, count, replace=False))]


def _mean(picture: Image.Image) -> np.ndarray:
    """The mean colour of what is opaque: (3,)."""
    pixels = np.asarray(picture.reduce(4) if min(picture.size) > 8 else picture, float)
    weight = pixels[..., 3:] + 1e-6
    return (pixels[..., :3] * weight).sum((0, 1)) / weight.sum()


def _unlike(colour: Sequence[float] | np.ndarray, rng: np.random.Generator) -> str:
    """A colour's name by chance, of those that stand out from this one."""
    names = [name for name, other in COLOURS.items() if np.linalg.norm(np.subtract(other, colour)) > NEAR]
    return names[rng.integers(len(names))]


# -- all scenes -------------------------------------------------------------------------------------------------------

def write_scenes(out: str, count: int, report: Callable[[str], None] = lambda line: None, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compose `count` scenes from `out/train` and write SCENE_SPLITS beside it. Returns the index of each. Raises SceneError."""
    check_room(out, count)
    report(f"composing {count:,} scenes")
    with tempfile.TemporaryDirectory() as folder:
        sprites = read_sprites(f"{out}/train", Path(folder))
        writers = {split: _Writer(f"{out}/{split}") for split in SCENE_SPLITS}
        tasks = [(seed, start, min(start + ROWS_PER_TASK, count)) for start in range(0, count, ROWS_PER_TASK)]
        with process_pool(_begin_worker, (sprites,)) as pool:
            for made in in_order(pool, _compose_some, tasks):
                for split, sample in made:
                    writers[split].add(sample)
    card = read_card(f"{out}/train") or {}
    return {split: writer.finish({**card, "about": "Scenes composed from emoji pictures; each row's json says exactly what is in it.",
                                  "split": split, "scenes": count, "seed": seed}) for split, writer in writers.items()}


def check_room(out: str, count: int) -> None:
    """Raise SceneError where so many scenes do not fit on the disk."""
    if is_remote(out):
        return
    free = shutil.disk_usage(next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())).free
    if count * BYTES_PER_ROW > free:
        raise SceneError(f"{count:,} scenes take about {count * BYTES_PER_ROW / 1e9:,.1f} GB and {out} has {free / 1e9:,.1f} GB free; "
                         f"ask for at most --scenes {free // BYTES_PER_ROW} or write to another disk.")


class _Writer:
    """Rows as shards of a thousand, in the order in which they come."""

    def __init__(self, folder: str):
        self._folder, self._rows, self._entries, self._kinds = folder, [], [], Counter()
        begin(folder)

    def add(self, sample: Sample) -> None:
        self._rows.append(sample)
        self._kinds[sample.meta["scene"]] += 1
        if len(self._rows) == 1000:
            self._write()

    def finish(self, card: Mapping[str, Any]) -> dict[str, Any]:
        if self._rows:
            self._write()
        write_card(self._folder, {**card, "rows": sum(self._kinds.values()), "kinds": dict(self._kinds)})
        return finish(self._folder, self._entries)

    def _write(self) -> None:
        self._entries.append(write_shard(self._folder, len(self._entries), self._rows))
        self._rows = []


_sprites: Sprites | None = None      # of a worker process


def _begin_worker(sprites: Sprites) -> None:
    global _sprites
    _sprites = sprites


def _compose_some(task: tuple[int, int, int]) -> list[tuple[str, Sample]]:
    seed, start, stop = task
    return [_row(_sprites, seed, number) for number in range(start, stop)]


def _row(sprites: Sprites, seed: int, number: int) -> tuple[str, Sample]:
    scene = compose(sprites, seed, number)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=92, subsampling=0)
    return SCENE_SPLITS[scene.held_out], Sample(f"scene-{seed}-{number:07d}", buffer.getvalue(), "jpg", scene.captions, scene.labels)
