"""The command that makes the shipped weights, with real pictures and a very small model."""

import hashlib
import json

import pytest
from PIL import Image

from glide_ray.errors import ConfigError
from glide_ray.experiments.pretrain import PART_BYTES, _write_parts, pretrain
from glide_ray.models.weights import load_metadata, load_model

SMALL = [
    "model.unet.channels=32",
    "model.unet.multipliers=1,1,1",
    "model.unet.head_channels=32",
    "model.unet.text.width=16",
    "model.unet.text.layers=1",
    "model.unet.text.heads=1",
    "batch=4",
    "data.held_out_images=4",
    "data.cache_gib=0",
    "sample_prompts=a fox, flat icon",
    "model.sampling.respacing=2",
]


def join(out, name):
    parts = sorted(out.glob(f"{name}.safetensors.*"), key=lambda path: int(path.suffix[1:]))
    return b"".join(part.read_bytes() for part in parts)


def test_pretraining_writes_weights_in_parts_with_their_sources_and_a_sheet(emoji_corpus, tmp_path):
    corpus, _ = emoji_corpus
    done = pretrain(
        "emoji-base",
        tmp_path / "out",
        1e-9,
        corpus,
        tmp_path / "run",
        settings=[*SMALL, f"data.corpus={corpus}/train"],
        styles=("3D render", "Firefox"),
        scenes=0,
    )
    assert done.step == 1
    data = join(tmp_path / "out", "emoji-base")
    about = json.loads((tmp_path / "out" / "emoji-base.json").read_text())
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (about["sha256"], about["bytes"])
    assert about["recipe"]["images"] == 4 and about["recipe"]["device"] == "CPU"
    (tmp_path / "whole.safetensors").write_bytes(data)
    model, config = load_model(tmp_path / "whole.safetensors")
    assert config.inpaint and {
        source["style"]
        for source in json.loads(load_metadata(tmp_path / "whole.safetensors")["sources"])
    } == {"3D render", "Firefox"}
    assert Image.open(tmp_path / "out" / "emoji-base.png").width > 64
    assert (tmp_path / "out" / "emoji-base.metrics.jsonl").read_text().count("\n") >= 1


def test_a_large_file_is_split_into_parts_that_join_to_the_original(tmp_path):
    data = bytes(range(256)) * (PART_BYTES // 256) + b"the rest"
    (tmp_path / "whole").write_bytes(data)
    _write_parts(tmp_path / "whole", tmp_path / "out", "name", {})
    assert join(tmp_path / "out", "name") == data
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= PART_BYTES


def test_a_name_that_is_not_a_shipped_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'emoji-base'"):
        pretrain("emoji-bass", tmp_path, 1, tmp_path, tmp_path)
