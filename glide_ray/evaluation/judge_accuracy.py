"""The judge's accuracy on real pictures that it was not fitted to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import vocabulary as words
from .cases import SCENES, Case, read_rows, scene_cases, single_cases, sprites_of
from .categories import CATEGORIES, MIN_ACCURACY, PAIRS, SEEN, SINGLE, STYLE, THING, UNSEEN
from .judge import Judge
from .regions import resized

log = logging.getLogger(__name__)

SIZES = {"256": 256, "64": 64}
SCENES_TRIED = 300  # scenes of each kind


def try_judge(corpus: str, judge: Judge, scenes: int = SCENES_TRIED) -> Judge:
    """A copy of the judge with its `accuracy` measured.

    On the corpus's held-out pairs, and on scenes composed of them alone. A thing never seen in
    training is judged after learning it from its real pictures by other artists.
    """
    log.info("measuring the judge on real pictures that it was not fitted to")
    cases = _held_out(corpus, judge, scenes)
    found: dict[str, dict[str, Any]] = {}
    for name, size in SIZES.items():
        pictures = [resized(case.picture, size) for case in cases]
        verdicts = judge.verdicts(cases, pictures)
        rows = [(case.category, verdict) for case, verdict in zip(cases, verdicts, strict=True)]
        found[name] = {
            category: shares([verdict for of_case, verdict in rows if of_case == category])
            for category in CATEGORIES
            if any(of_case == category for of_case, _ in rows)
        }
        # The judge was fitted to the pictures of SEEN: held-out pairs give its accuracy there, too.
        if PAIRS in found[name]:
            found[name][SEEN] = found[name][PAIRS]
        if unseen := _unseen(corpus, judge, size):
            found[name][UNSEEN] = unseen
        _pool_styles(found[name])
    return replace(judge, accuracy=found)


def _held_out(corpus: str, judge: Judge, scenes: int) -> list[Case]:
    known = set(judge.things.labels) & judge.vocabulary.names.keys() - judge.vocabulary.misjudged
    rows = [row for row in read_rows(corpus, "held_out_pairs") if row.emoji in known]
    cases = single_cases(PAIRS, rows, len(rows))
    with sprites_of(corpus, "held_out_pairs", judge.vocabulary, sorted(known)) as sprites:
        for category in SCENES:
            cases += scene_cases(category, sprites, scenes)
    return cases


def _unseen(corpus: str, judge: Judge, size: int) -> dict[str, Any]:
    """Accuracy on things never seen in training, leaving out one picture at a time.

    Each picture is judged after learning its thing from the thing's other pictures alone.
    """
    rows = [
        row
        for row in read_rows(corpus, "held_out")
        if words.is_plain(row.emoji, row.name, row.group)
    ]
    verdicts = []
    for thing in dict.fromkeys(row.emoji for row in rows):
        cases = single_cases(
            UNSEEN,
            [row for row in rows if row.emoji == thing],
            sum(row.emoji == thing for row in rows),
        )
        shapes = judge.shapes_of([case.picture for case in cases])
        of_thing = judge.verdicts(cases, [resized(case.picture, size) for case in cases])
        small = judge.shapes_of([resized(case.picture, size) for case in cases])
        for n, case in enumerate(cases):
            others = [m for m in range(len(cases)) if m != n]
            if others:
                known = replace(
                    judge, things=judge.things.adding(shapes[others], [thing] * len(others))
                )
                verdicts.append(
                    {**of_thing[n], THING: known.things_shown([case], small[n : n + 1])[0]}
                )
    return shares(verdicts)


def _pool_styles(found: dict[str, dict[str, Any]]) -> None:
    """Set the style accuracy of all single-object categories to that on their pooled pictures.

    Style is one classifier, whatever the object.
    """
    accuracies = [
        found[category][STYLE] for category in (PAIRS, UNSEEN) if STYLE in found.get(category, {})
    ]
    pictures = sum(accuracy["pictures"] for accuracy in accuracies)
    for category in SINGLE:
        if STYLE in found.get(category, {}):
            right = (
                sum(accuracy["right"] * accuracy["pictures"] for accuracy in accuracies) / pictures
            )
            found[category][STYLE] = {"right": right, "pictures": pictures}


def shares(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By question: share of correct answers and number of pictures."""
    questions = dict.fromkeys(question for verdict in verdicts for question in verdict)
    return {
        question: {
            "right": sum(verdict[question].right for verdict in verdicts) / len(verdicts),
            "pictures": len(verdicts),
        }
        for question in questions
        if question in MIN_ACCURACY
    }
