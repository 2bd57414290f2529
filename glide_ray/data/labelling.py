"""Active learning (app. F.1): which rows of a corpus to label next, and the CSV of the labels.

The first rows come from a word search and a random draw. Every later round takes the rows nearest
to the decision boundary of the SVM fitted so far.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import storage
from ..config.data import FilterConfig
from .content import ContentError, Fitted, first_guess, fit, tuned_threshold

COLUMNS = ("row", "label", "caption", "why")
YES, NO = ("1", "yes", "y", "true"), ("0", "no", "n", "false")
SEARCHED, RANDOM, NEAR = "search", "random", "near the boundary"


@dataclass(frozen=True)
class Pool:
    """Rows that may be chosen for labelling."""

    names: Sequence[str]  # PART#POSITION of each
    captions: Sequence[str]
    features: np.ndarray  # (N, E)
    groups: np.ndarray  # (N,) int, shared by rows that show the same thing
    likeness: np.ndarray  # (N, W) similarity to each search word


def ask(
    pool: Pool, labelled: Mapping[int, bool], config: FilterConfig, among: np.ndarray | None = None
) -> list[tuple[int, str]]:
    """Rows to label next, each with the reason: SEARCHED, RANDOM or NEAR.

    [] once `config.labels` rows are labelled, or no row is left. `among` (N,) bool restricts the
    choice to some rows.
    """
    free = np.ones(len(pool.names), bool) if among is None else among.copy()
    free[list(labelled)] = False
    draws = np.random.default_rng([config.seed, len(labelled)])
    if not labelled:
        return _found_and_drawn(pool, free, min(config.first, config.labels), draws)
    count = min(config.each_round, config.labels - len(labelled))
    if count <= 0 or not free.any():
        return []
    rows, labels = np.array(list(labelled)), np.array(list(labelled.values()), bool)
    if labels.all() or not labels.any():
        return _found_and_drawn(pool, free, count, draws)
    try:
        svm = fit(pool.features[rows], labels, pool.groups[rows]).svm
    except ContentError:
        svm = first_guess(pool.features[rows], labels)
    scores = np.full(len(free), np.inf)
    scores[free] = np.abs(svm.decision_function(pool.features[free]))
    return [
        (row, NEAR)
        for row in _one_of_each_group(np.argsort(scores, kind="stable")[: free.sum()], pool.groups)[
            :count
        ].tolist()
    ]


def answered(
    pool: Pool, truth: np.ndarray, config: FilterConfig, among: np.ndarray | None = None
) -> dict[int, bool]:
    """Run the labelling loop with the known answers `truth` (N,) bool. Returns row -> label."""
    labelled: dict[int, bool] = {}
    while rows := ask(pool, labelled, config, among):
        labelled |= {row: bool(truth[row]) for row, _ in rows}
    return labelled


def fit_labelled(pool: Pool, labelled: Mapping[int, bool]) -> Fitted:
    """SVM fitted on the labelled rows. Raises ContentError."""
    rows = np.array(list(labelled), np.int64)
    return fit(pool.features[rows], np.array(list(labelled.values()), bool), pool.groups[rows])


def threshold_of(
    fitted: Fitted, pool: Pool, labelled: Mapping[int, bool], config: FilterConfig
) -> float:
    """Score threshold of the filter, tuned on out-of-fold scores of labelled rows with the content.

    Each group counts once, by its lowest score: ten skin tones of one thing are one independent
    example, not ten, and all of them must be found. (Counted by rows, people filters of the emoji
    corpus missed 3 to 7 of 221 held-out rows, where 2 were allowed.)
    """
    rows, labels = np.array(list(labelled)), np.array(list(labelled.values()), bool)
    groups, of = np.unique(pool.groups[rows[labels]], return_inverse=True)
    lowest = np.full(len(groups), np.inf)
    np.minimum.at(lowest, of, fitted.out_of_fold[labels])
    return tuned_threshold(lowest, config.max_missed, config.confidence)


def assess(pool: Pool, truth: np.ndarray, config: FilterConfig, folds: int = 4) -> np.ndarray:
    """Score of each row (N,) by a filter fitted without the row's group; 0 at the tuned boundary.

    For each fold, the whole loop with its search and labels runs on the other folds. The rows of a
    fold are NaN if the loop found too few labels to fit a filter.
    """
    groups = np.unique(pool.groups)
    fold = np.random.default_rng([config.seed, folds]).permutation(len(groups)) % folds
    # Deal out the groups with the content separately: otherwise chance may put most of them into
    # one fold.
    rare = np.isin(groups, pool.groups[truth])
    for kind in (True, False):
        fold[rare == kind] = (
            np.random.default_rng([config.seed, kind]).permutation(np.arange((rare == kind).sum()))
            % folds
        )
    fold = fold[np.searchsorted(groups, pool.groups)]
    scores = np.full(len(truth), np.nan)
    for number in range(folds):
        labelled = answered(pool, truth, config, fold != number)
        try:
            fitted = fit_labelled(pool, labelled)
        except ContentError:
            continue
        apart = fold == number
        scores[apart] = fitted.svm.decision_function(pool.features[apart]) - threshold_of(
            fitted, pool, labelled, config
        )
    return scores


def _found_and_drawn(
    pool: Pool, free: np.ndarray, count: int, draws: np.random.Generator
) -> list[tuple[int, str]]:
    """Half of the rows by similarity to the search words, if there are any; the rest at random."""
    rows: list[tuple[int, str]] = []
    if pool.likeness.shape[1]:
        best = np.argsort(np.where(free[:, None], -pool.likeness, np.inf), axis=0, kind="stable")[
            : free.sum()
        ]
        _, first = np.unique(best.ravel(), return_index=True)
        in_turn = best.ravel()[np.sort(first)]  # best row of each word, then second best of each
        rows = [
            (row, SEARCHED)
            for row in _one_of_each_group(in_turn, pool.groups)[: count // 2].tolist()
        ]
    rest = np.setdiff1d(np.flatnonzero(free), [row for row, _ in rows])
    return rows + [(row, RANDOM) for row in draws.permutation(rest)[: count - len(rows)].tolist()]


def _one_of_each_group(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Move the first row of each group to the front: near-copies teach an SVM little."""
    _, first = np.unique(groups[rows], return_index=True)
    return np.concatenate([rows[np.sort(first)], np.delete(rows, first)])


