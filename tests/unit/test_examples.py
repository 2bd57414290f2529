"""The examples and the notebook run, with few steps, and do what they say.

`examples/client.py` is run by tests/serving/test_serving.py, which has a server.
"""

import ast
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.drawings import COLOURS, draw
from helpers.paths import ROOT
from PIL import Image

import glide_ray
from glide_ray.models.weights import load_weights
from glide_ray.pretrained import shipped

EXAMPLES = Path(ROOT, "examples")
SIZE = 256


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs an example in an empty folder, with few steps of the upsampler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        glide_ray, "SampleOptions", partial(glide_ray.SampleOptions, upsampler_steps=2)
    )

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_generate_writes_the_picture_of_each_prompt_and_seed(run, tmp_path):
    run("generate.py", "a red apple", "a fox", "--steps", 2)
    expected = glide_ray.load().generate(["a fox"], [1], glide_ray.SampleOptions(steps=2))[0]
    assert np.array_equal(pixels(tmp_path / "generated" / "1.png"), expected)
    assert pixels(tmp_path / "generated" / "0.png").shape == (SIZE, SIZE, 3)


def test_edit_paints_only_the_centre(run, tmp_path):
    before = draw("blue", "ellipse", SIZE)
    Image.fromarray(before).save(tmp_path / "photo.png")
    run("edit.py", "photo.png", "a yellow star", "--steps", 2)
    changed = (pixels(tmp_path / "edited.png") != before).any(-1)
    centre = changed[64:192, 64:192]
    assert centre.mean() > 0.5 and changed.sum() == centre.sum()


def test_fine_tuning_on_a_folder_of_pictures_changes_the_weights(run, tmp_path):
    (tmp_path / "mine").mkdir()
    for colour in COLOURS:
        Image.fromarray(draw(colour, "rectangle")).save(tmp_path / "mine" / f"{colour}.png")
        (tmp_path / "mine" / f"{colour}.txt").write_text(f"a {colour} square")
    run("finetune_folder.py", "mine", "a red square", "--steps", 1, "--batch", 2, "--out", "tuned")
    assert pixels(tmp_path / "tuned" / "picture.png").shape == (SIZE, SIZE, 3)
    _, before = load_weights(shipped.find().base)
    _, after = load_weights(tmp_path / "tuned" / "weights.safetensors")
    changed = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert before.keys() == after.keys() and len(changed) > len(before) / 2


# -- the pictures of the docs ----------------------------------------------------------------------


def test_the_pictures_of_the_docs_can_be_regenerated_at_their_size():
    names = runpy.run_path(os.path.join(ROOT, "docs", "images", "make.py"))
    quick = glide_ray.SampleOptions(steps=2, upsampler_steps=2)
    names["edit"].__globals__["OPTIONS"] = quick
    cascade = glide_ray.load()
    for name in names["PICTURES"]:
        committed = Image.open(Path(ROOT, "docs", "images", f"{name}.png"))
        if name in ("edit", "sketch", "scene"):
            regenerated = names[name](cascade)
            assert regenerated.size == committed.size and np.asarray(regenerated).std() > 10


# -- the notebook ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tour():
    return json.loads((EXAMPLES / "tour.ipynb").read_text())


def test_the_notebook_is_committed_without_outputs(tour):
    code = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)


def run_cell(source, names):
    """Run a code cell as Jupyter does; returns the value of a last expression, else None."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_notebook_runs_from_top_to_bottom(tour):
    names, shown = {}, []
    for cell in tour["cells"]:
        if cell["cell_type"] == "code":
            shown.append(run_cell("".join(cell["source"]), names))
            if "parameters" in cell["metadata"].get("tags", ()):
                names.update(steps=4, upsampler_steps=2)
    pictures = [value for value in shown if value is not None]
    widths = [picture.size[0] // picture.size[1] for picture in pictures]
    assert widths == [3, len(names["scales"]), 3, 1 + len(names["strengths"]), 2, 6]
    assert all(np.asarray(picture).std() > 10 for picture in pictures)
    assert len({picture.tobytes() for picture in names["swept"]}) == len(names["scales"])
    assert not (names["edited"] != names["picture"])[names["known"]].any()
    assert len(names["predictions"]) == 4 and names["difference"] <= 1
