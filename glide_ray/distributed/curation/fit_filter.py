"""`glide filter fit`: fit a content filter on labelled rows of a corpus (app. F.1)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ... import storage
from ...config.data import FilterConfig
from ...data.content import (
    ContentError,
    ContentFilter,
    Fitted,
    missed_interval,
    with_threshold,
)
from ...data.filters import Rule
from ...data.labelling import (
    Label,
    Pool,
    answered,
    ask,
    assess,
    fit_labelled,
    read_labels,
    threshold_of,
    write_labels,
)
from ...data.sources import find_parts, state
from ...evaluation.features import ClipFeatures
from ...evaluation.pages import thumbnail
from ...evaluation.report import contact_sheet, on_square
from ...models.clip_scorer import fetch_clip
from ...storage import fingerprint
from ..cluster import connect, ship_modules
from ..embed import ACTORS, EmbeddedCorpus, cached_table, cached_table_key, embed
from ..rows import PAGE, read_rows
from .filter_report import Assessment, FilterFit, fit_page

log = logging.getLogger(__name__)

FILTER, LABELS, SHEET, FEATURES = (
    "filter.safetensors",
    "labels.csv",
    "sheet.png",
    "features.parquet",
)
# in the CSV's column `why`: the label comes from the rule `truth`, nobody was asked for it
TRUTH = "truth"
# held-out rows with the content; with fewer, assess by cross-validation on the filter's own corpus
MIN_HELD_OUT_ROWS = 20


def fit_content(
    name: str,
    corpus: str,
    out: str | Path,
    clip: str,
    config: FilterConfig,
    words: Sequence[str] = (),
    truth: Rule | None = None,
    held_out: str | None = None,
) -> FilterFit:
    """Fit the filter `name` in the folder `out`, or continue a fit that was begun there.

    Without `truth`, people label rows: those to label next are appended to LABELS and shown in
    SHEET; after labelling, the same call continues. With `truth`, a rule that returns a row's
    label, all rounds run in one call and the filter is assessed on the corpus `held_out`, or by
    cross-validation without one or if it has fewer than MIN_HELD_OUT_ROWS rows with the content.
    `words`: search words for the first rows to label. Raises UserError.
    """
    out = Path(out)
    clip_path = str(fetch_clip(clip))
    network = ClipFeatures(clip_path)  # report a missing CLIP before Ray starts
    labels = _given_labels(out, truth)
    connect(2 + ACTORS)
    ship_modules([truth] if truth else [])
    embedded = _candidates(corpus, out, str(Path(clip_path).resolve()), config, truth, labels)
    pool = _pool(embedded, network, words)
    if truth is None:
        labelled, requested = _ask_people(out, pool, embedded, labels, config)
    else:
        labelled, requested = _ask_rule(out, pool, embedded, config), 0
    fitted = _fit_if_possible(pool, labelled, requested)
    if fitted is None:
        return FilterFit(None, len(labelled), sum(labelled.values()), requested, "", None)
    threshold = threshold_of(fitted, pool, labelled, config)
    positive = np.array(list(labelled.values()), bool)
    positives, missed = int(positive.sum()), int((fitted.out_of_fold[positive] < threshold).sum())
    settings: dict[str, Any] = {"corpus": corpus, "clip": storage.absolute(clip)}
    settings["words"] = list(words)
    settings |= {"labelled": len(positive), "with_content": positives, "missed": missed}
    settings |= {"cost": fitted.cost, "width": fitted.width, **config.model_dump()}
    content = with_threshold(fitted, threshold, name, fingerprint(clip_path), settings)
    content.save(out / FILTER)
    assessment = None
    if truth is not None:
        assessment = _assess(content, pool, embedded, corpus, held_out, clip_path, config, truth)
    errors = _errors_on_labels(name, missed, fitted.out_of_fold, threshold, positive)
    done = FilterFit(content, len(labelled), positives, requested, errors, assessment)
    storage.put(fit_page(done, embedded).encode(), out / PAGE)
    return done


def _fit_if_possible(pool: Pool, labelled: dict[int, bool], requested: int) -> Fitted | None:
    """The fit, or None if the labels do not suffice yet and `requested` rows are to be labelled."""
    try:
        return fit_labelled(pool, labelled)
    except ContentError:
        if not requested:
            raise
        return None


def _given_labels(out: Path, truth: Rule | None) -> list[Label]:
    """Labels that people gave so far. Raises ContentError if some are missing, or not to be used.

    With `truth` there must be none from people, because they would be overwritten.
    """
    labels = read_labels(out / LABELS)
    if truth is not None:
        if any(label.why != TRUTH for label in labels):
            raise ContentError(
                f"{out / LABELS} holds labels by people, which the true labels would overwrite; "
                "give another folder with --out."
            )
        return []
    waiting = [label for label in labels if label.label is None]
    if waiting:
        raise ContentError(
            f"{len(waiting)} of {len(labels)} rows in {out / LABELS} have no label yet; write 1 "
            f"(has the content) or 0 for each, as {out / SHEET} shows them by their line, and run "
            "the same command again."
        )
    return labels


def _pool(embedded: EmbeddedCorpus, network: ClipFeatures, words: Sequence[str]) -> Pool:
    names = _readable(embedded.names)
    similarities = (
        embedded.features @ network.words(list(words)).T if words else np.empty((len(names), 0))
    )
    return Pool(names, embedded.captions, embedded.features, embedded.groups, similarities)


def _ask_rule(
    out: Path, pool: Pool, embedded: EmbeddedCorpus, config: FilterConfig
) -> dict[int, bool]:
    """Labels by the rule `truth`, by row of the pool; also written to LABELS."""
    assert embedded.truth is not None  # embedded with the rule
    labelled = answered(pool, embedded.truth, config)
    write_labels(
        out / LABELS,
        [Label(pool.names[n], label, embedded.captions[n], TRUTH) for n, label in labelled.items()],
    )
    return labelled


def _ask_people(
    out: Path,
    pool: Pool,
    embedded: EmbeddedCorpus,
    labels: Sequence[Label],
    config: FilterConfig,
) -> tuple[dict[int, bool], int]:
    """(labels so far by row of the pool, number of rows that were appended to be labelled next).

    Raises ContentError for a label of a row that is not in the pool.
    """
    place = {row: n for n, row in enumerate(pool.names)}
    unknown = next((label.row for label in labels if label.row not in place), None)
    if unknown:
        raise ContentError(
            f"{out / LABELS} labels {unknown}, which is not among the candidate rows: it belongs "
            "to another corpus or pool; give another folder with --out."
        )
    labelled = {place[label.row]: bool(label.label) for label in labels}
    requested = ask(pool, labelled, config)
    if requested:
        _write_sheet(out, embedded, [n for n, _ in requested], first_line=2 + len(labels))
        new = [Label(pool.names[n], None, embedded.captions[n], why) for n, why in requested]
        write_labels(out / LABELS, [*labels, *new])
    return labelled, len(requested)


def _errors_on_labels(
    name: str, missed: int, scores: np.ndarray, threshold: float, positive: np.ndarray
) -> str:
    """One sentence on errors by cross-validation: `scores` (N,), labels `positive` (N,) bool."""
    positives = int(positive.sum())
    return (
        f"in cross-validation, {missed} of {positives} labelled rows with {name} are missed "
        f"(95% interval up to {missed_interval(missed, positives)[1]:.1%}); "
        f"{(scores[~positive] >= threshold).mean():.0%} of {(~positive).sum()} without it are "
        "dropped"
    )


def _readable(names: Sequence[str]) -> list[str]:
    """Row names relative to the current folder if they lie in it, as the user wrote the corpus."""
    here = os.getcwd() + os.sep
    return [name.removeprefix(here) for name in names]


def _candidates(
    corpus: str,
    out: Path,
    clip: str,
    config: FilterConfig,
    truth: Rule | None,
    labels: Sequence[Label],
) -> EmbeddedCorpus:
    """Candidate rows for labelling, embedded once: later calls load the features from FEATURES.

    Raises ContentError if the corpus was rewritten after labels were asked for: the labels' row
    names would then refer to other rows.
    """
    parts = find_parts(corpus, config.caption_column)
    now = state(corpus, parts)
    order = np.random.default_rng(config.seed).permutation(len(parts))
    parts = [parts[n] for n in order]
    settings = [config.pool, config.seed, config.group]
    settings += [config.caption_column] if config.caption_column else []
    key = json.dumps([corpus, fingerprint(clip), *settings, [part.url for part in parts], now])
    before = json.loads(cached_table_key(out / FEATURES) or "[null]")
    if labels and before[0] == corpus and before[-1] != now:
        raise ContentError(
            f"{corpus} has changed since the labels in {out / LABELS} were requested; give "
            "another folder with --out."
        )

    def embed_candidates() -> tuple[pyarrow.Table, bool]:
        log.info(f"embedding up to {config.pool:,} rows of {corpus}")
        table, counted = embed(parts, clip, truth, group=config.group, limit=config.pool)
        for fault in counted.faults:
            log.info(fault)
        # Cache even if some rows could not be read: the labels refer to exactly this pool.
        return table, True

    # With `truth` all rounds run in one call, so a cache is of no use.
    return EmbeddedCorpus.of(
        cached_table(out / FEATURES, key, embed_candidates)
        if truth is None
        else embed_candidates()[0],
        parts,
    )


def _assess(
    content: ContentFilter,
    pool: Pool,
    embedded: EmbeddedCorpus,
    corpus: str,
    held_out: str | None,
    clip: str,
    config: FilterConfig,
    truth: Rule,
) -> Assessment:
    if held_out:
        parts = find_parts(held_out, config.caption_column)
        log.info(f"embedding {held_out}")
        apart = EmbeddedCorpus.of(embed(parts, clip, truth, group=config.group)[0], parts)
        assert apart.truth is not None  # embedded with the rule, as is `embedded`
        if apart.truth.sum() >= MIN_HELD_OUT_ROWS:
            return Assessment.of(held_out, apart, content.score(apart.features), apart.truth)
    assert embedded.truth is not None
    scores = assess(pool, embedded.truth, config)
    usable = np.flatnonzero(~np.isnan(scores)).tolist()
    on = f"{corpus}, by cross-validation (4 folds, each with {config.labels} labels of its own)"
    rows = replace(
        embedded,
        names=[embedded.names[n] for n in usable],
        places=[embedded.places[n] for n in usable],
        captions=[embedded.captions[n] for n in usable],
        groups=embedded.groups[usable],
        truth=embedded.truth[usable],
        features=embedded.features[usable],
    )
    return Assessment.of(on, rows, scores[usable], embedded.truth[usable])


def _write_sheet(out: Path, embedded: EmbeddedCorpus, rows: Sequence[int], first_line: int) -> None:
    """Write SHEET: a contact sheet of the rows to label, each titled with its line in the CSV."""
    found = read_rows(embedded.parts, [embedded.places[n] for n in rows])
    blank = np.full((8, 8, 3), 230, np.uint8)
    images = [
        thumbnail(found[embedded.places[n]].image, 128) if embedded.places[n] in found else None
        for n in rows
    ]
    sheet = contact_sheet(
        [on_square(image) if image is not None else blank for image in images],
        [f"line {first_line + n}: {embedded.captions[row]}" for n, row in enumerate(rows)],
        columns=8,
        size=128,
    )
    with storage.atomic_write(out / SHEET) as partial:
        sheet.save(partial, format="PNG")
