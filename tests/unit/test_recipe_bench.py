"""The benchmark of training settings: variations train, and the error is measured correctly."""

import pytest
import torch
from helpers.tiny import TINY_BASE, tiny
from helpers.training import batch

from glide_ray.bench.recipe import TIMESTEPS, VARIATIONS, bench_recipe, x0_error
from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.train.single import SingleTrainer


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_variation_of_the_recipe_is_a_valid_preset(name):
    changed = override(presets.get("emoji-base"), VARIATIONS[name])
    assert (changed == presets.get("emoji-base")) == (name == "preset")


def test_a_fresh_model_has_the_error_of_predicting_no_noise():
    settings = tiny("base", "workers=1", "batch=4", "precision=fp32")
    first_batch, trainer = batch(0), SingleTrainer(settings)
    found = x0_error(trainer, [first_batch])
    expected = []
    for timestep in TIMESTEPS:  # with eps = 0, x_0 = x_t / sqrt(alpha_bar)
        power = trainer.schedule.alpha_bar[timestep]
        noise = torch.randn(
            first_batch.image.shape, generator=torch.Generator().manual_seed(timestep)
        )
        x0 = first_batch.image + ((1 - power) / power).sqrt() * noise
        expected.append((x0.clamp(-1, 1) - first_batch.image).square().mean().sqrt().item())
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_longer_training_gives_a_smaller_error(drawn_corpus, monkeypatch):
    small = [
        *TINY_BASE,
        "model.unet.patch=1",
        "model.unet.groups=8",
        "data.min_size=16",
        "batch=16",
        "learning_rate=5e-3",
        "data.held_out_images=16",
        "precision=fp32",
        "warmup_steps=5",
    ]
    monkeypatch.setitem(VARIATIONS, "small", small)
    short, long = (
        bench_recipe(
            str(drawn_corpus / "train"),
            str(drawn_corpus / "held_out"),
            seconds,
            1,
            ["small"],
        )
        for seconds in (0.1, 4)
    )
    assert long["recipes"]["small"]["rmse"] < 0.8 * short["recipes"]["small"]["rmse"]
