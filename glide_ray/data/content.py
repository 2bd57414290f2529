"""The paper's content filter (app. F.1): RBF SVM on CLIP image features, biased to miss little.

A filter is saved as arrays and settings in one safetensors file, so that loading it runs no code.
`labelling.py` chooses the rows that are labelled to fit a filter.
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

# Search grid: the SVM's C; its gamma as a multiple of 1 / (number of features x their variance).
COSTS, WIDTHS = (1.0, 10.0, 100.0), (0.1, 0.3, 1.0)
FOLDS = 5


class ContentError(UserError):
    """A filter that cannot be fitted or loaded, or labels that cannot be used."""


@dataclass(frozen=True)
class ContentFilter:
    """Decision function of an RBF SVM: rows that score 0 or more have the content and are dropped.

    score(x) = sum_s weights_s exp(-gamma |x - vectors_s|^2) + bias.
    """

    name: str
    vectors: np.ndarray  # (S, E) float32, support vectors
    weights: np.ndarray  # (S,) float32
    gamma: float
    bias: float
    clip: str  # SHA-256 of the CLIP weights that compute the features
    settings: Mapping  # settings and results of the fit, for information only

    def score(self, features: np.ndarray) -> np.ndarray:
        """Scores of features (N, E): (N,) float64."""
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
        """Write one local file, atomically."""
        header = {
            "name": self.name,
            "gamma": self.gamma,
            "bias": self.bias,
            "clip": self.clip,
            "settings": dict(self.settings),
        }
        with storage.atomic_write(path) as partial:
            save_file(
                {"vectors": self.vectors, "weights": self.weights},
                partial,
                metadata={"content_filter": json.dumps(header)},
            )


def load_filter(path: str | Path) -> ContentFilter:
    """Load a filter from a file, local or s3://. Raises ContentError, StorageError."""
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


# -- fitting ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """An SVM before its bias is tuned, and the cross-validated scores of its labelled rows."""

    svm: SVC
    # (N,) score of each labelled row by an SVM fitted without the row's group
    out_of_fold: np.ndarray
    cost: float  # chosen from COSTS
    width: float  # chosen from WIDTHS


def fit(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Fitted:
    """Fit an SVM to features (N, E) and labels (N,) bool, with C and gamma by cross-validation.

    Rows that resemble each other share a number in `groups` (N,). A group is never split between
    folds, so no row is scored by an SVM that saw a similar one. Raises ContentError if either label
    is on fewer than two groups.
    """
    yes, no = (len(np.unique(groups[labels == kind])) for kind in (True, False))
    folds = min(FOLDS, yes, no)
    if folds < 2:
        raise ContentError(
            f"Labels of {yes} different pictures with the content and {no} without are too few to "
            f"fit a filter on: label two of each at the least, and find them with --search WORD."
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
    assert best is not None  # there are several costs and widths
    _, scores, cost, width = best
    return Fitted(_svm(features, labels, cost, width), scores, cost, width)


def first_guess(features: np.ndarray, labels: np.ndarray) -> SVC:
    """SVM for choosing the next rows to label, when labels are too few for cross-validation.

    Needs one row of each label.
    """
    return _svm(features, labels, COSTS[0], WIDTHS[1])


def _svm(features: np.ndarray, labels: np.ndarray, cost: float, width: float) -> SVC:
    gamma = width / (features.shape[1] * max(float(features.var()), 1e-12))
    return SVC(kernel="rbf", C=cost, gamma=gamma, class_weight="balanced").fit(features, labels)


def tuned_threshold(positives: np.ndarray, max_missed: float, confidence: float = 0.95) -> float:
    """Highest threshold that misses, at this confidence, less than `max_missed` of the content.

    A row with the content is missed if it scores below the threshold. `positives` (N,) are scores
    of rows with the content that the SVM was not fitted on. If they are enough (299 for 1% at 95%),
    the binomial interval decides, with no assumption on their distribution. If they are fewer, the
    scores are assumed to be normal, and the threshold is their one-sided tolerance bound, or just
    below the lowest score if that is lower.
    """
    ordered = np.sort(np.asarray(positives, np.float64))
    count, margin = len(ordered), 1e-6
    # smallest number of misses that is too many
    may_miss = next(
        k
        for k in range(count + 1)
        if missed_interval(k, count, 2 * confidence - 1)[1] >= max_missed
    )
    if may_miss:
        return float(ordered[may_miss - 1])
    if count < 2:
        return float(ordered.min() - 1)
    factor = (
        stats.nct.ppf(confidence, count - 1, stats.norm.ppf(1 - max_missed) * count**0.5)
        / count**0.5
    )
    return float(min(ordered.mean() - factor * ordered.std(ddof=1), ordered[0] - margin))


def missed_interval(missed: int, positives: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of the share of misses: `missed` of `positives`."""
    if not positives:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, missed, positives - missed + 1) if missed else 0.0
    high = stats.beta.ppf(1 - tail, missed + 1, positives - missed) if missed < positives else 1.0
    return float(low), float(high)


def with_threshold(
    fitted: Fitted, threshold: float, name: str, clip: str, settings: Mapping
) -> ContentFilter:
    """The filter that scores 0 where the SVM scores `threshold`."""
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
