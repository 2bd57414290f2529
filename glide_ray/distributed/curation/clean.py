"""`glide clean`: judge every row of a corpus, drop near-duplicates, write the other rows as shards.

Near-duplicates are searched across the whole corpus. The corpus is read twice, once to judge and
once to copy: in between the driver holds 400 bytes per row, and nothing else is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import ray

from ... import storage
from ...config.data import CleanConfig
from ...data.duplicates import FINGERPRINT_BYTES, find_duplicates, fingerprint
from ...data.filters import (
    NEAR_DUPLICATE,
    Candidate,
    Report,
    Rule,
    caption_rules,
    clean_captions,
    exact_reason,
    first_broken,
    image_rules,
)
from ...data.sources import Part, find_parts, read_part
from ...errors import UserError
from ...evaluation.pages import Picture, Section, histogram, page, thumbnail
from ...progress import bar
from ..cluster import connect, ship_modules
from ..rows import PAGE, count, read_rows, refuse_source, replace_reasons, rewrite, write_manifest
from ..stream import Tally, in_order, ray_data, task_errors

log = logging.getLogger(__name__)

# on the report page: parts drawn, near-duplicate pairs, examples of each rule, random kept rows
PAGE_PARTS, PAGE_PAIRS, PAGE_EXAMPLES, PAGE_SAMPLES = 12, 16, 8, 32
SCHEMA = pyarrow.schema(
    [
        ("part", pyarrow.int32()),
        ("position", pyarrow.int32()),
        ("key", pyarrow.large_string()),
        ("reason", pyarrow.large_string()),
        ("caption", pyarrow.large_string()),
        ("captions_dropped", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("bytes", pyarrow.int64()),
        ("fingerprint", pyarrow.binary(FINGERPRINT_BYTES)),
    ]
)


@dataclass(frozen=True)
class CleanResult:
    """Result of `clean`. `rows` (SCHEMA) has every row read; the reason of a kept row is ""."""

    parts: Sequence[Part]
    rows: pyarrow.Table
    # (N,) for a near-duplicate the index of the row kept in its place, -1 for all other rows
    kept_copy: np.ndarray
    report: Report
    captions_dropped: int
    index: Mapping[str, Any]


def clean(
    source: str,
    out: str,
    config: CleanConfig,
    rules: Mapping[str, Rule] | None = None,
) -> CleanResult:
    """Write the rows of `source` that break no rule to `out`, local or s3://, with an index.

    DROPPED lists the rows that were left out, with reasons. `rules` are the user's, applied after
    the built-in ones. Raises UserError.
    """
    parts = find_parts(source, config.caption_column)
    refuse_source(source, parts, out)
    storage.check_writable(out)  # fail before hours of reading
    connect(2)
    ship_modules((rules or {}).values())
    log.info(f"reading {len(parts):,} parts of {source}")
    rows, scanned = scan(parts, config, rules or {})
    reason = np.array(rows["reason"].to_pylist(), object)
    kept_copy = _duplicates(rows, reason) if config.duplicates else np.full(len(rows), -1)
    reason[kept_copy >= 0] = NEAR_DUPLICATE
    rows = replace_reasons(rows, reason)
    kept = np.flatnonzero(reason == "")
    log.info(f"writing {len(kept):,} rows to {out}")
    rules_of_captions = caption_rules(config)
    index, faults = rewrite(
        parts,
        rows["part"].to_numpy()[kept],
        rows["position"].to_numpy()[kept],
        out,
        config.per_shard,
        lambda captions: clean_captions(captions, rules_of_captions)[0],
    )
    report = count(rows, index, [*scanned.faults, *faults])
    captions_dropped = int(np.sum(rows["captions_dropped"].to_numpy()))
    write_manifest(
        out,
        parts,
        rows,
        report,
        {"source": source, "settings": config.model_dump(), "captions_dropped": captions_dropped},
        kept_copy,
    )
    return CleanResult(parts, rows, kept_copy, report, captions_dropped, index)


def _duplicates(rows: pyarrow.Table, reason: np.ndarray) -> np.ndarray:
    """Index (N,) of the row kept in place of each near-duplicate, -1 for all other rows."""
    kept = np.flatnonzero(reason == "")
    log.info(f"looking for near-duplicates among {len(kept):,} images")
    prints = np.frombuffer(b"".join(rows["fingerprint"].take(kept).to_pylist()), np.uint8)
    size = rows["width"].to_numpy()[kept].astype(np.int64) * rows["height"].to_numpy()[kept]
    found = find_duplicates(prints.reshape(len(kept), FINGERPRINT_BYTES), size)
    kept_copy = np.full(len(rows), -1)
    kept_copy[kept] = np.where(found >= 0, kept[found], -1)
    return kept_copy


def scan(
    parts: Sequence[Part], config: CleanConfig, rules: Mapping[str, Rule]
) -> tuple[pyarrow.Table, Report]:
    """Judge every row independently of the others.

    Returns a table of SCHEMA in corpus order, and a report that names the parts with a fault.
    """
    tally, shared = Tally.remote(), ray.put(list(parts))

    def judge(batch: dict[str, np.ndarray]) -> Iterator[pyarrow.Table]:
        for number in batch["item"]:
            report = Report()
            yield pyarrow.Table.from_pylist(
                list(_judge_part(int(number), ray.get(shared)[number], config, rules, report)),
                SCHEMA,
            )
            ray.get(tally.add.remote(report))

    judged_parts = (
        ray_data()
        .from_items(list(range(len(parts))), override_num_blocks=len(parts))
        .map_batches(judge, batch_size=1)
    )
    tables = []
    with (
        bar("clean", "part", len(parts)) as progress,
        task_errors(),
    ):
        for table in judged_parts.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table.cast(SCHEMA))
            progress.update(1)
    return in_order([SCHEMA.empty_table(), *tables]), ray.get(tally.report.remote())


def _judge_part(
    number: int, part: Part, config: CleanConfig, rules: Mapping[str, Rule], report: Report
) -> Iterator[dict[str, Any]]:
    rules_of_images, rules_of_captions = image_rules(config), caption_rules(config)
    try:
        for position, sample in enumerate(read_part(part)):
            candidate = Candidate(sample)
            captions, reason = clean_captions(sample.captions, rules_of_captions)
            reason = (
                first_broken(candidate, rules_of_images)
                or (reason and exact_reason(sample, reason))
                or _first_broken_user_rule(candidate, rules)
            )
            row = {
                "part": number,
                "position": position,
                "key": sample.key,
                "reason": reason or "",
                "bytes": len(sample.image),
                "caption": captions[0] if captions else "",
                "captions_dropped": len(sample.captions) - len(captions),
            }
            if reason is None:
                width, height = candidate.picture.size
                row |= {
                    "width": width,
                    "height": height,
                    "fingerprint": fingerprint(candidate.picture),
                }
            yield {**dict.fromkeys(SCHEMA.names), **row}
    except UserError as error:
        report.faults.append(str(error))


def _first_broken_user_rule(candidate: Candidate, rules: Mapping[str, Rule]) -> str | None:
    for name, rule in rules.items():
        try:
            if not rule(candidate):
                return name
        except Exception as error:
            # A rule that raises has not approved the row: drop the row and continue.
            return f"on which {name.removeprefix('against ')} raised {type(error).__name__}"
    return None


# -- report page -----------------------------------------------------------------------------------


def write_page(cleaned: CleanResult, source: str, out: str, seed: int = 0) -> str:
    """Write PAGE in `out` and return its path.

    The page shows sizes, caption lengths, drops by rule with examples, near-duplicates side by
    side, and random rows.
    """
    examples = _choose_examples(cleaned, np.random.default_rng(seed))
    pictures = _pictures(cleaned, examples)
    rows = cleaned.rows
    kept = np.array([reason == "" for reason in rows["reason"].to_pylist()], bool)
    size = np.minimum(
        rows["width"].to_numpy(zero_copy_only=False), rows["height"].to_numpy(zero_copy_only=False)
    )[kept]
    length = np.array([len(text) for text in rows["caption"].filter(kept).to_pylist()])
    sections = [
        Section(
            "Rows by outcome",
            f"{len(rows):,} were read from {len(cleaned.parts):,} parts; "
            f"{cleaned.captions_dropped:,} captions were dropped, including those of dropped rows.",
            bars=[("kept", cleaned.report.kept), *cleaned.report.dropped.most_common()],
        ),
        Section(
            "Parts with a fault",
            "Their rows before the fault were read.",
            lines=sorted(set(cleaned.report.faults)),
        ),
        Section("Pixels on the shorter side, kept rows", bars=histogram(size)),
        Section("Characters of the first caption, kept rows", bars=histogram(length)),
        Section(
            "Near-duplicates",
            "Left: kept. Right: dropped.",
            groups=[[pictures[int(cleaned.kept_copy[n])], pictures[n]] for n in examples.copies],
        ),
        *(
            Section(f"Dropped: {why}", groups=[[pictures[n]] for n in of_rule])
            for why, of_rule in examples.dropped.items()
        ),
        Section("Random kept rows", groups=[[pictures[n]] for n in examples.kept]),
    ]
    target = f"{out.rstrip('/')}/{PAGE}"
    storage.put(page(f"{source} cleaned into {out}", sections).encode(), target)
    return target


@dataclass(frozen=True)
class _Examples:
    """Rows to show on the page: near-duplicates, dropped rows by reason, and kept rows."""

    copies: list[int]
    dropped: dict[str, list[int]]
    kept: list[int]


def _choose_examples(cleaned: CleanResult, rng: np.random.Generator) -> _Examples:
    part = cleaned.rows["part"].to_numpy()
    reason = np.array(cleaned.rows["reason"].to_pylist(), object)

    def choose(rows: np.ndarray, count: int) -> list[int]:
        return sorted(rng.choice(rows, min(count, len(rows)), replace=False).tolist())

    # Showing a row costs a read of its shard: take the examples from a few shards.
    in_chosen_parts = np.isin(part, choose(np.unique(part), PAGE_PARTS))
    copies = choose(np.flatnonzero(cleaned.kept_copy >= 0), PAGE_PAIRS)
    dropped = {
        why: choose(np.flatnonzero((reason == why) & in_chosen_parts), PAGE_EXAMPLES)
        for why, _ in cleaned.report.dropped.most_common()
    }
    dropped.pop(NEAR_DUPLICATE, None)
    return _Examples(
        copies, dropped, choose(np.flatnonzero((reason == "") & in_chosen_parts), PAGE_SAMPLES)
    )


def _pictures(cleaned: CleanResult, examples: _Examples) -> dict[int, Picture]:
    """Pictures of all examples and of the rows kept in place of near-duplicates, by row."""
    rows = sorted(
        {
            *examples.kept,
            *examples.copies,
            *cleaned.kept_copy[examples.copies].tolist(),
            *(n for of_rule in examples.dropped.values() for n in of_rule),
        }
    )
    chosen = cleaned.rows.take(np.array(rows, np.int64))
    positions = list(zip(chosen["part"].to_pylist(), chosen["position"].to_pylist(), strict=True))
    samples = read_rows(cleaned.parts, sorted(positions))
    pictures = {}
    for n, position, caption in zip(rows, positions, chosen["caption"].to_pylist(), strict=True):
        sample = samples.get(position)
        text = caption or (sample.captions[0] if sample and sample.captions else "")
        pictures[n] = Picture(thumbnail(sample.image) if sample else None, text)
    return pictures
