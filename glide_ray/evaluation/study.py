"""A study of which pictures people prefer (sec. 5.2, app. A.1): pictures of two or more models, paired by prompt and seed, and attention checks.

Pictures are copied into the study as pixels under opaque names: neither their files nor where they lie say which model made them.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import storage
from ..data.images import ImageError, centre_crop, decode, encode
from ..data.shards import read_meta
from ..data.sources import METADATA, Part, find_parts, read_part
from ..errors import UserError
from .pairing import Comparison, draw
from .votes import Asked, Votes

DATABASE, PICTURES = "votes.sqlite", "pictures"
PER_CHECK, MOST_CHECKS = (
    10,
    100,
)  # comparisons of a question to one attention check; and checks at most
TRIES = 50  # of drawing two captions that have no word in common


class StudyError(UserError):
    """Pictures that no study can be made of."""


@dataclass(frozen=True)
class StudyPicture:
    """Where a picture lies: row `place` of a part."""

    part: Part
    place: int
    prompt: str
    seed: int | None = None


Pair = tuple[str, str, StudyPicture, StudyPicture]  # the models' names and a picture of each


def open_study(
    out: str | Path,
    database: str | None,
    asked: Asked | None,
    report: Callable[[str], None] = lambda line: None,
) -> Votes:
    """The study in the folder `out`, made if it is not there whole. `asked`, None to go on with what there is. Raises UserError."""
    if storage.is_remote(out):
        raise StudyError(
            f"A study lies on the machine that serves it, and {out} does not; give a local folder with --out."
        )
    storage.check_writable(out)
    votes = Votes(database or database_of(out))
    if asked:
        votes.begin(asked)
    folder = Path(out) / PICTURES
    names = {
        name
        for one in votes.comparisons().values()
        for name in (one.first_picture, one.second_picture)
    }
    if not names or any(
        not (folder / f"{name}.png").exists() for name in names
    ):  # the folder is new, and the database is not
        votes.add_comparisons(_make(votes.asked, votes.study.secret, folder, report))
    return votes


def database_of(out: str | Path) -> str:
    """The URL of a study's own file."""
    return f"sqlite:///{Path(out).resolve() / DATABASE}"


# -- pictures ---------------------------------------------------------------------------------------------------------


def find_pictures(folder: str) -> dict[str, list[StudyPicture]]:
    """By prompt, under each of its captions. Bulk generation's folder is only listed, any other corpus is read once. Raises ShardError."""
    found: dict[str, list[StudyPicture]] = {}
    for picture in _listed(folder) or _walked(folder):
        found.setdefault(picture.prompt, []).append(picture)
    return found


