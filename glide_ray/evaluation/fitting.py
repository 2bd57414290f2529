"""Fit the judge to a corpus's real pictures, original and slightly degraded, and cache it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from ..data.images import flatten
from ..data.scenes import compose
from ..data.shards import read_index
from ..data.sprites import COLOURS, OBJECT_GROUPS, recolour
from ..models.efficientnet import SHA256
from ..object_cache import cache_folder
from . import vocabulary as words
from .cases import SCENE_SEED, CorpusError, Row, read_rows, sprites_of
from .heads import Discriminant, Logistic
from .judge import Judge
from .judge_accuracy import try_judge
from .judge_features import FeatureExtractor, JudgeFeatures, View
from .regions import part_areas, resized
from .styles import Styles

log = logging.getLogger(__name__)

# Increment whenever fitting changes: part of the cache key, so older judges are not used.
VERSION = 3
SPLITS = ("train", "held_out", "held_out_pairs")
THING_SHRINK, THING_WIDTH = 0.1, 256
COUNTED_SCENES, COUNT_DECAY = 1500, 1e-3
IMAGES_PER_CALL = 64


def fit(
    corpus: str,
    extractor: FeatureExtractor | None = None,
    asked: int = words.ASKED,
    least_styles: int = words.MIN_STYLES,
    scenes: int = COUNTED_SCENES,
) -> Judge:
    """Fit a judge to a corpus.

    Things and styles come from `corpus/train`, counts from scenes composed of its pictures. Things
    of `corpus/held_out`, never seen in training, are added so that the judge can name them.

    Raises CorpusError, MissingNetworkError.
    """
    extractor = extractor or FeatureExtractor()
    rows = [row for row in read_rows(corpus, "train") if row.group in OBJECT_GROUPS]
    if len({row.style for row in rows}) < 2:
        raise CorpusError(
            f"The pictures of objects in {corpus}/train are all of one style, and the judge needs "
            f"several; make the whole corpus with `glide corpus`."
        )
    features, things_of, repeats = (
        _features(rows, extractor),
        [row.emoji for row in rows],
        len(DEGRADATIONS),
    )
    plain = [row for row in rows if words.is_plain(row.emoji, row.name, row.group)]
    shapes = np.concatenate([features.shapes, _shapes_alone(plain, extractor)])
    log.info(f"fitting the judge to {len(rows):,} pictures")
    things = Discriminant.fit(
        shapes,
        things_of * repeats + [row.emoji for row in plain],
        THING_SHRINK,
        THING_WIDTH,
        cosine=True,
    )
    styles, right = Styles.fit(features, [row.style for row in rows] * repeats, things_of * repeats)
    vocabulary = _vocabulary(rows, right[: len(rows)], asked, least_styles)
    judge = Judge(
        vocabulary, things, styles, fit_counts(corpus, vocabulary, scenes), extractor=extractor
    )
    return with_things(
        judge,
        [
            row
            for row in read_rows(corpus, "held_out")
            if words.is_plain(row.emoji, row.name, row.group)
        ],
    )


def _vocabulary(
    rows: Sequence[Row], style_is_right: np.ndarray, asked: int, least_styles: int
) -> words.Vocabulary:
    """The vocabulary, without prompts for things whose style is not reliably recognised.

    A thing is left out if the style of any of its pictures was misclassified by the classifier
    fitted without the thing: prompts for it could not be scored.
    """
    misjudged = {row.emoji for row, right in zip(rows, style_is_right, strict=True) if not right}
    vocabulary = words.choose(
        ((row.emoji, row.name, row.group, row.style) for row in rows),
        asked,
        least_styles,
        misjudged,
    )
    if len(vocabulary.order) < 2:
        raise CorpusError(
            "There are no two things in the corpus that have plain names and are drawn in most of "
            "its styles; make the whole corpus with `glide corpus`."
        )
    return vocabulary


def with_things(judge: Judge, rows: Sequence[Row]) -> Judge:
    """A judge that also knows the things of `rows`, from these real pictures."""
    if not rows:
        return judge
    shapes = np.concatenate(
        [
            judge.shapes_of([row.picture() for row in rows[start : start + IMAGES_PER_CALL]])
            for start in range(0, len(rows), IMAGES_PER_CALL)
        ]
    )
    names = {**judge.vocabulary.names, **{row.emoji: row.name for row in rows}}
    return replace(
        judge,
        things=judge.things.adding(shapes, [row.emoji for row in rows]),
        vocabulary=replace(judge.vocabulary, names=names),
    )


def fit_counts(corpus: str, vocabulary: words.Vocabulary, scenes: int = COUNTED_SCENES) -> Logistic:
    """Fit the classifier of counts, one to four.

    On areas of the separate parts of composed scenes, at 256 and at 64 pixels.
    """
    features, counts = [], []
    with sprites_of(corpus, "train", vocabulary) as sprites:
        for number in range(scenes):
            scene = compose(sprites, SCENE_SEED - 1, number)
            count = {"count": scene.labels["count"], "relation": 2, "recolour": 1}.get(
                scene.labels["scene"]
            )
            if count is not None:
                picture = np.asarray(scene.image)
                features += [part_areas(picture), part_areas(resized(picture, 64))]
                counts += [count - 1] * 2
    return Logistic.fit(np.stack(features), np.array(counts), COUNT_DECAY)


def _features(rows: Sequence[Row], extractor: FeatureExtractor) -> JudgeFeatures:
    """Features of all rows under each of DEGRADATIONS, one degradation after the other."""
    features: list[list[JudgeFeatures]] = [[] for _ in DEGRADATIONS]
    for start in range(0, len(rows), IMAGES_PER_CALL):
        if start % (16 * IMAGES_PER_CALL) == 0:
            log.info(f"features of real pictures: {start:,} of {len(rows):,}")
        pictures = [row.picture() for row in rows[start : start + IMAGES_PER_CALL]]
        for n, degrade in enumerate(DEGRADATIONS):
            rng = np.random.default_rng([n, start])
            part = extractor.of([View.of(degrade(picture, rng)) for picture in pictures])
            features[n].append(
                JudgeFeatures(
                    part.shapes.astype(np.float16), part.textures.astype(np.float16), part.colours
                )
            )
    return JudgeFeatures.concatenate([part for parts in features for part in parts])


def _shapes_alone(rows: Sequence[Row], extractor: FeatureExtractor) -> np.ndarray:
    """Object features of pictures as they appear in scenes: recoloured, or small."""
    found = []
    for start in range(0, len(rows), IMAGES_PER_CALL):
        rng = np.random.default_rng([len(DEGRADATIONS), start])
        pictures = [small_or_recoloured(row, rng) for row in rows[start : start + IMAGES_PER_CALL]]
        found.append(
            extractor.shapes([View.of(picture) for picture in pictures]).astype(np.float16)
        )
    return np.concatenate(found)


# -- degradations: real pictures made to resemble generated ones -----------------------------------


def as_is(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture


def small_and_noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At 64 pixels, with slightly shifted colours and Gaussian noise.

    The noise has a standard deviation of up to 5 of 255.
    """
    pixels = resized(picture, 64).astype(np.float32)
    inked = np.clip((255 - pixels.min(-1, keepdims=True)) / 60, 0, 1)
    pixels += rng.normal(0, 3, (1, 1, 3)) * inked + rng.normal(0, rng.uniform(0, 5), pixels.shape)
    return pixels.round().clip(0, 255).astype(np.uint8)


