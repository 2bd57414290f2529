"""Goodput of a run: seconds in steps that were kept, as a share of all seconds since its start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

LOST, ERROR, MEMORY, NODES = "worker lost", "error", "out of memory", "nodes returned"


@dataclass(frozen=True)
class Outage:
    """A time without steps.

    `detect`: seconds until it was noticed; `recover`: seconds from then to the next step. `steps`:
    steps that were repeated.
    """

    cause: str
    steps: int
    detect: float
    recover: float = 0.0


class Goodput:
    """Counts the seconds of one process's part of a run."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # last step of a log line -> seconds in its steps
        self.outages: list[Outage] = []

    def add_steps(self, last: int, seconds: float) -> None:
        """Count the steps of a log line, up to step `last`."""
        self._seconds[last] = seconds

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they are made again."""
        self._seconds = {last: one for last, one in self._seconds.items() if last <= step}

    def share(self, wall: float) -> float:
        return sum(self._seconds.values()) / max(wall, 1e-9)

    def sentence(self, wall: float) -> str:
        """One line, after `wall` seconds."""
        text = (
            f"goodput {self.share(wall):.0%}: {sum(self._seconds.values()):,.0f} s in steps that "
            f"were kept, of {wall:,.0f} s"
        )
        causes: dict[str, list[Outage]] = defaultdict(list)
        for outage in self.outages:
            causes[outage.cause].append(outage)
        return "; ".join([text, *(_of_cause(cause, some) for cause, some in causes.items())])


def _of_cause(cause: str, outages: Sequence[Outage]) -> str:
    count = len(outages)
    detect, recover = (
        sum(getattr(one, name) for one in outages) / count for name in ("detect", "recover")
    )
    steps = sum(one.steps for one in outages)
    return (
        f"{cause} {count:,} {'time' if count == 1 else 'times'}: {detect:.1f} s to detect, "
        f"{recover:.1f} s to recover, {steps:,} {'step' if steps == 1 else 'steps'} repeated"
    )
