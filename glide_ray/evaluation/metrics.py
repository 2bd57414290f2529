"""Metrics of generated images against real ones, as pure functions of features (N, D).

FID, KID, CMMD, precision and recall, IS, CLIP score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import UserError

ROWS = 1024  # rows of a distance matrix held in memory at once


class MetricError(UserError):
    """Features from which a metric cannot be computed."""


# -- Fréchet distance ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Moments of features: their count, mean (D,) and unbiased covariance (D, D)."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        features = _checked(features, least=2).astype(np.float64)
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred / (len(features) - 1))

    @cached_property
    def root(self) -> np.ndarray:
        """Symmetric square root of the covariance: (D, D)."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def union(self, other: Moments) -> Moments:
        """Moments of the union of two sets, from theirs alone (Chan et al. 1979)."""
        count, mean_difference = self.count + other.count, other.mean - self.mean
        scatter = (
            (self.count - 1) * self.covariance
            + (other.count - 1) * other.covariance
            + self.count * other.count / count * np.outer(mean_difference, mean_difference)
        )
        return Moments(
            count, self.mean + mean_difference * other.count / count, scatter / (count - 1)
        )


def frechet_distance(first: Moments, second: Moments) -> float:
    """Fréchet distance; FID for Inception's pooled features (Heusel et al. 2017, eq. 6)."""
    if first.mean.shape != second.mean.shape:
        raise MetricError(
            f"The two sets have features of {len(first.mean)} and {len(second.mean)} numbers; "
            f"measure both with the same network."
        )
    # Symmetric, with the same eigenvalues as the product of the two covariances.
    cross = second.root @ first.covariance @ second.root
    return _frechet(first.mean, np.trace(first.covariance), cross, second)


