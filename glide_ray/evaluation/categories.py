"""Categories of prompts of `glide compose`, as in GenEval (Ghosh et al. 2023).

Also the questions asked about each picture, and the figures that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass

SEEN, PAIRS, UNSEEN, BACKGROUND, COLOUR, COUNT, POSITION, INPAINTING = CATEGORIES = (
    "seen",
    "pairs",
    "unseen",
    "background",
    "colour",
    "count",
    "position",
    "inpainting",
)
NEW = "new style"  # only with `--new-style`
SINGLE = (SEEN, PAIRS, UNSEEN, NEW)

THING, STYLE, BACKGROUND_COLOUR, OBJECT_COLOUR, OBJECT_COUNT, LAYOUT, KNOWN_PIXELS = (
    "object",
    "style",
    "background",
    "colour",
    "count",
    "position",
    "known pixels",
)
# Questions about a picture of each category; the first is the one that the category tests.
QUESTIONS = {
    SEEN: (THING, STYLE),
    PAIRS: (THING, STYLE),
    UNSEEN: (THING, STYLE),
    NEW: (THING, STYLE),
    BACKGROUND: (BACKGROUND_COLOUR, THING),
    COLOUR: (OBJECT_COLOUR, THING),
    COUNT: (OBJECT_COUNT, THING),
    POSITION: (LAYOUT, THING),
    INPAINTING: (THING, KNOWN_PIXELS),
}
# Minimum accuracy of the judge on real pictures for a question to be measurable.
MIN_ACCURACY = {
    THING: 0.9,
    STYLE: 0.98,
    BACKGROUND_COLOUR: 0.98,
    OBJECT_COLOUR: 0.98,
    OBJECT_COUNT: 0.95,
    LAYOUT: 0.95,
}


@dataclass(frozen=True)
class Line:
    """One figure: the share of a category's pictures for which a question is answered correctly.

    `bar`: the share that a model should reach; None if there is no target.
    `of_real`: the bar is a fraction of the share of the real pictures.
    `new_colours`: only pictures whose pair of thing and colour is held out from training.
    """

    about: str
    category: str
    question: str
    bar: float | None = None
    of_real: bool = False
    new_colours: bool = False


LINES = (
    Line("things in styles seen in training: object", SEEN, THING, 0.75, of_real=True),
    Line("things in styles seen in training: style", SEEN, STYLE, 0.95),
    Line("pairs of thing and style never seen: object", PAIRS, THING, 0.5, of_real=True),
    Line("pairs of thing and style never seen: style", PAIRS, STYLE, 0.9),
    Line("things never seen: object", UNSEEN, THING),
    Line("things never seen: style", UNSEEN, STYLE),
    Line("things in the new style: object", NEW, THING),
    Line("things in the new style: style", NEW, STYLE, 0.8),
    Line("background's colour", BACKGROUND, BACKGROUND_COLOUR, 0.9),
    Line("background's colour, new to the thing", BACKGROUND, BACKGROUND_COLOUR, new_colours=True),
    Line("on a background: object", BACKGROUND, THING),
    Line("object's colour", COLOUR, OBJECT_COLOUR, 0.8),
    Line("object's colour, new to the thing", COLOUR, OBJECT_COLOUR, new_colours=True),
    Line("in a colour: object", COLOUR, THING),
    Line("count, one to four", COUNT, OBJECT_COUNT, 0.5),
    Line("count: object", COUNT, THING),
    Line("position of two objects", POSITION, LAYOUT, 0.7),
    Line("position: both objects", POSITION, THING),
    Line("inpainting: object", INPAINTING, THING, 0.5),
    Line("inpainting: known pixels equal", INPAINTING, KNOWN_PIXELS, 1.0),
)
