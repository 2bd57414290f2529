"""Semantic duplicates and the baselines of `glide clean` that need features.

Truth: comparisons of all pairs, sorted scores, planted copies, and the intersection of two runs.
"""

import io

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageEnhance

from glide_ray.config.data import CleanConfig
from glide_ray.config.overrides import override
from glide_ray.data.filters import SEMANTIC_DUPLICATE
from glide_ray.data.images import decode
from glide_ray.data.shards import Sample, write_shards
from glide_ray.data.sources import find_parts, read_part
from glide_ray.distributed.curation import baseline, clusters, semantic
from glide_ray.distributed.curation.baseline import score_threshold
from glide_ray.distributed.curation.clean import clean
from glide_ray.distributed.curation.clusters import FeatureSearch
from glide_ray.distributed.curation.features import save_features
from glide_ray.distributed.curation.judge import Judged, PartResult, write_judged
from glide_ray.distributed.curation.search import dropped_copies, group_starts
from glide_ray.distributed.curation.semantic import (
    find_semantic_duplicates,
    most_similar_earlier,
)
from glide_ray.distributed.rows import DROPPED, PAGE
from glide_ray.errors import ConfigError
from glide_ray.evaluation.features import ClipFeatures

PARTS, EACH, WIDTH = 6, 50, 12


