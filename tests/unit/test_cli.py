"""The command line: printed output, written files and error messages."""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.colours import display_p3_to_srgb, p3_profile
from helpers.paths import ROOT
from helpers.tiny import overflowing, picture_options, tiny, with_nan_for
from PIL import Image, ImageFilter, ImageOps

import glide_ray
from glide_ray.cli.main import build_parser, main
from glide_ray.config import presets
from glide_ray.data.images import encode
from glide_ray.interrupts import Terminated, exit_code, sigterm_raises
from glide_ray.models.clip import NoisedClip
from glide_ray.models.weights import save_weights
from glide_ray.sampling.cascade import Cascade

GLIDE = os.path.join(os.path.dirname(sys.executable), "glide")


@pytest.fixture
def weights(tiny_weights):
    return picture_options(tiny_weights)


def refused(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("glide: ")
        and printed.err.count("\n") == 1
        and message in printed.err
        and not printed.out
    )


def picture(path, size=(64, 64), hole=None):
    image = Image.new("RGBA", size, (10, 90, 200, 255))
    if hole:
        image.paste((0, 0, 0, 0), hole)
    image.save(path)
    return str(path)


def test_generate_writes_pictures_that_their_seeds_reproduce(tmp_path, weights, capsys):
    assert (
        main(
            [
                "generate",
                "a red apple",
                "-n",
                "2",
                "--seed",
                "4",
                "--out",
                str(tmp_path / "a.png"),
                *weights,
            ]
        )
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]
    assert "a-1.png  seed 5" in capsys.readouterr().out
    assert (
        main(
            [
                "generate",
                "a red apple",
                "--seed",
                "5",
                "--out",
                str(tmp_path / "again.png"),
                *weights,
            ]
        )
        == 0
    )
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a-1.png").read_bytes()
    assert Image.open(tmp_path / "again.png").size == (64, 64)
    assert main(["reproduce", str(tmp_path / "again.png")]) == 0
    assert "the same as" in capsys.readouterr().out


def test_generate_without_the_upsampler_stops_at_the_base_size(tmp_path, weights):
    assert (
        main(["generate", "x", "--no-upsampler", "--out", str(tmp_path / "s.png"), *weights]) == 0
    )
    assert Image.open(tmp_path / "s.png").size == (16, 16)


def test_without_out_no_picture_is_overwritten(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "x", "--no-upsampler", "--steps", "2", *weights]
    written = {}
    for more in ([], ["--seed", "5"], ["-n", "2"], []):
        assert main([*command, *more]) == 0
        assert all(path.read_bytes() == data for path, data in written.items())
        written = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert {path.name for path in written} == {
        "generate.png",
        "generate-2.png",
        "generate-3-0.png",
        "generate-3-1.png",
        "generate-4.png",
    }


def test_a_picture_that_is_not_finite_is_one_sentence_and_no_file(tmp_path, weights, capsys):
    config, path = tiny().model, tmp_path / "base.safetensors"
    arguments = ["generate", "apple", *weights, "--base", str(path), "-n", "2"]
    out = tmp_path / "made.png"
    save_weights(path, with_nan_for("apple", config), config)
    assert main([*arguments, "--out", str(out)]) == 2
    assert "glide: nano-base makes no picture, because its weights hold NaN" in (
        capsys.readouterr().err
    )
    save_weights(path, overflowing(config), config)
    assert main([*arguments, "--out", str(out), "--precision", "fp16"]) == 2
    assert "try --precision bf16 or fp32" in capsys.readouterr().err
    assert [found.name for found in tmp_path.iterdir()] == ["base.safetensors"]
    assert main([*arguments, "--out", str(out), "--precision", "fp32"]) == 0


def test_edit_keeps_the_pixels_that_are_opaque_in_the_mask(tmp_path, weights):
    image, mask = picture(tmp_path / "i.png"), picture(tmp_path / "m.png", hole=(16, 16, 48, 48))
    assert (
        main(
            [
                "edit",
                "a dog",
                "--image",
                image,
                "--mask",
                mask,
                "--out",
                str(tmp_path / "e.png"),
                *weights,
            ]
        )
        == 0
    )
    pixels = np.asarray(Image.open(tmp_path / "e.png"))
    assert (pixels[:16] == [10, 90, 200]).all() and not (
        pixels[20:44, 20:44] == [10, 90, 200]
    ).all()


