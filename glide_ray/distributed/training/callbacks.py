"""Callbacks in Ray Train's controller: checkpoints before growth, and what follows a failure."""

from __future__ import annotations

import re
import time
from collections import deque

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.callback import UserCallback

from ...train.checkpoint_writer import CHANGE
from ...train.run_folder import TRACE
from .goodput import ERROR, LOST, MEMORY
from .journal import count

# seconds without a step after which workers are taken to hang, and get no time for a checkpoint
RESIZE_SILENCE_SECONDS = 300
WINDOW_SECONDS = 3600.0  # only failures within this time count for `max_failures`
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError", re.IGNORECASE)


class CheckpointBeforeResize(ControllerCallback):
    """Callback in Ray Train's controller, which otherwise ends workers between two checkpoints."""

    def __init__(self, board):
        self._board = board

    def before_controller_execute_resize_decision(self, resize_decision) -> None:
        if not ray.get(self._board.notify.remote(CHANGE)):
            return  # the first start, or one after a failure
        self._board.add_event.remote("the number of nodes changes; writing a checkpoint")
        while (silence := ray.get(self._board.seconds_since_beat.remote())) is not None:
            if silence > RESIZE_SILENCE_SECONDS:
                return
            time.sleep(0.2)


class FailureHistory:
    """Failures of a run, and whether it is worth another start."""

    def __init__(self, max_failures: int):
        self._max_failures = max_failures  # -1: unlimited
        self._times: deque[float] = deque()
        self._last: tuple[int, str] | None = None  # step and text of the last error

    def verdict(self, step: int, text: str, is_error: bool, now: float) -> str | None:
        """A sentence if the run must end, after a failure at `step`, at `now` seconds.

        `is_error`: the workers raised `text`, as opposed to being killed. An error that two starts
        raise at one step would be raised by all.
        """
        self._times.append(now)
        while now - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        repeated = is_error and self._last == (step, text)
        self._last = (step, text) if is_error else None
        if repeated:
            return f"Two starts have failed after step {step:,} with the same error: {text}"
        if 0 <= self._max_failures < len(self._times):
            return (
                f"The workers have failed {count(len(self._times), 'time')} within "
                f"{WINDOW_SECONDS / 3600:g} h, more than train.max_failures; the last time: {text}"
            )
        return None


class FailureWatch(UserCallback):
    """Reports failures of workers to the board, and ends runs that cannot succeed.

    After an error for lack of GPU memory, the next start halves the micro-batch.
    """

    def __init__(self, board, max_failures: int):
        self._board, self._history = board, FailureHistory(max_failures)

    def after_exception(self, run_context, worker_exceptions: dict[int, Exception]) -> None:
        step, cause = ray.get(self._board.step.remote()), ERROR
        # When a worker dies, the others fail in their common collective: report only the dead.
        dead = {
            rank: why
            for rank, error in worker_exceptions.items()
            if (why := _cause_of_death(error)) is not None
        }
        if dead:
            rank, why = min(dead.items())
            others = f" and {count(len(dead) - 1, 'other')}" if len(dead) > 1 else ""
            text, cause = f"the worker of rank {rank}{others} was lost: {why}", LOST
        else:
            rank, trace = self._first_error(worker_exceptions)
            lines = [line.strip() for line in trace.splitlines() if line.strip()]
            text = f"rank {rank} failed: {lines[-1][:300]}"
            if OUT_OF_MEMORY.search(trace) and (half := ray.get(self._board.halve.remote())):
                cause = MEMORY
                text += f" The next start has micro-batches of {count(half, 'image')}."
        ray.get([self._board.lost.remote(cause), self._board.add_event.remote(text)])
        sentence = self._history.verdict(step, text, not dead, time.monotonic())
        if sentence is not None:
            if not dead:
                sentence += f" {TRACE} in the folder of the run has the traceback."
            ray.get(self._board.fail.remote(sentence, rank, "" if dead else trace))

    def _first_error(self, worker_exceptions: dict[int, Exception]) -> tuple[int, str]:
        """Rank and traceback of the first rank; of one without memory, if there is one.

        The other ranks then fail in their common collective.
        """
        traces = ray.get(self._board.traces.remote())
        found = {
            rank: traces.get(rank) or f"{type(error).__name__}: {error}"
            for rank, error in worker_exceptions.items()
        }
        starved = {rank: trace for rank, trace in found.items() if OUT_OF_MEMORY.search(trace)}
        return min((starved or found).items())


def _cause_of_death(error: Exception) -> str | None:
    """How a worker's process ended; None if it raised an error and is alive."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "neither it nor its node can be reached"
    if not isinstance(error, ray.exceptions.RayActorError):
        return None
    detail = (
        str(error).partition("Worker exit detail:")[2].partition("Some common causes")[0].strip()
        or str(error).splitlines()[0]
    )
    return f"its process has ended ({detail.rstrip('.')})"
