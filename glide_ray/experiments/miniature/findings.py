"""Eight findings of the paper, and whether each holds here: pure functions of image features.

Figures are paired differences over the same captions and seeds, with standard errors. A finding
holds if every difference that it names has the paper's sign and is more than two standard errors
from zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ...evaluation import elo, metrics
from ...evaluation.elo import Vote
from .pictures import (
    BEST,
    CLASSIFIER_FREE,
    CLIP_GUIDED,
    CLIPS,
    GUIDED,
    SMALL,
    UNGUIDED,
    SetFeatures,
)

MIN_ERRORS = 2.0  # least distance of a difference from zero, in standard errors
# Set with the smallest distance to real pictures in the paper (table 2)
NEAREST_SET = "guidance-1.5"
DRAWS = 200  # bootstrap resamples
Sets = Mapping[str, SetFeatures]


@dataclass(frozen=True)
class Finding:
    """A finding of the paper and whether it holds here.

    `text`: the finding; `measured`: the figures of these experiments.
    """

    text: str
    measured: str
    holds: bool

    def as_json(self) -> dict[str, Any]:
        return {"text": self.text, "here": self.measured, "holds": self.holds}


@dataclass(frozen=True)
class Gain:
    """A mean difference and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, differences: np.ndarray) -> Gain:
        """Mean and standard error of the differences (N,) of independent pairs."""
        return cls(
            float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)
        )

    @property
    def up(self) -> bool:
        return self.mean > MIN_ERRORS * self.error

    @property
    def down(self) -> bool:
        return -self.mean > MIN_ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.3g} (standard error {self.error:.2g})"


def findings(
    sets: Sets, real: SetFeatures, votes: Mapping[str, Sequence[Vote]], painted: Mapping[str, Any]
) -> list[Finding]:
    """All eight findings.

    `sets`: features of SETS by name; `votes`: from `votes_of`; `painted`: from `bench_inpainting`.
    """
    return [
        _nearer_to_captions(sets),
        _diversity_for_fidelity(sets, real),
        _least_distance(sets, real),
        _clip_raises_more(sets),
        *(_preferred(question, question_votes) for question, question_votes in votes.items()),
        _more_than_size(sets),
        _joins_better(painted),
    ]


def figures(features: SetFeatures, real: SetFeatures) -> dict[str, float]:
    """Metrics of a set, as in table 2 and figure 6.

    Of EfficientNet's features: Fréchet distance, KID, inception score, precision and recall. Of the
    plain CLIP's: Fréchet distance, precision, recall, and the CLIP score.
    """
    score, _ = metrics.inception_score(features.classes, 4)
    size = min(len(real.looks), len(features.looks)) // 2
    distance, _ = metrics.kid(real.looks, features.looks, size=size)
    precision, recall = metrics.precision_recall(real.looks, features.looks)
    clip_precision, clip_recall = metrics.precision_recall(real.clip, features.clip)
    return {
        "frechet_distance": frechet(features.looks, real.looks),
        "kid": distance,
        "inception_score": score,
        "precision": precision,
        "recall": recall,
        "clip_score": 100 * float(features.cosines.mean()),
        "clip_frechet_distance": frechet(features.clip, real.clip),
        "clip_precision": clip_precision,
        "clip_recall": clip_recall,
    }


def votes_of(sets: Sets, real: SetFeatures, own: SetFeatures) -> dict[str, list[Vote]]:
    """Votes of EfficientNet, by question, in place of the people who voted in the paper.

    EfficientNet is unrelated to the CLIP that guides: a second CLIP would be misled in the same way
    as that one. Photorealism: the picture nearer to any of the `real` pictures wins. Caption
    similarity: the picture nearer to the real picture of its caption wins; `own` holds these real
    pictures, row by row.
    """
    score: dict[str, dict[str, np.ndarray]] = {"photorealism": {}, "caption similarity": {}}
    for name in (UNGUIDED, CLIP_GUIDED, GUIDED):
        looks = _directions(sets[name].looks)
        score["photorealism"][name] = (looks @ _directions(real.looks).T).max(1)
        score["caption similarity"][name] = (looks * _directions(own.looks)).sum(1)
    return {
        question: [
            Vote(one, other, 1.0 if first > second else 0.0 if first < second else 0.5, str(n))
            for one in of
            for other in of
            if one < other
            for n, (first, second) in enumerate(zip(of[one], of[other], strict=True))
        ]
        for question, of in score.items()
    }


