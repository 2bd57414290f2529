"""The cascade end to end on tiny models, and its weights files."""

import numpy as np
import pytest
import torch
from helpers.tiny import random_model, tiny
from PIL import Image
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


# -- arguments -------------------------------------------------------------------------------------


def test_prompts_and_seeds_may_be_one_or_several_and_of_numpy_and_torch(cascade):
    small = Cascade(cascade.base)
    expected = small.generate(["a dog"] * 3, [0, 1, 2], QUICK)
    for seeds in (np.arange(3), (np.int64(n) for n in range(3)), torch.arange(3), range(3)):
        assert np.array_equal(small.generate("a dog", seeds, QUICK), expected)
    for seed in (2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), [2]):
        assert np.array_equal(small.generate("a dog", seed, QUICK), expected[2:])
    both = small.generate(("a dog", "a cat"), 2, QUICK)
    assert np.array_equal(both[0], expected[2]) and not np.array_equal(both[0], both[1])
    assert small.generate([], [], QUICK) == [] and small.generate([], 3, QUICK) == []


@pytest.mark.parametrize(
    "prompts, seeds, param",
    [
        ("a dog", 0.5, "seeds"),
        ("a dog", [0, 1.0], "seeds"),
        ("a dog", None, "seeds"),
        ("a dog", np.zeros((2, 2), int), "seeds"),
        ("a dog", -1, "seed"),
        ("a dog", [0, 2**63], "seed"),
        (["a dog"], [0, 1], "seeds"),
        (["a dog", "a cat"], [0], "seeds"),
        (["a dog"], [], "seeds"),
        ([b"a dog"], [0], "prompts"),
        (None, [0], "prompts"),
        ([7], 0, "prompts"),
        ("caf\udce9", 0, "prompts"),
    ],
)
def test_prompts_and_seeds_without_one_meaning_are_refused_by_name(cascade, prompts, seeds, param):
    with pytest.raises(ValueError) as refusal:
        cascade.generate(prompts, seeds, QUICK)
    assert type(refusal.value) is RequestError and refusal.value.param == param
    assert param.rstrip("s") in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options, param",
    [
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -5.0}, "guidance_scale"),
        ({"guidance_scale": 1e6}, "guidance_scale"),
        ({"upsampler_guidance_scale": float("inf")}, "upsampler_guidance_scale"),
        ({"guidance_interval": (1, 0)}, "guidance_interval"),
        ({"sampler": "euler"}, "sampler"),
        ({"upsampler_sampler": "euler"}, "upsampler_sampler"),
        ({"steps": 1001}, "steps"),
        ({"upsampler_steps": 0}, "upsampler_steps"),
        ({"clip_scale": 1.0}, "clip_scale"),
        ({"guidance_scale": 1.0, "negative_prompt": "blue"}, "negative_prompt"),
    ],
)
def test_every_method_checks_its_options_before_the_first_step(cascade, options, param):
    image, known = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)
    asked = QUICK.model_copy(update=options)
    before = cascade.base.scheduler.steps_done
    for call in (
        lambda: cascade.generate("a dog", 0, asked),
        lambda: cascade.edit(image, known, "a dog", 0, asked),
        lambda: cascade.vary(image, "a dog", 0, 0.5, options=asked),
        lambda: cascade.scene(image, [(known, "a dog")], 0, asked),
    ):
        with pytest.raises(RequestError) as refusal:
            call()
        assert refusal.value.param == param
    assert cascade.base.scheduler.steps_done == before


def test_strength_seeds_and_names_of_edits_are_checked(cascade):
    image, known = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)
    for param, call in {
        "strength": lambda: cascade.vary(image, "a dog", 0, float("nan")),
        "seed": lambda: cascade.scene(image, [(known, "a dog")] * 2, 2**63 - 1),
        "prompt": lambda: cascade.edit(image, known, None, 0),
        "sketch": lambda: cascade.vary(image, "a dog", 0, 0.5, sketch=image[:32]),
        "known_mask": lambda: cascade.vary(image, "a dog", 0, 0.5, known[:32]),
        "best_of": lambda: cascade.best_of("a dog", []),
        "negative_prompt": lambda: cascade.enlarge(
            image[:16, :16], "a dog", 0, SampleOptions(negative_prompt="blue")
        ),
    }.items():
        with pytest.raises(RequestError) as refusal:
            call()
        assert refusal.value.param == param


def test_the_prompts_of_all_edits_are_checked_at_the_call(cascade):
    image, known = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)
    with pytest.raises(RequestError, match="at most 4"):
        cascade.scene(image, [(known, "a dog"), (known, "a (dog:9)")], 0)


