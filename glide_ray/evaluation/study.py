"""A study of human preferences (sec. 5.2, app. A.1) between pictures of two or more models.

Pictures are paired by prompt and seed, and attention checks are added. They are copied into the
study as pixels under opaque names, so that neither files nor paths reveal which model made them.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import storage
from ..data.images import ImageError, centre_crop, decode, encode
from ..data.readers.folder import ImageFile
from ..data.shards import read_meta
from ..data.sources import METADATA, Part, find_parts, read_part
from ..errors import UserError
from .pairing import Comparison, draw
from .votes import StudyDefinition, Votes

log = logging.getLogger(__name__)

DATABASE, PICTURES = "votes.sqlite", "pictures"
# Comparisons per attention check, and maximum number of checks, of each question.
COMPARISONS_PER_CHECK, MAX_CHECKS = 10, 100
TRIES = 50  # attempts to draw two captions without a common word


class StudyError(UserError):
    """Pictures from which no study can be made."""


@dataclass(frozen=True)
class StudyPicture:
    """Location of a picture, row `place` of a part, with its prompt and seed."""

    part: Part
    place: int
    prompt: str
    seed: int | None = None


Pair = tuple[str, str, StudyPicture, StudyPicture]  # two models' names, then a picture of each


def open_study(
    out: str | Path,
    database: str | None,
    definition: StudyDefinition | None,
) -> Votes:
    """Open the study in the folder `out`, and create it if it is missing or incomplete.

    `database`: its URL; None: a file in `out`. `definition`: the definition of a new study; None:
    continue the existing one. Raises UserError.
    """
    if storage.is_remote(out):
        raise StudyError(
            f"A study is served from a local folder, and {out} is not one; give a local folder "
            "with --out."
        )
    storage.check_writable(out)
    votes = Votes(database or database_of(out))
    if definition:
        votes.begin(definition)
    folder = Path(out) / PICTURES
    names = {
        name
        for comparison in votes.comparisons().values()
        for name in (comparison.first_picture, comparison.second_picture)
    }
    # A new study, or an existing database with a new folder.
    if not names or any(not (folder / f"{name}.png").exists() for name in names):
        votes.add_comparisons(_make(votes.asked, votes.study.secret, folder))
    return votes


def database_of(out: str | Path) -> str:
    """URL of a study's own SQLite file."""
    return f"sqlite:///{Path(out).resolve() / DATABASE}"


# -- pictures --------------------------------------------------------------------------------------


def find_pictures(folder: str) -> dict[str, list[StudyPicture]]:
    """Pictures by prompt; a picture with several captions is listed under each.

    A folder of bulk generation is only listed; any other corpus is read once. Raises ShardError.
    """
    found: dict[str, list[StudyPicture]] = {}
    for picture in _listed(folder) or _walked(folder):
        found.setdefault(picture.prompt, []).append(picture)
    return found


def _listed(folder: str) -> list[StudyPicture]:
    """Pictures listed in METADATA, with seeds; [] if there is no such file."""
    folder = storage.absolute(folder).rstrip("/")
    try:
        rows = [read_meta(line) for line in storage.read(f"{folder}/{METADATA}").splitlines()]
    except storage.MissingError:
        return []
    return [
        StudyPicture(
            Part(
                f"{folder}/{row['file_name']}",
                files=(ImageFile(f"{folder}/{row['file_name']}", (str(row["text"]),)),),
            ),
            0,
            str(row["text"]).strip(),
            seed if isinstance(seed := row.get("seed"), int) else None,
        )
        for row in rows
        if "file_name" in row and str(row.get("text") or "").strip()
    ]


def _walked(folder: str) -> Iterator[StudyPicture]:
    for part in find_parts(folder):
        for place, sample in enumerate(read_part(part)):
            yield from (
                StudyPicture(part, place, caption.strip())
                for caption in dict.fromkeys(sample.captions)
                if caption.strip()
            )


