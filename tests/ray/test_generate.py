"""Bulk generation: one picture for each prompt, made once however often the job is submitted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from helpers.paths import ROOT
from PIL import Image

from glide_ray import storage
from glide_ray.config.sampling import BulkConfig, SampleOptions
from glide_ray.data.sources import METADATA, find_parts, read_part
from glide_ray.distributed.generate import generate, read_prompts
from glide_ray.errors import UserError
from glide_ray.sampling.cascade import Cascade
from glide_ray.sampling.recipe import read_recipe

OPTIONS = SampleOptions(steps=2, upsampler_steps=1)
PROMPTS = int(os.environ.get("GLIDE_TEST_PROMPTS", 200))  # number in the job that is killed


@pytest.fixture(scope="module")
def config(tiny_weights):
    return BulkConfig(
        base=str(tiny_weights["base"]),
        upsampler=str(tiny_weights["upsampler"]),
        options=OPTIONS,
        seed=5,
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"a red apple {n}\n\n" for n in range(20)))
    return str(path)


@pytest.fixture(scope="module")
def finished(config, prompts, tmp_path_factory, ray_session):
    """A finished job: its result and its folder, which tests may only read."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return generate(prompts, str(folder), config), folder


def pixels(path):
    return np.asarray(Image.open(path))


def test_each_prompt_has_the_picture_that_the_cascade_makes_of_it_alone(finished, tiny_weights):
    done, out = finished
    index = [json.loads(line) for line in (out / METADATA).read_text().splitlines()]
    assert done.pictures == done.made == len(index) == 20 and [
        line["seed"] for line in index
    ] == list(range(5, 25))
    cascade = Cascade.load(tiny_weights["base"], tiny_weights["upsampler"])
    for line in index[::7]:
        alone = cascade.generate([line["text"]], [line["seed"]], OPTIONS)[0]
        assert np.array_equal(alone, pixels(out / line["file_name"]))
        assert read_recipe(out / line["file_name"])[0].prompt == line["text"]
    # The output folder is a corpus.
    rows = [sample for part in find_parts(out) for sample in read_part(part)]
    assert [sample.captions for sample in rows] == [(line["text"],) for line in index]


