"""Where a run's figures, pictures and events go besides its own metrics file: TensorBoard, MLflow, Weights & Biases.

Each tracker has a thread of its own, so that training waits for none of them. One that fails is told of once; its news wait until it
can be reached again. MLflow and W&B are set up by their own environment variables (MLFLOW_TRACKING_URI, WANDB_MODE...).
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Preset, UserError
from ..settings import leaves

WAITING = 50_000              # news that wait for a tracker at most; what comes after is dropped
RETRY_SECONDS = 15.0          # between tries to reach a tracker that failed
CLOSE_SECONDS = 60.0          # that `close` waits for what has not been written yet
TAG = "glide_ray.run"         # by which MLflow's run is found again
SECRETS = "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"


@dataclass(frozen=True)
class Run:
    """What a tracker is told of the run at its start."""

    id: str
    preset: Preset
    folder: Path
    first_step: int

    @property
    def settings(self) -> dict[str, Any]:
        """The preset's leaves by their dotted names."""
        tree = self.preset.model_dump()
        found = {name: reduce(getitem, name.split("."), tree) for name in leaves(tree)}
        return {name: _clean(value) if isinstance(value, str) else value for name, value in found.items()}


class Store:
    """One tracker, with the methods of `Trackers`. Its constructor imports the package and raises UserError for what the user can mend; `open`
    begins the run there, or goes on with it. All but the constructor may raise whatever the library does: `open` is then called again, and the
    method once more."""

    title: str

    def rewind(self, first_step: int) -> None:
        """Steps from this one may be told again: they stand as they were told first, where nothing can be taken back."""


class Trackers:
    """All trackers of a run. Nothing here raises or waits for them, but `close`, which waits for `CLOSE_SECONDS` at the most."""

    def __init__(self, outlets: Iterable[_Outlet]):
        self._outlets = list(outlets)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an optimizer step, by name; what is not a number is left out."""
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, (int, float)) and name != "step"}
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


def open_trackers(names: Iterable[str], folder: Path, preset: Preset, run_id: str, first_step: int = 0,
                  warn: Callable[[str], None] = warnings.warn) -> Trackers:
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
            raise UserError(f"train.trackers has {name!r}, whose package cannot be imported ({error}); run `pip install {package}`, or leave "
                            f"{name!r} out.") from None
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
            self._complain(f"it has not taken everything in {CLOSE_SECONDS:g} s", "It is not waited for any longer")

    def _work(self) -> None:
        opened = self._open()
        while opened and (news := self._news.get()) is not None:
            for _ in range(2):      # what fails in a store that was reached just before is at fault itself
                if not opened or self._try(*news):
                    break
                opened = self._open()
        if opened:
            self._try("close", self._failed)

    def _try(self, method: str, *given) -> bool:
        try:
            getattr(self._store, method)(*given)
            return True
        except Exception as error:      # of whatever kind: training goes on
            self._complain(_why(error))
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
            with suppress(Exception):       # warnings may be errors, which would end this thread
                self._warn(f"{self._store.title} cannot be written to: {why}. {then}; the run's own files have everything.")


# -- the three --------------------------------------------------------------------------------------------------------

class TensorBoard(Store):
    """Event files in FOLDER/tensorboard."""

    title = "TensorBoard"

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter
        self._run, self._writer_of, self._purge, self._last, self._begun = run, SummaryWriter, run.first_step, {}, False

    def open(self) -> None:
        # Readers forget what earlier files have of the step of a purge and later. What is written is written at once: the writer's own thread
        # would only fail where nobody looks.
        self._writer = self._writer_of(str(self._run.folder / "tensorboard"), purge_step=self._purge, flush_secs=10**6)
        if not self._begun:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self._run.settings.items())
            self._writer.add_text("preset", f"| setting | value |\n|---|---|\n{rows}", self._run.first_step)
        self._writer.flush()
        self._purge, self._begun = None, True

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        new = _untold(self._last, step, figures)
        for name, value in new.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def note(self, step: int, text: str) -> None:
        self._writer.add_text("notes", text, step)
        self._writer.flush()

    def rewind(self, first_step: int) -> None:
        self._purge, self._last = first_step, {}
        self._writer.close()
        self.open()

    def close(self, failed: bool) -> None:
        self._writer.close()


class MLflow(Store):
    """A run of the experiment MLFLOW_EXPERIMENT_NAME ("glide_ray") in the store MLFLOW_TRACKING_URI."""

    title = "MLflow"

    def __init__(self, run: Run):
        from mlflow import MlflowClient
        self._run = run
        try:
            self._client = MlflowClient()
        except Exception as error:      # whatever it makes of a URI of no kind that it knows
            raise UserError(f"MLflow cannot use its store ({_why(error)}); set MLFLOW_TRACKING_URI to a server's address.") from None

    def open(self) -> None:
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or "glide_ray"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{self._run.id}'", max_results=1)
        there = found[0] if found else client.create_run(experiment, run_name=self._run.preset.model.name, tags={TAG: self._run.id})
        self._id = there.info.run_id
        if found:
            client.update_run(self._id, status="RUNNING")
        self._last = {metric.key: metric.step for metric in there.to_proto().data.metrics}
        self._tags = dict(there.data.tags)
        self._parameters(there.data.params)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        new, stamp = _untold(self._last, step, figures), int(time.time() * 1000)
        if new:
            self._client.log_batch(self._id, metrics=[Metric(name, value, stamp, step) for name, value in new.items()])
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step)

    def note(self, step: int, text: str) -> None:
        name = f"note.{step:09d}"       # a tag: MLflow knows no events
        texts = self._tags.get(name, "").splitlines()
        if text not in texts:
            self._tag(name, "\n".join([*texts, text]))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _parameters(self, there: Mapping[str, str]) -> None:
        """The preset. MLflow's parameters cannot change: what a later start set otherwise becomes a tag of the same name."""
        from mlflow.entities import Param
        settings = {name: str(value) for name, value in self._run.settings.items()}
        new = [Param(name, value) for name, value in settings.items() if name not in there]
        for start in range(0, len(new), 100):       # as many as a request may carry
            self._client.log_batch(self._id, params=new[start:start + 100])
        for name, value in settings.items():
            if name in there and self._tags.get(name, there[name]) != value:
                self._tag(name, value)

    def _tag(self, name: str, value: str) -> None:
        self._client.set_tag(self._id, name, value)
        self._tags[name] = value


