"""What lies in a checkpoint folder, and whether it belongs to a run.

    preset.json               the configuration that ran
    progress.json             step and epoch
    part.RANK.safetensors     each rank's part of weights, averages and Adam's moments (`partition.py`)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import Preset, UserError

RAY = "ray"       # the folder of a run in which Ray Train keeps its checkpoints, and which of them are whole


class CheckpointError(UserError):
    """A checkpoint that does not belong to this run."""


@dataclass(frozen=True)
class Progress:
    """Optimizer steps done, the epoch of the corpus that the last of them read, and how many of its rows have been trained on."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


def write_progress(folder: Path, preset: Preset, progress: Progress, optimizer: dict[str, Any]) -> None:
    (folder / "preset.json").write_text(preset.model_dump_json(indent=1))
    (folder / "progress.json").write_text(json.dumps({**asdict(progress), "optimizer": optimizer}))


def read_progress(folder: Path, preset: Preset) -> tuple[Progress, dict[str, Any]]:
    """Where the run stood, and what its optimizer counted. Raises CheckpointError where the checkpoint is another model's."""
    saved = read_preset(folder)
    try:
        progress = json.loads((folder / "progress.json").read_text())
        optimizer = progress.pop("optimizer")
        progress = Progress(**progress)
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(f"{folder} is not a whole glide_ray checkpoint; give the folder of another run.") from None
    check_same(saved.model.model_dump(), preset.model.model_dump(), f"The checkpoint in {folder} is of another shape", "model.")
    return progress, optimizer


def read_preset(folder: Path) -> Preset:
    """The configuration that ran. Raises CheckpointError."""
    try:
        return Preset.model_validate_json((folder / "preset.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder} is not a whole glide_ray checkpoint; give the folder of another run.") from None


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint: `path` itself, or the last one that the run in `path` has committed.

    What has merely been uploaded is not trusted: a rank's file may lack. Raises CheckpointError.
    """
    path = Path(path)
    if (path / "progress.json").exists():
        return path
    try:
        snapshot = json.loads((path / RAY / "checkpoint_manager_snapshot.json").read_text())
        return path / RAY / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is neither a checkpoint nor a run with one; give a folder that `glide train` wrote.") from None


def check_same(saved: dict[str, Any], wanted: dict[str, Any], what: str, prefix: str = "") -> None:
    """Raise CheckpointError naming the first setting in which two configurations differ."""
    for key in {**saved, **wanted}:
        there, here = saved.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            check_same(there, here, what, f"{prefix}{key}.")
        elif there != here:
            raise CheckpointError(f"{what}: {prefix}{key} is {there!r} there and {here!r} here; use the same setting, or another "
                                  f"output folder.")
