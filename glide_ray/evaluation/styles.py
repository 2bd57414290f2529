"""Whose drawing a picture is: by exact colours and by texture, each told linearly, and the two weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.splits import share
from .heads import Discriminant, Logistic
from .looks import Seen

FOLDS = 3  # that things are put into, so that each is told once by what was fitted to others alone
SHRINK, PENALTY, DECAY = 0.3, 1.0, 1e-4
# One artist's drawings, shaded in two ways that cannot be told apart on half of all things: they count as one style.
SAME_LOOK = {"soft gradient": "3D render"}


@dataclass(frozen=True)
class Styles:
    """`labels`: styles in their order. `palette` (P, C), `bias` (C,): weights of the colours `codes` (P,). `weigh` makes of both parts' scores
    one. `added`: styles added later, each told from all others."""

    labels: tuple[str, ...]
    codes: np.ndarray
    palette: np.ndarray
    bias: np.ndarray
    texture: Discriminant
    weigh: Logistic
    added: Mapping[str, Logistic] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, seen: Seen, styles: Sequence[str], things: Sequence[str]
    ) -> tuple[Styles, np.ndarray]:
        """From pictures, each of a style and a thing. Also whether each was told rightly by what had not seen its thing: (N,) bool."""
        looks = np.array([look_of(style) for style in styles])
        labels = tuple(sorted(set(looks)))
        index = np.searchsorted(labels, looks)
        fold = np.array([int(share(f"fold/{thing}") * FOLDS) for thing in things])
        scores = np.zeros((len(seen), 2 * len(labels)), np.float32)
        for n in range(FOLDS):
            inside, outside = np.flatnonzero(fold != n), np.flatnonzero(fold == n)
            if len(outside):
                scores[outside] = _parts(seen, inside, index, labels)._scores(_rows(seen, outside))
        weigh = Logistic.fit(scores, index, DECAY, rounds=200)
        return replace(_parts(seen, np.arange(len(seen)), index, labels), weigh=weigh), weigh.best(
            scores
        ) == index

    def best(self, seen: Seen) -> list[str]:
        """The style of each picture, as it can be told: see SAME_LOOK."""
        found = [self.labels[n] for n in self.weigh.best(self._scores(seen))]
        for style, head in self.added.items():
            found = [
                style if new else own
                for new, own in zip(head.best(seen.textures), found, strict=True)
            ]
        return found

    def adding(self, style: str, seen: Seen, others: Seen) -> Styles:
        """With one more style, told by its texture from real pictures of the other styles."""
        textures = np.concatenate([others.textures, seen.textures]).astype(np.float32)
        is_new = np.repeat([0, 1], [len(others), len(seen)])
        return replace(self, added={**self.added, style: Logistic.fit(textures, is_new, DECAY)})

    def _scores(self, seen: Seen) -> np.ndarray:
        """By colours and by texture: (N, 2 C)."""
        colours = seen.colours[:, self.codes] @ self.palette + self.bias
        texture = self.texture.scores(seen.textures) / 2
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
        """From what `tensors` gave."""
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
            Discriminant(tuple(labels), **part["texture"]),
            Logistic(**part["weigh"]),
        )


def look_of(style: str) -> str:
    """The style as it can be told."""
    return SAME_LOOK.get(style, style)


def _parts(seen: Seen, rows: np.ndarray, index: np.ndarray, labels: tuple[str, ...]) -> Styles:
    """Both classifiers, not weighed yet."""
    from sklearn.svm import LinearSVC  # comes with the extra `judge`

    colours = seen.colours[rows]
    codes = np.flatnonzero(colours.getnnz(0))
    machine = LinearSVC(C=PENALTY, max_iter=200, random_state=0).fit(colours[:, codes], index[rows])
    weights, bias = machine.coef_, machine.intercept_
    if len(labels) == 2:  # of which it fits one
        weights, bias = np.stack([-weights[0], weights[0]]), np.array([-bias[0], bias[0]])
    texture = Discriminant.fit(
        seen.textures[rows], [labels[n] for n in index[rows]], SHRINK, len(labels)
    )
    nothing = Logistic(*(np.empty(0, np.float32) for _ in range(4)))
    return Styles(
        labels, codes, weights.T.astype(np.float32), bias.astype(np.float32), texture, nothing
    )


def _rows(seen: Seen, rows: np.ndarray) -> Seen:
    return Seen(seen.shapes[rows], seen.textures[rows], seen.colours[rows])
