"""Sources, licences and authors that the rows of a corpus name, counted in bounded memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

# Fields of a row in order of preference, without capitals and signs: "License URL" is licenseurl.
LICENCE_FIELDS = (
    *("licence", "license", "licencename", "licensename", "licencetype", "licensetype"),
    *("licenceurl", "licenseurl", "rights", "usagerights"),
)
SOURCE_FIELDS = (
    *("source", "sourceurl", "url", "imageurl", "imgurl", "originalurl", "originallandingurl"),
    *("landingurl", "pageurl", "downloadurl", "flickrurl", "cocourl", "link"),
    *("site", "domain", "host", "provider", "dataset", "collection"),
)
AUTHOR_FIELDS = (
    *("author", "artist", "creator", "photographer", "attribution", "credit", "username"),
    *("uploader", "owner", "copyright"),
)
FIELDS = frozenset((*LICENCE_FIELDS, *SOURCE_FIELDS, *AUTHOR_FIELDS))
INNER_FIELDS = ("name", "title", "id", "value", "url")  # of a value that is an object
NOTHING = frozenset(("", "?", "-", "none", "nan", "null", "n/a", "unknown"))
MAX_TEXT = 200  # characters of a name
MAX_VALUES = 8  # of a list in a field
NAMES, AUTHORS = 256, 16  # sources with a licence, and authors of each, that are kept at least
LISTED = 64  # sources in a card
OTHERS, NOT_STATED = "others", "not stated"
CONTROL = re.compile(r"[\x00-\x1f\x7f\s]+")

Group = tuple[str, str]  # source and licence


@dataclass(frozen=True)
class Credit:
    """Source, licence and author that a row names; "" for each that it does not name."""

    source: str = ""
    licence: str = ""
    author: str = ""


def credit_of(meta: Mapping[str, Any]) -> Credit:
    """The credit in the fields of a row; a URL counts as its host."""
    found: dict[str, Any] = {}
    for name in meta:
        if (plain := _plain(str(name))) in FIELDS:
            found.setdefault(plain, meta[name])
    if not found:
        return Credit()

    def first(names: Iterable[str]) -> str:
        return next((text for name in names if (text := text_of(found.get(name)))), "")

    return Credit(
        next((host for name in SOURCE_FIELDS if (host := _site(text_of(found.get(name))))), ""),
        first(LICENCE_FIELDS),
        first(AUTHOR_FIELDS),
    )


def is_credit(field: str) -> bool:
    """Whether a field or column with this name holds a source, a licence or an author."""
    return _plain(field) in FIELDS


def credit_fields(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The fields of a row that name its source, licence or author, as text."""
    named = ((str(name), text_of(row[name])) for name in row if is_credit(str(name)))
    return tuple((name, text) for name, text in named if text)


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def text_of(value: Any, depth: int = 0) -> str:
    """One line of text for the value of a field in any form; "" for none."""
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        value = value.tolist()
    if isinstance(value, (bytes, bytearray)):
        value = "" if b"\0" in value else bytes(value).decode(errors="replace")  # no picture
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else value  # pandas makes 4.0 of 4 beside a NaN
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        text = CONTROL.sub(" ", value[: 4 * MAX_TEXT]).strip()
        return "" if text.lower() in NOTHING else text[:MAX_TEXT]
    if isinstance(value, Mapping) and depth < 3:
        return next((text for n in INNER_FIELDS if (text := text_of(value.get(n), depth + 1))), "")
    if isinstance(value, Sequence) and depth < 3:
        texts = (text_of(one, depth + 1) for one in value[:MAX_VALUES])
        return ", ".join(dict.fromkeys(filter(None, texts)))[:MAX_TEXT]
    return ""


def _site(text: str) -> str:
    """The host of a URL, with the scheme if it is not of the web; other text unchanged."""
    try:
        url = urlsplit(text)
        scheme, host = url.scheme.lower(), url.hostname or ""
    except ValueError:
        return text
    if "://" not in text and not text.startswith("//"):
        return "" if scheme == "data" else text
    return host.removeprefix("www.") if scheme in ("http", "https", "") else f"{scheme}://{host}"


