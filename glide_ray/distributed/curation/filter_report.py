"""Assessment of a content filter, and the report pages of fitting and applying it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.content import ContentFilter
from ...data.filters import Report
from ...evaluation.pages import Picture, Section, page
from ...evaluation.report import roc_curve
from ..embed import EmbeddedCorpus
from .clean_page import credit_sections
from .score_counts import ScoreCounts

PICTURES_SHOWN = 24  # pictures in a section of the page
RANDOM_SHOWN = 2 * PICTURES_SHOWN
MISSED_SHOWN = 4 * PICTURES_SHOWN


@dataclass(frozen=True)
class Assessment:
    """Performance of a filter on rows that it was not fitted on.

    `counts` has all of them; `rows` are those that the page may show, with their scores and truth.
    """

    on: str  # description of these rows
    counts: ScoreCounts
    rows: EmbeddedCorpus
    scores: np.ndarray  # (N,), 0 at the decision boundary, dropped from there on
    truth: np.ndarray  # (N,) bool: whether a row has the content

    @classmethod
    def of(cls, on: str, rows: EmbeddedCorpus, scores: np.ndarray, truth: np.ndarray) -> Assessment:
        """An assessment of rows that are all in memory."""
        return cls(on, ScoreCounts.of(scores, truth), rows, scores, truth)

    def __str__(self) -> str:
        return f"on {self.on}: {self.counts}"


@dataclass(frozen=True)
class FilterFit:
    """Result of a call of `fit_content`."""

    content: ContentFilter | None
    labelled: int
    with_content: int
    waiting: int  # rows in the CSV that have no label yet
    on_labels: str  # sentence on the filter's errors on the labelled rows, by cross-validation
    assessment: Assessment | None


def fit_page(done: FilterFit, embedded: EmbeddedCorpus) -> str:
    content = done.content
    assert content is not None  # without a filter there is no page
    name = content.name
    scores = content.score(embedded.features)
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
            "Scores of the candidate rows",
            "Rows with a score of 0 or more are dropped.",
            bars=score_bars(scores),
        ),
    ]
    if done.assessment is not None:
        sections += truth_sections(done.assessment)
    sections += [
        Section(
            "Rows that pass, nearest to the boundary",
            "Check these for content that should not pass.",
            groups=embedded.pictures(nearest),
        ),
        Section("Rows that pass, at random", groups=embedded.pictures(some)),
    ]
    return page(f"The content filter {name}", sections)


def truth_sections(assessment: Assessment) -> list[Section]:
    rows, counts = assessment.rows, assessment.counts
    missed, sure = shown_errors(assessment.scores, assessment.truth)
    all_missed = int(counts.outcomes[1, 0])
    return [
        Section(
            "Assessment",
            str(assessment),
            width=440,
            groups=[[Picture(roc_curve(*counts.weighted()))]] if counts.both else [],
        ),
        Section(
            f"Missed: all {all_missed}"
            if all_missed <= MISSED_SHOWN
            else f"Missed: {MISSED_SHOWN} of {all_missed}",
            groups=rows.pictures(missed.tolist()),
        ),
        Section(
            "Dropped although they lack the content, highest score first",
            groups=rows.pictures(sure.tolist()),
        ),
    ]


def shown_errors(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that a page shows: the first missed ones, and those dropped by the highest scores."""
    missed, dropped = np.flatnonzero(truth & (scores < 0)), np.flatnonzero(~truth & (scores >= 0))
    by_score = dropped[np.argsort(-scores[dropped], kind="stable")]
    return missed[:MISSED_SHOWN], by_score[:PICTURES_SHOWN]


def score_bars(
    scores: np.ndarray, rows: np.ndarray | None = None, bins: int = 14
) -> list[tuple[str, int]]:
    """Histogram of scores (N,); `rows` (N,): rows that have each score, by default one."""
    counts, edges = np.histogram(scores, bins, weights=rows)
    return [
        (f"{low:.2f} to {high:.2f}", int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def applied_page(
    title: str,
    read: int,
    parts: int,
    counted: Report,
    embedded: EmbeddedCorpus,
    scores: np.ndarray,
    assessment: Assessment | None,
    card: Mapping[str, Any],
) -> str:
    """Page on rows that a filter was applied to.

    `embedded` and `scores` (N,): rows of a few parts, or of all. `card`: that of the rows which
    passed.
    """
    draws = np.random.default_rng(0)
    if assessment is None:
        bars = score_bars(scores)
    else:
        every, _, rows = assessment.counts.weighted()
        bars = score_bars(every, rows)
    passing, dropped = np.flatnonzero(scores < 0), np.flatnonzero(scores >= 0)

    def shown(rows: np.ndarray, count: int) -> list[list[Picture]]:
        return embedded.pictures(rows[:count].tolist())

    sections = [
        Section(
            "Rows by outcome",
            f"Rows read: {read:,}. Parts: {parts:,}.",
            bars=[("kept", counted.kept), *counted.dropped.most_common()],
        ),
        Section(
            "Parts with a fault",
            "Their rows before the fault were read.",
            lines=sorted(set(counted.faults)),
        ),
        *credit_sections(card),
        Section("Scores", "Rows with a score of 0 or more are dropped.", bars=bars),
        *(truth_sections(assessment) if assessment else []),
        Section("Kept rows, at random", groups=shown(draws.permutation(passing), RANDOM_SHOWN)),
        Section(
            "Kept rows, nearest to the boundary",
            groups=shown(passing[np.argsort(-scores[passing])], PICTURES_SHOWN),
        ),
        Section("Dropped, at random", groups=shown(draws.permutation(dropped), PICTURES_SHOWN)),
    ]
    return page(title, sections)
