"""The cascade end to end on tiny models, and its weights files."""

import numpy as np
import pytest
import torch
from helpers.tiny import random_model, tiny
from safetensors.torch import save_file

from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.config.sampling import SampleOptions
from glide_ray.data.masks import MaskError, random_known
from glide_ray.diffusion.samplers import SAMPLERS
from glide_ray.models.weights import (
    WeightsError,
    load_config,
    load_model,
    load_weights,
    save_weights,
)
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.checks import RequestError
from glide_ray.sampling.job import shrink_known
from glide_ray.sampling.regions import part_to_paint, paste, square_around
from glide_ray.sampling.stepper import Stepper

QUICK = SampleOptions(steps=3, upsampler_steps="2,2")


@pytest.fixture(scope="module")
def cascade(tiny_weights):
    return Cascade.load(tiny_weights["base"], tiny_weights["upsampler"])


def test_prompts_give_pictures_of_the_upsamplers_size(cascade):
    images = cascade.generate(["a red apple", "a dog"], [1, 2], QUICK)
    assert [image.shape for image in images] == [(64, 64, 3)] * 2 and images[0].dtype == np.uint8
    assert np.array_equal(cascade.generate(["a dog"], [2], QUICK)[0], images[1])


def test_without_an_upsampler_pictures_have_the_base_size(tiny_weights):
    assert Cascade.load(tiny_weights["base"]).generate(["x"], [0], QUICK)[0].shape == (16, 16, 3)


def test_progress_is_reported_for_each_stage(cascade):
    reported = []
    cascade.generate(
        ["x", "y"],
        [0, 1],
        SampleOptions(steps=2, upsampler_steps=2),
        progress=lambda *step: reported.append(step),
    )
    assert reported == [
        (stage, step, 4) for stage in ("base", "upsampler") for step in (1, 2, 3, 4)
    ]


def test_an_edit_keeps_every_known_pixel_exactly_and_paints_the_others(cascade):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    known = np.ones((64, 64), bool)
    known[10:37, 20:51] = False
    edited = cascade.edit(image, known, "a dog", 3, QUICK)
    assert np.array_equal(edited[known], image[known])
    assert (edited[~known] != image[~known]).mean() > 0.5


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_pixels_keep_their_8_bit_values_at_64_and_256_pixels(inpaint, sampler):
    steppers = []
    for kind in ("base", "upsampler"):
        config = override(
            presets.get(f"nano-{kind}"),
            [f"model.unet.inpaint={inpaint}", f"model.sampling.sampler={sampler}"],
        ).model
        steppers.append(Stepper(random_model(config.unet), config))
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    known = random_known(256, np.random.default_rng(1))
    assert 0.2 < known.mean() < 0.9
    options = SampleOptions(steps=3, upsampler_steps=2)
    edited = Cascade(*steppers).edit(image, known, "a dog", 3, options)
    assert np.array_equal(edited[known], image[known]) and not np.array_equal(
        edited[~known], image[~known]
    )
    small, small_known = shrink_known(image, known, 64)
    edited = Cascade(steppers[0]).edit(small, small_known, "a dog", 3, options)
    assert np.array_equal(edited[small_known], small[small_known])


def test_a_variation_with_minimal_strength_is_nearly_the_image(cascade):
    image = np.full((64, 64, 3), 128, np.uint8)
    small = Cascade(cascade.base)
    near, far = (
        small.vary(image[:16, :16], "a dog", 3, strength, options=SampleOptions(steps=50))
        for strength in (0.02, 1.0)
    )
    assert np.abs(near.astype(int) - 128).mean() < 0.3 * np.abs(far.astype(int) - 128).mean()


def test_a_low_resolution_pixel_is_known_only_if_all_its_pixels_are_known(cascade):
    known = np.ones((64, 64), bool)
    known[0, 0] = False
    assert shrink_known(np.zeros((64, 64, 3), np.uint8), known, 16)[1].sum() == 16 * 16 - 1


def test_an_edit_with_a_mask_of_another_size_is_refused(cascade):
    with pytest.raises(RequestError, match="64x64.*64x64 and 32x32"):
        cascade.edit(np.zeros((64, 64, 3), np.uint8), np.ones((32, 32), bool), "x", 0)


# -- pictures larger than the model's --------------------------------------------------------------


