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
from ...models.clip_scorer import fetch_clip
from ...storage import fingerprint
from ..cluster import connect, ship_modules
from ..embed import ACTORS, EmbeddedCorpus, embed
from ..rows import PAGE, count, refuse_source, replace_reasons, rewrite, write_manifest
from .filter_report import Assessment, applied_page

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppliedFilter:
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
) -> AppliedFilter:
    """Write the rows of `source` that pass the filter at `path` to `out`, with an index and PAGE.

    A manifest lists the dropped rows. `clip`: current path of the CLIP that the filter was fitted
    with, by default its path at that time. Raises UserError (ContentError for another CLIP).
    """
    refuse_source(source, [], out)
    content = load_filter(path)
    clip = _same_clip(content, path, clip)
    parts = find_parts(source)
    refuse_source(source, parts, out)
    storage.check_writable(out)  # fail before hours of embedding
    connect(2 + ACTORS)
    ship_modules([truth] if truth else [])
    log.info(f"embedding {len(parts):,} parts of {source}")
    rows, scanned = embed(parts, clip, truth, content)
    scores = rows["score"].to_numpy()
    reason = np.array(rows["reason"].to_pylist(), object)
    reason[(reason == "") & (scores >= 0)] = f"with {content.name}"
    rows = replace_reasons(rows, reason)
    kept = np.flatnonzero(reason == "")
    log.info(f"writing {len(kept):,} rows to {out}")
    index, faults = rewrite(
        parts, rows["part"].to_numpy()[kept], rows["position"].to_numpy()[kept], out, per_shard
    )
    report = count(rows, index, [*scanned.faults, *faults])
    about = {"source": source, "filter": content.name, "clip_sha256": content.clip}
    write_manifest(out, parts, rows, report, about)
    scored = np.flatnonzero(~np.isnan(scores))
    scored_rows, scores = _scored_rows(parts, rows, scored), scores[scored]
    assessment = None
    if truth is not None:
        labels = np.array(rows["truth"].take(scored).to_pylist(), bool)
        on = f"{source}, its labelled rows included"
        assessment = Assessment(on, scored_rows, scores, labels)
    title = f"{source} without {content.name}"
    html = applied_page(title, len(rows), len(parts), report, scored_rows, scores, assessment)
    storage.put(html.encode(), f"{out.rstrip('/')}/{PAGE}")
    return AppliedFilter(report, assessment)


def _same_clip(content: ContentFilter, path: str | Path, clip: str | None) -> str:
    """Local path of the CLIP that the filter was fitted with. Raises ContentError for another."""
    clip = str(Path(fetch_clip(clip or content.settings["clip"])).resolve())
    ClipFeatures(clip)
    if fingerprint(clip) != content.clip:
        raise ContentError(
            f"{clip} is not the CLIP that {path} was fitted with: its SHA-256 begins "
            f"{fingerprint(clip)[:16]} and should {content.clip[:16]}; give the right one with "
            "--clip."
        )
    return clip


def _scored_rows(parts: Sequence[Part], rows: pyarrow.Table, scored: np.ndarray) -> EmbeddedCorpus:
    """The rows with indices `scored`, for their pictures; without features."""
    scored_rows = rows.take(scored)
    return EmbeddedCorpus(
        [],
        list(
            zip(scored_rows["part"].to_pylist(), scored_rows["position"].to_pylist(), strict=True)
        ),
        parts,
        scored_rows["caption"].to_pylist(),
        np.arange(len(scored)),
        None,
        np.empty((0, 0)),
    )