def families(draws, rows, spread=0.3):
    """Features around a few centres, of length 1, as float16 keeps them."""
    centres = draws.normal(size=(rows // 8, WIDTH))
    features = centres[draws.integers(0, len(centres), rows)]
    features = features + spread * draws.normal(size=features.shape)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


def unit(features):
    rows = features.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_parts(folder, features, bad, scores=None):
    """Judged files and features of PARTS parts; rows that are `bad` are dropped."""
    judged = Judged(PARTS)
    for part in range(PARTS):
        numbers = range(part * EACH, (part + 1) * EACH)
        rows = [{"key": f"k{n}", "reason": "bad" if bad[n] else "", "caption": ""} for n in numbers]
        for n, row in zip(numbers, rows, strict=True):
            if scores is not None and not np.isnan(scores[n]):
                row["score"] = float(scores[n])
        inside = np.flatnonzero(~bad[part * EACH : (part + 1) * EACH])
        save_features(str(folder), part, inside, features[part * EACH + inside])
        write_judged(rows, result := PartResult(part, "x"), str(folder))
        judged.add(result)
    return judged


def dropped_by_all_pairs(features, limit):
    """Rows with an earlier one above the limit, those least similar to the mean first."""
    rows = unit(features)
    centre = unit(rows.mean(0, keepdims=True))
    order = np.argsort(rows @ centre[0])
    similar = np.triu(rows[order] @ rows[order].T, 1)
    return set(order[similar.max(0) > limit].tolist())


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("limit", [0.8, 0.95])
def test_one_cluster_drops_the_rows_that_a_comparison_of_all_pairs_drops(
    limit, tmp_path, monkeypatch
):
    monkeypatch.setattr(semantic, "FEATURE_ROWS", 110)
    monkeypatch.setattr(clusters, "MIN_BATCH", 10**6)  # the centroid is the mean of all
    draws = np.random.default_rng(0)
    features, bad = families(draws, PARTS * EACH), draws.random(PARTS * EACH) < 0.2
    judged = write_parts(tmp_path, features, bad)
    before = judged.kept.copy()
    good = np.flatnonzero(~bad)
    expected = {int(good[n]) for n in dropped_by_all_pairs(features[good], limit)}
    folder = str(tmp_path)
    search = find_semantic_duplicates(judged, folder, folder, f"{folder}/x", None, limit)
    assert search.groups == 3
    found = {}
    for part in range(PARTS):
        for row in dropped_copies(search, part).to_pylist():
            kept = row["kept_part"] * EACH + row["kept_position"]
            assert row["part"] == part and row["kept_key"] == f"k{kept}"
            found[part * EACH + row["position"]] = kept
    assert set(found) == expected and 20 < len(expected) < 250
    assert not set(found.values()) & expected and not bad[list(found.values())].any()
    by_part = np.bincount(np.array(sorted(found)) // EACH, minlength=PARTS)
    assert (before - judged.kept == by_part).all()
    assert judged.report().examples[SEMANTIC_DUPLICATE] == f"k{min(found)}"


@pytest.mark.usefixtures("ray_session")
def test_with_clusters_copies_are_found_and_only_similar_rows_are_dropped(tmp_path, monkeypatch):
    for name, rows in (("FEATURE_ROWS", 110), ("BUCKET_ROWS", 60), ("CLUSTER_ROWS", 20)):
        monkeypatch.setattr(semantic, name, rows)
    draws = np.random.default_rng(1)
    features = families(draws, PARTS * EACH, spread=1.0)
    copies = draws.permutation(PARTS * EACH).reshape(2, -1)[:, :40]
    features[copies[0]] = features[copies[1]]  # equal, so in the same cluster
    judged = write_parts(tmp_path, features, np.zeros(PARTS * EACH, bool))
    folder = str(tmp_path)
    search = find_semantic_duplicates(judged, folder, folder, f"{folder}/x", None, 0.9)
    assert search.buckets == 5
    found = {
        part * EACH + row["position"]
        for part in range(PARTS)
        for row in dropped_copies(search, part).to_pylist()
    }
    assert all(one in found or other in found for one, other in copies.T.tolist())
    similar = unit(features) @ unit(features).T - 2 * np.eye(len(features))
    assert (similar[sorted(found)].max(1) > 0.9 - 1e-6).all()


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 33])
def test_blocks_give_the_match_of_a_whole_comparison(rows, monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK_ROWS", 8)
    draws = np.random.default_rng(rows)
    features, order = families(draws, 40), draws.permutation(40)[:rows]
    similar = np.triu(unit(features[order]) @ unit(features[order]).T, 1)
    expected = [
        int(similar[:, n].argmax()) if similar[:, n].max(initial=0) > 0.7 else -1
        for n in range(rows)
    ]
    assert most_similar_earlier(features, order, 0.7).tolist() == expected


# -- CLIP scores -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_the_threshold_keeps_exactly_the_share_with_the_highest_scores(tmp_path):
    draws = np.random.default_rng(0)
    scores = draws.normal(0.2, 0.1, PARTS * EACH).astype(np.float32)
    scores[draws.random(len(scores)) < 0.1] = np.nan
    scores[:5] = -0.5, -0.25, 0.0, 1.0, np.nextafter(np.float32(0.2), np.float32(1))
    features = families(draws, PARTS * EACH)
    judged = write_parts(tmp_path, features, np.zeros(PARTS * EACH, bool), scores)
    known = np.sort(scores[~np.isnan(scores)])[::-1]
    for number, share in enumerate((0.3, 0.5, 1.0, 1e-9)):
        starts = group_starts(judged.read, 110)
        search = FeatureSearch("", str(tmp_path), str(tmp_path / f"{number}"), starts, 0)
        wanted = max(1, round(share * len(known)))
        assert score_threshold(search, share) == known[wanted - 1]


# -- whole runs ------------------------------------------------------------------------------------


def blobs(n, side=96):
    coarse = np.random.default_rng(n).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def as_png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def run(source, out, *changes):
    return clean(str(source), str(out), override(CleanConfig(), changes))


def kept_keys(out):
    return {sample.key for part in find_parts(str(out)) for sample in read_part(part)}


def dropped(out):
    return pyarrow.parquet.read_table(out / DROPPED).to_pylist()


def contents(out):
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_session")
def test_recoloured_and_cropped_pictures_are_semantic_duplicates_but_not_near_ones(
    tmp_path, emoji_corpus
):
    shard = find_parts(str(emoji_corpus[0] / "train"))[0]
    samples = [sample for sample, _ in zip(read_part(shard), range(40), strict=False)]
    pictures = [decode(sample.image) for sample in samples[:6]]
    edits = [
        image.crop((8, 8, image.width - 8, image.height - 8)) if n % 2 else _recoloured(image)
        for n, image in enumerate(pictures)
    ]
    copies = [
        Sample(f"copy{n}", as_png(image), "png", samples[n].captions, {})
        for n, image in enumerate(edits)
    ]
    write_shards(tmp_path / "in", [*samples, *copies])
    done = run(tmp_path / "in", tmp_path / "out", "semantic=0.8")
    pairs = [
        {line["key"], line["kept_instead"]}
        for line in dropped(tmp_path / "out")
        if line["reason"] == SEMANTIC_DUPLICATE
    ]
    for n, copy in enumerate(copies):
        assert {samples[n].key, copy.key} in pairs
    assert done.report.dropped == {SEMANTIC_DUPLICATE: len(pairs)} and len(pairs) <= 9
    assert SEMANTIC_DUPLICATE in (tmp_path / "out" / PAGE).read_text()


def _recoloured(image):
    return ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(0.9)).enhance(0.6)


ROWS = 40
GERMAN = {5: "ein rotes Haus am See", 11: "zwei Hunde auf der Wiese"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_weights, ray_session):
    """Outputs of the baselines that need a CLIP, by name, and the samples of their corpus."""
    folder = tmp_path_factory.mktemp("baselines")
    samples = [
        Sample(
            f"row{n:02d}",
            as_png(blobs(n)),
            "png",
            (GERMAN.get(n, f"a picture of {n} coloured blobs"), "the other caption of it"),
            {},
        )
        for n in range(ROWS)
    ]
    samples = [
        Sample(s.key, s.image, s.suffix, s.captions[: 1 if n in GERMAN else 2], {})
        for n, s in enumerate(samples)
    ]
    write_shards(folder / "in", samples, per_shard=8)
    (folder / "reference").mkdir()
    for n in range(4):  # pictures without captions
        (folder / "reference" / f"{n}.png").write_bytes(samples[n].image)
    options = [f"clip={tiny_weights['clip']}", f"reference={folder / 'reference'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "CLUSTER_ROWS", 8)
        for name in ("clip_score", "image_based", "intersection"):
            run(folder / "in", folder / name, f"baseline={name}", *options)
    return folder, samples


def test_clip_score_keeps_the_rows_with_the_highest_scores(runs, tiny_weights):
    folder, samples = runs
    network = ClipFeatures(tiny_weights["clip"])
    images = network.images([decode(sample.image) for sample in samples])
    scores = [
        max(image @ network.words(sample.captions).T)
        for image, sample in zip(images, samples, strict=True)
    ]
    best = np.argsort(scores)[::-1][: round(0.3 * ROWS)]
    assert kept_keys(folder / "clip_score") == {samples[n].key for n in best}
    reasons = {line["reason"] for line in dropped(folder / "clip_score")}
    assert reasons == {"with a CLIP score not among the highest 30%"}


def test_image_based_keeps_the_clusters_of_reference_images_and_english_captions(runs):
    folder, samples = runs
    kept = kept_keys(folder / "image_based")
    assert {sample.key for sample in samples[:4]} <= kept and 4 <= len(kept) < ROWS - len(GERMAN)
    reasons = {line["key"]: line["reason"] for line in dropped(folder / "image_based")}
    assert {samples[n].key for n in GERMAN} == {
        key for key, reason in reasons.items() if "English" in reason
    }
    assert set(reasons.values()) == {
        "in a cluster without a reference image",
        "with a caption in another language than English",
    }


def test_intersection_keeps_what_both_keep(runs):
    folder, _ = runs
    both = kept_keys(folder / "clip_score") & kept_keys(folder / "image_based")
    assert kept_keys(folder / "intersection") == both and both


@pytest.fixture(scope="module")
def undisturbed(runs, tiny_weights):
    """Settings of a run of all stages, and its output."""
    folder, clip = runs[0], tiny_weights["clip"]
    changes = ["baseline=clip_score", "clip_share=0.9", f"clip={clip}", "semantic=0.5"]
    run(folder / "in", folder / "whole", *changes)
    return changes, contents(folder / "whole")


@pytest.mark.parametrize("stage", ["choose", "assign", "compare", "copies"])
def test_a_run_that_is_interrupted_in_any_stage_resumes_to_the_same_bytes(
    stage, runs, undisturbed, tmp_path, monkeypatch
):
    folder, (changes, whole) = runs[0], undisturbed

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    def stop(search, kind, *arguments):
        if kind == stage:
            raise KeyboardInterrupt
        return real(search, kind, *arguments)

    real = semantic.run_once
    with monkeypatch.context() as patch:
        patch.setattr(semantic, "run_once", stop)
        if stage == "choose":
            patch.setattr(baseline, "run_each", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "in", tmp_path / "out", *changes)
    assert list((tmp_path / "out").rglob("judged/000000.parquet"))
    done = run(folder / "in", tmp_path / "out", *changes)
    ours = contents(tmp_path / "out")
    assert ours.keys() == whole.keys() and done.report.dropped[SEMANTIC_DUPLICATE]
    assert all(ours[name] == whole[name] for name in ours if name != PAGE)


# -- wrong settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["baseline=clip_score"], "baseline=clip_score compares images with captions; add --set"),
        (["baseline=image_based"], "compares with reference images; add --set reference=FOLDER"),
        (["semantic=0.9", "clip=nowhere"], "There is no CLIP nowhere; --set clip=PATH takes"),
        (["semantic=0.9", "clip={folder}"], "--set clip: .* does not hold a CLIP"),
        (["semantic=0.9", "clip={folder}/a.txt"], "--set clip: .*a.txt"),
        (["semantic=0.9", "clip={base}"], "--set clip: "),
        (["baseline=image_based", "reference={folder}/none"], "--set reference: "),
        (["baseline=image_based", "reference={folder}/empty"], "--set reference: "),
        (["baseline=image_based", "reference={folder}/text"], "no image of .* can be read"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(changes, message, runs, tiny_weights, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.png").write_text("no picture")
    names = {"folder": tmp_path, "base": tiny_weights["base"]}
    with pytest.raises(ConfigError, match=message) as refusal:
        run(runs[0] / "in", tmp_path / "out", *(change.format(**names) for change in changes))
    assert "\n" not in str(refusal.value) and not (tmp_path / "out" / "index.json").exists()
