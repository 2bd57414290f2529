"""`glide bench feeder`: CPU time of the feeder in training with hundreds of workers."""

from __future__ import annotations

import io
import os
import statistics
import tempfile
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

from ..data.shards import Sample, write_shards
from ..data.sources import find_parts
from ..distributed.actors import Actor
from ..distributed.cluster import connect
from ..distributed.stream import Tally
from ..distributed.training.feed import PREFETCHED_BATCHES, Epoch, Feeder
from .data import again

RANKS, CALLERS = 256, 4  # simulated workers, and the processes that ask for them
STEPS, ROWS = 32, 8  # batches of an epoch, and rows of a worker in each
SIDE, WINDOW, PER_SHARD = 64, 2048, 2048


@ray.remote(num_cpus=0)
class Ranks(Actor):
    """Asks the feeder for the batches of some ranks, as each of them does."""

    def ask(self, feeder, epoch: Epoch, ranks: range, count: int, whole: bool) -> int:
        """References of all answers. `count`: batches of a call; `whole`: all rows of a batch."""
        batch, found = RANKS * ROWS, 0
        for first in range(0, STEPS, count):
            calls = [
                feeder.take.remote(
                    epoch,
                    first,
                    count,
                    (0, batch) if whole else (rank * ROWS, (rank + 1) * ROWS),
                    RANKS,
                )
                for rank in ranks
            ]
            found += sum(len(share.segments) for one in ray.get(calls) for share in one)
        return found


def bench_feeder(repeats: int) -> dict[str, Any]:
    """CPU milliseconds of the feeder's process for a step of RANKS workers, reading included.

    Compared with one call a batch that gives each worker all blocks of the batch, in turn. The
    workers' own reading of the blocks is not part of it.
    """
    connect(2)
    draws = np.random.default_rng(0)
    pictures = []
    for n in range(64):
        buffer = io.BytesIO()
        pixels = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        pictures.append(Sample(f"{n}", buffer.getvalue(), "jpg", (f"blobs, number {n}",), {}))
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, again(pictures, STEPS * RANKS * ROWS), PER_SHARD)
        callers = [Ranks.remote() for _ in range(CALLERS)]
        _cpu_ms_a_step(folder, callers, PREFETCHED_BATCHES // 2, False)  # warm-up
        pairs = [
            (
                _cpu_ms_a_step(folder, callers, PREFETCHED_BATCHES // 2, False),
                _cpu_ms_a_step(folder, callers, 1, True),
            )
            for _ in range(repeats)
        ]
    return {
        "workers": RANKS,
        "rows_of_a_worker": ROWS,
        "steps": STEPS,
        "feeder_cpu_ms_a_step": round(statistics.median(ours for (ours, _), _ in pairs), 1),
        "references_of_a_worker_and_step": round(pairs[0][0][1], 2),
        "whole_batches_cpu_ms_a_step": round(statistics.median(one for _, (one, _) in pairs), 1),
        "whole_batches_references": round(pairs[0][1][1], 2),
        "pairs": repeats,
    }


def _cpu_ms_a_step(folder: str, callers: list, count: int, whole: bool) -> tuple[float, float]:
    """(CPU ms of the feeder a step, references a worker and step) of an epoch."""
    feeder = Feeder.remote(find_parts(folder), SIDE, RANKS * ROWS, WINDOW, 0, Tally.remote())
    process = psutil.Process(ray.get(feeder.__ray_call__.remote(lambda _: os.getpid())))
    began = process.cpu_times()
    each = RANKS // CALLERS
    found = ray.get(
        [
            caller.ask.remote(
                feeder, Epoch("bench", 0, 0), range(n * each, (n + 1) * each), count, whole
            )
            for n, caller in enumerate(callers)
        ]
    )
    ended = process.cpu_times()
    seconds = ended.user + ended.system - began.user - began.system
    ray.kill(feeder)
    return 1000 * seconds / STEPS, sum(found) / RANKS / STEPS
