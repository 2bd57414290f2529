"""Import and export of published checkpoints: recognised, checked by key, never run as code."""

import gzip
import json
import os
import pickle

import pytest
import torch
from helpers.paths import GOLDEN
from helpers.tiny import random_model, tiny, tiny_clip
from tokenizers.pre_tokenizers import ByteLevel

from glide_ray.cli.main import main
from glide_ray.data.tokenizer import ClipTokenizer
from glide_ray.models.clip import NoisedClip
from glide_ray.models.clip_scorer import NoisedClipScorer
from glide_ray.models.released import (
    ReleasedError,
    import_files,
    read_checkpoint,
    read_merges,
    to_released,
)
from glide_ray.models.weights import load_config, load_model, load_weights, save_weights

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
    config, state, _ = import_files([published(tmp_path, name)])
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
    config, state, metadata = import_files(paths, vocabulary)
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
    assert (
        main(
            [
                "import-released",
                str(tmp_path / "theirs.pt"),
                "--out",
                str(tmp_path / "again.safetensors"),
            ]
        )
        == 2
    )
    assert (
        "none of the six published checkpoints" in capsys.readouterr().err
        and not (tmp_path / "again.safetensors").exists()
    )


def test_clip_is_exported_as_its_two_encoders(tmp_path, tiny_weights, capsys):
    assert (
        main(["export-released", str(tiny_weights["clip"]), "--out", str(tmp_path / "clip.pt")])
        == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "clip-image-enc.pt",
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
        ("a picture", "not a whole checkpoint|code"),
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
