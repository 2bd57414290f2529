"""Choice of the comparison that a rater sees next, and of the picture on the left.

The choice is random but balanced, and the same after a reload. The question changes every ten turns
instead of every turn, and one of the ten turns is an attention check, which looks like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

QUESTIONS = {
    "photorealism": "Which picture looks more like a real photograph?",
    "caption": "Which picture fits the caption better?",
}
BLOCK = 10  # consecutive turns with one question, one of them an attention check
# Raters who fail a larger share of their attention checks are excluded.
FAILED_SHARE = 0.25
FIRST, SECOND, TIE = "first", "second", "tie"


@dataclass(frozen=True)
class Comparison:
    """Pictures of two models for one prompt, by their opaque names.

    `check_of`: for an attention check, its question; None otherwise. An attention check has no
    models, and its first picture is the right answer.
    """

    id: int
    first: str
    second: str
    prompt: str
    first_picture: str
    second_picture: str
    check_of: str | None = None


@dataclass(frozen=True)
class Turn:
    """A comparison as shown to a rater. `left`: the picture on the left, FIRST or SECOND."""

    comparison: int
    question: str
    left: str


def draw(secret: str, *what: str | int) -> int:
    """A 64-bit number derived from `what`, unpredictable without the secret."""
    return int.from_bytes(
        hashlib.blake2b(json.dumps(what).encode(), key=secret.encode(), digest_size=8).digest(),
        "big",
    )


def next_turn(
    secret: str,
    rater: str,
    comparisons: Mapping[int, Comparison],
    questions: Sequence[str],
    past: Sequence[Turn],
    others: Mapping[tuple[int, str], int],
    needed: int,
) -> Turn | None:
    """The rater's next turn; None if nothing is left to ask.

    `past`: of this rater. `others`: votes of other raters by comparison and
    question. `needed`: number of votes for each of them.
    """
    block, place = divmod(len(past), BLOCK)
    begin = draw(secret, rater, "question") + block
    for question in (questions[(begin + n) % len(questions)] for n in range(len(questions))):
        rest = remaining(comparisons.values(), question, past, others, needed)
        checks = _unseen(comparisons.values(), question, past, question)
        if not rest:
            continue
        # The check is in the first half of the block, so that raters who stop after a few turns are
        # checked, too.
        chosen = min(
            checks
            if checks and place == 1 + draw(secret, rater, "check", block) % (BLOCK // 2)
            else rest,
            key=lambda comparison: (
                others.get((comparison.id, question), 0),
                draw(secret, rater, question, comparison.id),
            ),
        )
        return Turn(
            chosen.id,
            question,
            _left(
                secret,
                rater,
                chosen,
                question,
                [turn for turn in past if turn.question == question],
                comparisons,
            ),
        )
    return None


def remaining(
    comparisons: Collection[Comparison],
    question: str,
    past: Sequence[Turn],
    others: Mapping[tuple[int, str], int],
    needed: int,
) -> list[Comparison]:
    """Comparisons that the rater can still be asked, without attention checks."""
    return [
        comparison
        for comparison in _unseen(comparisons, question, past, None)
        if others.get((comparison.id, question), 0) < needed
    ]


def _unseen(
    comparisons: Collection[Comparison],
    question: str,
    past: Sequence[Turn],
    check_of: str | None,
) -> list[Comparison]:
    shown = {turn.comparison for turn in past if turn.question == question}
    return [
        comparison
        for comparison in comparisons
        if comparison.check_of == check_of and comparison.id not in shown
    ]


def _left(
    secret: str,
    rater: str,
    chosen: Comparison,
    question: str,
    past: Sequence[Turn],
    comparisons: Mapping[int, Comparison],
) -> str:
    """Which picture to show on the left: FIRST or SECOND.

    For each pair of models, the model shown on the left less often so far; at equal counts, random.
    """
    models = chosen.first, chosen.second
    alike = [
        turn.left
        for turn in past
        if (comparisons[turn.comparison].first, comparisons[turn.comparison].second) == models
    ]
    ahead = alike.count(FIRST) - alike.count(SECOND)
    return (
        SECOND
        if ahead > 0
        else FIRST
        if ahead < 0
        else (FIRST, SECOND)[draw(secret, "left", rater, question, chosen.id) % 2]
    )
