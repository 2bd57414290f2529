"""Fitting the judge to a corpus's real pictures, as they are and a little degraded, and keeping it for the next time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .. import storage
from ..data.scenes import compose
from ..data.shards import read_index
from ..data.sprites import OBJECT_GROUPS
from ..models.efficientnet import SHA256
from . import vocabulary as words
from .cases import SCENE_SEED, CorpusError, Row, read_rows, sprites_of
from .heads import Discriminant, Logistic
from .judge import Judge
from .looks import Looks, View
from .regions import part_areas, resized

VERSION = 1                 # of what a fitted judge depends on beside the corpus: a cached one of another is not used
SPLITS = ("train", "held_out", "held_out_pairs")
THING_SHRINK, THING_WIDTH, STYLE_SHRINK = 0.1, 256, 0.3
COUNTED_SCENES, COUNT_DECAY = 1500, 1e-3
AT_ONCE = 64
Say = Callable[[str], None]


def fit(corpus: str, say: Say = lambda line: None, looks: Looks | None = None, asked: int = words.ASKED,
        least_styles: int = words.LEAST_STYLES, scenes: int = COUNTED_SCENES) -> Judge:
    """From `corpus/train`: things and styles; from scenes composed of its pictures: counts. Things never seen in training are known from
    `corpus/held_out`, so that they can be named. Raises CorpusError, MissingNetworkError."""
    looks = looks or Looks()
    rows = [row for row in read_rows(corpus, "train") if row.group in OBJECT_GROUPS]
    vocabulary = words.choose(((row.emoji, row.name, row.group, row.style) for row in rows), asked, least_styles)
    styles = {row.style for row in rows}
    if len(styles) < 2 or len(vocabulary.order) < 2:
        raise CorpusError(f"{corpus}/train has {len(styles)} style(s) and {len(vocabulary.order)} thing(s) drawn in {least_styles} of them; the judge "
                          f"needs two of each: make the whole corpus with `glide corpus`.")
    shapes, drawn, labels, of_style = _features(rows, looks, say)
    things = Discriminant.fit(shapes, labels, THING_SHRINK, THING_WIDTH, cosine=True)
    say(f"fitting the judge to {len(rows):,} pictures of {len(set(labels)):,} things in {len(styles)} styles")
    judge = Judge(vocabulary, things, Discriminant.fit(drawn, of_style, STYLE_SHRINK, len(styles)), fit_counts(corpus, vocabulary, scenes), looks=looks)
    return with_things(judge, [row for row in read_rows(corpus, "held_out") if words.is_plain(row.emoji, row.name, row.group)])


def with_things(judge: Judge, rows: Sequence[Row]) -> Judge:
    """Knowing more things, from real pictures of them."""
    if not rows:
        return judge
    shapes = np.concatenate([judge.shapes_of([row.picture() for row in rows[start:start + AT_ONCE]])
                             for start in range(0, len(rows), AT_ONCE)])
    names = {**judge.vocabulary.names, **{row.emoji: row.name for row in rows}}
    return replace(judge, things=judge.things.adding(shapes, [row.emoji for row in rows]), vocabulary=replace(judge.vocabulary, names=names))


def fit_counts(corpus: str, vocabulary: words.Vocabulary, scenes: int = COUNTED_SCENES) -> Logistic:
    """One to four, from the areas of the separate parts of composed scenes, at 256 and at 64 pixels."""
    features, counts = [], []
    with sprites_of(corpus, "train", vocabulary) as sprites:
        for number in range(scenes):
            scene = compose(sprites, SCENE_SEED - 1, number)
            count = {"count": scene.labels["count"], "relation": 2, "recolour": 1}.get(scene.labels["scene"])
            if count is not None:
                picture = np.asarray(scene.image)
                features += [part_areas(picture), part_areas(resized(picture, 64))]
                counts += [count - 1] * 2
    return Logistic.fit(np.stack(features), np.array(counts), COUNT_DECAY)


def _features(rows: Sequence[Row], looks: Looks, say: Say) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """What is shown and how it is drawn, for each degradation of each row; its thing and its style."""
    shapes, drawn, labels, styles = [], [], [], []
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start:start + AT_ONCE]
        pictures = [row.picture() for row in some]
        for n, degrade in enumerate(DEGRADATIONS):
            rng = np.random.default_rng([n, start])
            shape, style = looks.both([View.of(degrade(picture, rng)) for picture in pictures])
            shapes.append(shape.astype(np.float16))
            drawn.append(style.astype(np.float16))
            labels += [row.emoji for row in some]
            styles += [row.style for row in some]
        if start % (16 * AT_ONCE) == 0:
            say(f"looking at real pictures: {start:,} of {len(rows):,}")
    return np.concatenate(shapes), np.concatenate(drawn), labels, styles


# -- what generated pictures may look like beside real ones -----------------------------------------------------------

def as_is(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture


def small_and_noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At 64 pixels, its colours a little off, under noise of up to 5 levels."""
    pixels = resized(picture, 64).astype(np.float32)
    inked = np.clip((255 - pixels.min(-1, keepdims=True)) / 60, 0, 1)
    pixels += rng.normal(0, 3, (1, 1, 3)) * inked + rng.normal(0, rng.uniform(0, 5), pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8)


def moved_and_blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Larger or smaller, elsewhere, out of focus, and through JPEG."""
    side = 128
    new = int(side * rng.uniform(0.82, 1.1))
    canvas = Image.new("RGB", (side, side), "white")
    corner = tuple(int((side - new) // 2 + rng.integers(-6, 7)) for _ in range(2))
    canvas.paste(Image.fromarray(picture).resize((new, new), Image.Resampling.BILINEAR), corner)
    buffer = io.BytesIO()
    canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6))).save(buffer, "JPEG", quality=int(rng.integers(40, 92)))
    return np.asarray(Image.open(buffer).convert("RGB"))


DEGRADATIONS = (as_is, small_and_noisy, moved_and_blurred)


# -- kept -------------------------------------------------------------------------------------------------------------

def cached_path(corpus: str, cache: str | Path | None = None) -> Path:
    """Where the judge of this corpus is kept. Raises CorpusError where the corpus is not whole."""
    parts = {}
    for split in SPLITS:
        index = read_index(f"{corpus.rstrip('/')}/{split}")
        if index is None:
            raise CorpusError(f"There is no whole corpus {corpus.rstrip('/')}/{split}; make it with `glide corpus --out {corpus}`, or give another with "
                              f"--corpus.")
        parts[split] = [shard["sha256"] for shard in index["shards"]]
    name = hashlib.sha256(json.dumps([VERSION, SHA256, parts]).encode()).hexdigest()[:16]
    return Path(cache or storage.cache_folder()) / "judges" / f"{name}.safetensors"


def load_or_fit(corpus: str, say: Say = lambda line: None, cache: str | Path | None = None, fitted: Callable[[Judge], Judge] = lambda judge: judge
                ) -> Judge:
    """The judge of a corpus, fitted once; `fitted` is what is done to it before it is kept. Raises CorpusError, JudgeError."""
    path = cached_path(corpus, cache)
    if path.exists():
        return Judge.load(path)
    judge = fitted(fit(corpus, say))
    judge.save(path)
    return Judge.load(path)         # as it is the next time, to the last digit

