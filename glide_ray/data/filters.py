"""Rules for the rows of a corpus: small named predicates, and a count of the rows each one dropped.

A rule returns true for rows that may stay. Its name completes a number of dropped rows in a report:
"12 too small". A user's own rule is a function `Candidate -> bool`, named on the command line as
`module:function`.
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
from .images import MAX_PIXELS, ImageError, TooLargeError, flatten, load, open_image
from .sample import Sample

BROKEN = "with a broken image"  # decoding fails; broken headers are "with an unreadable image"
NO_IMAGE, NO_CAPTION = "without an image", "without a caption"
# found by comparing all rows of a corpus (`duplicates.py`), not row by row
NEAR_DUPLICATE = "near-duplicates of another"
SEMANTIC_DUPLICATE = "semantic duplicates of another"


class Candidate:
    """A sample as rules see it: the image is opened and decoded once, and only when needed."""

    def __init__(self, sample: Sample):
        self.sample = sample
        self.key, self.captions, self.meta = sample.key, sample.captions, sample.meta

    @cached_property
    def opened(self) -> Image.Image:
        """The image with only its header read; `.size` needs no decoding. Raises ImageError."""
        return open_image(self.sample.image)

    @cached_property
    def picture(self) -> Image.Image:
        """The decoded image, RGB and upright. Raises ImageError."""
        return flatten(load(self.opened))


Rule = Callable[[Candidate], bool]


# -- rules for images, cheap ones first ------------------------------------------------------------


def has_image(candidate: Candidate) -> bool:
    return bool(candidate.sample.image)


def has_header(candidate: Candidate) -> bool:
    try:
        return bool(candidate.opened)
    except TooLargeError:  # the next rule
        return True
    except ImageError:
        return False


def is_small_enough(candidate: Candidate) -> bool:
    return _succeeds(lambda: candidate.opened)


def is_large_enough(candidate: Candidate, min_size: int) -> bool:
    return min(candidate.opened.size) >= min_size


def has_moderate_aspect(candidate: Candidate, max_aspect: float) -> bool:
    return max(candidate.opened.size) <= max_aspect * min(candidate.opened.size)


def decodes(candidate: Candidate) -> bool:
    return _succeeds(lambda: candidate.picture)


def _succeeds(action: Callable[[], Any]) -> bool:
    try:
        action()
        return True
    except ImageError:
        return False


# -- rules for captions, applied to each one; a sample stays while one of its captions does --------

# Texts that web pages have in place of a caption: file names of cameras and programs, URLs, calls
# to click, licences, default texts. The list is our own, after the reports of Conceptual Captions
# and LAION.
FILE_NAME = re.compile(
    r"(?:img|dsc[nf]?|image|picture|photo|screen\s?shot|thumbnail|untitled|file|scan|figure)?"
    r"[\s_-]*\(?\d*\)?\.?(?:jpe?g|png|gif|webp)?",
    re.IGNORECASE,
)
INNER_TEXT = re.compile(r"[^\W_](?:.*[^\W_])?", re.DOTALL)  # caption without enclosing punctuation
BOILERPLATE = re.compile(
    r"""
    ^\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?)$
  | https?://|www\.\S+\.\w
  | \b(?:click|tap)\s+here\b | \bclick\s+(?:on|to)\b"""
    r""" | \b(?:click|tap|hover|press)\b.*\bto\s+enlarge\b | \bimage\s+may\s+contain\b"""
    r""" | \bno\s+(?:image|photo|picture)\s+available\b
  | \bstock\s+(?:photo|image|vector|illustration|footage)s?\b | \broyalty[\s-]free\b"""
    r""" | \ball\s+rights\s+reserved\b | (?:\bcopyright\b|©)\s*(?:©|\(c\)|\d{4}|by\b)
  | \b(?:placeholder|lorem\s+ipsum|(?:default|thumbnail)\s+image)\b"""
    r""" | \bskip\s+to\s+content\b | \b(?:free|fast)\s+shipping\b
