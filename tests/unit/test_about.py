"""`glide info FILE`: what a file of weights is."""

import json

import pytest
import torch
from helpers.adapters import random_adapter
from helpers.tiny import random_model, tiny
from safetensors.torch import save_file

from glide_ray.cli.main import main
from glide_ray.models.weights import load_weights, save_weights
from glide_ray.storage import fingerprint


def info(capsys, path):
    """The title and the rows that the command prints; a row without a name continues the last."""
    assert main(["info", str(path)]) == 0
    title, *lines = capsys.readouterr().out.rstrip("\n").splitlines()
    rows, name = {}, ""
    for line in lines:
        name = line[2:14].strip() or name
        rows.setdefault(name, []).append(line[15:])
    return title, rows


def refused(capsys, path, message):
    assert main(["info", str(path)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.fixture
def file(tmp_path):
    config = tiny("upsampler", "model.unet.inpaint=True", "model.sampling.respacing=fast27").model
    grids = ("t0,300,995", "t0,995")
    sampling = config.sampling.model_copy(update={"tuned_grids": grids})
    config = config.model_copy(update={"sampling": sampling, "name": "mine"})
    state = random_model(config.unet).half().state_dict()
    recipe, sources = {"steps": 12345, "device": "CPU"}, [{"package": "p", "licence": "MIT"}]
    path = tmp_path / "mine.safetensors"
    save_weights(
        path, state, config, recipe=json.dumps(recipe), sources=json.dumps(sources), step="12345"
    )
    return path, state


def test_a_weights_file_is_described_by_its_config_and_metadata(file, capsys):
    path, state = file
    title, rows = info(capsys, path)
    numbers = sum(tensor.numel() for tensor in state.values())
    assert title == f"{path}: weights of the upsampler mine"
    assert rows["pictures"] == ["64x64 pixels, from 16x16, inpainting"]
    assert rows["noise"] == ["linear schedule of 1000 timesteps; predicts eps"]
    assert rows["parameters"] == [f"{numbers / 1e6:.2f}M in {len(state)} tensors, fp16"]
    assert rows["sampling"] == ["ancestral, timesteps fast27, guidance scale 1, noise scale 0.997"]
    assert rows["tuned grids"] == ["2 steps: t0,995", "3 steps: t0,300,995"]
    assert rows["recipe"] == ["steps: 12,345", "device: CPU"] and rows["step"] == ["12345"]
    assert rows["sources"] == ["p, MIT"] and rows["file"] == [f"{path.stat().st_size:,} bytes"]
    assert rows["SHA-256"] == [fingerprint(path)]


def test_a_clip_has_no_sampling_and_a_folder_is_that_of_its_run(tiny_weights, tmp_path, capsys):
    title, rows = info(capsys, tiny_weights["clip"])
    assert title.endswith("weights of the CLIP nano-clip") and "sampling" not in rows
    assert rows["image tower"] == ["2 layers x 32, 2 heads, patches of 4 pixels"]
    run = tmp_path / "run"
    run.mkdir()
    refused(capsys, run, "has no weights.safetensors or adapter.safetensors")
    save_weights(run / "weights.safetensors", *reversed(load_weights(tiny_weights["base"])))
    assert info(capsys, run)[0] == (
        f"{run / 'weights.safetensors'}: weights of the base model nano-base"
    )


def test_an_adapter_names_its_base(tiny_weights, tmp_path, capsys):
    path = random_adapter(tmp_path / "a.safetensors", tiny_weights["base"], rank=2)
    title, rows = info(capsys, path)
    assert title == f"{path}: adapter (LoRA) of the base model nano-base"
    assert rows["rank"] == ["2, alpha 2"]
    assert rows["added to"] == [f"the weights with the SHA-256 {fingerprint(tiny_weights['base'])}"]


def test_a_file_under_released_names_says_what_it_is_and_how_to_use_it(file, tmp_path, capsys):
    path, state = file
    released = tmp_path / "mine.pt"
    assert main(["export-released", str(path), "--out", str(released)]) == 0
    capsys.readouterr()
    title, rows = info(capsys, released)
    assert title == f"{released}: the upsampler mine, under the released names"
    assert rows["to use it"] == [f"glide import-released {released}"]
    assert rows["sampling"] and rows["recipe"] and rows["SHA-256"] == [fingerprint(released)]
    assert rows["parameters"][0].endswith(f"in {len(state)} tensors, fp16")
    (tmp_path / "mine.glide.json").unlink()
    refused(capsys, released, "none of the six published checkpoints")
    torch.save({"blocks.input.w_voc": torch.zeros(9, 4)}, tmp_path / "text.pt")
    assert info(capsys, tmp_path / "text.pt")[0].endswith(
        "text encoder of a CLIP, under the released names"
    )


def test_a_public_clip_is_described_by_its_folder(public, tmp_path, capsys):
    title, rows = info(capsys, public)
    assert title == f"{public}: public CLIP for --clip, in the form of transformers"
    assert rows["pictures"] == ["32x32 pixels"] and rows["embedding"] == ["24 numbers"]
    assert rows["SHA-256"] == [fingerprint(public / "model.safetensors")]
    for text in ("{}", "hello", "[]"):
        (tmp_path / "config.json").write_text(text)
        refused(capsys, tmp_path, "holds no CLIP that transformers wrote")


def test_the_shipped_weights_are_described_by_their_name(capsys):
    assert main(["info", "emoji"]) == 0
    printed = capsys.readouterr().out
    assert "weights of the base model emoji-base" in printed
    assert "weights of the upsampler emoji-upsampler" in printed and "Microsoft" in printed


def test_what_is_no_weights_file_is_one_sentence(tmp_path, capsys):
    refused(capsys, tmp_path / "none.safetensors", "There is no file")
    refused(capsys, "filtered-bass", "did you mean 'filtered-base'")
    page, foreign = tmp_path / "page.safetensors", tmp_path / "foreign.safetensors"
    page.write_text("<html>404</html>")
    refused(capsys, page, "is a web page and no weights")
    save_file({"x": torch.zeros(1)}, foreign)
    refused(capsys, foreign, "carries no glide_ray config")
    assert main(["info", str(foreign), "--set", "train.steps=3"]) == 2
    assert "--set changes a preset" in capsys.readouterr().err
