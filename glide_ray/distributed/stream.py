"""A corpus as a Ray Dataset, with rows as `data/transforms.py` expects them.

Only encoded images move through Ray's object store: the worker that trains on them decodes them.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import ray
import ray.data
from ray.exceptions import RayError

from ..data.credits import Credits
from ..data.filters import Candidate, Report, first_broken, header_rules
from ..data.sample import Sample, ShardError, in_groups
from ..data.sources import (
    Part,
    columns,
    find_parts,
    folder_name,
    in_share,
    read_part,
    row_id,
    share_of,
)
from ..errors import UserError
from .actors import Actor

ROWS_PER_BLOCK, ROWS_PER_TASK = 64, 4096
# A block of pictures, and a shuffle window, end early at these bytes: large photos must not fill
# the memory. Pictures of 128 kB on average fill a window of 2,048 rows.
BLOCK_BYTES, WINDOW_BYTES = 2**24, 2**28
MAX_DEATHS = 3  # deaths of its process at a part, before a task leaves the part out


@dataclass(frozen=True)
class Plan:
    """Reading order of an epoch, and the share of the rows of a folder or group that it reads.

    Parts are shuffled by seed and epoch, the rows of each task within windows.
    """

    seed: int
    epoch: int
    window: int  # rows; it ends earlier at WINDOW_BYTES
    first: int = 0  # task to start from
    shares: Mapping[str, float] = field(default_factory=dict)  # as DataConfig.shares

    def reads(self, part: Part, sample: Sample) -> bool:
        """Whether the epoch reads this row of a part."""
        share = part.share * share_of(self.shares, folder_name(part), sample)
        return in_share(sample.key, self.epoch, self.seed, share)


def open_corpus(
    path: str, min_size: int, tally=None, column: str | None = None
) -> ray.data.Dataset:
    """Stream a corpus in its own order, without rows that break a rule.

    `tally`: a `Tally` actor, which counts them. `column`: the field or column of captions. Raises
    ShardError for an empty corpus.
    """
    return open_parts(find_parts(path, column), min_size, tally)


def open_parts(
    parts: Sequence[Part], min_size: int, tally=None, plan: Plan | None = None
) -> ray.data.Dataset:
    """Stream parts as `open_corpus` does, in the order of `plan` if there is one."""
    tasks, first = tasks_for(parts), plan.first if plan else 0
    order = (
        np.random.default_rng([plan.seed, plan.epoch]).permutation(len(parts))
        if plan
        else np.arange(len(parts))
    )
    own = [(task, [parts[n] for n in order[task::tasks]]) for task in range(first, tasks)]
    dataset = each_alone(own).map_batches(
        _read_task, batch_size=1, fn_kwargs={"min_size": min_size, "tally": tally, "plan": plan}
    )
    dataset.context.execution_options.preserve_order = plan is not None
    return dataset


def each_alone(items: Sequence[Any]) -> ray.data.Dataset:
    """A dataset with a block for each item, so that a task receives only its own.

    `its_own` gives the item of a batch of one row.
    """
    rows = [{"item": pickle.dumps(item)} for item in items]
    return ray_data().from_items(rows, override_num_blocks=max(1, len(rows)))


def its_own(batch: dict[str, np.ndarray]) -> Any:
    [item] = batch["item"]
    return pickle.loads(item)


def _read_task(
    batch: dict[str, np.ndarray], min_size: int, tally, plan: Plan | None
) -> Iterator[dict[str, list]]:
    task, parts = its_own(batch)
    report, credits = Report(), Credits()
    rows = (
        row for part in parts for row in _kept_rows(part, min_size, report, plan, tally, credits)
    )
    yield from shuffled_blocks(
        rows, [plan.seed, plan.epoch, task] if plan else None, plan.window if plan else 0
    )
    if tally is not None:
        of_epoch = (plan.epoch, task) if plan else None
        ray.get(tally.add.remote(report, of_epoch, None if plan else credits.as_json()))


def tasks_for(parts: Sequence[Part]) -> int:
    """Number of reading tasks: one per part, except that small parts share a task and its cost."""
    counts = [part.count or ROWS_PER_TASK for part in parts]
    return max(1, min(len(parts), sum(counts) // ROWS_PER_TASK))


def ray_data():
    """`ray.data` with its progress bars disabled."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data


