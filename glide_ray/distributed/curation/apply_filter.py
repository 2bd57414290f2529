"""`glide filter apply`: write the rows of a corpus that pass a content filter.

The stages are those of `glide clean`: actors score each part into a file, and tasks write shards.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import ray

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
from ...progress import bar
from ...storage import fingerprint
from ..cluster import connect, ship_modules
from ..embed import (
    ACTORS,
    READ_SCHEMA,
    ROWS_PER_BATCH,
    EmbeddedCorpus,
    Embedder,
    rows_to_embed,
)
from ..rows import INLINE_IMAGES, PAGE, refuse_source
from .clean import digest_of, sources_of
from .clean_page import PAGE_PARTS
from .filter_report import Assessment, applied_page, shown_errors
from .judge import (
    Judged,
    PartResult,
    count_row,
    died,
    judged_file,
    read_result,
    save_judged,
    state_of,
)
from .run_folder import own
from .score_counts import ScoreCounts
from .tables import load
from .tasks import TRIES, run_each, run_on
from .write import Writing, close, finish_corpus, write_rows

log = logging.getLogger(__name__)

SCORED_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("reason", pyarrow.large_string()),
        ("caption", pyarrow.large_string()),
        ("score", pyarrow.float32()),
        ("truth", pyarrow.bool_()),
    ]
)


@dataclass(frozen=True)
class AppliedFilter:
    """Result of `apply_content`: counts, the card of the shards that were written, and figures.

    `assessment` is None without a `truth` rule.
    """

    report: Report
    assessment: Assessment | None
    card: Mapping[str, Any]


def apply_content(
    path: str | Path,
    source: str,
    out: str,
    clip: str | None = None,
    truth: Rule | None = None,
    per_shard: int = 10_000,
    column: str | None = None,
) -> AppliedFilter:
    """Write the rows of `source` that pass the filter at `path` to `out`, with an index and PAGE.

    A manifest lists the dropped rows. `clip`: current path of the CLIP that the filter was fitted
    with, by default its path at that time. `column`: field or column of captions. Raises UserError
    (ContentError for another CLIP).
    """
    refuse_source(source, [], out)
    content = load_filter(path)
    clip = _same_clip(content, path, clip)
    parts = find_parts(source, column)
    refuse_source(source, parts, out)
    storage.check_writable(out)  # fail before hours of embedding
    folder = storage.absolute(out).rstrip("/")
    rules = sources_of({"truth": truth} if truth else {})
    settings = [storage.digest(storage.fetch(path)), per_shard, rules, digest_of(parts)]
    with own(folder, ["filter", settings]) as run:
        connect(2 + ACTORS)
        ship_modules([truth] if truth else [])
        log.info(f"embedding {len(parts):,} parts of {source}")
        judged = _score(parts, run.work, Scorer(clip, content, truth), (clip, content, truth))
        run.check()
        if not judged.read.sum():
            why = " ".join(judged.report().faults)[:300]
            raise ContentError(f"No row of the corpus can be read. {why}".strip())
        log.info(f"writing {judged.kept.sum():,} rows to {out}")
        writing = Writing(folder, run.work, f"{run.work}/{judged.digest}", per_shard, (), None)
        entries, faults, tasks = write_rows(parts, judged, run, writing)
        report = judged.report(faults)
        report.kept = entries.rows
        about = {"source": source, "filter": content.name, "clip_sha256": content.clip}
        card = finish_corpus(parts, judged, report, writing, tasks, about)
        numbers = np.flatnonzero(judged.read)
        on = f"{source}, its labelled rows included"
        assessment = None if truth is None else _assess(on, parts, numbers, run.work)
        scored, scores = _rows_of_page(numbers, parts, run.work)
        title, read = f"{source} without {content.name}", int(judged.read.sum())
        html = applied_page(title, read, len(parts), report, scored, scores, assessment, card)
        storage.put(html.encode(), f"{folder}/{PAGE}")
        close(run, entries)
    return AppliedFilter(report, assessment, card)


def _rows_of_page(
    numbers: np.ndarray, parts: Sequence[Part], work: str
) -> tuple[EmbeddedCorpus, np.ndarray]:
    """Rows and scores (N,) of at most PAGE_PARTS of the parts with these numbers."""
    if len(numbers) > PAGE_PARTS:
        numbers = np.sort(np.random.default_rng(0).choice(numbers, PAGE_PARTS, replace=False))
    tables = [_scored_rows(number, work) for number in numbers.tolist()]
    scored, scores, _ = _rows_to_show(pyarrow.concat_tables(tables), parts)
    return scored, scores


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


class Scorer:
    """Scores the rows of a part, in this process or as an actor that loads the CLIP once."""

    def __init__(
        self, clip: str, content: ContentFilter, truth: Rule | None, threads: int | None = None
    ):
        self._name, self._truth = content.name, truth
        self._embed = Embedder(ClipFeatures, clip, content, threads)

    def score(self, number: int, part: Part, folder: str) -> PartResult:
        """Write the judged file of a part, unless an earlier run did. Returns its counts."""
        state = state_of(part)
        earlier = read_result(folder, number)
        if earlier is not None and earlier.state == state and state and not earlier.faults:
            return earlier
        result, read = PartResult(number, state), Report()
        tables = [SCORED_SCHEMA.empty_table()]
        rows = rows_to_embed(number, part, self._truth, "", read)
        while block := list(itertools.islice(rows, ROWS_PER_BATCH)):
            tables.append(self._scored(pyarrow.Table.from_pylist(block, READ_SCHEMA)))
        result.faults = read.faults
        table = pyarrow.concat_tables(tables)
        for key, reason in zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True):
            count_row(result, key, reason)
        save_judged(table, result, folder)
        return result

    def _scored(self, block: pyarrow.Table) -> pyarrow.Table:
        scored = self._embed(block)
        scores = scored["score"].to_numpy()
        reason = np.array(scored["reason"].to_pylist(), object)
        reason[(reason == "") & (scores >= 0)] = f"with {self._name}"
        place = scored.schema.get_field_index("reason")
        column = pyarrow.array(reason.tolist(), pyarrow.large_string())
        return (
            scored.set_column(place, "reason", column)
            .select(SCORED_SCHEMA.names)
            .cast(SCORED_SCHEMA)
        )


def _score(parts: Sequence[Part], folder: str, scorer: Scorer, settings: tuple) -> Judged:
    judged = Judged(len(parts))
    arguments = ((number, part, folder) for number, part in enumerate(parts))
    known = all(part.count or part.files for part in parts)
    rows = sum(part.count or len(part.files) for part in parts)
    results: Iterator[PartResult]
    if known and rows <= INLINE_IMAGES:  # starting actors takes some 10 s
        results = (scorer.score(*some) for some in arguments)
    else:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        threads = max(1, (os.cpu_count() or 1) // ACTORS)
        options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
        create = ray.remote(Scorer).options(max_restarts=-1, max_task_retries=TRIES - 1, **options)
        actors = [create.remote(*settings, threads) for _ in range(min(len(parts), gpus or ACTORS))]
        results = run_on([actor.score for actor in actors], arguments, died)
    with bar("embed", "part", len(parts)) as progress:
        for result in results:
            judged.add(result)
            progress.update(1)
    return judged


def _scored_rows(number: int, folder: str) -> pyarrow.Table:
    """Caption, score, truth, part and position of the rows of a part that have a score."""
    rows = load(judged_file(folder, number), ["caption", "score", "truth"])
    rows = rows.append_column("part", pyarrow.array(np.full(len(rows), number)))
    rows = rows.append_column("position", pyarrow.array(np.arange(len(rows))))
    return rows.filter(pyarrow.compute.invert(pyarrow.compute.is_nan(rows["score"])))


def _rows_to_show(
    rows: pyarrow.Table, parts: Sequence[Part]
) -> tuple[EmbeddedCorpus, np.ndarray, np.ndarray]:
    """Rows for their pictures, with scores (N,) and labels (N,) bool."""
    places = list(zip(rows["part"].to_pylist(), rows["position"].to_pylist(), strict=True))
    captions = rows["caption"].to_pylist()
    corpus = EmbeddedCorpus(
        [], places, parts, captions, np.arange(len(rows)), None, np.empty((0, 0))
    )
    return corpus, rows["score"].to_numpy(), np.array(rows["truth"].to_pylist(), bool)


def _assess(on: str, parts: Sequence[Part], numbers: np.ndarray, folder: str) -> Assessment:
    """The filter's errors on all rows of these parts, counted part by part."""
    counts, shown = ScoreCounts(), None
    arguments = ((number, folder) for number in numbers.tolist())
    for scores, truth, rows in run_each(_errors_of_part, arguments):
        counts.add(scores, truth)
        shown = _shown(rows if shown is None else pyarrow.concat_tables([shown, rows]))
    return Assessment(on, counts, *_rows_to_show(shown, parts))


def _errors_of_part(number: int, folder: str) -> tuple[np.ndarray, np.ndarray, pyarrow.Table]:
    """Scores (N,) and labels (N,) bool of a part, and its rows that the page may show."""
    rows = _scored_rows(number, folder)
    truth = np.array(rows["truth"].to_pylist(), bool)
    return rows["score"].to_numpy(), truth, _shown(rows)


def _shown(rows: pyarrow.Table) -> pyarrow.Table:
    """The errors among rows that a page shows, in the order of the corpus."""
    rows = rows.sort_by([("part", "ascending"), ("position", "ascending")])
    truth = np.array(rows["truth"].to_pylist(), bool)
    errors = shown_errors(rows["score"].to_numpy(), truth)
    return rows.take(np.sort(np.concatenate(errors)))
