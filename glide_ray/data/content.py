"""The paper's content filter (app. F.1): an RBF SVM on CLIP's features of an image, its bias set so that it misses few.

A filter is saved as arrays and settings in one safetensors file: reading it runs no code. Which rows are labelled to fit one is
`labelling.py`'s to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.svm import SVC

from .. import storage
from ..errors import UserError

COSTS, WIDTHS = (
    (1.0, 10.0, 100.0),
    (0.1, 0.3, 1.0),
)  # tried: the SVM's C; gamma as a multiple of 1 / (features' number x variance)
FOLDS = 5


class ContentError(UserError):
    """A filter that cannot be fitted, or is not one."""


@dataclass(frozen=True)
class ContentFilter:
    """score(x) = sum_s weights_s exp(-gamma |x - vectors_s|^2) + bias; what scores 0 or more has the content, and is dropped."""

    name: str
    vectors: np.ndarray  # (S, E) float32
    weights: np.ndarray  # (S,) float32
    gamma: float
    bias: float
    clip: str  # SHA-256 of the CLIP whose features it reads
    settings: Mapping  # what it was fitted with, and how it did, for people

    def score(self, features: np.ndarray) -> np.ndarray:
        """Features (N, E) -> (N,) float64."""
        features = np.asarray(features, np.float64)
        apart = (
            np.square(features).sum(1)[:, None]
            - 2 * features @ self.vectors.T.astype(np.float64)
            + np.square(self.vectors.astype(np.float64)).sum(1)
        )
        return (
            np.exp(-self.gamma * np.maximum(apart, 0)) @ self.weights.astype(np.float64) + self.bias
        )

    def save(self, path: str | Path) -> None:
        """Write one local file, whole or not at all."""
        header = {
            "name": self.name,
            "gamma": self.gamma,
            "bias": self.bias,
            "clip": self.clip,
            "settings": dict(self.settings),
        }
        with storage.whole(path) as partial:
            save_file(
                {"vectors": self.vectors, "weights": self.weights},
                partial,
                metadata={"content_filter": json.dumps(header)},
            )


def load_filter(path: str | Path) -> ContentFilter:
    """A filter from its file, local or on s3://. Raises ContentError, StorageError."""
    local = storage.fetch(path)
    try:
        with safe_open(local, "np") as file:
            header = json.loads((file.metadata() or {})["content_filter"])
            return ContentFilter(
                vectors=file.get_tensor("vectors"), weights=file.get_tensor("weights"), **header
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise ContentError(
            f"{path} is not a content filter; fit one with `glide filter fit`."
        ) from None


# -- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """An SVM without its tuned bias, and what it says of rows that it was not fitted on."""

    svm: SVC
    out_of_fold: (
        np.ndarray
    )  # (N,) the score of each labelled row by an SVM that saw nothing of its group
    cost: float
    width: float


def fit(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Fitted:
    """Fit to features (N, E) and labels (N,) bool. Rows that resemble each other share a number in `groups` (N,): they are judged together
    by an SVM that saw none of them. Raises ContentError where there are too few labels of either kind."""
    yes, no = (len(np.unique(groups[labels == kind])) for kind in (True, False))
    folds = min(FOLDS, yes, no)
    if folds < 2:
        raise ContentError(
            f"Labels of {yes} different pictures with the content and {no} without are too few to fit a filter on: label two of "
            f"each at the least, and find them with --search WORD."
        )
    splits = list(
        StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(features, labels, groups)
    )
    best = None
    for cost in COSTS:
        for width in WIDTHS:
            scores = np.zeros(len(labels))
            for rest, apart in splits:
                if len(np.unique(labels[rest])) == 2:
                    scores[apart] = _svm(
                        features[rest], labels[rest], cost, width
                    ).decision_function(features[apart])
            quality = roc_auc_score(labels, scores)
            if best is None or quality > best[0]:
                best = quality, scores, cost, width
    _, scores, cost, width = best
    return Fitted(_svm(features, labels, cost, width), scores, cost, width)


def first_guess(features: np.ndarray, labels: np.ndarray) -> SVC:
    """An SVM to ask the next labels by, where a row of each kind has been labelled but nothing can be judged yet."""
    return _svm(features, labels, COSTS[0], WIDTHS[1])


def _svm(features: np.ndarray, labels: np.ndarray, cost: float, width: float) -> SVC:
    gamma = width / (features.shape[1] * max(float(features.var()), 1e-12))
    return SVC(kernel="rbf", C=cost, gamma=gamma, class_weight="balanced").fit(features, labels)


def tuned_threshold(positives: np.ndarray, max_missed: float, confidence: float = 0.95) -> float:
    """The highest threshold below which, at this confidence, less than `max_missed` of what has the content scores.

    `positives` (N,) are scores of rows with the content that the SVM was not fitted on. Where they are enough (299 for 1% at 95%), the
    binomial interval decides and nothing is assumed of their distribution; where they are fewer, it is taken for normal, and the
    threshold is its one-sided tolerance bound, or the lowest of them if that is lower.
    """
    ordered = np.sort(np.asarray(positives, np.float64))
    count, margin = len(ordered), 1e-6
    may_miss = next(
        k
        for k in range(count + 1)
        if missed_interval(k, count, 2 * confidence - 1)[1] >= max_missed
    )  # one too many
    if may_miss:
        return float(ordered[may_miss - 1])
    if count < 2:
        return float(ordered.min() - 1)
    factor = (
        stats.nct.ppf(confidence, count - 1, stats.norm.ppf(1 - max_missed) * count**0.5)
        / count**0.5
    )
    return float(min(ordered.mean() - factor * ordered.std(ddof=1), ordered[0] - margin))


def missed_interval(missed: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of Clopper and Pearson for a share of which `missed` of `of` were seen."""
    if not of:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, missed, of - missed + 1) if missed else 0.0
    high = stats.beta.ppf(1 - tail, missed + 1, of - missed) if missed < of else 1.0
    return float(low), float(high)


def with_threshold(
    fitted: Fitted, threshold: float, name: str, clip: str, settings: Mapping
) -> ContentFilter:
    """The filter whose score is 0 where the SVM's is `threshold`."""
    svm = fitted.svm
    return ContentFilter(
        name,
        svm.support_vectors_.astype(np.float32),
        svm.dual_coef_[0].astype(np.float32),
        float(svm.gamma),
        float(svm.intercept_[0] - threshold),
        clip,
        settings,
    )
