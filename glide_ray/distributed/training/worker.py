"""Training loop of each rank under Ray Train."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.train
import torch
import torch.distributed as dist

from ... import storage
from ...config.training import Preset
from ...data.transforms import Collate, collate_batches, held_out_batches, prefetch
from ...errors import UserError
from ...tensors import Batch
from ...train.batch_split import BatchSplit
from ...train.checkpoint import CheckpointEntry, CheckpointError, Checkpoints, fetch, verify
from ...train.checkpoint_writer import CheckpointWriter
from ...train.collectives import all_gather_object, broadcast_object
from ...train.hardware import measured_peak, peak_flops
from ...train.watchdog import Watchdog
from .feed import Epoch, micro_batches
from .journal import Start

if TYPE_CHECKING:
    from ...train.loop import Trainer

COUNTS = "counts.json"  # in a checkpoint: rows that each reading task of the epoch kept
BEAT_SECONDS = 1.0  # seconds between progress reports to the board, at least
# seconds to wait after each failed attempt to write the last checkpoint; one attempt per entry
LAST_CHECKPOINT_WAITS = (10, 60, 300, 0)
FAILURE_SECONDS = 10.0  # seconds to wait for the other ranks to report a failure as well


def run_rank(settings: dict) -> None:
    """Run one rank. A UserError goes to the board and is not raised, because Ray would retry."""
    board, context = settings["board"], ray.train.get_context()
    if ray.get(board.failed.remote())[0] is not None:
        return
    try:
        _train_rank(
            Preset.model_validate_json(settings["preset"]),
            settings["out"],
            board,
            settings["tally"],
            settings["feeder"],
        )
    except UserError as error:
        ray.get(board.fail.remote(str(error), context.get_world_rank()))
        # If only this rank failed, the others wait for it in a collective: raise, so that Ray
        # restarts all ranks. They then find the failure on the board and return at once.
        deadline = time.monotonic() + FAILURE_SECONDS
        while ray.get(board.failed.remote())[1] < context.get_world_size():
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _train_rank(preset: Preset, out: str, board, tally, feeder) -> None:
    from ...train.loop import Trainer  # imports DeepSpeed, which the driver does not need
    from ...train.steps import EmptyEpochError, TrainCallbacks, train_loop

    context = ray.train.get_context()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    trainer = Trainer(preset)
    if trainer.rank == 0:
        # Check here again: a worker's permissions may differ from the driver's.
        storage.check_writable(out)
    checkpoints = Checkpoints(out)
    # A name for this start, shared by all ranks: separates its batches and checkpoint folders from
    # those of earlier starts.
    own = (uuid.uuid4().hex[:8], checkpoints.list_complete() if trainer.rank == 0 else [])
    start, complete = broadcast_object(own)
    cache = Path(tempfile.gettempdir()) / f"glide-resume-{start}"
    _resume(trainer, complete, cache, context.get_local_rank(), board, tally)
    if trainer.rank == 0:
        _remove_partial_uploads(checkpoints, board)
        _announce(trainer, board)
    held_out = held_out_batches(
        preset.data, preset.model, trainer.batch_split.micro_batch, trainer.rank, trainer.world
    )
    callbacks = _RankCallbacks(trainer, checkpoints, start, board, tally)
    try:
        train_loop(
            trainer,
            _epochs(preset, feeder, start, trainer.batch_split),
            held_out,
            TrainCallbacks(callbacks.metrics, callbacks.checkpoint, callbacks.after_step),
        )
    except EmptyEpochError as error:
        raise EmptyEpochError(f"{error} Its rows: {ray.get(tally.report.remote())}") from None
    callbacks.finish()


def _epochs(
    preset: Preset, feeder, start: str, split: BatchSplit
) -> Callable[[int, int], Iterator[Batch]]:
    """A function of an epoch's number and of the rows to skip: yields this rank's micro-batches."""
    collate = Collate(preset.model, preset.data, preset.train.seed)

    def epoch_batches(epoch: int, rows: int) -> Iterator[Batch]:
        batches = micro_batches(feeder, Epoch(start, epoch, rows), split)
        return prefetch(collate_batches(batches, collate, preset, epoch))

    return epoch_batches


class _RankCallbacks:
    """Metrics, checkpoints and signs of life of one rank, sent to the board and to storage."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, start: str, board, tally):
        self._trainer, self._board, self._tally = trainer, board, tally
        train = trainer.preset.train
        self._writer = CheckpointWriter(
            checkpoints,
            start,
            train.keep_last,
            train.keep_every,
            board.add_event.remote,
            board.committed.remote,
            2 * train.stall_seconds,
        )
        prefix = f"rank {trainer.rank} hangs: "
        self._watchdog = Watchdog(
            train.stall_seconds,
            lambda text: ray.get(board.add_event.remote(f"{prefix}{text}; all workers restart")),
        )
        self._preempted = False  # whether a checkpoint was saved because of a preempted node
        self._last_beat = 0.0  # time of the last sign of life on the board

    def metrics(self, metrics: dict) -> None:
        if self._trainer.rank == 0:
            self._board.post.remote(metrics)

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        step = self._trainer.progress.step
        self._watchdog.beat(f"the checkpoint of step {step:,}")
        self._writer.save(step, lambda folder: self._save(folder, write))
        self._watchdog.beat(f"step {step + 1:,}")

    def after_step(self, number: int) -> bool:
        """Whether a checkpoint must be saved now, because a node will be preempted."""
        self._watchdog.beat(f"step {number + 1:,}")
        is_rank_0 = self._trainer.rank == 0
        if is_rank_0 and time.monotonic() - self._last_beat > BEAT_SECONDS:
            self._last_beat = time.monotonic()
            self._board.beat.remote(number)
        must_save = self._writer.step(preemption_noticed()) and not self._preempted
        if must_save:
            self._preempted = True
            if is_rank_0:
                self._board.add_event.remote(
                    f"a node is about to be removed; writing a checkpoint at step {number:,}"
                )
        return must_save

    def finish(self) -> None:
        """Save the last checkpoint, with several attempts."""
        for wait in LAST_CHECKPOINT_WAITS:
            self.checkpoint(self._trainer.save)
            step = self._writer.finish(lambda: self._watchdog.beat("the last checkpoint"))
            if step == self._trainer.preset.train.steps:
                break
            self._watchdog.rest()
            time.sleep(wait)
        self._watchdog.close()

    def _save(self, folder: Path, write: Callable[[Path], None]) -> None:
        write(folder)
        if self._trainer.rank == 0:
            epoch = self._trainer.progress.epoch
            write_counts(folder, ray.get(self._tally.counts.remote(epoch)))


