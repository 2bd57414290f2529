"""A judge of generated pictures: their object, style, colours, count and positions.

It is fitted to real pictures alone. Objects and styles are classified on features of a network
pretrained on ImageNet; colours, counts and positions are measured. `judge_accuracy.py` measures its
accuracy on real pictures that it was not fitted to; where the accuracy is too low, no score is
reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .. import storage
from ..errors import UserError
from .cases import Case
from .categories import (
    BACKGROUND,
    COUNT,
    INPAINTING,
    LAYOUT,
    MIN_ACCURACY,
    POSITION,
    QUESTIONS,
    SINGLE,
    STYLE,
    THING,
)
from .heads import Discriminant, Logistic
from .judge_features import FeatureExtractor, View
from .regions import halves, part_areas, parts
from .styles import Styles, look_of
from .vocabulary import Vocabulary

NOTHING = "nothing"
MIN_FOREGROUND = 0.005  # share of foreground below which a painted hole counts as empty


class JudgeError(UserError):
    """A judge that cannot be fitted or read."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows the requested content, and what the judge found in it."""

    right: bool
    found: str


@dataclass(frozen=True)
class Judge:
    """A fitted judge and its measured accuracy.

    `things` and `styles` classify objects and styles; `counts` classifies the number of objects,
    from the areas of the foreground's connected parts.

    `accuracy`: by picture size, category and question, the share of real pictures judged correctly
    and their number.
    `extractor`: the feature extractor; None: loaded on first use.
    """

    vocabulary: Vocabulary
    things: Discriminant
    styles: Styles
    counts: Logistic
    accuracy: Mapping[str, Any] = field(default_factory=dict)
    extractor: FeatureExtractor | None = None

    def verdicts(
        self, cases: Sequence[Case], pictures: Sequence[np.ndarray]
    ) -> list[dict[str, Verdict]]:
        """For each picture, uint8 (H, H, 3): the questions of its category with their verdicts."""
        found: list[dict[str, Verdict]] = [{} for _ in cases]
        for category in dict.fromkeys(case.category for case in cases):
            rows = [n for n, case in enumerate(cases) if case.category == category]
            for n, verdicts in zip(
                rows,
                self._of_category(category, [cases[n] for n in rows], [pictures[n] for n in rows]),
                strict=True,
            ):
                found[n] = verdicts
        return found

    def style_of(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """The style of each picture; those of `styles.SAME_LOOK` count as one."""
        return self.styles.best(self._features.of([View.of(picture) for picture in pictures]))

    def shapes_of(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The features that `things` classifies: (N, D)."""
        return self._features.shapes([View.of(picture) for picture in pictures])

    def with_style(
        self, style: str, pictures: Sequence[np.ndarray], others: Sequence[np.ndarray]
    ) -> Judge:
        """A copy that knows one more style, from real pictures of it and of other styles.

        Needed to score a model fine-tuned on a new style.
        """
        new, old = (
            self._features.of([View.of(picture) for picture in group])
            for group in (pictures, others)
        )
        return replace(self, styles=self.styles.adding(style, new, old))

    def measurable(self, size: int, category: str, question: str) -> bool:
        """Whether accuracy on real pictures of this size suffices to score generated ones."""
        if question not in MIN_ACCURACY:
            return True
        known = self.accuracy.get(kind_of_size(size), {}).get(category, {}).get(question)
        return known is not None and known["right"] >= MIN_ACCURACY[question]

    # -- by category -------------------------------------------------------------------------------

    def _of_category(
        self, category: str, cases: Sequence[Case], pictures: Sequence[np.ndarray]
    ) -> list[dict[str, Verdict]]:
        if category == POSITION:
            return self._positions(cases, pictures)
        if category == INPAINTING:
            return self._holes(cases, pictures)
        views = [View.of(picture) for picture in pictures]
        if category in SINGLE:
            features = self._features.of(views)
            styles = [
                Verdict(found == look_of(case.labels["style"]), found)
                for found, case in zip(self.styles.best(features), cases, strict=True)
            ]
            return [
                {THING: thing, STYLE: style}
                for thing, style in zip(
                    self.things_shown(cases, features.shapes), styles, strict=True
                )
            ]
        things = self.things_shown(
            cases,
            self._features.shapes(
                [_largest(view) if category == COUNT else view for view in views]
            ),
        )
        measured = [
            self._measured(category, case, view, picture)
            for case, view, picture in zip(cases, views, pictures, strict=True)
        ]
        return [
            {QUESTIONS[category][0]: verdict, THING: thing}
            for verdict, thing in zip(measured, things, strict=True)
        ]

    def _measured(self, category: str, case: Case, view: View, picture: np.ndarray) -> Verdict:
        if category == COUNT:
            count = int(self.counts.best(part_areas(picture)[None])[0]) + 1
            return Verdict(count == case.labels["count"], str(count))
        found = (
            view.regions.background_name if category == BACKGROUND else view.regions.colour_name()
        )
        return Verdict(
            found == case.labels["background" if category == BACKGROUND else "colour"], found
        )

    def things_shown(
        self, cases: Sequence[Case], shapes: np.ndarray, which: int = 0
    ) -> list[Verdict]:
        """Whether each picture shows the object at index `which` of its case.

        Right if the object scores highest among the names that it must be distinguished from.
        `shapes`: (N, D).
        """
        points, found = self.things.place(shapes), []
        for case, point in zip(cases, points, strict=True):
            thing = case.labels["objects"][which]["emoji"]
            candidates = self.vocabulary.candidates(thing)
            shown = candidates[int(self.things.scores_at(point[None], candidates)[0].argmax())]
            found.append(Verdict(shown == thing, self.vocabulary.names[shown]))
        return found

    def _positions(
        self, cases: Sequence[Case], pictures: Sequence[np.ndarray]
    ) -> list[dict[str, Verdict]]:
        """Verdicts on the positions and objects of pictures of two objects.

        Position is right if there are two objects along the requested axis, and the requested order
        is likelier than the reverse. Object is right if both score highest among their names.
        """
        no_two_objects = {LAYOUT: Verdict(False, "no two objects"), THING: Verdict(False, NOTHING)}
        found, views, with_two = [dict(no_two_objects) for _ in cases], [], []
        for n, picture in enumerate(pictures):
            view = View.of(picture)
            if cut := halves(view.regions.foreground):
                with_two.append((n, cut))
                views += [replace(view, box=cut.first), replace(view, box=cut.second)]
        if not with_two:
            return found
        shapes = self._features.shapes(views).reshape(len(with_two), 2, -1)
        for (n, cut), pair in zip(with_two, shapes, strict=True):
            found[n] = self._order(cases[n], cut.beside, pair)
        return found

    def _order(self, case: Case, beside: bool, pair: np.ndarray) -> dict[str, Verdict]:
        relation, emoji = (
            case.labels["relation"],
            [thing["emoji"] for thing in case.labels["objects"]],
        )
        scores = self.things.scores(pair, emoji)
        # True: the first object is the left or upper one.
        forward = scores[0, 0] + scores[1, 1] > scores[0, 1] + scores[1, 0]
        found = {
            (True, True): "to the left of",
            (True, False): "to the right of",
            (False, True): "above",
            (False, False): "below",
        }[beside, bool(forward)]
        order = pair if relation in ("to the left of", "above") else pair[::-1]
        things = [self.things_shown([case], order[which][None], which)[0] for which in (0, 1)]
        return {
            LAYOUT: Verdict(found == relation, found),
            THING: Verdict(
                all(verdict.right for verdict in things),
                " and ".join(verdict.found for verdict in things),
            ),
        }

    def _holes(
        self, cases: Sequence[Case], pictures: Sequence[np.ndarray]
    ) -> list[dict[str, Verdict]]:
        views = []
        for case, picture in zip(cases, pictures, strict=True):
            assert case.hole is not None
            views.append(View.of(in_hole(picture, case.hole)))
        things = self.things_shown(cases, self._features.shapes(views))
        return [
            {
                THING: thing
                if view.regions.foreground.mean() > MIN_FOREGROUND
                else Verdict(False, NOTHING)
            }
            for thing, view in zip(things, views, strict=True)
        ]

    @property
    def _features(self) -> FeatureExtractor:
        extractor = self.extractor
        if extractor is None:
            extractor = FeatureExtractor()
            object.__setattr__(self, "extractor", extractor)
        return extractor

    # -- storage -----------------------------------------------------------------------------------

    def digest(self) -> str:
        """A digest of all fitted weights."""
        parts = [self.things.centres, self.styles.palette, self.counts.weights]
        parts += [head.weights for head in self.styles.added.values()]
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(part, np.float16).tobytes() for part in parts)
        ).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, in 16 bits where that is precise enough."""
        tensors: dict[str, np.ndarray] = {}
        for name, head in (
            ("things", self.things),
            ("styles", self.styles),
            ("counts", self.counts),
        ):
            tensors |= {
                f"{name}.{key}": _packed(key, value) for key, value in head.tensors().items()
            }
        about = {
            "vocabulary": [
                dict(self.vocabulary.names),
                self.vocabulary.order,
                self.vocabulary.count,
                sorted(self.vocabulary.misjudged),
            ],
            "things": self.things.labels,
            "styles": self.styles.labels,
            "accuracy": self.accuracy,
        }
        storage.put(save(tensors, {name: json.dumps(value) for name, value in about.items()}), path)

    @classmethod
    def load(cls, path: str | Path) -> Judge:
        """Read a file written by `save`. Raises JudgeError, StorageError."""
        try:
            with safe_open(storage.fetch(path), "np") as file:
                tensors = {name: _unpacked(file.get_tensor(name)) for name in file.keys()}
                about = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            head_tensors = {
                head: {
                    key.partition(".")[2]: value
                    for key, value in tensors.items()
                    if key.startswith(f"{head}.")
                }
                for head in ("things", "styles", "counts")
            }
            names, order, count, misjudged = about["vocabulary"]
            return cls(
                Vocabulary(names, tuple(order), count, frozenset(misjudged)),
                Discriminant(tuple(about["things"]), **head_tensors["things"], cosine=True),
                Styles.of(about["styles"], head_tensors["styles"]),
                Logistic(**head_tensors["counts"]),
                about["accuracy"],
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise JudgeError(
                f"{path} is not a judge that `glide compose` fitted ({error}); delete it to fit "
                "the judge again."
            ) from None


def kind_of_size(size: int) -> str:
    """Key of `accuracy` for pictures of `size` pixels.

    Accuracy is measured at 64 and 256 pixels only; pictures below 128 pixels use the former.
    """
    return "64" if size < 128 else "256"


def in_hole(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The content of the square hole (S, S) of a picture (H, H, 3) of any size."""
    rows, columns = (np.flatnonzero(hole.any(axis)) * len(picture) / len(hole) for axis in (1, 0))
    side = round(len(rows) * len(picture) / len(hole))
    top, left = int(rows[0]), int(columns[0])
    return picture[top : top + side, left : left + side]


def _largest(view: View) -> View:
    """The view of the largest separate part of a picture with several."""
    boxes = parts(view.regions.foreground)
    return replace(view, box=boxes[0]) if boxes else view


def _packed(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "i":
        return np.ascontiguousarray(values, np.int32)
    return np.ascontiguousarray(
        values, np.float16 if name.endswith(("project", "centres", "palette")) else np.float32
    )


def _unpacked(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind == "i" else values.astype(np.float32)
