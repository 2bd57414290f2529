"""The miniature experiment: all stages of the paper with tiny models, and its conclusions."""

import json

import numpy as np
import pytest
import torch
from helpers.drawings import drawn_samples
from helpers.tiny import TINY_CLIP, random_model

from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.data.shards import Sample, write_shards
from glide_ray.data.sources import find_parts, read_part
from glide_ray.evaluation import metrics
from glide_ray.evaluation.metrics import Moments
from glide_ray.experiments.miniature import findings, models, pictures, run, sheets
from glide_ray.experiments.miniature.findings import Gain
from glide_ray.experiments.miniature.pictures import (
    CLASSIFIER_FREE,
    CLIP_GUIDED,
    CLIPS,
    GUIDED,
    SETS,
    SMALLS,
    UNGUIDED,
    SetFeatures,
)
from glide_ray.models.weights import build_model, load_model, save_weights
from glide_ray.tensors import Conditioning

# The architecture of the shipped model, with few channels.
THIN = [
    "model.unet.channels=16",
    "model.unet.multipliers=1,2",
    "model.unet.groups=8",
    "model.unet.head_channels=16",
    "model.unet.text.width=16",
    "model.unet.text.layers=1",
    "model.unet.text.heads=1",
    "model.sampling.respacing=2",
]
BORDER = {
    "border_gain": 0.02,
    "gain_standard_error": 0.005,
    "border_explicit": 0.05,
    "border_implicit": 0.07,
}


def parameters(preset):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(preset.model).parameters())


# -- the models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_each_model_has_a_preset_with_its_size_and_its_corpus(name, tmp_path):
    preset = models.preset(name, tmp_path)
    assert preset.model.image_size == models.SIDE
    assert preset.data.corpus == str(
        tmp_path / "corpus" / ("nobody" if name == models.FILTERED else "everyone")
    )
    assert preset.data.held_out == str(tmp_path / "corpus" / "held_out")


def test_the_small_model_has_a_tenth_of_the_parameters_of_the_large_one(tmp_path):
    small, large = models.preset(models.SMALL, tmp_path), presets.get("emoji-base")
    assert 8 < parameters(large) / parameters(small) < 12
    same = {"multipliers", "blocks", "patch", "prediction", "inpaint", "attention_sizes"}
    assert small.model.unet.model_dump(include=same) == large.model.unet.model_dump(include=same)


def test_the_two_clips_differ_only_in_training_on_noised_images(tmp_path):
    clip, judge = (models.preset(name, tmp_path).model.clip for name in (models.CLIP, models.JUDGE))
    assert clip.noised and not judge.noised and clip == judge.model_copy(update={"noised": True})


def test_a_stripped_model_equals_the_inpainting_model_without_known_pixels(thin_weights, tmp_path):
    models.strip(thin_weights, tmp_path / "stripped.safetensors")
    (one, inpainting), (other, stripped) = (
        load_model(path) for path in (thin_weights, tmp_path / "stripped.safetensors")
    )
    assert inpainting.inpaint and not stripped.inpaint
    x, timestep = torch.randn(2, 3, 64, 64), torch.tensor([10, 900])
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    condition = Conditioning(tokens, torch.zeros(2, 32, dtype=torch.bool))
    outputs = [
        model(x, timestep, condition, model.encode_text(condition.tokens, condition.mask))
        for model in (one, other)
    ]
    assert torch.allclose(outputs[0].eps, outputs[1].eps, atol=1e-5)


def test_pictures_are_shrunk_and_people_are_dropped_also_from_scenes(corpus, tmp_path):
    models.shrink(corpus, tmp_path)
    everyone, nobody, held_out = (
        list(rows(tmp_path / "corpus" / name)) for name in ("everyone", "nobody", "held_out")
    )
    assert {pictures.decode(sample.image).size for sample in everyone + held_out} == {(64, 64)}
    assert len(held_out) == 40
    people = [sample for sample in everyone if "1f600" in str(sample.meta)]
    # Two people, and a scene that shows one beside a dog.
    assert len(people) == 3 and len(nobody) == len(everyone) - 3
    assert not [sample for sample in nobody if "1f600" in str(sample.meta)]


# -- conclusions -----------------------------------------------------------------------------------


def test_a_gain_counts_if_it_is_two_standard_errors_from_zero():
    assert Gain(0.3, 0.1).up and not Gain(0.3, 0.1).down and Gain(-0.3, 0.1).down
    assert not Gain(0.19, 0.1).up and not Gain(-0.19, 0.1).down
    differences = np.random.default_rng(0).normal(1, 2, 400)
    gain = Gain.of(differences)
    assert abs(gain.mean - 1) < 3 * gain.error and gain.error == pytest.approx(0.1, rel=0.1)


