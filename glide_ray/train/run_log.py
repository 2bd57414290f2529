"""Parts of a run's log that are the same under Ray Train and in one process."""

from __future__ import annotations

import json
import time
import uuid
from datetime import datetime
from pathlib import Path

from .. import storage
from ..config.training import Preset
from ..progress import Bar
from .run_folder import RUN


def run_id(folder: Path) -> str:
    """Id of the run in a local folder, the same at every start."""
    path = folder / RUN
    if not path.exists():
        storage.put(json.dumps({"id": uuid.uuid4().hex[:12]}).encode(), path)
    return json.loads(path.read_text())["id"]


def steps_bar(preset: Preset, first: int, visible: bool) -> Bar:
    """Progress bar of a run's steps, from step `first`."""
    return Bar(
        total=preset.train.steps,
        desc=f"train {preset.model.name}",
        unit="step",
        initial=first,
        disable=not visible,
        dynamic_ncols=True,
        mininterval=1.0,
    )


def move_bar(bar: Bar, step: int) -> None:
    """Let the bar begin at `step`, where the run resumes: its rate and time count from there."""
    bar.reset()
    bar.initial = bar.n = bar.last_print_n = step
    bar.refresh()


def event_line(text: str, step: int, at: float | None = None) -> str:
    """Line of events.log. `at`: time of the event in seconds since 1970, by default now."""
    when = datetime.fromtimestamp(at or time.time()).isoformat(" ", "seconds")
    return f"{when}  step {step:,}: {text}"
