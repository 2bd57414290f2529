"""`glide clean` that is killed at any moment goes on where it was, to the same bytes."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from helpers.processes import ROOT, without_ray
from PIL import Image

from glide_ray import storage
from glide_ray.config.data import CleanConfig
from glide_ray.data.images import encode
from glide_ray.data.shards import MARKER, Sample, ShardError, write_shards
from glide_ray.data.sources import find_parts
from glide_ray.distributed.curation import run_folder
from glide_ray.distributed.curation.clean import clean
from glide_ray.errors import UserError

PARTS, EACH = 12, 6


def corpus(folder):
    """Shards of pictures; a sixth are copies of others, and some have no caption."""
    draws = np.random.default_rng(0)
    rough = [draws.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in range(PARTS * EACH)]
    samples = []
    for n in range(PARTS * EACH):
        drawn = Image.fromarray(rough[n - 7 if n % 6 == 5 and n > 6 else n])
        side = 64 + n % 6
        pixels = np.asarray(drawn.resize((side, side), Image.Resampling.BICUBIC))
        samples.append(
            Sample(f"{n:03d}", encode(pixels), "png", (f"drawing {n}" * (n % 9 > 0),), {})
        )
    write_shards(folder, samples, EACH)


def start(source, out, folder, *changes):
    """Start the command as a driver of this session's Ray, which takes less time than its own."""
    options = [word for change in ("per_shard=8", *changes) for word in ("--set", change)]
    return subprocess.Popen(
        [sys.executable, "-m", "glide_ray", "clean", source, "--out", out, *options],
        cwd=folder,
        env={
            **without_ray(),
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    return printed


def killed_at(process, written, count):
    """Kill the process once `written()` has reached `count`; whether it was still running."""
    while process.poll() is None:
        if written() >= count:
            process.kill()
            process.communicate()
            return True
        time.sleep(0.002)
    return False


def files_of(out):
    """Content of each file of a local folder or prefix, by its path in there."""
    if storage.is_remote(out):
        found = [file for file, _ in storage.list_states(out, ("",))]
    else:
        found = [str(file) for file in Path(out).rglob("*") if file.is_file()]
    return {file.removeprefix(out): storage.read(file) for file in found}


def check_kills(source, out, folder, kills, draw_wait, written, *changes):
    """Kill runs, each after a drawn number of files written, and compare what the last ones make.

    A killed run is resumed by the next, until one ends before its wait; then all begins anew.
    """
    expected, judged = files_of(out), None
    storage.remove_folder(out)
    while kills:
        process = start(source, out, folder, *changes)
        if not killed_at(process, written, written() + draw_wait()):
            assert process.returncode == 0, process.stdout.read()
            assert files_of(out) == expected
            storage.remove_folder(out)
            continue
        kills -= 1
        found = files_of(out)
        judged = [name for name in found if re.search(r"/judged/\d+\.parquet$", name)]
        if f"/{MARKER}" in found and "/index.json" not in found:
            with pytest.raises(ShardError, match="is unfinished"):
                find_parts(out)
    printed = finished(start(source, out, folder, *changes))
    assert files_of(out) == expected
    if judged and f"/{MARKER}" in found:  # only parts that were in flight are judged again
        before = re.search(rf"(\d+) of {PARTS} parts were judged before", printed)
        assert int(before.group(1)) >= len(judged)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "changes", [(), ("semantic=0.9", "baseline=image_based")], ids=["plain", "with features"]
)
def test_killed_runs_resume_and_write_the_same_bytes(changes, tmp_path):
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    corpus(source)
    if changes:
        changes += (f"reference={source}",)
    finished(start(source, out, tmp_path, *changes))
    assert not (tmp_path / "out" / ".work").exists()

    def written():
        return sum(len(names) for *_, names in os.walk(out))

    check_kills(source, out, tmp_path, 2, lambda: 12, written, *changes)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_random_kills_and_failing_s3_requests_change_no_byte(tmp_path, s3, s3_faults):
    source, out = f"{s3}/killed/in", f"{s3}/killed/out"
    corpus(source)
    finished(start(source, out, tmp_path))

    def written():
        return s3_faults.asked("PUT", "/killed/out/")

    total, draws = written(), random.Random(0)
    s3_faults.at_random(0.05)
    kills = int(os.environ.get("GLIDE_TEST_KILLS", "6"))
    check_kills(source, out, tmp_path, kills, lambda: draws.randrange(1, total // 2), written)


# -- one owner -------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path):
    return (
        f"{request.getfixturevalue('s3')}/{tmp_path.name}"
        if request.param == "s3"
        else str(tmp_path / "out")
    )


def test_a_second_run_into_a_folder_is_refused_while_the_first_works(out):
    with run_folder.own(out, "one") as first:
        for settings in ("one", "another"):
            with (
                pytest.raises(UserError, match="is being written by process"),
                run_folder.own(out, settings),
            ):
                pass
        assert first.check() is None


def test_what_an_ended_run_left_is_resumed_or_replaced(out):
    for settings in ("one", "one", "another"):
        with pytest.raises(ZeroDivisionError), run_folder.own(out, settings) as run:
            storage.put(b"", f"{run.work}/file")
            raise ZeroDivisionError
        assert storage.exists(f"{run.work}/file") and run.number in (0, 1, 2)
    assert sum("/file" in file for file in files_of(out)) == 1


def test_a_run_of_another_machine_is_alive_while_it_writes_beats(out, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT_SECONDS", 0.2)
    with run_folder.own(out, "one") as first:
        monkeypatch.setattr(run_folder, "_machine", lambda: "another")
        with (
            pytest.raises(UserError, match="is being written by process"),
            run_folder.own(out, "one"),
        ):
            pass
        first.stop()  # as if its machine had lost its power
        with run_folder.own(out, "one") as second:
            assert second.number == first.number + 1
            with pytest.raises(UserError, match="Another process has continued"):
                first.check()


@pytest.mark.usefixtures("ray_session")
def test_a_picture_or_rule_that_kills_its_worker_is_named_and_the_rest_is_cleaned(tmp_path):
    corpus(tmp_path / "in")

    def deadly(candidate):
        if candidate.key == "007":
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    out = tmp_path / "out"
    done = clean(str(tmp_path / "in"), str(out), CleanConfig(), {"against deadly": deadly})
    assert [re.sub(r".*/", "", fault) for fault in done.report.faults] == [
        "000001.tar killed its worker 3 times and was left out."
    ]
    assert done.read == (PARTS - 1) * EACH
