"""A training run under Ray Train: data streamed to every worker, DeepSpeed across them, checkpoints that a new start takes up."""

from __future__ import annotations

import json
import os
import queue
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from .. import storage
from ..config import ConfigError, Preset, UserError
from ..data.filters import Report
from ..data.sources import find_parts
from ..data.transforms import Collate, held_out_batches
from ..forms import Batch
from ..models.weights import load_config
from ..train import partition
from ..train.checkpoint import RAY, CheckpointError, check_same
from .feed import Epoch, Feeder, micro_batches
from .local import connect
from .stream import Tally

WEIGHTS, METRICS, PRESET, COUNTS = "weights.safetensors", "metrics.jsonl", "preset.json", "counts.json"
DATA_CPUS = 2                  # beside the workers': a data task wants a whole CPU, and waits for ever where none is left


@dataclass(frozen=True)
class TrainingResult:
    """What a run made: paths of the EMA weights and of the metrics, and the held-out loss before and after."""

    weights: str
    metrics: str
    steps: int
    first_held_out: float
    last_held_out: float
    rows: Report | None = None      # what the stream kept and dropped, over all epochs; None for a run that was there already


def train(preset: Preset, out: str | Path, progress: bool = True) -> TrainingResult:
    """Train a preset into the folder `out`, or go on with the run that is there. Raises UserError.

    A run that is complete is returned as it is. `out` is local; on a cluster, a folder that all nodes share.
    """
    out = Path(out).resolve()
    _check_run(preset, out)
    if (out / WEIGHTS).exists() and _last_step(out / METRICS) >= preset.train.steps:
        return _result(out)
    storage.put(preset.model_dump_json(indent=1).encode(), out / PRESET)
    preset = _absolute(preset)
    parts = find_parts(preset.data.corpus)      # found missing before anything is started
    find_parts(preset.data.held_out)
    if preset.train.start_from:
        load_config(storage.fetch(preset.train.start_from))
    connect(preset.train.workers + DATA_CPUS)
    on_gpu = _check_cluster(preset)
    board, tally = Board.remote(), Tally.remote()
    feeder = Feeder.remote(parts, preset.data.min_size, preset.train.batch, preset.data.shuffle_buffer, preset.train.seed, tally)
    trainer = TorchTrainer(
        _worker, train_loop_config={"preset": preset.model_dump_json(), "board": board, "tally": tally, "feeder": feeder},
        scaling_config=ScalingConfig(num_workers=preset.train.workers, use_gpu=on_gpu),
        run_config=RunConfig(name=RAY, storage_path=str(out), failure_config=FailureConfig(max_failures=preset.train.max_failures),
                             checkpoint_config=CheckpointConfig(num_to_keep=2)))
    with _Watching(board, out / METRICS, preset, progress) as watching, _interruptible():
        result = trainer.fit()
    if watching.failure:
        raise UserError(watching.failure)
    with result.checkpoint.as_directory() as folder:
        partition.export_average(Path(folder), out / WEIGHTS)
    return _result(out, ray.get(tally.report.remote()))


# -- before -----------------------------------------------------------------------------------------------------------

