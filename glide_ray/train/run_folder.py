"""A run's folder: its small files, their names, and whether a preset may go on with the run that lies there.

preset.json            the configuration that runs
metrics.jsonl          the figures of steps, a line each
events.log             what happened to the run
checkpoints/           (`checkpoint.py`)
weights.safetensors    the average, at the end
"""

from __future__ import annotations

import json
from pathlib import Path

from .. import storage
from ..config.training import Preset
from ..pretrained import shipped
from .checkpoint import CheckpointError, check_same, differences

METRICS, EVENTS, RUN, WEIGHTS, PRESET = (
    "metrics.jsonl",
    "events.log",
    "run.json",
    "weights.safetensors",
    "preset.json",
)
# Settings with which a run may go on from its checkpoint: those that leave the loss as it is (but for CLIP's, which is
# said), and those that people turn on the way.
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
    """A folder holds one run: the same settings go on with it, others are refused, but for those that may change on the way.

    Returns what has been changed. Raises CheckpointError.
    """
    try:
        saved = Preset.model_validate_json(storage.read(f"{out}/{PRESET}"))
    except storage.MissingError:
        return []
    except storage.StorageError:
        raise
    except ValueError as error:
        raise CheckpointError(
            f"{out}/{PRESET} is not a preset that this version reads ({error}); use another output folder."
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
        f"{key} is {here} from here on, and was {there}"
        for key, there, here in differences(
            saved.train.model_dump(), preset.train.model_dump(), "train."
        )
        if key.removeprefix("train.") in RETUNABLE
    ]


def absolute(preset: Preset) -> Preset:
    """The preset as the workers read it: they run in a folder of their own."""
    data, start = preset.data, preset.train.start_from
    data = data.model_copy(
        update={
            "corpus": storage.absolute(data.corpus),
            "held_out": storage.absolute(data.held_out),
        }
    )
    train = preset.train.model_copy(update={"start_from": start and shipped.absolute(start)})
    return preset.model_copy(update={"data": data, "train": train})


def read_metrics(path: str | Path) -> list[dict]:
    """The figures of a run in order of steps. Steps that were done again after a fault stand once, as last done."""
    steps: dict[tuple, dict] = {}
    try:
        lines = storage.read(path).decode().splitlines()
    except storage.MissingError:
        return []
    for line in lines:
        try:
            metrics = json.loads(line)
        except ValueError:  # the line that was being written when the machine went down
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
