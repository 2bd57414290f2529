"""EMA of the weights, sharded: each rank averages its own float32 partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """One EMA per rate, of the float32 tensors `masters` that the optimizer steps."""

    def __init__(self, masters: Sequence[Tensor], rates: Sequence[float]):
        self.masters = [tensor.detach() for tensor in masters]
        self.averages = {rate: [tensor.clone() for tensor in self.masters] for rate in rates}

    def restart(self) -> None:
        """Set all averages to the current weights."""
        for average in self.averages.values():
            torch._foreach_copy_(average, self.masters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step `step`, counted from 1.

        The rate warms up as min(rate, (1 + step) / (10 + step)), so that early weights fade.
        """
        for rate, average in self.averages.items():
            torch._foreach_lerp_(average, self.masters, 1 - min(rate, (1 + step) / (10 + step)))

    @contextmanager
    def in_place(self, rate: float) -> Iterator[None]:
        """Context in which `masters` hold the average; restores the exact weights on exit."""
        self._exchange(rate)
        try:
            yield
        finally:
            self._exchange(rate)

    @torch.no_grad()
    def _exchange(self, rate: float) -> None:
        for master, average in zip(self.masters, self.averages[rate], strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
