"""Selected rows of a corpus: read them, and write them as a new corpus with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import ray

from .. import storage
from ..data.card import read_card, write_card
from ..data.filters import Report
from ..data.shards import Sample, begin, finish, write_shard
from ..data.sources import Part, read_part
from ..errors import ConfigError, UserError
from .stream import ray_data, task_errors

# files beside the shards of a corpus that was written from another one
DROPPED, SUMMARY, PAGE = "dropped.parquet", "summary.json", "report.html"


RECORD = "filter.json"  # record of the filter job that wrote the corpus, see jobs/filter.py


# edits the captions of one row
Captions = Callable[[Sequence[str]], tuple[str, ...]]


def refuse_source(source: str, parts: Sequence[Part], out: str) -> None:
    """Raise ConfigError if `out` is the corpus that is read, or the folder of one of its shards."""
    folders = {source, *(part.url.rpartition("#" if part.files else "/")[0] for part in parts)}
    if any(storage.same_place(folder, out) for folder in folders):
        raise ConfigError(f"--out {out} is the corpus to read; write to another folder.")


def rewrite(
    parts: Sequence[Part],
    part: np.ndarray,
    position: np.ndarray,
    out: str,
    per_shard: int,
    captions: Captions | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Write selected rows, in the order listed, as shards of `per_shard` rows in `out`.

    `part` (N,) and `position` (N,): number of the part, and of the row within it. `captions` edits
    the captions of each row. Returns the index, and messages about parts that could not be read
    again.
    """
    shared, out = ray.put(list(parts)), storage.absolute(out)
    rows = np.stack([part, position], axis=1).astype(np.int64)
    chunks = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]

    def write(batch: dict[str, np.ndarray]) -> dict[str, list]:
        shards = []
        for number in batch["item"]:
            samples, faults = _pick(ray.get(shared), ray.get(wanted[int(number)]))
            if captions is not None:
                samples = [
                    replace(sample, captions=captions(sample.captions)) for sample in samples
                ]
            entry = write_shard(out, int(number), samples) if samples else None
            shards.append(json.dumps([int(number), entry, faults]))
        return {"shards": shards}

    begin(out)
    storage.remove(f"{out}/{RECORD}")  # describes the rows that are overwritten
    wanted = [ray.put(chunk) for chunk in chunks]
    written = _run_for_each(len(chunks), write) if chunks else []
    entries = [entry for _, entry, _ in written if entry]
    return finish(out, entries), [fault for *_, found in written for fault in found]


def _run_for_each(
    count: int, write: Callable[[dict[str, np.ndarray]], dict[str, list]]
) -> list[list]:
    """Results of `write` for the numbers 0 to `count` - 1, in this order, by Ray tasks."""
    written = (
        ray_data()
        .from_items(list(range(count)), override_num_blocks=count)
        .map_batches(write, batch_size=1)
    )
    with task_errors():
        return sorted(
            json.loads(str(line))
            for batch in written.iter_batches(batch_size=None)
            for line in batch["shards"]
        )


def replace_reasons(rows: pyarrow.Table, reasons: np.ndarray) -> pyarrow.Table:
    """The table with the column `reason` replaced by `reasons` (N,) of str."""
    return rows.set_column(
        rows.schema.get_field_index("reason"),
        "reason",
        pyarrow.array(reasons.tolist(), pyarrow.large_string()),
    )


def count(rows: pyarrow.Table, index: Mapping[str, Any], faults: Sequence[str]) -> Report:
    """Report of kept and dropped `rows` after writing; the `reason` of a kept row is ""."""
    report = Report(faults=list(faults))
    for key, reason in zip(rows["key"].to_pylist(), rows["reason"].to_pylist(), strict=True):
        report.add(key, reason or None)
    # Fewer than were selected, if a part could not be read the second time.
    report.kept = index["count"]
    return report


def write_manifest(
    out: str,
    parts: Sequence[Part],
    rows: pyarrow.Table,
    report: Report,
    about: Mapping[str, Any],
    kept_copy: np.ndarray | None = None,
) -> None:
    """Write DROPPED, SUMMARY and the data card to `out`.

    DROPPED has a row with the reason for each row left out, SUMMARY the counts and `about`. The
    card is that of the source corpus, if it has one. `kept_copy` (N,): index of the row kept
    in place of a near-duplicate, or -1.
    """
    keys, out = rows["key"].to_pylist(), out.rstrip("/")
    kept_of = np.full(len(keys), -1) if kept_copy is None else kept_copy
    left_out = pyarrow.table(
        {
            "key": keys,
            "part": [parts[n].url for n in rows["part"].to_pylist()],
            "position": rows["position"],
            "reason": rows["reason"],
            "kept_instead": pyarrow.array(
                [keys[n] if n >= 0 else None for n in kept_of], pyarrow.string()
            ),
        }
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        left_out.filter(pyarrow.compute.not_equal(left_out["reason"], "")), sink
    )
    storage.put(sink.getvalue().to_pybytes(), f"{out}/{DROPPED}")
    summary = {
        **about,
        "read": len(rows),
        "kept": report.kept,
        "dropped": dict(report.dropped),
        "faults": report.faults,
    }
    storage.put(json.dumps(summary, indent=1, ensure_ascii=False).encode(), f"{out}/{SUMMARY}")
    _carry_card(parts, out, report.kept)


def _carry_card(parts: Sequence[Part], out: str, rows: int) -> None:
    """Write the data card of the folders of `parts` to `out`, with the sources of all of them.

    Dropping rows does not change who must be credited.
    """
    folders = dict.fromkeys(part.url.rpartition("/")[0] for part in parts if not part.files)
    cards = [card for folder in folders if (card := read_card(folder))]
    if cards:
        sources = [source for card in cards for source in card.get("sources", ())]
        unique = [source for n, source in enumerate(sources) if source not in sources[:n]]
        write_card(out, {**cards[0], "sources": unique, "rows": rows})


def read_rows(
    parts: Sequence[Part], rows: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Sample]:
    """Samples by (part, position), without those that cannot be read."""

    @ray.remote
    def pick(part: Part, positions: list[int]) -> list[tuple[int, Sample]]:
        return list(_chosen(part, positions))

    by_part: dict[int, list[int]] = {}
    for part, position in rows:
        by_part.setdefault(int(part), []).append(int(position))
    found = ray.get([pick.remote(parts[part], positions) for part, positions in by_part.items()])
    return {
        (part, position): sample
        for part, samples in zip(by_part, found, strict=True)
        for position, sample in samples
    }


def _pick(parts: Sequence[Part], rows: np.ndarray) -> tuple[list[Sample], list[str]]:
    """Samples at (part, position) of `rows` (N, 2), part by part, and messages on missing rows."""
    samples, faults = [], []
    for number in dict.fromkeys(rows[:, 0].tolist()):
        positions = rows[rows[:, 0] == number, 1].tolist()
        found = [sample for _, sample in _chosen(parts[number], positions)]
        if len(found) < len(positions):
            faults.append(
                f"{len(positions) - len(found)} rows of {parts[number].url} were missing when it "
                "was read again."
            )
        samples += found
    return samples, faults


def _chosen(part: Part, positions: Sequence[int]) -> Iterator[tuple[int, Sample]]:
    wanted, last = set(positions), max(positions)
    try:
        for position, sample in enumerate(read_part(part)):
            if position in wanted:
                yield position, sample
            if position == last:
                return
    except UserError:  # callers count the missing rows
        return