def standings(votes: Mapping[str, Sequence[Vote]]) -> dict[str, Mapping[str, elo.Standing]]:
    """Elo scores by question.

    Leaves out a question in which one set won, or lost, every comparison: it has no Elo scores.
    """
    scores = {}
    for question, question_votes in votes.items():
        try:
            scores[question] = elo.standings(question_votes)
        except elo.EloError:
            continue
    return scores


# -- one by one ------------------------------------------------------------------------------------


def _nearer_to_captions(sets: Sets) -> Finding:
    gain = _clip_gain(sets, GUIDED, UNGUIDED)
    return Finding(
        "Classifier-free guidance brings pictures nearer to their captions (sec. 4.2, fig. 6).",
        f"CLIP score {gain} from no guidance to scale {BEST:g}",
        gain.up,
    )


def _diversity_for_fidelity(sets: Sets, real: SetFeatures) -> Finding:
    (precise, covered), (precise_unguided, covered_unguided) = (
        metrics.neighbourhood(real.looks, sets[name].looks) for name in (GUIDED, UNGUIDED)
    )
    precision, recall = (
        Gain.of(guided.astype(float) - unguided)
        for guided, unguided in ((precise, precise_unguided), (covered, covered_unguided))
    )
    return Finding(
        "It trades diversity for fidelity: precision rises and recall falls (fig. 6).",
        f"precision {precise_unguided.mean():.3f} to {precise.mean():.3f}, {precision}; "
        f"recall {covered_unguided.mean():.3f} to {covered.mean():.3f}, {recall}",
        precision.up and recall.down,
    )


def _least_distance(sets: Sets, real: SetFeatures) -> Finding:
    names = list(CLASSIFIER_FREE)
    distances = {name: frechet(sets[name].looks, real.looks) for name in names}
    resampled = _bootstrap_distances([sets[name].looks for name in names], real.looks)
    increases = {
        name: Gain(
            distances[name] - distances[NEAREST_SET],
            float((resampled[n] - resampled[names.index(NEAREST_SET)]).std(ddof=1)),
        )
        for n, name in enumerate(names)
        if name != NEAREST_SET
    }
    holds = (
        all(gain.mean > 0 for gain in increases.values())
        and increases[names[0]].up
        and increases[names[-1]].up
    )
    return Finding(
        "The distance to real pictures is least at a small scale, 1.5, and grows with more "
        "(table 2, fig. 6).",
        f"{NEAREST_SET} {distances[NEAREST_SET]:.3f}; increase at the others: "
        + "; ".join(f"{name} {gain}" for name, gain in increases.items()),
        holds,
    )


def _clip_raises_more(sets: Sets) -> Finding:
    by_clip, classifier_free = (
        max(names, key=lambda name: sets[name].cosines.mean()) for names in (CLIPS, CLASSIFIER_FREE)
    )
    gain = _clip_gain(sets, by_clip, classifier_free)
    return Finding(
        "CLIP guidance can raise the CLIP score more than classifier-free guidance (fig. 6).",
        f"CLIP score of {by_clip} {gain} beside {classifier_free}, the best of each kind",
        gain.up,
    )


