"""Split of a global batch over ranks and micro-batches, for any number of ranks and any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """The share of `rank` (of `world` ranks) in `batch` rows, in calls of at most `micro_batch`.

    Every rank makes the same number of network calls, because each call is a collective. If the
    rows do not divide evenly, call sizes differ by one row and the weights of the calls correct
    for it: the gradient is that of the mean over the whole batch.
    """

    batch: int
    world: int
    rank: int
    micro_batch: int

    @property
    def calls(self) -> int:
        """Network calls per step, the same on every rank."""
        return accumulation(self.batch, self.world, self.micro_batch)

    def row_ranges(self) -> Iterator[tuple[int, int, float]]:
        """Yield (first row, end, weight) of each network call.

        `weight` multiplies the call's mean loss in the mean over all `calls * world` calls of the
        step; it is 1 if all calls have the same size. A call without rows of its own computes a
        neighbouring row with weight 0.
        """
        start, stop = (
            self.rank * self.batch // self.world,
            (self.rank + 1) * self.batch // self.world,
        )
        for call in range(self.calls):
            first, end = (start + n * (stop - start) // self.calls for n in (call, call + 1))
            weight = (end - first) * self.world * self.calls / self.batch
            yield (first, end, weight) if first < end else (*_neighbour(first), 0.0)


def _neighbour(row: int) -> tuple[int, int]:
    return max(0, row - 1), max(1, row)


def accumulation(batch: int, world: int, micro_batch: int) -> int:
    """Network calls per rank and step: gradient accumulation steps."""
    largest_share = math.ceil(batch / world)
    return math.ceil(largest_share / micro_batch)
