"""Checkpoint folders: their files, their location, and which of them are complete.

OUT/checkpoints/STEP-START/   STEP has nine digits; START is the id of the start that wrote it
    preset.json               config of the run
    progress.json             step, epoch, rows, Adam's step count and the loss scale
    base.json                 weights that the run keeps as they are, if it trains not all of them
    part.RANK.safetensors     each rank's shard of weights, EMA and Adam's moments (`partition.py`)
    complete.json             bytes and SHA-256 of every file; written last: a folder without it
                              is not a checkpoint
    set_aside.json            in place of complete.json: the run continues from another checkpoint;
                              the reason, and the content of complete.json
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import storage
from ..config.training import Preset
from ..errors import UserError

CHECKPOINTS, COMPLETE, SET_ASIDE = "checkpoints", "complete.json", "set_aside.json"
BASE = "base.json"
Manifest = dict[str, tuple[int, str]]  # file name -> bytes, SHA-256
Base = dict[str, str]  # name and sha256 of weights that a run keeps as they are, in part or whole


class CheckpointError(UserError):
    """A checkpoint that belongs to another run, or is damaged."""


@dataclass(frozen=True)
class TrainingPosition:
    """Optimizer steps done, current epoch of the corpus, and rows of that epoch trained on."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


def write_progress(
    folder: Path,
    preset: Preset,
    progress: TrainingPosition,
    optimizer: dict[str, Any],
    base: Base | None = None,
) -> None:
    """Write the small files of a checkpoint.

    `base`: the weights whose unchanged parts, or all of them, are not in the checkpoint.
    """
    (folder / "preset.json").write_text(preset.model_dump_json(indent=1))
    (folder / "progress.json").write_text(json.dumps({**asdict(progress), "optimizer": optimizer}))
    if base:
        (folder / BASE).write_text(json.dumps(base))


def read_progress(folder: Path, preset: Preset) -> tuple[TrainingPosition, dict[str, Any]]:
    """The run's progress, and the optimizer's scalars (Adam's step count, loss scale).

    Raises CheckpointError if a file cannot be read, or the checkpoint is of another model.
    """
    saved = read_preset(folder)
    try:
        progress = json.loads((folder / "progress.json").read_text())
        optimizer = progress.pop("optimizer")
        progress = TrainingPosition(**progress)
    except (OSError, ValueError, TypeError, KeyError):
        raise CheckpointError(
            f"{folder} is not a complete glide_ray checkpoint; give the folder of another run."
        ) from None
    check_same(
        saved.model.model_dump(exclude={"sampling"}),
        preset.model.model_dump(exclude={"sampling"}),
        f"The checkpoint in {folder} is of another model",
        "model.",
    )
    return progress, optimizer


def read_base(folder: Path) -> Base | None:
    """The weights that a checkpoint is to be used with; None if it holds all. See `Base`."""
    try:
        base: Base = json.loads((folder / BASE).read_text())
        return base
    except (OSError, ValueError):
        return None


