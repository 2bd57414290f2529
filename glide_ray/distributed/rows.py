"""Selected rows of a corpus: read them, and write them as a new corpus with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import ray

from .. import storage
from ..data.card import read_card, write_card
from ..data.shards import Sample
from ..data.sources import Part, read_part
from ..errors import ConfigError, UserError

# files beside the shards of a corpus that was written from another one
DROPPED, SUMMARY, PAGE = "dropped.parquet", "summary.json", "report.html"


RECORD = "filter.json"  # record of the filter job that wrote the corpus, see jobs/filter.py


# edits the captions of one row
Captions = Callable[[Sequence[str]], tuple[str, ...]]


def refuse_source(source: str, parts: Sequence[Part], out: str) -> None:
    """Raise ConfigError if `out` is the corpus that is read, or the folder of one of its shards."""
    folders = {source, *(part.url.rpartition("#" if part.files else "/")[0] for part in parts)}
    if any(storage.same_place(folder, out) for folder in folders):
        raise ConfigError(f"--out {out} is the corpus to read; write to another folder.")


def carry_card(parts: Sequence[Part], out: str, rows: int) -> None:
    """Write the data card of the folders of `parts` to `out`, with the sources of all of them.

    Dropping rows does not change who must be credited.
    """
    folders = dict.fromkeys(part.url.rpartition("/")[0] for part in parts if not part.files)
    cards = [card for folder in folders if (card := read_card(folder))]
    if cards:
        sources = [source for card in cards for source in card.get("sources", ())]
        unique = [source for n, source in enumerate(sources) if source not in sources[:n]]
        write_card(out, {**cards[0], "sources": unique, "rows": rows})


def read_rows(
    parts: Sequence[Part], rows: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Sample]:
    """Samples by (part, position), without those that cannot be read."""

    @ray.remote
    def pick(part: Part, positions: list[int]) -> list[tuple[int, Sample]]:
        return list(_chosen(part, positions))

    by_part: dict[int, list[int]] = {}
    for part, position in rows:
        by_part.setdefault(int(part), []).append(int(position))
    found = ray.get([pick.remote(parts[part], positions) for part, positions in by_part.items()])
    return {
        (part, position): sample
        for part, samples in zip(by_part, found, strict=True)
        for position, sample in samples
    }


def _chosen(part: Part, positions: Sequence[int]) -> Iterator[tuple[int, Sample]]:
    wanted, last = set(positions), max(positions)
    try:
        for position, sample in enumerate(read_part(part)):
            if position in wanted:
                yield position, sample
            if position == last:
                return
    except UserError:  # callers count the missing rows
        return
