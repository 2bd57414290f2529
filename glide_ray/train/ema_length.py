"""Weight averages whose length is chosen after training (Karras et al. 2024, EDM2, sec. 3).

A power-function average after step t weighs the weights of step s by s^g. Its length is the
standard deviation of this profile over t. A run keeps averages of some lengths, and the ones in its
checkpoints span the profiles of many others: their best combination by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config.training import Preset
from ..storage import atomic_write
from .checkpoint import CheckpointError, Checkpoints, fetch, read_preset, read_progress
from .ema import LENGTH, exponent
from .partition import AVERAGE, CheckpointReader, local_target, write_weights
from .trained_part import keeps_weights

# Largest part of a profile, by its norm, that the checkpoints' averages may fail to reproduce.
LARGEST_ERROR = 0.1
LONGEST = 0.28  # the profile of a constant, 1 / sqrt(12) = 0.289, is the limit


@dataclass(frozen=True)
class Snapshot:
    """A power-function average in a checkpoint, after `step` steps."""

    step: int
    length: float
    folder: Path


def inner_product(step: float, length: float, other_step: float, other_length: float) -> float:
    """Integral of the product of two profiles, each with integral 1 from 0 to its step."""
    if step > other_step:
        step, length, other_step, other_length = other_step, other_length, step, length
    g, h = exponent(length), exponent(other_length)
    return (g + 1) * (h + 1) / (g + h + 1) * (step / other_step) ** h / other_step


def combination(
    snapshots: Sequence[tuple[int, float]], step: int, length: float
) -> tuple[np.ndarray, float]:
    """(factors, error) of the averages (step, length) for an average of `length` after `step`.

    The error is the norm of the difference of the profiles over the norm of the wanted one.
    """
    products = np.array([[inner_product(*one, *other) for other in snapshots] for one in snapshots])
    wanted = np.array([inner_product(*one, step, length) for one in snapshots])
    factors = np.linalg.lstsq(products, wanted, rcond=1e-12)[0]
    whole = inner_product(step, length, step, length)
    missed = whole - 2 * factors @ wanted + factors @ products @ factors
    return factors, float(np.sqrt(max(0.0, missed) / whole))


def export_length(
    run: str,
    out: str | Path,
    length: float,
    metadata_of: Callable[[Preset], Mapping[str, str]] | None = None,
) -> tuple[Preset, int, float]:
    """Write a run's average of `length` after its last checkpoint, as a float32 weights file.

    `run`, `out`: local or s3://. `metadata_of`: further metadata for a run of this preset. Returns
    (preset, step, error of `combination`). Raises CheckpointError if the length is not one or the
    run's checkpoints hold too few averages, StorageError.
    """
    if not 0 < length < LONGEST:
        raise CheckpointError(
            f"An average of length {length:g} does not exist; give one between 0 and {LONGEST}."
        )
    entries = Checkpoints(run).list_complete()
    if not entries:
        raise CheckpointError(f"{run} has no complete checkpoint; give the folder of a run.")
    folders = [fetch(entry) for entry in entries]
    preset = read_preset(folders[-1])
    if keeps_weights(preset.train):
        raise CheckpointError(
            f"The checkpoints of {run} hold only the part that it trains; export with --ema-rate."
        )
    found = [one for folder in folders for one in _snapshots(folder)]
    if not found:
        raise CheckpointError(
            f"The checkpoints of {run} hold no power-function averages; train with "
            "--set ema_lengths=0.05,0.1, and --set keep_every=N to keep checkpoints."
        )
    step = max(one.step for one in found)
    factors, error = combination([(one.step, one.length) for one in found], step, length)
    if error > LARGEST_ERROR:
        raise CheckpointError(
            f"The {len(entries)} checkpoints of {run} give an average of length {length:g} "
            f"only with an error of {error:.0%}; choose a length nearer to {_lengths(found)}, or "
            "keep more checkpoints (train.keep_every)."
        )
    metadata = _about(preset, step, length) | dict(metadata_of(preset) if metadata_of else {})
    with local_target(out) as target:
        _write(found, factors, target, metadata)
    return preset, step, error


def _snapshots(folder: Path) -> list[Snapshot]:
    preset = read_preset(folder)
    step = read_progress(folder, preset)[0].step
    with CheckpointReader(folder) as reader:
        return [
            Snapshot(step, length, folder)
            for length in preset.train.ema_lengths
            if f"{AVERAGE}/{LENGTH}{length:g}" in reader.kinds
        ]


def _lengths(found: Sequence[Snapshot]) -> str:
    return " or ".join(sorted({f"{one.length:g}" for one in found}))


def _about(preset: Preset, step: int, length: float) -> dict[str, str]:
    return {
        "config": preset.model.model_dump_json(),
        "step": str(step),
        "weights": "ema",
        "ema_length": f"{length:g}",
    }


def _write(
    found: Sequence[Snapshot],
    factors: np.ndarray,
    target: Path,
    metadata: Mapping[str, str],
) -> None:
    """Write the combination tensor by tensor, with memory for two of the largest one."""
    with ExitStack() as opened:
        readers = {
            folder: opened.enter_context(CheckpointReader(folder))
            for folder in {one.folder for one in found}
        }
        shapes = readers[found[0].folder].shapes

        def combined(name: str) -> torch.Tensor:
            total = torch.zeros(shapes[name], dtype=torch.float64)
            for one, factor in zip(found, factors, strict=True):
                kind = f"{AVERAGE}/{LENGTH}{one.length:g}"
                total += float(factor) * readers[one.folder].full(kind, name).double()
            return total.float()

        with atomic_write(target) as partial:
            write_weights(partial, dict(sorted(shapes.items())), combined, metadata)
