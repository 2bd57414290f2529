"""Content filters (app. F.1 of the paper): SVM and bias, choice of rows to label, filtering."""

import csv
import json
import re
from itertools import islice

import numpy as np
import pyarrow.parquet
import pytest
import scipy.stats
import torch
from helpers import corpora as forms
from helpers.drawings import drawn_samples
from helpers.tiny import tiny_clip
from PIL import Image

import jobs.filter
from glide_ray import storage
from glide_ray.cli.main import main
from glide_ray.config.data import FilterConfig
from glide_ray.data.card import read_card
from glide_ray.data.content import (
    ContentError,
    fit,
    load_filter,
    missed_interval,
    tuned_threshold,
    with_threshold,
)
from glide_ray.data.filters import import_rules
from glide_ray.data.images import centre_crop, three_crops, to_tensor
from glide_ray.data.labelling import (
    Label,
    Pool,
    answered,
    ask,
    assess,
    fit_labelled,
    read_labels,
    threshold_of,
    write_labels,
)
from glide_ray.data.shards import write_shards
from glide_ray.data.sources import find_parts, read_corpus, read_part
from glide_ray.distributed import embed
from glide_ray.distributed.curation.apply_filter import apply_content
from glide_ray.distributed.curation.fit_filter import FILTER, LABELS, SHEET, fit_content
from glide_ray.evaluation.features import ClipFeatures
from glide_ray.models.clip import NoisedClip
from glide_ray.models.clip_scorer import NoisedClipScorer
from glide_ray.models.weights import save_weights

RED = "a red "


def clouds(count=400, separation=2.0, rare=0.25, seed=0):
    """Two overlapping Gaussian clusters: features (N, 8), labels (N,) bool, groups (N,)."""
    draws = np.random.default_rng(seed)
    labels = draws.random(count) < rare
    return (
        (draws.normal(size=(count, 8)) + separation * labels[:, None] * np.eye(8)[0]).astype(
            np.float32
        ),
        labels,
        np.arange(count),
    )


# -- filter ----------------------------------------------------------------------------------------


def test_a_saved_filter_scores_like_scikit_learns_svm_minus_the_threshold(tmp_path):
    features, labels, groups = clouds()
    fitted = fit(features, labels, groups)
    with_threshold(fitted, 0.7, "x", "ab", {"labels": 400}).save(tmp_path / "f")
    loaded = load_filter(tmp_path / "f")
    others = clouds(seed=1)[0]
    assert np.abs(loaded.score(others) - (fitted.svm.decision_function(others) - 0.7)).max() < 1e-4
    assert (loaded.name, loaded.clip, loaded.settings) == ("x", "ab", {"labels": 400})


def test_a_file_that_is_not_a_filter_is_refused_and_never_executed(tmp_path, tiny_weights):
    (tmp_path / "f").write_bytes(b"\x80\x04cos\nsystem\n.")
    for path in (tmp_path / "f", tiny_weights["base"]):
        with pytest.raises(
            ContentError, match="is not a content filter; fit one with `glide filter fit`"
        ):
            load_filter(path)


def test_out_of_fold_scores_come_from_svms_trained_without_the_rows_group():
    """Noise in pairs of equal rows with equal labels.

    An SVM that has seen one row of a pair predicts the other; one that has not is at chance.
    """
    draws = np.random.default_rng(0)
    features, labels = (
        np.repeat(draws.normal(size=(60, 16)), 2, axis=0),
        np.repeat(draws.random(60) < 0.5, 2),
    )
    by_group, one_group = (
        fit(features, labels, groups) for groups in (np.repeat(np.arange(60), 2), np.arange(120))
    )
    right = [((fitted.out_of_fold >= 0) == labels).mean() for fitted in (by_group, one_group)]
    assert right[0] < 0.7 and right[1] > 0.9


def test_too_few_labels_of_one_class_are_refused_with_the_remedy():
    features, labels, groups = clouds(20)
    for few in (np.zeros(20, bool), np.arange(20) == 0):
        with pytest.raises(ContentError, match="are too few to fit a filter on: label two of each"):
            fit(features, few, groups)


def test_the_interval_equals_clopper_and_pearsons():
    for missed, count in ((0, 221), (1, 221), (3, 40), (40, 40)):
        expected = scipy.stats.binomtest(missed, count).proportion_ci(0.95, "exact")
        assert missed_interval(missed, count) == pytest.approx(
            (expected.low, expected.high), abs=1e-12
        )
    assert missed_interval(0, 0) == (0.0, 1.0)