def read_preset(folder: Path) -> Preset:
    """Config of the run that wrote the checkpoint. Raises CheckpointError."""
    try:
        return Preset.model_validate_json((folder / "preset.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} is not a complete glide_ray checkpoint; give the folder of another run."
        ) from None


# -- all checkpoints of a run ----------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointEntry:
    """A complete checkpoint: its folder (local or s3://) and its optimizer step."""

    path: str
    step: int


class Checkpoints:
    """All checkpoints of a run, in a folder or under an s3:// prefix.

    Every method that accesses them raises StorageError if the storage cannot be reached.
    """

    def __init__(self, out: str | Path):
        self.path = f"{str(out).rstrip('/')}/{CHECKPOINTS}"

    def list_complete(self) -> list[CheckpointEntry]:
        """Complete checkpoints, oldest first."""
        ends = (f"/{COMPLETE}",) if storage.is_remote(self.path) else (COMPLETE,)
        return sorted(
            (_entry(file) for file in storage.list_files(self.path, ends)),
            key=lambda entry: (entry.step, entry.path),
        )

    def folder(self, step: int, start: str) -> str:
        """Folder for a new checkpoint of `step`, written by the start with id `start`."""
        return f"{self.path}/{step:09d}-{start}"

    def complete(self, folder: str, manifest: Manifest) -> None:
        """Mark a folder as a complete checkpoint, after all its files have been written."""
        storage.put(json.dumps(manifest, indent=0).encode(), f"{folder}/{COMPLETE}")

    def retire(self, keep_last: int, keep_every: int | None, start: str) -> None:
        """Remove checkpoints, except the last `keep_last` and every multiple of `keep_every`.

        Those of this start (id `start`) count as the last ones, whatever steps earlier starts have
        reached: a start repeats steps only if their checkpoints could not be read. The older
        checkpoint of a step that it wrote again is removed.
        """
        complete = self.list_complete()
        own = {entry.step: entry for entry in complete if entry.path.endswith(f"-{start}")}
        again = [entry for entry in complete if own.get(entry.step, entry) != entry]
        rest = [entry for entry in complete if entry not in (*again, *own.values())]
        rest += own.values()
        for entry in [
            *again,
            *(old for old in rest[:-keep_last] if not keep_every or old.step % keep_every),
        ]:
            # First, so that an interrupted removal leaves no folder that looks complete.
            storage.remove(f"{entry.path}/{COMPLETE}")
            storage.remove_folder(entry.path)

    def set_aside(self, entry: CheckpointEntry, reason: str) -> None:
        """Take a checkpoint out of the run. Its files stay, for a person to look at or delete."""
        manifest = storage.read(f"{entry.path}/{COMPLETE}")
        note = json.dumps({"reason": reason, COMPLETE: manifest.decode(errors="replace")}, indent=1)
        storage.put(note.encode(), f"{entry.path}/{SET_ASIDE}")
        storage.remove(f"{entry.path}/{COMPLETE}")

    def rewind(self, step: int) -> list[CheckpointEntry]:
        """Set aside the checkpoints after `step`, so that the run resumes there. Returns them.

        Raises CheckpointError if there is none of that step.
        """
        complete = self.list_complete()
        if step not in (entry.step for entry in complete):
            steps = ", ".join(f"{entry.step:,}" for entry in complete) or "none"
            raise CheckpointError(
                f"{self.path} has no checkpoint of step {step:,}; there are those of: {steps}."
            )
        later = [entry for entry in complete if entry.step > step]
        for entry in later:
            self.set_aside(entry, f"The run was taken back to step {step:,}.")
        return later

    def sweep(self) -> list[str]:
        """Remove incomplete checkpoints left by interrupted uploads. Returns their folders.

        Those that were set aside stay. Call only while no process writes a checkpoint.
        """
        files = list(storage.list_files(self.path, ("",)))
        marked = {
            self._folder_of(file)
            for file in files
            if file.rpartition("/")[2] in (COMPLETE, SET_ASIDE)
        }
        orphans = sorted({self._folder_of(file) for file in files} - marked)
        for folder in orphans:
            storage.remove_folder(folder)
        return orphans

    def _folder_of(self, file: str) -> str:
        return f"{self.path}/{file.removeprefix(self.path).strip('/').partition('/')[0]}"


def _entry(marker: str) -> CheckpointEntry:
    folder = marker.rpartition("/")[0]
    step, _, _ = folder.rpartition("/")[2].partition("-")
    return CheckpointEntry(folder, int(step) if step.isdecimal() else 0)


def fetch(entry: CheckpointEntry | str, cache: str | Path | None = None) -> Path:
    """A local folder with a checkpoint's files: its own, or copies of S3 objects in `cache`.

    Raises CheckpointError, StorageError.
    """
    path = entry if isinstance(entry, str) else entry.path
    if not storage.is_remote(path):
        return Path(path)
    return storage.fetch_folder(path, (".json", ".safetensors"), cache)


def verify(folder: Path, part: int = 0, of: int = 1, names: Collection[str] | None = None) -> None:
    """Check size and SHA-256 of every `of`-th file, from number `part`, against complete.json.

    `names`: the files to check, by default all. Raises CheckpointError.
    """
    manifest = read_manifest(folder)
    chosen = sorted(name for name in manifest if names is None or name in names)
    for name in chosen[part::of]:
        size, sha256 = manifest[name]
        path = folder / name
        if not path.exists() or path.stat().st_size != size or storage.digest(path) != sha256:
            raise CheckpointError(
                f"{path} is damaged: its size or SHA-256 differs from the manifest; give an "
                "earlier checkpoint."
            )


def read_manifest(folder: Path) -> Manifest:
    try:
        return json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{folder} is not a complete glide_ray checkpoint; give the folder of another run."
        ) from None


def find_checkpoint(path: str | Path) -> str:
    """A checkpoint's folder: `path` itself, or the last complete checkpoint of the run in `path`.

    `path` is local or s3://. Raises CheckpointError.
    """
    path = str(path).rstrip("/")
    if storage.exists(f"{path}/progress.json"):
        return path
    entries = Checkpoints(path).list_complete()
    if not entries:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run with one; give a folder that `glide train` "
            "wrote."
        )
    return entries[-1].path


def unreadable(path: str, faults: Sequence[str]) -> CheckpointError:
    """The error of a run with checkpoints in `path`, whose `faults` keep all from being read."""
    number = f"None of the {len(faults)} checkpoints" if len(faults) > 1 else "No checkpoint"
    return CheckpointError(
        f"{number} in {path} can be read. If not all nodes see that folder, move it to one that "
        f"they share or to s3://; to start again from step 0, delete it. The last: {faults[0]}"
    )


def check_same(
    saved: Mapping[str, Any], current: Mapping[str, Any], what: str, prefix: str = ""
) -> None:
    """Raise CheckpointError naming the first setting in which two configs differ."""
    for key, there, here in differences(saved, current, prefix):
        raise CheckpointError(
            f"{what}: {key} is {there!r} there and {here!r} here; use the same setting, "
            f"or another output folder."
        )


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(dotted key, saved, wanted) of each setting in which two configs differ."""
    found = []
    for key in {**saved, **current}:
        there, here = saved.get(key), current.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            found += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            found.append((f"{prefix}{key}", there, here))
    return found
