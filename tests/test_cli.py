"""The command line as its user types it: what it prints, what it writes, and how it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from glide_ray.cli import main

GLIDE = os.path.join(os.path.dirname(sys.executable), "glide")


@pytest.fixture
def weights(tiny_weights):
    return ["--base", str(tiny_weights["base"]), "--upsampler", str(tiny_weights["upsampler"]), "--steps", "2", "--upsampler-steps", "2"]


def refused(capsys, arguments, message):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("glide: ") and printed.err.count("\n") == 1 and message in printed.err and not printed.out


def picture(path, size=(64, 64), hole=None):
    image = Image.new("RGBA", size, (10, 90, 200, 255))
    if hole:
        image.paste((0, 0, 0, 0), hole)
    image.save(path)
    return str(path)


def test_generate_writes_pictures_that_their_seed_gives_again(tmp_path, weights, capsys):
    assert main(["generate", "a red apple", "-n", "2", "--seed", "4", "--out", str(tmp_path / "a.png"), *weights]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]
    assert "a-1.png  seed 5" in capsys.readouterr().out
    assert main(["generate", "a red apple", "--seed", "5", "--out", str(tmp_path / "again.png"), *weights]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "a-1.png").read_bytes()
    assert Image.open(tmp_path / "again.png").size == (64, 64)


def test_generate_without_the_upsampler_stops_at_the_base_size(tmp_path, weights):
    assert main(["generate", "x", "--no-upsampler", "--out", str(tmp_path / "s.png"), *weights]) == 0
    assert Image.open(tmp_path / "s.png").size == (16, 16)


def test_edit_keeps_what_is_opaque_in_the_mask(tmp_path, weights):
    image, mask = picture(tmp_path / "i.png"), picture(tmp_path / "m.png", hole=(16, 16, 48, 48))
    assert main(["edit", "a dog", "--image", image, "--mask", mask, "--out", str(tmp_path / "e.png"), *weights]) == 0
    pixels = np.asarray(Image.open(tmp_path / "e.png"))
    assert (pixels[:16] == [10, 90, 200]).all() and not (pixels[20:44, 20:44] == [10, 90, 200]).all()


def test_a_prompt_that_is_too_long_is_cut_and_said_so(tmp_path, weights, capsys):
    assert main(["generate", "word " * 2000, "--out", str(tmp_path / "x.png"), *weights]) == 0
    assert "longer than 128 tokens" in capsys.readouterr().err


def test_bad_input_to_an_edit_is_refused_and_nothing_is_written(tmp_path, weights, capsys):
    image, out = picture(tmp_path / "i.png"), tmp_path / "e.png"
    (tmp_path / "text.png").write_text("hello")
    for mask, message in ((picture(tmp_path / "m.png", (32, 32), (0, 0, 9, 9)), "32x32 pixels and the image 64x64"), (image, "nothing to paint"),
                          (str(tmp_path / "text.png"), "text.png: The file is not an image"), (str(tmp_path / "no.png"), "no file")):
        refused(capsys, ["edit", "x", "--image", image, "--mask", mask, "--out", str(out), *weights], message)
    assert not out.exists()


@pytest.mark.parametrize("options, message", [
    (["--guidance-scale", "-2"], "guidance_scale must lie between 0 and 100"), (["--guidance-scale", "nan"], "guidance_scale"),
    (["--steps", "0"], "Steps"), (["--steps", "2000"], "steps"), (["--steps", "quick"], "not understood"), (["--seed", "-1"], "seed"),
    (["--upsampler-steps", "10,,2"], "not understood"), (["--base", "nothing.safetensors"], "no weights file nothing.safetensors")])
def test_options_that_make_no_sense_are_refused(weights, capsys, options, message):
    refused(capsys, ["generate", "x", *weights, *options], message)


def test_an_unknown_preset_or_setting_is_answered_with_the_nearest(capsys):
    refused(capsys, ["info", "filtered-bass"], "did you mean 'filtered-base'")
    refused(capsys, ["train", "nano-base", "--set", "train.step=3"], "did you mean 'train.steps'")
    refused(capsys, ["train", "nano-base", "--set", "batch=7"], "train.batch 7 is not divisible")


def test_info_prints_parameters_memory_and_operations(capsys):
    assert main(["info", "filtered-base"]) == 0
    printed = capsys.readouterr().out
    assert "385.03M parameters" in printed and "one network call" in printed and "GiB" in printed


def test_bench_prints_one_line_of_json(capsys):
    assert main(["bench", "sample", "--preset", "nano-base", "--repeats", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["ratio"] > 0


def test_every_command_has_help_worth_reading():
    for command in ("", "demo", "corpus", "train", "generate", "edit", "serve", "info", "bench"):
        done = subprocess.run([GLIDE, *filter(None, [command]), "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and len(done.stdout) > 200, command


def test_help_and_a_refusal_are_quick_for_they_load_no_torch():
    script = "import sys; from glide_ray.cli import main; main(['info', 'x']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_command_that_needs_ray_says_so_where_it_is_not_installed(tmp_path):
    script = tmp_path / "bare.py"
    script.write_text("import sys\nsys.modules.update(ray=None, deepspeed=None)\nfrom glide_ray.cli import main\n"
                      "sys.exit(main(['corpus', '--out', 'x']))")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and "pip install" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("job", ["prepare", "train"])
def test_jobs_have_help_and_refuse_in_one_sentence(job):
    script = os.path.join(ROOT, "jobs", f"{job}.py")
    assert subprocess.run([sys.executable, script, "--help"], capture_output=True, check=False).returncode == 0
    if job == "train":
        done = subprocess.run([sys.executable, script, "nano-bass"], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "did you mean 'nano-base'" in done.stderr and "Traceback" not in done.stderr
