"""Training loop of each rank under Ray Train."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.train
import torch
import torch.distributed as dist

from ... import storage
from ...config.overrides import override
from ...config.training import Preset
from ...data.transforms import Collate, collate_batches, held_out_batches, held_out_rows, prefetch
from ...errors import UserError
from ...s3 import DamagedError
from ...tensors import Batch
from ...train.batch_split import BatchSplit
from ...train.checkpoint import (
    CheckpointEntry,
    CheckpointError,
    Checkpoints,
    unreadable,
    verify,
)
from ...train.checkpoint_writer import CHANGE, LEAVING, NONE, SAVE, STOP, CheckpointWriter
from ...train.collectives import all_gather_object, from_rank_0
from ...train.hardware import measured_peak, peak_flops
from ...train.partition import fetch_parts
from ...train.run_folder import save_profile
from ...train.steps import StopTraining
from ...train.watchdog import Watchdog
from .feed import Epoch, micro_batches
from .journal import Start

if TYPE_CHECKING:
    from ...train.loop import Trainer

COUNTS = "counts.json"  # in a checkpoint: rows that each reading task of the epoch kept
BEAT_SECONDS = 1.0  # seconds between progress reports to the board, at least
# seconds to wait after each failed attempt to write the last checkpoint; one attempt per entry
LAST_CHECKPOINT_WAITS = (10, 60, 300, 0)
HAND_OVER_SECONDS = 300  # seconds to wait for the end of this worker, after which it fails
FAILURE_SECONDS = 10.0  # seconds to wait for the other ranks to report a failure as well


def run_rank(settings: dict) -> None:
    """Run one rank. A UserError goes to the board and is not raised, because Ray would retry."""
    board, context = settings["board"], ray.train.get_context()
    if ray.get(board.failed.remote())[0] is not None:
        return
    try:
        _train_rank(
            _fitting(Preset.model_validate_json(settings["preset"]), board),
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
    except Exception:
        # Ray Train passes on the error without its traceback.
        ray.get(board.crashed.remote(context.get_world_rank(), traceback.format_exc()))
        raise


def _fitting(preset: Preset, board) -> Preset:
    """The preset with the micro-batch that the board allows after a lack of GPU memory."""
    limit = ray.get(board.micro_batch.remote())
    if limit is None:
        return preset
    micro_batch = min(limit, preset.train.micro_batch or limit)
    return override(preset, [f"micro_batch={micro_batch}"])


def _train_rank(preset: Preset, out: str, board, tally, feeder) -> None:
    from ...train.loop import Trainer  # imports DeepSpeed, which the driver does not need
    from ...train.steps import EmptyEpochError, TrainCallbacks, train_loop

    context = ray.train.get_context()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    checkpoints = Checkpoints(out)
    # A name for this start, shared by all ranks: separates its batches and checkpoint folders from
    # those of earlier starts.
    start, complete = from_rank_0(lambda: (uuid.uuid4().hex[:8], checkpoints.list_complete()))
    trainer = Trainer(preset, draws_weights=not complete)
    if trainer.rank == 0:
        # Check here again: a worker's permissions may differ from the driver's.
        storage.check_writable(out)
    cache = Path(tempfile.gettempdir()) / f"glide-resume-{start}"
    _resume(trainer, out, complete, cache, context.get_local_rank(), board, tally)
    if trainer.rank == 0:
        _remove_partial_uploads(checkpoints, board)
        _announce(trainer, board)
    held_out = held_out_batches(
        preset.data,
        preset.model,
        trainer.batch_split.micro_batch,
        trainer.rank,
        trainer.world,
        from_rank_0(lambda: held_out_rows(preset.data)),
    )
    callbacks = _RankCallbacks(trainer, checkpoints, start, board, tally)
    try:
        train_loop(
            trainer,
            _epochs(preset, feeder, start, trainer.batch_split),
            held_out,
            TrainCallbacks(
                callbacks.metrics,
                callbacks.checkpoint,
                callbacks.after_step,
                partial(save_profile, out) if trainer.rank == 0 else None,
            ),
        )
    except StopTraining:
        pass
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
            train.checkpoint_minutes,
        )
        prefix = f"rank {trainer.rank} hangs: "
        self._watchdog = Watchdog(
            train.stall_seconds,
            lambda text: ray.get(board.add_event.remote(f"{prefix}{text}; all workers restart")),
        )
        self._left = False  # whether a checkpoint was saved because a node is about to be removed
        self._last_beat = 0.0  # time of the last sign of life on the board
        self._answer = None  # the board's answer to it: a notice

    def metrics(self, metrics: dict) -> None:
        if self._trainer.rank == 0:
            self._board.post.remote(metrics)

    def checkpoint(self, write: Callable[[Path], None]) -> None:
        step = self._trainer.progress.step
        self._watchdog.beat(f"the checkpoint of step {step:,}")
        self._writer.save(
            step,
            lambda folder: self._save(folder, write),
            lambda: self._watchdog.beat(f"the checkpoint of step {step:,}"),
        )
        self._watchdog.beat(f"step {step + 1:,}")

    def after_step(self, number: int) -> bool:
        """Whether a checkpoint must be saved now: one is due, or a node is about to be removed.

        Raises StopTraining if the user has asked to stop.
        """
        self._watchdog.beat(f"step {number + 1:,}")
        own = LEAVING if preemption_noticed() else NONE
        notice = self._writer.step(max(own, self._beat(number)))
        if notice == STOP:
            raise StopTraining
        if notice == CHANGE:
            self._hand_over(number)
        if notice != LEAVING or self._left:
            return notice == SAVE
        self._left = True
        if self._trainer.rank == 0:
            self._board.add_event.remote(
                f"a node is about to be removed; writing a checkpoint at step {number:,}"
            )
        return True

    def _beat(self, number: int) -> int:
        """Send signs of life from rank 0. Returns the notice that answers an earlier one."""
        notice = NONE
        if self._trainer.rank == 0:
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                notice, self._answer = ray.get(self._answer), None
            if self._answer is None and time.monotonic() - self._last_beat > BEAT_SECONDS:
                self._last_beat = time.monotonic()
                self._answer = self._board.beat.remote(number)
        return notice

    def _hand_over(self, number: int) -> None:
        """Write a checkpoint, and wait for the controller to end this worker."""

        def beat() -> None:
            self._watchdog.beat(f"the checkpoint of step {number:,}")
            self._beat(number)

        self.checkpoint(self._trainer.save)
        self._writer.finish(beat)
        if self._trainer.rank == 0:
            ray.get(self._board.saved.remote())
        self._watchdog.rest()
        time.sleep(HAND_OVER_SECONDS)
        raise RuntimeError(f"the other workers did not take over within {HAND_OVER_SECONDS} s")

    def finish(self) -> None:
        """Save the checkpoint of the last step; at the end of the run, with several attempts."""
        last = self._trainer.progress.step
        ended = last == self._trainer.preset.train.steps
        for wait in LAST_CHECKPOINT_WAITS if ended else (0,):
            self.checkpoint(self._trainer.save)
            if self._writer.finish(lambda: self._watchdog.beat("the last checkpoint")) == last:
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
    trainer: Trainer,
    out: str,
    complete: list[CheckpointEntry],
    cache: Path,
    local_rank: int,
    board,
    tally,
) -> None:
    """Load the last undamaged checkpoint, if there are checkpoints.

    From S3 each rank fetches the files with its slices. Later checkpoints are set aside if they
    are damaged, and stay if the storage could not be reached. Raises CheckpointError if none can be
    read.
    """
    skipped: list[tuple[CheckpointEntry, str, bool]] = []  # the fault, and whether it is damage
    try:
        for entry in reversed(complete):
            fault: tuple[str, bool] | None = None
            folder = Path(entry.path)
            try:
                if storage.is_remote(entry.path):
                    folder = fetch_parts(entry.path, cache, trainer.param_slices)
                else:
                    verify(folder, trainer.rank, trainer.world)
            except (CheckpointError, storage.StorageError) as error:
                fault = str(error), isinstance(error, (CheckpointError, DamagedError))
            faults = all_gather_object(fault)
            if not any(faults):
                trainer.load(folder)
                if trainer.rank == 0:
                    ray.get(
                        tally.restore_counts.remote(trainer.progress.epoch, read_counts(folder))
                    )
                    for other, text, is_damaged in skipped:
                        _skip(Checkpoints(out), other, text, is_damaged, board)
                return
            skipped.append((entry, *next(filter(None, faults))))
        if complete:
            raise unreadable(Checkpoints(out).path, [text for _, text, _ in skipped])
    finally:
        dist.barrier()
        if local_rank == 0:
            shutil.rmtree(cache, ignore_errors=True)


def _skip(
    checkpoints: Checkpoints, entry: CheckpointEntry, fault: str, is_damaged: bool, board
) -> None:
    """Report a checkpoint that was not loaded, and set it aside if it is damaged."""
    text = f"skipping the checkpoint of step {entry.step:,}: {fault}"
    if is_damaged:
        try:
            checkpoints.set_aside(entry, fault)
            text = f"the checkpoint of step {entry.step:,} is set aside: {fault}"
        except storage.StorageError as error:
            text += f" It could not be set aside: {error}"
    ray.get(board.add_event.remote(text))


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