class WeightsAndBiases(Store):
    """The run with this id in the project WANDB_PROJECT ("glide_ray"); its local files in FOLDER/wandb, or in WANDB_DIR."""

    title = "Weights & Biases"

    def __init__(self, run: Run):
        import wandb
        self._run, self._wandb, self._begun, self._row, self._last = run, wandb, False, run.first_step - 1, {}
        try:
            online = wandb.setup().settings.mode in ("online", "shared", "run")
            known = not online or wandb.login(prompt=False)     # else it would ask for a key on the terminal, in the midst of the run
        except wandb.errors.AuthenticationError:                # its server is away, as far as can be told: no reason not to train
            known = True
        except (wandb.errors.Error, ValueError) as error:       # of settings, or of a key that is none
            raise UserError(f"Weights & Biases cannot be set up ({_why(error)}); correct its WANDB_ environment variables.") from None
        if not known:
            raise UserError("Weights & Biases has no API key; run `wandb login`, or set WANDB_API_KEY, or set WANDB_MODE=offline.")

    def open(self) -> None:
        given = os.environ
        if self._begun:         # its service may have died, and would be asked again
            with suppress(Exception):
                self._wandb.teardown()
        self._begun = True
        self._here = self._wandb.init(
            id=self._run.id, resume="allow", config=self._run.settings, allow_val_change=True, project=given.get("WANDB_PROJECT") or "glide_ray",
            name=given.get("WANDB_NAME") or self._run.preset.model.name, dir=given.get("WANDB_DIR") or str(self._run.folder),
            settings=self._wandb.Settings(console=given.get("WANDB_CONSOLE") or "off"))         # a progress bar is no log
        # W&B numbers rows, and takes none below its last. A grid of samples comes late: so charts have a field of our own along x.
        self._here.define_metric("step")
        self._here.define_metric("*", step_metric="step")
        self._known = self._here.summary.get("step", -1) if self._here.resumed else -1
        self._row = max(self._row, self._here.step - 1)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        new = _untold(self._last, step, figures) if step > self._known else {}
        if new:
            self._log(step, new)
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._log(step, {name: self._wandb.Image(pixels, caption=f"step {step:,}")})

    def note(self, step: int, text: str) -> None:
        self._log(step, {"note": text})

    def close(self, failed: bool) -> None:
        self._here.finish(exit_code=int(failed))

    def _log(self, step: int, fields: Mapping[str, Any]) -> None:
        row = max(self._row + 1, step)      # so that rows of a run that goes on come after those before, where W&B is offline too
        self._here.log({"step": step, **fields}, step=row, commit=True)
        self._row = row


STORES: dict[str, tuple[Callable[[Run], Store], str]] = {       # and what pip installs it by
    "tensorboard": (TensorBoard, "tensorboard"), "mlflow": (MLflow, "mlflow-skinny alembic"), "wandb": (WeightsAndBiases, "wandb")}


def _untold(last: Mapping[str, int], step: int, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that have not been told of this step or a later one: steps are done again after a fault."""
    return {name: value for name, value in figures.items() if step > last.get(name, -1)}


def _why(error: Exception) -> str:
    """An error's first line, without anything secret."""
    return _clean((str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip("."))


def _clean(text: str) -> str:
    """Without the password of an address, and without the keys that trackers read from the environment."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r"://[^/@\s]+@", "://", text)
