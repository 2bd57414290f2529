"""Which samples advance next: admission, deadlines and fairness. Pure Python, without tensors.

Time is counted in sample-steps: denoising steps, summed over samples. A sample's deadline is its
submit time plus DEADLINE_STRETCH x its steps. The earliest deadline goes first, so that short
samples overtake long ones, and nothing starves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

DEADLINE_STRETCH = 3


@dataclass(eq=False, kw_only=True)
class ScheduledSample:
    """The part of a sample's state that scheduling reads."""

    steps: int  # total number of denoising steps
    group: str | None = None  # samples of a group are scheduled as if they were one sample
    steps_left: int = field(init=False)
    ticket: int = field(init=False, default=0)  # number, set by `Scheduler.submit`
    deadline: float = field(init=False, default=0.0)  # in sample-steps, set by `Scheduler.submit`

    def __post_init__(self) -> None:
        self.steps_left = self.steps


S = TypeVar("S", bound=ScheduledSample)


class Scheduler(Generic[S]):
    """Queues samples, admits at most `max_in_flight`, and advances at most `width` of them a step.

    Not thread-safe, except for reading the counters and lengths.
    """

    def __init__(self, max_in_flight: int, width: int):
        self.max_in_flight, self.width = max_in_flight, width
        self.steps_done = 0
        self.sample_steps_done = 0  # denoising steps, summed over samples
        self._waiting: list[S] = []  # by deadline
        self._active: list[S] = []  # by admission
        self._tickets = 0

    @property
    def in_flight(self) -> int:
        return len(self._active)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> set[int]:
        """Tickets of the queued samples."""
        return {sample.ticket for sample in self._waiting}

    def submit(self, sample: S) -> int:
        """Queue a sample and return its ticket.

        A group's samples count as one: the deadline also allows for the group's remaining steps.
        """
        group_steps = sum(
            other.steps_left
            for other in (*self._active, *self._waiting)
            if sample.group is not None and other.group == sample.group
        )
        self._tickets += 1
        sample.ticket = self._tickets
        sample.deadline = self.sample_steps_done + DEADLINE_STRETCH * (group_steps + sample.steps)
        self._waiting.append(sample)
        self._waiting.sort(key=_deadline)
        return sample.ticket

    def cancel(self, ticket: int) -> bool:
        """Drop a sample, queued or in flight. Returns False if there is none with this ticket."""
        before = self.queued + self.in_flight
        self._waiting = [sample for sample in self._waiting if sample.ticket != ticket]
        self._active = [sample for sample in self._active if sample.ticket != ticket]
        return self.queued + self.in_flight < before

    def admit(self) -> S | None:
        """Move the first queued sample into flight and return it. None: queue empty, or no room."""
        if not self._waiting or self.in_flight >= self.max_in_flight:
            return None
        self._active.append(self._waiting.pop(0))
        return self._active[-1]

    def next_samples(self) -> list[S]:
        """The samples in flight that the next step advances: the `width` earliest deadlines."""
        if self.in_flight <= self.width:
            return list(self._active)
        return sorted(self._active, key=_deadline)[: self.width]

    def complete(self, samples: Sequence[S]) -> None:
        """Count a step of these samples, and remove those that have no steps left."""
        for sample in samples:
            sample.steps_left -= 1
        self.steps_done += 1
        self.sample_steps_done += len(samples)
        self._active = [sample for sample in self._active if sample.steps_left]


def _deadline(sample: ScheduledSample) -> float:
    return sample.deadline
