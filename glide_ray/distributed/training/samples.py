"""Sample grids and held-out loss of the EMA weights, computed beside the run from checkpoints.

A Ray task of its own does this, so that no rank waits for it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch

from ... import storage
from ...config.training import Preset
from ...data.images import encode
from ...errors import UserError
from ...train.checkpoint import fetch
from ...train.partition import export_average
from ...train.samples import held_out_of_average, sample_grid

SAMPLES = "samples"
LAST_SECONDS = 900  # longest wait for a review after training has ended


def review(checkpoint: str, settings: str) -> tuple[np.ndarray | None, dict[str, float]]:
    """Sample grid (H, W, 3) uint8 of a checkpoint's EMA weights, and their held-out metrics."""
    if not torch.cuda.is_available():
        # Training has priority where both share a machine. Few threads: several threads that wait
        # for a core are slower than one.
        os.nice(10)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))
    preset = Preset.model_validate_json(settings)
    with tempfile.TemporaryDirectory(prefix="glide-review-") as folder:
        weights = Path(folder) / "weights.safetensors"
        export_average(fetch(checkpoint, Path(folder) / "parts"), weights)
        return sample_grid(weights, preset), held_out_of_average(weights, preset)


class Reviewer:
    """Review one checkpoint at a time. The newest one waits; older ones that wait are skipped."""

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        on_done: Callable[[int, np.ndarray | None, dict], None],
        on_event: Callable[[str], None],
    ):
        self._preset, self._folder, self._on_done, self._on_event = (
            preset,
            folder,
            on_done,
            on_event,
        )
        self._underway: tuple[int, ray.ObjectRef] | None = None
        self._waiting: tuple[int, str] | None = None

    def offer(self, step: int, checkpoint: str) -> None:
        """Queue a complete checkpoint if its step is due for a review."""
        every = self._preset.train.sample_every
        if every and (step % every == 0 or step == self._preset.train.steps):
            self._waiting = step, checkpoint
            self.poll()

    def poll(self, timeout: float = 0) -> None:
        if self._underway is not None:
            step, reference = self._underway
            if not ray.wait([reference], timeout=timeout)[0]:
                return
            self._underway = None
            self._take(step, reference)
        if self._waiting is not None:
            (step, checkpoint), self._waiting = self._waiting, None
            # Use a GPU that no worker needs, else the CPU. Reserve no CPU, or the task might wait
            # for ever. Hide the GPUs here, because Ray does not hide them from a task that requests
            # none (see `cluster.py`): the review would take memory that training needs.
            spare = ray.cluster_resources().get("GPU", 0) > self._preset.train.workers
            place = (
                {"num_gpus": 1}
                if spare
                else {"num_gpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
            )
            task = ray.remote(num_cpus=0, max_retries=1, **place)(review)
            self._underway = step, task.remote(checkpoint, self._preset.model_dump_json())

    def finish(self) -> None:
        """Wait for the current review, and then for the newest checkpoint's."""
        while self._underway is not None or self._waiting is not None:
            before = self._underway
            self.poll(timeout=LAST_SECONDS)
            if self._underway is not None and self._underway is before:
                self._on_event(
                    f"the samples and held-out loss of step {before[0]:,} took too long "
                    "and are skipped"
                )
                return

    def _take(self, step: int, reference: ray.ObjectRef) -> None:
        try:
            grid, figures = ray.get(reference)
            if grid is not None:
                storage.put(encode(grid), self._folder / SAMPLES / f"{step:09d}.png")
        except (ray.exceptions.RayError, UserError) as error:
            self._on_event(
                f"the samples and held-out loss of step {step:,} failed: "
                f"{str(error).strip().splitlines()[-1]}"
            )
            return
        self._on_done(step, grid, figures)
