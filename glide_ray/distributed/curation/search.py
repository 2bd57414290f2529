"""What the searches for near-duplicates and for semantic duplicates share.

A search is made of tasks that read and write files in its folder, and ends with a file of dropped
rows for each group of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import ray

from ... import storage
from .judge import judged_file
from .tables import load, save
from .tasks import run_each

# parts, their numbers of dropped rows, and (part, key) of the first dropped row
CopiesOfGroup = tuple[list[int], list[int], tuple[int, str] | None]


@dataclass(frozen=True)
class Search:
    """Folders and numbers of the search; every task receives it."""

    reason: str  # of the rows that it drops
    judged: str  # folder of the judged files
    folder: str  # folder of the search's own files
    starts: np.ndarray  # first part of each group, and the number of parts
    buckets: int
    set_rows: int = 0

    def path(self, kind: str, number: int = 0) -> str:
        return f"{self.folder}/{kind}/{number:06d}.parquet"

    def paths(self, kind: str, count: int) -> list[str]:
        return [self.path(kind, number) for number in range(count)]

    @property
    def groups(self) -> int:
        return len(self.starts) - 1

    def parts(self, group: int) -> range:
        return range(int(self.starts[group]), int(self.starts[group + 1]))

    def group_of(self, part: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, part, side="right") - 1


def group_starts(kept: np.ndarray, group_rows: int) -> np.ndarray:
    """First parts of groups of at most `group_rows` rows, or of one part, and the number of all."""
    starts, rows = [0], 0
    for part, count in enumerate(kept.data):
        if rows and rows + count > group_rows:
            starts.append(part)
            rows = 0
        rows += count
    return np.array([*starts, len(kept)])


def run_once(
    search: Search, kind: str, work: Callable[..., Any], numbers: Sequence[int], *more: Any
) -> list[tuple[int, Any]]:
    """(number, result) of a task for each number, in order of the numbers.

    A task that an earlier run has finished is not repeated.
    """
    shared = ray.put(search)
    arguments = ((kind, work, shared, number, *more) for number in numbers)
    return sorted(run_each(_once, arguments), key=lambda pair: pair[0])


def _once(
    kind: str, work: Callable[..., Any], search: Search, number: int, *more: Any
) -> tuple[int, Any]:
    """Do the work unless an earlier run has done it; its result is kept beside its file."""
    done = f"{search.folder}/done/{kind}-{number:06d}.json"
    try:
        return number, json.loads(storage.read(done))
    except storage.MissingError:
        result = work(search, number, *more)
        storage.put(json.dumps(result).encode(), done)
        return number, result


def gather_copies(search: Search, group: int, tables: Sequence[pyarrow.Table]) -> CopiesOfGroup:
    """Write the dropped rows of a group of parts."""
    rows = pyarrow.concat_tables(tables).sort_by([("part", "ascending"), ("position", "ascending")])
    save(rows, search.path("copies", group))
    parts, counts = np.unique(rows["part"].to_numpy(), return_counts=True)
    if not len(rows):
        return [], [], None
    part, position = rows["part"][0].as_py(), rows["position"][0].as_py()
    key = load(judged_file(search.judged, part), ["key"])["key"][position].as_py()
    return parts.tolist(), counts.tolist(), (part, key)


def dropped_copies(search: Search, part: int) -> pyarrow.Table:
    """The dropped rows of a part: part, position, and kept_part, kept_position, kept_key.

    The last three tell the row that stays instead.
    """
    copies = load(search.path("copies", int(search.group_of(np.array(part)))))
    return copies.slice(*span(copies["part"].to_numpy(), part))


def span(sorted_values: np.ndarray, value: int) -> tuple[int, int]:
    """Offset and length of the run of a value."""
    start, stop = np.searchsorted(sorted_values, [value, value + 1]).tolist()
    return start, stop - start
