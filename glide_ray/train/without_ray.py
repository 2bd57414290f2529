"""`glide train --no-ray`: training in this process, with the corpus in memory.

Running the same command again resumes the run.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import storage
from ..config.overrides import override
from ..config.training import Preset
from ..data.filters import Candidate, Report, first_broken, header_rules
from ..data.images import encode
from ..data.shards import Sample, ShardError
from ..data.sources import (
    Part,
    columns,
    find_parts,
    folder_name,
    in_share,
    read_part,
    row_id,
    share_of,
)
from ..data.transforms import Collate, collate_batches, held_out_batches, prefetch
from ..data.usable import too_few
from ..errors import ConfigError, UserError
from ..interrupts import raise_interrupt, stop_requests
from ..progress import write_line
from ..sampling.finite import NonFiniteError
from ..tensors import Batch
from .checkpoint import CheckpointEntry, CheckpointError, Checkpoints, unreadable, verify
from .checkpoint_writer import SAVE, CheckpointWriter
from .pack import source_metadata
from .partition import export_average
from .run_folder import (
    EVENTS,
    METRICS,
    PRESET,
    absolute,
    check_run,
    last_step,
    result_of,
    save_profile,
)
from .run_log import event_line, move_bar, run_id, steps_bar
from .samples import sample_grid
from .single import SingleTrainer
from .steps import StopTraining, TrainCallbacks, train_loop
from .trackers import open_trackers

MAX_BYTES = 16 * 2**30  # limit for the encoded images in memory
SAMPLES = "samples"


@dataclass(frozen=True)
class StartResult:
    """Result of one start of the run.

    `step`: last step made; `finished`: whether it is the run's last; `weights`: file with the EMA
    of the weights or of the adapter.
    """

    step: int
    finished: bool
    weights: Path
    images_per_s: float


def train_alone(
    preset: Preset, out: str | Path, minutes: float | None = None, progress: bool = True
) -> StartResult:
    """Train a preset in the local folder `out`, or resume the run in it. Raises UserError.

    `minutes`: time limit, after which a checkpoint and the current EMA weights are written. Ctrl-C
    and SIGTERM stop training in the same way, and are raised afterwards. `progress`: whether to
    print to the terminal.
    """
    began = time.monotonic()
    if storage.is_remote(out):
        raise ConfigError(
            f"{out}: a run in one process writes to a local folder; give one with --out, or train "
            "under Ray."
        )
    if preset.train.workers > 1:
        preset = preset.model_copy(
            update={"train": preset.train.model_copy(update={"workers": 1, "min_workers": None})}
        )
    out = Path(storage.absolute(out))
    storage.check_writable(out)
    weights = out / result_of(preset.train)
    done = weights.exists() and last_step(out / METRICS) >= preset.train.steps
    turned = check_run(preset, str(out), done)
    if done:
        return StartResult(preset.train.steps, True, weights, 0.0)
    preset = absolute(preset)
    corpus = MemoryCorpus(preset)
    storage.put(preset.model_dump_json(indent=1).encode(), out / PRESET)
    limit = 60 * minutes if minutes else math.inf
    with _Log(out, preset, progress) as log, stop_requests() as stop:
        log.event(f"{corpus.report}")
        for text in turned:
            log.event(text)
        result = _run_within_memory(
            out, corpus, log, lambda: bool(stop) or time.monotonic() - began > limit
        )
    if not result.finished:
        raise_interrupt(stop)
    return result


def _run_within_memory(
    out: Path, corpus: MemoryCorpus, log: _Log, ends: Callable[[], bool]
) -> StartResult:
    """Train the corpus's preset; with half the micro-batch, whenever the GPU runs out of memory."""
    while True:
        try:
            return _run(corpus.preset, out, corpus, log, ends)
        except torch.OutOfMemoryError:
            train = corpus.preset.train
            half = (train.micro_batch or train.batch) // 2
        if not half:
            raise UserError(
                f"The GPU has too little memory for one image of {corpus.preset.model.name}; train "
                "a smaller model, or under Ray on several GPUs."
            )
        corpus.preset = override(corpus.preset, [f"micro_batch={half}"])
        torch.cuda.empty_cache()
        log.event(f"out of GPU memory; training resumes with micro-batches of {half:,}")


