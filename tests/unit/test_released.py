"""Import and export of published checkpoints: recognised, checked by key, never run as code."""

import gzip
import json
import os
import pickle

import pytest
import torch
from helpers.paths import GOLDEN
from helpers.tiny import TINY_UPSAMPLER, random_model, tiny, tiny_clip
from tokenizers.pre_tokenizers import ByteLevel

from glide_ray.cli.main import main
from glide_ray.data.tokenizer import ClipTokenizer
from glide_ray.models.checkpoint_file import ReleasedError, read_checkpoint
from glide_ray.models.clip import NoisedClip
from glide_ray.models.clip_scorer import NoisedClipScorer
from glide_ray.models.released import to_released
from glide_ray.models.released_files import import_files, read_merges
from glide_ray.models.weights import (
    load_config,
    load_metadata,
    load_model,
    load_weights,
    save_weights,
)

SHAPES = json.loads((GOLDEN / "openai_state_dict_shapes.json").read_text())
NAMES = {
    "base": "filtered-base",
    "base-inpaint": "filtered-base-inpaint",
    "upsample": "filtered-upsampler",
    "upsample-inpaint": "filtered-upsampler-inpaint",
}


class Code:
    """An object that makes a folder when it is unpickled, as proof that its code ran."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def published(folder, name, **changes):
    """A file with all keys and shapes of a published checkpoint.

    All values share one stored zero, so it takes kilobytes instead of gigabytes.
    """
    state = {
        key: torch.zeros(1, dtype=torch.float16).expand(shape)
        for key, shape in SHAPES[name].items()
    } | changes
    path = folder / f"{name.replace('/', '-')}.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def vocabulary(tmp_path):
    """A file in the format of CLIP's: a comment, then more merges than are used."""
    letters = sorted(ByteLevel.alphabet())
    words = ["c a", "ca t</w>", "d o", "do g</w>"]
    lines = [
        "#version: 0.2",
        *dict.fromkeys([*words, *(f"{a} {b}" for a in letters for b in letters)]),
    ]
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_each_published_unet_is_recognised_by_its_keys_and_shapes(tmp_path, name):
    model = import_files([published(tmp_path, name)])
    config, state = model.config, model.state
    assert config.name == NAMES[name] and config.inpaint == name.endswith("inpaint")
    # As in the released notebooks: text2im.ipynb upsamples by DDIM, inpaint.ipynb does not.
    sampling = config.sampling
    assert (sampling.sampler, sampling.respacing, sampling.noise_scale) == {
        "base": ("ancestral", "100", 1.0),
        "base-inpaint": ("ancestral", "100", 1.0),
        "upsample": ("ddim", "fast27", 0.997),
        "upsample-inpaint": ("ancestral", "fast27", 0.997),
    }[name]
    assert {
        key: list(tensor.shape) for key, tensor in to_released(state, config.unet).items()
    } == SHAPES[name]


def test_both_encoders_of_the_published_clip_form_one_model(tmp_path, vocabulary):
    # Either order of the files must work.
    paths = [published(tmp_path, f"clip/{tower}-enc") for tower in ("text", "image")]
    model = import_files(paths, vocabulary)
    config, state, metadata = model.config, model.state, model.metadata
    with torch.device("meta"):
        NoisedClip(config.clip).load_state_dict(state, strict=True, assign=True)
    assert config.clip.scale == 100 and state["log_scale"].exp().item() == pytest.approx(100)
    assert metadata["merges"].splitlines()[0] == "c a"
    with pytest.raises(ReleasedError, match="image encoder alone"):
        import_files(paths[1:], vocabulary)
    with pytest.raises(ReleasedError, match="with --vocabulary"):
        import_files(paths)
    with pytest.raises(ReleasedError, match="One UNet|one UNet"):
        import_files([published(tmp_path, "base"), published(tmp_path, "upsample")])


@pytest.mark.parametrize(
    "setting", ["model.unet.patch=2", "model.unet.pixel_channels=4", "model.unet.prediction=x0"]
)
def test_a_model_that_the_released_code_cannot_run_is_not_exported(tmp_path, capsys, setting):
    config = tiny("base", "model.unet.attention_sizes=4", setting).model
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pt"
    save_weights(ours, random_model(config.unet).state_dict(), config)
    assert main(["export-released", str(ours), "--out", str(theirs)]) == 2
    assert "no released form" in capsys.readouterr().err and not theirs.exists()


