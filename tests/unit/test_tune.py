"""`glide tune`: the split of a folder, settings for its size, and the files that it leaves."""

import json
import re

import pytest
from helpers.drawings import drawn_samples
from helpers.tiny import tiny
from PIL import Image

from glide_ray.cli.main import main
from glide_ray.config.training import Preset
from glide_ray.data.patterns import mixture
from glide_ray.data.sources import read_corpus
from glide_ray.models.adapters import read_config
from glide_ray.models.weights import load_weights
from glide_ray.storage import fingerprint
from glide_ray.train.checkpoint import Checkpoints
from glide_ray.train.prior import equal_mixture
from glide_ray.train.run_folder import read_metrics
from glide_ray.train.tune import tuning_preset

FEW = ["--set", "steps=4", "--set", "trackers=", "--set", "model.sampling.respacing=3"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of 24 drawings with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, sample in enumerate(drawn_samples(24)):
        (folder / f"{number}.png").write_bytes(sample.image)
        (folder / f"{number}.txt").write_text(sample.captions[0])
    return folder


def tuned(tmp_path, weights, folder, *more):
    return main(["tune", str(weights), str(folder), "--out", str(tmp_path / "run"), *FEW, *more])


def captions(folder):
    return [sample.captions for sample in read_corpus(folder)]


@pytest.mark.parametrize("role", ["base", "upsampler"])
def test_a_folder_becomes_an_adapter_and_a_sheet_of_before_and_after(
    tmp_path, tiny_weights, pictures, capsys, role
):
    assert tuned(tmp_path, tiny_weights[role], pictures, "--lora", "8") == 0
    run = tmp_path / "run"
    assert f"adapter: {run / 'adapter.safetensors'}" in capsys.readouterr().out
    assert not (run / "weights.safetensors").exists()
    about = read_config(run / "adapter.safetensors")
    assert (about.role, about.rank) == (role, 8)
    assert about.base_sha256 == fingerprint(tiny_weights[role])
    assert Image.open(run / "before_after.png").width > 3 * 192
    if role == "base":
        picture = tmp_path / "ellipse.png"
        words = ["generate", "a red ellipse", "--base", str(tiny_weights["base"]), "--steps", "2"]
        lora = ["--lora", f"{run / 'adapter.safetensors'}:0.9", "--no-upsampler"]
        assert main([*words, *lora, "--out", str(picture)]) == 0
        assert Image.open(picture).size == (16, 16)


@pytest.mark.parametrize("role", ["base", "upsampler"])
def test_a_folder_becomes_weights_and_a_sheet_of_before_and_after(
    tmp_path, tiny_weights, pictures, capsys, role
):
    assert tuned(tmp_path, tiny_weights[role], pictures) == 0
    run = tmp_path / "run"
    output = capsys.readouterr().out
    assert "24 kept, none dropped; 2 held out; 4 steps: held-out loss" in output
    assert str(run / "weights.safetensors") in output
    config, _ = load_weights(run / "weights.safetensors")
    assert config.role == role and config.name.endswith("-tuned")
    assert config.unet == load_weights(tiny_weights[role])[0].unet
    assert Image.open(run / "before_after.png").width > 3 * 192
    if role == "base":
        picture = tmp_path / "ellipse.png"
        words = ["generate", "a red ellipse", "--base", str(run / "weights.safetensors")]
        assert main([*words, "--steps", "2", "--out", str(picture)]) == 0
        assert Image.open(picture).size == (config.image_size, config.image_size)
    # The same command does nothing more, and gives the same files.
    made = (run / "weights.safetensors").stat().st_mtime_ns
    assert tuned(tmp_path, tiny_weights[role], pictures) == 0
    assert (run / "weights.safetensors").stat().st_mtime_ns == made


def test_a_tenth_of_the_pictures_is_held_out_whatever_their_order(tmp_path, tiny_weights, pictures):
    assert tuned(tmp_path, tiny_weights["base"], pictures) == 0
    names = {
        split: {sample.key for sample in read_corpus(tmp_path / "run" / "data" / split)}
        for split in ("train", "held_out")
    }
    assert len(names["held_out"]) == 2 and len(names["train"]) == 22
    assert not names["train"] & names["held_out"]
    (pictures / "0.png").rename(pictures / "zero.png")
    (pictures / "0.txt").rename(pictures / "zero.txt")
    assert (
        main(["tune", str(tiny_weights["base"]), str(pictures), "--out", str(tmp_path / "b"), *FEW])
        == 0
    )
    again = {sample.key for sample in read_corpus(tmp_path / "b" / "data" / "held_out")}
    assert len(again & names["held_out"]) >= 1


def test_pictures_without_a_caption_get_the_given_one(tmp_path, tiny_weights, pictures):
    for number in range(20):
        (pictures / f"{number}.txt").unlink()
    assert tuned(tmp_path, tiny_weights["base"], pictures, "--caption", "a drawing") == 0
    found = captions(tmp_path / "run" / "data" / "train")
    found += captions(tmp_path / "run" / "data" / "held_out")
    assert found.count(("a drawing",)) == 20 and len(found) == 24


def test_settings_follow_the_number_of_pictures(tmp_path):
    model = tiny("base").model

    def preset(pictures, *settings, lora=0):
        return tuning_preset(model, "weights", tmp_path, pictures, 2, settings, lora).train

    few, some, many = preset(20), preset(200), preset(20_000)
    assert (few.batch, some.batch, many.batch) == (8, 64, 64)
    seen = [one.steps * one.batch for one in (few, some, many)]
    assert seen == sorted(seen) and 80 < seen[0] / 20 < 100 and 2 < seen[2] / 20_000 < 4
    # The learning rate follows the root of the batch.
    assert some.learning_rate == 3e-4 and few.learning_rate == pytest.approx(1.1e-4, rel=0.02)
    assert all(one.warmup_steps >= 5 and one.clip_norm == 1 for one in (few, some, many))
    assert preset(20, "learning_rate=1e-5", "batch=2").learning_rate == 1e-5
    # An adapter takes a larger one.
    assert preset(20).lora_rank is None and preset(20, lora=3).lora_rank == 3
    assert preset(20, lora=8).learning_rate > 5 * few.learning_rate


def test_prior_pictures_are_made_once_and_are_half_of_those_that_are_seen(
    tmp_path, tiny_weights, pictures, capsys
):
    prior = ["--prior", "a red ellipse", "--prior", "a square", "--prior-pictures", "5"]
    assert tuned(tmp_path, tiny_weights["base"], pictures, *prior) == 0
    run = tmp_path / "run"
    # No fewer than those of the folder.
    assert captions(run / "data" / "prior") == 12 * [("a red ellipse",), ("a square",)]
    assert "46 kept" in (run / "events.log").read_text()  # 22 of the folder and 24 of the weights
    preset = Preset.model_validate_json((run / "preset.json").read_text())
    assert mixture(preset.data.corpus) == [
        (str(run / "data" / "train"), 0.5),
        (str(run / "data" / "prior"), 0.5),
    ]
    capsys.readouterr()
    assert tuned(tmp_path, tiny_weights["base"], pictures, *prior) == 0
    assert tuned(tmp_path, tiny_weights["base"], pictures, "--prior", "a dog") == 2
    assert "other prior pictures" in capsys.readouterr().err


def test_a_corpus_may_be_the_prior(tmp_path, tiny_weights, pictures, drawn_corpus, capsys):
    corpus = ["--prior-corpus", str(drawn_corpus / "train")]
    assert tuned(tmp_path, tiny_weights["upsampler"], pictures, *corpus) == 0
    preset = Preset.model_validate_json((tmp_path / "run" / "preset.json").read_text())
    assert [weight for _, weight in mixture(preset.data.corpus)] == [0.5, 0.5]
    assert equal_mixture("new", "a:3,b:1") == "new:0.5,a:0.375,b:0.125"
    other = ["tune", str(tiny_weights["upsampler"]), str(pictures), "--out", str(tmp_path / "b")]
    assert main([*other, "--prior", "a dog"]) == 2
    assert "is an upsampler; give pictures with --prior-corpus" in capsys.readouterr().err
    assert main([*other, "--prior", "a dog", *corpus]) == 2
    assert "--prior makes pictures and --prior-corpus reads them" in capsys.readouterr().err


def test_twice_the_steps_are_made_with_prior_pictures(tmp_path):
    model = tiny("base").model
    plain, with_prior = (
        tuning_preset(model, "weights", tmp_path, 20, 2, (), 0, prior).train
        for prior in (None, "prior")
    )
    assert with_prior.steps == 2 * plain.steps and with_prior.batch == plain.batch


def test_an_interrupted_run_resumes(tmp_path, tiny_weights, pictures, monkeypatch):
    from glide_ray.train import without_ray

    whole = without_ray.train_alone
    monkeypatch.setattr(
        without_ray, "train_alone", lambda preset, out: whole(preset, out, minutes=1e-9) and 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        tuned(tmp_path, tiny_weights["base"], pictures)
    assert [entry.step for entry in Checkpoints(tmp_path / "run").list_complete()] == [1]
    monkeypatch.setattr(without_ray, "train_alone", whole)
    assert tuned(tmp_path, tiny_weights["base"], pictures) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4
    assert "from step 1" in (tmp_path / "run" / "events.log").read_text()


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda folder: [file.unlink() for file in folder.glob("*.txt")], "0 usable pictures"),
        (lambda folder: [file.unlink() for file in folder.glob("??.png")], "at least 4"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "is empty: no .tar"),
    ],
)
def test_a_folder_without_enough_pictures_is_refused(
    tmp_path, tiny_weights, pictures, capsys, spoil, sentence
):
    spoil(pictures)
    for number in range(3, 10):
        (pictures / f"{number}.png").unlink(missing_ok=True)
    assert tuned(tmp_path, tiny_weights["base"], pictures) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(sentence, error), error


def test_other_weights_and_other_pictures_are_refused_in_one_sentence(
    tmp_path, tiny_weights, pictures, capsys
):
    assert tuned(tmp_path, tiny_weights["clip"], pictures) == 2
    assert "takes a base model or an upsampler" in capsys.readouterr().err
    assert tuned(tmp_path, tmp_path / "gone.safetensors", pictures) == 2
    assert "gone.safetensors" in capsys.readouterr().err
    assert tuned(tmp_path, tiny_weights["base"], pictures) == 0
    (pictures / "0.png").unlink()
    assert tuned(tmp_path, tiny_weights["base"], pictures) == 2
    assert "holds a run on other pictures" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "data" / "split.json").read_text())["report"]
    assert report["kept"] == 24
