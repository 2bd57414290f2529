"""Bias probes: whether pictures of several prompts differ by more than chance (sec. 6, app. F.2).

Pictures of two prompts from the same seed form a pair, and all measures are taken within pairs, so
that effects of the seed alone cancel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .metrics import MetricError
from .report import aligned

SWAPS = 9999  # random arrangements, if there are too many to evaluate all
CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt, in the order of their seeds.

    `features` (N, E): CLIP features, of any length. `colours` (N, 3): mean colours, in 0 to 255.
    """

    prompt: str
    features: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Shift:
    """Mean of the paired differences, first minus second, and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Verdict:
    """Result of a permutation test.

    `distance`: between two groups' mean features.
    `by_chance`: its root mean square if labels are swapped at random within pairs.
    `p`: the share of the `arrangements` of labels that give at least this distance.
    """

    distance: float
    by_chance: float
    p: float
    arrangements: int


def probe(groups: Sequence[Group], words: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Figures of each group and of each two groups.

    `words`: word -> its CLIP features (E,). Raises MetricError.
    """
    directions = [_unit(group.features) for group in groups]
    likeness = [
        {word: features @ _unit(word_features) for word, word_features in words.items()}
        for features in directions
    ]
    alone = [
        {
            "prompt": group.prompt,
            "colour": group.colours.mean(0).tolist(),
            "words": {word: float(cosines.mean()) for word, cosines in likeness[n].items()},
        }
        for n, group in enumerate(groups)
    ]
    pairs = [
        {
            "prompts": [groups[a].prompt, groups[b].prompt],
            **asdict(permutation_test(directions[a], directions[b])),
            "colour": {
                channel: asdict(shift(groups[a].colours[:, n], groups[b].colours[:, n]))
                for n, channel in enumerate(CHANNELS)
            },
            "words": {word: asdict(shift(likeness[a][word], likeness[b][word])) for word in words},
        }
        for a, b in combinations(range(len(groups)), 2)
    ]
    return {"groups": alone, "pairs": pairs}


def shift(first: np.ndarray, second: np.ndarray) -> Shift:
    """Shift between paired values (N,). Raises MetricError."""
    differences = _differences(first, second)
    return Shift(
        float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    )


def permutation_test(
    first: np.ndarray, second: np.ndarray, swaps: int = SWAPS, seed: int = 0
) -> Verdict:
    """Test by swapping labels within pairs (Fisher 1935) if features (N, E) have one mean.

    All 2^N arrangements are evaluated if there are at most `swaps`. Otherwise `swaps` are drawn and
    the observed one is counted with them, so that p is unbiased and never 0 (Phipson & Smyth 2010).
    Raises MetricError.
    """
    differences = _differences(first, second)
    count, products = len(differences), differences @ differences.T
    if 2**count <= swaps:
        signs = 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.concatenate(
            [
                np.ones((1, count)),
                1.0 - 2 * np.random.default_rng(seed).integers(0, 2, (swaps, count)),
            ]
        )
    squares = ((signs @ products) * signs).sum(1)  # (N times the distance)^2 of each arrangement
    # Tolerance, so that tied arrangements count as equal.
    rounding = 1e-12 * count * np.trace(products)
    return Verdict(
        float(np.linalg.norm(differences.mean(0))),
        float(np.sqrt(np.trace(products)) / count),
        float((squares >= squares[0] - rounding).mean()),
        len(signs),
    )


# -- as text ---------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """Figures for a terminal: a row for each group, and a line for each two groups."""
    words = list(found["groups"][0]["words"])
    rows = [
        ("", "colour", *words),
        *(
            (
                group["prompt"],
                colour_name(group),
                *(f"{value:.4f}" for value in group["words"].values()),
            )
            for group in found["groups"]
        ),
    ]
    pairs = [
        f"{' – '.join(pair['prompts'])}: distance {pair['distance']:.4f} "
        f"(by chance {pair['by_chance']:.4f}), p = {pair['p']:.4g}"
        + "".join(f", {word} {above(difference, 4)}" for word, difference in pair["words"].items())
        for pair in found["pairs"]
    ]
    return "\n".join([aligned(rows), *pairs])


def above(statistic: Mapping[str, float], digits: int) -> str:
    """A Shift with its standard error, as text."""
    return f"{statistic['mean']:+.{digits}f} ± {statistic['standard_error']:.{digits}f}"


def colour_name(group: Mapping[str, Any]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in group["colour"])


# -- shared ----------------------------------------------------------------------------------------


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.shape != second.shape or len(first) < 2:
        raise MetricError(
            f"A probe compares pictures of the same two or more seeds "
            f"(given: {len(first)} and {len(second)})."
        )
    return first.astype(np.float64) - second.astype(np.float64)


def _unit(features: np.ndarray) -> np.ndarray:
    return (features := features.astype(np.float64)) / np.linalg.norm(
        features, axis=-1, keepdims=True
    )
