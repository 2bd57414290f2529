"""Scores of a filter on any number of labelled rows, counted in bounded memory."""

from __future__ import annotations

import numpy as np

from ...data.content import missed_interval

MAX_DISTINCT = 1 << 20  # distinct scores kept before rounding
BUFFERED = 1 << 20  # rows per merge into the counts
DROPPED_BITS = 4  # mantissa bits removed by each rounding


class ScoreCounts:
    """How many rows with and without the content have each score.

    Rows with a score of 0 or more are dropped, and `outcomes` counts these exactly. Above
    MAX_DISTINCT different scores, they are rounded towards 0, more coarsely as they become more:
    with 2^20 float32 scores the area under the ROC changes by less than 0.001.
    """

    def __init__(self) -> None:
        self.outcomes = np.zeros((2, 2), np.int64)  # [content or not, dropped or not]
        self._scores = np.empty(0, np.float32)
        self._counts = np.empty((0, 2), np.int64)  # without and with the content
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._buffered, self._bits = 0, 0

    @classmethod
    def of(cls, scores: np.ndarray, truth: np.ndarray) -> ScoreCounts:
        counts = cls()
        counts.add(scores, truth)
        return counts

    def add(self, scores: np.ndarray, truth: np.ndarray) -> None:
        """Count rows: `scores` (N,), and `truth` (N,) bool, whether a row has the content."""
        np.add.at(self.outcomes, (truth.astype(int), (scores >= 0).astype(int)), 1)
        self._buffer.append((np.asarray(scores, np.float32), np.asarray(truth, bool)))
        self._buffered += len(scores)
        if self._buffered >= BUFFERED:
            self._merge()

    def weighted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (M,), truth (M,) bool and numbers of rows (M,) that stand for all rows."""
        self._merge()
        truth = np.repeat([False, True], len(self._scores))
        weights = self._counts.T.ravel()
        some = weights > 0
        return np.tile(self._scores, 2)[some], truth[some], weights[some]

    @property
    def both(self) -> bool:
        """Whether there are rows with the content and rows without it."""
        return bool(self.outcomes.sum(axis=1).all())

    @property
    def area(self) -> float:
        """Area under the ROC; NaN without rows of both kinds."""
        from sklearn.metrics import roc_auc_score

        if not self.both:
            return float("nan")
        scores, truth, weights = self.weighted()
        return float(roc_auc_score(truth, scores, sample_weight=weights))

    def __str__(self) -> str:
        (_, caught), (missed, found) = self.outcomes.tolist()
        without, positives = int(self.outcomes[0].sum()), missed + found
        low, high = missed_interval(missed, positives)
        return (
            f"{missed} of {positives:,} missed ({missed / max(1, positives):.2%}, "
            f"95% interval {low:.2%} to {high:.2%}); {caught / max(1, without):.1%} of "
            f"{without:,} rows without it dropped; area under the ROC {self.area:.3f}"
        )

    def _merge(self) -> None:
        scores = np.concatenate([self._scores, *(scores for scores, _ in self._buffer)])
        counts = np.zeros((len(scores), 2), np.int64)
        counts[: len(self._counts)] = self._counts
        truth = [truth for _, truth in self._buffer]
        new = np.concatenate(truth).astype(int) if truth else np.empty(0, int)
        counts[np.arange(len(self._counts), len(scores)), new] = 1
        self._buffer, self._buffered = [], 0
        while True:
            self._scores, place = np.unique(_rounded(scores, self._bits), return_inverse=True)
            if len(self._scores) <= MAX_DISTINCT:
                break
            self._bits += DROPPED_BITS
        self._counts = np.zeros((len(self._scores), 2), np.int64)
        np.add.at(self._counts, place, counts)


def _rounded(scores: np.ndarray, bits: int) -> np.ndarray:
    """Scores without the last bits of their fractions."""
    mask = np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)
    return (scores.view(np.uint32) & mask).view(np.float32)
