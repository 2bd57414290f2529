"""TensorBoard, MLflow and Weights & Biases as one: what `trackers.py` tells each of."""

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

TAG = "glide_ray.run"  # by which MLflow's run is found again
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
        return {
            name: clean(value) if isinstance(value, str) else value for name, value in found.items()
        }


class Store:
    """One tracker, with the methods of `Trackers`. Its constructor imports the package and raises UserError for what the user can mend; `open`
    begins the run there, or goes on with it. All but the constructor may raise whatever the library does: `open` is then called again, and the
    method once more."""

    title: str

    def rewind(self, first_step: int) -> None:
        """Steps from this one may be told again: they stand as they were told first, where nothing can be taken back."""


class TensorBoard(Store):
    """Event files in FOLDER/tensorboard."""

    title = "TensorBoard"

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._writer_of, self._purge, self._last, self._begun = (
            run,
            SummaryWriter,
            run.first_step,
            {},
            False,
        )

    def open(self) -> None:
        # Readers forget what earlier files have of the step of a purge and later. What is written is written at once: the writer's own thread
        # would only fail where nobody looks.
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
        except Exception as error:  # whatever it makes of a URI of no kind that it knows
            raise UserError(
                f"MLflow cannot use its store ({why(error)}); set MLFLOW_TRACKING_URI to a server's address."
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

        new, stamp = _untold(self._last, step, figures), int(time.time() * 1000)
        if new:
            self._client.log_batch(
                self._id, metrics=[Metric(name, value, stamp, step) for name, value in new.items()]
            )
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step)

    def note(self, step: int, text: str) -> None:
        name = f"note.{step:09d}"  # a tag: MLflow knows no events
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
        for start in range(0, len(new), 100):  # as many as a request may carry
            self._client.log_batch(self._id, params=new[start : start + 100])
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

        self._run, self._wandb, self._begun, self._row, self._last = (
            run,
            wandb,
            False,
            run.first_step - 1,
            {},
        )
        try:
            online = wandb.setup().settings.mode in ("online", "shared", "run")
            known = not online or wandb.login(
                prompt=False
            )  # else it would ask for a key on the terminal, in the midst of the run
        except (
            wandb.errors.AuthenticationError
        ):  # its server is away, as far as can be told: no reason not to train
            known = True
        except (wandb.errors.Error, ValueError) as error:  # of settings, or of a key that is none
            raise UserError(
                f"Weights & Biases cannot be set up ({why(error)}); correct its WANDB_ environment variables."
            ) from None
        if not known:
            raise UserError(
                "Weights & Biases has no API key; run `wandb login`, or set WANDB_API_KEY, or set WANDB_MODE=offline."
            )

    def open(self) -> None:
        given = os.environ
        if self._begun:  # its service may have died, and would be asked again
            with suppress(Exception):
                self._wandb.teardown()
        self._begun = True
        self._here = self._wandb.init(
            id=self._run.id,
            resume="allow",
            config=self._run.settings,
            allow_val_change=True,
            project=given.get("WANDB_PROJECT") or "glide_ray",
            name=given.get("WANDB_NAME") or self._run.preset.model.name,
            dir=given.get("WANDB_DIR") or str(self._run.folder),
            settings=self._wandb.Settings(console=given.get("WANDB_CONSOLE") or "off"),
        )  # a progress bar is no log
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
        row = max(
            self._row + 1, step
        )  # so that rows of a run that goes on come after those before, where W&B is offline too
        self._here.log({"step": step, **fields}, step=row, commit=True)
        self._row = row


STORES: dict[str, tuple[Callable[[Run], Store], str]] = {  # and what pip installs it by
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow-skinny alembic"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def _untold(last: Mapping[str, int], step: int, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that have not been told of this step or a later one: steps are done again after a fault."""
    return {name: value for name, value in figures.items() if step > last.get(name, -1)}


def why(error: Exception) -> str:
    """An error's first line, without anything secret."""
    return clean((str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip("."))


def clean(text: str) -> str:
    """Without the password of an address, and without the keys that trackers read from the environment."""
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return re.sub(r"://[^/@\s]+@", "://", text)
