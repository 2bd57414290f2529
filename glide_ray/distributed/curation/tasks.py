"""Many tasks of one kind with few in flight, so that the driver's memory does not grow.

Ray Data keeps metadata of every block in the driver, and repeats for ever a task that kills its
worker. Here a task that kills its worker TRIES times is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
)

from ...errors import UserError
from ..stream import task_errors

TRIES = 3
DEATHS = (
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    ActorDiedError,
    ActorUnavailableError,
)


def run_each(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    died: Callable[[tuple[Any, ...]], Any] | None = None,
) -> Iterator[Any]:
    """Results of `function` for each tuple of arguments, as tasks end.

    `died`: result for arguments with which the worker died TRIES times; without it, UserError.
    """
    task = ray.remote(max_retries=TRIES - 1)(function)
    slots = 2 * max(1, int(ray.cluster_resources().get("CPU", 1))) + 2
    yield from run_on([task] * slots, arguments, died)


def run_on(
    callees: Sequence[Any],
    arguments: Iterable[tuple[Any, ...]],
    died: Callable[[tuple[Any, ...]], Any] | None = None,
) -> Iterator[Any]:
    """Like `run_each`, with a task or an actor's method for each of the calls in flight."""
    rest, free = iter(arguments), list(callees)
    running: dict[ray.ObjectRef, tuple[Any, tuple[Any, ...]]] = {}
    try:
        while True:
            while free and (chosen := next(rest, None)) is not None:
                callee = free.pop()
                running[callee.remote(*chosen)] = callee, chosen
            if not running:
                return
            [ready], _ = ray.wait(list(running), num_returns=1)
            callee, chosen = running.pop(ready)
            free.append(callee)
            yield _result(ready, chosen, died)
    finally:
        for ref in running:
            ray.cancel(ref)


def _result(ref: ray.ObjectRef, of: tuple[Any, ...], died: Callable[..., Any] | None) -> Any:
    try:
        with task_errors():
            return ray.get(ref)
    except DEATHS:
        if died is None:
            raise UserError(
                f"The worker of a task died {TRIES} times; it may need more memory than there is."
            ) from None
        return died(of)