def test_a_prompt_that_is_too_long_is_truncated_with_a_warning(tmp_path, weights, capsys):
    assert main(["generate", "word " * 2000, "--out", str(tmp_path / "x.png"), *weights]) == 0
    assert "longer than 128 tokens" in capsys.readouterr().err


def test_bad_input_to_an_edit_is_refused_before_anything_is_written(tmp_path, weights, capsys):
    image, out = picture(tmp_path / "i.png"), tmp_path / "e.png"
    (tmp_path / "text.png").write_text("hello")
    for mask, message in (
        (picture(tmp_path / "m.png", (32, 32), (0, 0, 9, 9)), "32x32 pixels and the image 64x64"),
        (image, "nothing to paint"),
        (str(tmp_path / "text.png"), "text.png: The file is not an image"),
        (str(tmp_path / "no.png"), "no file"),
    ):
        refused(
            capsys,
            ["edit", "x", "--image", image, "--mask", mask, "--out", str(out), *weights],
            message,
        )
    assert not out.exists()


def edited(tmp_path, weights, image, mask):
    assert (
        main(
            [
                "edit",
                "x",
                "--image",
                str(image),
                "--mask",
                str(mask),
                "--out",
                str(tmp_path / "e.png"),
                *weights,
            ]
        )
        == 0
    )
    return np.asarray(Image.open(tmp_path / "e.png").convert("RGB"))


def half_mask(path, mode="LA"):
    """Write a mask whose left half is transparent, that is, to be painted; returns its path."""
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    bands = [alpha] * (len(mode) - 1)
    Image.merge(mode, [*bands, alpha]).save(path)
    return path


def test_rgba_and_grey_alpha_masks_are_equivalent_and_an_empty_mask_repaints_everything(
    tmp_path, weights
):
    image = picture(tmp_path / "i.png")
    grey, colour = (
        edited(tmp_path, weights, image, half_mask(tmp_path / f"{mode}.png", mode))
        for mode in ("LA", "RGBA")
    )
    assert (
        np.array_equal(grey, colour)
        and (grey[:, 32:] == [10, 90, 200]).all()
        and (grey[:, :32] != [10, 90, 200]).any(-1).mean() > 0.9
    )
    Image.new("LA", (64, 64), (0, 0)).save(tmp_path / "empty.png")
    assert (edited(tmp_path, weights, image, tmp_path / "empty.png") != [10, 90, 200]).any(
        -1
    ).mean() > 0.9


@pytest.mark.parametrize(
    "mode, message",
    [
        ("full", "has no transparent and no white pixel, so there is nothing to paint"),
        ("L", "has no transparent and no white pixel"),
        ("RGB", "has no transparent and no white pixel"),
        ("1", "has no transparent and no white pixel"),
    ],
)
def test_a_mask_that_is_opaque_or_black_is_refused(tmp_path, weights, capsys, mode, message):
    mask = tmp_path / "m.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 255)).save(mask) if mode == "full" else Image.new(
        mode, (64, 64), 0
    ).save(mask)
    refused(
        capsys,
        [
            "edit",
            "x",
            "--image",
            picture(tmp_path / "i.png"),
            "--mask",
            str(mask),
            "--out",
            str(tmp_path / "e.png"),
            *weights,
        ],
        f"m.png: The mask {message}",
    )
    assert not (tmp_path / "e.png").exists()


