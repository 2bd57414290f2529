"""A folder of more images than a list in memory may have is refused, with the remedy."""

import os
import re
import subprocess

import pytest
from helpers.corpora import caption, write_files
from helpers.paths import ROOT

from glide_ray import storage
from glide_ray.data import patterns, sources
from glide_ray.data.shards import ShardError
from glide_ray.data.sources import find_parts, read_corpus

LIMIT = 20


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(sources, "MAX_IMAGES", LIMIT)


def files(count):
    yield from ((f"{n // 8}/{n:03d}.jpg", b"x") for n in range(count))
    yield from ((f"{n // 8}/{n:03d}.txt", caption(n)) for n in range(count))


def test_images_up_to_the_limit_are_read_whatever_else_the_folder_has(tmp_path):
    path = write_files(tmp_path, dict(files(LIMIT)))
    assert sum(len(part.files) for part in find_parts(path)) == LIMIT


@pytest.mark.parametrize("pattern", ["{}", "{}/{{0,1,2,3,4}}", "{}/0::{}/1::{}/2"])
def test_more_images_are_refused_with_the_remedy_also_in_several_folders(tmp_path, pattern):
    path = write_files(tmp_path, dict(files(2 * LIMIT)))
    with pytest.raises(ShardError, match="more than 20 images .* make shards first, with `tar`"):
        find_parts(pattern.format(*[path] * 3))


def test_the_listing_of_a_folder_ends_at_the_limit(tmp_path, monkeypatch):
    path, walked = write_files(tmp_path, dict(files(10 * LIMIT))), []
    walk = os.walk

    def watched(*arguments, **options):
        for step in walk(*arguments, **options):
            walked.append(step)
            yield step

    monkeypatch.setattr(storage.os, "walk", watched)
    with pytest.raises(ShardError, match="more than 20 images"):
        find_parts(path)
    assert len(walked) == 4  # the folder itself, and three of its 25 folders of 8 images


def test_the_listing_of_a_prefix_ends_at_the_limit(s3, monkeypatch):
    for n in range(LIMIT + 10):
        storage.put(b"x", f"{s3}/crowd/{n:03d}.jpg")
    listed, list_objects = [], storage.list_objects

    def watched(*arguments):
        for item in list_objects(*arguments):
            listed.append(item)
            yield item

    monkeypatch.setattr(storage, "list_objects", watched)
    with pytest.raises(ShardError, match="more than 20 images"):
        find_parts(f"{s3}/crowd")
    assert len(listed) == LIMIT + 1


@pytest.mark.parametrize("pattern", ["{{0..99999999999}}.tar", "*/*.jpg"])
def test_a_pattern_of_too_many_paths_is_refused_before_they_are_all_made(
    tmp_path, monkeypatch, pattern
):
    monkeypatch.setattr(patterns, "MAX_EXPANDED", LIMIT)
    path = write_files(tmp_path, dict(files(2 * LIMIT)))
    with pytest.raises(ShardError, match="more than 20 paths; give a folder of shards"):
        find_parts(f"{path}/{pattern.format()}")


def test_the_documented_command_makes_shards_of_a_folder_without_losing_a_row(tmp_path):
    folder, shards = tmp_path / "FOLDER", tmp_path / "SHARDS"
    shards.mkdir()
    write_files(folder, {**dict(files(2 * LIMIT)), "0/x.y.jpg": b"x", "0/x.y.txt": "dots"})
    text = (ROOT / "docs" / "curation.md").read_text()
    [command] = re.findall(r"^    cd FOLDER .*?tar }'$", text, re.MULTILINE | re.DOTALL)
    command = command.replace("FOLDER", str(folder)).replace("SHARDS", str(shards))
    subprocess.run(command.replace("20000", "15"), shell=True, check=True)
    assert len(list(shards.glob("*.tar"))) > 3
    rows = [(row.image, row.captions) for row in read_corpus(shards)]
    assert sorted(rows) == sorted(
        [(b"x", (caption(n),)) for n in range(2 * LIMIT)] + [(b"x", ("dots",))]
    )
