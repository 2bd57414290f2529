"""Classification of styles by exact colours and by texture.

A linear classifier on each, and a logistic regression that combines their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.splits import share
from .heads import Discriminant, Logistic
from .judge_features import JudgeFeatures

FOLDS = 3  # cross-validation folds of things: a picture's thing is not in its fit
SHRINK, PENALTY, DECAY = 0.3, 1.0, 1e-4
# Two shadings by the same artist, nearly identical for 63% of the things: merged into one style.
SAME_LOOK = {"soft gradient": "3D render"}


@dataclass(frozen=True)
class Styles:
    """A fitted classifier of styles.

    `labels`: the C styles.
    `codes` (P,): bins of the colour histogram that are in use.
    `palette` (P, C), `bias` (C,): their linear classifier.
    `texture`: the classifier of textures.
    `weigh`: combines both scores.
    `added`: styles learnt later, each a binary classifier.
    """

    labels: tuple[str, ...]
    codes: np.ndarray
    palette: np.ndarray
    bias: np.ndarray
    texture: Discriminant
    weigh: Logistic
    added: Mapping[str, Logistic] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, features: JudgeFeatures, styles: Sequence[str], things: Sequence[str]
    ) -> tuple[Styles, np.ndarray]:
        """Fit to pictures with the style and the thing of each.

        Also returns, for each picture, whether the classifier was right when fitted without any
        picture of its thing: (N,) bool.
        """
        looks = np.array([look_of(style) for style in styles])
        labels = tuple(sorted(set(looks)))
        index = np.searchsorted(labels, looks)
        fold = np.array([int(share(f"fold/{thing}") * FOLDS) for thing in things])
        scores = np.zeros((len(features), 2 * len(labels)), np.float32)
        for n in range(FOLDS):
            inside, outside = np.flatnonzero(fold != n), np.flatnonzero(fold == n)
            if len(outside):
                scores[outside] = _parts(features, inside, index, labels)._scores(
                    _rows(features, outside)
                )
        weigh = Logistic.fit(scores, index, DECAY, rounds=200)
        return replace(
            _parts(features, np.arange(len(features)), index, labels), weigh=weigh
        ), weigh.best(scores) == index

    def best(self, features: JudgeFeatures) -> list[str]:
        """The style of each picture, with those of SAME_LOOK as one."""
        found = [self.labels[n] for n in self.weigh.best(self._scores(features))]
        for style, head in self.added.items():
            found = [
                style if is_new else known_style
                for is_new, known_style in zip(head.best(features.textures), found, strict=True)
            ]
        return found

    def adding(self, style: str, features: JudgeFeatures, others: JudgeFeatures) -> Styles:
        """A copy with one more style: a binary classifier of its textures against `others`."""
        textures = np.concatenate([others.textures, features.textures]).astype(np.float32)
        is_new = np.repeat([0, 1], [len(others), len(features)])
        return replace(self, added={**self.added, style: Logistic.fit(textures, is_new, DECAY)})

    def _scores(self, features: JudgeFeatures) -> np.ndarray:
        """Scores by colours and by texture: (N, 2 C)."""
        colours = features.colours[:, self.codes] @ self.palette + self.bias
        texture = self.texture.scores(features.textures) / 2
        return np.concatenate([colours, texture - texture.mean(1, keepdims=True)], 1).astype(
            np.float32
        )

    def tensors(self) -> dict[str, np.ndarray]:
        return {
            "codes": self.codes,
            "palette": self.palette,
            "bias": self.bias,
            **{f"texture.{key}": value for key, value in self.texture.tensors().items()},
            **{f"weigh.{key}": value for key, value in self.weigh.tensors().items()},
        }

    @classmethod
    def of(cls, labels: Sequence[str], tensors: dict[str, np.ndarray]) -> Styles:
        """Rebuild from the result of `tensors`."""
        part = {
            name: {
                key.partition(".")[2]: value
                for key, value in tensors.items()
                if key.startswith(f"{name}.")
            }
            for name in ("texture", "weigh")
        }
        return cls(
            tuple(labels),
            tensors["codes"].astype(np.int64),
            tensors["palette"],
            tensors["bias"],
            Discriminant(tuple(labels), cosine=False, **part["texture"]),
            Logistic(**part["weigh"]),
        )


def look_of(style: str) -> str:
    """The class of a style: itself, or the style that it looks like."""
    return SAME_LOOK.get(style, style)


def _parts(
    features: JudgeFeatures, rows: np.ndarray, index: np.ndarray, labels: tuple[str, ...]
) -> Styles:
    """Both classifiers, without the weights that combine them."""
    from sklearn.svm import LinearSVC  # comes with the extra `judge`

    colours = features.colours[rows]
    codes = np.flatnonzero(colours.getnnz(0))
    machine = LinearSVC(C=PENALTY, max_iter=200, random_state=0).fit(colours[:, codes], index[rows])
    weights, bias = machine.coef_, machine.intercept_
    if len(labels) == 2:  # LinearSVC then fits a single hyperplane
        weights, bias = np.stack([-weights[0], weights[0]]), np.array([-bias[0], bias[0]])
    texture = Discriminant.fit(
        features.textures[rows], [labels[n] for n in index[rows]], SHRINK, len(labels)
    )
    nothing = Logistic(*(np.empty(0, np.float32) for _ in range(4)))
    return Styles(
        labels, codes, weights.T.astype(np.float32), bias.astype(np.float32), texture, nothing
    )


def _rows(features: JudgeFeatures, rows: np.ndarray) -> JudgeFeatures:
    return JudgeFeatures(features.shapes[rows], features.textures[rows], features.colours[rows])