def test_pictures_of_every_format_are_read_as_viewers_show_them(tmp_path, weights):
    """Transparent pixels become white, CMYK becomes RGB, EXIF rotation is applied.

    An image of a single pixel is enlarged.
    """
    mask = half_mask(tmp_path / "m.png")
    clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (edited(tmp_path, weights, tmp_path / "clear.png", mask)[:, 32:] == 255).all()
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(tmp_path / "cmyk.tif")
    assert (edited(tmp_path, weights, tmp_path / "cmyk.tif", mask)[:, 32:] == [0, 255, 255]).all()
    turned = Image.new("RGB", (64, 64), (255, 255, 255))
    # Black lower half; after the rotation of EXIF orientation 6, the left half is black.
    turned.paste((0, 0, 0), (0, 32, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (edited(tmp_path, weights, tmp_path / "turned.png", mask)[:, 32:] == 255).all()
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "dot-mask.png")
    dot = (tmp_path / "dot.png", tmp_path / "dot-mask.png")
    assert edited(tmp_path, weights, *dot).shape == (1, 1, 3)
    assert edited(tmp_path, [*weights, "--centred-square"], *dot).shape == (64, 64, 3)


def test_a_soft_eraser_leaves_no_ring(tmp_path, weights):
    """One RGBA file as image and mask: soft pixels are painted, opaque ones keep their colour."""
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (24, 24, 40, 40))
    alpha = alpha.filter(ImageFilter.GaussianBlur(3))
    soft = Image.new("RGBA", (64, 64), (20, 40, 60, 255))
    soft.putalpha(alpha)
    soft.save(tmp_path / "soft.png")
    result = edited(tmp_path, weights, tmp_path / "soft.png", tmp_path / "soft.png")
    opaque = np.asarray(alpha) == 255
    assert (result[opaque] == (20, 40, 60)).all() and 0.3 < opaque.mean() < 0.9
    assert (result[~opaque] != (20, 40, 60)).any(-1).mean() > 0.9


def test_black_and_white_masks_and_inverted_ones_paint_the_same_pixels(tmp_path, weights):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    drawing = Image.new("L", (64, 64), 0)
    drawing.paste(255, (0, 0, 32, 64))
    drawing.convert("1").save(tmp_path / "white.png")
    ImageOps.invert(drawing).convert("RGB").save(tmp_path / "black.png")
    Image.merge("LA", [drawing, drawing]).save(tmp_path / "opaque.png")
    expected = edited(tmp_path, weights, tmp_path / "i.png", half_mask(tmp_path / "m.png"))
    inverted = [*weights, "--invert-mask"]
    for options, name in ((weights, "white"), (inverted, "black"), (inverted, "opaque")):
        result = edited(tmp_path, options, tmp_path / "i.png", tmp_path / f"{name}.png")
        assert np.array_equal(result, expected), name


@pytest.mark.parametrize(
    "size, hole",
    [
        ((160, 90), (2, 30, 20, 60)),  # outside of the centred square
        ((90, 160), (10, 10, 80, 150)),  # higher than any square inside is
        ((64, 200), (0, 0, 64, 200)),  # everything
        ((301, 203), (150, 100, 151, 101)),
        ((20, 30), (4, 4, 9, 9)),  # smaller than the model's pictures
    ],
)
def test_an_edited_picture_keeps_its_size_and_all_its_known_pixels(
    tmp_path, weights, capsys, size, hole
):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "i.png")
    mask = Image.new("L", size, 0)
    mask.paste(255, hole)
    mask.save(tmp_path / "m.png")
    result = edited(tmp_path, weights, tmp_path / "i.png", tmp_path / "m.png")
    known = np.asarray(mask) == 0
    assert result.shape == picture.shape and np.array_equal(result[known], picture[known])
    assert (result[~known] != picture[~known]).any(-1).mean() > 0.9
    (tmp_path / "i.png").unlink()
    (tmp_path / "m.png").unlink()
    assert main(["reproduce", str(tmp_path / "e.png")]) == 0
    assert "the same as" in capsys.readouterr().out