def frechet_infinity(
    features: np.ndarray, reference: Moments, points: int = 15, least: int = 5000, seed: int = 0
) -> float:
    """FID extrapolated to infinitely many samples (Chong & Forsyth 2020).

    FID is linear in 1/N: a line is fitted at `points` values of N, the smallest `least`, and
    evaluated at 1/N = 0.
    """
    features = _checked(features, least=2)
    rng = np.random.default_rng(seed)
    counts = np.linspace(min(least, len(features) // 2), len(features), points).astype(int)
    distances = [
        _from_rows(features[rng.permutation(len(features))[:count]].astype(np.float64), reference)
        for count in counts
    ]
    return float(np.polyfit(1 / counts, distances, 1)[1])


def _from_rows(features: np.ndarray, reference: Moments) -> float:
    """Fréchet distance of rows (N, D) to `reference`, also for N <= D.

    Then the (N, N) matrix has the same non-zero eigenvalues as the larger (D, D) one.
    """
    if len(features) > features.shape[1]:
        return frechet_distance(Moments.of(features), reference)
    mean = features.mean(0)
    centred = (features - mean) / np.sqrt(len(features) - 1)
    return _frechet(mean, np.sum(centred**2), centred @ reference.covariance @ centred.T, reference)


def _frechet(mean: np.ndarray, spread: float, cross: np.ndarray, other: Moments) -> float:
    roots = np.sqrt(np.linalg.eigvalsh(cross).clip(0)).sum()
    return float(
        max(np.sum((mean - other.mean) ** 2) + spread + np.trace(other.covariance) - 2 * roots, 0.0)
    )


# -- kernels ---------------------------------------------------------------------------------------


def kid(
    real: np.ndarray, generated: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance: mean and standard deviation over subsets.

    Unbiased squared MMD with the kernel (xy/D + 1)^3 (Binkowski et al. 2018).
    """
    real, generated = _pair(real, generated)
    size, rng = min(size, len(real), len(generated)), np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            features[rng.choice(len(features), size, replace=False)]
            for features in (real, generated)
        )
        estimates.append(
            _unbiased(*((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))))
        )
    return float(np.mean(estimates)), float(np.std(estimates))


def cmmd(
    real: np.ndarray, generated: np.ndarray, sigma: float = 10.0, scale: float = 1000.0
) -> float:
    """CLIP maximum mean discrepancy, times `scale` (Jayasumana et al. 2024).

    Biased squared MMD of CLIP features, normalised to length 1, with a Gaussian kernel of width
    `sigma`.
    """
    real, generated = (
        features / np.linalg.norm(features, axis=1, keepdims=True)
        for features in _pair(real, generated)
    )

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(np.exp(-_squared(rows, b) / (2 * sigma**2)).sum() for rows in _blocks(a)) / (
            len(a) * len(b)
        )

    return scale * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))


def _unbiased(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    n = len(xx)
    return (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1)) - 2 * xy.mean()


# -- neighbours ------------------------------------------------------------------------------------


def precision_recall(
    real: np.ndarray, generated: np.ndarray, k: int = 3, real_radii: np.ndarray | None = None
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision: share of generated images within the real manifold; recall: share of real images
    within the generated one. An image is within a manifold if it is nearer to one of its images
    than that image's k-th neighbour. `real_radii`: `squared_radii` of the real images,
    if already computed.
    """
    among_real, among_generated = neighbourhood(real, generated, k, real_radii)
    return float(among_real.mean()), float(among_generated.mean())


def neighbourhood(
    real: np.ndarray, generated: np.ndarray, k: int = 3, real_radii: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image lies within the manifold of the other set: two bool arrays.

    First the generated images within the real manifold, then the real ones within the generated
    manifold. Precision and recall are their means.
    """
    real, generated = _pair(real, generated)
    real_radii, generated_radii = (
        squared_radii(real, k) if real_radii is None else real_radii,
        squared_radii(generated, k),
    )
    among_real, among_generated = np.zeros(len(generated), bool), []
    for start, rows in zip(range(0, len(real), ROWS), _blocks(real), strict=True):
        distances = _squared(rows, generated)
        among_real |= (distances < real_radii[start : start + len(rows), None]).any(0)
        among_generated.append((distances < generated_radii).any(1))
    return among_real, np.concatenate(among_generated)


def squared_radii(features: np.ndarray, k: int = 3) -> np.ndarray:
    """Squared distance of each row to its k-th nearest neighbour, itself excluded: (N,)."""
    if len(features) <= k:
        raise MetricError(
            f"{k} neighbours need more than {k} images on each side (given: {len(features)})."
        )
    features = features.astype(np.float64)
    # Copy the column: a view would keep the whole block of distances in memory.
    return np.concatenate(
        [
            np.partition(_squared(rows, features), k, axis=1)[:, k].copy()
            for rows in _blocks(features)
        ]
    )


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (A, B)."""
    return ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T).clip(0)


def _blocks(rows: np.ndarray) -> Sequence[np.ndarray]:
    return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]


# -- scores ----------------------------------------------------------------------------------------


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Inception score: mean and standard deviation over splits (Salimans et al. 2016).

    exp(E KL(p(y|x) || p(y))) of class probabilities (N, Y); splits are consecutive rows.
    """
    probabilities = _checked(probabilities, least=splits).astype(np.float64)
    logs, scores = np.log(probabilities.clip(1e-16)), []
    for part, log in zip(
        np.array_split(probabilities, splits), np.array_split(logs, splits), strict=True
    ):
        scores.append(np.exp((part * (log - np.log(part.mean(0).clip(1e-16)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(images: np.ndarray, captions: np.ndarray) -> float:
    """100 times the mean cosine of CLIP features of images (N, E) and captions (N, E).

    100 is the logit scale of the published CLIPs (app. A.2).
    """
    images, captions = _pair(images, captions)
    cosines = (
        (images * captions).sum(1)
        / np.linalg.norm(images, axis=1)
        / np.linalg.norm(captions, axis=1)
    )
    return 100 * float(cosines.mean())


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = (_checked(features, least=1).astype(np.float64) for features in (first, second))
    if first.shape[1] != second.shape[1]:
        raise MetricError(
            f"The two sets have features of {first.shape[1]} and {second.shape[1]} numbers; "
            f"measure both with the same network."
        )
    return first, second


def _checked(features: np.ndarray, least: int) -> np.ndarray:
    if features.ndim != 2 or len(features) < least:
        raise MetricError(
            f"Features must be a matrix of at least {least} rows, one for each image "
            f"(given: {features.shape})."
        )
    if not np.isfinite(features).all():
        raise MetricError(
            f"{int((~np.isfinite(features)).any(1).sum())} of {len(features)} rows of features "
            f"are not finite; measure without those images."
        )
    return features
