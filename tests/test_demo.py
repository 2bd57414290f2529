"""The pictures that the program makes, and the demo's own promises that need no training."""

import json

import numpy as np
import pytest
from PIL import Image

from glide_ray import presets
from glide_ray.evaluation.report import HOLE, contact_sheet, loss_curves, show_hole


def test_a_contact_sheet_shows_every_image_in_its_place():
    colours = [np.full((32, 32, 3), value, np.uint8) for value in (10, 90, 170, 250, 40)]
    sheet = np.asarray(contact_sheet(colours, ["one", "two", "three", "four", "a very long label that has to be wrapped"], columns=3, size=64))
    assert sheet[12 + 32, 12 + 32].tolist() == [10] * 3 and sheet[12 + 32, 12 + 76 + 32].tolist() == [90] * 3
    assert (sheet == 40).all(axis=2).sum() >= 64 * 64


def test_the_hole_of_an_edit_is_shown_in_green():
    known = np.ones((4, 4), bool)
    known[1, 1] = False
    shown = show_hole(np.full((4, 4, 3), 9, np.uint8), known)
    assert shown[1, 1].tolist() == list(HOLE) and (shown == 9).all(axis=2).sum() == 15


def test_loss_curves_are_drawn_to_a_picture(tmp_path):
    metrics = [{"step": 0, "held_out": 1.0}, *({"step": step, "loss": 1 / step} for step in range(1, 9)), {"step": 8, "held_out": 0.2}]
    loss_curves({"nano-base": metrics, "nano-upsampler": metrics}, tmp_path / "deep" / "loss.png")
    assert Image.open(tmp_path / "deep" / "loss.png").size[0] > 800 and len(list((tmp_path / "deep").iterdir())) == 1


def test_what_the_demo_has_made_is_not_made_again(tmp_path):
    from glide_ray.demo import _once
    calls = []
    for _ in range(2):
        assert _once(tmp_path / "x.json", lambda: calls.append(1) or {"made": len(calls)}) == {"made": 1}
    (tmp_path / "x.json").write_text('{"made"')      # written by something that died
    assert _once(tmp_path / "x.json", lambda: {"made": 9}) == {"made": 9} == json.loads((tmp_path / "x.json").read_text())


@pytest.mark.parametrize("name", ["nano-base", "nano-upsampler"])
def test_the_demos_models_train_on_two_workers_with_zero_2(name):
    train = presets.get(name).train
    assert (train.workers, train.zero_stage) == (2, 2)