def moved_and_blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scaled, shifted, sometimes mirrored, blurred, and compressed as JPEG; 128 pixels."""
    side = 128
    picture = picture[:, ::-1] if rng.random() < 0.5 else picture
    new = int(side * rng.uniform(0.82, 1.1))
    canvas = Image.new("RGB", (side, side), "white")
    left, top = (int((side - new) // 2 + rng.integers(-6, 7)) for _ in range(2))
    resized_picture = Image.fromarray(picture).resize((new, new), Image.Resampling.BILINEAR)
    canvas.paste(resized_picture, (left, top))
    buffer = io.BytesIO()
    canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6))).save(
        buffer, "JPEG", quality=int(rng.integers(40, 92))
    )
    return np.asarray(Image.open(buffer).convert("RGB"))


def small_or_recoloured(row: Row, rng: np.random.Generator) -> np.ndarray:
    """As in a scene: often recoloured, and small like one of several objects."""
    picture = row.picture()
    if rng.random() < 0.6:
        coloured = recolour(row.drawing(), list(COLOURS)[rng.integers(len(COLOURS))])
        picture = np.asarray(flatten(coloured))
    return resized(picture, int(rng.integers(24, 97)))


DEGRADATIONS = (as_is, small_and_noisy, moved_and_blurred)


# -- cache -----------------------------------------------------------------------------------------


def cached_path(corpus: str, cache: str | Path | None = None) -> Path:
    """Path of this corpus's cached judge. Raises CorpusError if the corpus is incomplete."""
    parts = {}
    for split in SPLITS:
        index = read_index(f"{corpus.rstrip('/')}/{split}")
        if index is None:
            raise CorpusError(
                f"There is no complete corpus {corpus.rstrip('/')}/{split}; make it with "
                f"`glide corpus --out {corpus}`, or give another with --corpus."
            )
        parts[split] = [shard["sha256"] for shard in index["shards"]]
    name = hashlib.sha256(json.dumps([VERSION, SHA256, parts]).encode()).hexdigest()[:16]
    return Path(cache or cache_folder()) / "judges" / f"{name}.safetensors"


def load_or_fit(corpus: str, cache: str | Path | None = None) -> Judge:
    """The judge of a corpus, fitted and measured on first use, then cached with its accuracy.

    Raises CorpusError, JudgeError, MissingNetworkError.
    """
    path = cached_path(corpus, cache)
    if not path.exists():
        try_judge(corpus, fit(corpus)).save(path)
    return Judge.load(path)
