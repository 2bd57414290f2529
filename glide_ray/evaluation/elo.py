"""Elo scores from human comparisons of image pairs (app. A.1); a tie is half a win for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from ..errors import UserError

SCALE = 400 / np.log(10)  # Elo points per unit of the logit of winning


class EloError(UserError):
    """Votes that determine no Elo scores."""


@dataclass(frozen=True)
class Vote:
    """One comparison of two models.

    `won`: result of the first model: 1 for a win, 0.5 for a tie, 0 for a loss.
    `about`: the prompt, or None if unknown; votes on the same prompt are not independent.
    """

    first: str
    second: str
    won: float
    about: str | None = None


@dataclass(frozen=True)
class Standing:
    """A model's Elo score with its interval, win rate and number of comparisons.

    `low`, `high`: infinite where the votes set no bound. `win_rate`: ties count half.
    """

    score: float
    low: float
    high: float
    win_rate: float
    comparisons: int


def win_counts(votes: Sequence[Vote], models: Sequence[str]) -> np.ndarray:
    """Win counts (N, N): how often the row's model beat the column's."""
    index, table = (
        {model: n for n, model in enumerate(models)},
        np.zeros((len(models), len(models))),
    )
    for vote in votes:
        table[index[vote.first], index[vote.second]] += vote.won
        table[index[vote.second], index[vote.first]] += 1 - vote.won
    return table


def scores(table: np.ndarray, models: Sequence[str] | None = None) -> np.ndarray:
    """Elo scores (N,) that minimise the paper's loss for a table of wins (N, N).

    Their mean is 0, as gradient descent from 0 leaves it.

    The objective as printed in the paper assigns the winner the lower score, but the paper's tables
    assign it the higher one. Here i beats j with probability 1 / (1 + 10^((s_j - s_i) / 400)).

    Raises EloError if the loss has no minimum: a model, or a group of models, has won or lost all
    comparisons with the others.
    """
    model_count = len(table)
    if connected_components(table > 0, connection="strong")[0] > 1:
        raise EloError(_unbounded(table, models or [str(n) for n in range(model_count)]))
    logits, total = np.zeros(model_count), table + table.T
    # Newton's method: the loss is convex. lstsq, because the Hessian is singular in one direction:
    # adding a constant to all scores.
    for _ in range(100):
        win_chance = 1 / (1 + np.exp(logits[None] - logits[:, None]))
        gradient = (table - total * win_chance).sum(1)
        curvature = total * win_chance * (1 - win_chance)
        step = np.linalg.lstsq(np.diag(curvature.sum(1)) - curvature, gradient, rcond=None)[0]
        logits += step / max(1.0, np.abs(step).max())  # damped: overshoots far from the minimum
        if np.abs(step).max() < 1e-12:
            break
    return SCALE * (logits - logits.mean())


def standings(
    votes: Sequence[Vote], draws: int = 1000, level: float = 0.95, seed: int = 0
) -> Mapping[str, Standing]:
    """Each model's score with its interval, best first.

    Intervals are a bootstrap over prompts, each drawn with all its votes, because several raters of
    one picture, or several pairs of models with one prompt, are not independent. A vote without a
    prompt is drawn on its own. In a draw in which a model never lost, or never won, its score is
    +inf or -inf.

    `draws`: bootstrap draws. `level`: coverage of the intervals. Raises EloError.
    """
    models = sorted({model for vote in votes for model in (vote.first, vote.second)})
    if len(models) < 2:
        raise EloError("Elo scores compare models, but these votes are on fewer than two.")
    table = win_counts(votes, models)
    model_scores, played = scores(table, models), (table + table.T).sum(1)
    intervals = [
        _interval(draws_of_model, level)
        for draws_of_model in np.stack(list(_bootstrap_scores(votes, models, draws, seed))).T
    ]

    def standing(n: int) -> Standing:
        low, high = intervals[n]
        return Standing(
            float(model_scores[n]), low, high, float(table[n].sum() / played[n]), int(played[n])
        )

    return {models[n]: standing(n) for n in np.argsort(-model_scores).tolist()}


def _interval(draw_scores: np.ndarray, level: float) -> tuple[float, float]:
    """Interval of a model's scores (N,) over the draws, NaN excluded.

    Both ends are drawn scores: no interpolation between a number and infinity.
    """
    known = np.sort(draw_scores[~np.isnan(draw_scores)])
    low, high = (
        max(0, int(np.ceil(share * len(known))) - 1) for share in ((1 - level) / 2, (1 + level) / 2)
    )
    return (float(known[low]), float(known[high])) if len(known) else (-np.inf, np.inf)


def _bootstrap_scores(
    votes: Sequence[Vote], models: Sequence[str], draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Scores (N,) of each bootstrap draw of the votes.

    NaN for a model whose score a draw does not determine.
    """
    prompts: dict[str | int, int] = {}
    prompt_of_vote = np.array(
        [
            prompts.setdefault(n if vote.about is None else vote.about, len(prompts))
            for n, vote in enumerate(votes)
        ]
    )
    first, second, won = (
        np.array(column)
        for column in zip(
            *((models.index(vote.first), models.index(vote.second), vote.won) for vote in votes),
            strict=True,
        )
    )
    tables = np.zeros((len(prompts), len(models), len(models)))
    np.add.at(tables, (prompt_of_vote, first, second), won)
    np.add.at(tables, (prompt_of_vote, second, first), 1 - won)
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        table = np.tensordot(
            np.bincount(rng.integers(len(prompts), size=len(prompts)), minlength=len(prompts)),
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
            result = "won" if not table[n].any() else "lost"
            return (
                f"{model} has never {result}, and so has no finite Elo score; collect more votes "
                f"on it, or leave it out."
            )
    return (
        "Some models have never lost to any of the others, and so no Elo scores are finite; "
        "collect votes on pairs of both groups."
    )
