"""TensorBoard, MLflow and Weights & Biases behind one interface, used by `trackers.py`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from ..config.overrides import leaves
from ..config.training import Preset
from ..errors import UserError

TAG = "glide_ray.run"  # tag with our run id, to find the MLflow run again
SECRETS = "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"


@dataclass(frozen=True)
class Run:
    """Description of a run for trackers. `first_step`: first step that will be logged."""

    id: str
    preset: Preset
    folder: Path
    first_step: int

    @property
    def settings(self) -> dict[str, Any]:
        """The preset's settings by dotted name, without secrets."""
        tree = self.preset.model_dump()
        found = {name: reduce(getitem, name.split("."), tree) for name in leaves(tree)}
        return {
            name: clean(value) if isinstance(value, str) else value for name, value in found.items()
        }


class Store:
    """Base class of a tracker backend, with the methods of `Trackers`.

    The constructor imports the package, and raises UserError for problems that the user can fix;
    `open` creates or resumes the run in the backend. All other methods may raise any exception of
    the library: the caller then calls `open` again and retries the method once.
    """

    title: str

    def rewind(self, first_step: int) -> None:
        """Prepare for repeated steps from `first_step`, after training resumed from a checkpoint.

        By default does nothing: a backend that cannot delete values keeps the first ones.
        """


class TensorBoard(Store):
    """Event files in FOLDER/tensorboard."""

    title = "TensorBoard"

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._writer_of, self._begun = run, SummaryWriter, False
        self._purge: int | None = run.first_step
        self._last: dict[str, int] = {}

    def open(self) -> None:
        # TensorBoard ignores values from step `purge_step` on in earlier files. The writer's own
        # flushes are disabled, because an error in its thread would go unnoticed; every method here
        # flushes instead.
        self._writer = self._writer_of(
            str(self._run.folder / "tensorboard"), purge_step=self._purge, flush_secs=10**6
        )
        if not self._begun:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self._run.settings.items())
            self._writer.add_text(
                "preset", f"| setting | value |\n|---|---|\n{rows}", self._run.first_step
            )
        self._writer.flush()
        self._purge, self._begun = None, True

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        new = _new_metrics(self._last, step, figures)
        for name, value in new.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def add_event(self, step: int, text: str) -> None:
        self._writer.add_text("notes", text, step)
        self._writer.flush()

    def rewind(self, first_step: int) -> None:
        self._purge, self._last = first_step, {}
        self._writer.close()
        self.open()

    def close(self, failed: bool) -> None:
        self._writer.close()


class MLflow(Store):
    """A run in an experiment of the store MLFLOW_TRACKING_URI.

    The experiment is MLFLOW_EXPERIMENT_ID, or else the one named MLFLOW_EXPERIMENT_NAME (default
    "glide_ray").
    """

    title = "MLflow"

    def __init__(self, run: Run):
        from mlflow import MlflowClient

        self._run = run
        try:
            self._client = MlflowClient()
        except Exception as error:  # of any type, for an unsupported URI
            raise UserError(
                f"MLflow cannot use its store ({why(error)}); "
                f"set MLFLOW_TRACKING_URI to a server's address."
            ) from None

    def open(self) -> None:
        client, name = self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or "glide_ray"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if not experiment:
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name)
        found = client.search_runs([experiment], f"tags.`{TAG}` = '{self._run.id}'", max_results=1)
        there = (
            found[0]
            if found
            else client.create_run(
                experiment, run_name=self._run.preset.model.name, tags={TAG: self._run.id}
            )
        )
        self._id = there.info.run_id
        if found:
            client.update_run(self._id, status="RUNNING")
        self._last = {metric.key: metric.step for metric in there.to_proto().data.metrics}
        self._tags = dict(there.data.tags)
        self._parameters(there.data.params)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        new, stamp = _new_metrics(self._last, step, figures), int(time.time() * 1000)
        if new:
            self._client.log_batch(
                self._id, metrics=[Metric(name, value, stamp, step) for name, value in new.items()]
            )
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step)

    def add_event(self, step: int, text: str) -> None:
        name = f"note.{step:09d}"  # a tag, because MLflow has no events
        texts = self._tags.get(name, "").splitlines()
        if text not in texts:
            self._tag(name, "\n".join([*texts, text]))

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _parameters(self, there: Mapping[str, str]) -> None:
        """Log the preset as MLflow parameters.

        Parameters are immutable: a setting changed at a later start becomes a tag of the same
        name.
        """
        from mlflow.entities import Param

        settings = {name: str(value) for name, value in self._run.settings.items()}
        new = [Param(name, value) for name, value in settings.items() if name not in there]
        for start in range(0, len(new), 100):  # MLflow's limit per request
            self._client.log_batch(self._id, params=new[start : start + 100])
        for name, value in settings.items():
            if name in there and self._tags.get(name, there[name]) != value:
                self._tag(name, value)

    def _tag(self, name: str, value: str) -> None:
        self._client.set_tag(self._id, name, value)
        self._tags[name] = value