""",
    re.VERBOSE | re.IGNORECASE,
)


def is_long_enough(caption: str, min_characters: int) -> bool:
    return len(caption.strip()) >= min_characters


def is_short_enough(caption: str, max_characters: int) -> bool:
    return len(caption) <= max_characters


def is_in_scripts(caption: str, scripts: Sequence[str]) -> bool:
    """Whether at least four of five letters are of these scripts; true if `scripts` is empty.

    A script is the first word of its characters' Unicode names: latin, cyrillic, cjk.
    """
    letters = [_script(character) for character in caption if character.isalpha()]
    return not scripts or sum(script in scripts for script in letters) >= 0.8 * len(letters)


def is_descriptive(caption: str) -> bool:
    words = INNER_TEXT.search(caption)
    return (
        words is not None and not FILE_NAME.fullmatch(words[0]) and not BOILERPLATE.search(caption)
    )


@lru_cache(maxsize=4096)
def _script(character: str) -> str:
    return unicodedata.name(character, "?").split(" ")[0].split("-")[0].lower()


# -- sets of rules ---------------------------------------------------------------------------------


def header_rules(min_size: int) -> dict[str, Rule]:
    """Rules of a training run for each row. They do not decode images: the trainer does."""
    return {
        NO_IMAGE: has_image,
        "with an unreadable image": has_header,
        f"with more than {MAX_PIXELS // 10**6} million pixels": is_small_enough,
        "too small": lambda candidate: is_large_enough(candidate, min_size),
        NO_CAPTION: lambda candidate: any(caption.strip() for caption in candidate.captions),
    }


def image_rules(config: CleanConfig) -> dict[str, Rule]:
    """Name -> rule for the image, in order of application: the first broken rule is the reason."""
    rules = {
        name: rule for name, rule in header_rules(config.min_size).items() if name != NO_CAPTION
    }
    if (max_aspect := config.max_aspect) is not None:
        rules["too long and thin"] = lambda candidate: has_moderate_aspect(candidate, max_aspect)
    return {**rules, BROKEN: decodes}


def caption_rules(config: CleanConfig) -> dict[str, Callable[[str], bool]]:
    """Name -> rule for one caption, in order of application."""
    return {
        NO_CAPTION: lambda caption: bool(caption.strip()),
        "with too short a caption": lambda caption: is_long_enough(caption, config.min_characters),
        "with too long a caption": lambda caption: is_short_enough(caption, config.max_characters),
        "with a caption in another script": lambda caption: is_in_scripts(caption, config.scripts),
        "with boilerplate for a caption": is_descriptive,
    }


def first_broken(candidate: Candidate, rules: Mapping[str, Rule]) -> str | None:
    """Name of the first rule that a sample breaks, or None.

    For a row without an image or a caption, the reason that its reader gives.
    """
    broken = next((name for name, rule in rules.items() if not rule(candidate)), None)
    return broken and exact_reason(candidate.sample, broken)


def exact_reason(sample: Sample, reason: str) -> str:
    """The reason that the reader of a row gives for a lack of image or caption, if it gives one."""
    known = {NO_IMAGE: sample.no_image, NO_CAPTION: sample.no_caption}
    return known.get(reason) or reason


def clean_captions(
    captions: Sequence[str], rules: Mapping[str, Callable[[str], bool]]
) -> tuple[tuple[str, ...], str | None]:
    """The captions that break no rule, and the reason if none is left, else None.

    The reason is the name of the first rule that the first caption breaks.
    """
    broken = [
        next((name for name, rule in rules.items() if not rule(caption)), None)
        for caption in captions
    ] or [next(iter(rules), None)]
    kept = tuple(caption for caption, name in zip(captions, broken, strict=False) if name is None)
    return kept, None if kept else broken[0]


def import_rules(names: Sequence[str], option: str = "--rule") -> dict[str, Rule]:
    """Import the user's rules, each named `module:function`. Raises ConfigError.

    Modules in the current folder are found too.
    """
    rules = {}
    for name in names:
        module, _, function = name.partition(":")
        if not module or not function:
            raise ConfigError(
                f"{option} {name!r} is not of the form module:function, such as "
                f"my_rules:is_outdoors."
            )
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found = importlib.import_module(module)
        except Exception as error:  # user code can raise anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{option} {name}: the module cannot be imported from {Path.cwd()} ({why})."
            ) from None
        if not hasattr(found, function):
            raise ConfigError(f"{option} {name}: {module} has no function {function}.")
        rule = getattr(found, function)
        if not callable(rule):
            raise ConfigError(
                f"{option} {name}: {function} is not a function; it must take a Candidate and give "
                f"true or false."
            )
        rules[f"against the rule {name}"] = rule
    return rules


MISSING = re.compile(r"There is no (?:file|object) (.+)\.")
SHOWN_FAULTS, MAX_FAULTS = 3, 10  # names of missing shards, and messages of others, in a report


@dataclass
class Report:
    """Counts of kept and dropped rows, an example of each reason, and faults of broken parts.

    `captions_unread` counts damaged captions that were left out, also of kept rows.
    """

    kept: int = 0
    captions_unread: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, key: str, reason: str | None, captions_unread: int = 0) -> None:
        """Count one row: kept, or dropped for `reason`."""
        self.captions_unread += captions_unread
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, key)

    def merge(self, other: Report) -> None:
        self.kept += other.kept
        self.captions_unread += other.captions_unread
        self.dropped.update(other.dropped)
        self.examples = {**other.examples, **self.examples}
        self.faults += other.faults

    def __str__(self) -> str:
        reasons = ", ".join(
            f"{count:,} {rule} (such as {self.examples[rule]})"
            for rule, count in self.dropped.most_common()
        )
        unread = f"; {self.captions_unread:,} damaged captions" if self.captions_unread else ""
        return (
            f"{self.kept:,} kept"
            + (f"; dropped: {reasons}" if reasons else ", none dropped")
            + unread
            + (f"; {self._faults()}" if self.faults else "")
        )

    def _faults(self) -> str:
        """Faults in few words: missing shards by number, with three names."""
        faults = sorted(set(self.faults))
        names = [found[1] for fault in faults if (found := MISSING.fullmatch(fault))]
        others = [fault for fault in faults if not MISSING.fullmatch(fault)]
        if len(names) <= SHOWN_FAULTS:
            others, names = faults, []
        texts = []
        if others:
            more = len(others) - MAX_FAULTS
            texts.append(
                f"{len(others)} shards not read to their end: {' '.join(others[:MAX_FAULTS])}"
                + (f" And {more:,} more." if more > 0 else "")
            )
        if names:
            texts.append(
                f"{len(names):,} shards are missing, such as {', '.join(names[:SHOWN_FAULTS])}"
            )
        return "; ".join(texts)
