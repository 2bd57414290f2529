"""Output of a run in progress: metrics, events and their cost, progress bar, trackers, samples.

Workers post to the board; the driver polls it and writes the files beside the checkpoints.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from ... import storage
from ...config.training import Preset
from ...models.cost import operations
from ...progress import write_line
from ...train.checkpoint_writer import CHANGE, NONE
from ...train.run_folder import EVENTS, METRICS, RUN, TRACE, last_step
from ...train.run_log import event_line, move_bar, run_id, steps_bar
from ...train.trackers import open_trackers
from ..actors import Actor
from .goodput import NODES, Goodput, Outage
from .samples import Reviewer

# seconds between uploads to s3://; seconds without a step before a line in the log
PUSH_SECONDS, WAITING_SECONDS = 20.0, 60.0


@dataclass(frozen=True)
class Start:
    """A start of the workers, as reported by rank 0."""

    step: int
    workers: int
    micro_batch: int
    calls: int  # micro-batches per step and worker
    precision: str
    device: str
    peak: float | None = None  # FLOP/s of one worker; None if unknown


@dataclass
class BoardUpdate:
    """Everything posted since the last poll."""

    metrics: list[dict] = field(default_factory=list)
    events: list[tuple[float, int, str]] = field(default_factory=list)  # time, step, what happened
    committed: list[tuple[int, str]] = field(default_factory=list)  # step, folder of the checkpoint
    start: Start | None = None
    outages: list[Outage] = field(default_factory=list)
    waiting: float = 0.0  # seconds since the last step or start
    failure: str | None = None  # error that ends the run
    trace: str = ""  # its traceback, if it is not one that the user can correct


@ray.remote(num_cpus=0)
class Board(Actor):
    """Actor to which workers post. It outlives them, so it can tell the cost of a failure."""

    def __init__(self) -> None:
        self._update = BoardUpdate()
        self._start: Start | None = None
        self._failure: str | None = None
        self._failed: set[int] = set()
        self._traces: dict[int, str] = {}
        self._notice, self._running, self._saved = NONE, False, False
        # cause of the failure, and when it was noticed; None while the workers run
        self._noticed: tuple[str, float] | None = None
        # outages since the last step, each with the time when it was noticed
        self._outages: list[tuple[float, Outage]] = []
        self._micro_batch: int | None = None  # limit, once a GPU has run out of memory
        self._step, self._moved = 0, time.time()

    def post(self, metrics: dict) -> None:
        self._update.metrics.append(metrics)
        self.beat(metrics["step"])

    def beat(self, step: int) -> int:
        """Record that a step was made. Returns the notice for the workers."""
        self._step, self._moved = step, time.time()
        if self._outages and self._start is not None and step > self._start.step:
            self._update.outages += [
                replace(outage, recover=self._moved - noticed) for noticed, outage in self._outages
            ]
            self._outages = []
        return self._notice

    def notify(self, notice: int) -> bool:
        """Give the workers a notice with their next sign of life. Returns whether they are running.

        CHANGE is for the running workers only: without workers, or with new ones, it is void.
        """
        if self._running or notice > CHANGE:
            self._notice = max(self._notice, notice)
        return self._running

    def lost(self, cause: str) -> None:
        """Record that the workers have failed."""
        self._running, self._noticed = False, (cause, time.time())

    def step(self) -> int:
        """The last step that the workers reported."""
        return self._step

    def halve(self) -> int | None:
        """Halve the micro-batch of the next starts. Returns it; None if it is one image already."""
        last = self._micro_batch or (self._start.micro_batch if self._start else 1)
        self._micro_batch = max(1, last // 2)
        return self._micro_batch if last > 1 else None

    def micro_batch(self) -> int | None:
        """Limit of the micro-batch; None: none."""
        return self._micro_batch

    def saved(self) -> None:
        """Record that the workers have written the checkpoint for those that take over."""
        self._saved = True

    def seconds_since_beat(self) -> float | None:
        """Seconds since the last sign of life; None once the workers have called `saved`."""
        return None if self._saved else time.time() - self._moved

    def started(self, start: Start) -> None:
        if self._start is not None:
            again, now = max(0, self._step - start.step), time.time()
            self.add_event(
                f"training resumes with {count(start.workers, 'worker')} from step {start.step:,}: "
                f"{count(again, 'step')} repeated, {now - self._moved:.0f} s without a step"
            )
            cause, noticed = self._noticed or (NODES, self._moved)
            self._outages.append((noticed, Outage(cause, again, noticed - self._moved)))
        self._noticed = None
        self._start = self._update.start = start
        self._running, self._saved, self._traces = True, False, {}
        self._notice = NONE if self._notice == CHANGE else self._notice
        # Among the metrics, so that the driver handles both in order.
        self._update.metrics.append({"again_from": start.step})
        self.beat(start.step)

    def add_event(self, text: str) -> None:
        self._update.events.append((time.time(), self._step, text))

    def committed(self, step: int, folder: str) -> None:
        self._update.committed.append((step, folder))

    def crashed(self, rank: int, trace: str) -> None:
        """Record the traceback of an error that ended this start of a rank."""
        self._traces[rank] = trace

    def traces(self) -> dict[int, str]:
        """The tracebacks of the ranks that crashed since the last start."""
        return self._traces

    def fail(self, message: str, rank: int, trace: str = "") -> None:
        """Record an error that stopped a rank, and that the user can correct or look at."""
        self._failure = self._failure or message
        self._update.trace = trace
        self._failed.add(rank)

    def failed(self) -> tuple[str | None, int]:
        """The first failure, and the number of ranks that reported one."""
        return self._failure, len(self._failed)

    def take(self) -> BoardUpdate:
        update, self._update = self._update, BoardUpdate()
        update.failure, update.waiting = self._failure, time.time() - self._moved
        return update


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


class RunFolder:
    """Small files of a run, in its folder or in a temporary folder that is uploaded to s3://."""

    def __init__(self, out: str):
        self.out = out
        self._temporary = (
            tempfile.TemporaryDirectory(prefix="glide-run-") if storage.is_remote(out) else None
        )
        self.local = Path(self._temporary.name if self._temporary else out)
        self._sent: dict[Path, tuple[int, int]] = {}  # modification time in ns, bytes
        if self._temporary:
            for name in (METRICS, EVENTS, RUN):
                if storage.exists(f"{out}/{name}"):
                    storage.download(f"{out}/{name}", self.local / name)

    def id(self) -> str:
        """Id of the run, the same at every start."""
        return run_id(self.local)

    def push(self) -> None:
        """Upload changed files to s3://. Raises StorageError."""
        if self._temporary is None:
            return
        for path in sorted(self.local.rglob("*")):
            if path.is_file() and not path.name.endswith(".partial"):
                state = path.stat().st_mtime_ns, path.stat().st_size
                if self._sent.get(path) != state:
                    storage.put(
                        path.read_bytes(), f"{self.out}/{path.relative_to(self.local).as_posix()}"
                    )
                    self._sent[path] = state

    def close(self) -> None:
        try:
            self.push()
        finally:
            if self._temporary:
                self._temporary.cleanup()


