"""`glide filter apply`: write the rows of a corpus that pass a content filter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from ... import storage
from ...data.content import (
    ContentError,
    ContentFilter,
    load_filter,
)
from ...data.filters import Report, Rule
from ...data.sources import Part, find_parts
from ...evaluation.features import ClipFeatures
from ...evaluation.pages import Section, page
from ...models.clip_scorer import fetch_clip
from ...storage import fingerprint
from ..cluster import connect, send_with
from ..embed import ACTORS, EmbeddedCorpus, embed
from .corpus import PAGE, count, refuse_source, rewrite, write_manifest
from .filter_report import PICTURES_SHOWN, Assessment, score_bars, truth_sections

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """Result of `apply_content`. `assessment` is None without a `truth` rule."""

    report: Report
    assessment: Assessment | None


def apply_content(
    path: str | Path,
    source: str,
    out: str,
    clip: str | None = None,
    truth: Rule | None = None,
    per_shard: int = 10_000,
) -> Applied:
    """Write the rows of `source` that pass the filter at `path` to `out`, with an index and PAGE.

    A manifest lists the dropped rows. `clip`: current path of the CLIP that the filter was fitted
    with, by default its path at that time. Raises UserError (ContentError for another CLIP).
    """
    refuse_source(source, [], out)
    content = load_filter(path)
    clip = str(Path(fetch_clip(clip or content.settings["clip"])).resolve())
    ClipFeatures(clip)
    if fingerprint(clip) != content.clip:
        raise ContentError(
            f"{clip} is not the CLIP that {path} was fitted with: its SHA-256 begins "
            f"{fingerprint(clip)[:16]} and should "
            f"{content.clip[:16]}; give the right one with --clip."
        )
    parts = find_parts(storage.absolute(source))
    refuse_source(source, parts, out)
    storage.check_writable(out)  # fail before hours of embedding
    connect(2 + ACTORS)
    send_with([truth] if truth else [])
    log.info(f"looking at {len(parts):,} parts of {source}")
    rows, scanned = embed(parts, clip, truth, content)
    scores = rows["score"].to_numpy()
    reason = np.array(rows["reason"].to_pylist(), object)
    reason[(reason == "") & (scores >= 0)] = f"with {content.name}"
    rows = rows.set_column(
        rows.schema.get_field_index("reason"),
        "reason",
        pyarrow.array(reason.tolist(), pyarrow.large_string()),
    )
    stays = np.flatnonzero(reason == "")
    log.info(f"writing {len(stays):,} rows to {out}")
    index, faults = rewrite(
        parts, rows["part"].to_numpy()[stays], rows["position"].to_numpy()[stays], out, per_shard
    )
    counted = count(rows, index, [*scanned.faults, *faults])
    write_manifest(
        out,
        parts,
        rows,
        counted,
        {"source": source, "filter": content.name, "clip_sha256": content.clip},
    )
    return _applied_page(
        content, source, out, parts, rows, scores, reason, counted, truth is not None
    )


def _applied_page(
    content: ContentFilter,
    source: str,
    out: str,
    parts: Sequence[Part],
    rows: pyarrow.Table,
    scores: np.ndarray,
    reason: np.ndarray,
    counted: Report,
    known: bool,
) -> Applied:
    seen = np.flatnonzero(~np.isnan(scores))
    places = list(zip(rows["part"].to_pylist(), rows["position"].to_pylist(), strict=True))
    captions = rows["caption"].to_pylist()
    looked = EmbeddedCorpus(
        [],
        [places[n] for n in seen],
        parts,
        [captions[n] for n in seen],
        np.arange(len(seen)),
        None,
        np.empty((0, 0)),
    )
    scores, draws = scores[seen], np.random.default_rng(0)
    passing, dropped = np.flatnonzero(scores < 0), np.flatnonzero(scores >= 0)
    assessment = (
        Assessment(
            f"{source}, its labelled rows included",
            looked,
            scores,
            np.array(rows["truth"].take(seen).to_pylist(), bool),
        )
        if known
        else None
    )
    sections = [
        Section(
            "What became of the rows",
            f"{len(rows):,} were read from {len(parts):,} parts.",
            bars=[("kept", counted.kept), *counted.dropped.most_common()],
        ),
        Section(
            "Parts with a fault",
            "Their rows before the fault were read.",
            lines=sorted(set(counted.faults)),
        ),
        Section("Scores", "What scores 0 or more is dropped.", bars=score_bars(scores)),
        *(truth_sections(assessment) if assessment else []),
        Section(
            "What is left, at random",
            groups=looked.pictures(draws.permutation(passing)[: 2 * PICTURES_SHOWN].tolist()),
        ),
        Section(
            "What is left, nearest to the boundary",
            groups=looked.pictures(passing[np.argsort(-scores[passing])][:PICTURES_SHOWN].tolist()),
        ),
        Section(
            "Dropped, at random",
            groups=looked.pictures(draws.permutation(dropped)[:PICTURES_SHOWN].tolist()),
        ),
    ]
    storage.put(
        page(f"{source} without {content.name}", sections).encode(), f"{out.rstrip('/')}/{PAGE}"
    )
    return Applied(counted, assessment)
