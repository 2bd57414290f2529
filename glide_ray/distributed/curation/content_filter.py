"""`glide filter`: fit a content filter on labelled rows of a corpus (app. F.1), and apply it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from sklearn.metrics import roc_auc_score

from ... import storage
from ...config.data import FilterConfig
from ...data.content import (
    ContentError,
    ContentFilter,
    load_filter,
    missed_interval,
    with_threshold,
)
from ...data.filters import Report, Rule
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
from ...data.sources import Part, find_parts, state
from ...evaluation.features import ClipFeatures
from ...evaluation.pages import Picture, Section, page, thumbnail
from ...evaluation.report import contact_sheet, roc_curve
from ...models.clip_scorer import fetch_clip
from ...storage import fingerprint
from ..cluster import connect, send_with
from ..embed import ACTORS, EmbeddedCorpus, cached_table, cached_table_of, embed
from .corpus import PAGE, count, look_up, refuse_source, rewrite, write_manifest

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
PICTURES_SHOWN = 24  # pictures in a section of the page


# -- fit -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assessment:
    """Performance of a filter on rows that it was not fitted on."""

    on: str  # description of these rows
    rows: EmbeddedCorpus
    scores: np.ndarray  # (N,), 0 at the decision boundary, dropped from there on
    truth: np.ndarray  # (N,) bool: whether a row has the content

    def __str__(self) -> str:
        missed, of, caught, without = (
            (self.truth & (self.scores < 0)).sum(),
            self.truth.sum(),
            (~self.truth & (self.scores >= 0)).sum(),
            (~self.truth).sum(),
        )
        low, high = missed_interval(int(missed), int(of))
        return (
            f"on {self.on}: {missed} of {of:,} missed ({missed / max(1, of):.2%}, "
            f"95% interval {low:.2%} to {high:.2%}); of {without:,} rows without "
            f"it {caught / max(1, without):.1%} dropped; area under the ROC {self.area:.3f}"
        )

    @property
    def area(self) -> float:
        return (
            float(roc_auc_score(self.truth, self.scores))
            if 0 < self.truth.sum() < len(self.truth)
            else float("nan")
        )


@dataclass(frozen=True)
class Fit:
    """Result of a call of `fit_content`."""

    content: ContentFilter | None
    labelled: int
    with_content: int
    waiting: int  # rows in the CSV that have no label yet
    on_labels: str  # sentence on the filter's errors on the labelled rows, by cross-validation
    assessment: Assessment | None


def fit_content(
    name: str,
    corpus: str,
    out: str | Path,
    clip: str,
    config: FilterConfig,
    words: Sequence[str] = (),
    truth: Rule | None = None,
    held_out: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Fit the filter `name` in the folder `out`, or continue a fit that was begun there.

    Without `truth`, people label rows: those to label next are appended to LABELS and shown in
    SHEET; after labelling, the same call continues. With `truth`, a rule that returns a row's
    label, all rounds run in one call and the filter is assessed on the corpus `held_out`, or by
    cross-validation without one or if it has fewer than MIN_HELD_OUT_ROWS rows with the content.
    `words`: search words for the first rows to label. Raises UserError.
    """
    out = Path(out)
    clip_path = fetch_clip(clip)
    features = ClipFeatures(clip_path)  # report a missing CLIP before Ray starts
    labels = read_labels(out / LABELS)
    if truth is not None:
        if any(label.why != TRUTH for label in labels):
            raise ContentError(
                f"{out / LABELS} holds labels that people gave, and the truth would be written "
                f"over them; give another folder with --out."
            )
        labels = []
    waiting = [label for label in labels if label.label is None]
    if waiting:
        raise ContentError(
            f"{len(waiting)} of {len(labels)} rows in {out / LABELS} have no label yet; "
            f"write 1 (has the content) or 0 for each, as "
            f"{out / SHEET} shows them by their line, and run the same command again."
        )
    connect(2 + ACTORS)
    send_with([truth] if truth else [])
    looked = _pool(corpus, out, str(Path(clip_path).resolve()), config, truth, labels, report)
    names = _readable(looked.names)
    pool = Pool(
        names,
        looked.captions,
        looked.features,
        looked.groups,
        looked.features @ features.words(list(words)).T if words else np.empty((len(names), 0)),
    )
    place = {row: n for n, row in enumerate(names)}
    if truth is not None:
        labelled = answered(pool, looked.truth, config)
        write_labels(
            out / LABELS,
            [Label(names[n], said, looked.captions[n], TRUTH) for n, said in labelled.items()],
        )
        asked = []
    else:
        strange = next((label.row for label in labels if label.row not in place), None)
        if strange:
            raise ContentError(
                f"{out / LABELS} labels {strange}, which is not among the rows looked at: "
                f"it belongs to another corpus or pool; give "
                f"another folder with --out."
            )
        labelled = {place[label.row]: bool(label.label) for label in labels}
        asked = ask(pool, labelled, config)
        if asked:
            _write_sheet(out, looked, [n for n, _ in asked], first_line=2 + len(labels))
            write_labels(
                out / LABELS,
                [*labels, *(Label(names[n], None, looked.captions[n], why) for n, why in asked)],
            )
    try:
        fitted = fit_labelled(pool, labelled)
    except ContentError:
        if not asked:
            raise
        return Fit(None, len(labelled), sum(labelled.values()), len(asked), "", None)
    threshold = threshold_of(fitted, pool, labelled, config)
    said = np.array(list(labelled.values()), bool)
    missed, of = int((fitted.out_of_fold[said] < threshold).sum()), int(said.sum())
    on_labels = (
        f"of {of} labelled rows with {name}, judged without their like, {missed} are missed "
        f"(95% interval up to "
        f"{missed_interval(missed, of)[1]:.1%}); of {(~said).sum()} without it, "
        f"{(fitted.out_of_fold[~said] >= threshold).mean():.0%} are dropped"
    )
    settings = {
        "corpus": corpus,
        "clip": storage.absolute(clip),
        "words": list(words),
        "labelled": len(said),
        "with_content": of,
        "missed": missed,
        "cost": fitted.cost,
        "width": fitted.width,
        **config.model_dump(),
    }
    content = with_threshold(fitted, threshold, name, fingerprint(clip_path), settings)
    content.save(out / FILTER)
    assessment = (
        None
        if truth is None
        else _assess(content, pool, looked, corpus, held_out, str(clip_path), config, truth, report)
    )
    done = Fit(content, len(labelled), of, len(asked), on_labels, assessment)
    storage.put(_fit_page(done, looked).encode(), out / PAGE)
    return done


