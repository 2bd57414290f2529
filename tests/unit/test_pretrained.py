"""The weights shipped with the package: found by name, checked, packed and described.

The models are real but small, with random weights.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from helpers.api import CascadeBackend, asking
from helpers.paths import ROOT
from helpers.tiny import random_model, tiny
from PIL import Image

from glide_ray.cli.main import main
from glide_ray.config.sampling import BulkConfig, SampleOptions
from glide_ray.config.serving import ServeConfig
from glide_ray.data.card import write_card
from glide_ray.distributed.generate import Worker, _begin, read_prompts
from glide_ray.models.weights import WeightsError, load_metadata, load_weights, save_weights
from glide_ray.pretrained import shipped
from glide_ray.pretrained.card import CardError, Source, card_of, read_card, render, total, union
from glide_ray.sampling.cascade import Cascade, load_stepper
from glide_ray.sampling.recipe import ModelSet, read_recipe, save_picture
from glide_ray.serving.backend import read_models
from glide_ray.train import pack as packing
from glide_ray.train.checkpoint import Checkpoints, TrainingPosition, write_progress
from glide_ray.train.partition import ParamSlice, part_path, save_part
from glide_ray.train.run_folder import absolute
from glide_ray.train.single import SingleTrainer

QUICK = ["--steps", "2", "--upsampler-steps", "2"]
SOURCES = (
    {
        "package": "@iconify-json/noto",
        "version": "1.2.3",
        "style": "Noto",
        "author": "Google Inc",
        "url": "https://github.com/googlefonts/noto-emoji",
        "licence": "Apache-2.0",
        "pictures": 3819,
    },
    {
        "package": "@iconify-json/twemoji",
        "version": "1.2.2",
        "style": "Twemoji",
        "author": "Twitter",
        "url": "https://github.com/twitter/twemoji",
        "licence": "CC-BY-4.0",
        "pictures": 4169,
    },
)
NOTES = packing.Notes.model_validate(
    {
        "figures": {
            "style right": {"value": 0.97, "interval": [0.95, 0.98], "command": "glide compose"}
        },
        "limits": ["It knows emoji and nothing else."],
    }
)


def trained(kind, seed=0, sources=SOURCES, *settings):
    """An inpainting model of 16 pixels, or of 16 -> 64, with random weights."""
    config = tiny(kind, "model.unet.inpaint=true", *settings).model
    state = random_model(config.unet, seed).state_dict()
    sources = tuple(map(Source.model_validate, sources))
    return packing.Trained(config, state, sources, {"preset": config.name, "steps": 9})


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """The folder of a tiny pair that replaces the package's shipped weights."""
    folder = tmp_path / "pretrained"
    monkeypatch.setattr(shipped, "FOLDER", folder)
    packing.pack(trained("base"), trained("upsampler"), notes=NOTES)
    return folder


