"""Classifiers on fixed features, fitted in closed form or by convex optimisation.

Fitting is deterministic: the same data give the same judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

LIMIT = 6.0  # standard deviations at which a standardised feature is clipped


@dataclass(frozen=True)
class Discriminant:
    """Linear discriminant analysis: a class is its mean, and classes share one covariance.

    `labels`: names of the C classes.
    `mean`, `scale` (D,): for standardising the features.
    `project` (D, K): to a space in which the within-class covariance is isotropic.
    `centres` (C, K): class means in that space.
    `cosine`: score by the cosine about the mean of all centres, instead of by distance.
    """

    labels: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    project: np.ndarray
    centres: np.ndarray
    cosine: bool = False

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        labels: Sequence[str],
        shrink: float,
        width: int,
        cosine: bool = False,
    ) -> Discriminant:
        """Fit to features (N, D) and the class of each row.

        `shrink`: fraction of the mean variance that is added to the variance of each direction.
        `width`: number of directions to keep, those in which the class means differ most.
        """
        mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-3
        standardised = cls(
            (), mean.astype(np.float32), scale.astype(np.float32), np.empty(0), np.empty(0), cosine
        )
        rows, names = standardised._standard(features), sorted(set(labels))
        index = np.searchsorted(names, labels)
        means = np.stack([rows[index == n].mean(0) for n in range(len(names))])
        within = rows - means[index]
        values, vectors = np.linalg.eigh((within.T @ within / len(rows)).astype(np.float64))
        whiten = vectors / np.sqrt(values.clip(0) + shrink * values.mean())
        centred = (means - means.mean(0)) @ whiten
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        project = (whiten @ directions[:width].T).astype(np.float32)
        return replace(standardised, labels=tuple(names), project=project, centres=means @ project)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: n for n, label in enumerate(self.labels)}

    def place(self, features: np.ndarray) -> np.ndarray:
        """Project features (N, D) into the space of the classes: (N, K)."""
        return self._standard(features) @ self.project

    def scores(self, features: np.ndarray, labels: Sequence[str] | None = None) -> np.ndarray:
        """Scores (N, C), or (N, len(labels)) in the order of `labels`; larger is likelier."""
        return self.scores_at(self.place(features), labels)

    def scores_at(self, rows: np.ndarray, labels: Sequence[str] | None = None) -> np.ndarray:
        """`scores` for rows (N, K) returned by `place`."""
        centres = (
            self.centres
            if labels is None
            else self.centres[[self._index[label] for label in labels]]
        )
        if self.cosine:
            middle = self.centres.mean(0)
            return _directions(rows - middle) @ _directions(centres - middle).T
        return -((rows**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * rows @ centres.T)

    def best(self, features: np.ndarray, labels: Sequence[str] | None = None) -> list[str]:
        """The likeliest class of each row, among `labels` if passed."""
        names = self.labels if labels is None else labels
        return [names[n] for n in self.scores(features, labels).argmax(1)]

    def adding(self, features: np.ndarray, labels: Sequence[str]) -> Discriminant:
        """A copy with more classes, each the mean of its rows of features (N, D).

        Existing classes of the same names are replaced.
        """
        new = sorted(set(labels))
        kept = [n for n, label in enumerate(self.labels) if label not in new]
        rows, row_labels = self.place(features), np.asarray(labels)
        centres = np.concatenate(
            [
                self.centres[kept],
                *(rows[row_labels == label].mean(0, keepdims=True) for label in new),
            ]
        )
        return replace(
            self, labels=(*(self.labels[n] for n in kept), *new), centres=centres.astype(np.float32)
        )

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            "mean": self.mean,
            "scale": self.scale,
            "project": self.project,
            "centres": self.centres,
        }

    def _standard(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean) / self.scale).clip(-LIMIT, LIMIT).astype(np.float32)


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression.

    `mean`, `scale` (D,): for standardising the features. `weights` (D, C), `bias` (C,).
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(
        cls, features: np.ndarray, classes: np.ndarray, decay: float, rounds: int = 80
    ) -> Logistic:
        """Fit to features (N, D) and integer classes (N,) from 0.

        `decay`: weight of the L2 penalty on the weights. `rounds`: maximum number of L-BFGS
        iterations.
        """
        mean, scale = features.mean(0), features.std(0) + 0.05
        x, y = (
            torch.tensor(((features - mean) / scale).clip(-LIMIT, LIMIT)).float(),
            torch.tensor(classes),
        )
        weights = torch.zeros(x.shape[1], int(classes.max()) + 1, requires_grad=True)
        bias = torch.zeros(weights.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=rounds, line_search_fn="strong_wolfe"
        )

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weights + bias, y) + decay * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(
            mean.astype(np.float32),
            scale.astype(np.float32),
            weights.detach().numpy(),
            bias.detach().numpy(),
        )

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Logits (N, C)."""
        return ((features - self.mean) / self.scale).clip(-LIMIT, LIMIT) @ self.weights + self.bias

    def best(self, features: np.ndarray) -> np.ndarray:
        """The likeliest class of each row: (N,) integers."""
        return self.scores(features).argmax(1)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "scale": self.scale, "weights": self.weights, "bias": self.bias}


def _directions(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9)