def test_a_picture_is_the_same_as_array_of_any_kind_and_as_pillow_image(cascade):
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    rgb = np.stack([grey] * 3, 2)
    opaque = np.dstack([rgb, np.full_like(grey, 255)])
    half = np.zeros((64, 64), bool)
    half[:32] = True
    expected = cascade.edit(rgb, half, "a dog", 3, QUICK)
    assert np.array_equal(expected[half], rgb[half])
    for image in (
        grey,
        grey[:, :, None],
        opaque,
        rgb.astype(np.int64),
        rgb / 255,
        (grey / 255).astype(np.float32),
        *(Image.fromarray(one) for one in (grey, rgb, opaque)),
    ):
        assert np.array_equal(cascade.edit(image, half, "a dog", 3, QUICK), expected)
    alpha = Image.fromarray(np.dstack([rgb, half * np.uint8(255)]))
    for mask in (
        half.astype(np.uint8),
        half * np.uint8(255),
        half.astype(float),
        half[:, :, None],
        Image.fromarray(half),
        Image.fromarray(half * np.uint8(255)),
        alpha,
    ):
        assert np.array_equal(cascade.edit(rgb, mask, "a dog", 3, QUICK), expected)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((64, 64, 3), 1.5), "from 1.5 to 1.5"),
        (np.full((64, 64, 3), -1.0), "from -1 to -1"),
        (np.full((64, 64, 3), np.nan), "from nan to nan"),
        (np.full((64, 64, 3), 256), "from 256 to 256"),
        (np.zeros((64, 64, 3), bool), "given: bool"),
        (np.zeros((64, 64, 2), np.uint8), r"given: \[64, 64, 2\]"),
        (np.zeros((3, 64, 64), np.uint8), r"given: \[3, 64, 64\]"),
        (np.zeros((0, 64, 3), np.uint8), r"\[0, 64, 3\]"),
        ("picture.png", "given: <U11"),
        (Image.new("F", (64, 64)), "32 bits"),
        (Image.new("RGB", (32, 64)), "must be 64x64 pixels .given: 32x64 and 64x64"),
    ],
)
def test_an_image_without_one_meaning_is_refused_by_name(cascade, image, message):
    with pytest.raises(RequestError, match=message) as refusal:
        cascade.edit(image, np.zeros((64, 64), bool), "a dog", 0, QUICK)
    assert refusal.value.param == "image" and "image" in str(refusal.value)


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.full((64, 64), 128, np.uint8), "choose a limit, as in known_mask > 127"),
        (np.full((64, 64), 0.5), "choose a limit"),
        (np.full((64, 64), np.nan), "choose a limit"),
        (np.zeros((64, 64, 3), np.uint8), r"given: \[64, 64, 3\]"),
        (Image.new("RGB", (64, 64)), "no transparent and no white"),
    ],
)
def test_a_mask_without_one_meaning_is_refused_by_name(cascade, mask, message):
    with pytest.raises(RequestError, match=message) as refusal:
        cascade.edit(np.zeros((64, 64, 3), np.uint8), mask, "a dog", 0, QUICK)
    assert refusal.value.param == "known_mask" and "known_mask" in str(refusal.value)


def test_scores_need_a_prompt_for_each_image(tiny_weights):
    judged = Cascade.load(tiny_weights["base"], clip=tiny_weights["clip"])
    images = torch.zeros(2, 3, 16, 16)
    assert len(judged.score(images, ["a dog", "a cat"])) == 2
    for prompts in ("ab", ["a dog"]):
        with pytest.raises(RequestError, match="one for each of the 2 images"):
            judged.score(images, prompts)
    with pytest.raises(RequestError, match="seeds is empty"):
        judged.best_of("a dog", [])
    assert judged.best_of("a dog", np.arange(2), QUICK).seed in (0, 1)


def test_an_unknown_precision_name_or_width_is_refused_while_loading(tiny_weights):
    for arguments, message in (
        ({"precision": "fp8"}, "no precision 'fp8'; did you mean 'fp"),
        ({"max_in_flight": 0}, "max_in_flight must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Cascade.load(tiny_weights["base"], **arguments)
    with pytest.raises(ValueError, match="no weights file emojii.*did you mean 'emoji'"):
        Cascade.load("emojii")


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
    (tmp_path / "page.safetensors").write_text("<!doctype html>Not found")
    refuse(tmp_path / "page.safetensors", "is a web page and no weights.*download it again")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "pointer.safetensors").write_text(pointer)
    refuse(tmp_path / "pointer.safetensors", "is a pointer of Git LFS.*git lfs pull")
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
    quantised = {
        name: (100 * one).to(torch.int8) if "qkv.weight" in name else one
        for name, one in state.items()
    }
    save_weights(tmp_path / "int8.safetensors", quantised, config)
    refuse(tmp_path / "int8.safetensors", "qkv.weight in int8: it is quantised; give the weights")
    save_weights(tmp_path / "more.safetensors", state | {"surprise": torch.zeros(1)}, config)
    refuse(tmp_path / "more.safetensors", "'surprise'")


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "base.pt")
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_config(tmp_path / "base.pt")