# -- CSV of the labels -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Label:
    """One line of the CSV."""

    row: str  # PART#POSITION in the corpus
    label: bool | None  # whether the row has the content; None until somebody labels it
    caption: str = ""
    why: str = ""  # reason for asking


def read_labels(path: str | Path) -> list[Label]:
    """Read the CSV; [] if there is none.

    Raises ContentError for a label that is neither yes nor no, a line that names no row, or text
    that is not UTF-8.
    """
    try:
        text = storage.read(path).decode("utf-8-sig")
    except storage.MissingError:
        return []
    except UnicodeDecodeError:
        raise ContentError(
            f"{path} is not text in UTF-8; save the table anew as CSV in UTF-8."
        ) from None
    labels = []
    for number, line in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        text = (line.get("label") or "").strip().lower()
        if not line.get("row"):
            raise ContentError(
                f"{path}, line {number} names no row; the columns are {', '.join(COLUMNS)}."
            )
        if text not in (*YES, *NO, ""):
            raise ContentError(
                f"{path}, line {number}: the label {text!r} is neither 1 (has the content) nor 0; "
                f"write one of the two, or leave it empty."
            )
        labels.append(
            Label(
                line["row"],
                None if not text else text in YES,
                line.get("caption") or "",
                line.get("why") or "",
            )
        )
    return labels


def write_labels(path: str | Path, labels: Sequence[Label]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(
        (label.row, "" if label.label is None else int(label.label), label.caption, label.why)
        for label in labels
    )
    storage.put(text.getvalue().encode(), path)
