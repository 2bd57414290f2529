"""The default emoji corpus, built from the real packages."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time

import pytest

from glide_ray.cli.main import main
from glide_ray.data import emoji
from glide_ray.data.card import LeftOut, read_card
from glide_ray.data.images import open_image
from glide_ray.data.naming import Names, base_form, split_tone
from glide_ray.data.packages import EmojiError, find_packages
from glide_ray.data.sets import KEYWORDS, NAMES, read_pictures
from glide_ray.data.shards import read_shard
from glide_ray.data.splits import SPLITS
from glide_ray.data.styles import DEFAULT, STYLES, choose_styles
from glide_ray.errors import ConfigError

FIREFOX = STYLES["Firefox"]


def samples(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


@pytest.fixture(scope="module")
def rows(emoji_corpus):
    """Samples by split."""
    return {split: samples(emoji_corpus[0] / split) for split in SPLITS}


@pytest.fixture(scope="module")
def names(emoji_corpus):
    found = find_packages(emoji_corpus[0] / ".packages", [NAMES, KEYWORDS])
    return Names(found[0].json("data-by-emoji.json"), found[1].json("emoji-en-US.json"))


def pack(folder, version, icons):
    """Write a tarball of Mozilla's set to a folder, with these icons and no code points."""
    with tarfile.open(folder / f"iconify-json-fxemoji-{version}.tgz", "w:gz") as tar:
        for name, content in {"icons.json": icons, "chars.json": {}}.items():
            member, data = tarfile.TarInfo(f"package/{name}"), json.dumps(content).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def small_set(emoji_corpus, tmp_path):
    """A folder of packages: the real names, and another version of a set, with six pictures."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for path in (emoji_corpus[0] / ".packages").glob("*emoji*.tgz"):
        if "fluent" not in path.name and "fxemoji" not in path.name:
            shutil.copy(path, folder)
    disc = {"body": '<circle cx="8" cy="8" r="6" fill="#c33"/>'}
    icons = {
        "fox-face": disc,
        "house": disc,
        "crab": disc,
        "smart-goose": disc,
        "rose": {"body": "<circle"},
        "tram": {**disc, "hidden": True},
    }
    aliases = {"home": {"parent": "house"}}
    pack(folder, "9.0.0", {"icons": icons, "aliases": aliases, "width": 16, "height": 16})
    return folder


def test_the_emoji_corpus_is_complete_and_its_held_out_splits_are_disjoint(emoji_corpus, rows):
    indices = emoji_corpus[1]
    assert {split: len(samples) for split, samples in rows.items()} == {
        split: index["count"] for split, index in indices.items()
    }
    assert 4100 < sum(map(len, rows.values())) < 4400
    seen = {
        sample.meta["emoji"]
        for split in ("train", "tones", "held_out_pairs")
        for sample in rows[split]
    }
    unseen = {sample.meta["emoji"] for sample in rows["held_out"]}
    assert not seen & unseen and 0.035 < len(unseen) / len(seen | unseen) < 0.065
    assert {sample.meta["style"] for sample in rows["train"]} == {"3D render", "Firefox"}


def test_a_held_out_pair_combines_a_known_thing_and_a_known_style(rows):
    trained = {
        (sample.meta["emoji"], sample.meta["style"])
        for split in ("train", "tones")
        for sample in rows[split]
    }
    pairs = {(sample.meta["emoji"], sample.meta["style"]) for sample in rows["held_out_pairs"]}
    assert not pairs & trained and {thing for thing, _ in pairs} <= {thing for thing, _ in trained}
    assert 0.03 < len(pairs) / len(pairs | trained) < 0.07


def test_each_emoji_has_a_picture_captions_group_author_licence_and_source(rows):
    every = {sample.key: sample for samples in rows.values() for sample in samples}
    apple = every["3d-render-1f34e"]
    assert apple.captions[0] == "a red apple, 3D render" and apple.meta["group"] == "Food & Drink"
    assert (apple.meta["author"], apple.meta["licence"]) == ("Microsoft Corporation", "MIT")
    assert apple.meta["source"] == "@lobehub/fluent-emoji-3d@1.1.0"
    drawn = every["firefox-redapple"]
    assert (drawn.meta["emoji"], drawn.meta["name"], drawn.captions[0]) == (
        "1f34e",
        "red apple",
        "a red apple, Firefox",
    )
    assert (drawn.meta["author"], drawn.meta["licence"]) == ("Mozilla", "Apache-2.0")
    for sample in rows["held_out"]:
        assert (
            max(open_image(sample.image).size) in (256, 264)
            and min(open_image(sample.image).size) > 200
        )
        assert len(sample.captions) >= 4 and all(sample.captions) and sample.meta["group"]
        assert all(sample.meta["name"].lower() in caption for caption in sample.captions)


def test_a_rendered_picture_keeps_its_transparency(rows):
    pictures = [
        open_image(sample.image) for sample in rows["held_out"] if sample.meta["style"] == "Firefox"
    ]
    assert all(picture.mode == "RGBA" for picture in pictures)
    assert sum(
        picture.getchannel("A").getextrema() == (0, 255) for picture in pictures
    ) > 0.95 * len(pictures)


def test_people_with_a_skin_tone_have_their_own_split_and_the_tone_in_their_captions(rows):
    assert all(f"{sample.meta['tone']} skin tone" in sample.captions[0] for sample in rows["tones"])
    # The "light" in "police car light" is no skin tone.
    assert {sample.meta["group"] for sample in rows["tones"]} == {"People & Body"}
    assert not any("tone" in sample.meta for sample in rows["train"])
    wave = next(sample for sample in rows["tones"] if sample.key == "3d-render-1f44b-1f3fe")
    assert wave.captions[0] == "a waving hand, medium-dark skin tone, 3D render"


def test_the_card_of_each_split_names_its_sources_and_counts_the_dropped_pictures(
    emoji_corpus, rows
):
    for split, samples in rows.items():
        card = read_card(emoji_corpus[0] / split)
        assert card["rows"] == len(samples) == sum(source["pictures"] for source in card["sources"])
        assert [source["licence"] for source in card["sources"]] == ["MIT", "Apache-2.0"]
        assert card["left_out"]["no Unicode name"]["count"] == 123
    assert read_card(emoji_corpus[0] / "nowhere") is None


def test_a_second_call_returns_the_existing_corpus(emoji_corpus):
    out, indices = emoji_corpus
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert emoji.build_corpus(out, styles=("Firefox", "3D render")) == indices
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_an_existing_corpus_of_other_styles_is_refused(emoji_corpus):
    with pytest.raises(
        ConfigError, match="already has a corpus with the styles 3D render, Firefox, and others"
    ):
        emoji.build_corpus(emoji_corpus[0], styles=("blob",))


def test_an_unknown_style_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="There is no style 'flat icn'; did you mean 'flat icon'"):
        choose_styles(["flat icn"])
    assert [style.words for style in choose_styles([" twemoji", "3D render"])] == [
        "3D render",
        "Twemoji",
    ]
    assert [style.words for style in choose_styles()] == list(DEFAULT) and "outline" not in DEFAULT


def test_all_skin_tones_of_an_emoji_are_held_out_together():
    assert base_form("1f44b-1f3fd") == base_form("1f44b") == "1f44b"
    assert base_form("1f3c3-1f3fb-200d-2640-fe0f") == "1f3c3-200d-2640"
    assert base_form("23-fe0f-20e3") == "0023-20e3"


def test_names_used_by_emoji_sets_are_matched_to_unicode_names(names):
    found = {
        name: names.by_name([name]).name
        for name in (
            "fox-face",
            "flag-for-peru",
            "blackuniversalrecyclingsymbol",
            "hugging-face",
            "a-button-blood-type",
            "dizzy-face",
        )
    }
    assert found == {
        "fox-face": "fox",
        "flag-for-peru": "flag of Peru",
        "blackuniversalrecyclingsymbol": "recycling symbol",
        "hugging-face": "smiling face with open hands",
        "a-button-blood-type": "A button (blood type)",
        "dizzy-face": "face with crossed-out eyes",
    }
    assert names.by_name(["smart-goose"]) is None
    assert (
        names.by_name(["bear-face"]).name == "bear"
        and names.by_name(["otter-face"], taken=frozenset({"otter"})) is None
    )
    assert (
        split_tone("boy-medium-light-skin-tone")
        == ("boy", "medium-light")
        == split_tone("boy-medium-light", short=True)
    )


def test_packages_in_a_folder_need_no_npm_and_a_missing_one_is_named(
    small_set, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("PATH", str(tmp_path))
    caplog.set_level("INFO", "glide_ray")
    indexes = emoji.build_corpus(tmp_path / "out", styles=["Firefox"], packages=small_set)
    messages = caplog.messages
    assert sum(index["count"] for index in indexes.values()) == 3
    assert any(
        "fxemoji is version 9.0.0, not 1.2.2: 4 pictures with names, of the 1,034 in that one"
        in line
        for line in messages
    )
    assert any(
        "1 pictures did not render and are left out: firefox-rose" in line for line in messages
    )
    left_out = [
        item for split in SPLITS for item in read_card(tmp_path / "out" / split)["left_out"].items()
    ]
    assert {reason: about["examples"][0].split()[0] for reason, about in left_out} == {
        "hidden by the set's maker": "firefox-tram",
        "no Unicode name": "firefox-smart-goose",
        "another name of a picture": "firefox-home",
        "did not render": "firefox-rose",
    }
    assert next(iter(read_card(tmp_path / "out" / "train")["sources"]))["version"] == "9.0.0"


def test_the_same_packages_give_the_same_bytes(small_set, tmp_path):
    first, second = (
        emoji.build_corpus(tmp_path / name, styles=["Firefox"], packages=small_set)
        for name in ("a", "b")
    )
    assert first == second and {
        shard["sha256"] for index in first.values() for shard in index["shards"]
    }


def test_a_missing_or_broken_tarball_is_named(small_set, tmp_path):
    with pytest.raises(
        EmojiError,
        match="noto-1.2.9.tgz is missing; put it there with `npm pack @iconify-json/noto@1.2.9`",
    ):
        emoji.build_corpus(tmp_path / "out", styles=["Noto"], packages=small_set)
    with pytest.raises(EmojiError, match="There is no folder"):
        emoji.build_corpus(tmp_path / "out", styles=["Noto"], packages=tmp_path / "nowhere")
    next(small_set.glob("*fxemoji*")).write_bytes(b"no tarball")
    with pytest.raises(
        EmojiError, match="fxemoji-9.0.0.tgz is broken; fetch it again with `npm pack"
    ):
        emoji.build_corpus(tmp_path / "out", styles=["Firefox"], packages=small_set)


def test_only_the_first_of_two_pictures_of_a_thing_is_used(small_set):
    both = {"fox": {"body": "<g/>"}, "foxface": {"body": "<g/>"}}
    pack(small_set, FIREFOX.version, {"icons": both})
    found = {
        package.name: package
        for package in find_packages(small_set, [FIREFOX.source, NAMES, KEYWORDS])
    }
    left_out = LeftOut()
    pictures = read_pictures([FIREFOX], found, left_out)
    assert [picture.key for picture in pictures] == ["firefox-fox"]
    assert left_out["a second picture of the same thing"] == (1, ["firefox-foxface"])


def test_worker_processes_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\nfrom glide_ray.data.render import process_pool\n"
        "if __name__ == '__main__':\n    with process_pool() as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(600):
        if not os.path.exists(f"/proc/{worker}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


def test_glide_corpus_refuses_bad_options_in_one_sentence(tmp_path, capsys):
    assert main(["corpus", "--out", str(tmp_path), "--styles", "flat icon,twemogi"]) == 2
    assert "There is no style 'twemogi'; did you mean 'Twemoji'?" in capsys.readouterr().err
    assert main(["corpus", "--out", str(tmp_path), "--packages", str(tmp_path / "none")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_npm_is_reported_with_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EmojiError, match="pip install 'glide_ray\\[emoji\\]'.*--packages FOLDER.*data.corpus"
    ):
        emoji.build_corpus(tmp_path / "out")


def test_an_unreachable_registry_is_one_sentence_and_leaves_no_files(tmp_path, monkeypatch):
    """The real npm, with a registry on a port without a listener."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(
        EmojiError, match="npm could not fetch the package .*check the network"
    ) as refusal:
        emoji.build_corpus(tmp_path / "new" / "out", styles=["Firefox"])
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E403' >&2\nexit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(EmojiError, match="E403"):
        emoji.build_corpus(tmp_path / "out")
