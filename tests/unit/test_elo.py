"""Elo scores from pairwise comparisons, against a direct fit and closed forms."""

import numpy as np
import pytest
import scipy.optimize

from glide_ray.evaluation.elo import EloError, Vote, scores, standings, win_counts
from glide_ray.evaluation.tables import Ballot, figures, text


def drawn_votes(truth, count, seed=0):
    """Votes on random pairs, drawn from models with these true scores; a tenth are ties."""
    random, models = np.random.default_rng(seed), list(truth)
    votes = []
    for _ in range(count):
        first, second = random.choice(models, 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[second] - truth[first]) / 400))
        votes.append(
            Vote(first, second, 0.5 if random.random() < 0.1 else float(random.random() < chance))
        )
    return votes


TRUTH = {"unguided": -100.0, "clip": 10.0, "free": 90.0}


def test_scores_equal_a_direct_fit_of_the_likelihood():
    models = list(TRUTH)
    table = win_counts(drawn_votes(TRUTH, 1000), models)

    def loss(model_scores):
        return sum(
            table[i, j] * np.log1p(10 ** ((model_scores[j] - model_scores[i]) / 400))
            for i in range(3)
            for j in range(3)
        )

    direct = scipy.optimize.minimize(
        loss,
        np.zeros(3),
        method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-12, "maxiter": 20_000},
    ).x
    assert scores(table) == pytest.approx(direct - direct.mean(), abs=0.1)


def test_the_score_difference_of_two_models_is_the_logit_of_the_win_rate():
    # Odds of 10 to 1 are 400 points.
    assert np.diff(scores(np.array([[0, 1], [10, 0]])))[0] == pytest.approx(400)
    assert scores(np.array([[0, 5], [5, 0]])) == pytest.approx([0, 0])


def test_a_tie_is_half_a_win_for_each():
    assert np.array_equal(
        win_counts([Vote("a", "b", 0.5), Vote("b", "a", 1.0)], ["a", "b"]), [[0, 0.5], [1.5, 0]]
    )


def test_a_lopsided_table_is_fitted_too():
    table = np.array([[0, 1, 0.5], [999, 0, 1], [0, 5000, 0]])
    model_scores = scores(table)
    chance = 1 / (1 + 10 ** ((model_scores[None] - model_scores[:, None]) / 400))
    # Each model's expected number of wins equals its actual number.
    assert table.sum(1) == pytest.approx((((table + table.T) * chance).sum(1)), rel=1e-6)


def test_standings_are_best_first_and_their_intervals_contain_the_truth():
    found = standings(drawn_votes(TRUTH, 2000), draws=200)
    assert list(found) == ["free", "clip", "unguided"]
    mean = np.mean(list(TRUTH.values()))
    for model, standing in found.items():
        assert (
            standing.low < TRUTH[model] * 0.9 - mean + 25
            and standing.low < standing.score < standing.high
        )
        assert standing.high - standing.low < 80
    assert sum(standing.comparisons for standing in found.values()) == 4000


def test_intervals_have_their_nominal_coverage():
    """For two models without ties, about 95% of the intervals contain the true score."""
    truth = {"a": -40.0, "b": 40.0}
    inside = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        votes = [Vote("a", "b", float(random.random() < 1 / (1 + 10**0.2))) for _ in range(200)]
        standing = standings(votes, draws=100, seed=seed)["b"]
        inside += standing.low <= truth["b"] <= standing.high
    assert 51 <= inside <= 60


def test_intervals_have_their_nominal_coverage_when_raters_agree_on_pictures():
    """Two equal models and five raters for each pair, who nearly always agree.

    Five such votes are less informative than five independent ones.
    """
    inside = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        pairs = random.random(100) < 0.5
        votes = [
            Vote("a", "b", float(pair ^ (random.random() < 0.1)), str(n))
            for n, pair in enumerate(pairs)
            for _ in range(5)
        ]
        standing = standings(votes, draws=100, seed=seed)["b"]
        inside += standing.low <= 0 <= standing.high
    assert 51 <= inside <= 60


def test_an_interval_is_unbounded_if_the_votes_set_no_bound():
    """With 99 wins to 1, more than a third of the resampled sets of votes have no loss.

    The upper end of the winner's interval is therefore infinite.
    """
    votes = [Vote("a", "b", 1.0)] * 99 + [Vote("b", "a", 1.0)]
    found = standings(votes)
    assert (
        found["a"].score == pytest.approx(200 * np.log10(99))
        and found["a"].high == np.inf
        and 200 < found["a"].low < found["a"].score
    )
    assert found["b"].low == -np.inf and found["b"].high == pytest.approx(-found["a"].low)
    beside = standings([*votes, *[Vote("b", "c", won) for won in (1.0, 0.0) for _ in range(50)]])
    assert beside["a"].high == np.inf and np.isfinite([beside["c"].low, beside["c"].high]).all()
    counted = figures(Ballot({"photorealism": votes}))
    [scores_] = counted["questions"].values()
    assert scores_["scores"]["a"]["high"] is None and "inf]" in text(counted)


def test_votes_that_determine_no_scores_are_refused_with_the_models_name():
    with pytest.raises(EloError, match="b has never won"):
        standings([Vote("a", "b", 1.0), Vote("a", "c", 1.0), Vote("c", "a", 1.0)])
    with pytest.raises(EloError, match="both groups"):
        scores(np.array([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0.0]]))
    with pytest.raises(EloError, match="fewer than two"):
        standings([])
