"""A sheet of pictures over two settings, made again only where a picture is missing."""

import pytest

from glide_ray.cli.main import main
from glide_ray.config.sampling import SampleOptions
from glide_ray.evaluation.plot import Axis, make_cells
from glide_ray.sampling.recipe import read_recipe


def test_a_plot_has_a_picture_for_each_pair_of_values_and_resumes(tmp_path, tiny_weights, capsys):
    out, cells = tmp_path / "sheet.png", tmp_path / "sheet"
    command = ["plot", "a dog", "--x", "guidance-scale=1,3", "--y", "seed=4,5", "--steps", "2"]
    command += ["--base", str(tiny_weights["base"]), "--no-upsampler", "--out", str(out)]
    assert main(command) == 0
    assert "2 x 2 pictures" in capsys.readouterr().out
    made = {path.name: path.read_bytes() for path in cells.iterdir()}
    assert sorted(made) == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    recipe = read_recipe(cells / "1-0.png")[0]
    assert (recipe.seed, recipe.options.guidance_scale) == (5, 1.0)
    kept = (cells / "0-0.png").stat().st_mtime_ns
    (cells / "1-1.png").unlink()
    sheet = out.read_bytes()
    assert main(command) == 0
    assert (cells / "0-0.png").stat().st_mtime_ns == kept
    assert {path.name: path.read_bytes() for path in cells.iterdir()} == made
    assert out.read_bytes() == sheet
    assert main([*command, "--steps", "3"]) == 0  # other pictures: none is reused
    assert all(path.read_bytes() != made[path.name] for path in cells.iterdir())


def test_values_with_commas_are_separated_by_bars():
    axis = Axis.read("--steps=8|10,10,3,2,2")
    assert axis == Axis("steps", ("8", "10,10,3,2,2"))
    assert axis.labels == ["steps 8", "steps 10,10,3,2,2"]
    prompts = Axis.read("prompt=a dog|a cat, Noto")
    assert prompts.labels == ["a dog", "a cat, Noto"]
    cells = make_cells("", 0, SampleOptions(), prompts, axis)
    assert cells[1][1].prompt == "a cat, Noto" and cells[1][1].options.steps == "10,10,3,2,2"


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ("guidence-scale=1", "seed=1", "did you mean 'guidance_scale'"),
        ("guidance-scale=", "seed=1", "has no values"),
        ("guidance-scale=x", "seed=1", "is not valid for its setting"),
        ("guidance-scale=-1", "seed=1", "guidance_scale must lie between"),
        ("sampler=euler", "seed=1", "no sampler 'euler'"),
        ("prompt=a dog|a (cat:9)", "seed=1", "may be at most 4"),
        ("seed=1", "seed=2", "Both axes are seed"),
        ("guidance-interval=0 0.5|0.5", "seed=1", "is not valid for its setting"),
    ],
)
def test_an_axis_that_cannot_be_plotted_is_refused_before_models_load(
    tmp_path, capsys, x, y, sentence
):
    missing, out = tmp_path / "no.safetensors", tmp_path / "sheet.png"
    command = ["plot", "a", "--x", x, "--y", y, "--base", str(missing), "--out", str(out)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not out.exists()


def test_two_numbers_are_one_guidance_interval():
    columns = Axis.read("guidance-interval=0 1|0.2 0.8")
    (row,) = make_cells("a", 0, SampleOptions(), columns, Axis("seed", ("1",)))
    assert [cell.options.guidance_interval for cell in row] == [(0.0, 1.0), (0.2, 0.8)]


@pytest.mark.parametrize("name", ["sheet", "sheet.jpg"])
def test_a_sheet_that_is_no_png_is_refused_before_its_pictures_are_made(tmp_path, capsys, name):
    assert (
        main(["plot", "a", "--x", "seed=1", "--y", "steps=2", "--out", str(tmp_path / name)]) == 2
    )
    assert "give a name that ends in .png." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