def test_the_distance_is_frechets_for_more_and_for_fewer_rows_than_features():
    draws = np.random.default_rng(0)
    for rows, width in ((300, 8), (20, 50)):
        generated, real = draws.normal(size=(rows, width)), draws.normal(1, 2, (rows + 5, width))
        expected = metrics.frechet_distance(Moments.of(generated), Moments.of(real))
        assert findings.frechet(generated, real) == pytest.approx(expected, rel=1e-6)


def test_bootstrap_resamples_take_the_same_rows_of_every_set():
    draws = np.random.default_rng(0)
    generated, real = draws.normal(size=(30, 4)), draws.normal(size=(40, 4))
    distances = findings._bootstrap_distances([generated, generated], real)
    assert (
        distances.shape == (2, findings.DRAWS)
        and (distances[0] == distances[1]).all()
        and distances[0].std() > 0
    )


def set_features(rows, towards=0.0, spread=1.0, looks=None, seed=0):
    """Features of pictures whose CLIP embeddings lean `towards` those of their captions.

    `spread`: standard deviation of the image features. `looks`: image features to use instead.
    """
    draws = np.random.default_rng(seed)
    words = unit(np.random.default_rng(99).normal(size=(rows, 8)))
    clip = unit(unit(draws.normal(size=(rows, 8))) + towards * words)
    classes = np.full((rows, 5), 0.2)
    return SetFeatures(
        clip, words, draws.normal(0, spread, (rows, 6)) if looks is None else looks, classes
    )


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_votes_prefer_the_picture_nearer_to_real_pictures():
    draws = np.random.default_rng(2)
    real = set_features(60, looks=draws.normal(size=(60, 40)))
    sets = {
        name: set_features(60, looks=real.looks + draws.normal(0, noise, real.looks.shape))
        for name, noise in ((UNGUIDED, 2.6), (CLIP_GUIDED, 1.8), (GUIDED, 1.3))
    }
    votes = findings.votes_of(sets, real, real)
    assert {question: len(question_votes) for question, question_votes in votes.items()} == {
        "photorealism": 180,
        "caption similarity": 180,
    }
    assert all(
        findings._preferred(question, question_votes).holds
        for question, question_votes in votes.items()
    )
    assert list(findings.standings(votes)["photorealism"]) == [GUIDED, CLIP_GUIDED, UNGUIDED]
    swapped = {UNGUIDED: sets[GUIDED], CLIP_GUIDED: sets[CLIP_GUIDED], GUIDED: sets[UNGUIDED]}
    assert not any(
        findings._preferred(question, question_votes).holds
        for question, question_votes in findings.votes_of(swapped, real, real).items()
    )


def test_an_order_by_chance_is_not_a_preference():
    real = set_features(60, seed=1)
    sets = {
        name: set_features(60, seed=n) for n, name in enumerate((UNGUIDED, CLIP_GUIDED, GUIDED), 5)
    }
    assert not any(
        findings._preferred(question, question_votes).holds
        for question, question_votes in findings.votes_of(sets, real, real).items()
    )


def figures_of(sign):
    """Sets that agree with the paper's findings (`sign` 1) or contradict them (-1)."""
    real = set_features(200, seed=1)
    towards = dict(zip(CLASSIFIER_FREE, (0.0, 0.1, 0.3, 0.6, 0.8)[::sign], strict=True))
    spread = dict(
        zip(
            CLASSIFIER_FREE,
            (1.4, 1.0, 0.75, 0.5, 0.3) if sign > 0 else (0.3, 2.5, 1.0, 1.6, 2.0),
            strict=True,
        )
    )
    sets = {
        name: set_features(200, towards[name], spread[name], seed=n)
        for n, name in enumerate(CLASSIFIER_FREE, 10)
    }
    sets |= {name: set_features(200, 2.0 if sign > 0 else -0.5, seed=20) for name in CLIPS}
    sets |= {
        name: set_features(200, 0.6 if (name == f"small-{GUIDED}") == (sign > 0) else -0.5, seed=30)
        for name in SMALLS
    }
    border = BORDER if sign > 0 else {**BORDER, "border_gain": 0.009}
    return sets, real, {"images": 64, "ddim": border, "ancestral": BORDER}


