"""Experiment trackers for metrics, images and events: TensorBoard, MLflow, Weights & Biases.

Each tracker has its own thread, so that training never waits for it. A failing tracker causes one
warning; its messages are queued until it can be reached again. MLflow and W&B are configured by
their own environment variables (MLFLOW_TRACKING_URI, WANDB_MODE...).
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..config.training import Preset
from ..errors import UserError, install_command
from .tracker_stores import STORES, Run, Store, why

WAITING = 50_000  # maximum queue length per tracker; further messages are dropped
RETRY_SECONDS = 15.0  # between attempts to reach a failed tracker
CLOSE_SECONDS = 60.0  # maximum time that `close` waits for queued messages


class Trackers:
    """All trackers of a run.

    No method raises, and none waits, except `close`, which waits up to `CLOSE_SECONDS`.
    """

    def __init__(self, threads: Iterable[_TrackerThread]):
        self._threads = list(threads)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Log metrics of an optimizer step, by name; values that are not numbers are dropped."""
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if numbers:
            self._send("metrics", step, numbers)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log an image, uint8 (H, W, 3). Its step may be earlier than that of the last metrics."""
        self._send("image", step, name, np.array(pixels))

    def add_event(self, step: int, text: str) -> None:
        """Log an event as a sentence, such as the loss of a worker."""
        self._send("add_event", step, text)

    def rewind(self, first_step: int) -> None:
        """Announce that training resumes at `first_step`, so that logged steps may be repeated."""
        self._send("rewind", first_step)

    def close(self, failed: bool = False) -> None:
        """Write all queued messages and mark the run as ended. A second call does nothing."""
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.finish(failed)
        for thread in self._threads:
            thread.join(end - time.monotonic())
        self._threads = []

    def _send(self, *message) -> None:
        for thread in self._threads:
            thread.send(message)


def open_trackers(
    names: Iterable[str],
    folder: Path,
    preset: Preset,
    run_id: str,
    first_step: int = 0,
    warn: Callable[[str], None] = warnings.warn,
) -> Trackers:
    """Open the trackers `names` (`TrainConfig.trackers`) of a run.

    `folder`: for trackers with local files. `first_step`: first step that will be logged, 0 for a
    new run, or the step after the checkpoint for a resumed one. `warn` receives a sentence, from a
    tracker's thread, when a tracker fails. Raises UserError if a package is missing, or a tracker
    is not configured.
    """
    run, stores = Run(run_id, preset, Path(folder), first_step), []
    for name in dict.fromkeys(names):
        kind, module = STORES[name]
        try:
            stores.append(kind(run))
        except ImportError as error:
            raise UserError(
                f"train.trackers has {name!r}, whose package cannot be imported ({error}); "
                f"run {install_command(module)}, or leave {name!r} out."
            ) from None
    return Trackers([_TrackerThread(store, warn) for store in stores])


# -- one tracker's thread --------------------------------------------------------------------------


class _TrackerThread:
    """Queue and thread of one tracker: passes messages to its store in order."""

    def __init__(self, store: Store, warn: Callable[[str], None]):
        self._store, self._warn = store, warn
        self._messages: queue.SimpleQueue = queue.SimpleQueue()
        self._closing, self._failed, self._warned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name=f"glide-{store.title}", daemon=True)
        self._thread.start()

    def send(self, message: tuple) -> None:
        """Queue a message: the name of a Store method and its arguments."""
        if self._messages.qsize() < WAITING:
            self._messages.put(message)

    def finish(self, failed: bool) -> None:
        self._failed = failed
        self._closing.set()
        self._messages.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._complain(
                f"it has not accepted all data within {CLOSE_SECONDS:g} s",
                "The rest may be lost",
            )

    def _work(self) -> None:
        opened = self._open()
        while opened and (message := self._messages.get()) is not None:
            # Two attempts: a message that fails again right after a successful `open` is dropped.
            for _ in range(2):
                if not opened or self._try(*message):
                    break
                opened = self._open()
        if opened:
            self._try("close", self._failed)

    def _try(self, method: str, *arguments) -> bool:
        try:
            getattr(self._store, method)(*arguments)
            return True
        except Exception as error:  # of any type: a tracker must not stop training
            self._complain(why(error))
            return False

    def _open(self) -> bool:
        """Open the store, retrying until it succeeds. False if the run has ended before that."""
        while True:
            ending = self._closing.is_set()
            if self._try("open"):
                return True
            if ending:
                return False
            self._closing.wait(RETRY_SECONDS)

    def _complain(self, why: str, then: str = "Training continues and retries") -> None:
        if not self._warned:
            self._warned = True
            with suppress(Exception):  # a warning raised as an error would end this thread
                self._warn(
                    f"{self._store.title} cannot be written to: {why}. {then}; "
                    f"the run's own files are complete."
                )
