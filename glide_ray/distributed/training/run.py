"""Training run under Ray Train: streamed data, DeepSpeed on all workers, resumable checkpoints."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
from ray.autoscaler.sdk import request_resources
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ... import storage
from ...config.training import Preset, TrainConfig
from ...data.filters import Report
from ...data.sources import Part, find_parts
from ...data.usable import check_usable
from ...errors import ConfigError, UserError
from ...interrupts import raise_interrupt, stop_requests
from ...models.weights import load_config
from ...pretrained import shipped
from ...train import partition
from ...train.checkpoint import Checkpoints, fetch
from ...train.checkpoint_writer import STOP
from ...train.pack import source_metadata
from ...train.run_folder import (
    METRICS,
    PRESET,
    absolute,
    check_run,
    last_step,
    read_metrics,
    result_of,
)
from ...train.trained_part import keeps_weights
from ..cluster import connect, is_connected, uses_gpu
from ..stream import Tally
from .callbacks import CheckpointBeforeResize, FailureWatch
from .feed import Feeder
from .journal import Board, Journal, RunFolder, count
from .worker import run_rank

log = logging.getLogger(__name__)

# logical CPUs beside the workers': a data task needs a whole one, and would wait for ever
# for it otherwise
DATA_CPUS = 2
RESIZE_SECONDS = 60  # seconds between checks whether nodes have come back
STOP_SECONDS = 0.2  # seconds between checks whether a signal has been received


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run: paths of EMA weights and metrics, and held-out loss before and after."""

    weights: str
    metrics: str
    steps: int
    first_held_out: float
    last_held_out: float
    # rows that the stream kept and dropped over all epochs; None for a run finished before
    rows: Report | None = None


def train(preset: Preset, out: str | Path, progress: bool = True) -> TrainingResult:
    """Train a preset into `out`, or resume the run that is there.

    `out`: a folder that all nodes see, or an s3:// prefix. A complete run is not trained further.
    Raises UserError. After Ctrl-C or SIGTERM, KeyboardInterrupt is raised once a checkpoint of the
    current step has been written; after a second signal, or before the first step, at once.
    """
    out = storage.absolute(out).rstrip("/")
    weights = f"{out}/{result_of(preset.train)}"
    finished = storage.exists(weights) and last_step(f"{out}/{METRICS}") >= preset.train.steps
    if not finished:
        storage.check_writable(out)
    turned = check_run(preset, out, finished)
    if finished:
        return _result(out, weights)
    preset = absolute(preset)
    column = preset.data.caption_column
    # report a missing corpus before starting anything
    parts = find_parts(preset.data.corpus, column)
    find_parts(preset.data.held_out, column)
    check_usable(preset.data.corpus, parts, preset.data.min_size, preset.train.batch)
    # A resumed run no longer needs the weights that it started from, unless it keeps some.
    begins = keeps_weights(preset.train) or not Checkpoints(out).list_complete()
    if preset.train.start_from and begins:
        load_config(shipped.fetch(preset.train.start_from, preset.model.role))
    connect(preset.train.workers + DATA_CPUS)
    on_gpu = _wait_for_workers(preset)
    storage.put(preset.model_dump_json(indent=1).encode(), f"{out}/{PRESET}")
    board, tally, feeder = _start_actors(preset, parts)
    folder = RunFolder(out)
    try:
        with stop_requests() as stop, Journal(board, folder, preset, progress) as journal:
            for text in turned:
                journal.event(text)
            trainer = _trainer(preset, out, board, tally, feeder, on_gpu)
            _fit(trainer, journal, board, stop)
        if journal.failure:
            raise UserError(journal.failure)
        if not _is_written(out, preset.train.steps):
            raise_interrupt(stop)
        _export(out, preset.train)
    finally:
        folder.close()
    return _result(out, weights, ray.get(tally.report.remote()))