def test_with_enough_positives_the_threshold_holds_for_any_distribution():
    """In at least 95% of draws, less than 1% of the distribution lies below the threshold.

    The distribution has a heavy tail, for which a normal bound would fail.
    """
    kept = 0
    for seed in range(200):
        positives = np.random.default_rng(seed).standard_t(2, 1000)
        threshold = tuned_threshold(positives, 0.01)
        # The largest count out of 1,000 whose upper confidence bound is below 1%.
        assert (positives < threshold).sum() <= 5
        kept += scipy.stats.t(2).cdf(threshold) < 0.01
    assert kept >= 190 - 3 * (200 * 0.95 * 0.05) ** 0.5


def test_with_few_positives_the_threshold_is_the_normal_tolerance_bound():
    """The tolerance factor for ten values, coverage 99% and confidence 95%, is 3.981.

    Source: NIST handbook, 7.2.6.3; ISO 16269-6.
    """
    positives = np.random.default_rng(0).normal(3, 2, 10)
    assert tuned_threshold(positives, 0.01) == pytest.approx(
        positives.mean() - 3.981 * positives.std(ddof=1), abs=2e-3
    )
    assert (
        tuned_threshold(np.r_[positives, -1000.0], 0.01) < -1000
        and tuned_threshold(np.array([2.0]), 0.01) == 1.0
    )


# -- choice of rows to label -----------------------------------------------------------------------


def pool_of(features, groups, likeness=None):
    names = [f"p#{n}" for n in range(len(features))]
    return Pool(
        names,
        names,
        features,
        groups,
        np.empty((len(features), 0)) if likeness is None else likeness,
    )


def test_the_first_rows_are_the_nearest_of_each_word_in_turn_and_random_ones():
    features, _, groups = clouds(100)
    likeness = np.stack([np.arange(100), -np.arange(100)], axis=1).astype(float)
    rows = ask(pool_of(features, groups, likeness), {}, FilterConfig(first=8))
    assert [row for row, why in rows if why == "search"] == [99, 0, 98, 1]
    assert (
        len(rows) == 8
        and len({row for row, _ in rows}) == 8
        and [why for _, why in rows[4:]] == ["random"] * 4
    )


def test_later_rows_are_the_nearest_to_the_boundary_one_per_group_first():
    features, labels, groups = clouds(200)
    groups = groups // 2
    labelled = {n: bool(labels[n]) for n in range(60)}
    chosen = [
        row for row, _ in ask(pool_of(features, groups), labelled, FilterConfig(each_round=20))
    ]
    svm = fit(features[:60], labels[:60], groups[:60]).svm
    order = [n for n in np.argsort(np.abs(svm.decision_function(features))) if n >= 60]
    firsts = [n for k, n in enumerate(order) if groups[n] not in groups[order[:k]]]
    assert chosen == firsts[:20]


def test_no_row_is_labelled_twice_and_the_loop_ends_at_its_number_of_labels():
    features, labels, groups = clouds(300, rare=0.05)
    labelled = answered(
        pool_of(features, groups), labels, FilterConfig(labels=130, first=50, each_round=30)
    )
    assert len(labelled) == 130 and all(labels[n] == label for n, label in labelled.items())
    assert len(answered(pool_of(features[:40], groups[:40]), labels[:40], FilterConfig())) == 40
    assert set(
        answered(pool_of(features, groups), labels, FilterConfig(labels=60), among=groups < 100)
    ) <= set(range(100))


def test_labels_near_the_boundary_find_more_rare_positives_than_random_labels():
    found = []
    for seed in range(5):
        features, labels, groups = clouds(3000, separation=3.0, rare=0.02, seed=seed)
        pool = pool_of(
            features,
            groups,
            features[:, :1] * 0.3 + np.random.default_rng(seed).normal(size=(3000, 1)),
        )
        near = answered(pool, labels, FilterConfig(labels=200, first=100, each_round=25))
        found.append((sum(near.values()), 200 * labels.mean()))
    assert sum(by_loop for by_loop, _ in found) > 3 * sum(by_chance for _, by_chance in found), (
        found
    )


