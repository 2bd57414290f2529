"""Where a run's figures, pictures and events go besides its own metrics file: TensorBoard, MLflow, Weights & Biases.

Each tracker has a thread of its own, so that training waits for none of them. One that fails is told of once; its news wait until it
can be reached again. MLflow and W&B are set up by their own environment variables (MLFLOW_TRACKING_URI, WANDB_MODE...).
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
from ..errors import UserError
from .tracker_stores import STORES, Run, Store, why

WAITING = 50_000  # news that wait for a tracker at most; what comes after is dropped
RETRY_SECONDS = 15.0  # between tries to reach a tracker that failed
CLOSE_SECONDS = 60.0  # that `close` waits for what has not been written yet


class Trackers:
    """All trackers of a run. Nothing here raises or waits for them, but `close`, which waits for `CLOSE_SECONDS` at the most."""

    def __init__(self, outlets: Iterable[_Outlet]):
        self._outlets = list(outlets)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an optimizer step, by name; what is not a number is left out."""
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        if numbers:
            self._tell("metrics", step, numbers)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture uint8 (H, W, 3). It may be of an earlier step than the last figures."""
        self._tell("image", step, name, np.array(pixels))

    def note(self, step: int, text: str) -> None:
        """An event, in a sentence: a worker that was lost, or the like."""
        self._tell("note", step, text)

    def rewind(self, first_step: int) -> None:
        """Training goes on from a checkpoint: what comes next is of `first_step` and later, which may have been told before."""
        self._tell("rewind", first_step)

    def close(self, failed: bool = False) -> None:
        """Write what waits, and mark the run as ended. A second call does nothing."""
        end = time.monotonic() + CLOSE_SECONDS
        for outlet in self._outlets:
            outlet.finish(failed)
        for outlet in self._outlets:
            outlet.join(end - time.monotonic())
        self._outlets = []

    def _tell(self, *news) -> None:
        for outlet in self._outlets:
            outlet.tell(news)


def open_trackers(
    names: Iterable[str],
    folder: Path,
    preset: Preset,
    run_id: str,
    first_step: int = 0,
    warn: Callable[[str], None] = warnings.warn,
) -> Trackers:
    """The trackers of `names` (`TrainConfig.trackers`) for a run, those of local files in `folder`.

    `first_step` is the first whose figures are to come: 0 for a new run, one after its checkpoint's for a run that goes on. `warn` is told in
    a sentence, from a thread, of a tracker that fails. Raises UserError where a package or its setting up lacks.
    """
    run, stores = Run(run_id, preset, Path(folder), first_step), []
    for name in dict.fromkeys(names):
        kind, package = STORES[name]
        try:
            stores.append(kind(run))
        except ImportError as error:
            raise UserError(
                f"train.trackers has {name!r}, whose package cannot be imported ({error}); run `pip install {package}`, or leave "
                f"{name!r} out."
            ) from None
    return Trackers([_Outlet(store, warn) for store in stores])


# -- one tracker's thread ---------------------------------------------------------------------------------------------


class _Outlet:
    """Hands news to one store in order, in a thread."""

    def __init__(self, store: Store, warn: Callable[[str], None]):
        self._store, self._warn = store, warn
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._closing, self._failed, self._warned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name=f"glide-{store.title}", daemon=True)
        self._thread.start()

    def tell(self, news: tuple) -> None:
        """A method's name and what it is given."""
        if self._news.qsize() < WAITING:
            self._news.put(news)

    def finish(self, failed: bool) -> None:
        self._failed = failed
        self._closing.set()
        self._news.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._complain(
                f"it has not taken everything in {CLOSE_SECONDS:g} s",
                "It is not waited for any longer",
            )

    def _work(self) -> None:
        opened = self._open()
        while opened and (news := self._news.get()) is not None:
            for _ in range(
                2
            ):  # what fails in a store that was reached just before is at fault itself
                if not opened or self._try(*news):
                    break
                opened = self._open()
        if opened:
            self._try("close", self._failed)

    def _try(self, method: str, *given) -> bool:
        try:
            getattr(self._store, method)(*given)
            return True
        except Exception as error:  # of whatever kind: training goes on
            self._complain(why(error))
            return False

    def _open(self) -> bool:
        """Whether the store was reached; false only when the run has ended without."""
        while True:
            ending = self._closing.is_set()
            if self._try("open"):
                return True
            if ending:
                return False
            self._closing.wait(RETRY_SECONDS)

    def _complain(self, why: str, then: str = "Training goes on and tries again") -> None:
        if not self._warned:
            self._warned = True
            with suppress(Exception):  # warnings may be errors, which would end this thread
                self._warn(
                    f"{self._store.title} cannot be written to: {why}. {then}; the run's own files have everything."
                )
