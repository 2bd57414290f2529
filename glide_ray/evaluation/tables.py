"""Human preferences as in the paper's tables 1 and 3.

Table 1: Elo scores by question. Table 3: how often each model wins against each other one.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import storage
from ..errors import UserError
from .elo import EloError, Standing, Vote, standings, win_counts
from .pairing import FAILED_SHARE, FIRST, QUESTIONS, TIE
from .report import aligned
from .votes import CastVote, Votes, left_out

COLUMNS = ("question", "first", "second", "winner")
WON = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True)
class Ballot:
    """Votes by question, with facts about the raters; these are unknown for a CSV.

    `left_share`: share of answers, ties excluded, for the picture on the left; about half if raters
    look at the pictures.
    """

    votes: Mapping[str, Sequence[Vote]]
    raters: int | None = None
    left_out: Sequence[str] = ()
    votes_left_out: int = 0
    left_share: float | None = None


def ballot_of(path: str) -> Ballot:
    """Votes of a study's folder, a database's URL, or a CSV with COLUMNS. Raises UserError."""
    if path.endswith(".csv"):
        return Ballot(read_csv(path))
    from .study import DATABASE, database_of

    if "://" not in path and not (Path(path) / DATABASE).exists():
        raise UserError(
            f"There is no {Path(path) / DATABASE}; give the folder of a study that `glide rate` "
            "wrote, its database's URL, or a .csv of votes."
        )
    return count(Votes(path if "://" in path else database_of(path), create=False).cast())


def count(cast: Sequence[CastVote]) -> Ballot:
    """Answers as votes, without raters who failed too many attention checks."""
    answered = Counter(vote.rater for vote in cast if vote.comparison.check_of)
    passed = Counter(
        vote.rater for vote in cast if vote.comparison.check_of and vote.answer == FIRST
    )
    excluded = left_out({rater: (passed[rater], answered[rater]) for rater in answered})
    counted_votes = [
        vote for vote in cast if not vote.comparison.check_of and vote.rater not in excluded
    ]
    votes: dict[str, list[Vote]] = {}
    for vote in counted_votes:
        votes.setdefault(vote.question, []).append(
            Vote(
                vote.comparison.first,
                vote.comparison.second,
                WON[vote.answer],
                vote.comparison.prompt,
            )
        )
    decided = [vote.answer == vote.left for vote in counted_votes if vote.answer != TIE]
    return Ballot(
        votes,
        len({vote.rater for vote in cast}),
        excluded,
        sum(not vote.comparison.check_of and vote.rater in excluded for vote in cast),
        float(np.mean(decided)) if decided else None,
    )


def read_csv(path: str) -> dict[str, list[Vote]]:
    """Votes by question from a CSV; `winner` is one of the row's two models, or "tie".

    Raises UserError with the line that is invalid.
    """
    try:
        rows = csv.DictReader(io.StringIO(storage.read(path).decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save the CSV as UTF-8.") from None
    if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
        raise UserError(
            f"{path} has no column {missing[0]}; its first line must name {', '.join(COLUMNS)}."
        )
    votes: dict[str, list[Vote]] = {}
    for row in rows:
        question, first, second, winner = ((row[name] or "").strip() for name in COLUMNS)
        if not first or not second or first == second or winner not in (first, second, TIE):
            raise UserError(
                f"{path}, line {rows.line_num}: the winner must be one of two different models, or "
                f"tie (given: {first}, {second}, {winner})."
            )
        votes.setdefault(question, []).append(
            Vote(first, second, 0.5 if winner == TIE else float(winner == first))
        )
    return votes


def figures(ballot: Ballot, draws: int = 1000) -> dict[str, Any]:
    """All figures of the tables, serialisable as JSON.

    By question: each model's score with its 95% interval, and its share of wins against each other
    model. Raises EloError if there are no votes.
    """
    if not any(ballot.votes.values()):
        raise EloError(
            "There are no votes to count yet"
            + (
                ": all raters have failed the attention checks."
                if ballot.left_out
                else "; let people rate, then ask again."
            )
        )
    known = [question for question in QUESTIONS if question in ballot.votes]
    return {
        "questions": {
            question: _of_question(ballot.votes[question], draws)
            for question in [*known, *sorted(set(ballot.votes) - set(known))]
        },
        "raters": ballot.raters,
        "raters_left_out": len(ballot.left_out),
        "votes_left_out": ballot.votes_left_out,
        "left_out": list(ballot.left_out),
        "failed_share": FAILED_SHARE,
        "left_share": ballot.left_share,
    }


def _of_question(votes: Sequence[Vote], draws: int) -> dict[str, Any]:
    models = sorted({model for vote in votes for model in (vote.first, vote.second)})
    table = win_counts(votes, models)
    played = table + table.T
    results: dict[str, Any] = {
        "votes": len(votes),
        "ties": sum(vote.won == 0.5 for vote in votes),
        "scores": {},
        "wins": {
            model: {
                opponent: {"share": float(table[i, j] / played[i, j]), "votes": int(played[i, j])}
                for j, opponent in enumerate(models)
                if played[i, j]
            }
            for i, model in enumerate(models)
        },
    }
    try:
        results["scores"] = {
            model: {"score": standing.score, **_interval(standing)}
            for model, standing in standings(votes, draws).items()
        }
    except EloError as error:
        results["no_scores"] = str(error)
    return results


def _interval(standing: Standing) -> dict[str, float | None]:
    """Ends of an interval; None for infinity, which JSON lacks: the votes set no bound."""
    return {
        "low": standing.low if np.isfinite(standing.low) else None,
        "high": standing.high if np.isfinite(standing.high) else None,
    }


# -- as text ---------------------------------------------------------------------------------------


def text(found: Mapping[str, Any]) -> str:
    """The tables as text, and who voted."""
    questions = found["questions"]
    heads = [question.capitalize() for question in questions]
    models = _best_first(questions.values())
    scores = [
        [model, *(_score(figures_of["scores"].get(model)) for figures_of in questions.values())]
        for model in models
    ]
    pairs = [
        (model, opponent)
        for n, model in enumerate(models)
        for opponent in models[n + 1 :]
        if any(opponent in figures_of["wins"].get(model, {}) for figures_of in questions.values())
    ]
    won = [
        [
            f"{model} against {opponent}",
            *(
                _share(figures_of["wins"].get(model, {}).get(opponent))
                for figures_of in questions.values()
            ),
        ]
        for model, opponent in pairs
    ]
    parts = [
        aligned([["Elo scores, with 95% intervals", *heads], *scores]),
        aligned([["Win rates; a tie is half a win for each", *heads], *won]),
    ]
    parts += [
        f"{question}: {figures_of['no_scores']}"
        for question, figures_of in questions.items()
        if "no_scores" in figures_of
    ]
    return "\n\n".join([*parts, _who(found)])


def _best_first(questions: Collection[Mapping[str, Any]]) -> list[str]:
    """Models by the first question that has scores; those without scores last, by name."""
    return list(
        dict.fromkeys(
            model
            for key in ("scores", "wins")
            for figures_of in questions
            for model in figures_of[key]
        )
    )


def _score(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return "-"
    low, high = (
        open_end if cell[end] is None else f"{cell[end]:.1f}"
        for end, open_end in (("low", "-inf"), ("high", "inf"))
    )
    return f"{cell['score']:.1f}  [{low}, {high}]"


def _share(cell: Mapping[str, float] | None) -> str:
    return "-" if cell is None else f"{cell['share']:.0%}  of {cell['votes']:,}"


def _who(found: Mapping[str, Any]) -> str:
    votes = ", ".join(
        f"{figures_of['votes']:,} votes on {question} "
        f"({figures_of['ties'] / figures_of['votes']:.0%} ties)"
        for question, figures_of in found["questions"].items()
    )
    if found["raters"] is None:
        return f"{votes}."
    excluded = found["raters_left_out"]
    left = (
        ""
        if found["left_share"] is None
        else f" The picture on the left was chosen in {found['left_share']:.0%} of the answers "
        f"that are no ties."
    )
    return (
        f"{votes}, of {found['raters'] - excluded:,} raters. Left out: {excluded:,} raters who "
        f"failed more than {found['failed_share']:.0%} of their attention checks, "
        f"with {found['votes_left_out']:,} votes.{left}"
    )