def test_a_hole_outside_of_the_square_that_is_used_is_refused(tmp_path, weights, capsys):
    image = picture(tmp_path / "i.png", (160, 64))
    mask = picture(tmp_path / "m.png", (160, 64), (0, 0, 20, 64))
    inputs = ["x", "--image", image, "--mask", mask, "--out", str(tmp_path / "o.png"), *weights]
    outside = "m.png: The part to paint lies outside of the centred square that is used; "
    refused(capsys, ["edit", *inputs, "--centred-square"], outside + "leave out --centred-square")
    refused(capsys, ["vary", *inputs], outside + "crop the picture and its mask")
    scene = ["scene", "--image", image, "--edit", mask, "x", *inputs[5:]]
    refused(capsys, scene, outside + "crop the picture and its mask")
    scene[4] = picture(tmp_path / "small.png", (32, 32), (0, 0, 9, 9))
    refused(capsys, scene, "The mask has 32x32 pixels and the image 160x64; they must be of one")
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "x", "--out", "folder"], "--out folder is a folder"),
        (["generate", "x", "--out", "."], "--out . is a folder"),
        (["generate", "x", "--out", "f.png"], "--out f.png is a folder"),
        (["generate", "x", "-n", "2", "--out", "g.png"], "g-1.png, a picture of --out g.png, is a"),
        (["generate", "x", "--out", "x.gif"], "x.gif does not end in a format that is written"),
        (["generate", "x", "--out", "x"], "ends in .png, .jpg, .jpeg or .webp"),
        (["generate", "x", "--out", "text.png/x.png"], "lies in text.png, which is a file"),
        (["generate", "x", "--out", "/proc/new/x.png"], "Nothing can be written to /proc"),
        (["generate", "🍎" * 9999, "--out", "x.jpg"], "a JPEG has no room for a recipe with so"),
        (["edit", "x", "--image", "no.png", "--mask", "f.png"], "There is no file no.png"),
        (["edit", "x", "--image", "text.png", "--mask", "no.png"], "There is no file no.png"),
        (["edit", "x", "--image", "text.png", "--mask", "text.png"], "not an image"),
        (["vary", "x", "--image", "text.png", "--sketch", "no.png"], "There is no file no.png"),
        (["scene", "x", "--edit", "no.png", "y"], "There is no file no.png"),
        (["generate", "caf\udce9"], "The prompt is not UTF-8 at character 4"),
        (["generate", "x", "--negative-prompt", "\udce9"], "The negative prompt is not UTF-8"),
        (["scene", "x", "--edit", "text.png", "\udce9"], "The prompt is not UTF-8"),
    ],
)
def test_inputs_and_outputs_are_checked_before_models_are_loaded(
    tmp_path, monkeypatch, capsys, arguments, message
):
    """The weights are broken: reading them would be another error."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "f.png", "g-1.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.png").write_text("hello")
    before = sorted(tmp_path.rglob("*"))
    weights = ["--base", "text.png", "--upsampler", "text.png"]
    refused(capsys, [*arguments, *weights], message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "webp"])
def test_the_ending_of_out_is_the_format_and_the_recipe_comes_along(
    tmp_path, weights, capsys, ending
):
    out = tmp_path / "new" / f"a.{ending}"
    assert main(["generate", "a naïve 🍎", "--seed", "3", "--out", str(out), *weights]) == 0
    assert main(["generate", "a naïve 🍎", "--seed", "3", "--out", str(out), *weights]) == 0
    assert "already there" in capsys.readouterr().out
    written = Image.open(out)
    assert written.format == ("WEBP" if ending == "webp" else "JPEG")
    assert main(["reproduce", str(out), "--out", str(tmp_path / "again.png")]) == 0
    printed = capsys.readouterr().out
    assert "generate 'a naïve 🍎', seed 3" in printed and "only a PNG keeps them" in printed
    exact = encode(np.asarray(Image.open(tmp_path / "again.png")), written.format.lower())
    assert np.array_equal(np.asarray(written), np.asarray(Image.open(io.BytesIO(exact))))
    image = picture(tmp_path / "i.png", hole=(0, 0, 9, 9))
    edit = ["edit", "x", "--image", image, "--mask", image, "--out", str(out)]
    assert main([*edit, *weights]) == 0
    capsys.readouterr()
    refused(capsys, ["reproduce", str(out)], "lacks the image and the mask of its edit")


def test_a_long_recipe_fits_into_a_jpeg(tmp_path, weights, capsys):
    out, prompt = str(tmp_path / "a.jpg"), "🍎" * 4000
    assert main(["generate", prompt, "--out", out, *weights]) == 0
    assert main(["reproduce", out]) == 0
    assert prompt in capsys.readouterr().out


def interrupted_after(monkeypatch, pictures):
    """Raise KeyboardInterrupt after some finished pictures of the cascade."""
    real, calls = Cascade._make, []

    def make(self, images, *more):
        calls.extend(images)
        if len(calls) > pictures:
            raise KeyboardInterrupt
        return real(self, images, *more)

    monkeypatch.setattr(Cascade, "_make", make)


def test_an_interrupted_series_keeps_its_pictures_and_the_named_command_makes_the_others(
    tmp_path, weights, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a red apple", "-n", "4", *weights]
    assert main([*command, "--out", "whole.png"]) == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        assert main(command) == 130
    printed = capsys.readouterr()
    assert "generate-1.png  seed 1\n" in printed.out and "generate-2.png" not in printed.out
    assert "run the same command with --seed 0 --out generate.png to make the mis" in printed.err
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("generate-*")}
    assert len(kept) == 2
    assert main([*command, "--seed", "0", "--out", "generate.png"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("already there") == 2 and "generate-3.png  seed 3\n" in printed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for n in range(4):
        assert (tmp_path / f"generate-{n}.png").read_bytes() == (
            tmp_path / f"whole-{n}.png"
        ).read_bytes()
    assert main([*command, "--seed", "1", "--out", "generate.png"]) == 0
    assert "already there" not in capsys.readouterr().out


def test_an_interrupted_scene_goes_on_from_its_last_picture(tmp_path, weights, capsys, monkeypatch):
    mask = str(half_mask(tmp_path / "m.png"))
    other = picture(tmp_path / "o.png", hole=(40, 0, 64, 64))
    scene = ["scene", "a room", "--edit", mask, "a dog", "--edit", other, "a lamp", *weights]
    assert main([*scene, "--out", str(tmp_path / "whole.png")]) == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        assert main([*scene, "--out", str(tmp_path / "s.png")]) == 130
    assert not (tmp_path / "s-2.png").exists()
    capsys.readouterr()
    assert main([*scene, "--out", str(tmp_path / "s.png")]) == 0
    assert capsys.readouterr().out.count("already there") == 2
    for n in range(3):
        assert (tmp_path / f"s-{n}.png").read_bytes() == (tmp_path / f"whole-{n}.png").read_bytes()


@pytest.mark.parametrize("command", ["edit", "vary"])
def test_several_edits_and_variations_have_consecutive_seeds(tmp_path, weights, command, capsys):
    image = picture(tmp_path / "i.png", hole=(0, 0, 64, 30))
    options = ["x", "--image", image, "--mask", image, *weights]
    assert main([command, *options, "-n", "2", "--seed", "4", "--out", f"{tmp_path}/n.png"]) == 0
    assert "n-1.png  seed 5" in capsys.readouterr().out
    assert main([command, *options, "--seed", "5", "--out", f"{tmp_path}/one.png"]) == 0
    first, second = ((tmp_path / f"n-{n}.png").read_bytes() for n in range(2))
    assert second == (tmp_path / "one.png").read_bytes() and first != second


def test_a_random_seed_is_printed_and_makes_the_same_picture_again(tmp_path, weights, capsys):
    seeds = []
    for name in ("a", "b"):
        out = str(tmp_path / f"{name}.png")
        assert main(["generate", "x", "--seed", "random", "--out", out, *weights]) == 0
        seeds.append(re.search(r"seed (\d+)", capsys.readouterr().out)[1])
    assert seeds[0] != seeds[1]
    out = tmp_path / "again.png"
    assert main(["generate", "x", "--seed", seeds[0], "--out", str(out), *weights]) == 0
    assert out.read_bytes() == (tmp_path / "a.png").read_bytes()
    with pytest.raises(SystemExit):
        main(["generate", "x", "--seed", "soon"])
    assert "neither a whole number nor `random`" in capsys.readouterr().err


def test_enlarging_a_picture_of_the_base_model_is_the_upsampler_of_generate(
    tmp_path, weights, capsys
):
    made = ["a red apple", "--seed", "3", *weights]
    assert main(["generate", *made, "--out", f"{tmp_path}/ref.png"]) == 0
    assert main(["generate", *made, "--no-upsampler", "--out", f"{tmp_path}/small.png"]) == 0
    weights = [*weights[:4], "--upsampler-steps", "2"]
    enlarge = ["enlarge", f"{tmp_path}/small.png", "--prompt", "a red apple", "--seed", "3"]
    assert main([*enlarge, *weights, "--out", f"{tmp_path}/large.png"]) == 0
    large, reference = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("large", "ref"))
    assert np.array_equal(large, reference)
    assert main(["reproduce", f"{tmp_path}/large.png"]) == 0
    assert "the same as" in capsys.readouterr().out
    wide = picture(tmp_path / "wide.png", (300, 100))
    assert main(["enlarge", wide, "-n", "2", *weights, "--out", f"{tmp_path}/w.webp"]) == 0
    assert Image.open(tmp_path / "w-1.webp").size == (64, 64)
    capsys.readouterr()
    alone = ["--base", weights[1], "--out", f"{tmp_path}/x.png"]
    assert main(["enlarge", wide, "--prompt", "x", *alone]) == 2
    assert "none is loaded; give its weights with --upsampler" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_frames_of_a_picture_are_its_predictions_and_end_with_it(
    tmp_path, weights, capsys, ending
):
    out, frames = str(tmp_path / "a.png"), str(tmp_path / f"f.{ending}")
    command = ["generate", "x", "--out", out, *weights, "--steps", "3"]
    assert main([*command, "--frames", frames]) == 0
    assert f"f.{ending}  5 frames" in capsys.readouterr().out  # 3 and 2 steps
    animation, picture = Image.open(frames), Image.open(out)
    assert animation.n_frames == 5 and animation.size == picture.size
    shown = []
    for n in range(5):
        animation.seek(n)
        shown.append(np.asarray(animation.convert("RGB")).astype(int))
    nearest = [np.abs(one - np.asarray(picture)).mean() for one in shown]
    assert np.argmin(nearest) == 4 if ending == "gif" else max(nearest[3:]) < min(nearest[:3])
    blocks = shown[0].reshape(16, 4, 16, 4, 3)  # a prediction of the base model, 4 times as large
    assert ending == "webp" or np.ptp(blocks, axis=(1, 3)).max() == 0
    refused(capsys, [*command, "--frames", out], "--frames")
    refused(capsys, [*command, "--frames", frames, "-n", "2"], "--frames shows one picture")


def test_a_photograph_in_display_p3_is_edited_in_srgb(tmp_path, weights):
    photograph = Image.new("RGB", (64, 64), (200, 60, 60))
    photograph.save(tmp_path / "i.png", icc_profile=p3_profile())
    result = edited(tmp_path, weights, tmp_path / "i.png", half_mask(tmp_path / "m.png"))
    expected = display_p3_to_srgb((200, 60, 60))
    assert np.abs(result[:, 32:] - expected).max() <= 1 and expected[0] > 210


@pytest.mark.parametrize("side", [9_000, 20_000])
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, weights, capsys, side):
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        capsys,
        [
            "vary",
            "x",
            "--image",
            str(tmp_path / "huge.png"),
            "--out",
            str(tmp_path / "v.png"),
            *weights,
        ],
        "64,000,000",
    )
    # In KiB. The decoded image would take 1.2 GB as RGB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 100_000


def test_a_sketch_of_another_size_and_a_scene_without_a_first_step_are_refused(
    tmp_path, weights, capsys
):
    image, sketch = picture(tmp_path / "i.png"), picture(tmp_path / "s.png", (32, 32))
    refused(
        capsys,
        ["vary", "x", "--image", image, "--sketch", sketch, *weights],
        "The sketch has 32x32 pixels and the image 64x64",
    )
    refused(
        capsys,
        ["scene", "--edit", image, "a dog", *weights],
        "a scene begins with a prompt or with --image",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--strength", "0"], "strength must lie above 0"),
        (["--strength", "1.5"], "strength"),
        (["--sampler", "eular"], "no sampler 'eular'"),
        (["--guidance-interval", "0.9", "0.1"], "guidance_interval"),
        (["--clip-scale", "2"], "give one with --clip"),
        (
            ["--clip", "nothing.safetensors", "--clip-scale", "2"],
            "no weights file nothing.safetensors",
        ),
    ],
)
def test_invalid_options_of_a_variation_are_refused(tmp_path, weights, capsys, options, message):
    refused(
        capsys,
        [
            "vary",
            "x",
            "--image",
            picture(tmp_path / "i.png"),
            "--out",
            str(tmp_path / "v.png"),
            *weights,
            *options,
        ],
        message,
    )


def test_a_clip_of_another_image_size_is_refused(tmp_path, weights, capsys):
    config = presets.get("nano-clip").model
    save_weights(tmp_path / "clip.safetensors", NoisedClip(config.clip).state_dict(), config)
    refused(
        capsys,
        [
            "generate",
            "x",
            "--clip",
            str(tmp_path / "clip.safetensors"),
            "--clip-scale",
            "2",
            *weights,
        ],
        "reads images of 64 pixels and nano-base makes 16",
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--guidance-scale", "-2"], "guidance_scale must lie between 0 and 100"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--steps", "0"], "Steps"),
        (["--steps", "2000"], "steps"),
        (["--steps", "quick"], "not understood"),
        (["--seed", "-1"], "seed"),
        (["--upsampler-steps", "10,,2"], "not understood"),
        (["--base", "nothing.safetensors"], "no weights file nothing.safetensors"),
    ],
)
def test_invalid_options_are_refused(weights, capsys, options, message):
    refused(capsys, ["generate", "x", *weights, *options], message)


def test_an_unknown_preset_or_setting_is_refused_with_the_nearest_name(capsys):
    refused(capsys, ["info", "filtered-bass"], "did you mean 'filtered-base'")
    refused(capsys, ["train", "nano-base", "--set", "train.step=3"], "did you mean 'train.steps'")
    refused(capsys, ["train", "nano-base", "--set", "batch=7"], "train.batch 7 is not divisible")


def test_info_prints_parameters_memory_and_operations(capsys):
    assert main(["info", "filtered-base"]) == 0
    printed = capsys.readouterr().out
    assert "385.03M parameters" in printed and "one network call" in printed and "GiB" in printed


def test_bench_times_a_training_step_against_a_plain_and_a_bare_loop(capsys, monkeypatch):
    monkeypatch.setattr(presets, "get", {"nano-base": tiny()}.get)
    assert main(["bench", "train", "--preset", "nano-base", "--repeats", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["ratio"] > 0
        and figures["to_bare_min"] <= figures["to_bare"] <= figures["to_bare_max"]
        and figures["batch"] == 16
    )


@pytest.mark.slow
def test_bench_times_one_and_several_samples_of_a_cascade(capsys, monkeypatch):
    small = {
        f"nano-{role}": tiny(role, "model.sampling.respacing=2") for role in ("base", "upsampler")
    }
    monkeypatch.setattr(presets, "get", small.get)
    assert (
        main(["bench", "cascade", "--preset", "nano", "--precision", "fp32", "--repeats", "1"]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["own_steps"] == ["2", "2"]
        and figures["steps_own_s"] < figures["steps_20_s"]
        and figures["steps_own_images_per_s"] > 0.2 / figures["steps_own_s"]
    )


def test_bench_prints_one_line_of_json(capsys):
    assert main(["bench", "sample", "--preset", "nano-base", "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["ratio"] > 0


@pytest.mark.parametrize("benchmark", ["forward", "sample", "train"])
def test_the_unet_benchmark_refuses_a_clip_preset(benchmark, capsys):
    assert main(["bench", benchmark, "--preset", "nano-clip"]) == 2
    assert "nano-clip is a CLIP, which this benchmark does not measure" in capsys.readouterr().err


def commands(parser, name="glide"):
    """(name, parser) of a parser and of all commands under it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from commands(command, f"{name} {word}")


