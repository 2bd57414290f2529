"""Pictures of the corpus as parts of scenes: cropped, resized, pasted, recoloured."""

from __future__ import annotations

import io
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..storage import list_files, read
from .captions import MASS, with_article
from .shards import read_shard

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 50),
    "green": (55, 165, 70),
    "blue": (45, 100, 220),
    "purple": (135, 65, 190),
    "pink": (250, 135, 185),
    "brown": (125, 80, 45),
    "black": (30, 30, 30),
    "white": (255, 255, 255),
    "grey": (140, 140, 140),
}
OBJECT_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# A name that ends in one of these is not a single object that can be counted, or no object at all.
NOT_COUNTED = MASS | frozenset(
    [
        "corn",
        "desert",
        "park",
        "foggy",
        "cityscape",
        "sunrise",
        "sunset",
        "night",
        "wedding",
        "station",
        "metro",
        "rail",
        "motorway",
        "track",
        "departure",
        "arrival",
        "moon",
        "way",
        "cyclone",
        "tornado",
        "weather",
        "voltage",
        "shower",
        "wind",
        "droplet",
        "elevator",
        "link",
        "umbrellas",
        "ceremony",
        "arts",
        "knot",
        "tilted",
        "receiver",
        "beans",
        "herb",
        "green",
        "vegetable",
        "food",
        "milk",
        "salad",
        "beverage",
        "mate",
        "microbe",
        "coast",
        "locked",
        "unlocked",
        "increasing",
        "decreasing",
        "memo",
        "high",
        "pick",
        "hamsa",
        "moai",
        "placard",
        "kaaba",
        "japan",
        "fuji",
        "tower",
        "island",
        "houses",
        "mountains",
        "bridge",
        "springs",
        "suspension",
        "left",
        "right",
        "up",
        "down",
        "face",
        "nose",
        "prints",
        "rain",
        "snow",
        "lightning",
        "railway",
        "tramway",
        "cableway",
        "seat",
        "hole",
        "x-ray",
        "dna",
        "wing",
        "meat",
        "done",
        "flying",
        "batteries",
        "luggage",
        "wallet",
        "badge",
        "liquid",
        "pong",
        "game",
        "wave",
        "broccoli",
    ]
)
OPAQUE = 8  # a pixel with alpha (0 to 255) above this is inside an object's box
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Sprite:
    """A picture of the corpus; `offset` and `length` locate its bytes in the file of `Sprites`."""

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
        """Whether its name is one or two plain words for a single object, without a colour."""
        name = self.name.lower()
        words = name.split()
        return (
            self.group in OBJECT_GROUPS
            and re.fullmatch("[a-z]+( [a-z]+)?", name) is not None
            and words[-1] not in NOT_COUNTED
            and with_article(name) != name
            and not set(words) & COLOURS.keys()
        )


class Sprites:
    """Pictures by style; their bytes are in one file that all processes of a machine share."""

    def __init__(self, path: Path, styles: Mapping[str, Sequence[Sprite]]):
        self.path, self.styles = path, dict(styles)
        self.counted = {
            style: [sprite for sprite in of if sprite.counted] for style, of in styles.items()
        }
        self._bytes: mmap.mmap | None = None

    def __getstate__(self) -> tuple:
        return self.path, self.styles

    def __setstate__(self, state: tuple) -> None:
        Sprites.__init__(self, *state)

    def picture(self, sprite: Sprite) -> Image.Image:
        """RGBA picture, cropped to the pixels that are not transparent."""
        if self._bytes is None:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._bytes[sprite.offset : sprite.offset + sprite.length]
        image = Image.open(io.BytesIO(data)).convert("RGBA")
        box = image.getchannel("A").point(lambda alpha: 255 * (alpha > OPAQUE)).getbbox()
        return image.crop(box) if box else image


def read_sprites(train: str, folder: Path) -> Sprites:
    """Read the pictures of a split of the corpus, and collect their bytes in a file in `folder`."""
    path, offset = folder / "sprites", 0
    styles: dict[str, list[Sprite]] = {}
    with open(path, "wb") as file:
        for shard in list_files(train, (".tar",)):
            for sample in read_shard(read(shard), shard):
                names = ("emoji", "name", "group", "source", "author", "licence")
                about = {name: sample.meta[name] for name in names}
                sprite = Sprite(**about, offset=offset, length=len(sample.image))
                styles.setdefault(sample.meta["style"], []).append(sprite)
                offset += file.write(sample.image)
    # Sort, so that the order does not depend on the shards: a scene's number decides what it shows.
    ordered = {style: sorted(styles[style], key=lambda one: one.emoji) for style in sorted(styles)}
    return Sprites(path, ordered)


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Resize a picture so that its longer side is `side` pixels."""
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    filter = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BILINEAR
    return picture.resize((width, height), filter)


def paste(image: Image.Image, picture: Image.Image, cell: Box, rng: np.random.Generator) -> Box:
    """Paste an RGBA picture at a random place in a cell of an RGB image. Returns its box."""
    left, top, right, bottom = cell
    x = left + int(rng.integers(max(0, right - left - picture.width) + 1))
    y = top + int(rng.integers(max(0, bottom - top - picture.height) + 1))
    image.paste(picture, (x, y), picture)
    return x, y, x + picture.width, y + picture.height


def mean_colour(picture: Image.Image) -> np.ndarray:
    """Mean RGB weighted by alpha, (3,) in 0 to 255."""
    pixels = np.asarray(picture.reduce(4) if min(picture.size) > 8 else picture, float)
    weight = pixels[..., 3:] + 1e-6
    return (pixels[..., :3] * weight).sum((0, 1)) / weight.sum()


def recolour(picture: Image.Image, colour: str) -> Image.Image:
    """Recolour an RGBA picture to one hue, with its light and shade kept.

    Its median grey becomes the colour; darker greys go towards black, lighter ones towards white.
    """
    grey, alpha = picture.convert("L"), picture.getchannel("A")
    visible = np.asarray(grey)[np.asarray(alpha) > 128]
    middle = int(np.median(visible)) if visible.size else 128
    channels = [grey.point(table) for table in _tints(colour, middle)]
    return Image.merge("RGBA", [*channels, alpha])


@cache
def _tints(colour: str, middle: int) -> list[list[int]]:
    """Lookup tables from 256 greys to red, green and blue. `middle`: the grey that is `colour`."""
    target = np.array(COLOURS[colour], float)
    if colour == "white":
        target -= 8  # leaves room for highlights
    dark = target * (0.55 if colour == "white" else 0.25)
    light = target + (255 - target) * (0.45 if colour == "black" else 0.8)
    # Ends may lie beyond 0 to 255: a black object's median grey is at the end of the scale, and
    # must become the colour too.
    ends = [min(0, middle - 60), middle, max(255, middle + 40)]
    return [
        np.interp(np.arange(256), ends, points).round().astype(int).tolist()
        for points in zip(dark, target, light, strict=True)
    ]
