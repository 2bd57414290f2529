"""`glide filter fit`: fit a content filter on labelled rows of a corpus (app. F.1)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from ... import storage
from ...config.data import FilterConfig
from ...data.content import (
    ContentError,
    ContentFilter,
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
from ...evaluation.report import contact_sheet
from ...models.clip_scorer import fetch_clip
from ...storage import fingerprint
from ..cluster import connect, send_with
from ..embed import ACTORS, EmbeddedCorpus, cached_table, cached_table_of, embed
from .corpus import PAGE, look_up
from .filter_report import Assessment, Fit, fit_page

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
    looked = _pool(corpus, out, str(Path(clip_path).resolve()), config, truth, labels)
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
        else _assess(content, pool, looked, corpus, held_out, str(clip_path), config, truth)
    )
    done = Fit(content, len(labelled), of, len(asked), on_labels, assessment)
    storage.put(fit_page(done, looked).encode(), out / PAGE)
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
        log.info(f"looking at {corpus}, {config.pool:,} rows at the most")
        table, counted = embed(parts, clip, truth, group=config.group, limit=config.pool)
        for fault in counted.faults:
            log.info(fault)
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
) -> Assessment:
    if held_out:
        parts = find_parts(storage.absolute(held_out))
        log.info(f"looking at {held_out}")
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
