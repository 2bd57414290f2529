"""Card of a corpus: sources and licences of its pictures, and the pictures left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..storage import MissingError, put, read
from .styles import Style

CARD = "card.json"
EXAMPLES = 20  # left-out pictures named per reason


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


def write_card(folder: str | Path, card: Mapping[str, Any]) -> None:
    """Write the card of a folder or s3:// prefix of shards."""
    put(
        json.dumps(card, indent=1, ensure_ascii=False).encode(), f"{str(folder).rstrip('/')}/{CARD}"
    )


def read_card(folder: str | Path) -> dict[str, Any] | None:
    """The card of a folder or s3:// prefix of shards, or None if it has none.

    {"about", "split", "styles", "sources": [{"package", "version", "style", "author", "url",
    "licence", "pictures"}], "rows", "left_out": {reason: {"count", "examples"}}}. The card of
    scenes also has their "seed", the number requested ("scenes") and the number of each kind
    ("kinds"); its "pictures" counts the pictures that scenes may show.
    """
    try:
        card = json.loads(read(f"{str(folder).rstrip('/')}/{CARD}"))
    except (MissingError, ValueError):
        return None
    return card if isinstance(card, dict) else None