def test_every_row_is_assessed_by_a_filter_trained_without_its_group():
    features, labels, groups = clouds(600, separation=5.0, rare=0.2)
    scores = assess(pool_of(features, groups), labels, FilterConfig(labels=200, first=100))
    assert (
        not np.isnan(scores).any()
        and (scores[labels] < 0).mean() < 0.02
        and (scores[~labels] >= 0).mean() < 0.5
    )
    twins = np.repeat(np.random.default_rng(0).normal(size=(100, 16)), 2, axis=0)
    chance = np.repeat(np.random.default_rng(1).random(100) < 0.5, 2)
    scores = assess(pool_of(twins, np.repeat(np.arange(100), 2)), chance, FilterConfig())
    assert abs(((scores >= np.median(scores)) == chance).mean() - 0.5) < 0.2


def test_the_threshold_counts_each_group_once_by_its_lowest_score():
    features, labels, groups = clouds(4000, separation=4.0, rare=0.5)
    groups = groups // 4
    pool, labelled = pool_of(features, groups), dict(enumerate(labels.tolist()))
    fitted = fit_labelled(pool, labelled)
    lowest = [
        fitted.out_of_fold[labels & (groups == group)].min() for group in np.unique(groups[labels])
    ]
    assert threshold_of(fitted, pool, labelled, FilterConfig()) == tuned_threshold(
        np.array(lowest), 0.01
    )


def test_labels_are_unchanged_by_the_csv_and_spellings_of_people_are_accepted(tmp_path):
    labels = [
        Label("a#1", True, 'says "x", y', "search"),
        Label("b#2", None, "", "random"),
        Label("c#3", False),
    ]
    write_labels(tmp_path / "l.csv", labels)
    assert read_labels(tmp_path / "l.csv") == labels and read_labels(tmp_path / "none.csv") == []
    (tmp_path / "l.csv").write_text("\ufeffrow,label\na#1,Yes\nb#2, no \n", encoding="utf-8")
    assert [label.label for label in read_labels(tmp_path / "l.csv")] == [True, False]
    (tmp_path / "l.csv").write_text("row,label\na#1,1\nb#2,maybe\n")
    with pytest.raises(
        ContentError, match="l.csv, line 3: the label 'maybe' is neither 1 .* nor 0"
    ):
        read_labels(tmp_path / "l.csv")
    # The encoding of some spreadsheet programs.
    (tmp_path / "l.csv").write_text("row,label,caption\na#1,1,piñata\n", encoding="cp1252")
    with pytest.raises(ContentError, match="l.csv is not text in UTF-8"):
        read_labels(tmp_path / "l.csv")


# -- features --------------------------------------------------------------------------------------


