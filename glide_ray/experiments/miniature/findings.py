"""The eight findings, and whether each is found here: pure functions of what was seen.

Figures are differences from the same captions and seeds, with their standard errors. A finding
holds where every difference that it names has the paper's sign and is more than two standard errors
away from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ...evaluation import elo, metrics
from ...evaluation.elo import Vote
from .pictures import BEST, CLIP_GUIDED, CLIPS, FREE, GUIDED, SMALL, UNGUIDED, SetFeatures

ERRORS = 2.0  # standard errors that a difference must be away from nothing
LEAST = "guidance-1.5"  # where the distance to real pictures is least in the paper (table 2)
DRAWS = 200  # of the bootstrap
Sets = Mapping[str, SetFeatures]


@dataclass(frozen=True)
class Finding:
    """One of the paper's, and whether it is found here."""

    text: str
    here: str
    holds: bool


@dataclass(frozen=True)
class Gain:
    """A mean difference and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, differences: np.ndarray) -> Gain:
        """Of independent pairs (N,)."""
        return cls(
            float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)
        )

    @property
    def up(self) -> bool:
        return self.mean > ERRORS * self.error

    @property
    def down(self) -> bool:
        return -self.mean > ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.3g} (standard error {self.error:.2g})"


def findings(
    sets: Sets, real: SetFeatures, votes: Mapping[str, Sequence[Vote]], painted: Mapping[str, Any]
) -> list[Finding]:
    """All eight. `sets`: those of SETS by name; `votes`: as `votes_of` gives them; `painted`: as
    `bench_inpainting` does.
    """
    return [
        _nearer_to_captions(sets),
        _diversity_for_fidelity(sets, real),
        _least_distance(sets, real),
        _clip_raises_more(sets),
        *(_preferred(question, of) for question, of in votes.items()),
        _more_than_size(sets),
        _joins_better(painted),
    ]


def figures(seen: SetFeatures, real: SetFeatures) -> dict[str, float]:
    """What table 2 and figure 6 show of a set: distances, precision, recall and score of
    EfficientNet's features, the first of them of the plain CLIP's too, and the CLIP score.
    """
    score, _ = metrics.inception_score(seen.classes, 4)
    size = min(len(real.looks), len(seen.looks)) // 2
    distance, _ = metrics.kid(real.looks, seen.looks, size=size)
    precision, recall = metrics.precision_recall(real.looks, seen.looks)
    clip_precision, clip_recall = metrics.precision_recall(real.clip, seen.clip)
    return {
        "frechet_distance": frechet(seen.looks, real.looks),
        "kid": distance,
        "inception_score": score,
        "precision": precision,
        "recall": recall,
        "clip_score": 100 * float(seen.cosines.mean()),
        "clip_frechet_distance": frechet(seen.clip, real.clip),
        "clip_precision": clip_precision,
        "clip_recall": clip_recall,
    }


def votes_of(sets: Sets, real: SetFeatures, own: SetFeatures) -> dict[str, list[Vote]]:
    """EfficientNet in the place of people, who voted in the paper: it is no relative of the CLIP
    that guides, whose sister would be misled as that is. Of two pictures the more real is the one
    nearer to any of the `real` pictures, and the one more like its caption the one nearer to the
    real picture that has this caption, row by row of `own`.
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
    """Elo scores by question, but of one in which some set has won, or lost, against all others
    always: then there are none.
    """
    found = {}
    for question, of in votes.items():
        try:
            found[question] = elo.standings(of)
        except elo.EloError:
            continue
    return found


# -- one by one ------------------------------------------------------------------------------------


def _nearer_to_captions(sets: Sets) -> Finding:
    gain = _clip_gain(sets, GUIDED, UNGUIDED)
    return Finding(
        "Classifier-free guidance brings pictures nearer to their captions (sec. 4.2, fig. 6).",
        f"CLIP score {gain} from no guidance to scale {BEST:g}",
        gain.up,
    )


def _diversity_for_fidelity(sets: Sets, real: SetFeatures) -> Finding:
    (fine, wide), (before, wide_before) = (
        metrics.neighbourhood(real.looks, sets[name].looks) for name in (GUIDED, UNGUIDED)
    )
    precision, recall = (
        Gain.of(after.astype(float) - of) for after, of in ((fine, before), (wide, wide_before))
    )
    return Finding(
        "It trades diversity for fidelity: precision rises and recall falls (fig. 6).",
        f"precision {before.mean():.3f} to {fine.mean():.3f}, {precision}; "
        f"recall {wide_before.mean():.3f} to {wide.mean():.3f}, {recall}",
        precision.up and recall.down,
    )


