"""An epoch of the corpus as global batches for any number of workers.

The rows of batch n and their order depend only on the corpus, the seed, the epoch and n: not on
the number of workers, their speed, or any failures and restarts. A resumed run passes the number of
rows of the epoch that it has trained on; tasks whose rows have all been used are not read again.

Shuffling has two levels: the order of parts in each epoch, and the rows of a reading task within a
window. Image bytes go directly from the reading task to the workers; the feeder handles references
only.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow
import ray

from ...data.sources import Part
from ...train.batch_split import BatchSplit
from ..actors import Actor
from ..stream import Plan, open_parts

# Global batches that each worker has requested and not yet trained on: at most this number, and
# only one if a batch has more bytes.
PREFETCHED_BATCHES, PREFETCHED_BYTES = 8, 2**30


class Segment(NamedTuple):
    """Rows of a block; `row_bytes` is their mean size."""

    block: ray.ObjectRef
    start: int
    stop: int
    row_bytes: int


class Share(NamedTuple):
    """The segments of a batch that hold one rank's rows.

    `first`: place in the batch of the first segment's first row. `batch_bytes`: size of the whole
    batch.
    """

    segments: list[Segment]
    first: int
    batch_bytes: int


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

    def take(
        self, epoch: Epoch, first: int, count: int, rows: tuple[int, int], workers: int
    ) -> list[Share]:
        """`count` batches from number `first`, counted from `epoch.rows`; fewer at the end.

        Only the segments with some of `rows` (start, stop) of each batch: references are what a
        call costs. A batch is released when each of the workers has taken it.
        """
        if epoch != self._epoch:
            earlier = self._epoch
            if earlier and epoch.group == earlier.group and epoch.number < earlier.number:
                return []  # asked beyond the end of an epoch, and late
            self._begin(epoch)
        while self._next < first + count and not self._ended:
            self._assemble()
        last = min(first + count, self._next)
        shares = [share_of(self._batches[number], *rows) for number in range(first, last)]
        for number in range(first, last):
            self._taken[number] += 1
            if self._taken[number] == workers:
                del self._taken[number], self._batches[number]
        return shares

    def _begin(self, epoch: Epoch) -> None:
        counts = ray.get(self._tally.counts.remote(epoch.number))
        first, before = 0, 0
        # Skip tasks whose rows have all been trained on.
        while first in counts and before + counts[first] <= epoch.rows:
            before += counts[first]
            first += 1
        self._epoch, self._skip = epoch, epoch.rows - before
        plan = Plan(self._seed, epoch.number, self._window, first, self._shares)
        self._blocks = iter(self._segments(plan))
        self._left: deque[Segment] = deque()
        self._batches: dict[int, list[Segment]] = {}
        self._taken: Counter[int] = Counter()  # batch -> workers that have taken it
        self._next, self._ended = 0, False

    def _segments(self, plan: Plan) -> Iterator[Segment]:
        """All rows of each block of the epoch."""
        for bundle in open_parts(
            self._parts, self._min_size, self._tally, plan
        ).iter_internal_ref_bundles():
            for entry in bundle.blocks:
                rows = entry.metadata.num_rows
                size = entry.metadata.size_bytes or 0
                yield Segment(entry.ref, 0, rows, size // max(1, rows))

    def _assemble(self) -> None:
        """Assemble the next batch from the rest of the last block and from new blocks."""
        batch, missing = [], self._batch
        while missing:
            if not self._left:
                block = next(self._blocks, None)
                if block is None:
                    self._ended = True
                    return
                skipped = min(self._skip, block.stop)
                self._skip -= skipped
                if skipped < block.stop:
                    self._left.append(block._replace(start=skipped))
                continue
            rest = self._left.popleft()
            end = rest.start + min(missing, rest.stop - rest.start)
            batch.append(rest._replace(stop=end))
            missing -= end - rest.start
            if end < rest.stop:
                self._left.appendleft(rest._replace(start=end))
        self._batches[self._next] = batch
        self._next += 1


def share_of(batch: Sequence[Segment], start: int, stop: int) -> Share:
    """The segments of a batch that overlap its rows `start` to `stop`."""
    chosen: list[Segment] = []
    first = position = size = 0
    for segment in batch:
        end = position + segment.stop - segment.start
        if position < stop and end > start:
            first = first if chosen else position
            chosen.append(segment)
        size += (end - position) * segment.row_bytes
        position = end
    return Share(chosen, first, size)


def micro_batches(feeder, epoch: Epoch, split: BatchSplit) -> Iterator[dict[str, list]]:
    """A rank's rows of each global batch, as micro-batches of the columns that `Collate` reads.

    All ranks get the same number of micro-batches. Batches are requested several at a time: with
    hundreds of ranks, the feeder's time goes to the number of calls.
    """
    ranges = [(start, stop) for start, stop, _ in split.row_ranges()]
    rows = min(start for start, _ in ranges), max(stop for _, stop in ranges)
    asked, used = 1, 0  # batches requested, and batches up to the current one
    calls = deque([(1, feeder.take.remote(epoch, 0, 1, rows, split.world))])
    while calls:
        count, call = calls.popleft()
        shares = ray.get(call)
        for share in shares:
            used += 1
            limit = prefetched(share.batch_bytes)
            several = max(1, limit // 2)
            while asked - used + several <= limit:
                more = feeder.take.remote(epoch, asked, several, rows, split.world)
                calls.append((several, more))
                asked += several
            for start, stop in ranges:
                yield _rows(share, start, stop)
        if len(shares) < count:
            return


def prefetched(batch_bytes: int) -> int:
    """Number of batches of this size that a worker requests in advance."""
    return max(1, min(PREFETCHED_BATCHES, PREFETCHED_BYTES // max(1, batch_bytes)))


def _rows(share: Share, start: int, stop: int) -> dict[str, list]:
    """Rows `start` to `stop` of a batch; only the blocks that contain them are fetched."""
    pieces, position = [], share.first
    for block, low, high, _ in share.segments:
        first, last = max(start - position, 0), min(stop - position, high - low)
        if first < last:
            pieces.append((block, low + first, last - first))
        position += high - low
    blocks = ray.get([block for block, _, _ in pieces])
    return pyarrow.concat_tables(
        [block.slice(first, count) for block, (_, first, count) in zip(blocks, pieces, strict=True)]
    ).to_pydict()
