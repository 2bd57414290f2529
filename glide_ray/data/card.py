"""Card of a corpus: sources and licences of its pictures, and the pictures left out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage import MissingError, put, read
from .credits import Credits
from .styles import Style

log = logging.getLogger(__name__)

CARD = "card.json"
EXAMPLES = 20  # left-out pictures named per reason
SHOWN_LICENCES = 5  # in a line of text


class LeftOut:
    """Counts and first examples of the pictures left out of a corpus, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, what: str) -> None:
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(what)

    def copy(self) -> LeftOut:
        """An independent copy."""
        other = LeftOut()
        other._counts = self._counts.copy()
        other._examples = {reason: list(of) for reason, of in self._examples.items()}
        return other

    def __getitem__(self, reason: str) -> tuple[int, list[str]]:
        return self._counts[reason], self._examples.get(reason, [])

    def as_json(self) -> dict[str, Any]:
        return {
            reason: {"count": count, "examples": self._examples[reason]}
            for reason, count in self._counts.most_common()
        }


def sources(
    styles: Iterable[Style], versions: Mapping[str, str], pictures: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The "sources" of a card, one entry per style.

    `versions` maps packages to versions, `pictures` maps styles to numbers of pictures.
    """
    return [
        {
            "package": style.package,
            "version": versions[style.package],
            "style": style.words,
            "author": style.author,
            "url": style.url,
            "licence": style.licence,
            "pictures": pictures.get(style.words, 0),
        }
        for style in styles
    ]


def counts_of(credits: Credits) -> dict[str, Any]:
    """The fields of a card that count its rows by licence."""
    return {
        "rows": credits.rows,
        "licences": credits.licences(),
        "without_licence": credits.without_licence,
        "without_source": credits.without_source,
    }


def derived_card(
    cards: Sequence[Mapping[str, Any]], credits: Credits, about: str
) -> dict[str, Any]:
    """The card of rows that were chosen from corpora with `cards`, with the counts of the rows.

    Sources that a card has from its rows are counted again; those written there by other means are
    kept. `about`: description, where no card has one.
    """
    counted: list[dict[str, Any]] = []
    declared: list[dict[str, Any]] = []
    for card in cards:
        for source in _listed(card):
            bare = {name: source[name] for name in source if name != "pictures"}
            by_row = "licences" in card and "pictures" in source
            if bare not in (*counted, *declared):
                (counted if by_row else declared).append(bare)
    fields = {"about": about, **(cards[0] if cards else {})}
    return {**fields, "sources": credits.sources(counted, declared), **counts_of(credits)}


def licences_line(card: Mapping[str, Any]) -> str:
    """One line on the licences of the rows: the most frequent ones with their counts."""
    counts, without = card["licences"], card["without_licence"]
    shown = [f"{licence} {rows:,}" for licence, rows in list(counts.items())[:SHOWN_LICENCES]]
    more = len(counts) - len(shown)
    named = ", ".join(shown) + (f" and {more} others" if more else "")
    if not counts:
        return "licences: no row names one"
    return f"licences: {named}" + (f"; {without:,} rows name none" if without else "")


def _listed(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources that a card lists; [] for the card.json of another program."""
    listed = card.get("sources")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def write_card(folder: str | Path, card: Mapping[str, Any]) -> None:
    """Write the card of a folder or s3:// prefix of shards."""
    put(
        json.dumps(card, indent=1, ensure_ascii=False).encode(), f"{str(folder).rstrip('/')}/{CARD}"
    )


def read_card(folder: str | Path) -> dict[str, Any] | None:
    """The card of a folder or s3:// prefix of shards, or None if it has none.

    {"about", "split", "styles", "sources": [{"package", "version", "style", "author", "url",
    "licence", "pictures"}], "rows", "licences": {licence: rows}, "without_licence",
    "without_source", "left_out": {reason: {"count", "examples"}}}. Not every card has all fields.
    The card of scenes also has their "seed", the number requested ("scenes") and the number of each
    kind ("kinds"); its "pictures" counts the pictures that scenes may show. A card that is damaged
    is logged and counts as none.
    """
    path = f"{str(folder).rstrip('/')}/{CARD}"
    try:
        card = json.loads(read(path))
    except MissingError:
        return None
    except ValueError:
        log.warning(f"{path} cannot be read: the sources and licences in it are not named; mend it")
        return None
    return card if isinstance(card, dict) else None