def read_pictures(pictures: Sequence[StudyPicture]) -> Iterator[tuple[StudyPicture, np.ndarray]]:
    """Pictures with their pixels (S, S, 3), part by part.

    Cropped to the centred square, like generated ones (app. A.2). Raises StudyError if a picture is
    missing or broken.
    """
    by_part: dict[str, list[StudyPicture]] = {}
    for picture in pictures:
        by_part.setdefault(picture.part.url, []).append(picture)
    for url, pictures_of_part in by_part.items():
        by_place: dict[int, list[StudyPicture]] = {}
        for picture in pictures_of_part:
            by_place.setdefault(picture.place, []).append(picture)
        for place, sample in enumerate(
            itertools.islice(read_part(pictures_of_part[0].part), max(by_place) + 1)
        ):
            for picture in by_place.get(place, ()):
                try:
                    image = decode(sample.image)
                except ImageError as error:
                    raise StudyError(
                        f"The picture {sample.key} of {url} cannot be shown "
                        f"({str(error).rstrip('.')}); make it again."
                    ) from None
                yield picture, centre_crop(image, min(image.size))


# -- pairs -----------------------------------------------------------------------------------------


def choose_pairs(
    pictures: Mapping[str, Mapping[str, Sequence[StudyPicture]]], count: int, secret: str
) -> list[Pair]:
    """At most `count` pairs of pictures of the same prompt and, where both have it, seed.

    Spread evenly over the pairs of models, as far as there are pictures. Raises StudyError if two
    models have no prompt in common.
    """
    chosen: list[list[Pair]] = []
    for first, second in itertools.combinations(pictures, 2):
        pairs = [
            (first, second, *pair)
            for prompt in pictures[first]
            if prompt in pictures[second]
            for pair in pairs_of(pictures[first][prompt], pictures[second][prompt])
        ]
        if not pairs:
            raise StudyError(
                f"{first} and {second} have no prompt in common; make pictures of the same file of "
                f"prompts with both."
            )
        random.Random(draw(secret, first, second)).shuffle(pairs)
        chosen.append(pairs)
    return [pair for round_ in itertools.zip_longest(*chosen) for pair in round_ if pair][:count]


def pairs_of(
    first: Sequence[StudyPicture], second: Sequence[StudyPicture]
) -> list[tuple[StudyPicture, StudyPicture]]:
    """Pairs of pictures of one prompt: by seed, or in order if they share no seed."""
    by_seed = {picture.seed: picture for picture in second if picture.seed is not None}
    return [
        (picture, by_seed[picture.seed]) for picture in first if picture.seed in by_seed
    ] or list(zip(first, second, strict=False))


# -- creating a study ------------------------------------------------------------------------------


def _make(definition: StudyDefinition, secret: str, folder: Path) -> list[Comparison]:
    """Write the pictures and return the comparisons.

    The same secret gives the same result, so rerunning after an interruption overwrites identical
    files.
    """
    pairs = choose_pairs(
        {name: find_pictures(path) for name, path in definition.folders.items()},
        definition.comparisons,
        secret,
    )
    log.info(f"{len(pairs):,} pairs of {len(definition.folders)} models; copying their pictures")
    page_names = {
        (name, picture): opaque_name(secret, name, picture)
        for *names, first, second in pairs
        for name, picture in zip(names, (first, second), strict=True)
    }
    sizes = {}
    for name in definition.folders:
        for picture, pixels in read_pictures(
            [picture for model, picture in page_names if model == name]
        ):
            _write(pixels, folder, page_names[name, picture])
            sizes[page_names[name, picture]] = pixels.shape[:2]
    comparisons = [
        Comparison(
            0,
            first,
            second,
            picture.prompt,
            page_names[first, picture],
            page_names[second, partner],
        )
        for first, second, picture, partner in pairs
    ]
    checks = (
        _real_checks(definition, secret, folder, len(pairs))
        if definition.real
        else _noise_checks(definition, secret, folder, comparisons, sizes)
    )
    return [replace(comparison, id=n) for n, comparison in enumerate([*comparisons, *checks], 1)]


def opaque_name(secret: str, name: str, picture: StudyPicture) -> str:
    """The name under which the page shows a picture."""
    return f"{draw(secret, 'picture', name, picture.part.url, picture.place, picture.prompt):016x}"