def _least_distance(sets: Sets, real: SetFeatures) -> Finding:
    names = list(FREE)
    distances = {name: frechet(sets[name].looks, real.looks) for name in names}
    drawn = _drawn_distances([sets[name].looks for name in names], real.looks)
    apart = {
        name: Gain(
            distances[name] - distances[LEAST],
            float((drawn[n] - drawn[names.index(LEAST)]).std(ddof=1)),
        )
        for n, name in enumerate(names)
        if name != LEAST
    }
    holds = (
        all(gain.mean > 0 for gain in apart.values()) and apart[names[0]].up and apart[names[-1]].up
    )
    return Finding(
        "The distance to real pictures is least at a small scale, 1.5, and grows with more "
        "(table 2, fig. 6).",
        f"{LEAST} {distances[LEAST]:.3f}; farther than that: "
        + "; ".join(f"{name} {gain}" for name, gain in apart.items()),
        holds,
    )


def _clip_raises_more(sets: Sets) -> Finding:
    by_clip, free = (
        max(names, key=lambda name: sets[name].cosines.mean()) for names in (CLIPS, FREE)
    )
    gain = _clip_gain(sets, by_clip, free)
    return Finding(
        "CLIP guidance can raise the CLIP score more than classifier-free guidance (fig. 6).",
        f"CLIP score of {by_clip} {gain} beside {free}, the best of each kind",
        gain.up,
    )


def _preferred(question: str, votes: Sequence[Vote]) -> Finding:
    """Shares of wins above one half, of each over the next in the paper's order."""
    order, gains = (GUIDED, CLIP_GUIDED, UNGUIDED), []
    for better, worse in pairwise(order):
        won = [
            vote.won if vote.first == better else 1 - vote.won
            for vote in votes
            if {vote.first, vote.second} == {better, worse}
        ]
        gains.append((f"{better} over {worse}", Gain.of(np.array(won) - 0.5)))
    return Finding(
        f"Classifier-free guidance is preferred to CLIP guidance, and that to none, in {question} "
        "(table 1; people voted there, a network here).",
        "; ".join(
            f"{pair}: share of wins {0.5 + gain.mean:.3f} (standard error {gain.error:.3f})"
            for pair, gain in gains
        ),
        all(gain.up for _, gain in gains),
    )


def _more_than_size(sets: Sets) -> Finding:
    small, large = f"{SMALL}-{UNGUIDED}", UNGUIDED
    scale, size = _clip_gain(sets, f"{SMALL}-{GUIDED}", small), _clip_gain(sets, large, small)
    apart = _clip_gain(sets, f"{SMALL}-{GUIDED}", large)
    return Finding(
        "Guidance gains more than a model of ten times the size (app. C, table 4).",
        f"CLIP score of the small model {scale} by guidance, {size} by the larger one; "
        f"difference {apart}",
        apart.up,
    )


def _joins_better(painted: Mapping[str, Any]) -> Finding:
    gains = {
        sampler: Gain(of["border_gain"], of["gain_standard_error"])
        for sampler, of in painted.items()
        if isinstance(of, Mapping)
    }
    return Finding(
        "A model that is trained for it joins what it paints to what is there better than implicit "
        "inpainting (sec. 4.3, fig. 11).",
        "; ".join(
            f"{sampler}: error at the hole's border {painted[sampler]['border_implicit']:.4f} to "
            f"{painted[sampler]['border_explicit']:.4f}, less by {gain}"
            for sampler, gain in gains.items()
        ),
        all(gain.up for gain in gains.values()),
    )


def _clip_gain(sets: Sets, one: str, other: str) -> Gain:
    """Of the CLIP score, picture by picture from the same noise."""
    return Gain.of(100 * (sets[one].cosines - sets[other].cosines))


# -- distances -------------------------------------------------------------------------------------


def frechet(made: np.ndarray, real: np.ndarray) -> float:
    """The Fréchet distance of features (N, D) to real ones (M, D); N and M may be less than D."""
    return float(_distances(made, real, np.arange(len(made))[None])[0])


def _drawn_distances(made: Sequence[np.ndarray], real: np.ndarray) -> np.ndarray:
    """(S, DRAWS) of S sets: rows are drawn anew, the same of each, as their captions are."""
    rows = np.random.default_rng(0).integers(len(made[0]), size=(DRAWS, len(made[0])))
    return np.stack([_distances(of, real, rows) for of in made])


def _distances(made: np.ndarray, real: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Fréchet distances (B,) of the rows `rows` (B, N) of `made` (M, D): the trace of the root of
    both covariances' product is the sum of the singular values of the centred sets' product, which
    is no larger than the sets.
    """
    made, real = made.astype(np.float64), real.astype(np.float64)
    centred = real - real.mean(0)
    spread, products = (centred**2).sum() / (len(real) - 1), made @ centred.T
    found = []
    for chosen in rows:
        some, product = made[chosen], products[chosen]
        mean = some.mean(0)
        own = ((some - mean) ** 2).sum() / (len(some) - 1)
        shared = (
            np.linalg.svd(product - product.mean(0), compute_uv=False).sum()
            / ((len(some) - 1) * (len(real) - 1)) ** 0.5
        )
        found.append(((mean - real.mean(0)) ** 2).sum() + own + spread - 2 * shared)
    return np.array(found)


def _directions(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)