def _check_run(preset: Preset, out: Path) -> None:
    """A folder holds one run: the same settings go on with it, others are refused. More steps are the same run for longer."""
    try:
        saved = Preset.model_validate_json((out / PRESET).read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise CheckpointError(f"{out / PRESET} is not a preset that this version reads ({error}); use another output folder.") from None
    longer = {"steps": preset.train.steps}
    check_same({**saved.model_dump(), "train": {**saved.train.model_dump(), **longer}}, preset.model_dump(),
               f"The folder {out} holds a run with other settings")


def _absolute(preset: Preset) -> Preset:
    """The preset as the workers read it: they run in a folder of their own."""
    def whole(path: str | None) -> str | None:
        return path if path is None or storage.is_remote(path) else str(Path(path).resolve())
    data = preset.data.model_copy(update={"corpus": whole(preset.data.corpus), "held_out": whole(preset.data.held_out)})
    return preset.model_copy(update={"data": data, "train": preset.train.model_copy(update={"start_from": whole(preset.train.start_from)})})


def _check_cluster(preset: Preset) -> bool:
    """Whether the workers take GPUs. Raises ConfigError where the cluster has too few of either kind."""
    resources = ray.cluster_resources()
    gpus, cpus, workers = int(resources.get("GPU", 0)), int(resources.get("CPU", 0)), preset.train.workers
    if gpus and gpus < workers:
        raise ConfigError(f"Setting train.workers: {workers} workers want a GPU each and the cluster has {gpus}; add nodes, or set "
                          f"train.workers={gpus}.")
    if cpus < workers + 1:
        raise ConfigError(f"Setting train.workers: {workers} workers and the data stream want {workers + 1} CPUs and the cluster has "
                          f"{cpus}; add nodes, or set train.workers={max(1, cpus - 1)}.")
    return bool(gpus)


# -- in the workers ---------------------------------------------------------------------------------------------------

def _worker(settings: dict) -> None:
    """One rank. What the user can mend is told to the board, not raised: Ray would try it again three times."""
    try:
        _train_rank(Preset.model_validate_json(settings["preset"]), settings["board"], settings["tally"], settings["feeder"])
    except UserError as error:
        ray.get(settings["board"].fail.remote(str(error)))


def _train_rank(preset: Preset, board, tally, feeder) -> None:
    from ..train.loop import Outlets, Trainer, train_loop      # DeepSpeed, which the driver has no use for
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    trainer = Trainer(preset)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.load(Path(folder))
            if rank == 0:
                ray.get(tally.know.remote(trainer.progress.epoch, read_counts(Path(folder))))
    # One name for all ranks of this start: an epoch that is read again after a fault is read from its beginning, or where the checkpoint was.
    group = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(group)
    held_out = held_out_batches(preset.data, preset.model, trainer.share.micro_batch, rank, world)

    def post(metrics):
        if rank == 0:
            board.post.remote(metrics)

    def report(write: Callable[[Path], None]):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            if rank == 0:
                write_counts(Path(folder), ray.get(tally.counts.remote(trainer.progress.epoch)))
            ray.train.report({"step": trainer.progress.step}, ray.train.Checkpoint.from_directory(folder))

    def epoch_batches(epoch: int, rows: int) -> Iterator[Batch]:
        return _ahead(_collated(micro_batches(feeder, Epoch(group[0], epoch, rows), trainer.share), preset, epoch))
    train_loop(trainer, epoch_batches, held_out, Outlets(post, report))
    report(trainer.save)


def write_counts(folder: Path, counts: Mapping[int, int]) -> None:
    """Beside a checkpoint: how many rows each ended task of its epoch gave. They spare reading these again, and are not needed otherwise."""
    (folder / COUNTS).write_text(json.dumps(sorted(counts.items())))


def read_counts(folder: Path) -> dict[int, int]:
    try:
        return {int(task): int(count) for task, count in json.loads((folder / COUNTS).read_text())}
    except (OSError, ValueError, TypeError):
        return {}


def _collated(micro_batches: Iterator[dict[str, list]], preset: Preset, epoch: int) -> Iterator[Batch]:
    """Rows to batches, equally many on every rank."""
    collate, last = Collate(preset.model, preset.data, preset.train.seed), None
    for rows in micro_batches:
        batch = collate(rows, epoch)
        # A rank that skipped a batch would wait for the others at the end of the epoch, and they for it in the all-reduce.
        if batch is None and last is not None:
            batch = last[torch.arange(len(rows["id"])) % len(last.image)]
        last = batch
        if batch is not None:
            yield batch


def _ahead(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same batches, decoded in a thread while the network computes."""
    ready: queue.Queue = queue.Queue(depth)

    def fill():
        try:
            for batch in batches:
                ready.put(batch)
            ready.put(None)
        except BaseException as error:   # to be raised where the batches are used
            ready.put(error)
    threading.Thread(target=fill, name="glide-decode", daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


# -- beside them ------------------------------------------------------------------------------------------------------

@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 posts its figures and any rank its failure; the driver reads it, wherever both run."""

    def __init__(self):
        self._metrics: list[dict] = []
        self._failure: str | None = None

    def post(self, metrics: dict) -> None:
        self._metrics.append(metrics)

    def fail(self, message: str) -> None:
        self._failure = self._failure or message

    def since(self, position: int) -> tuple[list[dict], str | None]:
        return self._metrics[position:], self._failure


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt: Ray Train's handler ends its run, then the process with exit code 0, and outlives `fit`."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


class _Watching:
    """Read the board while `fit` blocks: draw the bar, and append every figure to the metrics file."""

    def __init__(self, board, path: Path, preset: Preset, progress: bool):
        self._board, self._path = board, path
        self._bar = tqdm(total=preset.train.steps, desc=f"train {preset.model.name}", unit="step", disable=not progress,
                         initial=_last_step(path), dynamic_ncols=True, mininterval=1.0)
        self._read, self._shown, self._stop = 0, {}, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="glide-progress", daemon=True)
        self.failure: str | None = None

    def __enter__(self) -> _Watching:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        self._bar.close()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._poll()

    def _poll(self) -> None:
        news, self.failure = ray.get(self._board.since.remote(self._read))
        self._read += len(news)
        if not news:
            return
        with open(self._path, "a") as file:
            file.writelines(json.dumps(metrics) + "\n" for metrics in news)
        for metrics in news:
            self._shown.update({short: f"{metrics[name]:.3g}" for name, short in
                                (("loss", "loss"), ("held_out", "held-out"), ("images_per_s", "images/s")) if name in metrics})
        self._bar.set_postfix(self._shown, refresh=False)
        if not self._bar.update(news[-1]["step"] - self._bar.n):
            self._bar.refresh()


def read_metrics(path: str | Path) -> list[dict]:
    """The figures of a run in order of steps. Steps that were done again after a fault stand once, as last done."""
    steps: dict[tuple, dict] = {}
    try:
        for line in Path(path).read_text().splitlines():
            try:
                metrics = json.loads(line)
            except ValueError:      # the line that was being written when the machine went down
                continue
            steps[metrics["step"], "held_out" in metrics] = metrics
    except FileNotFoundError:
        pass
    return [steps[key] for key in sorted(steps)]


def _last_step(path: Path) -> int:
    metrics = read_metrics(path)
    return metrics[-1]["step"] if metrics else 0


def _result(out: Path, rows: Report | None = None) -> TrainingResult:
    held_out = [metrics["held_out"] for metrics in read_metrics(out / METRICS) if "held_out" in metrics]
    return TrainingResult(str(out / WEIGHTS), str(out / METRICS), _last_step(out / METRICS), held_out[0], held_out[-1], rows)
