"""Whole training runs under Ray Train: two workers, interruption, resumption, invalid settings."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.drawings import drawn_samples
from helpers.tiny import TINY_BASE, corpus_settings, tiny, tiny_clip
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glide_ray.data.sources import columns
from glide_ray.data.transforms import Collate, collate_batches
from glide_ray.distributed.training.run import train
from glide_ray.distributed.training.worker import _clip_batch_note
from glide_ray.errors import UserError
from glide_ray.models.weights import load_model
from glide_ray.sampling.cascade import Cascade
from glide_ray.train.batch_split import BatchSplit
from glide_ray.train.checkpoint import Checkpoints
from glide_ray.train.partition import CheckpointReader
from glide_ray.train.run_folder import read_metrics


def preset(corpus, *settings):
    return tiny(
        "base",
        *corpus_settings(corpus),
        "batch=8",
        "steps=4",
        "log_every=2",
        "evaluate_every=2",
        "checkpoint_every=2",
        *settings,
    )


@pytest.mark.usefixtures("ray_session")
def test_a_run_on_two_workers_makes_weights_and_metrics_and_is_not_made_twice(
    drawn_corpus, tmp_path
):
    settings = preset(
        drawn_corpus, "sample_every=2", "sample_prompts=a red ellipse; a blue rectangle, large"
    )
    result = train(settings, tmp_path / "run", progress=False)
    model, config = load_model(result.weights)
    assert config == settings.model and result.steps == 4 and result.rows.kept >= 96
    rows = read_metrics(result.metrics)
    assert [(row["step"], "held_out" in row) for row in rows if "average_held_out" not in row] == [
        (0, True),
        (2, False),
        (2, True),
        (4, False),
        (4, True),
    ]
    speeds = [row for row in rows if "images_per_s" in row]
    assert all(
        0 < row["share_of_peak"] < 1
        and row["tflop_per_s"] > 0
        and any(name.startswith("mse_q") for name in row)
        for row in speeds
    )
    # The run evaluates checkpoints in the background: sample grid and held-out loss of the EMA. The
    # last checkpoint is always among them.
    assert Image.open(tmp_path / "run" / "samples" / "000000004.png").size[0] > 300 and rows[-1][
        "average_held_out"
    ] == pytest.approx(1, abs=0.1)
    assert (
        "nano-base on 2 workers (CPU), fp32, ZeRO-2, batch 8"
        in (tmp_path / "run" / "events.log").read_text()
    )
    events = EventAccumulator(
        str(tmp_path / "run" / "tensorboard"), {"scalars": 0, "images": 0}
    ).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4] and 4 in [
        event.step for event in events.Images("samples")
    ]
    written = os.stat(result.weights).st_mtime_ns
    log = (tmp_path / "run" / "events.log").read_text()
    again = train(settings, tmp_path / "run", progress=False)
    assert (
        again.last_held_out == result.last_held_out
        and os.stat(result.weights).st_mtime_ns == written
    )
    assert (tmp_path / "run" / "events.log").read_text() == log
    for other in ("learning_rate=1", "model.unet.dropout=0.5", "data.min_size=20"):
        with pytest.raises(
            UserError, match=f"other settings: (train.)?{other.partition('=')[0]} is"
        ):
            train(preset(drawn_corpus, other), tmp_path / "run", progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_noised_clip_trains_on_two_workers(drawn_corpus, tmp_path):
    settings = tiny_clip(
        f"data.corpus={drawn_corpus / 'train'}",
        f"data.held_out={drawn_corpus / 'held_out'}",
        "batch=8",
        "micro_batch=4",
        "steps=4",
        "log_every=2",
        "evaluate_every=4",
        "checkpoint_every=4",
        "zero_stage=3",
        "model.clip.scale=1",
    )
    result = train(settings, tmp_path / "run", progress=False)
    model, config = load_model(result.weights)
    assert config == settings.model and all(
        "accuracy" in row or "held_out_accuracy" in row for row in read_metrics(result.metrics)
    )
    assert (
        "CLIP contrasts each picture's caption with 7 others"
        in (tmp_path / "run" / "events.log").read_text()
    )
    loss = read_metrics(result.metrics)[1]["loss"]
    # Such flat logits amount to a guess among all 8 captions, not among the 4 of each worker.
    assert loss == pytest.approx(math.log(8), abs=0.4)


def test_every_rank_gets_as_many_batches_whichever_pictures_cannot_be_decoded(drawn_corpus):
    good, broken = (
        columns(enumerate(drawn_samples(2))),
        columns((n, replace(sample, image=b"?")) for n, sample in enumerate(drawn_samples(3))),
    )
    settings = preset(drawn_corpus)
    for given in ([broken, broken, good, broken], [good, broken], [broken, good]):
        batches = list(
            collate_batches(iter(given), Collate(settings.model, settings.data), settings, 0)
        )
        assert [len(batch.image) for batch in batches] == [len(rows["id"]) for rows in given]
        assert {tuple(batch.rows.unique().tolist()) for batch in batches} == {(0, 1)}
    with pytest.raises(
        UserError,
        match="No picture of the last 2 batches of the corpus .* can be decoded; "
        "leave those that are broken out with `glide clean`",
    ):
        list(
            collate_batches(
                iter([broken, broken]), Collate(settings.model, settings.data), settings, 0
            )
        )


def test_weights_to_be_fine_tuned_are_asked_for_where_there_is_no_checkpoint_yet(
    drawn_corpus, tmp_path, monkeypatch
):
    class Started(Exception):
        pass

    def start(cpus):
        raise Started

    monkeypatch.setattr("glide_ray.distributed.training.run.connect", start)
    settings = preset(drawn_corpus, f"start_from={tmp_path / 'gone.safetensors'}")
    with pytest.raises(UserError, match="no file"):
        train(settings, tmp_path / "run", progress=False)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.complete(checkpoints.folder(2, "x"), {})
    with pytest.raises(Started):
        train(settings, tmp_path / "run", progress=False)


@pytest.mark.usefixtures("ray_session")
def test_a_run_on_two_workers_makes_an_adapter(drawn_corpus, tmp_path, tiny_weights):
    settings = preset(
        drawn_corpus, "lora_rank=2", f"start_from={tiny_weights['base']}", "sample_every=2"
    )
    result = train(settings, tmp_path / "run", progress=False)
    assert result.weights == f"{tmp_path}/run/adapter.safetensors"
    cascade = Cascade.load(tiny_weights["base"], loras=[result.weights])
    assert cascade.base.config.name == "nano-base"
    assert read_metrics(result.metrics)[-1]["average_held_out"] < 10
    assert (tmp_path / "run" / "samples" / "000000004.png").exists()
    with CheckpointReader(Path(Checkpoints(tmp_path / "run").list_complete()[-1].path)) as parts:
        assert all(".lora." in name for name in parts.shapes)


@pytest.mark.parametrize(
    "share, others",
    [(BatchSplit(64, 4, 0, 16), 63), (BatchSplit(64, 4, 0, 8), 31), (BatchSplit(8, 1, 0, 64), 7)],
)
def test_a_clip_run_says_how_many_captions_a_picture_is_contrasted_with(share, others):
    assert f"with {others} others" in _clip_batch_note(share)


@pytest.mark.usefixtures("ray_session")
def test_what_the_user_can_mend_is_said_before_or_instead_of_training(drawn_corpus, tmp_path):
    with pytest.raises(UserError, match="There is no corpus .*empty"):
        train(
            preset(drawn_corpus, f"data.corpus={tmp_path / 'empty'}"),
            tmp_path / "a",
            progress=False,
        )
    with pytest.raises(UserError, match="40 workers and the data stream need 41 CPUs"):
        train(preset(drawn_corpus, "workers=40", "batch=40"), tmp_path / "b", progress=False)
    with pytest.raises(UserError, match="fp16 needs a GPU"):  # raised in the workers
        train(preset(drawn_corpus, "precision=fp16", "workers=1"), tmp_path / "c", progress=False)
    assert not (tmp_path / "c" / "weights.safetensors").exists()


@pytest.mark.usefixtures("ray_session")
def test_workers_that_a_cluster_lacks_are_waited_for_and_then_given_up(
    drawn_corpus, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "glide_ray")
    monkeypatch.setenv("RAY_ADDRESS", "the cluster that the session has joined")
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"40 workers and the data stream need 41 CPUs, and the cluster has \d+. "
        r"They were not added within 2 s. Add nodes",
    ):
        train(
            preset(drawn_corpus, "workers=40", "batch=40", "wait_seconds=2"),
            tmp_path / "run",
            progress=False,
        )
    assert 2 < time.monotonic() - began < 60
    assert "Waiting for at most 2 s (train.wait_seconds)" in caplog.text
    assert not (tmp_path / "run" / "preset.json").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_or_interrupted_goes_on_from_its_checkpoint_with_the_same_command(
    drawn_corpus, tmp_path
):
    out = tmp_path / "run"
    settings = [
        *TINY_BASE,
        *corpus_settings(drawn_corpus),
        "batch=4",
        "micro_batch=4",  # or every start plans its memory
        "workers=1",
        "steps=2000",
        "log_every=1",
        "evaluate_every=2000",
        "checkpoint_every=10",
    ]
    command = [
        os.path.join(os.path.dirname(sys.executable), "glide"),
        "train",
        "nano-base",
        "--out",
        str(out),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def start(*changes):
        flags = [flag for setting in (*settings, *changes) for flag in ("--set", setting)]
        return subprocess.Popen(
            [*command, *flags],
            start_new_session=True,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def checkpoints():
        return [made.step for made in Checkpoints(out).list_complete()]

    def wait_until(happened):
        deadline = time.monotonic() + 240
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def resumed_after_a_checkpoint(line, at_least):
        """Whether the line is the first step after a checkpoint, and later than `at_least`.

        The checkpoint may be a later one than expected, since workers outlive the driver by
        seconds.
        """
        step = json.loads(lines()[line])["step"]
        return step > at_least and step % 10 == 1

    def lines():
        return (out / "metrics.jsonl").read_text().splitlines()

    first = start()
    wait_until(checkpoints)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(20)
    kept, before = max(checkpoints()), len(lines())
    assert kept < 2000 and not (out / "weights.safetensors").exists()

    # Both signals end a run after a checkpoint of its last step: nothing is made again. Ctrl-C
    # reaches all processes of the terminal.
    for number, send in ((signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)):
        stopped = start("checkpoint_every=2000")
        wait_until(lambda before=before: len(lines()) > before + 3)
        send(stopped.pid, number)
        output, _ = stopped.communicate(timeout=180)
        assert stopped.returncode == 128 + number, output
        assert "stopping after a checkpoint" in output
        assert "run the same command again" in output
        assert "Traceback" not in output and "SIGTERM" not in output
        if number == signal.SIGINT:
            assert resumed_after_a_checkpoint(before, kept)
        else:
            assert json.loads(lines()[before])["step"] == kept + 1
        kept, before = max(checkpoints()), len(lines())
        assert json.loads(lines()[-1])["step"] == kept

    last = start(f"steps={kept + 20}")
    output, _ = last.communicate(timeout=240)
    assert last.returncode == 0, output
    assert json.loads(lines()[before])["step"] == kept + 1
    assert (out / "weights.safetensors").exists()
