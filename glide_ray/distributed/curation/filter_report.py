"""Assessment of a content filter, and the report pages of fitting and applying it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from ...data.content import (
    ContentFilter,
    missed_interval,
)
from ...data.filters import Report
from ...evaluation.pages import Picture, Section, page
from ...evaluation.report import roc_curve
from ..embed import EmbeddedCorpus

PICTURES_SHOWN = 24  # pictures in a section of the page


@dataclass(frozen=True)
class Assessment:
    """Performance of a filter on rows that it was not fitted on."""

    on: str  # description of these rows
    rows: EmbeddedCorpus
    scores: np.ndarray  # (N,), 0 at the decision boundary, dropped from there on
    truth: np.ndarray  # (N,) bool: whether a row has the content

    def __str__(self) -> str:
        missed, positives, caught, without = (
            (self.truth & (self.scores < 0)).sum(),
            self.truth.sum(),
            (~self.truth & (self.scores >= 0)).sum(),
            (~self.truth).sum(),
        )
        low, high = missed_interval(int(missed), int(positives))
        return (
            f"on {self.on}: {missed} of {positives:,} missed ({missed / max(1, positives):.2%}, "
            f"95% interval {low:.2%} to {high:.2%}); {caught / max(1, without):.1%} of "
            f"{without:,} rows without it dropped; area under the ROC {self.area:.3f}"
        )

    @property
    def area(self) -> float:
        return (
            float(roc_auc_score(self.truth, self.scores))
            if 0 < self.truth.sum() < len(self.truth)
            else float("nan")
        )


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
        Section(
            "Dropped although they lack the content, highest score first",
            groups=rows.pictures(sure),
        ),
    ]


def score_bars(scores: np.ndarray, bins: int = 14) -> list[tuple[str, int]]:
    counts, edges = np.histogram(scores, bins)
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
) -> str:
    """Page on rows that a filter was applied to; `embedded` and `scores` (N,) are those it saw."""
    draws = np.random.default_rng(0)
    passing, dropped = np.flatnonzero(scores < 0), np.flatnonzero(scores >= 0)

    def shown(rows: np.ndarray, count: int) -> list[list[Picture]]:
        return embedded.pictures(rows[:count].tolist())

    sections = [
        Section(
            "Rows by outcome",
            f"{read:,} were read from {parts:,} parts.",
            bars=[("kept", counted.kept), *counted.dropped.most_common()],
        ),
        Section(
            "Parts with a fault",
            "Their rows before the fault were read.",
            lines=sorted(set(counted.faults)),
        ),
        Section("Scores", "Rows with a score of 0 or more are dropped.", bars=score_bars(scores)),
        *(truth_sections(assessment) if assessment else []),
        Section(
            "Kept rows, at random",
            groups=shown(draws.permutation(passing), 2 * PICTURES_SHOWN),
        ),
        Section(
            "Kept rows, nearest to the boundary",
            groups=shown(passing[np.argsort(-scores[passing])], PICTURES_SHOWN),
        ),
        Section("Dropped, at random", groups=shown(draws.permutation(dropped), PICTURES_SHOWN)),
    ]
    return page(title, sections)