def test_findings_hold_for_figures_like_the_papers_and_fail_for_the_opposite(
    monkeypatch,
):
    monkeypatch.setattr(findings, "DRAWS", 30)
    as_in_paper, opposite = (
        findings.findings(*figures_of(sign)[:2], {}, figures_of(sign)[2]) for sign in (1, -1)
    )
    assert len(as_in_paper) == 6 and all(finding.measured for finding in as_in_paper)
    assert [finding.holds for finding in as_in_paper] == [True] * 6, [
        finding.measured for finding in as_in_paper
    ]
    assert [finding.holds for finding in opposite] == [False] * 6, [
        finding.measured for finding in opposite
    ]


# -- whole experiment ------------------------------------------------------------------------------


def rows(folder):
    return (sample for part in find_parts(folder) for sample in read_part(part))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Drawings in the folders of the emoji corpus, with two people and a scene that shows one."""
    folder = tmp_path_factory.mktemp("emoji")
    drawings = list(drawn_samples(96))
    dog, person = (
        {"emoji": "1f436", "group": "Animals & Nature"},
        {"emoji": "1f600", "group": "People & Body"},
    )
    train = [
        Sample(sample.key, sample.image, sample.suffix, sample.captions, person if n < 2 else dog)
        for n, sample in enumerate(drawings)
    ]
    scenes = [
        Sample(
            f"scene-{n}",
            sample.image,
            sample.suffix,
            sample.captions,
            {**dog, "objects": [dog, person if n == kept else dog]},
        )
        for kept in [
            next(
                n
                for n in range(96)
                if models.in_share(f"scene-{n}", 0, 0, models.VARIANTS["scenes"])
            )
        ]
        for n, sample in enumerate(drawings)
    ]
    for name, samples in (
        ("train", train),
        ("tones", train[2:3]),
        ("scenes", scenes),
        ("held_out_pairs", train[-40:]),
    ):
        write_shards(folder / name, samples)
    return folder


@pytest.fixture(scope="module")
def thin_weights(tmp_path_factory):
    config = override(presets.get("emoji-base"), THIN).model
    path = tmp_path_factory.mktemp("thin") / "base.safetensors"
    save_weights(path, random_model(config.unet).state_dict(), config)
    return path


@pytest.fixture
def reduced_experiment(monkeypatch, thin_weights):
    """Reduce the experiment to a few pictures of two sampling steps and two training steps."""
    steps = ["steps=2", "batch=8", "held_out_images=8", "precision=fp32"]
    tiny = {
        name: models.Model(
            model.preset,
            [*model.settings, *(TINY_CLIP[2:] if "clip" in model.preset else THIN), *steps],
            model.corpus,
        )
        for name, model in models.MODELS.items()
    }
    monkeypatch.setattr(models, "MODELS", tiny)
    monkeypatch.setattr(models.shipped, "locate", lambda name, role: thin_weights)
    monkeypatch.setattr(pictures, "SAMPLING", pictures.SAMPLING.model_copy(update={"steps": "2"}))
    two = {
        name: pictures.SetSampling(way.model, way.options.model_copy(update={"steps": "2"}))
        for name, way in SETS.items()
    }
    monkeypatch.setattr(run, "SETS", two)
    for module, name, value in (
        (run, "IMAGES", 12),
        (run, "HOLES", 4),
        (sheets, "HOLES", 2),
        (sheets, "TRIES", 2),
        (findings, "DRAWS", 5),
    ):
        monkeypatch.setattr(module, name, value)


def test_all_stages_run_once(corpus, tmp_path, reduced_experiment, monkeypatch, caplog):
    caplog.set_level("INFO", "glide_ray")
    found = run.run(tmp_path, corpus)
    assert len(found) == 8
    assert json.loads((tmp_path / run.FINDINGS).read_text()) == [
        {"text": finding.text, "here": finding.measured, "holds": finding.holds}
        for finding in found
    ]
    figures = json.loads((tmp_path / run.FIGURES).read_text())
    assert set(figures["sets"]) == set(SETS) and set(figures["elo"]) <= {
        "photorealism",
        "caption similarity",
    }
    for sheet in ("figure-6.png", "figure-9.png", "figure-11.png", "sets.png"):
        assert (tmp_path / sheet).stat().st_size > 1000
    page = (tmp_path / run.PAGE).read_text()
    assert all(finding.text.partition(" (")[0] in page for finding in found)
    assert sum(
        "pictures" in line and line.partition(":")[0] in SETS for line in caplog.messages
    ) == len(SETS)

    def fail_if_called(*_, **__):
        raise AssertionError("was done before")

    monkeypatch.setattr(run, "bench_inpainting", fail_if_called)
    monkeypatch.setattr(models, "write_shards", fail_if_called)
    caplog.clear()
    assert run.run(tmp_path, corpus) == found
    assert not [line for line in caplog.messages if line.partition(":")[0] in SETS]