def test_import_writes_a_weights_file_and_export_restores_the_same_tensors(tmp_path, capsys):
    config = tiny().model
    ours = tmp_path / "ours.safetensors"
    save_weights(ours, random_model(config.unet).state_dict(), config)
    assert main(["export-released", str(ours), "--out", str(tmp_path / "theirs.pt")]) == 0
    theirs = read_checkpoint(tmp_path / "theirs.pt")
    assert theirs["input_blocks.0.0.weight"].shape == (16, 3, 3, 3)
    assert all(
        torch.equal(theirs[key], value)
        for key, value in to_released(load_weights(ours)[1], config.unet).items()
    )
    again = tmp_path / "again.safetensors"
    importing = ["import-released", str(tmp_path / "theirs.pt"), "--out", str(again)]
    (tmp_path / "theirs.glide.json").unlink()
    assert main(importing) == 2
    assert (
        "none of the six published checkpoints (--preset NAME gives another shape)"
        in capsys.readouterr().err
        and not again.exists()
    )


def same_weights(one, other):
    (config, state), (other_config, other_state) = load_weights(one), load_weights(other)
    return (
        config == other_config
        and set(state) == set(other_state)
        and all(torch.equal(value, other_state[name]) for name, value in state.items())
    )


def test_an_export_of_any_shape_is_imported_again_with_its_config_and_recipe(tmp_path, capsys):
    config = tiny("upsampler", "model.sampling.sampler=unipc").model
    sampling = config.sampling.model_copy(update={"tuned_grids": ("t0,500",)})
    config = config.model_copy(update={"sampling": sampling, "name": "mine"})
    ours, theirs, again = (tmp_path / name for name in ("o.safetensors", "t.pt", "a.safetensors"))
    metadata = {"recipe": '{"steps": 7}', "sources": '[{"package": "caf\u00e9", "licence": "MIT"}]'}
    save_weights(ours, random_model(config.unet).half().state_dict(), config, **metadata)
    assert main(["export-released", str(ours), "--out", str(theirs)]) == 0
    assert "config in t.glide.json" in capsys.readouterr().out
    assert main(["import-released", str(theirs), "--out", str(again)]) == 0
    assert same_weights(ours, again)
    assert {name: load_metadata(again)[name] for name in metadata} == metadata
    # Without its settings, a preset gives the shape.
    (tmp_path / "t.glide.json").unlink()
    shape = ["--preset", "nano-upsampler", *(f"--set={one}" for one in TINY_UPSAMPLER)]
    again.unlink()
    assert main(["import-released", str(theirs), "--out", str(again), *shape]) == 0
    assert load_config(again).unet == config.unet
    # The settings of another file are named.
    other = tmp_path / "other.safetensors"
    save_weights(other, random_model(tiny().model.unet).state_dict(), tiny().model)
    assert main(["export-released", str(other), "--out", str(tmp_path / "u.pt")]) == 0
    os.rename(tmp_path / "u.glide.json", tmp_path / "t.glide.json")
    again.unlink()
    assert main(["import-released", str(theirs), "--out", str(again)]) == 2
    assert "does not fit nano-base of t.glide.json: The key" in capsys.readouterr().err
    # Another preset, and settings that are no export's, are named.
    wrong = ["import-released", str(theirs), "--out", str(again)]
    assert main([*wrong, "--preset", "nano-base"]) == 2
    assert "does not fit nano-base of the preset: The key" in capsys.readouterr().err
    assert main([*wrong, "--preset", "nano-clip"]) == 2
    assert "is a UNet, and nano-clip a CLIP" in capsys.readouterr().err
    assert main([*wrong, "--set", "model.unet.channels=32"]) == 2
    assert "name it with --preset" in capsys.readouterr().err
    for text in ("{}", "hello", '{"config": {}, "metadata": 3}', '{"config": 3, "metadata": {}}'):
        (tmp_path / "t.glide.json").write_text(text)
        assert main(wrong) == 2
        assert "is not what `glide export-released` writes" in capsys.readouterr().err
    assert not again.exists()


def test_an_exported_clip_is_imported_again_with_its_scale(tmp_path, tiny_weights):
    clip, again = tmp_path / "clip.pt", tmp_path / "again.safetensors"
    config, state = load_weights(tiny_weights["clip"])
    state["log_scale"] = torch.tensor([3.0])
    save_weights(tmp_path / "ours.safetensors", state, config)
    assert main(["export-released", str(tmp_path / "ours.safetensors"), "--out", str(clip)]) == 0
    parts = [str(tmp_path / f"clip-{tower}-enc.pt") for tower in ("text", "image")]
    assert main(["import-released", *parts, "--out", str(again)]) == 0
    imported = load_weights(again)[1]
    assert set(imported) == set(state)
    for name, tensor in state.items():
        assert torch.allclose(imported[name], tensor, rtol=0, atol=1e-6), name