def _write(pixels: np.ndarray, folder: Path, name: str) -> None:
    storage.put(encode(pixels), folder / f"{name}.png")


def _noise_checks(
    definition: StudyDefinition,
    secret: str,
    folder: Path,
    comparisons: Sequence[Comparison],
    sizes: Mapping[str, tuple[int, int]],
) -> list[Comparison]:
    """Attention checks: a picture of the study beside noise of its size.

    Noise for both questions, because it is unknown how well the models' pictures fit captions.
    """
    checks = []
    for question in definition.questions:
        for n in range(_check_count(len(comparisons))):
            comparison = comparisons[draw(secret, "check", question, n) % len(comparisons)]
            picture = (comparison.first_picture, comparison.second_picture)[
                draw(secret, "of", question, n) % 2
            ]
            checks.append(
                Comparison(
                    0,
                    "",
                    "",
                    comparison.prompt,
                    picture,
                    _noise(secret, folder, (question, n), sizes[picture]),
                    question,
                )
            )
    return checks


def _real_checks(
    definition: StudyDefinition, secret: str, folder: Path, count: int
) -> list[Comparison]:
    """Attention checks: a real picture with its caption.

    For photorealism beside noise; for the caption beside a real picture of something else.
    """
    assert definition.real is not None
    corpus = find_pictures(definition.real)
    if not corpus:
        raise StudyError(
            f"No image of {definition.real} has a caption; give --real a corpus with captions, or "
            f"leave it out."
        )
    prompts, checks = list(corpus), []
    page_names: dict[StudyPicture, str] = {}  # picture -> name under which the page shows it
    words = _words_of_pictures(corpus)
    for question in definition.questions:
        for n in range(_check_count(count)):
            prompt = prompts[draw(secret, "check", question, n) % len(prompts)]
            right, wrong = corpus[prompt][0], None
            if question == "caption":
                others = (
                    corpus[prompts[draw(secret, "other", n, attempt) % len(prompts)]][0]
                    for attempt in range(TRIES)
                )
                wrong = _first_of_other_words(others, right, words)
                if wrong is None:
                    continue
            page_names |= {
                picture: opaque_name(secret, "", picture) for picture in (right, wrong) if picture
            }
            checks.append((question, n, prompt, right, wrong))
    sizes = {}
    for picture, pixels in read_pictures(list(page_names)):
        _write(pixels, folder, page_names[picture])
        sizes[picture] = pixels.shape[:2]
    return [
        Comparison(
            0,
            "",
            "",
            prompt,
            page_names[right],
            page_names[wrong] if wrong else _noise(secret, folder, (question, n), sizes[right]),
            question,
        )
        for question, n, prompt, right, wrong in checks
    ]


def _first_of_other_words(
    pictures: Iterable[StudyPicture], right: StudyPicture, words: Mapping[tuple[str, int], set[str]]
) -> StudyPicture | None:
    """The first picture whose caption shares no word with that of `right`."""
    used = words[right.part.url, right.place]
    return next(
        (picture for picture in pictures if not words[picture.part.url, picture.place] & used), None
    )


def _words_of_pictures(
    corpus: Mapping[str, Sequence[StudyPicture]],
) -> dict[tuple[str, int], set[str]]:
    """(part's URL, place) of a picture -> words of all its captions."""
    words: dict[tuple[str, int], set[str]] = {}
    for caption, pictures in corpus.items():
        for picture in pictures:
            words.setdefault((picture.part.url, picture.place), set()).update(_words(caption))
    return words


def _noise(secret: str, folder: Path, key: tuple[str, int], size: tuple[int, int]) -> str:
    name = f"{draw(secret, 'noise', *key):016x}"
    _write(
        np.random.default_rng(draw(secret, "pixels", *key)).integers(0, 256, (*size, 3), np.uint8),
        folder,
        name,
    )
    return name


def _check_count(comparisons: int) -> int:
    return min(MAX_CHECKS, -(-comparisons // COMPARISONS_PER_CHECK))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))
