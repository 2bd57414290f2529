"""Teach the judge one more style, for example that of a fine-tuned model.

The judge learns the style from real pictures of half of the things; the other half serves to
measure its accuracy and for prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.splits import share
from .cases import CorpusError, Row, read_rows, single_cases
from .categories import NEW, STYLE
from .judge import Judge
from .judge_accuracy import SIZES, shares
from .regions import resized

SPLIT = "train"
# Maximum number of pictures of the new style, and of other styles, for learning; and of the new
# style for measuring accuracy.
MAX_PICTURES = 400


def learn_style(judge: Judge, corpus: str, known: str) -> tuple[Judge, list[Row]]:
    """The judge extended by the one style of `corpus/train`, and the rows for prompts.

    The style is learnt as distinct from the styles of the corpus `known`. Accuracy is measured on
    things from which the style was not learnt, and half of the pictures are in known styles. Raises
    CorpusError.
    """
    rows = [row for row in read_rows(corpus, SPLIT) if row.emoji in judge.vocabulary.names]
    styles = {row.style for row in rows}
    if len(styles) != 1 or styles <= set(judge.styles.labels):
        raise CorpusError(
            f"{corpus}/{SPLIT} has {len(styles)} styles of things that the judge knows"
            f"{', and it knows their style' if len(styles) == 1 else ''}; give --new-style a "
            f"corpus of one style that is not in --corpus."
        )
    (style,) = styles
    learnt = [row for row in rows if share(f"new style/{row.emoji}") < 0.5]
    asked = [row for row in rows if row not in learnt]
    pictures = [_views(chosen[:MAX_PICTURES]) for chosen in (learnt, read_rows(known, SPLIT))]
    judge = judge.with_style(style, *pictures)
    return replace(
        judge, accuracy=_measure_accuracy(judge, asked, read_rows(known, "held_out_pairs"))
    ), asked


def _views(rows: Sequence[Row]) -> list[np.ndarray]:
    """Each picture at 256 and at 64 pixels."""
    pictures = [row.picture() for row in rows]
    return pictures + [resized(picture, 64) for picture in pictures]


def _measure_accuracy(judge: Judge, asked: Sequence[Row], old: Sequence[Row]) -> dict[str, Any]:
    cases = single_cases(NEW, asked, min(len(asked), MAX_PICTURES))
    others = [row.picture() for row in old[: len(cases)]]
    accuracy = {}
    for name, size in SIZES.items():
        found = shares(judge.verdicts(cases, [resized(case.picture, size) for case in cases]))
        answers = judge.style_of([resized(picture, size) for picture in others])
        kept = sum(answer not in judge.styles.added for answer in answers)
        right = found[STYLE]["right"] * len(cases) + kept
        found[STYLE] = {
            "right": right / (len(cases) + len(answers)),
            "pictures": len(cases) + len(answers),
        }
        accuracy[name] = {**judge.accuracy.get(name, {}), NEW: found}
    return accuracy
