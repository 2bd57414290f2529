"""An epoch of the corpus as global batches for any number of workers.

The rows of batch n and their order depend only on the corpus, the seed, the epoch and n: not on
the number of workers, their speed, or any failures and restarts. A resumed run passes the number of
rows of the epoch that it has trained on; tasks whose rows have all been used are not read again.

Shuffling has two levels: the order of parts in each epoch, and the rows of a reading task within a
window. Image bytes go directly from the reading task to the workers; the feeder handles references
only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow
import ray

from ...data.sources import Part
from ...train.batch_split import BatchSplit
from ..actors import Actor
from ..stream import Plan, open_parts

PREFETCHED_BATCHES = 8  # global batches that each worker has requested and not yet trained on
KEPT_BATCHES = 4 * PREFETCHED_BATCHES  # latest global batches, kept for slower workers
Segment = tuple[ray.ObjectRef, int, int]  # (block, start row, stop row)


@dataclass(frozen=True)
class Epoch:
    """An epoch as one start of the workers reads it."""

    group: str  # identifies the start of the workers
    number: int
    rows: int  # rows already trained on, to be skipped


@ray.remote(num_cpus=0)
class Feeder(Actor):
    """Hand out global batches of `batch` rows. The first request for an epoch starts reading it."""

    def __init__(
        self,
        parts: Sequence[Part],
        min_size: int,
        batch: int,
        window: int,
        seed: int,
        tally,
        shares: Mapping[str, float] | None = None,
    ):
        self._parts, self._min_size, self._batch, self._window, self._seed, self._tally = (
            parts,
            min_size,
            batch,
            window,
            seed,
            tally,
        )
        self._shares = dict(shares or {})
        self._epoch: Epoch | None = None

    def take(self, epoch: Epoch, number: int) -> list[Segment] | None:
        """Batch `number`, counted from `epoch.rows`; None if the epoch has no whole batch left."""
        if epoch != self._epoch:
            self._begin(epoch)
        while self._next <= number and not self._ended:
            self._assemble()
        return self._batches.get(number)

    def _begin(self, epoch: Epoch) -> None:
        counts = ray.get(self._tally.counts.remote(epoch.number))
        first, before = 0, 0
        # Skip tasks whose rows have all been trained on.
        while first in counts and before + counts[first] <= epoch.rows:
            before += counts[first]
            first += 1
        self._epoch, self._skip = epoch, epoch.rows - before
        plan = Plan(self._seed, epoch.number, self._window, first, self._shares)
        self._blocks = iter(self._references(plan))
        self._left: deque[Segment] = deque()
        self._batches: dict[int, list[Segment]] = {}
        self._next, self._ended = 0, False

    def _references(self, plan: Plan) -> Iterator[tuple[ray.ObjectRef, int]]:
        for bundle in open_parts(
            self._parts, self._min_size, self._tally, plan
        ).iter_internal_ref_bundles():
            yield from ((entry.ref, entry.metadata.num_rows) for entry in bundle.blocks)

    def _assemble(self) -> None:
        """Assemble the next batch from the rest of the last block and from new blocks."""
        batch, missing = [], self._batch
        while missing:
            if not self._left:
                block, rows = next(self._blocks, (None, 0))
                if block is None:
                    self._ended = True
                    return
                skipped = min(self._skip, rows)
                self._skip -= skipped
                if skipped < rows:
                    self._left.append((block, skipped, rows))
                continue
            block, start, stop = self._left.popleft()
            count = min(missing, stop - start)
            batch.append((block, start, start + count))
            missing -= count
            if start + count < stop:
                self._left.appendleft((block, start + count, stop))
        self._batches[self._next] = batch
        self._batches.pop(self._next - KEPT_BATCHES, None)
        self._next += 1


def micro_batches(feeder, epoch: Epoch, split: BatchSplit) -> Iterator[dict[str, list]]:
    """A rank's rows of each global batch, as micro-batches of the columns that `Collate` reads.

    All ranks get the same number of micro-batches.
    """
    in_flight = deque(feeder.take.remote(epoch, number) for number in range(PREFETCHED_BATCHES))
    number = PREFETCHED_BATCHES
    while (segments := ray.get(in_flight.popleft())) is not None:
        in_flight.append(feeder.take.remote(epoch, number))
        number += 1
        for start, stop, _ in split.row_ranges():
            yield _rows(segments, start, stop)


def _rows(segments: Sequence[Segment], start: int, stop: int) -> dict[str, list]:
    """Rows `start` to `stop` of a batch; only the blocks that contain them are fetched."""
    pieces, position = [], 0
    for block, low, high in segments:
        first, last = max(start - position, 0), min(stop - position, high - low)
        if first < last:
            pieces.append((block, low + first, last - first))
        position += high - low
    blocks = ray.get([block for block, _, _ in pieces])
    return pyarrow.concat_tables(
        [block.slice(first, count) for block, (_, first, count) in zip(blocks, pieces, strict=True)]
    ).to_pydict()
