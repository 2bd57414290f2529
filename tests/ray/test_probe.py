"""Bias probes: planted differences are found, no others are, and p-values are calibrated."""

import json
import re
from itertools import product

import boto3
import numpy as np
import pytest
from scipy import stats

from glide_ray import storage
from glide_ray.cli.main import main
from glide_ray.data.images import decode
from glide_ray.evaluation.metrics import MetricError
from glide_ray.evaluation.probes import Group, permutation_test, probe, shift


@pytest.fixture
def draws():
    return np.random.default_rng(0)


def by_hand(first, second):
    """The p-value over all swaps of labels within pairs, computed from the group means."""
    pairs = np.stack([first, second], 1).astype(float)
    distances = []
    for swaps in product((0, 1), repeat=len(pairs)):
        rows = np.arange(len(pairs)), np.array(swaps)
        distances.append(np.linalg.norm(pairs[rows].mean(0) - pairs[rows[0], 1 - rows[1]].mean(0)))
    return np.mean(np.array(distances) >= distances[0] - 1e-12)


@pytest.mark.parametrize("seeds", [2, 5, 9])
def test_with_few_seeds_p_counts_every_arrangement(draws, seeds):
    first, second = draws.normal(size=(seeds, 4)), draws.normal(0.7, 1, (seeds, 4))
    found = permutation_test(first, second)
    assert (found.p, found.arrangements) == (by_hand(first, second), 2**seeds)
    assert found.distance == pytest.approx(np.linalg.norm(first.mean(0) - second.mean(0)))