@pytest.mark.usefixtures("ray_session")
def test_only_what_is_missing_is_made_again(config, prompts, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    files = sorted(out.rglob("*.png"))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    files[3].unlink()
    (out / "00000" / ".000000009.png.abc.partial").write_bytes(b"half")  # as after a kill
    assert generate(prompts, str(out), config).made == 1
    assert {file: file.read_bytes() for file in sorted(out.rglob("0*.png"))} == {
        file: data for file, (_, data) in before.items()
    }
    assert all(file.stat().st_mtime_ns == before[file][0] for file in files if file != files[3])
    assert generate(prompts, str(out), config).made == 0


@pytest.mark.usefixtures("ray_session")
def test_pictures_of_another_job_are_not_mixed_in(config, prompts, finished):
    out = str(finished[1])
    with pytest.raises(UserError, match="another job .other options"):
        generate(
            prompts,
            out,
            config.model_copy(update={"options": SampleOptions(steps=3)}),
        )
    with pytest.raises(UserError, match="other prompts or seeds"):
        generate(prompts, out, config.model_copy(update={"seed": 6}))


@pytest.mark.usefixtures("ray_session")
def test_pictures_go_to_s3_as_they_go_to_a_folder(config, prompts, s3, finished):
    storage.put(open(prompts, "rb").read(), f"{s3}/bulk/prompts.txt")
    for role in ("base", "upsampler"):
        storage.put(open(getattr(config, role), "rb").read(), f"{s3}/bulk/{role}.safetensors")
    there = config.model_copy(
        update={
            "base": f"{s3}/bulk/base.safetensors",
            "upsampler": f"{s3}/bulk/upsampler.safetensors",
        }
    )
    generate(f"{s3}/bulk/prompts.txt", f"{s3}/bulk/out", there)
    for file in sorted(finished[1].rglob("*.png")):
        local, remote = file, storage.fetch(f"{s3}/bulk/out/00000/{file.name}")
        assert np.array_equal(pixels(local), pixels(remote))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_with_a_twentieth_of_all_s3_requests_failing_the_job_does_not_and_its_pictures_are_the_same(
    config, prompts, s3, s3_faults, finished
):
    for role in ("base", "upsampler"):
        storage.put(open(getattr(config, role), "rb").read(), f"{s3}/unlucky/{role}.safetensors")
    there = config.model_copy(
        update={
            "base": f"{s3}/unlucky/base.safetensors",
            "upsampler": f"{s3}/unlucky/upsampler.safetensors",
        }
    )
    s3_faults.at_random(0.05)
    generate(prompts, f"{s3}/unlucky/out", there)
    s3_faults.clear()
    for file in sorted(finished[1].rglob("*.png")):
        assert np.array_equal(
            pixels(file), pixels(storage.fetch(f"{s3}/unlucky/out/00000/{file.name}"))
        )


def test_a_prompt_file_says_which_seeds_it_likes(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 9}\n\n{"prompt": " b "}\n')
    wanted = read_prompts(str(path), 100, per_prompt=2)
    assert [(one.number, one.prompt, one.seed) for one in wanted] == [
        (0, "a", 9),
        (1, "a", 10),
        (2, "b", 102),
        (3, "b", 103),
    ]
    # A byte order mark, as Windows writes it, and an unpaired surrogate.
    path.write_text('\ufeff{"prompt": "a\\ud800b"}')
    assert [one.prompt for one in read_prompts(str(path), 0)] == ["a?b"]
    # Characters at which Python's splitlines breaks lines, but JSON Lines does not.
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n')
    assert [one.prompt for one in read_prompts(str(path), 0)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not text in UTF-8"),
        ("p.jsonl", b"a red apple", "line 1 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"caption": "b"}', "line 2 has no prompt"),
        ("p.jsonl", b'{"prompt": "a", "seed": -1}', "line 1 has a seed"),
        ("p.jsonl", b'["a"]', "line 1 has no prompt"),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', "line 1 has a seed"),
        ("p.txt", b"a dog\na (cat:9)", "line 2: The weight"),
    ],
)
def test_a_prompt_file_that_is_none_is_refused_by_line(tmp_path, name, text, sentence):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=sentence):
        read_prompts(str(tmp_path / name), 0)


def test_weights_that_are_none_are_refused_before_anything_is_written(
    config, prompts, tmp_path, tiny_weights
):
    for wrong in (
        {"base": "nowhere.safetensors"},
        {"base": str(tmp_path)},
        {"base": str(tiny_weights["upsampler"])},
        {"upsampler": str(tiny_weights["base"])},
    ):
        with pytest.raises(UserError):
            generate(prompts, str(tmp_path / "out"), config.model_copy(update=wrong))
    with pytest.raises(UserError, match="clip_scale"):
        generate(
            prompts,
            str(tmp_path / "out"),
            config.model_copy(update={"options": SampleOptions(clip_scale=1)}),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_job_that_is_killed_and_submitted_again_leaves_one_picture_for_each_prompt(
    config, tmp_path
):
    (tmp_path / "prompts.txt").write_text("".join(f"a blue square {n}\n" for n in range(PROMPTS)))
    command = [
        sys.executable,
        os.path.join(ROOT, "jobs", "generate.py"),
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
        "--base",
        config.base,
        "--upsampler",
        config.upsampler,
        "--steps",
        "20",
        "--upsampler-steps",
        "2",
    ]
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        len(list((tmp_path / "out").rglob("0*.png"))) < PROMPTS // 4
        and first.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    below = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    for process in below:  # a failing machine takes Ray's processes with it
        if process.is_running():
            process.kill()
    first.wait()
    left = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("0*.png")}
    assert 0 < len(left) < PROMPTS
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made = json.loads(again.stdout.splitlines()[-1])
    files = sorted((tmp_path / "out").rglob("0*.png"))
    assert (
        [int(file.stem) for file in files] == list(range(PROMPTS))
        and made["pictures"] == PROMPTS
        and made["made"] == PROMPTS - len(left)
    )
    assert all(file.stat().st_mtime_ns == left[file] for file in left)
    assert all(Image.open(file).load() is not None for file in files)