def test_the_three_crops_are_at_the_ends_and_the_middle_of_the_longer_side():
    wide = Image.fromarray(
        np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 20, axis=0).repeat(3, axis=2)
    )
    left, middle, right = three_crops(wide, 20)
    assert (
        (left[0, :, 0] == np.arange(20)).all()
        and (middle[0, :, 0] == np.arange(20, 40)).all()
        and (right[0, :, 0] == np.arange(40, 60)).all()
    )
    tall = three_crops(wide.transpose(Image.Transpose.TRANSPOSE), 10)
    assert [crop.shape for crop in tall] == [(10, 10, 3)] * 3 and (
        tall[1] == centre_crop(wide.transpose(Image.Transpose.TRANSPOSE), 10)
    ).all()
    assert len(three_crops(wide.crop((0, 0, 20, 20)), 10)) == 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP that was not trained on noised images, with random weights."""
    torch.manual_seed(1)
    config = tiny_clip("model.clip.noised=false").model
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_weights(path, NoisedClip(config.clip).state_dict(), config)
    return str(path)


def test_features_are_the_mean_over_the_crops_in_any_batch(clip):
    features = ClipFeatures(clip)
    draws = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8))
        for size in ((40, 30, 3), (16, 16, 3), (20, 90, 3))
    ]
    whole = features.images(pictures)
    assert np.allclose(
        whole, np.concatenate([features.images([picture]) for picture in pictures]), atol=1e-6
    )
    crops = features._critic.embed_images(to_tensor(np.stack(three_crops(pictures[0], 16)))).numpy()
    assert np.allclose(whole[0], crops.mean(0), atol=1e-6) and np.allclose(
        np.linalg.norm(crops, axis=1), 1, atol=1e-5
    )
    assert np.allclose(
        np.linalg.norm(features.words(["a dog", "x"]), axis=1), 1, atol=1e-5
    ) and features.images([]).shape == (0, 16)


def test_a_plain_clip_ignores_the_timestep():
    torch.manual_seed(0)
    config = tiny_clip("model.clip.noised=false").model
    critic = NoisedClipScorer(NoisedClip(config.clip), config)
    x, text = torch.rand(2, 3, 16, 16) * 2 - 1, critic.embed(["a", "b"])
    scores = [critic.score(x, torch.full((2,), t), text) for t in (0, 900)]
    assert torch.equal(*scores) and not critic.noised


def test_a_public_clip_on_s3_is_downloaded_once_and_gives_the_same_features(s3, public):
    for file in public.iterdir():
        storage.put(file, f"{s3}/models/public/{file.name}")
    picture = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    ]
    near, far = ClipFeatures(public), ClipFeatures(f"{s3}/models/public")
    assert np.array_equal(near.images(picture), far.images(picture)) and np.array_equal(
        near.words(["a dog"]), far.words(["a dog"])
    )


# -- labelling loop and filtering ------------------------------------------------------------------


def is_red(candidate):
    return candidate.captions[0].startswith(RED)


# Loaded by name and sent to Ray's workers like a user's rule.
TRUTH = import_rules(["test_filter:is_red"])["against the rule test_filter:is_red"]


def answer(path, right=lambda caption: caption.startswith(RED)):
    """Write a label for each unlabelled row, as a person would."""
    rows = list(csv.DictReader(open(path)))
    for row in rows:
        row["label"] = row["label"] or str(int(right(row["caption"])))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.fixture(scope="module")
def varied_corpus(tmp_path_factory):
    """240 drawings with different noise, in 4 shards."""
    from dataclasses import replace

    from glide_ray.data.images import decode, encode

    folder, draws = tmp_path_factory.mktemp("varied"), np.random.default_rng(0)

    def noisy(sample):
        pixels = np.asarray(decode(sample.image)).astype(int) + draws.integers(-25, 26, (64, 64, 3))
        return replace(sample, image=encode(pixels.clip(0, 255).astype(np.uint8)))

    write_shards(folder, map(noisy, drawn_samples(240)), per_shard=60)
    return folder


@pytest.fixture
def in_process(ray_session, monkeypatch):
    """Embed the pictures in this process: actors take longer to start than these pictures."""
    monkeypatch.setattr(embed, "INLINE_IMAGES", 240)


@pytest.fixture(scope="module")
def red_filter(varied_corpus, clip, ray_session, tmp_path_factory):
    """The file of a filter for red drawings, fitted by actors with 60 true labels."""
    folder = tmp_path_factory.mktemp("red")
    config = FilterConfig(labels=60, first=60)
    fit_content("red", str(varied_corpus), folder, clip, config, truth=TRUTH)
    return folder / FILTER


@pytest.mark.usefixtures("in_process")
def test_a_person_labels_in_rounds_and_the_filter_then_cleans_a_corpus(
    varied_corpus, clip, tmp_path
):
    out, config = tmp_path / "red", FilterConfig(labels=50, first=30, each_round=10)
    first = fit_content("red", str(varied_corpus), out, clip, config)
    assert first.content is None and first.waiting == 30 and not (out / FILTER).exists()
    assert Image.open(out / SHEET).width > 8 * 128
    with pytest.raises(
        ContentError, match="30 of 30 rows in .*labels.csv have no label yet; write 1"
    ):
        fit_content("red", str(varied_corpus), out, clip, config)
    answer(out / LABELS)
    second = fit_content("red", str(varied_corpus), out, clip, config)
    assert second.content is not None and (second.labelled, second.waiting) == (30, 10)
    rows = answer(out / LABELS)
    assert len(rows) == len({row["row"] for row in rows}) == 40 and {
        row["why"] for row in rows[30:]
    } == {"near the boundary"}
    fit_content("red", str(varied_corpus), out, clip, config)
    answer(out / LABELS)
    last = fit_content("red", str(varied_corpus), out, clip, config)
    assert (
        (last.labelled, last.waiting) == (50, 0)
        and "of 50" not in last.on_labels
        and f"of {last.with_content} labelled rows with red" in last.on_labels
    )

    done = apply_content(out / FILTER, str(varied_corpus), str(tmp_path / "left"), truth=TRUTH)
    left = [
        sample.captions[0] for part in find_parts(tmp_path / "left") for sample in read_part(part)
    ]
    dropped = pyarrow.parquet.read_table(tmp_path / "left" / "dropped.parquet")
    assert (
        len(left) == done.report.kept
        and len(left) + len(dropped) == 240
        and set(dropped["reason"].to_pylist()) == {"with red"}
    )
    assert sum(caption.startswith(RED) for caption in left) == done.assessment.counts.outcomes[1, 0]
    page = (tmp_path / "left" / "report.html").read_text()
    assert (
        "varied" in page
        and "without red" in page
        and "Kept rows" in page
        and not re.search(r"(src|href)=.http", page)
    )
    summary = json.loads((tmp_path / "left" / "summary.json").read_text())
    assert (summary["read"], summary["kept"], summary["dropped"]) == (
        240,
        len(left),
        {"with red": 240 - len(left)},
    )


@pytest.mark.usefixtures("in_process")
def test_with_known_labels_all_rounds_run_at_once_and_the_filter_is_assessed(
    varied_corpus, clip, tmp_path
):
    done = fit_content(
        "red",
        str(varied_corpus),
        tmp_path,
        clip,
        FilterConfig(labels=80, first=40, each_round=20),
        truth=TRUTH,
        held_out=str(varied_corpus),
    )
    assert (done.labelled, done.waiting) == (80, 0) and done.assessment.counts.outcomes[
        1
    ].sum() == 60
    assert done.assessment.counts.area > 0.9 and "of 60 missed" in str(done.assessment)
    page = (tmp_path / "report.html").read_text()
    assert (
        str(done.assessment)[:30] in page
        and "Assessment" in page
        and "nearest to the boundary" in page
    )


@pytest.mark.usefixtures("ray_session")
def test_a_row_has_the_same_score_in_any_corpus_and_broken_rows_are_dropped_by_name(
    varied_corpus, clip, red_filter, tmp_path, s3
):
    from glide_ray.data.shards import Sample

    samples = [sample for part in find_parts(varied_corpus) for sample in read_part(part)][:50]
    bad = [
        Sample("torn", samples[0].image[:200], "png", ("a red ellipse",), {}),
        Sample("none", b"?", "png", ("x",), {}),
    ]
    write_shards(tmp_path / "mixed", [*samples, *bad], per_shard=20)
    done = apply_content(red_filter, str(tmp_path / "mixed"), f"{s3}/left", per_shard=7)
    features = ClipFeatures(clip)
    from glide_ray.data.images import decode

    passes = (
        load_filter(red_filter).score(features.images([decode(sample.image) for sample in samples]))
        < 0
    )
    left = [sample for part in find_parts(f"{s3}/left") for sample in read_part(part)]
    assert [sample.key for sample in left] == [
        sample.key for sample, stays in zip(samples, passes, strict=True) if stays
    ]
    assert left[0].image == next(
        sample.image for sample, stays in zip(samples, passes, strict=True) if stays
    )
    assert (
        done.report.dropped["with a broken image"] == 1
        and done.report.dropped["with an unreadable image"] == 1
    )
    assert done.report.kept == passes.sum() and all(
        len(list(read_part(part))) <= 7 for part in find_parts(f"{s3}/left")
    )


@pytest.mark.usefixtures("ray_session")
def test_a_clip_other_than_the_filters_own_is_refused(
    varied_corpus, red_filter, tiny_weights, tmp_path
):
    with pytest.raises(
        ContentError, match="is not the CLIP that .* was fitted with: its SHA-256 begins"
    ):
        apply_content(
            red_filter,
            str(varied_corpus),
            str(tmp_path / "left"),
            clip=str(tiny_weights["clip"]),
        )
    assert not (tmp_path / "left").exists()


@pytest.mark.usefixtures("in_process")
def test_labels_of_another_corpus_are_refused(varied_corpus, drawn_corpus, clip, tmp_path):
    fit_content("red", str(varied_corpus), tmp_path, clip, FilterConfig(first=10))
    answer(tmp_path / LABELS)
    with pytest.raises(
        ContentError, match="which is not among the candidate rows: it belongs to another corpus"
    ):
        fit_content("red", str(drawn_corpus / "train"), tmp_path, clip, FilterConfig(first=10))


@pytest.mark.usefixtures("in_process")
def test_labels_of_people_are_never_applied_to_changed_rows_or_overwritten(clip, tmp_path):
    write_shards(tmp_path / "corpus", drawn_samples(40))
    fit_content("red", str(tmp_path / "corpus"), tmp_path / "red", clip, FilterConfig(first=10))
    answer(tmp_path / "red" / LABELS)
    before = (tmp_path / "red" / LABELS).read_text()
    write_shards(tmp_path / "corpus", reversed(list(drawn_samples(40))))
    with pytest.raises(
        ContentError, match="has changed since the labels in .*labels.csv were requested"
    ):
        fit_content("red", str(tmp_path / "corpus"), tmp_path / "red", clip, FilterConfig(first=10))
    with pytest.raises(ContentError, match="holds labels by people"):
        fit_content(
            "red",
            str(tmp_path / "corpus"),
            tmp_path / "red",
            clip,
            FilterConfig(first=10),
            truth=TRUTH,
        )
    assert (tmp_path / "red" / LABELS).read_text() == before


@pytest.mark.usefixtures("in_process")
def test_the_commands_print_their_result_and_the_next_step(
    varied_corpus, clip, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fit_red = [
        "filter",
        "fit",
        "red",
        "--corpus",
        str(varied_corpus),
        "--clip",
        clip,
        "--set",
        "first=40",
        "--search",
        "red",
    ]
    assert main(fit_red) == 0
    assert (
        "0 rows are labelled; 40 more are in runs/filters/red/labels.csv, "
        "their pictures in runs/filters/red/sheet.png" in capsys.readouterr().out
    )
    assert main(fit_red) == 2 and "have no label yet" in capsys.readouterr().err
    answer("runs/filters/red/labels.csv")
    assert (
        main(fit_red) == 0 and "runs/filters/red/filter.safetensors: in" in capsys.readouterr().out
    )
    assert main(["filter", "apply", "red", str(varied_corpus), "--out", "left"]) == 0
    assert "kept; dropped:" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_captions_and_licences_of_any_column_go_through_fitting_and_applying(
    varied_corpus, clip, tmp_path, capsys, monkeypatch
):
    """Parquet whose captions are in `prompt`, two thirds of the rows with a licence."""
    rows = list(islice(read_corpus(varied_corpus), 120))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    columns = {
        "jpg": [row.image for row in rows],
        "prompt": [row.captions[0] for row in rows],
        "license": ["CC0" if n % 3 else None for n in range(len(rows))],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), "in/0.parquet")
    index = {"shards": [{"name": "0.parquet", "count": len(rows)}]}
    (tmp_path / "in" / "index.json").write_text(json.dumps(index))
    fit = ["filter", "fit", "red", "--corpus", "in", "--clip", clip, "--set", "first=40"]
    assert main(fit) == 2
    shown = capsys.readouterr().err
    assert "it has: jpg, prompt, license; name one with --caption-column" in shown
    assert main([*fit, "--caption-column", "prompt"]) == 0
    answer("runs/filters/red/labels.csv")  # by the captions in it
    assert main([*fit, "--caption-column", "prompt"]) == 0
    capsys.readouterr()
    apply = ["filter", "apply", "red", "in", "--out", "left", "--caption-column", "prompt"]
    assert main(apply) == 0
    left = list(read_corpus("left"))
    card = read_card("left")
    licensed = sum(row.meta.get("license") == "CC0" for row in left)
    assert card["licences"] == {"CC0": licensed} and card["rows"] == len(left)
    assert f"licences: CC0 {licensed}; {len(left) - licensed} rows name none" in (
        capsys.readouterr().out
    )
    assert {row.captions[0] for row in left} <= set(columns["prompt"])
    page = (tmp_path / "left" / "report.html").read_text()
    assert "Licences of the kept rows" in page and "no licence named" in page


def test_the_filter_job_reads_the_captions_that_its_option_names(red_filter, clip, tmp_path):
    forms.prompts(tmp_path / "in")
    options = ["in", "--out", str(tmp_path / "out"), "--content", str(red_filter)]
    options[0] = str(tmp_path / "in")
    job = jobs.filter.parser().parse_args([*options, "--caption-column", "prompt"])
    report = jobs.filter.apply_content_filter(job)
    assert report.kept + sum(report.dropped.values()) == forms.COUNT and not report.faults
    assert "without a caption" not in report.dropped


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["fit", "x", "--clip", "nowhere.safetensors"],
            "There is no weights file nowhere.safetensors; "
            "train one with `glide train nano-plain-clip`",
        ),
        (["fit", "x", "--set", "lables=3"], "There is no setting 'lables'; did you mean 'labels'?"),
        (["fit", "x", "--truth", "nowhere:f"], "--truth nowhere:f: the module cannot be imported"),
        (["apply", "nowhere", "corpus", "--out", "left"], "There is no file nowhere"),
        (["apply", "nowhere", "left", "--out", "left"], "--out left is the corpus to read"),
    ],
)
def test_invalid_input_is_refused_with_a_remedy(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["filter", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1 and not any(tmp_path.iterdir())
