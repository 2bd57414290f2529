"""Pictures of the artists' sets with their names and splits, before rendering."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import emoji_captions
from .card import LeftOut
from .firefox import FIREFOX
from .naming import RENAMED, Names, Thing, split_tone, squashed, tone_of
from .packages import Package
from .render import svg_of
from .shards import Sample
from .splits import held_out_pairs, is_held_out
from .styles import STYLES, Style

log = logging.getLogger(__name__)

NAMES, KEYWORDS = ("unicode-emoji-json", "0.9.0"), ("emojilib", "4.0.3")
UNNAMED, SECOND = "no Unicode name", "a second picture of the same thing"
HIDDEN, ALIAS = "hidden by the set's maker", "another name of a picture"


@dataclass(frozen=True)
class SourcePicture:
    """One picture of a set. `content` is its SVG, or the bytes of a WebP."""

    key: str
    style: Style
    version: str
    thing: Thing
    tone: str
    content: str | bytes

    def sample(self, image: bytes) -> Sample:
        """The picture as a sample, with image, captions and metadata."""
        thing, style = self.thing, self.style
        name = thing.name + (f", {self.tone} skin tone" if self.tone else "")
        meta = {
            "emoji": thing.code,
            "name": thing.name,
            "group": thing.group,
            "style": style.words,
            "author": style.author,
            "licence": style.licence,
            "source": f"{style.package}@{self.version}",
        } | ({"tone": self.tone} if self.tone else {})
        captions = emoji_captions(name, thing.keywords, style.words)
        return Sample(self.key, image, "webp", tuple(captions), meta)


def needed_packages(styles: Iterable[Style]) -> list[tuple[str, str]]:
    """Name and version of every package that these styles are read from."""
    styles = list(styles)
    lenders = [STYLES[style.names_of] for style in styles if style.names_of]
    sources = [style.source for style in (*styles, *lenders)]
    return list(dict.fromkeys([*sources, NAMES, KEYWORDS]))


def read_pictures(
    styles: Iterable[Style],
    packages: Mapping[str, Package],
    left_out: LeftOut,
) -> Iterator[SourcePicture]:
    """Yield the pictures that have a Unicode name, one per style, emoji and skin tone.

    Other pictures are counted in `left_out`. Raises EmojiError for a package that cannot be read.
    """
    names = Names(
        packages[NAMES[0]].json("data-by-emoji.json"),
        packages[KEYWORDS[0]].json("emoji-en-US.json"),
    )
    for style in styles:
        package = packages[style.package]
        if style.is_vector:
            lender = STYLES[style.names_of] if style.names_of else style
            found = list(_icons(style, package, packages[lender.package], names, left_out))
        else:
            found = list(_files(style, package, names, left_out))
        if package.version != style.version:
            log.info(
                f"{style.package} is version {package.version}, not {style.version}: "
                f"{len(found):,} pictures with names, of the {style.pictures:,} in that one"
            )
        yield from _first_of_each(found, left_out)


def assign_splits(pictures: Iterable[SourcePicture]) -> dict[str, str]:
    """Key -> split of each picture.

    A picture with a skin tone has the split of its emoji, but `tones` in place of `train`.
    """
    pictures = list(pictures)
    styles: dict[str, dict[str, None]] = {}
    for picture in pictures:
        if not picture.tone:
            styles.setdefault(picture.thing.code, {})[picture.style.words] = None
    held_out = {code: held_out_pairs(code, list(of)) for code, of in styles.items()}

    def split(picture: SourcePicture) -> str:
        if is_held_out(picture.thing.code):
            return "held_out"
        if picture.style.words in held_out.get(picture.thing.code, ()):
            return "held_out_pairs"
        return "tones" if picture.tone else "train"

    return {picture.key: split(picture) for picture in pictures}


def _first_of_each(pictures: Iterable[SourcePicture], left_out: LeftOut) -> Iterator[SourcePicture]:
    seen: set[tuple[str, str]] = set()
    for picture in pictures:
        what = picture.thing.code, picture.tone
        if what in seen:
            left_out.add(SECOND, picture.key)
        else:
            seen.add(what)
            yield picture


def _files(
    style: Style, package: Package, names: Names, left_out: LeftOut
) -> Iterator[SourcePicture]:
    """Pictures of a package of WebP files that are named by their code points."""
    for file, image in package.files(re.compile(r"package/assets/[^/]+\.webp")):
        code = Path(file).stem.replace("_", "-").lower()  # "_" joins the tags of regional flags
        key = f"{style.slug}-{code}"
        if thing := names.by_code(code):
            yield SourcePicture(key, style, package.version, thing, tone_of(code), image)
        else:
            left_out.add(UNNAMED, key)


def _icons(
    style: Style, package: Package, lender: Package, names: Names, left_out: LeftOut
) -> Iterator[SourcePicture]:
    """Pictures of an Iconify set. `lender`: the package that maps its names to code points."""
    icons = package.json("icons.json")
    find = _Finder(style, icons, lender, names)
    for name, icon in icons["icons"].items():
        key = f"{style.slug}-{name}"
        thing, tone = find(name)
        if icon.get("hidden"):
            left_out.add(HIDDEN, key)
        elif thing is None:
            left_out.add(UNNAMED, key)
        else:
            yield SourcePicture(key, style, package.version, thing, tone, svg_of(icon, icons))
    for name in icons.get("aliases", {}):
        left_out.add(ALIAS, f"{style.slug}-{name}")


class _Finder:
    """Finder of emoji and skin tone for a picture's name in a set: by code points, else by name."""

    def __init__(self, style: Style, icons: Mapping[str, Any], lender: Package, names: Names):
        self._names, self._short = names, "fluent" in style.package
        self._renamed = FIREFOX if style.words == "Firefox" else RENAMED
        self._taken = squashed(icons["icons"])
        self._codes: dict[str, list[str]] = {}
        for code, name in lender.json("chars.json").items():
            self._codes.setdefault(name, []).append(code)
        self._others: dict[str, list[str]] = {}
        for name, alias in icons.get("aliases", {}).items():
            if alias.keys() == {"parent"}:  # mirrored or rotated aliases are other pictures
                self._others.setdefault(alias["parent"], []).append(name)

    def __call__(self, name: str) -> tuple[Thing | None, str]:
        codes = self._codes.get(name, ())
        if thing := next(filter(None, map(self._names.by_code, codes)), None):
            return thing, next(filter(None, map(tone_of, codes)), "")
        if thing := self._by_name(name, *self._others.get(name, ())):
            return thing, ""  # a word like a tone is part of the name: "police-car-light"
        bare, tone = split_tone(name, self._short)
        return self._by_name(bare), tone

    def _by_name(self, *names: str) -> Thing | None:
        return self._names.by_name(names, self._taken, self._renamed)
