"""Metrics of image features, against independent implementations and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from glide_ray.evaluation import metrics
from glide_ray.evaluation.metrics import MetricError, Moments


@pytest.fixture
def draws():
    return np.random.default_rng(0)


def features(draws, count, width=48, shift=0.0):
    mix = np.random.default_rng(1).normal(size=(width, width)) / np.sqrt(width)
    return (draws.normal(size=(count, width)) @ mix + shift).astype(np.float32)


def test_the_frechet_distance_agrees_with_scipy_and_torchmetrics(draws):
    first, second = features(draws, 500), features(draws, 700, shift=0.2)
    ours = metrics.frechet_distance(Moments.of(first), Moments.of(second))
    means, covariances = (
        [part.mean(0, dtype=np.float64) for part in (first, second)],
        [np.cov(part.astype(np.float64), rowvar=False) for part in (first, second)],
    )
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    by_hand = np.sum((means[0] - means[1]) ** 2) + np.trace(
        covariances[0] + covariances[1] - 2 * root
    )
    theirs = _compute_fid(
        *(torch.tensor(part) for part in (means[0], covariances[0], means[1], covariances[1]))
    )
    assert ours == pytest.approx(by_hand, rel=1e-6) and ours == pytest.approx(
        float(theirs), rel=1e-3
    )


def test_the_frechet_distance_of_two_normal_distributions_equals_its_closed_form():
    first, second = (
        Moments(10, np.zeros(3), np.diag([1.0, 4.0, 9.0])),
        Moments(10, np.array([1.0, 2.0, 2.0]), np.diag([4.0, 4.0, 1.0])),
    )
    assert metrics.frechet_distance(first, second) == pytest.approx(
        9 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    )


def test_a_set_has_distance_zero_to_itself_and_the_distance_of_its_halves_falls_as_1_over_n(draws):
    whole = features(draws, 8000)
    assert metrics.frechet_distance(Moments.of(whole), Moments.of(whole)) < 1e-3
    distances = [
        np.mean(
            [
                metrics.frechet_distance(
                    Moments.of(part[:count]), Moments.of(part[count : 2 * count])
                )
                for part in (whole, whole[::-1])
            ]
        )
        for count in (500, 1000, 2000, 4000)
    ]
    assert distances == sorted(distances, reverse=True)
    assert np.polyfit(np.log([500, 1000, 2000, 4000]), np.log(distances), 1)[0] == pytest.approx(
        -1, abs=0.15
    )


def test_the_union_of_partial_moments_equals_the_moments_of_the_whole(draws):
    whole = features(draws, 900)
    joined = (
        Moments.of(whole[:100]).union(Moments.of(whole[100:350])).union(Moments.of(whole[350:]))
    )
    direct = Moments.of(whole)
    assert (
        joined.count == 900
        and np.allclose(joined.mean, direct.mean, atol=1e-12)
        and np.allclose(joined.covariance, direct.covariance, atol=1e-12)
    )


def test_the_distance_extrapolated_to_infinitely_many_samples_is_more_accurate(draws):
    width = 32
    generated, truth = (
        draws.normal(size=(4000, width)),
        Moments(10**9, np.zeros(width), np.eye(width)),
    )
    assert abs(
        metrics.frechet_infinity(generated, truth, least=500)
    ) < 0.3 * metrics.frechet_distance(Moments.of(generated), truth)


def test_the_distance_with_fewer_images_than_features_equals_that_of_the_moments(draws):
    generated, reference = features(draws, 30), Moments.of(features(draws, 500, shift=0.2))
    # Square roots of rounding errors limit the agreement of the two formulas.
    assert metrics._from_rows(generated.astype(np.float64), reference) == pytest.approx(
        metrics.frechet_distance(Moments.of(generated), reference), rel=1e-6
    )


def test_kid_agrees_with_torchmetrics_and_is_unbiased(draws):
    first, second = features(draws, 400), features(draws, 400, shift=0.1)
    ours, _ = metrics.kid(first, second, subsets=1, size=400)
    assert ours == pytest.approx(
        float(poly_mmd(torch.tensor(first).double(), torch.tensor(second).double())), rel=1e-3
    )
    mean, deviation = metrics.kid(
        features(draws, 4000), features(draws, 4000), subsets=50, size=200
    )
    assert abs(mean) < 4 * deviation / np.sqrt(50)


def test_cmmd_equals_its_definition_and_is_zero_for_a_set_with_itself(draws):
    first, second = features(draws, 60), features(draws, 50, shift=0.5)
    a, b = (
        part.astype(float) / np.linalg.norm(part, axis=1, keepdims=True) for part in (first, second)
    )

    def kernel(x, y):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in y] for p in x])

    assert metrics.cmmd(first, second) == pytest.approx(
        1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), rel=1e-4
    )
    assert metrics.cmmd(first, first) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("count", "shift", "k"), [(300, 0.0, 3), (300, 0.3, 3), (200, 1.0, 5)])
def test_precision_and_recall_equal_those_of_prdc(draws, monkeypatch, count, shift, k):
    monkeypatch.setattr(metrics, "ROWS", 70)  # splits the rows into several blocks
    real, generated = features(draws, count, 8), features(draws, count + 50, 8, shift)
    theirs = compute_prdc(real.astype(np.float64), generated.astype(np.float64), nearest_k=k)
    assert metrics.precision_recall(real, generated, k) == (theirs["precision"], theirs["recall"])


def test_inception_score_is_the_class_count_for_certain_predictions_and_1_for_uniform_ones():
    sure = np.eye(10)[np.arange(1000) % 10]
    assert metrics.inception_score(sure) == pytest.approx((10, 0), abs=1e-6)
    assert metrics.inception_score(np.full((100, 10), 0.1)) == pytest.approx((1, 0), abs=1e-9)


def test_the_clip_score_is_100_for_equal_and_minus_100_for_opposite_directions(draws):
    first = features(draws, 20)
    assert (
        metrics.clip_score(first, 3 * first)
        == pytest.approx(100)
        == -metrics.clip_score(first, -first)
    )
    assert metrics.clip_score(np.array([[1.0, 0]]), np.array([[1.0, 1]])) == pytest.approx(
        100 / np.sqrt(2)
    )


def test_invalid_features_are_refused_in_one_sentence(draws):
    good, bad = features(draws, 20), features(draws, 20)
    bad[3, 1] = np.nan
    for wrong, sentence in (
        (lambda: Moments.of(bad), "1 of 20 rows"),
        (lambda: Moments.of(good[:1]), "at least 2 rows"),
        (lambda: metrics.kid(good, good[:, :5]), "48 and 5 numbers"),
        (lambda: metrics.precision_recall(good, good[:3]), "3 neighbours"),
        (
            lambda: metrics.frechet_distance(Moments.of(good), Moments.of(good[:, :5])),
            "48 and 5 numbers",
        ),
    ):
        with pytest.raises(MetricError, match=sentence):
            wrong()