WRAPPED = {
    "a wrapper": (lambda state: {"state_dict": state}, "its entry 'state_dict' is taken"),
    "two wrappers": (
        lambda state: {"epoch": 3, "model": {"state_dict": state}},
        "its entry 'model' is taken; its entry 'state_dict' is taken",
    ),
    "DataParallel": (
        lambda state: {f"module.{name}": one for name, one in state.items()},
        "without the prefix module.",
    ),
    "torch.compile": (
        lambda state: {f"module._orig_mod.{name}": one for name, one in state.items()},
        "without the prefix module._orig_mod.",
    ),
    "a step": (
        lambda state: state | {"step": torch.tensor(7)},
        "left out, because they are no weights of the model: step",
    ),
    "a number": (lambda state: state | {"epoch": 3}, "because they are no tensors: epoch"),
    "all": (
        lambda state: {
            "optimizer": {"lr": torch.zeros(1)},
            "model": {f"module.{name}": one for name, one in state.items()}
            | {"module.step": torch.tensor(7), "lr": 0.1},
        },
        "its entry 'model' is taken; left out, because they are no tensors: lr; "
        "without the prefix module.",
    ),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_what_trainers_wrap_around_a_state_dict_is_removed_and_said(tmp_path, form, caplog):
    caplog.set_level("INFO", "glide_ray")
    config = tiny().model
    state = to_released(random_model(config.unet).state_dict(), config.unet)
    wrap, said = WRAPPED[form]
    torch.save(wrap(state), tmp_path / "w.pt")
    torch.save(state, tmp_path / "plain.pt")
    model, plain = (import_files([tmp_path / name], config=config) for name in ("w.pt", "plain.pt"))
    assert all(torch.equal(model.state[name], one) for name, one in plain.state.items())
    assert said in caplog.text and "plain.pt" not in caplog.text


def test_an_extra_layer_a_name_twice_and_integers_are_refused(tmp_path):
    config = tiny().model
    state = to_released(random_model(config.unet).state_dict(), config.unet)
    for change, message in (
        ({"input_blocks.99.0.weight": torch.zeros(3)}, "'input_blocks.99.0.weight' is unexpected"),
        ({"module.out.2.bias": torch.zeros(6)}, "has 'out.2.bias' twice"),
        ({"out.2.bias": torch.zeros(6, dtype=torch.int8)}, "holds out.2.bias in int8: it is quant"),
    ):
        torch.save(state | change, tmp_path / "w.pt")
        with pytest.raises(ReleasedError, match=message):
            import_files([tmp_path / "w.pt"], config=config)


def test_clip_is_exported_as_its_two_encoders(tmp_path, tiny_weights, capsys):
    assert (
        main(["export-released", str(tiny_weights["clip"]), "--out", str(tmp_path / "clip.pt")])
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clip-image-enc.glide.json",
        "clip-image-enc.pt",
        "clip-text-enc.glide.json",
        "clip-text-enc.pt",
    ]
    shapes = {
        key: tensor.dim() for key, tensor in read_checkpoint(tmp_path / "clip-image-enc.pt").items()
    }
    assert shapes == {
        key: len(shape) for key, shape in SHAPES["clip/image-enc"].items() if key in shapes
    }


def test_an_imported_model_of_full_size_loads_and_names_itself(tmp_path, capsys, vocabulary):
    paths = [str(published(tmp_path, f"clip/{tower}-enc")) for tower in ("image", "text")]
    out = tmp_path / "clip.safetensors"
    assert (
        main(["import-released", *paths, "--vocabulary", str(vocabulary), "--out", str(out)]) == 0
    )
    assert (
        "noised-clip-b, 158.12M parameters, every key and shape checked" in capsys.readouterr().out
    )
    model, config = load_model(out)
    assert (
        load_config(out).clip.tokenizer == "clip"
        and next(model.parameters()).dtype == torch.float32
        and config.image_size == 64
    )


def damaged(folder, kind):
    whole = published(folder, "base")
    if kind == "truncated":
        whole.write_bytes(whole.read_bytes()[:5000])
    elif kind == "empty":
        whole.write_bytes(b"")
    elif kind == "a picture":
        whole.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "a web page":
        whole.write_text("\n<!DOCTYPE html>\n<html><title>404</title></html>")
    elif kind == "an error of S3":
        whole.write_text('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>')
    elif kind == "a pointer":
        whole.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif kind == "a text":
        whole.write_text("hello")
    elif kind == "code":
        torch.save({"final_ln.bias": Code(folder / "ran")}, whole)
    elif kind == "a bare pickle with code":
        whole.write_bytes(pickle.dumps({"final_ln.bias": Code(folder / "ran")}))
    elif kind == "numbers":
        torch.save({"epoch": 3}, whole)
    elif kind == "another model":
        torch.save({"weight": torch.zeros(3)}, whole)
    elif kind == "a key too few":
        torch.save(
            {
                key: value
                for key, value in torch.load(whole, weights_only=True).items()
                if key != "out.2.bias"
            },
            whole,
        )
    elif kind == "a misshapen key":
        published(folder, "base", **{"out.2.bias": torch.zeros(7)})
    return whole


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "not a whole checkpoint; download it again"),
        ("empty", "not a whole checkpoint"),
        ("a picture", "not a whole checkpoint; download it again"),
        ("a web page", "is a web page and no weights.*download it again"),
        ("an error of S3", "is a web page and no weights.*download it again"),
        ("a pointer", "pointer of Git LFS and no weights; run `git lfs pull`.*download it again"),
        ("a text", "not a whole checkpoint; download it again"),
        ("code", "has not been run"),
        ("a bare pickle with code", "has not been run"),
        ("numbers", "not a state dict of tensors"),
        ("another model", "none of the six published checkpoints"),
        ("a key too few", "filtered-base is nearest, but: The key 'out.2.bias' is missing"),
        (
            "a misshapen key",
            r"filtered-base is nearest, but: "
            r"out.2.bias has the shape \[7\], where this model has \[6\]",
        ),
    ],
)
def test_a_damaged_malicious_or_foreign_checkpoint_is_refused_in_one_sentence(
    tmp_path, kind, message, capsys
):
    path = damaged(tmp_path, kind)
    with pytest.raises(ReleasedError, match=message):
        import_files([path])
    assert main(["import-released", str(path), "--out", str(tmp_path / "out.safetensors")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("glide: ") and printed.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()


def test_a_missing_file_or_an_invalid_vocabulary_is_named(tmp_path):
    with pytest.raises(ReleasedError, match="There is no file .*nothing.pt"):
        import_files([tmp_path / "nothing.pt"])
    (tmp_path / "text").write_text("hello")
    (tmp_path / "short.gz").write_bytes(gzip.compress(b"#version\na b\n"))
    for name in ("text", "short.gz", "nothing"):
        with pytest.raises(ReleasedError, match="is not CLIP's vocabulary"):
            read_merges(tmp_path / name)


def test_captions_become_clip_tokens_between_start_and_end_tokens(vocabulary):
    """Numbering of tokens in CLIP's release.

    The letters in the order of GPT-2's byte alphabet, the same letters as ends of words, the
    merges.
    """
    tokenizer = ClipTokenizer(read_merges(vocabulary), 8)
    start, end = 512 + ClipTokenizer.MERGES, 513 + ClipTokenizer.MERGES
    cat, dog, letter = 512 + 1, 512 + 3, ord("q") - ord("!")
    encoded = tokenizer.encode("  A cat,\n DOG &amp; q ")
    assert encoded.tokens[:7] == [
        start,
        ord("a") - ord("!") + 256,
        cat,
        ord(",") - ord("!") + 256,
        dog,
        ord("&") - ord("!") + 256,
        letter + 256,
    ]
    assert encoded.tokens[7] == end and all(encoded.mask) and not encoded.cut
    short = tokenizer.encode("cat")
    assert short.tokens == [start, cat, end, 0, 0, 0, 0, 0] and sum(short.mask) == 3
    assert tokenizer.encode("cat " * 7).cut and tokenizer.encode("cat " * 7).tokens[-1] == end
    assert tokenizer.encode("\u201ccat\u201d").tokens == tokenizer.encode('"cat"').tokens


def test_the_published_clip_tokenizes_captions_with_its_own_vocabulary(vocabulary):
    config = tiny_clip("model.clip.tokenizer=clip", "model.clip.vocabulary=65536").model
    critic = NoisedClipScorer(NoisedClip(config.clip), config, merges=read_merges(vocabulary))
    embedded = critic.embed(["a cat", "A  cat", "a dog"])
    assert torch.equal(embedded[0], embedded[1]) and not torch.allclose(
        embedded[0], embedded[2], atol=1e-4
    )
