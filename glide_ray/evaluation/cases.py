"""Prompts by category, each with a real picture of the same content: input of `glide compose`.

Models generate a picture for each prompt; the judge scores it beside the real picture.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import centre_crop, decode, load, open_image
from ..data.render import SIZE
from ..data.scenes import Scene, compose
from ..data.shards import Sample, read_index
from ..data.sources import read_corpus
from ..data.splits import share
from ..data.sprites import Sprites, read_sprites
from ..errors import UserError
from .categories import (
    BACKGROUND,
    CATEGORIES,
    COLOUR,
    COUNT,
    INPAINTING,
    NEW,
    PAIRS,
    POSITION,
    SEEN,
    SINGLE,
    UNSEEN,
)
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Category -> kind of composed scene (the label `scene`).
SCENES = {
    BACKGROUND: "background",
    COLOUR: "recolour",
    COUNT: "count",
    POSITION: "relation",
    INPAINTING: "relation",
}
SCENE_SEED = 20211220  # not the corpus's seed, whose scenes are training data
# Distance between the first seeds of two categories, so that no two pictures share their noise.
SEEDS_PER_CATEGORY = 10_000
TRIES = 400  # maximum number of scenes composed per scene wanted


class CorpusError(UserError):
    """A corpus without the data that the judge is fitted to, or that prompts are made of."""


@dataclass(frozen=True)
class Case:
    """A prompt with its seed, its labels and a real picture of the same content.

    `labels`: style, objects, and the other content that the picture must show, keyed as in `Scene`.
    `picture`: the real picture, (SIZE, SIZE, 3) uint8.
    `hole`: the pixels that an edit paints, (SIZE, SIZE) bool; None outside the category inpainting.
    """

    category: str
    prompt: str
    seed: int
    labels: Mapping[str, Any]
    picture: np.ndarray
    hole: np.ndarray | None = None
    new_colour: bool = False  # an object in or on a colour that training never pairs it with

    @property
    def thing(self) -> str:
        """Code points of the first object."""
        return self.labels["objects"][0]["emoji"]


@dataclass(frozen=True)
class Row:
    """A picture of the corpus with its metadata; `emoji`: code points."""

    emoji: str
    name: str
    group: str
    style: str
    sample: Sample

    def picture(self) -> np.ndarray:
        """The picture on white: (SIZE, SIZE, 3) uint8."""
        return centre_crop(decode(self.sample.image), SIZE)

    def drawing(self) -> Image.Image:
        """The picture as stored in the corpus, in RGBA."""
        return load(open_image(self.sample.image)).convert("RGBA")


def read_rows(corpus: str, split: str) -> list[Row]:
    """Pictures of a split without skin-tone variants, in a stable hash order.

    Raises CorpusError, ShardError.
    """
    folder = f"{corpus.rstrip('/')}/{split}"
    if read_index(folder) is None:
        raise CorpusError(
            f"There is no complete corpus {folder}; make it with `glide corpus --out {corpus}`, or "
            f"give another with --corpus."
        )
    rows = [
        Row(meta["emoji"], meta["name"], meta["group"], meta["style"], sample)
        for sample in read_corpus(folder)
        if (meta := sample.meta).keys() >= {"emoji", "name", "group", "style"}
        and not meta.get("tone")
    ]
    if not rows:
        raise CorpusError(
            f"No row of {folder} names its thing and style; give a corpus that `glide corpus` made."
        )
    return sorted(rows, key=lambda row: share(f"compose/{row.emoji}/{row.style}"))


def single_cases(category: str, rows: Iterable[Row], count: int, seed: int = 0) -> list[Case]:
    """`count` single-object prompts, cycling through `rows`; a repeated row has another seed."""
    rows = list(rows)
    if not rows:
        return []
    rounds = -(-count // len(rows))
    chosen = [row for _ in range(rounds) for row in rows][:count]
    return [
        Case(category, row.sample.captions[0], seed + n, _labels(row), row.picture())
        for n, row in enumerate(chosen)
    ]


def scene_cases(category: str, sprites: Sprites, count: int, seed: int = 0) -> list[Case]:
    """`count` prompts for composed scenes of one kind; no corpus contains these scenes.

    Fewer if `count` x TRIES composed scenes contain fewer of this kind.
    """
    kind = SCENES[category]
    cases: list[Case] = []
    for scene in _scenes(sprites, SCENE_SEED + (category == INPAINTING), count * TRIES):
        if scene.labels["scene"] == kind:
            cases.append(_scene_case(category, scene, seed + len(cases)))
        if len(cases) == count:
            break
    return cases


@contextmanager
def sprites_of(
    corpus: str, split: str, vocabulary: Vocabulary, things: Sequence[str] | None = None
) -> Iterator[Sprites]:
    """The pictures of a split from which scenes are composed.

    Only pictures of `things`, by default of all things with a plain name. Styles with fewer than
    two things are dropped.
    """
    known = set(vocabulary.names if things is None else things)
    with tempfile.TemporaryDirectory() as folder:
        sprites = read_sprites(f"{corpus.rstrip('/')}/{split}", Path(folder))
        styles = {
            style: [sprite for sprite in style_sprites if sprite.emoji in known]
            for style, style_sprites in sprites.styles.items()
        }
        yield Sprites(
            sprites.path,
            {
                style: style_sprites
                for style, style_sprites in styles.items()
                if len({sprite.emoji for sprite in style_sprites}) > 1
            },
        )


def _scenes(sprites: Sprites, seed: int, max_scenes: int) -> Iterator[Scene]:
    if not sprites.styles:
        return
    for number in range(max_scenes):
        yield compose(sprites, seed, number)


def _scene_case(category: str, scene: Scene, seed: int) -> Case:
    hole = _hole(scene) if category == INPAINTING else None
    return Case(
        category,
        scene.captions[0],
        seed,
        scene.labels,
        np.asarray(scene.image),
        hole,
        scene.held_out,
    )


def _hole(scene: Scene) -> np.ndarray:
    """A hole around the first of two objects, without the other: (SIZE, SIZE) bool.

    A square of half the picture's side, a quarter of its area.
    """
    left, top, right, bottom = scene.labels["boxes"][0]
    half = SIZE // 2
    beside = scene.labels["relation"].endswith(" of")
    x = half * (left >= half) if beside else _near(left, right, half)
    y = _near(top, bottom, half) if beside else half * (top >= half)
    hole = np.zeros((SIZE, SIZE), bool)
    hole[y : y + half, x : x + half] = True
    return hole


def _near(low: int, high: int, side: int, step: int = 4) -> int:
    """Start of a stretch of `side` pixels with [low, high) in its middle, inside the picture.

    A multiple of `step` pixels, because that is one pixel of the base model's picture.
    """
    return min(max((low + high - side) // 2 // step * step, 0), SIZE - side)


def _labels(row: Row) -> dict[str, Any]:
    return {
        "style": row.style,
        "objects": [{"emoji": row.emoji, "name": row.name}],
        "colour": None,
        "background": None,
        "count": None,
        "relation": None,
    }


def make_cases(
    corpus: str,
    vocabulary: Vocabulary,
    count: int,
    categories: Sequence[str] = CATEGORIES,
    seed: int = 0,
) -> list[Case]:
    """`count` prompts of each category; always the same for a corpus. Raises CorpusError."""
    log.info(f"making {count:,} prompts for each of {', '.join(categories)}")
    asked, cases = set(vocabulary.asked), []
    splits = {
        SEEN: ("train", asked),
        PAIRS: ("held_out_pairs", vocabulary.names.keys() - vocabulary.misjudged),
        UNSEEN: ("held_out", None),
    }
    for category in (name for name in categories if name in SINGLE):
        split, things = splits[category]
        rows = [
            row
            for row in read_rows(corpus, split)
            if row.emoji in vocabulary.names and (things is None or row.emoji in things)
        ]
        cases += single_cases(category, rows, count, first_seed(category, seed))
    if scenes := [name for name in categories if name in SCENES]:
        with sprites_of(corpus, "train", vocabulary, vocabulary.asked) as sprites:
            for category in scenes:
                cases += scene_cases(category, sprites, count, first_seed(category, seed))
    return cases


def first_seed(category: str, seed: int) -> int:
    """Seed of a category's first prompt; the seeds of the others count up from it."""
    return seed + SEEDS_PER_CATEGORY * (*CATEGORIES, NEW).index(category)
