"""The corpus as a Ray Dataset of rows, as `data/transforms.py` has them.

Bytes move through Ray's object store, pixels do not: images are decoded in the worker that trains on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import ray
import ray.data

from ..config import UserError
from ..data.filters import Candidate, Report, first_broken, header_rules
from ..data.sources import Part, columns, find_parts, read_part, row_id

ROWS_PER_BLOCK, ROWS_PER_TASK = 64, 4096
PREFETCH = 8           # batches of bytes that lie ready beside each worker


def open_corpus(path: str, min_size: int, tally=None, ledger=None) -> ray.data.Dataset:
    """Stream a corpus, dropping rows that break a rule. Raises ShardError for an empty one.

    `tally`, a `Tally` actor, is told of each drop. `ledger`, a `Ledger` actor, says in which order the parts are read, and which rows
    have been trained on; without it they are read in their own order.
    """
    parts = find_parts(path)
    shared, tasks = ray.put(parts), tasks_for(parts)

    def read(batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        for task in batch["item"]:
            numbers, seen = ray.get(ledger.assign.remote(int(task), tasks)) if ledger is not None else (range(int(task), len(parts), tasks), None)
            for number in numbers:
                yield from _kept_blocks(ray.get(shared)[number], min_size, tally, NOTHING if seen is None else ray.get(seen))

    return quiet().from_items(list(range(tasks)), override_num_blocks=tasks).map_batches(read, batch_size=1)


def tasks_for(parts: Sequence[Part]) -> int:
    """In how many tasks a corpus is read: one a part, but for parts that are known to be small, several of which share a task's cost."""
    counts = [part.count or ROWS_PER_TASK for part in parts]
    return max(1, min(len(parts), sum(counts) // ROWS_PER_TASK))


NOTHING = np.empty(0, np.int64)


def quiet():
    """`ray.data` without its progress bars."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data


def _kept_blocks(part: Part, min_size: int, tally, seen: np.ndarray) -> Iterator[dict[str, list]]:
    """The rows of a part that break no rule and are not among `seen`, sorted ids."""
    if part.count and _among(np.array([row_id(part.url, n) for n in range(part.count)]), seen).all():
        return                  # a part that has been trained on whole need not be read again
    report, block, rules = Report(), [], header_rules(min_size)
    try:
        for position, sample in enumerate(read_part(part)):
            number = row_id(part.url, position)
            if len(seen) and _among(np.array([number]), seen)[0]:
                continue
            reason = first_broken(Candidate(sample), rules)
            report.add(sample.key, reason)
            if reason is None:
                block.append((number, sample))
            if len(block) == ROWS_PER_BLOCK:
                yield columns(block)
                block = []
    except UserError as error:
        report.faults.append(str(error))
    if block:
        yield columns(block)
    if tally is not None:
        ray.get(tally.add.remote(report))


def _among(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether each id is one of `known`, which is sorted."""
    if not len(known):
        return np.zeros(len(ids), bool)
    return known[np.searchsorted(known, ids).clip(max=len(known) - 1)] == ids


@ray.remote(num_cpus=0)
class Tally:
    """Counts what the filter stage kept and dropped, wherever its tasks run."""

    def __init__(self):
        self._report = Report()

    def add(self, report: Report) -> None:
        self._report.merge(report)

    def report(self) -> Report:
        return self._report


@ray.remote(num_cpus=0)
class Ledger:
    """The plan of the epoch that is being read: the order of its parts, and the rows of it that were trained on before.

    Rank 0 begins each epoch here before it asks for its first row; the stream starts when every rank has asked.
    """

    def __init__(self, parts: int, seed: int):
        self._parts, self._seed = parts, seed
        self.begin(0, NOTHING)

    def begin(self, epoch: int, seen: np.ndarray) -> None:
        self._order = np.random.default_rng([self._seed, epoch]).permutation(self._parts)
        self._seen = ray.put(np.sort(seen))

    def assign(self, task: int, tasks: int) -> tuple[list[int], ray.ObjectRef]:
        """The parts that one of so many tasks reads, and the ids of rows that are not to be given again."""
        return self._order[task::tasks].tolist(), self._seen