class Credits:
    """Counts of rows by source, licence and author.

    The memory is bounded: of more than 2 x NAMES sources or licences the rarest are added up as
    OTHERS, and the counts of those named are lower bounds. The same rows in the same order give the
    same counts.
    """

    def __init__(self) -> None:
        self.rows = self.without_licence = self.without_source = 0
        self._licences: Counter[str] = Counter()
        self._groups: Counter[Group] = Counter()
        self._authors: dict[Group, Counter[str]] = {}

    def add(self, meta: Mapping[str, Any]) -> None:
        """Count a row by its fields."""
        credit = credit_of(meta)
        self.rows += 1
        self.without_licence += not credit.licence
        self.without_source += not credit.source
        if credit == Credit():
            return
        if credit.licence:
            self._licences[credit.licence] += 1
        group = credit.source or NOT_STATED, credit.licence or NOT_STATED
        self._groups[group] += 1
        if credit.author:
            self._authors.setdefault(group, Counter())[credit.author] += 1
        self._bound(group)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the counts of `as_json`."""
        self.rows += other["rows"]
        self.without_licence += other["without_licence"]
        self.without_source += other["without_source"]
        self._licences.update(other["licences"])
        for source, licence, count, authors in other["groups"]:
            group = source, licence
            self._groups[group] += count
            if authors:
                self._authors.setdefault(group, Counter()).update(authors)
            self._bound(group)

    def as_json(self) -> dict[str, Any]:
        """The counts of at most NAMES sources, for `merge`."""
        self._prune(NAMES)
        return {
            "rows": self.rows,
            "without_licence": self.without_licence,
            "without_source": self.without_source,
            "licences": dict(self._licences),
            "groups": [
                [*group, count, dict(_most_common(self._authors.get(group, Counter()), AUTHORS))]
                for group, count in self._groups.items()
            ],
        }

    def licences(self) -> dict[str, int]:
        """Rows by licence, the most frequent first."""
        return dict(_most_common(_folded(self._licences, LISTED), LISTED + 1))

    def sources(
        self,
        counted: Iterable[Mapping[str, Any]] = (),
        declared: Iterable[Mapping[str, Any]] = (),
    ) -> list[dict[str, Any]]:
        """The "sources" of a card: LISTED at most, and the rest by licence.

        `counted` and `declared`: sources in earlier cards, from rows and from people. If rows name
        one, it keeps its fields and gets their number. If none does, a declared one is kept where
        some row names no source, because that row may be of it.
        """
        self._prune(LISTED)
        groups, listed = dict(self._groups), []
        for source in counted:
            listed += [{**source, "pictures": n} for n in self._taken(groups, source)]
        for source in declared:
            found = [{**source, "pictures": n} for n in self._taken(groups, source)]
            listed += found or ([dict(source)] if self.without_source else [])
        for group, count in _most_common(groups, len(groups)):
            author = self._names(group)
            entry = {"package": group[0], "licence": group[1], "author": author, "pictures": count}
            listed.append({name: value for name, value in entry.items() if value})
        return listed

    @staticmethod
    def _taken(groups: dict[Group, int], source: Mapping[str, Any]) -> list[int]:
        """Take the group of a source in a card out of `groups`: its count, or nothing."""
        package, licence = source.get("package"), source.get("licence") or NOT_STATED
        names = (f"{package}@{source.get('version')}", str(package))
        return [groups.pop((name, licence)) for name in names if (name, licence) in groups][:1]

    def _names(self, group: Group) -> str:
        """Authors of a source, the one with most rows first."""
        authors = self._authors.get(group, Counter())
        names = [name for name, _ in _most_common(authors, len(authors)) if name != OTHERS]
        more = len(names) > AUTHORS or OTHERS in authors
        return ", ".join(names[:AUTHORS]) + (" and others" if names and more else "")

    def _bound(self, group: Group) -> None:
        if len(self._authors.get(group, ())) > 4 * AUTHORS:
            self._authors[group] = _folded(self._authors[group], 2 * AUTHORS)
        if max(len(self._groups), len(self._licences)) > 2 * NAMES:
            self._prune(NAMES)

    def _prune(self, most: int) -> None:
        """Add up all but the `most` frequent licences, and sources of each licence, as OTHERS."""
        self._licences = _folded(self._licences, most)
        groups: Counter[Group] = Counter()
        kept = {group for group, _ in _most_common(self._groups, most) if group[0] != OTHERS}
        for group, count in self._groups.items():
            if group not in kept:
                known = group[1] in self._licences or group[1] == NOT_STATED
                group = OTHERS, group[1] if known else OTHERS
            groups[group] += count
        self._groups = groups
        self._authors = {group: self._authors[group] for group in kept if group in self._authors}


def _most_common(counts: Mapping[Any, int], most: int) -> list[tuple[Any, int]]:
    """The largest counts of names or groups, equal ones by name; OTHERS last."""

    def order(item: tuple[Any, int]) -> tuple[bool, int, Any]:
        name, count = item
        return (name if isinstance(name, str) else name[0]) == OTHERS, -count, name

    return sorted(counts.items(), key=order)[:most]


def _folded(counts: Counter[str], most: int) -> Counter[str]:
    """The `most` largest counts, and the sum of the rest as OTHERS."""
    kept = Counter(dict(_most_common(counts, most)))
    rest = sum(counts.values()) - sum(kept.values())
    return kept + Counter({OTHERS: rest}) if rest else kept