def _run(
    preset: Preset, out: Path, corpus: MemoryCorpus, log: _Log, ends: Callable[[], bool]
) -> StartResult:
    train, checkpoints = preset.train, Checkpoints(out)
    trainer = SingleTrainer(preset)
    _resume(trainer, checkpoints, log)
    checkpoints.sweep()
    first, began = trainer.progress.step, time.monotonic()
    log.begin(first)
    log.event(
        f"{preset.model.name} in one process ({trainer.device.type}), {trainer.precision}, "
        f"batch {train.batch:,}, from step {first:,}"
    )
    keep, minutes = (train.keep_last, train.keep_every), train.checkpoint_minutes
    writer = CheckpointWriter(checkpoints, uuid.uuid4().hex[:8], *keep, log.event, minutes=minutes)
    held_out = held_out_batches(preset.data, preset.model, trainer.batch_split.micro_batch)

    def save(write: Callable[[Path], None]) -> None:
        step = trainer.progress.step
        writer.save(step, write)
        if train.sample_every and step % train.sample_every == 0:
            writer.finish()
            _log_grid(log, step, checkpoints, preset)

    def after_step(number: int) -> bool:
        notice = writer.step()
        log.step(number)
        if ends():
            raise StopTraining
        return notice >= SAVE

    finished = False
    try:
        train_loop(
            trainer,
            corpus.epoch_batches,
            held_out,
            TrainCallbacks(log.metrics, save, after_step, partial(save_profile, str(out))),
        )
        finished = True
    except StopTraining:
        log.event(
            f"stopped after step {trainer.progress.step:,}; the same command resumes the run",
            trainer.progress.step,
        )
    step, weights = trainer.progress.step, out / result_of(train)
    last = _last_checkpoint(trainer, checkpoints, writer, out)
    export_average(last, weights, metadata_of=source_metadata)
    speed = (step - first) * train.batch / max(1e-9, time.monotonic() - began)
    return StartResult(step, finished, weights, speed)


def _log_grid(log: _Log, step: int, checkpoints: Checkpoints, preset: Preset) -> None:
    try:
        log.grid(step, _grid(checkpoints, preset))
    except NonFiniteError as error:  # training goes on, as it does on a cluster
        log.event(f"the samples of step {step:,} failed: {error}")


def _last_checkpoint(
    trainer: SingleTrainer, checkpoints: Checkpoints, writer: CheckpointWriter, out: Path
) -> Path:
    """The checkpoint of the last step, saved now if it is missing. Raises UserError."""
    step = trainer.progress.step
    if not checkpoints.list_complete() or checkpoints.list_complete()[-1].step < step:
        writer.save(step, trainer.save)
        writer.finish()
    complete = checkpoints.list_complete()
    if not complete or complete[-1].step < step:
        raise UserError(
            f"The last checkpoint could not be written to {out}; free space there and run the "
            "same command again."
        )
    return Path(complete[-1].path)


def _resume(trainer: SingleTrainer, checkpoints: Checkpoints, log: _Log) -> None:
    """Load the last undamaged checkpoint, if there are checkpoints. Damaged ones are set aside.

    Raises CheckpointError if all of them are damaged.
    """
    damaged: list[tuple[CheckpointEntry, str]] = []
    for entry in reversed(checkpoints.list_complete()):
        try:
            verify(Path(entry.path))
            trainer.load(Path(entry.path))
        except CheckpointError as error:
            damaged.append((entry, str(error)))
            continue
        for other, fault in damaged:
            checkpoints.set_aside(other, fault)
            log.event(f"the checkpoint of step {other.step:,} is set aside: {fault}")
        return
    if damaged:
        raise unreadable(checkpoints.path, [fault for _, fault in damaged])


def _grid(checkpoints: Checkpoints, preset: Preset) -> np.ndarray | None:
    """Sample grid of the last checkpoint's EMA, uint8 (H, W, 3); None for CLIP."""
    entry = checkpoints.list_complete()[-1]
    weights = Path(entry.path).with_suffix(".samples.safetensors")
    try:
        export_average(Path(entry.path), weights)
        return sample_grid(weights, preset)
    finally:
        weights.unlink(missing_ok=True)