class Journal:
    """Poll the board in a thread while `fit` blocks, and write log, metrics and trackers."""

    def __init__(self, board, folder: RunFolder, preset: Preset, progress: bool):
        self._board, self._folder, self._preset, self._progress = board, folder, preset, progress
        self._unwritten: dict[str, str] = {}
        first = last_step(folder.local / METRICS)
        self._bar = steps_bar(preset, first, progress)
        self._trackers = open_trackers(
            preset.train.trackers,
            folder.local,
            preset,
            folder.id(),
            first + 1 if first else 0,
            self.event,
        )
        self._reviewer = Reviewer(preset, folder.local, self._log_review, self.event)
        self._flops = 3 * operations(preset)  # per image: forward, and twice that backward
        self._start: Start | None = None
        # last step that trackers have from an earlier process; None once the workers have started
        self._told: int | None = first
        self._shown: dict[str, str] = {}
        self._pushed, self._waited, self._stop = time.monotonic(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="glide-progress", daemon=True)
        self.failure: str | None = None
        self._goodput, self._began = Goodput(), time.monotonic()
        self._last_logged = first

    def __enter__(self) -> Journal:
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        if self._start is not None:
            self.event(self._goodput.sentence(time.monotonic() - self._began))
        if kind is None and self.failure is None:
            self._reviewer.finish()
        self._bar.close()
        self._trackers.close(failed=kind is not None or self.failure is not None)

    def event(self, text: str, step: int | None = None, at: float | None = None) -> None:
        """Write a line to the run's log and to the terminal."""
        line = event_line(text, int(self._bar.n) if step is None else step, at)
        self._append(EVENTS, line + "\n")
        if self._progress:
            write_line(line)

    def _append(self, name: str, text: str) -> None:
        """Append to a file of the run. On a full disk, keep the text for the next call."""
        self._unwritten[name] = self._unwritten.get(name, "") + text
        try:
            with open(self._folder.local / name, "a") as file:
                file.write(self._unwritten[name])
            self._unwritten[name] = ""
        except OSError:
            pass

    # -- polling -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self._poll()

    def _poll(self) -> None:
        update: BoardUpdate = ray.get(self._board.take.remote())
        self.failure = update.failure
        if update.trace:
            self._append(TRACE, update.trace + "\n")
        if update.start is not None:
            if self._start is None:
                self.event(_spread(update.start, self._preset), update.start.step)
            self._start = update.start
        self._goodput.outages += update.outages
        for at, step, text in update.events:
            self.event(text, step, at)
            self._trackers.add_event(step, text)
        if update.metrics:
            self._write(update.metrics)
        for step, folder in update.committed:
            self._reviewer.offer(step, folder)
        self._reviewer.poll()
        # Double the wait before each next line: during a night without nodes, lines come minutes
        # apart at first and hours apart later.
        if update.waiting > max(WAITING_SECONDS, 2 * self._waited):
            self._waited = update.waiting
            self.event(f"no step for {update.waiting:.0f} s; {_cluster()}")
        elif update.waiting < WAITING_SECONDS:
            self._waited = 0.0
        if time.monotonic() - self._pushed > PUSH_SECONDS:
            self._pushed = time.monotonic()
            self._try_to_push()

    def _try_to_push(self) -> None:
        try:
            self._folder.push()
        except storage.StorageError as error:
            # The files are kept locally, and the next push tries again.
            self.event(f"The run's metrics could not be sent: {error}")

    def _write(self, rows: list[dict]) -> None:
        for metrics in rows:
            if "again_from" in metrics:
                self._goodput.rewind(metrics["again_from"])
                self._last_logged = metrics["again_from"]
            if "images_per_s" in metrics:
                images = self._preset.train.batch * (metrics["step"] - self._last_logged)
                self._goodput.add_steps(metrics["step"], images / metrics["images_per_s"])
                self._last_logged = metrics["step"]
                metrics.update(self._speed(metrics["images_per_s"]))
                metrics["goodput"] = self._goodput.share(time.monotonic() - self._began)
        self._append(
            METRICS, "".join(json.dumps(metrics) + "\n" for metrics in rows if "step" in metrics)
        )
        for metrics in rows:
            if "again_from" in metrics:
                move_bar(self._bar, metrics["again_from"])
                if metrics["again_from"] != self._told:
                    self._trackers.rewind(metrics["again_from"] + 1)
                self._told = None
                continue
            self._trackers.metrics(metrics["step"], metrics)
            self._shown.update(
                {
                    short: form(metrics[name])
                    for name, (short, form) in LOG_FORMATS.items()
                    if name in metrics
                }
            )
        self._bar.set_postfix(self._shown, refresh=False)
        if not self._bar.update(rows[-1].get("step", self._bar.n) - self._bar.n):
            self._bar.refresh()

    def _speed(self, images_per_s: float) -> dict[str, float]:
        flops = self._flops * images_per_s
        peak = self._start.peak * self._start.workers if self._start and self._start.peak else None
        return {"tflop_per_s": flops / 1e12, **({"share_of_peak": flops / peak} if peak else {})}

    def _log_review(self, step: int, grid, figures: Mapping[str, float]) -> None:
        if figures:
            self._append(METRICS, json.dumps({"step": step, **figures}) + "\n")
            self._trackers.metrics(step, figures)
        if grid is not None:
            self._trackers.image(step, "samples", grid)


def _figure(value: float) -> str:
    return f"{value:.3g}"


LOG_FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "loss": ("loss", _figure),
    "held_out": ("held-out", _figure),
    "images_per_s": ("images/s", _figure),
    "tflop_per_s": ("TFLOP/s", _figure),
    "share_of_peak": ("of peak", lambda share: f"{share:.0%}"),
}


def _spread(start: Start, preset: Preset) -> str:
    """One line on how a run is spread over its workers."""
    train = preset.train
    why = (
        " (auto: DeepSpeed has no fp16 on a CPU)"
        if train.precision == "auto" and start.device == "CPU"
        else ""
    )
    calls = f" in {start.calls} calls of {start.micro_batch}" if start.calls > 1 else ""
    return (
        f"{preset.model.name} on {count(start.workers, 'worker')} ({start.device}), "
        f"{start.precision}{why}, ZeRO-{train.zero_stage}, batch {train.batch:,}"
        f"{calls}"
    )


def _cluster() -> str:
    have = ray.cluster_resources()
    return (
        f"the cluster has {count(int(have.get('GPU', 0)), 'GPU')} and "
        f"{count(int(have.get('CPU', 0)), 'CPU')}"
    )