# -- resuming --------------------------------------------------------------------------------------


def _resume(
    trainer: Trainer, complete: list[CheckpointEntry], cache: Path, local_rank: int, board, tally
) -> None:
    """Load the last undamaged checkpoint, if there is one. From S3 it is fetched once per node."""
    try:
        for entry in reversed(complete):
            fault = None
            try:
                if not storage.is_remote(entry.path):
                    verify(Path(entry.path), trainer.rank, trainer.world)
                elif local_rank == 0:
                    fetch(entry, cache)  # also verifies
            except (CheckpointError, storage.StorageError) as error:
                fault = str(error)
            faults = all_gather_object(fault)
            if not any(faults):
                folder = fetch(entry, cache)
                trainer.load(folder)
                if trainer.rank == 0:
                    ray.get(
                        tally.restore_counts.remote(trainer.progress.epoch, read_counts(folder))
                    )
                return
            if trainer.rank == 0:
                ray.get(
                    board.add_event.remote(
                        f"skipping the checkpoint of step {entry.step:,}: "
                        f"{next(filter(None, faults))}"
                    )
                )
    finally:
        dist.barrier()
        if local_rank == 0:
            shutil.rmtree(cache, ignore_errors=True)


def _remove_partial_uploads(checkpoints: Checkpoints, board) -> None:
    """Remove files of interrupted uploads. If that is not permitted, they stay and do no harm."""
    try:
        checkpoints.sweep()
    except storage.StorageError as error:
        board.add_event.remote(f"files of interrupted uploads could not be removed: {error}")


def _start_info(trainer: Trainer) -> Start:
    cuda = trainer.device.type == "cuda"
    name = torch.cuda.get_device_name(trainer.device) if cuda else "CPU"
    peak = (
        peak_flops(name, trainer.precision)
        if cuda
        else measured_peak(torch.bfloat16 if trainer.precision == "bf16" else torch.float32)
    )
    return Start(
        trainer.progress.step,
        trainer.world,
        trainer.batch_split.micro_batch,
        trainer.batch_split.calls,
        trainer.precision,
        name,
        peak,
    )


def _announce(trainer: Trainer, board) -> None:
    board.started.remote(_start_info(trainer))
    # At every start: CLIP's loss depends on the micro-batch, which free memory may determine.
    if trainer.preset.train.objective == "clip":
        board.add_event.remote(_clip_batch_note(trainer.batch_split))


def _clip_batch_note(split: BatchSplit) -> str:
    """Event text: the number of negatives in CLIP's loss, and the settings that change it."""
    others = split.world * max(end - first for first, end, _ in split.row_ranges()) - 1
    return (
        f"CLIP contrasts each picture's caption with {others:,} others, those of the same "
        "network call on all workers: train.micro_batch and train.workers affect its loss"
    )


def preemption_noticed() -> bool:
    """Whether Ray has received notice that a node of this run will be preempted.

    Reads this rank's own flag, since `ray.train.get_preemption_info` waits for all workers through
    an actor. That is enough: ranks combine their flags after every step (`CheckpointWriter.step`).
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


# -- row counts in checkpoints ---------------------------------------------------------------------


def write_counts(folder: Path, counts: Mapping[int, int]) -> None:
    """Write COUNTS into a checkpoint: rows kept by each finished reading task of its epoch.

    A resumed run uses them to skip these tasks; without them it reads the tasks again.
    """
    (folder / COUNTS).write_text(json.dumps(sorted(counts.items())))


def read_counts(folder: Path) -> dict[int, int]:
    try:
        return {
            int(task): int(number) for task, number in json.loads((folder / COUNTS).read_text())
        }
    except (OSError, ValueError, TypeError):
        return {}
