"""The training loop: steps, metrics, held-out loss and checkpoints, for any kind of trainer.

A trainer is one process's part of a run: `loop.py` has the trainer of a DeepSpeed rank,
`single.py` that of a run with one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..config.training import Preset
from ..tensors import Batch
from .checkpoint import TrainingPosition
from .nonfinite import TrainingError
from .objectives import quartile_means
from .optimizer import learning_rate
from .profiling import StepProfiler
from .step_clock import CHECKPOINT, EVALUATION, StepClock, timings

Metrics = dict[str, float | int | str]

GRAD_NORM, SKIPPED = "grad_norm", "skipped_steps"


def norm_figures(norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics of a step whose gradients had this norm: the norm, or that it was skipped."""
    finite = torch.isfinite(norm)
    return {GRAD_NORM: norm.where(finite, 0.0).float(), SKIPPED: (~finite).float()}


class EmptyEpochError(TrainingError):
    """An epoch without a batch."""


class StopTraining(Exception):
    """Raised by `TrainCallbacks.step` to end the loop after a step."""


class TrainerProtocol(Protocol):
    """Interface of a trainer, as used by `train_loop`."""

    preset: Preset
    progress: TrainingPosition
    world: int
    clock: StepClock

    def start(self) -> None: ...
    def step(self, batches: Iterator[Batch], number: int) -> dict[str, torch.Tensor]: ...
    def held_out(self, batches: Sequence[Batch]) -> Metrics: ...
    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, float]: ...
    def gathered(self, values: Mapping[str, float]) -> list[Mapping[str, float]]: ...
    def scale(self) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class TrainCallbacks:
    """Callbacks of the training loop. All ranks call each of them equally often.

    `metrics` receives the metrics of a step. `checkpoint` receives a function that writes this
    rank's shard to a folder. `step` receives the number of each finished step, and returns whether
    a checkpoint must be saved now; it raises StopTraining to end the loop. `profile` receives the
    files of `train.profile_steps`; None on ranks that are not profiled.
    """

    metrics: Callable[[Metrics], None]
    checkpoint: Callable[[Callable[[Path], None]], None]
    step: Callable[[int], bool] = lambda number: False
    profile: Callable[[str, Path], None] | None = None


def train_loop(
    trainer: TrainerProtocol,
    epoch_batches: Callable[[int, int], Iterator[Batch]],
    held_out: Sequence[Batch],
    callbacks: TrainCallbacks,
) -> None:
    """Train from the trainer's current progress up to step `preset.train.steps`.

    `epoch_batches(n, rows)` returns this rank's micro-batches of epoch n, without the epoch's
    first `rows` rows (counted over all ranks). Raises TrainingError if an epoch has no batch.
    """
    train = trainer.preset.train
    batches = _endless(epoch_batches, trainer)
    if trainer.progress.step == 0:
        trainer.start()
        callbacks.metrics({"step": 0, **trainer.held_out(held_out)})
    recent: list[dict[str, torch.Tensor]] = []
    profiler = StepProfiler(train.profile_steps, callbacks.profile)
    began = time.perf_counter()
    for number in range(trainer.progress.step + 1, train.steps + 1):
        profiler.before(number)
        recent.append(trainer.step(batches, number))
        profiler.after(number)
        trainer.progress = TrainingPosition(
            number, trainer.progress.epoch, trainer.progress.rows + train.batch
        )

        # Metrics: one transfer from the device for all steps since the last logged one.
        if number % train.log_every == 0 or number == train.steps:
            means = _means(trainer, recent)
            now = time.perf_counter()
            callbacks.metrics(
                {"step": number, **means, **_state_of_step(trainer, len(recent), now - began)}
            )
            recent, began = [], now

        if number % train.evaluate_every == 0 or number == train.steps:
            with trainer.clock.host(EVALUATION):
                callbacks.metrics({"step": number, **trainer.held_out(held_out)})

        must_save = callbacks.step(number)
        if number < train.steps and (must_save or number % train.checkpoint_every == 0):
            with trainer.clock.host(CHECKPOINT):
                callbacks.checkpoint(trainer.save)


def _state_of_step(trainer: TrainerProtocol, steps: int, seconds: float) -> Metrics:
    """Metrics of a log line beside the objective's: of the last `steps` steps, in `seconds`."""
    train, number, own = trainer.preset.train, trainer.progress.step, trainer.clock.take()
    paused = own.get(EVALUATION, 0.0) + own.get(CHECKPOINT, 0.0)
    return {
        **trainer.scale(),
        "learning_rate": learning_rate(train, number),
        **timings(trainer.gathered(own), steps),
        "epoch": trainer.progress.epoch,
        "images_per_s": train.batch * steps / (seconds - paused),
    }


def _means(trainer: TrainerProtocol, steps: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Means of the metrics over steps and ranks, and the number of skipped steps.

    The gradient norm is that of the steps that were not skipped.
    """
    means = quartile_means(
        trainer.summed(
            {
                name: torch.stack([step[name] for step in steps]).mean() / trainer.world
                for name in steps[0]
            }
        )
    )
    if (skipped := means.pop(SKIPPED, None)) is not None:
        means[SKIPPED] = round(skipped * len(steps))
        means[GRAD_NORM] /= max(1 - skipped, 1 / len(steps))
    return means


def _endless(
    epoch_batches: Callable[[int, int], Iterator[Batch]], trainer: TrainerProtocol
) -> Iterator[Batch]:
    epoch, rows = trainer.progress.epoch, trainer.progress.rows
    while True:
        trainer.progress = TrainingPosition(trainer.progress.step, epoch, rows)
        has_batch = False
        for batch in epoch_batches(epoch, rows):
            has_batch = True
            yield batch
        # With `rows` > 0 no batch is normal: the run has resumed at the end of an epoch.
        if not has_batch and not rows:
            raise EmptyEpochError(
                f"The corpus {trainer.preset.data.corpus} has too few usable images "
                f"for one batch of {trainer.preset.train.batch}; lower train.batch, or add images."
            )
        epoch, rows = epoch + 1, 0
