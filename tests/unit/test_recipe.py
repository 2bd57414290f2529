"""Recipes in PNG files, and the commands for them: generate, edit, vary, scene, reproduce."""

import json
import shutil

import numpy as np
import pytest
from helpers.tiny import picture_options
from PIL import Image, ImageDraw

from glide_ray.cli.main import main
from glide_ray.config.sampling import SampleOptions
from glide_ray.data.images import encode
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.checks import RequestError
from glide_ray.sampling.prompt import plain_text
from glide_ray.sampling.recipe import (
    ModelSet,
    Recipe,
    RecipeError,
    read_recipe,
    save_picture,
)
from glide_ray.sampling.reproduction import reproduce_picture


@pytest.fixture
def weights(tiny_weights):
    return picture_options(tiny_weights, steps=3)


@pytest.fixture
def files(tmp_path):
    """A folder with a picture, two masks with holes, and a sketch."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "image.png"
    )
    for name, box in (("mask", (16, 16, 48, 48)), ("other", (0, 0, 20, 64))):
        mask = Image.new("LA", (64, 64), (0, 255))
        mask.paste((0, 0), box)
        mask.save(tmp_path / f"{name}.png")
    strokes = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(strokes).line((16, 16, 48, 48), fill=(250, 10, 10, 255), width=9)
    strokes.save(tmp_path / "sketch.png")
    return tmp_path


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def same_again(path, capsys):
    """Check that `glide reproduce` makes the same picture and says so; returns its output."""
    capsys.readouterr()
    again = path.with_stem(f"{path.stem}-again")
    run("reproduce", path, "--out", again)
    printed = capsys.readouterr().out
    assert f"the same as {path}, to the last 8-bit value" in printed
    assert (
        np.array_equal(pixels(again), pixels(path))
        and read_recipe(again)[0] == read_recipe(path)[0]
    )
    return printed


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sampler", "dpm++", "--guidance-scale", "5"],
        ["--sampler", "plms", "--guidance-interval", "0.2", "0.8"],
        ["--no-upsampler"],
    ],
)
def test_a_generated_picture_is_reproducible_from_its_file_alone(
    tmp_path, weights, capsys, options
):
    run("generate", "a naïve 🍎", "--seed", 9, "--out", tmp_path / "a.png", *weights, *options)
    printed = same_again(tmp_path / "a.png", capsys)
    assert "generate 'a naïve 🍎', seed 9" in printed


def test_a_recipe_records_every_option_with_its_value(tmp_path, tiny_weights):
    run(
        "generate",
        "x",
        "--out",
        tmp_path / "a.png",
        "--base",
        tiny_weights["base"],
        "--upsampler",
        tiny_weights["upsampler"],
    )
    recipe, inputs, _ = read_recipe(tmp_path / "a.png")
    assert recipe.options == SampleOptions(
        sampler="ancestral",
        steps="50",
        guidance_scale=2.0,
        upsampler_sampler="ancestral",
        upsampler_steps="10,10,3,2,2",
        upsampler_guidance_scale=1.0,
    )
    assert (
        recipe.models["base"].name == "nano-base"
        and len(recipe.models["base"].sha256) == 64
        and set(recipe.models) == {"base", "upsampler"}
    )
    assert recipe.precision == "fp32" and "torch" in recipe.made_with and not inputs


def test_a_recipe_of_version_0_1_has_its_noise_and_a_prompt_of_ordinary_characters(
    tmp_path, tiny_weights
):
    run("generate", "a clock", "--out", tmp_path / "a.png", "--base", tiny_weights["base"])
    tree = json.loads(read_recipe(tmp_path / "a.png")[0].model_dump_json())
    del tree["options"]["noise_scheme"]
    old = Recipe.model_validate(tree | {"prompt": "a clock (12:30)"})
    assert old.options.noise_scheme == 1 and plain_text(old.prompt) == "a clock (12:30)"
    assert Recipe.model_validate_json(old.model_dump_json()) == old


def test_a_recipe_of_version_0_1_may_begin_at_any_timestep(tiny_weights):
    """Also where later versions refuse to: `ddim5` begins at timestep 800 of 1000."""
    cascade = Cascade.load(tiny_weights["base"])
    options = SampleOptions(steps="ddim5")
    with pytest.raises(RequestError, match="begins at timestep 800"):
        cascade.generate("a dog", 0, options)
    old = options.model_copy(update={"noise_scheme": 1})
    assert cascade.generate("a dog", 0, old)[0].shape == (16, 16, 3)


def test_the_recipe_of_an_edit_contains_its_image_and_mask(files, weights, capsys):
    run(
        "edit",
        "a dog",
        "--image",
        files / "image.png",
        "--mask",
        files / "mask.png",
        "--out",
        files / "e.png",
        *weights,
    )
    (files / "image.png").unlink()
    (files / "mask.png").unlink()
    same_again(files / "e.png", capsys)


def test_a_variation_respects_its_mask_and_starts_from_its_sketch(files, weights, capsys):
    for name, options in (
        ("plain", []),
        ("sketched", ["--sketch", files / "sketch.png"]),
        ("near", ["--strength", "0.34"]),
    ):
        run(
            "vary",
            "a house",
            "--image",
            files / "image.png",
            "--mask",
            files / "mask.png",
            "--out",
            files / f"{name}.png",
            *weights,
            *options,
        )
        changed = (pixels(files / f"{name}.png") != pixels(files / "image.png")).any(-1)
        assert (
            not changed[:16].any()
            and not changed[:, 48:].any()
            and changed[16:48, 16:48].mean() > 0.5
        )
        same_again(files / f"{name}.png", capsys)
    assert not np.array_equal(pixels(files / "plain.png"), pixels(files / "sketched.png"))
    run("vary", "a house", "--image", files / "image.png", "--out", files / "all.png", *weights)
    same_again(files / "all.png", capsys)


def test_a_scene_is_a_chain_of_edits_and_each_is_reproducible(files, weights, capsys):
    run(
        "scene",
        "a room",
        "--edit",
        files / "mask.png",
        "a dog",
        "--edit",
        files / "other.png",
        "a lamp",
        "--seed",
        4,
        "--out",
        files / "s.png",
        *weights,
    )
    first, second, third = (pixels(files / f"s-{n}.png") for n in range(3))
    assert np.array_equal(first[:, 48:], second[:, 48:]) and np.array_equal(
        second[:, 20:], third[:, 20:]
    )
    assert (first[16:48, 16:48] != second[16:48, 16:48]).any() and (
        second[:, :20] != third[:, :20]
    ).any()
    assert [read_recipe(files / f"s-{n}.png")[0].seed for n in range(3)] == [4, 5, 6]
    for n in range(3):
        same_again(files / f"s-{n}.png", capsys)
    run(
        "scene",
        "--image",
        files / "image.png",
        "--edit",
        files / "mask.png",
        "a dog",
        "--out",
        files / "t.png",
        *weights,
    )
    assert not (files / "t-0.png").exists() and np.array_equal(
        pixels(files / "t-1.png")[:16], pixels(files / "image.png")[:16]
    )


def test_the_recipe_records_clip_guidance_and_best_of(tmp_path, tiny_weights, weights, capsys):
    run(
        "generate",
        "a red circle",
        "-n",
        2,
        "--best-of",
        3,
        "--clip",
        tiny_weights["clip"],
        "--clip-scale",
        2,
        "--out",
        tmp_path / "b.png",
        *weights,
    )
    assert "best of 3: CLIP score" in capsys.readouterr().out
    seeds = [read_recipe(tmp_path / f"b-{n}.png")[0].seed for n in range(2)]
    assert seeds[0] in range(3) and seeds[1] in range(3, 6)
    assert read_recipe(tmp_path / "b-0.png")[0].models["clip"].name == "nano-clip"
    same_again(tmp_path / "b-1.png", capsys)


def test_reproduce_refuses_pictures_from_other_weights_or_without_a_recipe(
    files, weights, tiny_weights, capsys
):
    moved = files / "moved.safetensors"
    shutil.copy(tiny_weights["base"], moved)
    run("generate", "x", "--no-upsampler", "--out", files / "a.png", *weights, "--base", moved)
    moved.rename(files / "elsewhere.safetensors")
    Image.fromarray(pixels(files / "a.png")).save(files / "saved-since.png")
    for arguments, message in (
        ([files / "a.png"], "The base weights"),
        ([files / "saved-since.png"], "carries no recipe"),
        (
            [files / "a.png", "--base", tiny_weights["upsampler"]],
            "is not the file that made this picture",
        ),
        ([files / "nothing.png"], "no file"),
        ([files / "elsewhere.safetensors"], "not an image"),
    ):
        capsys.readouterr()
        assert main(["reproduce", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert (
            printed.err.startswith("glide: ")
            and printed.err.count("\n") == 1
            and message in printed.err
            and not printed.out
        )
    run("reproduce", files / "a.png", "--base", files / "elsewhere.safetensors")


def test_reproduce_reports_how_a_changed_picture_differs(tmp_path, tiny_weights, capsys):
    cascade = Cascade.load(tiny_weights["base"])
    options = SampleOptions(steps=2)
    recipe = ModelSet.of(cascade).recipe("generate", "x", 0, options)
    image = cascade.generate(["x"], [0], options)[0].copy()
    image[0, 0, 0] ^= 4
    save_picture(image, tmp_path / "a.png", recipe)
    run("reproduce", tmp_path / "a.png")
    assert (
        "differs from" in (printed := capsys.readouterr().out)
        and "by up to 4 of 255, in 0.13%" in printed
    )
    save_picture(np.zeros((8, 8, 3), np.uint8), tmp_path / "b.png", recipe)
    run("reproduce", tmp_path / "b.png")
    assert "has been resized since: it is 8x8 and was made at 16x16" in capsys.readouterr().out


def test_a_broken_recipe_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(
        encode(np.zeros((4, 4, 3), np.uint8), text={"glide_ray": '{"task": "conquer"}'})
    )
    with pytest.raises(RecipeError, match="recipe that this version does not read"):
        read_recipe(tmp_path / "a.png")


def test_reproduce_names_the_inputs_that_a_program_has_dropped(files, weights, capsys):
    common = ["--image", files / "image.png", "--mask", files / "mask.png", *weights]
    run("edit", "a dog", "--out", files / "e.png", *common)
    run("vary", "a dog", "--sketch", files / "sketch.png", "--out", files / "v.png", *common)
    for name, dropped, missing in (
        ("e.png", ["image"], "lacks the image of its edit"),
        ("e.png", ["image", "mask"], "lacks the image and the mask of its edit"),
        ("v.png", ["mask", "sketch"], "lacks the mask and the sketch of its vary"),
    ):
        picture = Image.open(files / name)
        kept = {
            key: value
            for key, value in picture.text.items()
            if key not in [f"glide_ray.{one}" for one in dropped]
        }
        (files / "dropped.png").write_bytes(encode(np.asarray(picture), text=kept))
        capsys.readouterr()
        assert main(["reproduce", str(files / "dropped.png")]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1 and missing in printed


def test_an_edited_photograph_that_was_resized_cannot_be_made_again(files, weights, capsys):
    for name in ("image", "mask"):
        Image.open(files / f"{name}.png").resize((150, 90)).save(files / f"{name}.png")
    inputs = ["--image", files / "image.png", "--mask", files / "mask.png"]
    run("edit", "a dog", *inputs, "--out", files / "e.png", *weights)
    picture = Image.open(files / "e.png")
    assert picture.size == (150, 90)
    smaller = np.asarray(picture.resize((75, 45)))
    (files / "small.png").write_bytes(encode(smaller, text=picture.text))
    capsys.readouterr()
    assert main(["reproduce", str(files / "small.png")]) == 2
    assert "edited at 150x90 and has been resized since" in capsys.readouterr().err
    same_again(files / "e.png", capsys)


def test_a_recipe_is_reproducible_in_python(tiny_weights, tmp_path):
    cascade = Cascade.load(tiny_weights["base"], tiny_weights["upsampler"])
    options = SampleOptions(steps=2, upsampler_steps=2)
    image, known = np.full((64, 64, 3), 90, np.uint8), np.arange(64 * 64).reshape(64, 64) % 64 < 32
    edited = cascade.edit(image, known, "a dog", 3, options)
    save_picture(
        edited,
        tmp_path / "e.png",
        ModelSet.of(cascade).recipe("edit", "a dog", 3, options),
        {"image": image, "mask": known},
    )
    recipe, inputs, stored = read_recipe(tmp_path / "e.png")
    assert np.array_equal(inputs["mask"], known) and np.array_equal(stored, edited)
    assert np.array_equal(reproduce_picture(cascade, recipe, inputs), edited)
