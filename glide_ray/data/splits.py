"""Held-out rows of the emoji corpus, chosen by hash: the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SPLITS = ("train", "held_out", "held_out_pairs", "tones")  # splits of the emoji pictures
SCENE_SPLITS = ("scenes", "held_out_colours")  # splits of the composed scenes
HELD_OUT_SHARE, HELD_OUT_PAIRS_SHARE, HELD_OUT_COLOURS_SHARE = 0.05, 0.05, 0.1


def is_held_out(base: str) -> bool:
    """Whether an emoji is never trained on: a stable 5%. `base`: code points without skin tone."""
    return share(base) < HELD_OUT_SHARE


def held_out_pairs(base: str, styles: Sequence[str]) -> set[str]:
    """The styles in which an emoji is never trained on; `styles` are all that have it.

    A stable 5% of the pairs of emoji and style, but never all styles of an emoji.
    """
    order = sorted(styles, key=lambda style: share(f"{base}/{style}"))
    return {style for style in order[:-1] if share(f"{base}/{style}") < HELD_OUT_PAIRS_SHARE}


def is_held_out_colour(base: str, colour: str) -> bool:
    """Whether no training scene has this emoji with this colour: a stable 10% of the pairs."""
    return share(f"{base}/{colour}") < HELD_OUT_COLOURS_SHARE


def share(text: str) -> float:
    """Hash of a text, as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
