"""EMA of the weights, sharded: each rank averages its own float32 partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

LENGTH = "length-"  # before the length, in the name of a power-function average


class Ema:
    """Averages of the float32 tensors `masters` that the optimizer steps.

    `averages`: by the name that they have in checkpoints. "0.999" is an EMA of this rate,
    "length-0.1" a power-function average of this relative length (`ema_length.py`).
    """

    def __init__(
        self, masters: Sequence[Tensor], rates: Sequence[float], lengths: Sequence[float] = ()
    ):
        self.masters = [tensor.detach() for tensor in masters]
        self._kept: dict[str, Callable[[int], float]] = {
            **{f"{rate:g}": _warm_rate(rate) for rate in rates},
            **{f"{LENGTH}{length:g}": _power_rate(length) for length in lengths},
        }
        self.averages = {name: [tensor.clone() for tensor in self.masters] for name in self._kept}

    def restart(self) -> None:
        """Set all averages to the current weights."""
        for average in self.averages.values():
            torch._foreach_copy_(average, self.masters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimizer step `step`, counted from 1."""
        for name, average in self.averages.items():
            torch._foreach_lerp_(average, self.masters, 1 - self._kept[name](step))

    @contextmanager
    def in_place(self, rate: float) -> Iterator[None]:
        """Context in which `masters` hold the EMA of `rate`; restores the exact weights on exit."""
        self._exchange(rate)
        try:
            yield
        finally:
            self._exchange(rate)

    @torch.no_grad()
    def _exchange(self, rate: float) -> None:
        for master, average in zip(self.masters, self.averages[f"{rate:g}"], strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)


def exponent(length: float) -> float:
    """The exponent g of the profile of this length: (g + 1) / ((g + 2)^2 (g + 3)) = length^2."""
    square = length**-2
    # The equation in x = g + 1: x^3 + 4 x^2 + (5 - square) x + 2 = 0; its largest root.
    return float(np.roots([1, 4, 5 - square, 2]).real.max()) - 1


def _warm_rate(rate: float) -> Callable[[int], float]:
    """Share of the old average at a step: warms up, so that early weights fade."""
    return lambda step: min(rate, (1 + step) / (10 + step))


def _power_rate(length: float) -> Callable[[int], float]:
    """Share of the old average at a step (EDM2, eq. 123)."""
    power = exponent(length) + 1
    return lambda step: (1 - 1 / step) ** power
