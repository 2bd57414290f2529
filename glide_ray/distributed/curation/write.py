"""Last stages of `glide clean` and `glide filter apply`: shards, lists of dropped rows, index.

A task reads some consecutive parts once and writes their kept rows as shards, of `per_shard` rows
except the last. Its entry, written last, names the shards; a run that resumes skips the task if
they have the size in the entry.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import ray

from ... import storage
from ...data.credits import Credits
from ...data.filters import Report
from ...data.readers.fetch import CHANGED
from ...data.shards import Sample, ShardEntries, finish, in_batches, write_shard
from ...data.sources import Part, read_part
from ...errors import UserError
from ...progress import bar
from ...s3 import ChangedError
from ..rows import DROPPED, SUMMARY, Captions, carry_card
from .judge import RESULT, Judged, PartResult, etags_of, judged_file, state_of
from .run_folder import PLAN, RunFolder
from .search import Search, dropped_copies
from .tables import load, save
from .tasks import run_each

CREDITS = b"credits"  # key of the counts by licence in the metadata of a file of dropped rows
READERS = 16  # files of dropped rows that are read ahead
DROPPED_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("part", pyarrow.large_string()),
        ("position", pyarrow.int32()),
        ("reason", pyarrow.large_string()),
        ("kept_instead", pyarrow.large_string()),
    ]
)


@dataclass(frozen=True)
class Writing:
    """What all tasks of writing share."""

    out: str
    judged: str  # folder of the judged files
    folder: str  # folder of the entries
    per_shard: int
    searches: Sequence[Search]  # for duplicates
    captions: Captions | None  # edits the captions of a row


def write_rows(
    parts: Sequence[Part], judged: Judged, run: RunFolder, writing: Writing
) -> tuple[ShardEntries, list[str], int]:
    """Write the kept rows. Returns the entries of the shards, messages on faults, and the tasks."""
    starts, shards = plan_tasks(judged.kept, writing.per_shard)
    plan = json.dumps({"shards": int(shards[-1])}).encode()
    storage.put(plan, f"{run.work}/{PLAN}")
    shared = ray.put(writing)
    arguments = (
        (number, int(first), list(parts[first:last]), judged.kept[first:last], int(shard), shared)
        for number, (first, last, shard) in enumerate(
            zip(starts[:-1], starts[1:], shards[:-1], strict=True)
        )
    )
    written = ShardEntries(int(shards[-1]))
    faults: list[tuple[int, str]] = []
    with bar("write", "row", int(judged.kept.sum())) as progress:
        for number, entries, messages in run_each(_write_parts, arguments):
            for entry in entries:
                written.add(entry)
            faults += [(number, message) for message in messages]
            progress.update(sum(entry["count"] for entry in entries))
    return written, [message for _, message in sorted(faults)], len(starts) - 1


def plan_tasks(kept: np.ndarray, per_shard: int) -> tuple[np.ndarray, np.ndarray]:
    """First parts of the tasks and the number of parts; first shards of them, and the shards.

    A task has the parts of one shard, or a part that makes several.
    """
    starts, shards, rows, shard = array("q", [0]), array("q", [0]), 0, 0
    for part, count in enumerate(kept.data):
        if rows and rows + count > per_shard:
            shard += -(-rows // per_shard)
            starts.append(part)
            shards.append(shard)
            rows = 0
        rows += count
    starts.append(len(kept))
    shards.append(shard + -(-rows // per_shard))
    return np.asarray(starts), np.asarray(shards)


def _write_parts(
    number: int,
    first: int,
    parts: Sequence[Part],
    kept: np.ndarray,
    shard: int,
    writing: Writing,
) -> tuple[int, list[dict[str, Any]], list[str]]:
    """(number, entries of the shards, faults) of one task; `shard`: number of its first shard."""
    entry = f"{writing.folder}/entries/{number:06d}.json"
    earlier = _whole_entry(entry, writing.out)
    if earlier is not None:
        return number, earlier["shards"], earlier["faults"]
    faults: list[str] = []
    lists: list[pyarrow.Table] = []
    credits = Credits()

    def rows() -> Iterator[Sample]:
        for place, part in enumerate(parts):
            table, state = _with_copies(writing, first + place, part)
            lists.append(_dropped_rows(table, part))
            samples = _kept_samples(table, part, state, int(kept[place]), writing.captions, faults)
            for sample in samples:
                credits.add(sample.meta)
                yield sample

    shards = [
        write_shard(writing.out, shard + n, some)
        for n, some in enumerate(in_batches(rows(), writing.per_shard))
    ]
    counts = json.dumps(credits.as_json()).encode()
    dropped = pyarrow.concat_tables(lists).replace_schema_metadata({CREDITS: counts})
    save(dropped, _dropped_file(writing, number))
    storage.put(json.dumps({"shards": shards, "faults": faults}).encode(), entry)
    return number, shards, faults


def _whole_entry(path: str, out: str) -> dict[str, Any] | None:
    """The entry of a task whose shards are there with their sizes, else None."""
    try:
        entry = json.loads(storage.read(path))
        sizes = [storage.size(f"{out}/{shard['name']}") for shard in entry["shards"]]
    except storage.MissingError:
        return None
    whole = sizes == [shard["bytes"] for shard in entry["shards"]] and not entry["faults"]
    return entry if whole else None


def _dropped_file(writing: Writing, number: int) -> str:
    return f"{writing.folder}/dropped/{number:06d}.parquet"


def _with_copies(writing: Writing, number: int, part: Part) -> tuple[pyarrow.Table, str]:
    """Key, reason and key of the row kept instead of each row of a part, and the part's state.

    Raises UserError if the part has changed since it was judged.
    """
    table = load(judged_file(writing.judged, number), ["key", "reason"])
    result = PartResult(**json.loads(table.schema.metadata[RESULT]))
    if result.state and state_of(part) not in (result.state, ""):
        raise _changed(part)
    reason, instead = table["reason"].to_pylist(), [None] * len(table)
    for search in writing.searches:
        copies = dropped_copies(search, number)
        for position, key in zip(
            copies["position"].to_pylist(), copies["kept_key"].to_pylist(), strict=True
        ):
            reason[position], instead[position] = search.reason, key
    columns = {
        "key": table["key"],
        "position": np.arange(len(table), dtype=np.int32),
        "reason": pyarrow.array(reason, pyarrow.large_string()),
        "kept_instead": pyarrow.array(instead, pyarrow.large_string()),
    }
    return pyarrow.table(columns), result.state


def _changed(part: Part) -> UserError:
    return UserError(f"{part.url} has changed since it was judged; run the same command again.")


def _dropped_rows(table: pyarrow.Table, part: Part) -> pyarrow.Table:
    rows = table.filter(pyarrow.compute.not_equal(table["reason"], ""))
    url = pyarrow.array([part.url] * len(rows), pyarrow.large_string())
    return rows.append_column("part", url).select(DROPPED_SCHEMA.names).cast(DROPPED_SCHEMA)


def _kept_samples(
    table: pyarrow.Table,
    part: Part,
    state: str,
    kept: int,
    captions: Captions | None,
    faults: list[str],
) -> Iterator[Sample]:
    """Kept rows of a part. Raises UserError if an object has changed since it was judged."""
    wanted = set(np.flatnonzero(pyarrow.compute.equal(table["reason"], "").to_numpy()).tolist())
    last, found = max(wanted, default=-1), 0
    try:
        rows = read_part(part, etags_of(part, state)) if wanted else ()
        for position, sample in enumerate(rows):
            if CHANGED in (sample.no_image, sample.no_caption):
                raise ChangedError(sample.key)
            if position in wanted and sample.image:
                found += 1
                yield (
                    sample
                    if captions is None
                    else replace(sample, captions=captions(sample.captions))
                )
            if position == last:
                break
    except ChangedError:
        raise _changed(part) from None
    except UserError:  # the missing rows are counted
        pass
    if found < kept:
        faults.append(f"{kept - found} rows of {part.url} were missing when it was read again.")


# -- finish ----------------------------------------------------------------------------------------


def finish_corpus(
    parts: Sequence[Part],
    judged: Judged,
    report: Report,
    writing: Writing,
    tasks: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write DROPPED, SUMMARY with `about`, and the data card; the index is still to be written.

    Returns the card: that of the source corpus, if it has one, with counts of the written rows.
    """
    credits = Credits()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / DROPPED
        with pyarrow.parquet.ParquetWriter(whole, DROPPED_SCHEMA) as writer:
            for table in _in_order(range(tasks), lambda n: load(_dropped_file(writing, n))):
                # absent if an earlier version began this run
                if (counts := (table.schema.metadata or {}).get(CREDITS)) is not None:
                    credits.merge(json.loads(counts))
                if len(table):
                    writer.write_table(table.cast(DROPPED_SCHEMA))
        storage.put(whole, f"{writing.out}/{DROPPED}")
    summary = {
        **about,
        "read": int(judged.read.sum()),
        "kept": report.kept,
        "dropped": dict(report.dropped),
        "faults": report.faults,
    }
    content = json.dumps(summary, indent=1, ensure_ascii=False).encode()
    storage.put(content, f"{writing.out}/{SUMMARY}")
    description = (
        f"Rows of {about['source']}; the json of each row names its source, licence and author."
    )
    return carry_card(parts, writing.out, credits, description)


def close(run: RunFolder, entries: ShardEntries) -> dict[str, Any]:
    """Write the index and delete the files of the run. Returns the index."""
    run.check()
    run.stop()
    return finish(run.out, entries)


def _in_order(numbers: Sequence[int], read: Callable[[int], pyarrow.Table]) -> Iterator[Any]:
    """Results of `read` in order, some read ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(numbers), READERS):
            yield from pool.map(read, numbers[start : start + READERS])