def _readable(names: Sequence[str]) -> list[str]:
    """Row names relative to the current folder if they lie in it, as the user wrote the corpus."""
    here = os.getcwd() + os.sep
    return [name.removeprefix(here) for name in names]


def _pool(
    corpus: str,
    out: Path,
    clip: str,
    config: FilterConfig,
    truth: Rule | None,
    labels: Sequence[Label],
    report: Callable[[str], None],
) -> EmbeddedCorpus:
    """Candidate rows for labelling, embedded once: later calls load the features from FEATURES.

    Raises ContentError if the corpus was rewritten after labels were asked for: the labels' row
    names would then refer to other rows.
    """
    parts = find_parts(storage.absolute(corpus))
    now = state(storage.absolute(corpus), parts)
    order = np.random.default_rng(config.seed).permutation(len(parts))
    parts = [parts[n] for n in order]
    of = json.dumps(
        [
            corpus,
            fingerprint(clip),
            config.pool,
            config.seed,
            config.group,
            [part.url for part in parts],
            now,
        ]
    )
    before = json.loads(cached_table_of(out / FEATURES) or "[null]")
    if labels and before[0] == corpus and before[-1] != now:
        raise ContentError(
            f"{corpus} is not as it was when the labels in {out / LABELS} were asked for; "
            f"give another folder with --out."
        )

    def see() -> tuple[pyarrow.Table, bool]:
        report(f"looking at {corpus}, {config.pool:,} rows at the most")
        table, counted = embed(parts, clip, truth, group=config.group, limit=config.pool)
        for fault in counted.faults:
            report(fault)
        # Cache even if some rows could not be read: the labels refer to exactly this pool.
        return table, True

    # With `truth` all rounds run in one call, so a cache is of no use.
    return EmbeddedCorpus.of(
        cached_table(out / FEATURES, of, see) if truth is None else see()[0], parts
    )


