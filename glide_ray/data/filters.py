"""What may enter a corpus: small named predicates over a sample, and a count of what each one dropped.

A rule is true for what may stay. Its name says, after a number of rows, what is wrong with the others: "12 too small".
A rule of the user's own is a function `Candidate -> bool`, named on the command line as `module:function`.
"""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.data import CleanConfig
from ..errors import ConfigError
from .images import ImageError, flatten, load, open_image
from .shards import Sample

BROKEN = "with a broken image"  # where decoding fails; a broken header is another name's
NEAR_DUPLICATE = (
    "near-duplicates of another"  # found over the whole corpus (`duplicates.py`), not row by row
)


class Candidate:
    """A sample that is asked to show itself: what a rule looks at is read once, and only if a rule looks."""

    def __init__(self, sample: Sample):
        self.sample = sample
        self.key, self.captions, self.meta = sample.key, sample.captions, sample.meta

    @cached_property
    def opened(self) -> Image.Image:
        """The image with its header read: `.size` costs nothing. Raises ImageError."""
        return open_image(self.sample.image)

    @cached_property
    def picture(self) -> Image.Image:
        """The image in RGB, upright. Raises ImageError."""
        return flatten(load(self.opened))


Rule = Callable[[Candidate], bool]


# -- images, the cheap rules first ------------------------------------------------------------------------------------


def has_image(candidate: Candidate) -> bool:
    return bool(candidate.sample.image)


def has_header(candidate: Candidate) -> bool:
    return _raises_not(lambda: candidate.opened)


def is_large_enough(candidate: Candidate, min_size: int) -> bool:
    return min(candidate.opened.size) >= min_size


def has_moderate_aspect(candidate: Candidate, max_aspect: float) -> bool:
    return max(candidate.opened.size) <= max_aspect * min(candidate.opened.size)


def decodes(candidate: Candidate) -> bool:
    return _raises_not(lambda: candidate.picture)


def _raises_not(look: Callable[[], Any]) -> bool:
    try:
        look()
        return True
    except ImageError:
        return False


# -- captions: each is judged by itself, and a sample stays while one of its captions does -------------------------------

# What stands in the place of a caption on web pages: a camera's or a program's file name, an address, a call to click, a
# licence, a placeholder. The list is ours, after what Conceptual Captions and LAION report to have met.
FILE_NAME = re.compile(
    r"(?:img|dsc[nf]?|image|picture|photo|screen\s?shot|thumbnail|untitled|file|scan|figure)?[\s_-]*\(?\d*\)?\.?(?:jpe?g|png|gif|webp)?",
    re.IGNORECASE,
)
WORDS = re.compile(r"[^\W_](?:.*[^\W_])?", re.DOTALL)  # without what stands around them
BOILERPLATE = re.compile(
    r"""
    ^\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?)$
  | https?://|www\.\S+\.\w
  | \b(?:click|tap)\s+here\b | \bclick\s+(?:on|to)\b | \b(?:click|tap|hover|press)\b.*\bto\s+enlarge\b | \bimage\s+may\s+contain\b | \bno\s+(?:image|photo|picture)\s+available\b
  | \bstock\s+(?:photo|image|vector|illustration|footage)s?\b | \broyalty[\s-]free\b | \ball\s+rights\s+reserved\b | (?:\bcopyright\b|©)\s*(?:©|\(c\)|\d{4}|by\b)
  | \b(?:placeholder|lorem\s+ipsum|(?:default|thumbnail)\s+image)\b | \bskip\s+to\s+content\b | \b(?:free|fast)\s+shipping\b
""",
    re.VERBOSE | re.IGNORECASE,
)


def is_long_enough(caption: str, min_characters: int) -> bool:
    return len(caption.strip()) >= min_characters


def is_short_enough(caption: str, max_characters: int) -> bool:
    return len(caption) <= max_characters


def is_in_scripts(caption: str, scripts: Sequence[str]) -> bool:
    """Whether four of five letters, at the least, are of these scripts, as Unicode's names of characters begin: latin, cyrillic, cjk."""
    letters = [_script(character) for character in caption if character.isalpha()]
    return not scripts or sum(script in scripts for script in letters) >= 0.8 * len(letters)


