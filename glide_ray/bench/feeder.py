"""`glide bench feeder`: CPU time of the feeder in training with hundreds of workers."""

from __future__ import annotations

import os
import statistics
import tempfile
from typing import Any

import psutil
import ray

from ..data.shards import write_shards
from ..data.sources import find_parts
from ..distributed.actors import Actor
from ..distributed.cluster import connect
from ..distributed.stream import Tally
from ..distributed.training.feed import PREFETCHED_BATCHES, Epoch, Feeder
from .clean import drawn_pictures
from .data import again

RANKS, CALLERS = 256, 4  # simulated workers, and the processes that ask for them
STEPS, ROWS = 32, 8  # batches of an epoch, and rows of a worker in each
SIDE, WINDOW, PER_SHARD = 64, 2048, 2048
BATCHES_A_CALL = PREFETCHED_BATCHES // 2  # as `micro_batches` asks


@ray.remote(num_cpus=0)
class Ranks(Actor):
    """Asks the feeder for the batches of some ranks, as each of them does."""

    def ask(self, feeder, ranks: range, count: int) -> None:
        """Ask for all batches of an epoch, `count` a call."""
        for first in range(0, STEPS, count):
            ray.get(
                [
                    feeder.take.remote(
                        Epoch("bench", 0, 0),
                        first,
                        count,
                        (rank * ROWS, (rank + 1) * ROWS),
                        RANKS,
                    )
                    for rank in ranks
                ]
            )


def bench_feeder(repeats: int) -> dict[str, Any]:
    """CPU milliseconds of the feeder's process for a step of RANKS workers, reading included.

    With as many batches a call as a worker requests, and with one, measured alternately. The
    workers' own reading of the blocks is not part of it.
    """
    connect(2)
    with tempfile.TemporaryDirectory() as folder:
        pictures = list(drawn_pictures(64, SIDE))
        write_shards(folder, again(pictures, STEPS * RANKS * ROWS), PER_SHARD)
        callers = [Ranks.remote() for _ in range(CALLERS)]
        _cpu_ms_a_step(folder, callers, BATCHES_A_CALL)  # warm-up
        pairs = [
            (_cpu_ms_a_step(folder, callers, BATCHES_A_CALL), _cpu_ms_a_step(folder, callers, 1))
            for _ in range(repeats)
        ]
    return {
        "workers": RANKS,
        "rows_of_a_worker": ROWS,
        "steps": STEPS,
        "feeder_cpu_ms_a_step": round(statistics.median(ours for ours, _ in pairs), 1),
        "one_batch_a_call_cpu_ms_a_step": round(statistics.median(one for _, one in pairs), 1),
        "ratio": round(statistics.median(one / ours for ours, one in pairs), 2),
        "pairs": repeats,
    }


def _cpu_ms_a_step(folder: str, callers: list, count: int) -> float:
    feeder = Feeder.remote(find_parts(folder), SIDE, RANKS * ROWS, WINDOW, 0, Tally.remote())
    process = psutil.Process(ray.get(feeder.__ray_call__.remote(lambda _: os.getpid())))
    began, each = process.cpu_times(), RANKS // CALLERS
    ray.get(
        [
            caller.ask.remote(feeder, range(n * each, (n + 1) * each), count)
            for n, caller in enumerate(callers)
        ]
    )
    ended = process.cpu_times()
    ray.kill(feeder)
    return 1000 * (ended.user + ended.system - began.user - began.system) / STEPS