def _start_actors(preset: Preset, parts: Sequence[Part]) -> tuple:
    """(board, tally, feeder), on this node: those of workers come and go."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()
    tally = Tally.options(scheduling_strategy=here).remote()
    feeder = Feeder.options(scheduling_strategy=here).remote(
        parts,
        preset.data.min_size,
        preset.train.batch,
        preset.data.shuffle_buffer,
        preset.train.seed,
        tally,
        preset.data.shares,
    )
    return board, tally, feeder


class Trainer(TorchTrainer):
    """TorchTrainer that writes a checkpoint before other workers take over.

    Without PlacementGroupCleanerCallback on a cluster that this process started: it frees the
    workers' placement groups when a controller dies. Here they end with the process, and in Ray
    2.60 shutting the callback down takes 12 s of every run.
    """

    def _create_default_callbacks(self) -> list:
        assert self.train_loop_config is not None
        return [
            *(
                one
                for one in super()._create_default_callbacks()
                if is_connected() or not isinstance(one, PlacementGroupCleanerCallback)
            ),
            CheckpointBeforeResize(self.train_loop_config["board"]),
        ]


def _trainer(preset: Preset, out: str, board, tally, feeder, on_gpu: bool) -> Trainer:
    train = preset.train
    elastic = train.min_workers not in (None, train.workers)
    return Trainer(
        run_rank,
        train_loop_config={
            "preset": preset.model_dump_json(),
            "out": out,
            "board": board,
            "tally": tally,
            "feeder": feeder,
        },
        # Longer than the watchdog's timeout: its message says what hung.
        torch_config=TorchConfig(timeout_s=int(2 * train.stall_seconds) + 60),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.workers) if elastic else train.workers,
            use_gpu=on_gpu,
            **({"elastic_resize_monitor_interval_s": RESIZE_SECONDS} if elastic else {}),
        ),
        run_config=RunConfig(
            name="run",
            # For Ray Train's own files of the run; CheckpointWriter writes checkpoints to `out`.
            storage_path=tempfile.mkdtemp(prefix="glide-ray-train-"),
            failure_config=FailureConfig(max_failures=-1),  # FailureWatch ends the run
            callbacks=[FailureWatch(board, train.max_failures)],
        ),
    )


def _fit(trainer: Trainer, journal: Journal, board, stop: list[int]) -> None:
    """Run Ray Train in a thread, so that this one can answer signals.

    Raises what `fit` raises, and KeyboardInterrupt as `train` does.
    """
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread, asked = threading.Thread(target=fit, name="glide-fit", daemon=True), 0
    try:
        thread.start()
        while thread.is_alive():
            thread.join(STOP_SECONDS)
            if len(stop) > asked:
                is_running = ray.get(board.notify.remote(STOP))
                if asked or not is_running:
                    raise_interrupt(stop)
                asked = len(stop)
                journal.event("stopping after a checkpoint; press Ctrl-C again to stop without one")
    finally:
        shutil.rmtree(trainer.run_config.storage_path, ignore_errors=True)
    if errors:
        raise errors[0]
    if stop:
        journal.event("stopped; the same command resumes the run")


def _is_written(out: str, step: int) -> bool:
    """Whether the checkpoint of this step is complete."""
    complete = Checkpoints(out).list_complete()
    return bool(complete) and complete[-1].step >= step


def _export(out: str, train: TrainConfig) -> None:
    """Write the run's result from the last checkpoint. Raises UserError if that is missing."""
    complete, name = Checkpoints(out).list_complete(), result_of(train)
    if not _is_written(out, train.steps):
        raise UserError(
            f"Training has ended, but its last checkpoint could not be written to {out}; "
            "free space there and run the same command again: it resumes from "
            f"{f'step {complete[-1].step:,}' if complete else 'the beginning'}."
        )
    with tempfile.TemporaryDirectory(prefix="glide-export-") as cache:
        local = (Path(cache) if storage.is_remote(out) else Path(out)) / name
        folder = fetch(complete[-1], cache)
        partition.export_average(folder, local, metadata_of=source_metadata)
        if storage.is_remote(out):
            storage.put(local, f"{out}/{name}")


# -- waiting for workers, interrupts, result -------------------------------------------------------


def _wait_for_workers(preset: Preset) -> bool:
    """Wait until the cluster has the resources of the run, at most `train.wait_seconds`.

    Does not wait for a cluster started by this process, since it cannot grow. Returns whether
    workers use GPUs. Raises ConfigError.
    """
    train, began = preset.train, time.monotonic()
    missing = _missing_resources(preset)
    if missing and is_connected():
        request_resources(
            bundles=[{"GPU" if uses_gpu(train.device) else "CPU": 1}] * train.workers + [{"CPU": 1}]
        )
        log.info(f"{missing} Waiting for at most {train.wait_seconds:g} s (train.wait_seconds).")
        while missing and time.monotonic() - began < train.wait_seconds:
            time.sleep(min(5.0, train.wait_seconds / 10 + 0.1))
            missing = _missing_resources(preset)
        request_resources(bundles=[])
    if missing:
        cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        waited = f" They were not added within {train.wait_seconds:g} s." if is_connected() else ""
        raise ConfigError(
            f"Setting train.workers: {missing}{waited} Add nodes, or set "
            f"train.workers={max(1, gpus or cpus - 1)}."
        )
    return uses_gpu(train.device)


def _missing_resources(preset: Preset) -> str | None:
    """Sentence on the resources that the cluster lacks; None if it has enough."""
    resources, workers = ray.cluster_resources(), preset.train.min_workers or preset.train.workers
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if uses_gpu(preset.train.device) and gpus < workers:
        return f"{count(workers, 'worker')} need a GPU each, and the cluster has {gpus}."
    if cpus < workers + 1:
        return (
            f"{count(workers, 'worker')} and the data stream need {workers + 1} CPUs, "
            f"and the cluster has {cpus}."
        )
    return None


def _result(out: str, weights: str, rows: Report | None = None) -> TrainingResult:
    metrics = f"{out}/{METRICS}"
    held_out = [row["held_out"] for row in read_metrics(metrics) if "held_out" in row]
    return TrainingResult(weights, metrics, last_step(metrics), held_out[0], held_out[-1], rows)
