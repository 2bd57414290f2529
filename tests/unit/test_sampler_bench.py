"""Search for sampling grids, and the benchmarks that compare samplers."""

import numpy as np
import pytest
from helpers.tiny import random_model, tiny

from glide_ray.bench.samplers import _compared, _resampled, bench_samplers
from glide_ray.cli.main import main
from glide_ray.diffusion.schedule import ScheduleError, grid, listed, make_schedule
from glide_ray.evaluation.metrics import kid
from glide_ray.models.weights import load_config, load_weights
from glide_ray.sampling.grids import (
    GridSearch,
    base_requests,
    moved,
    starting_grids,
    tune_grid,
)
from glide_ray.sampling.stepper import Stepper


@pytest.fixture(scope="module")
def search():
    config = tiny("base").model
    stepper = Stepper(random_model(config.unet), config, batched=True)
    return GridSearch.of(stepper, base_requests(config, ["a red apple", "a dog"], [0, 1]))


def test_a_tuned_grid_is_closer_to_the_ode_than_all_grids_that_it_began_with(search):
    tried = []
    respacing, distance = tune_grid(search, 4, lambda done, total: tried.append((done, total)))
    process = make_schedule("cosine")
    assert len(grid(process, respacing)) == 4
    assert distance == search.distance(respacing)
    started = [search.distance(listed(kept)) for kept in starting_grids(process, 4)]
    assert distance < min(started)
    assert tried[-1][0] == tried[-1][1] >= len(started)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_search_begins_with_different_grids_of_the_asked_length(schedule):
    process = make_schedule(schedule)
    for steps in (2, 8, 30):
        found = starting_grids(process, steps)
        assert len({listed(kept) for kept in found}) == len(found) > 3
        assert all(len(grid(process, listed(kept))) == steps for kept in found)
    with pytest.raises(ScheduleError):
        starting_grids(process, 1001)


def test_a_moved_timestep_stays_between_its_neighbours():
    kept = [0, 10, 12, 999]
    assert moved(kept, 1, 0.5, 1000) == [0, 11, 12, 999]
    assert moved(kept, 1, -0.5, 1000) == [0, 5, 12, 999]
    assert moved(kept, 0, -0.5, 1000) is None and moved(kept, 3, 0.5, 1000) is None


def test_a_tuned_grid_travels_in_the_weights_and_is_used_by_its_number(
    tmp_path, tiny_weights, capsys
):
    out = tmp_path / "tuned.safetensors"
    arguments = ["--steps", "3", "--default", "3", "--pictures", "2", "--out", str(out)]
    assert main(["tune-sampler", str(tiny_weights["base"]), *arguments]) == 0
    sampling = load_config(out).sampling
    assert sampling.sampler == "unipc" and sampling.respacing == sampling.tuned_grids[0]
    assert sampling.respacing_for(3, None) == sampling.tuned_grids[0]
    assert sampling.respacing_for(3, "ddim") == "3"
    assert sampling.respacing_for(4, "unipc") == "mixed4"
    assert sampling.respacing_for(1, "unipc") == "1"  # a server warms up by one step
    before, after = load_weights(tiny_weights["base"])[1], load_weights(out)[1]
    assert all(before[name].equal(after[name]) for name in before | after)
    assert f"3 steps: {sampling.respacing}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "3", "--default", "4"], "--default 4 is not one of --steps"),
        (["--steps", "1001"], "may have 2 to"),
        (["--prompts", "no-such.txt"], "no-such.txt"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_in_a_sentence(
    tmp_path, tiny_weights, capsys, arguments, sentence
):
    out = tmp_path / "tuned.safetensors"
    command = ["tune-sampler", str(tiny_weights["base"]), "--pictures", "1", "--out", str(out)]
    assert main([*command, *arguments]) == 2
    assert sentence in capsys.readouterr().err and not out.exists()


def test_the_benchmark_of_samplers_measures_every_setting(tiny_weights):
    found = bench_samplers(
        tiny_weights["base"], tiny_weights["upsampler"], 2, steps=(5,), upsampler_steps=(3,)
    )
    for stage, name in (("base", "5 steps"), ("upsampler", "3 steps")):
        figures = found[stage][name]
        assert figures["dpm++ even"]["to_dpm++"] == 1.0
        assert len(figures) == 8 and all(figure["rmse"] > 0 for figure in figures.values())


def test_distances_are_unbiased_and_paired_by_picture():
    """As the KID of an independent function, and a setting is at ratio 1 to itself in all draws."""
    rng = np.random.default_rng(0)
    real, near, far = rng.normal(size=(3, 60, 16))
    far = far + 0.5
    everything = [np.arange(60)]
    expected, _ = kid(real, far, subsets=1, size=60)
    assert _resampled(real, far, everything)[0] == pytest.approx(expected)
    found = _compared(real, {"a": far, "b": far, "c": near})
    assert found["b"]["ratio"] == 1.0 and found["b"]["ratio_interval"] == [1.0, 1.0]
    assert found["c"]["ratio_interval"][1] < 0.5 and found["c"]["difference_interval"][1] < 0
    # Around 0, where a ratio has no meaning, only the difference is reported
    assert "ratio" not in _compared(real, {"near": near, "far": far})["far"]
