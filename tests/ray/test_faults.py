"""Faults during a long training run, after which it must continue by itself.

Hung workers, lost nodes, preemption, full disks and failing object stores.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import boto3
import numpy as np
import psutil
import pytest
import torch
from helpers import elastic_run
from helpers.checkpoints import keeper, write
from helpers.paths import ROOT
from helpers.processes import python_path, without_ray
from helpers.tiny import TINY_BASE, corpus_settings, tiny

from glide_ray import storage
from glide_ray.bench import faults
from glide_ray.cli.main import main
from glide_ray.distributed.cluster import ship_modules
from glide_ray.distributed.training import run as training
from glide_ray.distributed.training.callbacks import FailureHistory
from glide_ray.distributed.training.goodput import Goodput, Outage
from glide_ray.distributed.training.run import train
from glide_ray.distributed.training.worker import run_rank
from glide_ray.errors import UserError
from glide_ray.models.weights import load_weights
from glide_ray.train.checkpoint import CheckpointError, Checkpoints, fetch, verify
from glide_ray.train.checkpoint_writer import NONE, SAVE
from glide_ray.train.run_folder import read_metrics
from glide_ray.train.watchdog import Watchdog


def preset(corpus, *settings):
    return tiny(
        "base",
        *corpus_settings(corpus),
        "batch=8",
        "trackers=",
        "log_every=1",
        "precision=fp32",
        "micro_batch=8",  # or every start plans its memory
        *settings,
    )


def losses(path):
    return {row["step"]: row["loss"] for row in read_metrics(path) if "loss" in row}


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """The folder of a run, on the local disk or on S3."""
    return (
        str(tmp_path / "run")
        if request.param == "local"
        else f"{request.getfixturevalue('s3')}/{request.node.name}"
    )


def test_the_last_checkpoints_and_every_so_many_are_kept(place):
    made, told, committed = keeper(place, keep_last=2, keep_every=30)
    for step in range(10, 101, 10):
        made.save(step, write(b"%d" % step * 1000))
    assert made.finish() == 100 and committed == list(range(10, 101, 10)) and not told
    whole = Checkpoints(place).list_complete()
    assert [checkpoint.step for checkpoint in whole] == [30, 60, 90, 100]
    folder = fetch(whole[-1])
    assert (folder / "part.0.safetensors").read_bytes() == b"100" * 1000
    verify(folder)
    # No file of the deleted checkpoints is left.
    assert len({file.rpartition("/")[0] for file in storage.list_files(place, ("",))}) == 4


def test_what_a_killed_upload_has_left_is_no_checkpoint_and_is_swept_up(place, request):
    made, _, _ = keeper(place)
    made.save(10, write(b"whole"))
    made.finish()
    orphan = Checkpoints(place).folder(20, "killed")
    storage.put(b"a part without its siblings", f"{orphan}/part.1.safetensors")
    if storage.is_remote(place):
        client, key = (
            boto3.client("s3"),
            f"{orphan}/part.0.safetensors".removeprefix("s3://corpus/"),
        )
        upload = client.create_multipart_upload(Bucket="corpus", Key=key)["UploadId"]
        client.upload_part(
            Bucket="corpus", Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 6_000_000
        )
    assert [checkpoint.step for checkpoint in Checkpoints(place).list_complete()] == [10]
    assert Checkpoints(place).sweep() == [orphan]
    assert not list(storage.list_files(orphan, ("",))) and [
        checkpoint.step for checkpoint in Checkpoints(place).list_complete()
    ] == [10]
    if storage.is_remote(place):
        assert not client.list_multipart_uploads(Bucket="corpus", Prefix=key).get("Uploads")


def test_a_start_that_repeats_steps_keeps_its_own_checkpoints(place):
    earlier, _, _ = keeper(place, start="earlier")
    for step in (50, 60):
        earlier.save(step, write(b"old"))
    earlier.finish()
    again, told, committed = keeper(place, start="again", keep_last=2)
    for step in (10, 20, 30):
        again.save(step, write(b"new"))
    again.finish()
    assert committed == [10, 20, 30] and not told
    assert [entry.path[-8:] for entry in Checkpoints(place).list_complete()] == [
        "20-again",
        "30-again",
    ]


def test_a_checkpoint_that_is_set_aside_keeps_its_files_and_its_reason(place):
    made, _, _ = keeper(place)
    for step in (10, 20):
        made.save(step, write(b"%d" % step))
    made.finish()
    checkpoints = Checkpoints(place)
    first, second = checkpoints.list_complete()
    checkpoints.set_aside(second, "part.0.safetensors is damaged")
    assert checkpoints.list_complete() == [first] and checkpoints.sweep() == []
    assert storage.read(f"{second.path}/part.0.safetensors") == b"20"
    note = json.loads(storage.read(f"{second.path}/set_aside.json"))
    assert note["reason"] == "part.0.safetensors is damaged"
    storage.put(note["complete.json"].encode(), f"{second.path}/complete.json")
    assert checkpoints.list_complete() == [first, second]
    verify(fetch(second))


def test_a_checkpoint_is_due_once_its_minutes_have_passed(tmp_path):
    made, _, _ = keeper(tmp_path, minutes=0.5 / 60)
    for step in (10, 20):
        assert made.step() == NONE  # within half a second
        time.sleep(0.6)
        made.step()
        # The ranks agree through an exchange, whose result is read one step later.
        assert [made.step(), made.step()] == [SAVE, NONE]
        made.save(step, write(b"due"))
    made.finish()


def test_waiting_for_an_upload_gives_signs_of_life_and_is_reported(tmp_path, monkeypatch):
    made, told, _ = keeper(tmp_path)
    monkeypatch.setattr(
        storage, "digest", lambda path, slow=storage.digest: time.sleep(1) or slow(path)
    )
    beats = []
    made.save(10, write(b"slow"))
    made.save(20, write(b"next"), lambda: beats.append(time.monotonic()))
    # A part and its progress file take a second each; the watchdog never waits that long.
    assert len(beats) > 10 and np.diff(beats).max() < 1
    assert told == ["training waited 2 s for the upload of the checkpoint of step 10"]
    assert made.finish() == 20


def test_a_checkpoint_that_was_changed_since_is_found_out(tmp_path):
    made, _, _ = keeper(tmp_path)
    made.save(10, write(b"whole"))
    made.finish()
    path = fetch(Checkpoints(tmp_path).list_complete()[0]) / "part.0.safetensors"
    path.write_bytes(b"whale")
    with pytest.raises(CheckpointError, match="part.0.safetensors is damaged"):
        verify(path.parent)


def test_training_goes_on_while_a_part_is_uploaded(s3, s3_faults, monkeypatch):
    """Saving does not wait for a hanging upload; the next save does."""
    go, put = threading.Event(), storage.put

    def slow(data, path, sha256=None):
        assert go.wait(120)
        return put(data, path, sha256)

    monkeypatch.setattr(storage, "put", slow)
    made, _, committed = keeper(f"{s3}/background")
    began = time.monotonic()
    made.save(10, write(b"x" * 1000))
    for _ in range(20):
        made.step()
    assert time.monotonic() - began < 60 and not committed
    go.set()
    made.save(20, write(b"y" * 1000))
    made.finish()
    assert committed == [10, 20]


@pytest.mark.slow
def test_a_checkpoint_that_the_object_store_refuses_is_told_of_and_the_next_one_is_another_try(
    s3, s3_faults, monkeypatch
):
    # One retry only; more of them would wait for a minute.
    impatient = boto3.client("s3", config=boto3.session.Config(retries={"max_attempts": 1}))
    monkeypatch.setattr("glide_ray.s3.client", lambda: impatient)
    made, told, committed = keeper(f"{s3}/refused")
    s3_faults.answer_503("000000010-start/part")
    for step in (10, 20):
        made.save(step, write(b"x" * 1000))
    assert made.finish() == 20 and committed == [20]
    refused = [text for text in told if not text.startswith("training waited")]
    assert (
        len(refused) == 1
        and "checkpoint of step 10 could not be written" in refused[0]
        and "next checkpoint is tried" in refused[0]
    )
    assert [checkpoint.step for checkpoint in Checkpoints(f"{s3}/refused").list_complete()] == [20]
    assert not list(storage.list_files(f"{s3}/refused/checkpoints/000000010-start", ("",)))
    s3_faults.answer_503("000000030-start/complete.json")
    made.save(30, write(b"x" * 1000))
    assert made.finish() == 20 and "checkpoint of step 30 could not be completed" in told[-1]


FULL_DISK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.checkpoints import Checkpoints, keeper, write
made, told, committed = keeper(sys.argv[2], keep_last=1)
for step, size in ((1, 400_000), (2, 3_000_000), (3, 400_000)):
    made.save(step, write(b"x" * size))
print(made.finish(), committed, told, \
[checkpoint.step for checkpoint in Checkpoints(sys.argv[2]).list_complete()])
print(sorted(path.name for path in (Path(sys.argv[2]) / "checkpoints").iterdir()))
"""


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path):
    """On a file system of 1 MiB, in a separate mount namespace."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "script.py").write_text(FULL_DISK)
    mount = (
        f"mount -t tmpfs -o size=1m none {tmp_path}/disk && exec {sys.executable} "
        f"{tmp_path}/script.py {ROOT}/tests {tmp_path}/disk"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount], capture_output=True, text=True, check=False
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount namespace may be made here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    result, left = done.stdout.splitlines()
    assert result.startswith(
        "3 [1, 3] ['The checkpoint of step 2 could not be written: No space left on device"
    ) and result.endswith("[3]")
    assert left == "['000000003-start']"


# -- before step 1 ---------------------------------------------------------------------------------


def test_storage_that_cannot_be_written_is_found_before_anything_starts(drawn_corpus, tmp_path, s3):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "run", "s3://no-such-bucket/run"):
        with pytest.raises(
            UserError,
            match=f"Nothing can be written to {out} .*; "
            "give another folder, or the rights to this one",
        ):
            train(preset(drawn_corpus, "steps=2"), out, progress=False)
        assert not workers()


# -- workers ---------------------------------------------------------------------------------------


def test_a_process_that_makes_no_progress_is_told_of_and_ended():
    said, ended = [], threading.Event()
    watchdog = Watchdog(2, said.append, ended.set)
    assert not ended.wait(3)  # no deadline before the first beat
    for step in range(4):
        watchdog.beat(f"step {step}")
        assert not ended.wait(0.75)
    assert ended.wait(60) and said == ["step 3 has taken more than 2 s"]
    after = Watchdog(1, said.append, ended.clear)
    after.beat("step 4")
    after.rest()
    time.sleep(1.5)
    after.beat("step 5")
    after.close()
    time.sleep(1.5)
    assert ended.is_set() and len(said) == 1


# Each kill costs some 15 seconds until the workers are back.
KILLS = int(os.environ.get("GLIDE_TEST_KILLS", 1))
EVERY = 4  # steps between checkpoints


def workers():
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "TrainWorker" in " ".join(process.cmdline())
    ]


def strike(out, steps, draws, struck):
    """Send SIGKILL, the last time SIGSTOP, to a random worker at each of the steps.

    Waits each time until the run has resumed after the previous signal.
    """

    def read(name):
        return (out / name).read_text() if (out / name).exists() else ""

    lines = 0
    for number, target in enumerate(steps):
        while True:
            # Metrics of earlier steps may arrive late, so only the log shows that the run resumed.
            resumed = read("events.log").count("training resumes with") == number
            written = [json.loads(line)["step"] for line in read("metrics.jsonl").splitlines()]
            if resumed and len(written) > lines and written[-1] >= target and (found := workers()):
                break
            time.sleep(0.1)
        lines = len(written) + 1
        victim = found[draws.integers(len(found))]
        victim.send_signal(signal.SIGKILL if number < len(steps) - 1 else signal.SIGSTOP)
        struck.append(victim.pid)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_that_are_killed_or_hang_at_random_steps_change_nothing_but_the_time(
    drawn_corpus, s3, tmp_path
):
    """Every loss equals that of the undisturbed run, so every batch is used exactly once."""
    settings = [
        "steps=40",
        "evaluate_every=40",
        f"checkpoint_every={EVERY}",
        "workers=2",
        "stall_seconds=8",
        "zero_stage=2",
        "keep_every=20",
    ]
    undisturbed = train(preset(drawn_corpus, *settings), tmp_path / "run", progress=False)
    draws, struck, out = np.random.default_rng(0), [], tmp_path / "struck"
    steps = np.sort(draws.choice(np.arange(EVERY + 1, 24), KILLS + 1, replace=False))
    striker = threading.Thread(target=strike, args=(out, steps, draws, struck), daemon=True)
    striker.start()
    result = train(preset(drawn_corpus, *settings), out, progress=False)
    striker.join(5)
    assert len(struck) == KILLS + 1 and not any(psutil.pid_exists(pid) for pid in struck)

    log = (out / "events.log").read_text()
    assert re.search(
        r"rank \d hangs: (step \d+|the last checkpoint) has taken more than 8 s; "
        r"all workers restart",
        log,
    )
    assert log.count("was lost: ") == KILLS + 1
    costs = [
        int(again)
        for again in re.findall(
            r"training resumes with 2 workers from step \d+: (\d+) steps? repeated, "
            r"\d+ s without a step",
            log,
        )
    ]
    assert len(costs) == KILLS + 1
    there, here = losses(undisturbed.metrics), losses(result.metrics)
    assert sorted(here) == list(range(1, 41)) and [
        here[step] for step in sorted(there)
    ] == pytest.approx([there[step] for step in sorted(there)], rel=1e-4)
    assert result.last_held_out == pytest.approx(undisturbed.last_held_out, rel=1e-4)
    # Steps since the last checkpoint are repeated; one still being written at the kill is lost.
    again = sum('"loss"' in line for line in (out / "metrics.jsonl").read_text().splitlines()) - 40
    assert again <= (KILLS + 1) * 2 * EVERY and max(costs) <= 2 * EVERY


def spoil(path):
    """Change the last byte of an object and keep its metadata, which has the original checksum."""
    client, (bucket, _, key) = boto3.client("s3"), path.removeprefix("s3://").partition("/")
    there = client.get_object(Bucket=bucket, Key=key)
    client.put_object(
        Bucket=bucket, Key=key, Body=there["Body"].read()[:-1] + b"?", Metadata=there["Metadata"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_on_s3_goes_on_with_other_workers_another_stage_and_another_learning_rate(
    drawn_corpus, s3, s3_faults, tmp_path
):
    """S3 answers 503 and resets connections while checkpoints are written; the last is damaged."""
    out = f"{s3}/run"
    settings = ["steps=4", "evaluate_every=4", "checkpoint_every=2"]
    s3_faults.answer_503("run/checkpoints", times=3)
    s3_faults.reset("run/checkpoints", times=2)
    train(preset(drawn_corpus, *settings, "workers=2", "zero_stage=2"), out, progress=False)
    assert s3_faults.befallen["503"] == 3 and s3_faults.befallen["reset"] == 2
    spoil(f"{Checkpoints(out).list_complete()[-1].path}/part.0.safetensors")
    result = train(
        preset(
            drawn_corpus,
            *settings,
            "steps=6",
            "workers=1",
            "zero_stage=3",
            "learning_rate=1e-3",
            "micro_batch=3",
        ),
        out,
        progress=False,
    )
    assert result.weights == f"{out}/weights.safetensors" and sorted(losses(result.metrics)) == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    log = storage.read(f"{out}/events.log").decode()
    assert re.search(r"train.learning_rate changes from \S+ to 0.001", log)
    assert re.search(r"the checkpoint of step 4 is set aside: .*part.0.safetensors is damaged", log)
    assert [made.step for made in Checkpoints(out).list_complete()] == [4, 6]
    assert main(["export", out, "--out", str(tmp_path / "w.safetensors")]) == 0
    exported, written = (
        load_weights(tmp_path / "w.safetensors")[1],
        load_weights(storage.fetch(result.weights))[1],
    )
    assert all(torch.equal(exported[name], tensor) for name, tensor in written.items())


# -- errors ----------------------------------------------------------------------------------------


def test_a_run_ends_after_too_many_failures_within_an_hour():
    history = FailureHistory(max_failures=2)
    lost = "the worker of rank 0 was lost"
    minutes = [0, 50, 70, 125, 126]  # three within an hour at the end only
    found = [history.verdict(7, lost, False, 60 * minute) for minute in minutes]
    assert found[:4] == [None] * 4
    assert found[4].startswith("The workers have failed 3 times within 1 h, more than train.max")
    assert FailureHistory(0).verdict(1, lost, False, 0) and not any(
        FailureHistory(-1).verdict(1, lost, False, second) for second in range(100)
    )


def test_a_run_ends_when_two_starts_raise_the_same_error_at_one_step():
    history = FailureHistory(max_failures=20)
    error = "rank 0 failed: KeyError: 'x'"
    assert history.verdict(3, error, True, 0) is None
    assert history.verdict(3, "the worker of rank 0 was lost", False, 1) is None
    assert history.verdict(3, error, True, 2) is None  # not in a row
    assert history.verdict(4, error, True, 3) is None  # a step was made
    assert history.verdict(4, error, True, 4) == (
        f"Two starts have failed after step 4 with the same error: {error}"
    )


def test_goodput_counts_the_seconds_of_the_steps_that_were_kept():
    goodput = Goodput()
    for last in (10, 20, 30):
        goodput.add_steps(last, 5.0)
    assert goodput.share(20) == 0.75
    goodput.rewind(20)  # steps 21 to 30 are made again
    goodput.add_steps(30, 6.0)
    goodput.outages += [Outage("worker lost", 10, 1, 8), Outage("worker lost", 5, 2, 10)]
    goodput.outages.append(Outage("nodes returned", 1, 0, 7))
    assert goodput.sentence(32) == (
        "goodput 50%: 16 s in steps that were kept, of 32 s; worker lost 2 times: 1.5 s to detect, "
        "9.0 s to recover, 15 steps repeated; nodes returned 1 time: 0.0 s to detect, "
        "7.0 s to recover, 1 step repeated"
    )


def starved(settings):
    """A rank whose GPU has memory for two images."""
    from glide_ray.train import loop

    def step(self, batches, number, whole=loop.Trainer.step):
        if self.batch_split.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batches, number)

    loop.Trainer.step = step
    run_rank(settings)


def broken(settings):
    """A rank that fails in the third step of every start."""
    from glide_ray.train import loop

    def step(self, batches, number, whole=loop.Trainer.step):
        return whole(self, batches, number) if number < 3 else {}["a key"]

    loop.Trainer.step = step
    run_rank(settings)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_lack_of_gpu_memory_halves_the_micro_batch(drawn_corpus, tmp_path, monkeypatch):
    ship_modules([starved])
    monkeypatch.setattr(training, "run_rank", starved)
    settings = preset(drawn_corpus, "workers=1", "steps=4", "micro_batch=8")
    done = train(settings, tmp_path / "run", progress=False)
    assert done.steps == 4 and (tmp_path / "run" / "weights.safetensors").exists()
    log = (tmp_path / "run" / "events.log").read_text()
    found = re.findall(r"out of memory.* The next start has micro-batches of (\d) images", log)
    assert found == ["4", "2"]
    assert re.search(r"goodput \d+%: .*; out of memory 2 times: .* 0 steps repeated$", log)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_error_of_two_starts_ends_the_run_with_one_sentence(drawn_corpus, tmp_path, monkeypatch):
    ship_modules([broken])
    monkeypatch.setattr(training, "run_rank", broken)
    settings = preset(drawn_corpus, "workers=1", "steps=4")
    sentence = "failed after step 2 with the same error: .*KeyError: .a key.*failure.log"
    with pytest.raises(UserError, match=sentence):
        train(settings, tmp_path / "run", progress=False)
    assert "Traceback" in (tmp_path / "run" / "failure.log").read_text()


@pytest.mark.slow
def test_the_benchmark_of_faults_kills_a_worker_and_measures_the_recovery(
    drawn_corpus, monkeypatch
):
    monkeypatch.setattr(faults, "EVERY_SECONDS", 5.0)
    small = (*TINY_BASE, "data.min_size=16", "data.crop=none")
    monkeypatch.setattr(faults, "SETTINGS", (*faults.SETTINGS, *small))
    found = faults.bench_faults(str(drawn_corpus / "train"), str(drawn_corpus / "held_out"), 8.0)
    assert found["kills"] == 1 and "worker lost 1 time: " in found["log"]
    assert 0 < found["goodput"] < 1 and 1 < found["kill_to_step_s"][0] < found["seconds"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_shrinks_with_its_nodes_and_grows_again_and_is_the_same_run(drawn_corpus, tmp_path):
    """One node is lost, one added, one drained; all losses equal those of an undisturbed run."""
    out = tmp_path / "run"
    environment = without_ray() | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-m", elastic_run.__name__, str(drawn_corpus), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = (out / "events.log").read_text()
    assert (
        "was lost: " in log and "a node is about to be removed; writing a checkpoint at step" in log
    )
    assert re.search(
        # Growth repeats one step at most; the checkpoints are ten steps apart.
        r"resumes with 1 worker from step \d+: .*writing a checkpoint.*"
        r"resumes with 2 workers from step \d+: [01] steps? repeated",
        log,
        re.DOTALL,
    )
    here = losses(out / "metrics.jsonl")
    lines = [
        json.loads(line)["step"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert (
        sorted(here) == list(range(1, elastic_run.ELASTIC_STEPS + 1))
        and len(lines) <= elastic_run.ELASTIC_STEPS + 4 * 20
    )
    there = losses(
        train(
            elastic_run.settings(drawn_corpus, "workers=1", "steps=100"),
            tmp_path / "undisturbed",
            progress=False,
        ).metrics
    )
    print(max((abs(here[step] / there[step] - 1), step) for step in there))
    assert [here[step] for step in sorted(there)] == pytest.approx(
        [there[step] for step in sorted(there)], rel=1e-3
    )
