"""A run's output folder: its small files, and whether a preset may resume the run in it.

preset.json            config of the run
run.json               id of the run, for trackers
metrics.jsonl          metrics, one JSON object per line
events.log             events of the run, such as restarts
failure.log            traceback of the error that ended the run, if one did
checkpoints/           see `checkpoint.py`
profile/               trace and table of `train.profile_steps`
weights.safetensors    EMA weights, written at the end; adapter.safetensors if an adapter is trained
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from .. import storage
from ..config.training import Preset, TrainConfig
from ..data import patterns
from ..pretrained import shipped
from .checkpoint import CheckpointError, Checkpoints, differences

log = logging.getLogger(__name__)

METRICS, EVENTS, TRACE, RUN, WEIGHTS, PRESET = (
    "metrics.jsonl",
    "events.log",
    "failure.log",
    "run.json",
    "weights.safetensors",
    "preset.json",
)
ADAPTER = "adapter.safetensors"
# Settings of training that may differ when a run resumes. RESUMABLE ones do not change the loss
# (except CLIP's, which is reported); RETUNABLE ones do, but fit the state of any run of the model.
# So do all settings of the data and of sampling.
RESUMABLE = frozenset(
    (
        "steps",
        "workers",
        "device",
        "min_workers",
        "micro_batch",
        "zero_stage",
        "offload_optimizer",
        "activation_checkpointing",
        "fused_norms",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_last",
        "keep_every",
        "trackers",
        "sample_every",
        "sample_prompts",
        "profile_steps",
        "max_failures",
        "stall_seconds",
        "wait_seconds",
    )
)
RETUNABLE = frozenset(
    (
        "batch",
        "ema_lengths",
        "ema_rates",
        "min_snr",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "constant_steps",
        "clip_norm",
        "precision",
        "timestep_power",
        "text_rate",
    )
)


def check_run(preset: Preset, out: str, finished: bool) -> list[str]:
    """Check that `preset` may resume the run in folder `out`, if there is one.

    `finished`: whether that run has ended; only RESUMABLE settings may differ then. Returns a
    clause per changed setting that changes the loss. Raises CheckpointError if others differ.
    """
    try:
        saved = Preset.model_validate_json(storage.read(f"{out}/{PRESET}"))
    except storage.MissingError:
        return []
    except storage.StorageError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{out}/{PRESET} is not a preset that this version reads ({error}); "
            f"use another output folder."
        ) from None
    saved, preset = absolute(saved), absolute(preset)
    changed = [
        (key, there, here)
        for key, there, here in differences(saved.model_dump(), preset.model_dump())
        if key.removeprefix("train.") not in RESUMABLE
    ]
    for key, there, here in changed:
        if finished or not _is_retunable(key):
            raise CheckpointError(
                f"The folder {out} holds a run with other settings: {key} is {there!r} there and "
                f"{here!r} here; use the same setting, or another output folder."
            )
    return [f"{key} changes from {there} to {here}" for key, there, here in changed]


def go_back(out: str | Path, step: int) -> None:
    """Let the run in folder `out` resume from its checkpoint of `step`.

    Later checkpoints are set aside; weights are removed, since the run is not finished any more.
    Raises CheckpointError if there is no such checkpoint.
    """
    later = Checkpoints(out).rewind(step)
    for entry in later:
        log.info(f"the checkpoint of step {entry.step:,} is set aside: {entry.path}")
    if later:
        for name in (WEIGHTS, ADAPTER):
            storage.remove(f"{out}/{name}")


def result_of(train: TrainConfig) -> str:
    """Name of the file with the result of a run."""
    return ADAPTER if train.lora_rank else WEIGHTS


def save_profile(out: str, name: str, file: Path) -> None:
    """Copy a file of a profile into the folder of the run."""
    storage.put(file, f"{out}/profile/{name}")
    log.info(f"profile: {out}/profile/{name}")


def _is_retunable(key: str) -> bool:
    group, _, name = key.partition(".")
    return group == "data" or name in RETUNABLE or name.startswith("sampling.")


def absolute(preset: Preset) -> Preset:
    """The preset with absolute paths, since workers run in another working directory."""
    data, start = preset.data, preset.train.start_from
    data = data.model_copy(
        update={
            "corpus": patterns.absolute(data.corpus),
            "held_out": patterns.absolute(data.held_out),
        }
    )
    train = preset.train.model_copy(update={"start_from": start and shipped.absolute(start)})
    return preset.model_copy(update={"data": data, "train": train})


def read_metrics(path: str | Path) -> list[dict]:
    """Metrics of a run, sorted by step. Steps repeated after a failure appear once, the last time.

    Empty if the file does not exist.
    """
    steps: dict[tuple, dict] = {}
    try:
        lines = storage.read(path).decode().splitlines()
    except storage.MissingError:
        return []
    for line in lines:
        try:
            metrics = json.loads(line)
        except ValueError:  # a line cut off by a crash
            continue
        kind = (
            "held_out"
            if "held_out" in metrics
            else "reviewed"
            if "average_held_out" in metrics
            else ""
        )
        steps[metrics["step"], kind] = metrics
    return [steps[key] for key in sorted(steps)]


def last_step(path: str | Path) -> int:
    metrics = read_metrics(path)
    return metrics[-1]["step"] if metrics else 0
