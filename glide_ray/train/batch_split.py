"""Which rows of a global batch a rank computes, and in which micro-batches: any number of ranks share any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """`rank` of `world`'s part of `batch` rows, in network calls of at most `micro_batch`.

    Every rank makes equally many calls, for each is a collective. Where the rows do not divide evenly a rank's shares differ by one, and
    the weights of the calls make up for it: the gradient is that of the mean over the whole batch.
    """

    batch: int
    world: int
    rank: int
    micro_batch: int

    @property
    def calls(self) -> int:
        """Network calls in a step, on every rank."""
        return accumulation(self.batch, self.world, self.micro_batch)

    def parts(self) -> Iterator[tuple[int, int, float]]:
        """(first row, end, weight) of each call: what its mean loss counts among the `calls * world` calls of the step, 1 where all are equal.

        A call without rows of its own computes a neighbour's with weight 0.
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
    """Network calls that a rank's share of a batch takes."""
    largest_share = math.ceil(batch / world)
    return math.ceil(largest_share / micro_batch)
