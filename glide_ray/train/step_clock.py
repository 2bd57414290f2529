"""Where a rank's time and memory go: waiting for data, forward passes, evaluation, checkpoints."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

DATA, FORWARD, EVALUATION, CHECKPOINT = "data", "forward", "evaluation", "checkpoint"
MEMORY = "memory"


class StepClock:
    """Seconds spent in the named parts of the steps since the last `take`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def host(self, part: str) -> Iterator[None]:
        """Count this process's seconds in the context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - began

    @contextmanager
    def device(self, part: str) -> Iterator[None]:
        """Count the seconds of the device's work in the context, without waiting for it."""
        if self._device.type != "cuda":
            with self.host(part):
                yield
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((part, first, last))

    def take(self) -> dict[str, float]:
        """Seconds by part, and the peak of memory in bytes, since the last call.

        Waits for the device. The memory of a process on a CPU counts from its start.
        """
        for part, first, last in self._events:
            last.synchronize()
            self._seconds[part] += first.elapsed_time(last) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return {**seconds, MEMORY: float(self._peak())}

    def _peak(self) -> int:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        kib = 1 if sys.platform == "darwin" else 1024  # bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def timings(ranks: Sequence[Mapping[str, float]], steps: int) -> dict[str, float | int]:
    """Metrics of a log line from the `take` of each rank, over `steps` steps.

    All ranks wait for the slowest one, so seconds and memory are the largest of any rank. The
    slowest rank is the one with the longest forward passes, which wait for no other rank.
    """
    largest = {
        part: max(rank.get(part, 0.0) for rank in ranks)
        for part in (DATA, EVALUATION, CHECKPOINT, MEMORY)
    }
    metrics: dict[str, float | int] = {
        "data_wait_s": largest[DATA] / steps,
        "memory_gib": largest[MEMORY] / 2**30,
    }
    for part in (EVALUATION, CHECKPOINT):
        if largest[part]:
            metrics[f"{part}_s"] = largest[part]
    forward = [rank.get(FORWARD, 0.0) for rank in ranks]
    if len(ranks) > 1 and (usual := statistics.median(forward)):
        slowest = max(range(len(ranks)), key=forward.__getitem__)
        metrics |= {"slowest_rank": slowest, "slowest_rank_ratio": forward[slowest] / usual}
    return metrics
