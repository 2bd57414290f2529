"""Which comparison a rater is shown next, and which of its pictures stands on the left: drawn, balanced, and the same after a reload.

Questions change every ten turns and not from turn to turn, and one turn of the ten is an attention check, which looks like any other.
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
BLOCK = 10  # turns of one question, one of them an attention check
FAILED_SHARE = 0.25  # of the attention checks: who fails more is left out
FIRST, SECOND, TIE = "first", "second", "tie"


@dataclass(frozen=True)
class Comparison:
    """Pictures of two models for one prompt, by their opaque names. An attention check has no models; `check_of` is its question, and the first
    picture the right answer."""

    id: int
    first: str
    second: str
    prompt: str
    first_picture: str
    second_picture: str
    check_of: str | None = None


@dataclass(frozen=True)
class Turn:
    """A comparison as a rater is shown it; `left` is FIRST or SECOND."""

    comparison: int
    question: str
    left: str


def draw(secret: str, *what: str | int) -> int:
    """A number of 64 bits that nobody foresees who does not know the secret."""
    return int.from_bytes(
        hashlib.blake2b(json.dumps(what).encode(), key=secret.encode(), digest_size=8).digest(),
        "big",
    )


def next_turn(
    secret: str,
    rater: str,
    comparisons: Mapping[int, Comparison],
    questions: Sequence[str],
    had: Sequence[Turn],
    taken: Mapping[tuple[int, str], int],
    wanted: int,
) -> Turn | None:
    """None where nothing is left to ask. `had`: the rater's turns so far; `taken`: votes of others by comparison and question, of which `wanted` are."""
    block, place = divmod(len(had), BLOCK)
    begin = draw(secret, rater, "question") + block
    for question in (questions[(begin + n) % len(questions)] for n in range(len(questions))):
        rest = remaining(comparisons.values(), question, had, taken, wanted)
        checks = _unseen(comparisons.values(), question, had, question)
        if not rest:
            continue
        # In the first half of the block, so that who stays for a few turns only is looked at, too.
        chosen = min(
            checks
            if checks and place == 1 + draw(secret, rater, "check", block) % (BLOCK // 2)
            else rest,
            key=lambda one: (
                taken.get((one.id, question), 0),
                draw(secret, rater, question, one.id),
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
                [turn for turn in had if turn.question == question],
                comparisons,
            ),
        )
    return None


def remaining(
    comparisons: Collection[Comparison],
    question: str,
    had: Sequence[Turn],
    taken: Mapping[tuple[int, str], int],
    wanted: int,
) -> list[Comparison]:
    """What could still be asked of a rater, without the checks."""
    return [
        one
        for one in _unseen(comparisons, question, had, None)
        if taken.get((one.id, question), 0) < wanted
    ]


def _unseen(
    comparisons: Collection[Comparison], question: str, had: Sequence[Turn], check_of: str | None
) -> list[Comparison]:
    seen = {turn.comparison for turn in had if turn.question == question}
    return [one for one in comparisons if one.check_of == check_of and one.id not in seen]


def _left(
    secret: str,
    rater: str,
    chosen: Comparison,
    question: str,
    had: Sequence[Turn],
    comparisons: Mapping[int, Comparison],
) -> str:
    """As often one model as the other for each two, and by a coin where both were there as often."""
    models = chosen.first, chosen.second
    alike = [
        turn.left
        for turn in had
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
