"""Metrics of generated images against real ones (sec. 5.1, app. A.2), from their features."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .. import storage
from . import metrics
from .features import POOLED
from .metrics import MetricError, Moments

# Maximum number of the reference's captions that serve as classes where there is no Inception.
MAX_CLASSES = 256


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N images.

    `clip` (N, E): CLIP features of the images.
    `words` (N, E): CLIP features of their captions; NaN for images without a caption.
    `inception` (N, 2048 + 1008): Inception's pooled features and class probabilities, if available.
    """

    clip: np.ndarray
    words: np.ndarray
    inception: np.ndarray | None = None

    @property
    def features(self) -> np.ndarray:
        """Features in which distances are measured: Inception's pooled ones, else CLIP's."""
        return self.clip if self.inception is None else self.inception[:, :POOLED]

    @property
    def captioned(self) -> np.ndarray:
        """Whether each image has a caption: (N,) bool."""
        return ~np.isnan(self.words[:, 0])

    @property
    def clip_score(self) -> float | None:
        """CLIP score of the images that have a caption; None if none has."""
        with_words = self.captioned
        return (
            metrics.clip_score(self.clip[with_words], self.words[with_words])
            if with_words.any()
            else None
        )

    def classes(self, kinds: np.ndarray) -> np.ndarray:
        """Class probabilities (N, Y) for the inception score.

        Inception's if available; else the probability of each of the captions `kinds` (Y, E) by
        CLIP, with the factor 100 of CLIP scores as logit scale.
        """
        if self.inception is not None:
            return self.inception[:, POOLED:]
        logits = 100 * self.clip @ kinds.T
        likely = np.exp(logits - logits.max(1, keepdims=True))
        return likely / likely.sum(1, keepdims=True)


@dataclass(frozen=True)
class Reference:
    """Real images to compare with, by name and caption.

    Quantities that do not depend on the generated images are computed once and saved with the
    features.
    """

    names: Sequence[str]
    captions: Sequence[str]
    images: ImageFeatures

    @cached_property
    def moments(self) -> Moments:
        return Moments.of(self.images.features)

    @cached_property
    def squared_radii(self) -> np.ndarray:
        return metrics.squared_radii(self.images.features)

    @cached_property
    def kinds(self) -> np.ndarray:
        distinct = np.unique(self.images.words[self.images.captioned], axis=0)
        return distinct[np.random.default_rng(0).permutation(len(distinct))[:MAX_CLASSES]]

    def without(self, names: Collection[str]) -> Reference:
        """A copy without these images, e.g. those close to a training image (sec. 5.2).

        Raises MetricError if a name is not in this reference.
        """
        if unknown := set(names) - set(self.names):
            raise MetricError(
                f"The list of images to leave out names {min(unknown)}, which is not among the "
                "images of the reference: the list belongs to another."
            )
        keep = np.array([name not in names for name in self.names])
        inception = self.images.inception
        images = ImageFeatures(
            self.images.clip[keep],
            self.images.words[keep],
            None if inception is None else inception[keep],
        )
        return Reference(
            [name for name in self.names if name not in names],
            [text for text, kept in zip(self.captions, keep, strict=True) if kept],
            images,
        )

    def frechet_distance(self, generated: ImageFeatures) -> float:
        return metrics.frechet_distance(Moments.of(generated.features), self.moments)

    def figures(self, generated: ImageFeatures) -> dict[str, float | None]:
        """All metrics that section 5 plots and tabulates.

        With Inception features, distances are FID and the score is IS. Otherwise they are the same
        measures on CLIP features, comparable only with each other. None: the metric needs captions
        and there are none. Raises MetricError.
        """
        real = self.images
        precision, recall = metrics.precision_recall(
            real.features, generated.features, real_radii=self.squared_radii
        )
        kid, deviation = metrics.kid(real.features, generated.features)
        score, spread = None, None
        if generated.inception is not None or len(self.kinds):
            score, spread = metrics.inception_score(
                generated.classes(self.kinds), min(10, len(generated.clip))
            )
        return {
            "frechet_distance": self.frechet_distance(generated),
            "frechet_infinity": metrics.frechet_infinity(generated.features, self.moments),
            "inception_score": score,
            "inception_score_deviation": spread,
            "precision": precision,
            "recall": recall,
            "clip_score": generated.clip_score,
            "kid": kid,
            "kid_deviation": deviation,
            "cmmd": metrics.cmmd(real.clip, generated.clip),
        }

    # -- saved for other evaluations ---------------------------------------------------------------

    def save(self, path: str, about: dict[str, Any]) -> None:
        """Write a safetensors file, local or s3://; `about` describes the source of the images."""
        tensors = {
            "clip": self.images.clip,
            "words": self.images.words,
            "reach": self.squared_radii,
            "mean": self.moments.mean,
            "covariance": self.moments.covariance,
        }
        if self.images.inception is not None:
            tensors["inception"] = self.images.inception
        rows = {"names": list(self.names), "captions": list(self.captions)}
        storage.put(
            save(
                {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
                {name: json.dumps(value) for name, value in {**rows, "about": about}.items()},
            ),
            path,
        )

    @classmethod
    def load(cls, path: str) -> tuple[Reference, dict[str, Any]]:
        """Read a file written by `save`; return the reference and its `about`.

        Raises MetricError, StorageError.
        """
        local = storage.fetch(path)
        try:
            with safe_open(local, "np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = {
                    name: json.loads(text) for name, text in (file.metadata() or {}).items()
                }
            reference = cls(
                metadata["names"],
                metadata["captions"],
                ImageFeatures(tensors["clip"], tensors["words"], tensors.get("inception")),
            )
            reference.__dict__.update(
                squared_radii=tensors["reach"],
                moments=Moments(len(metadata["names"]), tensors["mean"], tensors["covariance"]),
            )
            return reference, metadata["about"]
        except (SafetensorError, KeyError, ValueError) as error:
            raise MetricError(
                f"{path} does not hold the statistics of a reference as `glide evaluate` saves "
                f"them ({error}); give a corpus."
            ) from None