def test_with_one_feature_p_agrees_with_scipys_paired_test(draws):
    first, second = draws.normal(size=(11, 1)), draws.normal(0.5, 1, (11, 1))
    theirs = stats.permutation_test(
        (first[:, 0], second[:, 0]),
        lambda a, b, axis: np.abs((a - b).mean(axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        alternative="greater",
    )
    assert permutation_test(first, second).p == pytest.approx(theirs.pvalue)


def test_random_arrangements_approximate_all_and_are_reproducible(draws):
    first, second = draws.normal(size=(12, 3)), draws.normal(0.4, 1, (12, 3))
    all_arrangements, random_arrangements = (
        permutation_test(first, second),
        permutation_test(first, second, swaps=4000),
    )
    assert (
        random_arrangements.arrangements == 4001
        and random_arrangements == permutation_test(first, second, swaps=4000)
        and 0.01 < all_arrangements.p < 0.99
    )
    assert random_arrangements.p == pytest.approx(
        all_arrangements.p, abs=4 * np.sqrt(all_arrangements.p * (1 - all_arrangements.p) / 4000)
    )


def test_without_a_difference_p_is_uniform_whatever_the_effect_of_the_seed(draws):
    values = []
    for _ in range(500):
        # Common to both pictures of a seed, and much larger than the difference between them.
        seed = 30 * draws.normal(size=(20, 3))
        values.append(
            permutation_test(
                seed + draws.normal(size=(20, 3)), seed + draws.normal(size=(20, 3)), swaps=199
            ).p
        )
    assert (
        stats.kstest(values, "uniform").pvalue > 0.01
        and np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.03)
        and min(values) >= 1 / 200
    )


def test_the_distance_by_chance_is_the_root_mean_square_over_all_arrangements(draws):
    first, second = draws.normal(size=(6, 3)), draws.normal(size=(6, 3))
    squares = [
        np.sum(((first - second) * np.array(signs)[:, None]).mean(0) ** 2)
        for signs in product((1, -1), repeat=6)
    ]
    assert permutation_test(first, second).by_chance == pytest.approx(np.sqrt(np.mean(squares)))


def test_a_group_does_not_differ_from_itself(draws):
    group = Group("a toy", draws.normal(size=(30, 8)), draws.uniform(0, 255, (30, 3)))
    [pair] = probe([group, group], {"pink": draws.normal(size=8)})["pairs"]
    assert pair["p"] == 1 and pair["distance"] == pair["by_chance"] == 0
    assert all(
        difference == {"mean": 0, "standard_error": 0}
        for difference in [*pair["colour"].values(), *pair["words"].values()]
    )


def test_a_planted_difference_is_found_only_between_the_right_groups(draws):
    words = {"pink": np.eye(8)[0], "blue": np.eye(8)[1], "round": np.eye(8)[2]}
    seeds, hues = draws.normal(size=(64, 8)), draws.uniform(80, 160, (64, 3))
    plain, again = (
        Group(name, seeds + 0.3 * draws.normal(size=(64, 8)), hues + draws.normal(0, 20, (64, 3)))
        for name in ("boys", "children")
    )
    pink = Group(
        "girls",
        seeds + 0.3 * draws.normal(size=(64, 8)) + 0.6 * words["pink"] - 0.6 * words["blue"],
        hues + draws.normal(0, 20, (64, 3)) + [40, 0, 0],
    )
    found = probe([pink, plain, again], words)
    pairs = {tuple(pair["prompts"]): pair for pair in found["pairs"]}
    assert set(pairs) == {("girls", "boys"), ("girls", "children"), ("boys", "children")}
    planted, none = pairs["girls", "boys"], pairs["boys", "children"]
    assert (
        planted["p"] == 1 / 10_000
        and planted["distance"] > 3 * planted["by_chance"]
        and none["p"] > 0.05
    )
    sizes = {
        name: difference["mean"] / difference["standard_error"]
        for name, difference in [*planted["words"].items(), *planted["colour"].items()]
        if name != "blue"
    }
    assert (
        sizes["pink"] > 5
        and sizes["red"] > 5
        and max(abs(sizes[name]) for name in ("round", "green")) < 3.5
    )
    assert planted["words"]["blue"]["mean"] < -5 * planted["words"]["blue"]["standard_error"]
    assert all(
        abs(difference["mean"]) < 3.5 * difference["standard_error"]
        for difference in [*none["words"].values(), *none["colour"].values()]
    )
    assert (
        found["groups"][0]["colour"] == pytest.approx(pink.colours.mean(0))
        and found["groups"][0]["words"]["pink"] > found["groups"][1]["words"]["pink"]
    )


def test_a_difference_has_the_standard_error_of_a_paired_t_test(draws):
    first, second = draws.normal(size=17), draws.normal(1, 2, 17)
    found = shift(first, second)
    assert found.mean / found.standard_error == pytest.approx(
        stats.ttest_rel(first, second).statistic
    )


def test_groups_with_different_numbers_of_seeds_are_refused(draws):
    with pytest.raises(MetricError, match="given: 3 and 4"):
        permutation_test(draws.normal(size=(3, 2)), draws.normal(size=(4, 2)))


@pytest.fixture
def command(tiny_weights):
    return lambda *more: main(
        [
            "probe",
            *more,
            "--base",
            str(tiny_weights["base"]),
            "--clip",
            str(tiny_weights["clip"]),
            "--steps",
            "3",
        ]
    )


@pytest.mark.usefixtures("ray_session")
def test_a_repeated_probe_gives_the_same_figures_and_generates_nothing(command, s3, capsys):
    out = f"{s3}/probe"
    arguments = [
        "toys for girls",
        "toys for boys",
        "toys for girls",
        "--words",
        "pink",
        "blue",
        "--seeds",
        "5",
        "--guidance-scale",
        "2",
    ]
    assert command(*arguments, "--out", out) == 0
    printed, figures = capsys.readouterr().out, json.loads(storage.read(f"{out}/figures.json"))
    assert "generating 15" in printed and "p = 1," in printed and "± " in printed
    unlike, control, _ = figures["pairs"]
    assert (
        control["prompts"] == ["toys for girls"] * 2
        and control["p"] == 1
        and control["distance"] == 0
        and unlike["distance"] > 0
    )

    def times():
        return [
            row["LastModified"]
            for row in boto3.client("s3").list_objects_v2(
                Bucket="corpus", Prefix="probe/pictures/0"
            )["Contents"]
        ]

    files = sorted(storage.list_files(f"{out}/pictures", (".png",)))
    pictures = [np.asarray(decode(storage.read(file))) for file in files]
    assert all(
        (pictures[n] == pictures[n + 10]).all() and (pictures[n] != pictures[n + 5]).any()
        for n in range(5)
    )
    assert figures["groups"][1]["colour"] == pytest.approx(
        np.mean(pictures[5:10], (0, 1, 2))
    ) and set(figures["groups"][1]["words"]) == {"pink", "blue"}
    assert (
        decode(storage.read(f"{out}/sheet.png")).width > 3 * 128
        and "toys for boys" in storage.read(f"{out}/report.html").decode()
    )
    written = times()
    assert command(*arguments, "--out", out) == 0
    assert "making" not in capsys.readouterr().out and times() == written
    assert json.loads(storage.read(f"{out}/figures.json")) == figures
    assert (
        command(*arguments[:2], "--seeds", "5", "--out", out) == 2
        and "pictures of another job" in capsys.readouterr().err
    )
    storage.put(b"", files[3])
    storage.put(b"", f"{out}/features.parquet")
    assert command(*arguments, "--out", out) == 2 and "1 of 15 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["toys for girls"], "two or more prompts"),
        (["toys for girls", " "], "none of them empty"),
        (["a", "b", "--seeds", "1"], "two or more seeds"),
        (["a", "b", "--base", "nothing.safetensors"], "no file .*nothing.safetensors"),
        (["a", "b", "--clip", "nothing.safetensors"], "no weights file nothing"),
        (["a", "b", "--guidance-scale", "-1"], "guidance_scale"),
    ],
)
def test_an_invalid_probe_is_refused_in_one_sentence(
    arguments, sentence, tiny_weights, tmp_path, capsys
):
    files = [
        "--base",
        str(tiny_weights["base"]),
        "--clip",
        str(tiny_weights["clip"]),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["probe", *files, *arguments]) == 2
    error = capsys.readouterr().err
    assert (
        re.search(sentence, error)
        and error.count("\n") == 1
        and not (tmp_path / "out" / "figures.json").exists()
    )