def test_a_picture_of_any_size_keeps_its_known_pixels(cascade):
    image = np.random.default_rng(0).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    known = np.ones((150, 210), bool)
    known[5:20, 190:205] = False
    edited = cascade.edit_whole(image, known, "a dog", 3, QUICK)
    assert np.array_equal(edited[known], image[known]) and edited.shape == image.shape
    assert (edited[~known] != image[~known]).mean() > 0.9
    # The square is the corner of 64 pixels, so nothing is resized.
    alone = cascade.edit(image[:64, 146:], known[:64, 146:], "a dog", 3, QUICK)
    assert np.array_equal(edited[:64, 146:], alone)
    same = cascade.edit_whole(image[:64, 146:], known[:64, 146:], "a dog", 3, QUICK)
    assert np.array_equal(same, alone)
    with pytest.raises(MaskError, match="nothing to paint"):
        cascade.edit_whole(image, np.ones((150, 210), bool), "a dog", 3, QUICK)
    with pytest.raises(RequestError, match="must have one size.*210x150 and 64x64"):
        cascade.edit_whole(image, np.zeros((64, 64), bool), "a dog", 3, QUICK)


@pytest.mark.parametrize(
    "size, hole, square",
    [
        ((300, 400), (0, 0, 10, 10), (0, 0, 64)),  # no smaller than the model
        ((300, 400), (295, 390, 5, 10), (336, 236, 64)),
        ((300, 400), (100, 150, 40, 50), (125, 70, 100)),  # twice the hole, which is in the middle
        ((300, 400), (0, 0, 300, 10), (0, 0, 300)),  # no larger than the picture, if that will do
        ((300, 400), (0, 0, 10, 400), (0, -50, 400)),  # beyond the picture
        ((40, 400), (0, 200, 10, 10), (185, 0, 40)),  # a picture lower than the model's
        ((1, 1), (0, 0, 1, 1), (0, 0, 1)),
    ],
)
def test_the_painted_square_surrounds_the_hole(size, hole, square):
    """`hole`: top, left, height, width. `square`: left, top, side."""
    known = np.ones(size, bool)
    top, left, height, width = hole
    known[top : top + height, left : left + width] = False
    assert square_around(known, 64) == square


def test_a_painted_square_is_pasted_at_its_place_and_smooth_when_it_is_enlarged():
    """A gradient that is cut, shrunk, enlarged and pasted is the same gradient, up to rounding."""
    ramp = np.broadcast_to(np.arange(250, dtype=np.uint8)[:, None, None], (250, 250, 3)).copy()
    known = np.ones((250, 250), bool)
    known[60:190, 40:230] = False
    part = part_to_paint(ramp, known, 64)
    assert part.square == (0, 0, 250) and part.image.shape == (64, 64, 3)
    pasted = paste(ramp, known, part.square, part.image).astype(int)
    assert np.abs(pasted - ramp).max() <= 2 and np.array_equal(pasted[known], ramp[known])
    wide = np.ones((100, 250), bool)
    wide[:, 20:230] = False
    part = part_to_paint(ramp[50:150], wide, 64)
    assert part.square == (20, -55, 210) and not part.known[:16].any()
    pasted = paste(ramp[50:150], wide, part.square, part.image).astype(int)
    assert np.abs(pasted[4:-4] - ramp[54:146]).max() <= 2


# -- weights ---------------------------------------------------------------------------------------


def test_a_weights_file_restores_the_model_and_its_config(tmp_path):
    config = tiny().model
    model = random_model(config.unet)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), config, step="7")
    loaded, loaded_config = load_model(tmp_path / "w.safetensors")
    assert loaded_config == config and not loaded.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_swapped_base_and_upsampler_weights_are_refused(tiny_weights):
    with pytest.raises(WeightsError, match="were the two exchanged"):
        Cascade.load(tiny_weights["upsampler"], tiny_weights["base"])


def test_missing_truncated_foreign_or_misshapen_weights_are_refused_in_one_sentence(
    tmp_path, tiny_weights
):
    def refuse(path, message):
        with pytest.raises(WeightsError, match=message) as refusal:
            load_model(path)
        assert "\n" not in str(refusal.value)

    refuse(tmp_path / "none.safetensors", "There is no weights file")
    whole = tiny_weights["base"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "cut.safetensors", "not a whole safetensors file")
    (tmp_path / "text.safetensors").write_text("hello")
    refuse(tmp_path / "text.safetensors", "not a whole safetensors file")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    refuse(tmp_path / "foreign.safetensors", "carries no glide_ray config")
    config, state = load_weights(tiny_weights["base"])
    save_weights(tmp_path / "wide.safetensors", state, tiny("base", "model.unet.channels=32").model)
    refuse(
        tmp_path / "wide.safetensors",
        r"another shape: \S+ is \[.*\] there and \[.*\] in this model",
    )
    save_weights(
        tmp_path / "less.safetensors", {name: state[name] for name in list(state)[1:]}, config
    )
    refuse(tmp_path / "less.safetensors", "has no tensor")
    save_weights(tmp_path / "more.safetensors", state | {"surprise": torch.zeros(1)}, config)
    refuse(tmp_path / "more.safetensors", "'surprise'")


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "base.pt")
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_config(tmp_path / "base.pt")