def _listed(folder: str) -> list[StudyPicture]:
    """What METADATA says, with seeds; [] where there is none."""
    folder = storage.absolute(folder).rstrip("/")
    try:
        rows = [read_meta(line) for line in storage.read(f"{folder}/{METADATA}").splitlines()]
    except storage.MissingError:
        return []
    return [
        StudyPicture(
            Part(
                f"{folder}/{row['file_name']}",
                files=((f"{folder}/{row['file_name']}", (str(row["text"]),)),),
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
    """Each with its pixels (S, S, 3), part by part: their centred squares, as generated ones are (app. A.2). Raises StudyError where one is missing or broken."""
    by_part: dict[str, list[StudyPicture]] = {}
    for picture in pictures:
        by_part.setdefault(picture.part.url, []).append(picture)
    for url, wanted in by_part.items():
        wanted_at: dict[int, list[StudyPicture]] = {}
        for picture in wanted:
            wanted_at.setdefault(picture.place, []).append(picture)
        for place, sample in enumerate(
            itertools.islice(read_part(wanted[0].part), max(wanted_at) + 1)
        ):
            for picture in wanted_at.get(place, ()):
                try:
                    image = decode(sample.image)
                except ImageError as error:
                    raise StudyError(
                        f"The picture {sample.key} of {url} cannot be shown ({str(error).rstrip('.')}); make it anew."
                    ) from None
                yield picture, centre_crop(image, min(image.size))


# -- pairs ------------------------------------------------------------------------------------------------------------


def choose_pairs(
    pictures: Mapping[str, Mapping[str, Sequence[StudyPicture]]], count: int, secret: str
) -> list[Pair]:
    """At most `count` pairs of pictures of the same prompt and, where both have it, seed: as many of each two models as of any other, if there are.

    Raises StudyError where two models have no prompt in common.
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
                f"{first} and {second} have no prompt in common; make pictures of the same file of prompts with both."
            )
        random.Random(draw(secret, first, second)).shuffle(pairs)
        chosen.append(pairs)
    return [pair for round_ in itertools.zip_longest(*chosen) for pair in round_ if pair][:count]


def pairs_of(
    first: Sequence[StudyPicture], second: Sequence[StudyPicture]
) -> list[tuple[StudyPicture, StudyPicture]]:
    """Of one prompt: those of the same seed, or where no seed is in both, in their order."""
    by_seed = {picture.seed: picture for picture in second if picture.seed is not None}
    return [
        (picture, by_seed[picture.seed]) for picture in first if picture.seed in by_seed
    ] or list(zip(first, second, strict=False))


# -- making -----------------------------------------------------------------------------------------------------------


def _make(
    asked: Asked, secret: str, folder: Path, report: Callable[[str], None]
) -> list[Comparison]:
    """Write the pictures and return what is compared. It gives the same of the same secret: what was broken off is done again over itself."""
    pairs = choose_pairs(
        {name: find_pictures(path) for name, path in asked.folders.items()},
        asked.comparisons,
        secret,
    )
    report(f"{len(pairs):,} pairs of {len(asked.folders)} models; copying their pictures")
    shown = {
        (name, picture): opaque(secret, name, picture)
        for *names, first, second in pairs
        for name, picture in zip(names, (first, second), strict=True)
    }
    sizes = {}
    for name in asked.folders:
        for picture, pixels in read_pictures([picture for of, picture in shown if of == name]):
            _write(pixels, folder, shown[name, picture])
            sizes[shown[name, picture]] = pixels.shape[:2]
    made = [
        Comparison(0, first, second, one.prompt, shown[first, one], shown[second, other])
        for first, second, one, other in pairs
    ]
    checks = (
        _real_checks(asked, secret, folder, len(pairs))
        if asked.real
        else _noise_checks(asked, secret, folder, made, sizes)
    )
    return [replace(one, id=n) for n, one in enumerate([*made, *checks], 1)]


def opaque(secret: str, name: str, picture: StudyPicture) -> str:
    """What a picture is called on the page."""
    return f"{draw(secret, 'picture', name, picture.part.url, picture.place, picture.prompt):016x}"


def _write(pixels: np.ndarray, folder: Path, name: str) -> None:
    storage.put(encode(pixels), folder / f"{name}.png")


def _noise_checks(
    asked: Asked,
    secret: str,
    folder: Path,
    made: Sequence[Comparison],
    sizes: Mapping[str, tuple[int, int]],
) -> list[Comparison]:
    """A picture of the study beside noise of its size: the same for both questions, for who the models are good at is not known."""
    checks = []
    for question in asked.questions:
        for n in range(_how_many(len(made))):
            one = made[draw(secret, "check", question, n) % len(made)]
            picture = (one.first_picture, one.second_picture)[draw(secret, "of", question, n) % 2]
            checks.append(
                Comparison(
                    0,
                    "",
                    "",
                    one.prompt,
                    picture,
                    _noise(secret, folder, (question, n), sizes[picture]),
                    question,
                )
            )
    return checks


def _real_checks(asked: Asked, secret: str, folder: Path, count: int) -> list[Comparison]:
    """A real picture with its caption: for photorealism beside noise, for the caption beside a real picture of something else."""
    corpus = find_pictures(asked.real)
    if not corpus:
        raise StudyError(
            f"No image of {asked.real} has a caption; give --real a corpus with captions, or leave it out."
        )
    prompts, checks, wanted = list(corpus), [], {}
    said: dict[tuple[str, int], set[str]] = {}  # words of all captions of a picture
    for prompt, pictures in corpus.items():
        for one in pictures:
            said.setdefault((one.part.url, one.place), set()).update(_words(prompt))
    for question in asked.questions:
        for n in range(_how_many(count)):
            prompt = prompts[draw(secret, "check", question, n) % len(prompts)]
            right, wrong = corpus[prompt][0], None
            if question == "caption":
                others = (
                    prompts[draw(secret, "other", n, attempt) % len(prompts)]
                    for attempt in range(TRIES)
                )
                wrong = next(
                    (
                        one
                        for other in others
                        if not said[(one := corpus[other][0]).part.url, one.place]
                        & said[right.part.url, right.place]
                    ),
                    None,
                )
                if wrong is None:
                    continue
            wanted |= {one: opaque(secret, "", one) for one in (right, wrong) if one}
            checks.append((question, n, prompt, right, wrong))
    sizes = {}
    for picture, pixels in read_pictures(list(wanted)):
        _write(pixels, folder, wanted[picture])
        sizes[picture] = pixels.shape[:2]
    return [
        Comparison(
            0,
            "",
            "",
            prompt,
            wanted[right],
            wanted[wrong] if wrong else _noise(secret, folder, (question, n), sizes[right]),
            question,
        )
        for question, n, prompt, right, wrong in checks
    ]


def _noise(secret: str, folder: Path, of: tuple[str, int], size: tuple[int, int]) -> str:
    name = f"{draw(secret, 'noise', *of):016x}"
    _write(
        np.random.default_rng(draw(secret, "pixels", *of)).integers(0, 256, (*size, 3), np.uint8),
        folder,
        name,
    )
    return name


def _how_many(comparisons: int) -> int:
    return min(MOST_CHECKS, -(-comparisons // PER_CHECK))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{3,}", text.lower()))