class WeightsAndBiases(Store):
    """The run with our run id, in the project WANDB_PROJECT (default "glide_ray").

    Local files are in FOLDER/wandb, or in WANDB_DIR.
    """

    title = "Weights & Biases"

    def __init__(self, run: Run):
        import wandb

        self._run, self._wandb, self._begun = run, wandb, False
        self._row = run.first_step - 1
        self._last: dict[str, int] = {}
        try:
            online = wandb.setup().settings.mode in ("online", "shared", "run")
            # prompt=False: without a key, wandb would ask for one on the terminal during the run.
            known = not online or wandb.login(prompt=False)
        except wandb.errors.AuthenticationError:
            # Probably an unreachable server, which must not stop training.
            known = True
        except (wandb.errors.Error, ValueError) as error:  # invalid settings or API key
            raise UserError(
                f"Weights & Biases cannot be set up ({why(error)}); "
                f"correct its WANDB_ environment variables."
            ) from None
        if not known:
            raise UserError(
                "Weights & Biases has no API key; run `wandb login`, or set WANDB_API_KEY, "
                "or set WANDB_MODE=offline."
            )

    def open(self) -> None:
        environment = os.environ
        if self._begun:  # its service process may have died: shut it down, so that init restarts it
            with suppress(Exception):
                self._wandb.teardown()
        self._begun = True
        self._here = self._wandb.init(
            id=self._run.id,
            resume="allow",
            config=self._run.settings,
            allow_val_change=True,
            project=environment.get("WANDB_PROJECT") or "glide_ray",
            name=environment.get("WANDB_NAME") or self._run.preset.model.name,
            dir=environment.get("WANDB_DIR") or str(self._run.folder),
            # Console capture off by default: it would log the progress bar.
            settings=self._wandb.Settings(console=environment.get("WANDB_CONSOLE") or "off"),
        )
        # W&B rejects rows with a number below the last one, but sample grids arrive after later
        # metrics. So charts use our own field "step" as x axis.
        self._here.define_metric("step")
        self._here.define_metric("*", step_metric="step")
        self._known = self._here.summary.get("step", -1) if self._here.resumed else -1
        self._row = max(self._row, self._here.step - 1)

    def metrics(self, step: int, figures: Mapping[str, float]) -> None:
        new = _new_metrics(self._last, step, figures) if step > self._known else {}
        if new:
            self._log(step, new)
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._log(step, {name: self._wandb.Image(pixels, caption=f"step {step:,}")})

    def add_event(self, step: int, text: str) -> None:
        self._log(step, {"note": text})

    def close(self, failed: bool) -> None:
        self._here.finish(exit_code=int(failed))

    def _log(self, step: int, fields: Mapping[str, Any]) -> None:
        # At least `step`, so that rows of a resumed run follow the earlier ones even offline.
        row = max(self._row + 1, step)
        self._here.log({"step": step, **fields}, step=row, commit=True)
        self._row = row


# Tracker name -> its class, and the optional module that it needs.
STORES: dict[str, tuple[Callable[[Run], Store], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def _new_metrics(
    last: Mapping[str, int], step: int, figures: Mapping[str, float]
) -> dict[str, float]:
    """Metrics not yet logged at this step or later. Steps are repeated after a failure.

    `last`: metric name -> last step logged.
    """
    return {name: value for name, value in figures.items() if step > last.get(name, -1)}


def why(error: Exception) -> str:
    """First line of an error's message, without secrets."""
    return clean((str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip("."))


def clean(text: str) -> str:
    """Remove credentials from URLs, and mask the trackers' keys from the environment."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r"://[^/@\s]+@", "://", text)
