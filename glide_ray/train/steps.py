"""The training loop: steps, figures, held-out loss and checkpoints, over a trainer of any kind.

A trainer is one process' part of a run: `loop.py` has that of DeepSpeed's ranks, `single.py` that of one process by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..config.training import Preset
from ..tensors import Batch
from .checkpoint import Progress
from .nonfinite import TrainingError
from .objectives import quartile_means

Metrics = dict[str, float | int | str]


class Trains(Protocol):
    """What the loop asks of a trainer."""

    preset: Preset
    progress: Progress
    world: int

    def start(self) -> None: ...
    def step(self, batches: Iterator[Batch], number: int) -> dict[str, torch.Tensor]: ...
    def held_out(self, batches: Sequence[Batch]) -> Metrics: ...
    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, float]: ...
    def scale(self) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Outlets:
    """Where a run's news goes. All ranks call each of them equally often.

    `metrics` is given the figures of a step; `checkpoint` a function that writes this rank's part into the folder it is given; `step` the
    number of each step that has been made, and says whether a checkpoint is wanted right now.
    """

    metrics: Callable[[Metrics], None]
    checkpoint: Callable[[Callable[[Path], None]], None]
    step: Callable[[int], bool] = lambda number: False


def train_loop(
    trainer: Trains,
    epoch_batches: Callable[[int, int], Iterator[Batch]],
    held_out: Sequence[Batch],
    outlets: Outlets,
) -> None:
    """Train to `preset.train.steps` from wherever the trainer stands.

    `epoch_batches(n, rows)` gives this rank's micro-batches of the n-th epoch after its first so many rows, over all ranks.
    """
    train = trainer.preset.train
    batches = _endless(epoch_batches, trainer)
    if trainer.progress.step == 0:
        trainer.start()
        outlets.metrics({"step": 0, **trainer.held_out(held_out)})
    recent: list[dict[str, torch.Tensor]] = []
    began = time.perf_counter()
    for number in range(trainer.progress.step + 1, train.steps + 1):
        recent.append(trainer.step(batches, number))
        trainer.progress = Progress(
            number, trainer.progress.epoch, trainer.progress.rows + train.batch
        )

        # Figures: one transfer from the device for all steps since the last.
        if number % train.log_every == 0 or number == train.steps:
            means = quartile_means(
                trainer.summed(
                    {
                        name: torch.stack([step[name] for step in recent]).mean() / trainer.world
                        for name in recent[0]
                    }
                )
            )
            now = time.perf_counter()
            outlets.metrics(
                {
                    "step": number,
                    **means,
                    **trainer.scale(),
                    "epoch": trainer.progress.epoch,
                    "images_per_s": train.batch * len(recent) / (now - began),
                }
            )
            recent, began = [], now

        if number % train.evaluate_every == 0 or number == train.steps:
            paused = time.perf_counter()
            outlets.metrics({"step": number, **trainer.held_out(held_out)})
            began += time.perf_counter() - paused  # images/s are of the steps alone

        wanted = outlets.step(number)
        if number < train.steps and (wanted or number % train.checkpoint_every == 0):
            paused = time.perf_counter()
            outlets.checkpoint(trainer.save)
            began += time.perf_counter() - paused


def _endless(
    epoch_batches: Callable[[int, int], Iterator[Batch]], trainer: Trains
) -> Iterator[Batch]:
    epoch, rows = trainer.progress.epoch, trainer.progress.rows
    while True:
        trainer.progress = Progress(trainer.progress.step, epoch, rows)
        given = False
        for batch in epoch_batches(epoch, rows):
            given = True
            yield batch
        if not given and not rows:  # a resumed run may find its epoch at an end
            raise TrainingError(
                f"The corpus {trainer.preset.data.corpus} has too few usable images for one batch of "
                f"{trainer.preset.train.batch}; lower train.batch, or add images."
            )
        epoch, rows = epoch + 1, 0