@pytest.fixture
def own_base(tmp_path):
    """A base model of 16 pixels that a user trained."""
    config = tiny("base").model
    save_weights(tmp_path / "own.safetensors", random_model(config.unet, 5).state_dict(), config)
    return tmp_path / "own.safetensors"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def refusal(capsys, *arguments):
    """The error message of `glide` for these arguments; must be one sentence."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err.removeprefix("glide: ")
    assert message.count("\n") == 1 and ". " not in message.strip()
    return message


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# -- by name -----------------------------------------------------------------------------------


def test_the_name_emoji_stands_for_both_models(pair):
    files = Cascade.load(pair / "emoji-base.safetensors", pair / "emoji-upsampler.safetensors")
    options = SampleOptions(steps=2, upsampler_steps=2)
    named = Cascade.load("emoji").generate(["a fox"], [1], options)[0]
    assert named.shape == (64, 64, 3)
    assert np.array_equal(named, files.generate(["a fox"], [1], options)[0])
    assert Cascade.load(shipped.find().base).size == 16


def test_pictures_are_generated_and_edited_without_naming_weights(pair, tmp_path):
    run("generate", "a fox", "--out", tmp_path / "a.png", *QUICK)
    assert pixels(tmp_path / "a.png").shape == (64, 64, 3)
    mask = Image.new("LA", (64, 64), (0, 255))
    mask.paste((0, 0), (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    run(
        "edit",
        "a star",
        "--image",
        tmp_path / "a.png",
        "--mask",
        tmp_path / "mask.png",
        "--out",
        tmp_path / "e.png",
        *QUICK,
    )
    changed = (pixels(tmp_path / "a.png") != pixels(tmp_path / "e.png")).any(-1)
    assert not changed[:16].any() and changed[16:48, 16:48].mean() > 0.5
    run("generate", "a fox", "--no-upsampler", "--out", tmp_path / "s.png", *QUICK)
    assert pixels(tmp_path / "s.png").shape == (16, 16, 3)


def test_the_name_is_accepted_in_place_of_a_path(pair, own_base, tmp_path, capsys):
    run("generate", "a fox", "--base", "emoji", "--out", tmp_path / "a.png", *QUICK)
    run(
        "generate",
        "a fox",
        "--base",
        own_base,
        "--upsampler",
        "emoji",
        "--out",
        tmp_path / "b.png",
        *QUICK,
    )
    assert not capsys.readouterr().err.count("no upsampler was given")
    assert [pixels(tmp_path / f"{name}.png").shape[0] for name in "ab"] == [64, 64]
    assert load_stepper("emoji", "upsampler").config.low_res_size == 16


def test_a_picture_names_the_shipped_models_and_is_reproducible(pair, tmp_path, capsys):
    run("generate", "a fox", "--out", tmp_path / "a.png", *QUICK)
    used = read_recipe(tmp_path / "a.png")[0].models
    card = read_card(pair / shipped.CARD)
    assert {role: (file.path, file.sha256) for role, file in used.items()} == {
        role: ("emoji", card.file(role).sha256) for role in ("base", "upsampler")
    }
    run("reproduce", tmp_path / "a.png")
    assert "to the last 8-bit value" in capsys.readouterr().out


def test_a_servers_picture_from_the_shipped_models_is_reproducible(pair, tmp_path, capsys):
    """The recipe has the SHA-256 of the models, but no paths."""
    model_set = ModelSet.read({"base": "emoji", "upsampler": "emoji"}, "fp32", "cpu")
    options = SampleOptions(steps=2, upsampler_steps=2)
    image = Cascade.load("emoji").generate(["a fox"], [1], options)[0]
    save_picture(image, tmp_path / "a.png", model_set.recipe("generate", "a fox", 1, options))
    run("reproduce", tmp_path / "a.png")
    assert "to the last 8-bit value" in capsys.readouterr().out


def test_an_unknown_name_is_refused_with_the_nearest_one(pair, capsys):
    assert "no weights of that name ship with glide_ray; did you mean 'emoji'?" in refusal(
        capsys, "generate", "a fox", "--base", "emojis"
    )
    assert "There is no weights file nothing.safetensors" in refusal(
        capsys, "generate", "a fox", "--base", "nothing.safetensors"
    )
    with pytest.raises(WeightsError, match="No weights called 'emojy'.*did you mean 'emoji'"):
        shipped.find("emojy")
    with pytest.raises(WeightsError, match="did you mean 'emoji'"):
        shipped.absolute("emojy")


def test_fine_tuning_starts_from_the_shipped_weights_by_name(pair):
    settings = tiny("base", "model.unet.inpaint=true", "start_from=emoji", "workers=1", "batch=8")
    trainer = SingleTrainer(absolute(settings))
    trainer.start()
    shipped_state = load_weights(pair / "emoji-base.safetensors")[1]
    for name, own in zip(trainer.names, trainer.masters, strict=True):
        assert torch.equal(own, shipped_state[name].float())


def test_no_clip_ships_under_the_name_emoji(pair):
    with pytest.raises(WeightsError, match="No CLIP ships with glide_ray"):
        shipped.fetch("emoji", "clip")


# -- a user's base model -----------------------------------------------------------------------


def test_the_shipped_upsampler_follows_a_users_base_model_with_a_message(
    pair, own_base, tmp_path, capsys
):
    run("generate", "a fox", "--base", own_base, "--out", tmp_path / "a.png", *QUICK)
    assert pixels(tmp_path / "a.png").shape == (64, 64, 3)
    assert "pictures are enlarged by nano-upsampler" in capsys.readouterr().err
    run(
        "generate",
        "a fox",
        "--base",
        own_base,
        "--no-upsampler",
        "--out",
        tmp_path / "s.png",
        *QUICK,
    )
    assert pixels(tmp_path / "s.png").shape == (16, 16, 3)
    assert "enlarged" not in capsys.readouterr().err


def test_a_users_base_model_of_another_size_is_not_upsampled_with_a_message(pair, tmp_path, capsys):
    config = tiny("base", "model.unet.image_size=32").model
    save_weights(tmp_path / "w.safetensors", random_model(config.unet).state_dict(), config)
    run(
        "generate",
        "a fox",
        "--base",
        tmp_path / "w.safetensors",
        "--out",
        tmp_path / "a.png",
        *QUICK,
    )
    assert pixels(tmp_path / "a.png").shape == (32, 32, 3)
    assert "pictures keep the 32 pixels of nano-base" in capsys.readouterr().err


# -- deleted or altered ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "upsampler"])
def test_altered_weights_are_refused_with_a_remedy(pair, capsys, role):
    file = pair / f"emoji-{role}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = refusal(capsys, "generate", "a fox")
    assert f"{file}, which ships with glide_ray, has been altered" in message
    assert "reinstall glide_ray" in message and "--base" in message


@pytest.mark.parametrize(
    "name", ["emoji-base.safetensors", "emoji-upsampler.safetensors", "card.json"]
)
def test_deleted_files_are_named_with_a_remedy(pair, own_base, capsys, name, tmp_path):
    (pair / name).unlink()
    message = refusal(capsys, "generate", "a fox")
    assert str(pair / name) in message and "is missing; reinstall glide_ray" in message
    run(
        "generate",
        "a fox",
        "--base",
        own_base,
        "--no-upsampler",
        "--out",
        tmp_path / "a.png",
        *QUICK,
    )


def test_an_invalid_card_is_refused(pair, capsys):
    (pair / "card.json").write_text("{}")
    assert "cannot be read; reinstall glide_ray" in refusal(capsys, "card")
    with pytest.raises(CardError, match="name: Field required"):
        read_card(pair / "card.json")


def test_shipped_weights_are_hashed_once(pair, monkeypatch):
    shipped.find()
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a file was read again"))
    from glide_ray.storage import fingerprint

    assert fingerprint(pair / "emoji-base.safetensors")


# -- packing -----------------------------------------------------------------------------------


def test_a_packed_pair_is_float16_and_names_its_sources(pair):
    for role in ("base", "upsampler"):
        file = pair / f"emoji-{role}.safetensors"
        before, (config, state) = trained(role), load_weights(file)
        assert config == before.config
        assert {tensor.dtype for tensor in state.values()} == {torch.float16}
        assert all(torch.equal(state[name], tensor.half()) for name, tensor in before.state.items())
        assert json.loads(load_metadata(file)["sources"]) == list(SOURCES)
        assert json.loads(load_metadata(file)["recipe"]) == before.recipe
    card = read_card(pair / "card.json")
    for file in card.files:
        assert file.bytes == (pair / file.name).stat().st_size
    assert (pair / "MODEL_CARD.md").read_text() == render(card)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_float16_weights_are_loaded_at_the_requested_precision(pair, precision, dtype):
    model = load_stepper("emoji", "base", precision).model
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    weight = trained("base").state["stem.weight"]
    assert torch.equal(model.state_dict()["stem.weight"], weight.half().to(dtype))


def test_packing_again_gives_the_same_bytes_and_keeps_the_cards_figures(pair):
    before = {path.name: path.read_bytes() for path in pair.iterdir()}
    files = [pair / f"emoji-{role}.safetensors" for role in ("base", "upsampler")]
    packing.pack(*map(packing.read_trained, files))
    assert {path.name: path.read_bytes() for path in pair.iterdir()} == before
    assert read_card(pair / "card.json").figures["style right"].interval == (0.95, 0.98)


def test_weights_without_sources_swapped_or_too_large_are_not_packed(pair, monkeypatch):
    with pytest.raises(packing.PackError, match="does not name the sources.*--corpus"):
        packing.pack(trained("base", 0, ()), trained("upsampler"))
    with pytest.raises(WeightsError, match="The file given as the base holds nano-upsampler"):
        packing.pack(trained("upsampler"), trained("base"))
    with pytest.raises(WeightsError, match="enlarges 16 pixels and nano-base makes 32"):
        packing.pack(trained("base", 0, SOURCES, "model.unet.image_size=32"), trained("upsampler"))
    monkeypatch.setattr(packing, "MAX_BYTES", 1000)
    with pytest.raises(packing.PackError, match="bytes and may have 1,000"):
        packing.pack(trained("base"), trained("upsampler"))


def test_values_outside_the_range_of_float16_are_refused(tmp_path):
    model = trained("base")
    model.state["stem.weight"][0, 0, 0, 0] = 1e6
    with pytest.raises(packing.PackError, match=r"stem.weight has values.*up to 1e\+06"):
        packing.write_half(model, tmp_path / "w.safetensors")


def make_run(folder, kind, corpus):
    """A run folder with one checkpoint after 4 steps, and its metrics."""
    preset = tiny(kind, "model.unet.inpaint=true", f"data.corpus={corpus}", "batch=8")
    state = list(random_model(preset.model.unet).state_dict().items())
    checkpoint = Path(Checkpoints(folder).folder(4, "x"))
    checkpoint.mkdir(parents=True)
    pieces = [
        ParamSlice(name, tuple(tensor.shape), 0, tensor.numel(), n, 0)
        for n, (name, tensor) in enumerate(state)
    ]
    save_part(part_path(checkpoint, 0), pieces, {"average/0.99": [tensor for _, tensor in state]})
    write_progress(checkpoint, preset, TrainingPosition(4), {})
    Checkpoints(folder).complete(str(checkpoint), {})
    rows = [
        {"step": 2, "images_per_s": 4.0},
        {"step": 2, "held_out": 1.0},
        {"step": 4, "images_per_s": 2.0},
    ]
    lines = [*map(json.dumps, rows), '{"step": 6, "im']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_is_exported_in_float16_with_its_recipe_and_the_corpus_sources(tmp_path, capsys):
    write_card(tmp_path / "corpus", {"sources": list(SOURCES), "rows": 7988})
    out = tmp_path / "w.safetensors"
    run("export", make_run(tmp_path / "run", "base", tmp_path / "corpus"), "--half", "--out", out)
    assert "nano-base after step 4, EMA rate 0.99, in float16; 2 sources" in capsys.readouterr().out
    card = card_of(out)
    assert [source.model_dump() for source in card.sources] == list(SOURCES)
    recipe = card.files[0].recipe
    assert (recipe["steps"], recipe["images"], recipe["seconds"]) == (4, 32, 12)


def test_the_job_exports_the_same_float16_file_once(tmp_path):
    folder = make_run(tmp_path / "run", "base", tmp_path / "corpus")
    run("export", folder, "--half", "--out", tmp_path / "w.safetensors")
    job = [
        sys.executable,
        Path(ROOT, "jobs/export.py"),
        folder,
        "--half",
        "--out",
        tmp_path / "job.safetensors",
    ]
    first, second = (
        subprocess.run(job, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(2)
    )
    assert (tmp_path / "job.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    assert json.loads(first.stdout)["step"] == 4 and json.loads(second.stdout)["done_before"]


def test_one_command_packs_two_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "pretrained")
    write_card(tmp_path / "corpus", {"sources": list(SOURCES), "rows": 7988})
    runs = [make_run(tmp_path / kind, kind, tmp_path / "corpus") for kind in ("base", "upsampler")]
    for name, content in (("notes", NOTES.model_dump()), ("b", {"device": "H100"}), ("u", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    run(
        "pack",
        *runs,
        "--notes",
        tmp_path / "notes.json",
        "--recipe",
        tmp_path / "b.json",
        tmp_path / "u.json",
    )
    assert "2 sources, 1 figures" in capsys.readouterr().out
    assert Cascade.load("emoji").size == 64
    assert read_card(tmp_path / "pretrained" / "card.json").file("base").recipe["device"] == "H100"


@pytest.mark.parametrize(
    "option, text, sentence",
    [
        ("--notes", '{"figures": {"x": {"value": "much"}}}', "figures.x.value: Input should be"),
        ("--notes", "[", "cannot be read"),
        ("--recipe", "[1]", "is not a JSON object of names"),
    ],
)
def test_unreadable_notes_and_recipes_are_refused(pair, tmp_path, capsys, option, text, sentence):
    (tmp_path / "x.json").write_text(text)
    files = [pair / f"emoji-{role}.safetensors" for role in ("base", "upsampler")]
    options = [option, *[tmp_path / "x.json"] * (2 if option == "--recipe" else 1)]
    assert sentence in refusal(capsys, "pack", *files, *options)


def test_a_corpus_card_without_readable_sources_is_refused(tmp_path):
    assert packing.corpus_sources(str(tmp_path)) == ()
    write_card(tmp_path, {"sources": [{"style": "flat"}]})
    with pytest.raises(packing.PackError, match="lists no sources that can be read"):
        packing.corpus_sources(str(tmp_path))


def test_picture_counts_of_folders_are_summed_without_scenes(tmp_path):
    folders = (("train", 30, {}), ("tones", 12, {}), ("scenes", 30, {"scenes": 9}))
    for name, pictures, more in folders:
        write_card(tmp_path / name, {"sources": [{**SOURCES[0], "pictures": pictures}], **more})
    (source,) = packing.corpus_sources(f"{tmp_path}/{{train,tones,scenes}}")
    assert source.pictures == 42


def test_a_fine_tuned_model_has_the_sources_of_both_trainings(pair, tmp_path):
    mine = {**SOURCES[0], "package": "mine", "style": "outline", "pictures": None}
    write_card(tmp_path / "corpus", {"sources": [mine, SOURCES[1]], "rows": 5})
    preset = tiny(
        "base",
        f"data.corpus={tmp_path / 'corpus'}",
        f"start_from={pair / 'emoji-base.safetensors'}",
    )
    assert [source.style for source in packing.sources_of(preset)] == ["Noto", "outline", "Twemoji"]
    train = preset.train.model_copy(update={"start_from": "emoji"})
    named = preset.model_copy(update={"train": train})
    assert packing.sources_of(named) == packing.sources_of(preset)


def test_a_union_of_sources_has_each_source_once():
    few, many = ((Source(package="a", licence="MIT", pictures=n),) for n in (3, 5))
    assert union(few, many, few) == many and total(few, many)[0].pictures == 8


# -- licences ----------------------------------------------------------------------------------


def test_the_api_lists_the_licences_and_credits_of_each_model(pair, own_base):
    ask = asking(CascadeBackend(Cascade.load("emoji")))
    (model,) = ask("GET", "/v1/models").json()["data"]
    assert model["licence"] == ["Apache-2.0", "CC-BY-4.0"]
    assert model["sources"][1] == {
        "package": "@iconify-json/twemoji@1.2.2",
        "author": "Twitter",
        "licence": "CC-BY-4.0",
        "url": SOURCES[1]["url"],
    }
    (model,) = asking(CascadeBackend(Cascade.load(own_base)))("GET", "/v1/models").json()["data"]
    assert model["licence"] == model["sources"] == []


def test_a_server_accepts_the_name(pair):
    served = read_models(ServeConfig())["nano-base"]
    assert served.sizes == (16, 64) and len(served.model_set.sources) == 2


def test_every_node_resolves_the_name_to_its_own_copy(pair, tmp_path):
    assert shipped.absolute("emoji") == "emoji"
    assert Path(shipped.absolute("own.safetensors")).is_absolute()
    config = BulkConfig(upsampler="emoji", options=SampleOptions(steps=2, upsampler_steps=2))
    (tmp_path / "p.txt").write_text("a fox\n")
    prompts = read_prompts(str(tmp_path / "p.txt"), 0)
    assert _begin(prompts, str(tmp_path), config) == 128
    threads = torch.get_num_threads()
    Worker(str(tmp_path), config, threads)(pyarrow.Table.from_pylist(list(map(asdict, prompts))))
    recipe = read_recipe(tmp_path / prompts[0].file)[0]
    assert {role: used.path for role, used in recipe.models.items()} == {
        "base": "emoji",
        "upsampler": "emoji",
    }


def test_glide_card_prints_the_card_of_the_shipped_models_or_of_a_file(pair, own_base, capsys):
    run("card")
    printed = capsys.readouterr().out
    assert printed == (pair / "MODEL_CARD.md").read_text()
    for text in (
        "CC-BY-4.0",
        "Twitter",
        "| style right | 0.97 | 0.95 to 0.98 | `glide compose` |",
        "- It knows emoji and nothing else.",
        "| steps | 9 | 9 |",
    ):
        assert text in printed
    run("card", "--base", pair / "emoji-upsampler.safetensors")
    printed = capsys.readouterr().out
    assert "An upsampler that enlarges pictures to 64x64" in printed and "Twitter" in printed
    run("card", "--base", own_base)
    assert "# nano-base" in (printed := capsys.readouterr().out) and "## Data" not in printed


def test_weights_with_unreadable_sources_are_refused(tmp_path, own_base):
    config, state = load_weights(own_base)
    save_weights(tmp_path / "w.safetensors", state, config, sources='[{"style": "flat"}]')
    with pytest.raises(WeightsError, match=r"The sources in .*w.safetensors cannot be read \(0"):
        card_of(tmp_path / "w.safetensors")


# -- the package -------------------------------------------------------------------------------


def test_a_wheel_contains_the_weights_and_their_card(pair, tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.safetensors", "__pycache__", "card.json", "MODEL_CARD.md")
    shutil.copytree(Path(ROOT, "glide_ray"), source / "glide_ray", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(Path(ROOT, name), source)
    for file in pair.iterdir():
        shutil.copy(file, source / "glide_ray" / "pretrained")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    assert {f"glide_ray/pretrained/{file.name}" for file in pair.iterdir()} <= carried


def test_the_shipped_files_agree_with_their_card():
    pair, card = shipped.find(), shipped.shipped_card()
    assert pair.base.stat().st_size + pair.upsampler.stat().st_size <= packing.MAX_BYTES
    assert (shipped.FOLDER / shipped.PAGE).read_text() == render(card)
    assert card.sources and card.limits and all(file.recipe for file in card.files)
    for role in ("base", "upsampler"):
        config = load_stepper("emoji", role).config
        assert config.inpaint and config.image_size == card.file(role).pixels
