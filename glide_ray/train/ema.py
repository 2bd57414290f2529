"""Exponential moving average of the weights, over each rank's own float32 partition: no rank holds a full copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import UserError


class EmaError(UserError):
    """A saved average that does not belong to this run."""


class Ema:
    """`masters` are the float32 tensors that the optimizer steps; the average lies beside them."""

    def __init__(self, masters: Sequence[Tensor], rate: float):
        self.masters = [tensor.detach() for tensor in masters]
        self.rate = rate
        self.average = [tensor.clone() for tensor in self.masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1. The rate rises to its value, so that early weights fade."""
        rate = min(self.rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.masters, 1 - rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the optimizer's tensors hold the average; afterwards the weights again, exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, path: str | Path) -> None:
        save_file({f"{n}": tensor.cpu() for n, tensor in enumerate(self.average)}, path)

    def load(self, path: str | Path) -> None:
        """Raises EmaError where the partition is of another size: another number of workers, or another ZeRO stage."""
        saved = load_file(path)
        if [tuple(saved[f"{n}"].shape) for n in range(len(saved))] != [tuple(tensor.shape) for tensor in self.average]:
            raise EmaError("The checkpoint was written by another number of workers or ZeRO stage; go on with the same ones.")
        for n, tensor in enumerate(self.average):
            tensor.copy_(saved[f"{n}"])

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, average in zip(self.masters, self.average, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
