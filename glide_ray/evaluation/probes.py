"""Probes for bias: pictures of several prompts from the same seeds, and whether they differ by more than chance (sec. 6, app. F.2).

What two prompts make of one seed is a pair, and all is measured within pairs: what the seed alone decides cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .metrics import MetricError
from .report import aligned

SWAPS = 9999  # drawn where there are too many to try them all
CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True)
class Group:
    """The pictures of one prompt, in the order of their seeds: CLIP's features (N, E), of any length, and mean colours (N, 3) of 255."""

    prompt: str
    features: np.ndarray
    colours: np.ndarray


@dataclass(frozen=True)
class Shift:
    """By how much the first of each pair lies above the second."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Verdict:
    """The distance between two groups' mean features, what it would be by chance, and how often swapped labels give as much: `p`, of `arrangements`."""

    distance: float
    by_chance: float
    p: float
    arrangements: int


def probe(groups: Sequence[Group], words: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Figures of each group, and of each two. `words`: a word -> CLIP's features of it (E,). Raises MetricError."""
    seen = [_unit(group.features) for group in groups]
    likeness = [{word: features @ _unit(of) for word, of in words.items()} for features in seen]
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
            **asdict(permutation_test(seen[a], seen[b])),
            "colour": {
                channel: asdict(shift(groups[a].colours[:, n], groups[b].colours[:, n]))
                for n, channel in enumerate(CHANNELS)
            },
            "words": {word: asdict(shift(likeness[a][word], likeness[b][word])) for word in words},
        }
        for a, b in combinations(range(len(groups)), 2)
    ]
    return {"groups": alone, "pairs": pairs}


def shift(one: np.ndarray, other: np.ndarray) -> Shift:
    """Of values (N,) that are paired. Raises MetricError."""
    apart = _apart(one, other)
    return Shift(float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart))))


def permutation_test(
    one: np.ndarray, other: np.ndarray, swaps: int = SWAPS, seed: int = 0
) -> Verdict:
    """Whether paired features (N, E) have the same mean, by swapping labels within pairs (Fisher 1935).

    All 2^N ways are tried where these are no more than `swaps`; else so many are drawn, and the one that was found is counted with them, so that p
    errs to neither side and is never 0 (Phipson & Smyth 2010). Raises MetricError.
    """
    apart = _apart(one, other)
    count, products = len(apart), apart @ apart.T
    if 2**count <= swaps:
        signs = 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.concatenate(
            [
                np.ones((1, count)),
                1.0 - 2 * np.random.default_rng(seed).integers(0, 2, (swaps, count)),
            ]
        )
    squares = ((signs @ products) * signs).sum(1)  # of N times each distance
    rounding = 1e-12 * count * np.trace(products)  # for arrangements that tie
    return Verdict(
        float(np.linalg.norm(apart.mean(0))),
        float(np.sqrt(np.trace(products)) / count),
        float((squares >= squares[0] - rounding).mean()),
        len(signs),
    )


# -- as text ----------------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """Figures for a terminal: a row for each group, and a line for each two."""
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
        f"{' – '.join(pair['prompts'])}: distance {pair['distance']:.4f} (by chance {pair['by_chance']:.4f}), p = {pair['p']:.4g}"
        + "".join(f", {word} {above(one, 4)}" for word, one in pair["words"].items())
        for pair in found["pairs"]
    ]
    return "\n".join([aligned(rows), *pairs])


def above(one: Mapping[str, float], digits: int) -> str:
    """A Shift with its standard error."""
    return f"{one['mean']:+.{digits}f} ± {one['standard_error']:.{digits}f}"


def colour_name(group: Mapping[str, Any]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in group["colour"])


# -- shared by them ---------------------------------------------------------------------------------------------------


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    if one.shape != other.shape or len(one) < 2:
        raise MetricError(
            f"A probe compares pictures of the same seeds, two or more (given: {len(one)} and {len(other)})."
        )
    return one.astype(np.float64) - other.astype(np.float64)


def _unit(features: np.ndarray) -> np.ndarray:
    return (features := features.astype(np.float64)) / np.linalg.norm(
        features, axis=-1, keepdims=True
    )