def _kept_rows(
    part: Part, min_size: int, report: Report, plan: Plan | None, tally, credits: Credits
) -> Iterator[tuple[int, Sample]]:
    """(id, row) of the rows of a part that the plan reads and that break no rule.

    `credits` are counted without a plan, that is in a survey and not in training.
    """
    rules = header_rules(min_size)
    try:
        begin_part(tally, part.url)
        for position, sample in enumerate(read_part(part)):
            if plan is not None and not plan.reads(part, sample):
                continue
            reason = first_broken(Candidate(sample), rules)
            report.add(sample.key, reason, sample.captions_unread)
            if reason is None:
                if plan is None:
                    credits.add(sample.meta)
                yield row_id(part.url, position), sample
    except UserError as error:
        report.faults.append(str(error))
    finally:
        end_part(tally, part.url)


def begin_part(tally, url: str) -> None:
    """Count that this task begins to read a part, before `end_part`.

    Ray runs a task again whose process died, as often as it takes. Raises ShardError if this task
    has died at the part MAX_DEATHS times: a picture may crash a decoder or take all memory.
    `tally`: a `Tally` actor, or None to count nothing.
    """
    if tally is None:
        return
    task = ray.get_runtime_context().get_task_id()
    if ray.get(tally.begin.remote(task, url)) > MAX_DEATHS:
        raise ShardError(
            f"{url} ended the process that read it {MAX_DEATHS} times; it is left out. A picture "
            "or a rule crashes it, or takes all memory."
        )


def end_part(tally, url: str) -> None:
    """Count that this task has read a part, or has left it."""
    if tally is not None:
        tally.end.remote(ray.get_runtime_context().get_task_id(), url)


def shuffled_blocks(
    rows: Iterator[tuple[int, Sample]], seed: list[int] | None, window: int
) -> Iterator[dict[str, list]]:
    """Rows in blocks of columns; `seed` shuffles the rows within each window."""
    if not seed or not window:
        yield from map(columns, in_groups(rows, ROWS_PER_BLOCK, BLOCK_BYTES, _bytes))
        return
    windows = in_groups(rows, max(ROWS_PER_BLOCK, window), WINDOW_BYTES, _bytes)
    for number, held in enumerate(windows):
        order = np.random.default_rng([*seed, number]).permutation(len(held))
        shuffled = (held[n] for n in order.tolist())
        yield from map(columns, in_groups(shuffled, ROWS_PER_BLOCK, BLOCK_BYTES, _bytes))
        held.clear()  # before the next window is read


def _bytes(row: tuple[int, Sample]) -> int:
    return row[1].bytes


def in_order(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """Concatenate the tables of tasks, sorted by the part and position of their first rows.

    Rows within a table are in corpus order already. Sorting all rows instead would copy them, and
    fails for a text column of more than 2 GiB.
    """
    filled = [table for table in tables if len(table)]
    return pyarrow.concat_tables(
        sorted(filled, key=lambda table: (table["part"][0].as_py(), table["position"][0].as_py()))
        or tables[:1]
    )


@contextmanager
def task_errors() -> Iterator[None]:
    """Re-raise a UserError wrapped in a RayError, such as RayTaskError, as a plain UserError."""
    try:
        yield
    except RayError as error:
        cause: Any = error
        while cause is not None and not isinstance(cause, UserError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise UserError(str(cause).splitlines()[-1]) from None


@ray.remote(num_cpus=0)
class Tally(Actor):
    """Count rows kept and dropped by all tasks of a stream, and kept by each task of an epoch."""

    def __init__(self):
        self._report, self._credits, self._counts = Report(), Credits(), {}
        self._begun: Counter[tuple[str | None, str]] = Counter()  # (task, part) -> times

    def begin(self, task: str | None, url: str) -> int:
        """Times that a task has begun to read a part, without an end."""
        self._begun[task, url] += 1
        return self._begun[task, url]

    def end(self, task: str | None, url: str) -> None:
        self._begun.pop((task, url), None)

    def add(
        self,
        report: Report,
        task: tuple[int, int] | None = None,
        credits: Mapping[str, Any] | None = None,
    ) -> None:
        self._report.merge(report)
        if credits is not None:
            self._credits.merge(credits)
        if task is not None:
            self._counts[task] = report.kept

    def restore_counts(self, epoch: int, counts: Mapping[int, int]) -> None:
        """Add the counts of an earlier run."""
        self._counts = {(epoch, task): count for task, count in counts.items()} | self._counts

    def report(self) -> Report:
        return self._report

    def credits(self) -> Credits:
        return self._credits

    def counts(self, epoch: int) -> dict[int, int]:
        """Task -> rows kept, for the tasks of an epoch that have ended."""
        return {task: count for (of, task), count in self._counts.items() if of == epoch}
