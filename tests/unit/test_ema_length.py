"""Averages whose length is chosen after training, against the average kept during training."""

import re

import numpy as np
import pytest
import torch
from helpers.tiny import corpus_settings, tiny

from glide_ray.cli.main import main
from glide_ray.models.weights import load_weights
from glide_ray.train.checkpoint import Checkpoints
from glide_ray.train.ema import Ema, exponent
from glide_ray.train.ema_length import combination, inner_product
from glide_ray.train.partition import CheckpointReader
from glide_ray.train.without_ray import train_alone


@pytest.mark.parametrize("length, expected", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_edm2(length, expected):
    assert exponent(length) == pytest.approx(expected, abs=0.005)


def test_the_length_is_the_standard_deviation_of_the_profile():
    steps = (np.arange(100_000) + 0.5) / 100_000
    weights = steps ** exponent(0.15)
    mean = np.average(steps, weights=weights)
    assert np.average((steps - mean) ** 2, weights=weights) ** 0.5 == pytest.approx(0.15, rel=1e-3)


def test_inner_products_are_the_integrals_of_the_profiles():
    times = (np.arange(300_000) + 0.5) / 100_000  # to 3

    def profile(end, length):
        power = exponent(length)
        return np.where(times < end, (power + 1) * times**power / end ** (power + 1), 0)

    for one, other in [((3, 0.05), (3, 0.1)), ((2, 0.1), (3, 0.2)), ((3, 0.2), (1, 0.05))]:
        expected = (profile(*one) * profile(*other)).sum() / 100_000
        assert inner_product(*one, *other) == pytest.approx(expected, rel=1e-3)


def test_weights_far_from_the_end_count_as_their_profile_says():
    """Weights that grow with the step: the average of s with weights s^g is t (g + 1) / (g + 2)."""
    weight = [torch.zeros(1)]
    average = Ema(weight, (), (0.1,))
    for step in range(1, 2001):
        weight[0].fill_(step)
        average.update(step)
    power = exponent(0.1)
    expected = 2000 * (power + 1) / (power + 2)
    assert average.averages["length-0.1"][0].item() == pytest.approx(expected, rel=1e-2)


def test_kept_averages_combine_to_one_of_another_length():
    snapshots = [(step, length) for step in range(100, 1700, 100) for length in (0.05, 0.1)]
    wanted = {0.03, 0.07, 0.15, 0.2}
    weight, noise = torch.zeros(1), torch.Generator().manual_seed(0)
    ema = Ema([weight], (), (0.05, 0.1, *sorted(wanted)))
    kept = {}
    for step in range(1, 1601):
        weight += torch.randn(1, generator=noise) / 10 + 0.02
        ema.update(step)
        for length in (0.05, 0.1):
            kept[step, length] = ema.averages[f"length-{length}"][0].item()
    for length in wanted:
        factors, error = combination(snapshots, 1600, length)
        found = sum(factor * kept[one] for factor, one in zip(factors, snapshots, strict=True))
        assert error < 0.06
        assert found == pytest.approx(ema.averages[f"length-{length}"][0].item(), rel=0.01)


# -- glide export ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(drawn_corpus, tmp_path_factory):
    """A run of 24 steps that kept all its checkpoints and three averages."""
    folder = tmp_path_factory.mktemp("run")
    settings = tiny(
        "base",
        *corpus_settings(drawn_corpus),
        *("batch=8", "steps=24", "keep_last=99", "checkpoint_every=2", "evaluate_every=24"),
        *("ema_lengths=0.1,0.15,0.2", "precision=fp32"),
    )
    train_alone(settings, folder, progress=False)
    return folder


def test_export_writes_the_average_of_a_length(finished, tmp_path, capsys):
    out = tmp_path / "weights.safetensors"
    assert main(["export", str(finished), "--ema-length", "0.15", "--out", str(out)]) == 0
    assert "after step 24, average of length 0.15" in capsys.readouterr().out
    _, weights = load_weights(out)
    last = Checkpoints(finished).list_complete()[-1].path
    with CheckpointReader(type(out)(last)) as reader:
        for name, tensor in weights.items():
            assert torch.allclose(tensor, reader.full("average/length-0.15", name), atol=1e-5), name


@pytest.mark.parametrize(
    "length, sentence",
    [
        ("0.01", "error of 28%; choose a length nearer to 0.1 or"),
        ("0.5", "length 0.5 does not exist"),
    ],
)
def test_a_length_that_the_checkpoints_cannot_give_is_refused(finished, length, sentence, capsys):
    assert main(["export", str(finished), "--ema-length", length]) == 2
    assert re.search(sentence, capsys.readouterr().err)