def is_no_boilerplate(caption: str) -> bool:
    words = WORDS.search(caption)
    return (
        words is not None and not FILE_NAME.fullmatch(words[0]) and not BOILERPLATE.search(caption)
    )


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "?").split(" ")[0].split("-")[0].lower()


# -- all of them ------------------------------------------------------------------------------------------------------


def header_rules(min_size: int) -> dict[str, Rule]:
    """What a training run asks of each row: without decoding, which the trainer does itself."""
    return {
        "without an image": has_image,
        "with an unreadable image": has_header,
        "too small": lambda candidate: is_large_enough(candidate, min_size),
        "without a caption": lambda candidate: any(
            caption.strip() for caption in candidate.captions
        ),
    }


def image_rules(config: CleanConfig) -> dict[str, Rule]:
    """Name -> rule over the image, in the order in which they are asked: the first that is broken names the reason."""
    rules = {
        name: rule
        for name, rule in header_rules(config.min_size).items()
        if name != "without a caption"
    }
    if config.max_aspect is not None:
        rules["too long and thin"] = lambda candidate: has_moderate_aspect(
            candidate, config.max_aspect
        )
    return {**rules, BROKEN: decodes}


def caption_rules(config: CleanConfig) -> dict[str, Callable[[str], bool]]:
    """Name -> rule over one caption."""
    return {
        "without a caption": lambda caption: bool(caption.strip()),
        "with too short a caption": lambda caption: is_long_enough(caption, config.min_characters),
        "with too long a caption": lambda caption: is_short_enough(caption, config.max_characters),
        "with a caption in another script": lambda caption: is_in_scripts(caption, config.scripts),
        "with boilerplate for a caption": is_no_boilerplate,
    }


def first_broken(candidate: Candidate, rules: Mapping[str, Rule]) -> str | None:
    """The name of the first rule that a sample breaks, or None."""
    return next((name for name, rule in rules.items() if not rule(candidate)), None)


def clean_captions(
    captions: Sequence[str], rules: Mapping[str, Callable[[str], bool]]
) -> tuple[tuple[str, ...], str | None]:
    """The captions that break no rule, and where none is left the name of the rule that the first one breaks."""
    broken = [
        next((name for name, rule in rules.items() if not rule(caption)), None)
        for caption in captions
    ] or [next(iter(rules))]
    kept = tuple(caption for caption, name in zip(captions, broken, strict=False) if name is None)
    return kept, None if kept else broken[0]


def users_rules(names: Sequence[str], option: str = "--rule") -> dict[str, Rule]:
    """The functions that `module:function` names, the module as Python finds it from the current folder. Raises ConfigError."""
    rules = {}
    for name in names:
        module, _, function = name.partition(":")
        if not module or not function:
            raise ConfigError(
                f"{option} {name!r} is not of the form module:function, such as my_rules:is_outdoors."
            )
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = importlib.import_module(module)
        except Exception as error:  # a module of the user's raises what it will
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{option} {name}: the module cannot be imported from {Path.cwd()} ({why})."
            ) from None
        if not hasattr(found, function):
            raise ConfigError(f"{option} {name}: {module} has no function {function}.")
        rule = getattr(found, function)
        if not callable(rule):
            raise ConfigError(
                f"{option} {name}: {function} is not a function; it must take a Candidate and give true or false."
            )
        rules[f"against the rule {name}"] = rule
    return rules


@dataclass
class Report:
    """Rows kept, rows dropped by the name of the rule with an example of each, and what is said of every part with a fault."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, key: str, reason: str | None) -> None:
        """Count one row: kept, or dropped for `reason`."""
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, key)

    def merge(self, other: Report) -> None:
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.examples = {**other.examples, **self.examples}
        self.faults += other.faults

    def __str__(self) -> str:
        reasons = ", ".join(
            f"{count:,} {rule} (such as {self.examples[rule]})"
            for rule, count in self.dropped.most_common()
        )
        faults = (
            f"; {len(self.faults)} shards not read to their end: {' '.join(sorted(set(self.faults)))}"
            if self.faults
            else ""
        )
        return (
            f"{self.kept:,} kept"
            + (f"; dropped: {reasons}" if reasons else ", none dropped")
            + faults
        )