def test_every_command_and_every_option_has_help():
    found = dict(commands(build_parser()))
    assert len(found) > 30
    for name, parser in found.items():
        assert len(parser.format_help()) > 200, name
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help and len(action.help) > 10, f"{name} {action.dest}"


def test_the_installed_program_prints_help():
    done = subprocess.run([GLIDE, "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {command} " in done.stdout for command in ("demo", "train", "generate", "serve"))


@pytest.mark.parametrize(
    "job, command",
    [
        ("prepare", "corpus"),
        ("filter", "clean"),
        ("train", "train"),
        ("export", "export"),
        ("evaluate", "evaluate"),
    ],
)
def test_a_job_has_the_options_of_its_command(job, command):
    """The same defaults, choices and help, except --out, which an export as a job must name."""
    own = runpy.run_path(os.path.join(ROOT, "jobs", f"{job}.py"))["parser"]()._actions
    shared = {
        action.dest: action
        for action in dict(commands(build_parser()))[f"glide {command}"]._actions
    }
    compared = 0
    for action in own:
        if action.dest in shared and (job, action.dest) != ("export", "out"):
            other, compared = shared[action.dest], compared + 1
            for field in ("option_strings", "default", "choices", "nargs", "required", "help"):
                assert getattr(action, field) == getattr(other, field), (action.dest, field)
    assert compared >= 4


def test_help_and_refusals_are_quick_and_load_no_large_library():
    script = (
        "import contextlib, sys\n"
        "from glide_ray.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert main(['info', 'x']) == 2\n"
        "large = {'torch', 'ray', 'deepspeed', 'numpy', 'pyarrow', 'matplotlib', 'fastapi'}\n"
        "assert not large & set(sys.modules), large & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


def test_version_prints_the_version_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"glide {glide_ray.__version__}\n"


@pytest.mark.parametrize(
    "words, completions",
    [
        (["ev"], ["evaluate"]),
        (["filter", "a"], ["apply"]),
        (["train", "emoji-b"], ["emoji-base"]),
        (
            ["generate", "a dog", "--upsampler-"],
            ["--upsampler-sampler", "--upsampler-steps", "--upsampler-guidance-scale"],
        ),
        (["serve", "--precision", "f"], ["fp32", "fp16"]),
        (["pack", "--out", "dir"], ["directory"]),
    ],
)
def test_bash_completes_commands_presets_options_choices_and_paths(
    tmp_path, capsys, words, completions
):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "glide.bash").write_text(capsys.readouterr().out)
    (tmp_path / "directory").mkdir()
    script = (
        'source glide.bash; COMP_WORDS=(glide "$@"); COMP_CWORD=$#; '
        '_shtab_glide; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == completions


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_of_other_shells_contain_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in ("train", "generate", "serve", "export-released", "completion"):
        assert re.search(rf"\b{command}\b", script)


def test_a_command_that_needs_ray_is_refused_if_ray_is_not_installed(tmp_path):
    script = tmp_path / "bare.py"
    script.write_text(
        "import sys\nsys.modules.update(ray=None, deepspeed=None)\n"
        "from glide_ray.cli.main import main\n"
        "sys.exit(main(['corpus', '--out', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2 and "pip install 'glide_ray[cluster]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


# Job -> arguments that it refuses, and a pattern of its error message.
REFUSED = {
    "prepare": (["--out", "/proc/corpus"], "/proc/corpus"),
    "filter": (["nowhere", "--out", "x"], "There is no corpus .*nowhere"),
    "train": (["nano-bass"], "did you mean 'nano-base'"),
    "export": (["nowhere", "--out", "x"], "neither a checkpoint nor a run"),
    "generate": (["nowhere.txt", "--out", "x", "--base", "y"], "There is no file nowhere.txt"),
    "evaluate": (
        ["nowhere", "--reference", "x", "--out", "y", "--clip", "z"],
        "There is no weights file z",
    ),
}


@pytest.mark.parametrize("job", REFUSED)
def test_jobs_have_help_and_refuse_bad_input_in_one_sentence(job, tmp_path, monkeypatch, capsys):
    script, (arguments, sentence) = os.path.join(ROOT, "jobs", f"{job}.py"), REFUSED[job]
    monkeypatch.chdir(tmp_path)
    for given, code in ((["--help"], 0), (arguments, 2)):
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        assert ended.value.code == code
        assert "ray job submit" in printed.out if code == 0 else re.search(sentence, printed.err)
    assert printed.err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_a_job_is_a_script_that_refuses_bad_input_without_a_traceback(tmp_path):
    script, (arguments, sentence) = os.path.join(ROOT, "jobs", "train.py"), REFUSED["train"]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and re.search(sentence, done.stderr)
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir())


def test_presets_are_listed_with_their_sizes(capsys):
    assert main(["presets"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.split("\n\n")[0].splitlines()}
    assert set(rows) == set(presets.PRESETS)
    assert "64 px" in rows["paper-base"] and "2,500,000 steps of 2,048" in rows["paper-base"]


def test_a_sigterm_that_a_library_catches_still_ends_the_command_with_143():
    with sigterm_raises(), contextlib.suppress(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_code(KeyboardInterrupt()) == 143
    with sigterm_raises():  # the next command of the process
        assert exit_code(KeyboardInterrupt()) == 130
