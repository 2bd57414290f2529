"""Exponential moving averages of the weights, over each rank's own float32 partition: no rank holds a full copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """`masters` are the float32 tensors that the optimizer steps; an average of each rate lies beside them."""

    def __init__(self, masters: Sequence[Tensor], rates: Sequence[float]):
        self.masters = [tensor.detach() for tensor in masters]
        self.averages = {rate: [tensor.clone() for tensor in self.masters] for rate in rates}

    def restart(self) -> None:
        """Begin from what the masters hold now."""
        for average in self.averages.values():
            torch._foreach_copy_(average, self.masters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1. Each rate rises to its value, so that early weights fade."""
        for rate, average in self.averages.items():
            torch._foreach_lerp_(average, self.masters, 1 - min(rate, (1 + step) / (10 + step)))

    @contextmanager
    def in_place(self, rate: float) -> Iterator[None]:
        """Within, the optimizer's tensors hold the average; afterwards the weights again, exactly."""
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
