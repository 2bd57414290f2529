"""Near-duplicates of a corpus in many parts, found by tasks: as by `find_duplicates` in memory."""

import numpy as np
import pytest

from glide_ray.data.duplicates import (
    BANDS,
    FINGERPRINT_BYTES,
    LONGER_BANDS_FROM,
    LUMA,
    MAX_LUMA,
    band_masks,
    candidates,
    find_duplicates,
    sketch_of,
)
from glide_ray.distributed.curation import near_duplicates
from glide_ray.distributed.curation.judge import Judged, PartResult, write_judged
from glide_ray.distributed.curation.near_duplicates import find_near_duplicates
from glide_ray.distributed.curation.search import dropped_copies

PARTS, EACH = 7, 40


def families(draws, rows):
    """Fingerprints around a few centres: equal ones, near ones and others, and their pixels."""
    centres = draws.integers(20, 236, (rows // 5, FINGERPRINT_BYTES), dtype=np.uint8)
    prints = centres[draws.integers(0, len(centres), rows)]
    for one in prints[draws.random(rows) < 0.7]:
        one[8:] += draws.integers(0, 5, FINGERPRINT_BYTES - 8, dtype=np.uint8)
    for one in prints:
        for bit in draws.choice(64, draws.integers(0, 3), replace=False):
            one[bit // 8] ^= 1 << (bit % 8)
        if draws.random() < 0.6:
            one[8:] += draws.integers(
                0, draws.choice([2, MAX_LUMA]), FINGERPRINT_BYTES - 8, dtype=np.uint8
            )
    return prints, draws.integers(64, 70, rows)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("seed", range(3))
def test_tasks_over_buckets_drop_the_rows_that_a_search_in_memory_drops(
    seed, tmp_path, monkeypatch
):
    for name, rows in (("GROUP_ROWS", 90), ("BUCKET_ROWS", 50), ("SET_ROWS", 10)):
        monkeypatch.setattr(near_duplicates, name, rows)
    # in one task and by several masks, or in three slices
    name, rows = ("COMPARED_ROWS", 90) if seed == 0 else ("MASK_ROWS", 4000)
    monkeypatch.setattr(near_duplicates, name, rows)
    draws = np.random.default_rng(seed)
    prints, sides = families(draws, PARTS * EACH)
    bad = draws.random(PARTS * EACH) < 0.2
    judged = Judged(PARTS)
    for part in range(PARTS):
        rows = [
            {"key": f"k{n}", "reason": "bad", "caption": ""}
            if bad[n]
            else {
                "key": f"k{n}",
                "reason": "",
                "caption": "",
                "width": int(sides[n]),
                "height": int(sides[n]),
                "fingerprint": prints[n].tobytes(),
            }
            for n in range(part * EACH, (part + 1) * EACH)
        ]
        write_judged(rows, result := PartResult(part, "x"), str(tmp_path))
        judged.add(result)
    good = np.flatnonzero(~bad)
    kept_before = judged.kept.copy()
    instead = find_duplicates(prints[good], sides[good] ** 2)
    expected = {int(good[n]): int(good[kept]) for n, kept in enumerate(instead) if kept >= 0}
    search = find_near_duplicates(judged, str(tmp_path), str(tmp_path / "search"))
    assert search.groups > 2 and search.buckets > 2
    found = {}
    for part in range(PARTS):
        for row in dropped_copies(search, part).to_pylist():
            assert row["part"] == part
            kept = row["kept_part"] * EACH + row["kept_position"]
            assert row["kept_key"] == f"k{kept}"
            found[part * EACH + row["position"]] = kept
    assert found == expected and 30 < len(expected) < 200
    by_part = np.bincount(np.array(sorted(found)) // EACH, minlength=PARTS)
    assert (kept_before - judged.kept == by_part).all()
    assert judged.report().examples["near-duplicates of another"] == f"k{min(found)}"


def hashed(draws, rows):
    return draws.integers(0, 2**64, rows, dtype=np.uint64)


@pytest.mark.parametrize("images", [0, LONGER_BANDS_FROM + 1, 64 * LONGER_BANDS_FROM + 1])
def test_hashes_that_differ_in_five_bits_are_candidates_once_with_bands_of_any_length(images):
    draws, masks = np.random.default_rng(0), band_masks(images)
    hashes = hashed(draws, 400)
    copies = hashes.copy()
    for n in range(400):
        for bit in draws.choice(64, 5, replace=False):
            copies[n] ^= np.uint64(1) << np.uint64(bit)
    both, sketches = np.concatenate([hashes, copies]), np.zeros(800, np.uint64)
    found = np.concatenate([candidates(both, sketches, masks, n) for n in range(len(masks))])
    pairs = [tuple(sorted(pair)) for pair in found.tolist()]
    assert len(set(pairs)) == len(pairs) and {(n, n + 400) for n in range(400)} <= set(pairs)


def test_bands_are_longer_where_more_images_would_agree_by_chance():
    bits = [
        min(int(mask).bit_count() for mask in band_masks(images))
        for images in (LONGER_BANDS_FROM, LONGER_BANDS_FROM + 1, 10**9)
    ]
    assert bits == [18, 24, 28] and len(BANDS) == 12
    # pairs of a row and another by chance, at the most images that each length is used for
    assert [
        round(images * sum(2.0 ** -int(mask).bit_count() for mask in band_masks(images)))
        for images in (LONGER_BANDS_FROM, 64 * LONGER_BANDS_FROM, 10**9)
    ] == pytest.approx([300, 850, 350], rel=0.5)


def test_slices_of_a_large_set_give_the_same_pairs(monkeypatch):
    from glide_ray.data import duplicates

    draws, masks = np.random.default_rng(0), band_masks(0)
    hashes = hashed(draws, 40)[draws.integers(0, 40, 600)]
    sketches = draws.integers(0, 2, (600, 8)).astype(np.uint8).view(np.uint64)[:, 0]

    def pairs():
        found = np.concatenate([candidates(hashes, sketches, masks, n) for n in range(66)])
        return sorted(map(tuple, np.sort(found, axis=1).tolist()))

    whole = pairs()
    monkeypatch.setattr(duplicates, "SLICE_ROWS", 64)
    assert pairs() == whole and len(whole) > 1000


def test_the_sketches_of_pictures_within_the_limit_are_within_it_too():
    draws = np.random.default_rng(0)
    prints = draws.integers(0, 256, (500, FINGERPRINT_BYTES), dtype=np.uint8)
    near = prints.astype(int)
    near[:, 8 : 8 + LUMA**2] += draws.choice([-MAX_LUMA, MAX_LUMA], (500, 1))
    near = near.clip(0, 255).astype(np.uint8)
    one, other = (
        sketch_of(some).view(np.uint8).reshape(-1, 8).astype(int) for some in (prints, near)
    )
    assert np.abs(one - other).max() <= MAX_LUMA
    luma = prints[:, 8 : 8 + LUMA**2].reshape(-1, LUMA, LUMA)
    assert (one[:, 0] == luma[:, :8, :4].reshape(500, -1).mean(1).astype(int)).all()
