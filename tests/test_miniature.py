"""The paper in miniature: its models can be trained, and what it says to hold follows from the figures. The whole takes two hours and is run by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_ray import miniature
from glide_ray.evaluation.features import ClipFeatures
from glide_ray.miniature import BEST, BY_CLIP, CLIP_SCALES, MODELS, SCALES, UNGUIDED

BEST_SET, BY_CLIP_SET = f"guidance-{BEST:g}", f"clip-{BY_CLIP:g}"
BORDER = {"border_gain": 0.02, "gain_standard_error": 0.005, "border_explicit": 0.05, "border_implicit": 0.07}


@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_a_preset_of_its_size_and_corpus(name):
    preset = miniature.preset(name, Path("out"), Path("corpus"))
    assert preset.model.image_size == miniature.SIDE
    assert preset.data.corpus == ("corpus/without_people" if name == "small-filtered" else "corpus/train") and preset.data.held_out == "corpus/held_out"
    assert preset.train.start_from == ("out/base/weights.safetensors" if name == "inpaint" else None)


@pytest.fixture
def seeing(tiny_weights):
    return ClipFeatures(tiny_weights["clip"])


def pictures(seed, count=12):
    """Of one set: noise, with captions that all sets have in common."""
    draws = np.random.default_rng(seed)
    return [(Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)), f"caption {n}") for n in range(count)]


def test_of_two_pictures_the_one_that_lies_nearer_to_a_real_one_and_to_its_caption_is_voted_for(seeing):
    sets = {UNGUIDED: pictures(0), BY_CLIP_SET: pictures(1), BEST_SET: pictures(2)}
    votes = miniature._votes(sets, sets[BEST_SET], seeing)          # which are as near as can be to themselves
    assert {len(of) for of in votes.values()} == {3 * 12}
    ours = [vote.won if vote.first == BEST_SET else 1 - vote.won for vote in votes["photorealism"] if BEST_SET in (vote.first, vote.second)]
    assert ours == [1.0] * 24
    cosines = {name: miniature._cosines(*zip(*of, strict=True), seeing) for name, of in sets.items()}
    expected = np.where(cosines[BY_CLIP_SET] > cosines[BEST_SET], 1.0, 0.0)
    assert [vote.won for vote in votes["caption similarity"] if {vote.first, vote.second} == {BY_CLIP_SET, BEST_SET}] == expected.tolist()


def test_a_finding_holds_where_the_figures_are_as_the_paper_has_them_and_not_where_they_are_the_other_way_round(seeing):
    free = [UNGUIDED if scale == 1 else f"guidance-{scale:g}" for scale in SCALES]
    clips = [f"clip-{scale:g}" for scale in CLIP_SCALES]
    made = {name: pictures(n) for n, name in enumerate([*free, *clips, "small-unguided", f"small-guidance-{BEST:g}"])}

    def holds(sign):
        rows = {name: {"precision": 0.5 + sign * 0.02 * n, "recall": 0.5 - sign * 0.02 * n, "frechet_distance": 1 + sign * abs(n - 1), "clip_score": 20.0 + n}
                for n, name in enumerate(free)}
        rows |= {name: {"precision": 0.5, "recall": 0.5, "frechet_distance": 2.0, "clip_score": 22 + sign * 9.0} for name in clips}
        border = BORDER if sign > 0 else {**BORDER, "border_gain": 0.009}
        found = miniature._findings(rows, made, {}, {"ddim": border}, seeing)
        assert all(finding.here for finding in found) and len(found) == 6
        return {finding.text.partition("(")[0]: finding.holds for finding in found}
    as_there, other_way = holds(+1), holds(-1)
    for text in as_there:
        if text.startswith(("It trades", "The distance", "CLIP guidance can", "A model that")):
            assert as_there[text] and not other_way[text], text
