"""Elo scores from pairs of images that people have compared (app. A.1): ties are half a win for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from ..errors import UserError

SCALE = 400 / np.log(10)  # of a score, to the logit of winning


class EloError(UserError):
    """Votes that no scores follow from."""


@dataclass(frozen=True)
class Vote:
    """One comparison: the two models, and what the first got of it, 1, 0.5 for a tie, or 0. `about`: the prompt, votes on which are not independent."""

    first: str
    second: str
    won: float
    about: str | None = None


@dataclass(frozen=True)
class Standing:
    """A model's score with its interval, whose ends are infinite where votes say no more, and the share of its comparisons that it won."""

    score: float
    low: float
    high: float
    win_rate: float
    comparisons: int


def wins(votes: Sequence[Vote], models: Sequence[str]) -> np.ndarray:
    """(N, N): how often each model, by row, has beaten each other, by column."""
    place, table = (
        {model: n for n, model in enumerate(models)},
        np.zeros((len(models), len(models))),
    )
    for vote in votes:
        table[place[vote.first], place[vote.second]] += vote.won
        table[place[vote.second], place[vote.first]] += 1 - vote.won
    return table


def scores(table: np.ndarray, models: Sequence[str] | None = None) -> np.ndarray:
    """Elo scores (N,) of least loss for a table of wins (N, N), with mean 0 as descent from 0 leaves them.

    The paper's objective gives a model that wins the lower score as it is printed; its tables mean the higher. Here i beats j with
    probability 1 / (1 + 10^((s_j - s_i) / 400)). Raises EloError where no scores are the best: a model, or several, that has beaten all others
    always, or none ever.
    """
    count = len(table)
    if connected_components(table > 0, connection="strong")[0] > 1:
        raise EloError(_unbounded(table, models or [str(n) for n in range(count)]))
    logits, total = np.zeros(count), table + table.T
    for _ in range(
        100
    ):  # Newton's method: the loss is convex, and its curvature has one flat direction, all scores alike
        chance = 1 / (1 + np.exp(logits[None] - logits[:, None]))
        slope = (table - total * chance).sum(1)
        weight = total * chance * (1 - chance)
        step = np.linalg.lstsq(np.diag(weight.sum(1)) - weight, slope, rcond=None)[0]
        logits += step / max(1.0, np.abs(step).max())  # far from the best it oversteps
        if np.abs(step).max() < 1e-12:
            break
    return SCALE * (logits - logits.mean())


def standings(
    votes: Sequence[Vote], draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Mapping[str, Standing]:
    """Of each model, the best first. Intervals are of prompts drawn anew, each with all votes on it: several raters of one picture, or several pairs
    of models with one prompt, are no independent votes. Votes that are about nothing known count as one each.

    A draw in which a model has never lost, or never won, has it at infinity. Raises EloError.
    """
    models = sorted({model for vote in votes for model in (vote.first, vote.second)})
    if len(models) < 2:
        raise EloError("Elo scores compare models, and these votes are of fewer than two.")
    table = wins(votes, models)
    best, played = scores(table, models), (table + table.T).sum(1)
    ends = [_interval(of, level) for of in np.stack(list(_drawn(votes, models, draws, seed))).T]
    return {
        models[n]: Standing(
            float(best[n]), *ends[n], float(table[n].sum() / played[n]), int(played[n])
        )
        for n in np.argsort(-best)
    }


def _interval(drawn: np.ndarray, level: float) -> tuple[float, float]:
    """Of a model's scores (N,) in the draws that say something of it. Ends are themselves drawn: between a number and infinity nothing can be said."""
    known = np.sort(drawn[~np.isnan(drawn)])
    low, high = (
        max(0, int(np.ceil(share * len(known))) - 1) for share in ((1 - level) / 2, (1 + level) / 2)
    )
    return (float(known[low]), float(known[high])) if len(known) else (-np.inf, np.inf)


def _drawn(
    votes: Sequence[Vote], models: Sequence[str], draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Scores (N,) of votes that are drawn anew; NaN for a model of which a draw says nothing."""
    place: dict[str | int, int] = {}
    of = [
        place.setdefault(n if vote.about is None else vote.about, len(place))
        for n, vote in enumerate(votes)
    ]
    first, second, won = (
        np.array(column)
        for column in zip(
            *((models.index(vote.first), models.index(vote.second), vote.won) for vote in votes),
            strict=True,
        )
    )
    tables = np.zeros((len(place), len(models), len(models)))
    np.add.at(tables, (of, first, second), won)
    np.add.at(tables, (of, second, first), 1 - won)
    random = np.random.default_rng(seed)
    for _ in range(draws):
        table = np.tensordot(
            np.bincount(random.integers(len(place), size=len(place)), minlength=len(place)),
            tables,
            1,
        )
        try:
            yield scores(table, models)
        except EloError:
            ever_won, ever_lost = table.sum(1) > 0, table.sum(0) > 0
            yield np.select(
                [ever_won & ~ever_lost, ever_lost & ~ever_won], [np.inf, -np.inf], np.nan
            )


def _unbounded(table: np.ndarray, models: Sequence[str]) -> str:
    for n, model in enumerate(models):
        if not table[n].any() or not table[:, n].any():
            never = "won" if not table[n].any() else "lost"
            return f"{model} has never {never}, and so has no finite Elo score; collect more votes on it, or leave it out."
    return "Some models have never lost to any of the others, and so no Elo scores are finite; collect votes on pairs of both groups."
