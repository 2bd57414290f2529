"""Generated pictures beside real ones: the same figures however often it is begun, and what they mean."""

import json

import numpy as np
import pytest

from glide_ray.data.images import encode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.distributed.evaluate import FEATURES, FIGURES, evaluate

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def clip(tiny_weights):
    return str(tiny_weights["clip"])


def distinct(count):
    """Pictures of which no two are alike, or none would be nearer to another than its neighbours are."""
    draws = np.random.default_rng(0)
    return [Sample(f"{n:03d}", encode(draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)), "png", (f"noise {n}",), {}) for n in range(count)]


def test_a_corpus_beside_itself_is_at_no_distance_and_other_pictures_in_its_place_are_seen(drawn_corpus, clip, tmp_path):
    write_shards(tmp_path / "made", distinct(20))
    figures = evaluate(str(tmp_path / "made"), str(tmp_path / "made"), str(tmp_path / "out"), clip)
    assert figures["frechet_distance"] < 1e-3 and figures["precision"] == figures["recall"] == 1 and figures["cmmd"] == pytest.approx(0, abs=1e-6)
    assert figures["clip_score"] == figures["reference_clip_score"] and figures["pictures"] == 20
    assert "noise 7" in (tmp_path / "out" / "report.html").read_text()
    write_shards(tmp_path / "made", distinct(30))
    after = evaluate(str(tmp_path / "made"), str(drawn_corpus / "held_out"), str(tmp_path / "out"), clip)
    assert (after["pictures"], after["reference"]) == (30, 16) and after["frechet_distance"] > 0


def test_begun_again_it_says_the_same_to_the_last_digit_and_looks_only_at_what_it_has_not_seen(drawn_corpus, clip, tmp_path, s3):
    train, held_out = (str(drawn_corpus / part) for part in ("train", "held_out"))
    first, looks = evaluate(train, held_out, str(tmp_path / "a"), clip), []
    assert evaluate(train, held_out, f"{s3}/evaluated", clip) == first              # anew, elsewhere
    assert evaluate(train, held_out, str(tmp_path / "a"), clip, looks.append) == first and not looks
    (tmp_path / "a" / FIGURES).unlink()         # as a kill before the end leaves it
    (tmp_path / "a" / FEATURES.format("reference")).write_bytes(b"half")
    assert evaluate(train, held_out, str(tmp_path / "a"), clip, looks.append) == first and looks == [f"looking at {held_out}"]
    assert json.loads((tmp_path / "a" / FIGURES).read_text()) == first