def _assess(
    content: ContentFilter,
    pool: Pool,
    looked: EmbeddedCorpus,
    corpus: str,
    held_out: str | None,
    clip: str,
    config: FilterConfig,
    truth: Rule,
    report: Callable[[str], None],
) -> Assessment:
    if held_out:
        parts = find_parts(storage.absolute(held_out))
        report(f"looking at {held_out}")
        apart = EmbeddedCorpus.of(embed(parts, clip, truth, group=config.group)[0], parts)
        if apart.truth.sum() >= MIN_HELD_OUT_ROWS:
            return Assessment(held_out, apart, content.score(apart.features), apart.truth)
    scores = assess(pool, looked.truth, config)
    usable = np.flatnonzero(~np.isnan(scores))
    on = (
        f"{corpus}, each row by a filter that was fitted without its like (4 folds, each with "
        f"its own {config.labels} labels)"
    )
    rows = replace(
        looked,
        names=[looked.names[n] for n in usable],
        places=[looked.places[n] for n in usable],
        captions=[looked.captions[n] for n in usable],
        groups=looked.groups[usable],
        truth=looked.truth[usable],
        features=looked.features[usable],
    )
    return Assessment(on, rows, scores[usable], looked.truth[usable])


def _write_sheet(out: Path, looked: EmbeddedCorpus, rows: Sequence[int], first_line: int) -> None:
    """Write SHEET: a contact sheet of the rows to label, each titled with its line in the CSV."""
    found = look_up(looked.parts, [looked.places[n] for n in rows])
    blank = np.full((8, 8, 3), 230, np.uint8)
    images = [
        thumbnail(found[looked.places[n]].image, 128) if looked.places[n] in found else None
        for n in rows
    ]
    sheet = contact_sheet(
        [_squared(image) if image is not None else blank for image in images],
        [f"line {first_line + n}: {looked.captions[row]}" for n, row in enumerate(rows)],
        columns=8,
        size=128,
    )
    with storage.whole(out / SHEET) as partial:
        sheet.save(partial, format="PNG")


def _squared(image: np.ndarray) -> np.ndarray:
    """The whole image, centred on a white square."""
    side = max(image.shape[:2])
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(
        Image.fromarray(image), ((side - image.shape[1]) // 2, (side - image.shape[0]) // 2)
    )
    return np.asarray(square)


def _fit_page(done: Fit, looked: EmbeddedCorpus) -> str:
    content, name = done.content, done.content.name
    scores = content.score(looked.features)
    passing = np.flatnonzero(scores < 0)
    nearest = passing[np.argsort(-scores[passing])][:PICTURES_SHOWN].tolist()
    some = np.random.default_rng(0).permutation(passing)[:PICTURES_SHOWN].tolist()
    sections = [
        Section(
            "The filter",
            f"{done.labelled} labels, {done.with_content} with {name}. "
            f"{done.on_labels[:1].upper()}{done.on_labels[1:]}.",
            lines=[f"{key}: {value}" for key, value in content.settings.items()],
        ),
        Section(
            "Scores of the rows looked at",
            "What scores 0 or more is dropped.",
            bars=_score_bars(scores),
        ),
    ]
    if done.assessment is not None:
        sections += _truth_sections(done.assessment)
    sections += [
        Section(
            "What passes, nearest to the boundary",
            "To be looked at for what should not have passed.",
            groups=looked.pictures(nearest),
        ),
        Section("What passes, at random", groups=looked.pictures(some)),
    ]
    return page(f"The content filter {name}", sections)


def _truth_sections(assessment: Assessment) -> list[Section]:
    rows, scores, truth = assessment.rows, assessment.scores, assessment.truth
    missed, dropped = np.flatnonzero(truth & (scores < 0)), np.flatnonzero(~truth & (scores >= 0))
    sure = dropped[np.argsort(-scores[dropped])][:PICTURES_SHOWN].tolist()
    return [
        Section(
            "Assessment",
            str(assessment),
            width=440,
            groups=[[Picture(roc_curve(scores, truth))]] if 0 < truth.sum() < len(truth) else [],
        ),
        Section(
            f"Missed: all {len(missed)}"
            if len(missed) <= 4 * PICTURES_SHOWN
            else f"Missed: {4 * PICTURES_SHOWN} of {len(missed)}",
            groups=rows.pictures(missed[: 4 * PICTURES_SHOWN].tolist()),
        ),
        Section("Dropped without having the content, the surest first", groups=rows.pictures(sure)),
    ]


def _score_bars(scores: np.ndarray, bins: int = 14) -> list[tuple[str, int]]:
    counts, edges = np.histogram(scores, bins)
    return [
        (f"{low:.2f} to {high:.2f}", int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


# -- apply -----------------------------------------------------------------------------------------


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
    report: Callable[[str], None] = lambda line: None,
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
    report(f"looking at {len(parts):,} parts of {source}")
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
    report(f"writing {len(stays):,} rows to {out}")
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
        Section("Scores", "What scores 0 or more is dropped.", bars=_score_bars(scores)),
        *(_truth_sections(assessment) if assessment else []),
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