def _preferred(question: str, votes: Sequence[Vote]) -> Finding:
    """Share of wins minus one half, of each set over the next in the paper's order."""
    order, gains = (GUIDED, CLIP_GUIDED, UNGUIDED), []
    for better, worse in pairwise(order):
        won = [
            vote.won if vote.first == better else 1 - vote.won
            for vote in votes
            if {vote.first, vote.second} == {better, worse}
        ]
        gains.append((f"{better} over {worse}", Gain.of(np.array(won) - 0.5)))
    return Finding(
        "Classifier-free guidance is preferred to CLIP guidance, and CLIP guidance to no "
        f"guidance, in {question} (table 1; people voted there, a network here).",
        "; ".join(
            f"{pair}: share of wins {0.5 + gain.mean:.3f} (standard error {gain.error:.3f})"
            for pair, gain in gains
        ),
        all(gain.up for _, gain in gains),
    )


def _more_than_size(sets: Sets) -> Finding:
    small, large = f"{SMALL}-{UNGUIDED}", UNGUIDED
    scale, size = _clip_gain(sets, f"{SMALL}-{GUIDED}", small), _clip_gain(sets, large, small)
    difference = _clip_gain(sets, f"{SMALL}-{GUIDED}", large)
    return Finding(
        "Guidance gains more than a model of ten times the size (app. C, table 4).",
        f"CLIP score of the small model {scale} by guidance, {size} by the larger one; "
        f"difference {difference}",
        difference.up,
    )


def _joins_better(painted: Mapping[str, Any]) -> Finding:
    gains = {
        sampler: Gain(errors["border_gain"], errors["gain_standard_error"])
        for sampler, errors in painted.items()
        if isinstance(errors, Mapping)
    }
    return Finding(
        "A model trained for inpainting blends the painted part into the picture better than "
        "implicit inpainting (sec. 4.3, fig. 11).",
        "; ".join(
            f"{sampler}: error at the hole's border {painted[sampler]['border_implicit']:.4f} to "
            f"{painted[sampler]['border_explicit']:.4f}, less by {gain}"
            for sampler, gain in gains.items()
        ),
        all(gain.up for gain in gains.values()),
    )


def _clip_gain(sets: Sets, first: str, second: str) -> Gain:
    """Gain in CLIP score from `other` to `one`, paired by picture: the same noise."""
    return Gain.of(100 * (sets[first].cosines - sets[second].cosines))


# -- distances -------------------------------------------------------------------------------------


def frechet(generated: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance of features (N, D) to real ones (M, D); N and M may be less than D."""
    return float(_distances(generated, real, np.arange(len(generated))[None])[0])


def _bootstrap_distances(generated: Sequence[np.ndarray], real: np.ndarray) -> np.ndarray:
    """Fréchet distances (S, DRAWS) of S sets to real pictures, over bootstrap resamples.

    A resample takes the same rows of every set, because the sets share their captions.
    """
    rows = np.random.default_rng(0).integers(len(generated[0]), size=(DRAWS, len(generated[0])))
    return np.stack([_distances(features, real, rows) for features in generated])


def _distances(generated: np.ndarray, real: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Fréchet distances (B,) to `real` of the rows `rows` (B, N) of `generated` (M, D).

    The trace of the square root of the product of both covariances is the sum of the singular
    values of the product of the centred sets, a matrix whose sides are the sizes of the sets.
    """
    generated, real = generated.astype(np.float64), real.astype(np.float64)
    centred = real - real.mean(0)
    spread, products = (centred**2).sum() / (len(real) - 1), generated @ centred.T
    distances = []
    for resample_rows in rows:
        resample, product = generated[resample_rows], products[resample_rows]
        mean = resample.mean(0)
        resample_spread = ((resample - mean) ** 2).sum() / (len(resample) - 1)
        shared = (
            np.linalg.svd(product - product.mean(0), compute_uv=False).sum()
            / ((len(resample) - 1) * (len(real) - 1)) ** 0.5
        )
        distances.append(((mean - real.mean(0)) ** 2).sum() + resample_spread + spread - 2 * shared)
    return np.array(distances)


def _directions(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)
