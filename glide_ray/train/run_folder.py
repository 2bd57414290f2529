"""A run's output folder: its small files, and whether a preset may resume the run in it.

preset.json            config of the run
run.json               id of the run, for trackers
metrics.jsonl          metrics, one JSON object per line
events.log             events of the run, such as restarts
checkpoints/           see `checkpoint.py`
weights.safetensors    EMA weights, written at the end
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import storage
from ..config.training import Preset
from ..data import patterns
from ..pretrained import shipped
from .checkpoint import CheckpointError, check_same, differences

METRICS, EVENTS, TRACE, RUN, WEIGHTS, PRESET = (
    "metrics.jsonl",
    "events.log",
    "failure.log",
    "run.json",
    "weights.safetensors",
    "preset.json",
)
# Settings that may differ when a run resumes. RESUMABLE ones do not change the loss (except CLIP's,
# which is reported); RETUNABLE ones do, but are commonly adjusted during a run.
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
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_last",
        "keep_every",
        "trackers",
        "sample_every",
        "sample_prompts",
        "max_failures",
        "stall_seconds",
        "wait_seconds",
    )
)
RETUNABLE = frozenset(
    (
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

    `finished`: whether that run has ended; RETUNABLE settings must then be equal as well. Returns
    a sentence per changed RETUNABLE setting. Raises CheckpointError if other settings differ.
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
    free = RESUMABLE if finished else RESUMABLE | RETUNABLE
    same = {
        **saved.model_dump(),
        "train": {
            **saved.train.model_dump(),
            **{name: getattr(preset.train, name) for name in free},
        },
    }
    check_same(same, preset.model_dump(), f"The folder {out} holds a run with other settings")
    return [
        f"{key} changes from {there} to {here}"
        for key, there, here in differences(
            saved.train.model_dump(), preset.train.model_dump(), "train."
        )
        if key.removeprefix("train.") in RETUNABLE
    ]


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
