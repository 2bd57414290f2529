"""Selected rows of a corpus: read them, and write them as a new corpus with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from .. import storage
from ..data.card import derived_card, read_card, write_card
from ..data.credits import Credits
from ..data.patterns import is_pattern
from ..data.sample import SHARD_SUFFIXES
from ..data.shards import DROPPED as DROPPED
from ..data.shards import Sample
from ..data.sources import Part, read_part
from ..errors import ConfigError, UserError

# files beside the shards of a corpus that was written from another one
SUMMARY, PAGE = "summary.json", "report.html"

# images; up to this many are embedded in this process, since starting actors takes some 10 s
INLINE_IMAGES = 128

RECORD = "filter.json"  # record of the filter job that wrote the corpus, see jobs/filter.py


# edits the captions of one row
Captions = Callable[[Sequence[str]], tuple[str, ...]]


def refuse_source(source: str, parts: Sequence[Part], out: str) -> None:
    """Raise ConfigError if `out` is the corpus that is read, or the folder of one of its shards.

    Also if it is inside a folder that is read with all folders in it: the rows would be there
    twice, and the run could not be resumed, since the corpus would have an unfinished folder.
    """
    folders = {source, *(part.url.rpartition("#" if part.files else "/")[0] for part in parts)}
    if any(storage.same_place(folder, out) for folder in folders):
        raise ConfigError(f"--out {out} is the corpus to read; write to another folder.")
    roots = [] if is_pattern(source) or source.endswith(SHARD_SUFFIXES) else [source]
    if any(_is_inside(out, root) for root in roots):
        raise ConfigError(f"--out {out} is inside the corpus to read; write to another folder.")


def _is_inside(path: str, folder: str) -> bool:
    if storage.is_remote(path) or storage.is_remote(folder):
        return path.startswith(f"{folder.rstrip('/')}/")
    return Path(folder).resolve() in Path(path).resolve().parents


def carry_card(parts: Sequence[Part], out: str, credits: Credits, about: str) -> dict[str, Any]:
    """Write the data card of rows of `parts` to `out`, with the counts of the rows. Returns it.

    The cards of the folders of `parts` describe the sources; `about`: the rows, without such cards.
    """
    folders = dict.fromkeys(part.url.rpartition("#" if part.files else "/")[0] for part in parts)
    cards = [card for folder in folders if (card := read_card(folder.rstrip("/")))]
    card = derived_card(cards, credits, about)
    write_card(out, card)
    return card


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