class MemoryCorpus:
    """A corpus in memory: encoded images, and up to `data.cache_gib` GiB of decoded ones.

    Raises ShardError if it has fewer usable rows than one batch, or more than `MAX_BYTES` of
    images.
    """

    def __init__(self, preset: Preset):
        self.preset, self.report = preset, Report()
        self.rows: list[tuple[int, Part, Sample]] = []  # row number, its part, sample
        self._collate = Collate(preset.model, preset.data, preset.train.seed)
        rules, size = header_rules(preset.data.min_size), 0
        for part in find_parts(preset.data.corpus, preset.data.caption_column):
            for position, sample in enumerate(self._samples(part)):
                reason = first_broken(Candidate(sample), rules)
                self.report.add(sample.key, reason, sample.captions_unread)
                if reason is None:
                    self.rows.append((row_id(part.url, position), part, sample))
                    size += sample.bytes
                    self._check_size(size)
        if len(self.rows) < preset.train.batch:
            raise ShardError(too_few(preset.data.corpus, preset.train.batch, self.report))

    def _check_size(self, size: int) -> None:
        if size > MAX_BYTES:
            raise ShardError(
                f"The corpus {self.preset.data.corpus} has more than {MAX_BYTES / 2**30:.0f} GiB "
                f"of pictures, too many to hold in memory; leave out --no-ray to stream it."
            )

    def _samples(self, part: Part) -> Iterator[Sample]:
        """Rows of a part. Damage of the part is reported after the rows before it."""
        try:
            yield from read_part(part)
        except UserError as error:
            self.report.faults.append(str(error))

    def epoch_batches(self, epoch: int, rows: int) -> Iterator[Batch]:
        """Micro-batches of an epoch, without its first `rows` rows; deterministic."""
        chosen, micro = (
            self._order(epoch)[rows:],
            self.preset.train.micro_batch or self.preset.train.batch,
        )
        end = len(chosen) - len(chosen) % self.preset.train.batch
        parts = (chosen[start : start + micro] for start in range(0, end, micro))
        rows_of = (columns((self.rows[n][0], self.rows[n][2]) for n in part) for part in parts)
        return prefetch(collate_batches(rows_of, self._collate, self.preset, epoch))

    def endless(self) -> Iterator[Batch]:
        """Micro-batches of epoch 0, 1, 2..., without end."""
        for epoch in itertools.count():
            yield from self.epoch_batches(epoch, 0)

    def _order(self, epoch: int) -> np.ndarray:
        """Shuffled indices into `rows` of the rows that the epoch reads."""
        seed, shares = self.preset.train.seed, self.preset.data.shares
        read = [
            n
            for n, (_, part, sample) in enumerate(self.rows)
            if in_share(
                sample.key, epoch, seed, part.share * share_of(shares, folder_name(part), sample)
            )
        ]
        return np.random.default_rng([seed, epoch]).permutation(np.array(read))


class _Log:
    """Log of metrics and events: to the run's files, the trackers and the terminal."""

    def __init__(self, out: Path, preset: Preset, progress: bool):
        self._out, self._progress = out, progress
        first = last_step(out / METRICS)
        self._bar = steps_bar(preset, first, progress)
        self._trackers = open_trackers(
            preset.train.trackers,
            out,
            preset,
            run_id(out),
            first + 1 if first else 0,
            self.event,
        )
        self._shown: dict[str, str] = {}

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, kind, *_) -> None:
        self._bar.close()
        self._trackers.close(failed=kind is not None)

    def event(self, text: str, step: int | None = None) -> None:
        line = event_line(text, int(self._bar.n) if step is None else step)
        with open(self._out / EVENTS, "a") as file:
            file.write(line + "\n")
        if self._progress:
            write_line(line)

    def metrics(self, figures: dict) -> None:
        with open(self._out / METRICS, "a") as file:
            file.write(json.dumps(figures) + "\n")
        self._trackers.metrics(figures["step"], figures)
        for name, short in (
            ("loss", "loss"),
            ("held_out", "held-out"),
            ("images_per_s", "images/s"),
        ):
            if name in figures:
                self._shown[short] = f"{figures[name]:.3g}"
        self._bar.set_postfix(self._shown, refresh=False)

    def begin(self, step: int) -> None:
        move_bar(self._bar, step)

    def step(self, number: int) -> None:
        self._bar.update(number - self._bar.n)

    def grid(self, step: int, pixels: np.ndarray | None) -> None:
        if pixels is not None:
            storage.put(encode(pixels), self._out / SAMPLES / f"{step:09d}.png")
            self._trackers.image(step, "samples", pixels)
