"""Whole runs under Ray Train: two workers, interrupted, continued, and what is refused."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import TINY_BASE, tiny, tiny_clip
from glide_ray.config import UserError
from glide_ray.distributed.journal import read_metrics
from glide_ray.distributed.train import train
from glide_ray.models.weights import load_model


def preset(corpus, *settings):
    return tiny("base", f"data.corpus={corpus / 'train'}", f"data.held_out={corpus / 'held_out'}", "data.min_size=16", "batch=8",
                "steps=4", "log_every=2", "evaluate_every=2", "checkpoint_every=2", *settings)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_on_two_workers_makes_weights_and_metrics_and_is_not_made_twice(drawn_corpus, tmp_path):
    settings = preset(drawn_corpus)
    result = train(settings, tmp_path / "run", progress=False)
    model, config = load_model(result.weights)
    assert config == settings.model and result.steps == 4 and result.rows.kept >= 96
    assert [(row["step"], "held_out" in row) for row in read_metrics(result.metrics)] == [
        (0, True), (2, False), (2, True), (4, False), (4, True)]
    written = os.stat(result.weights).st_mtime_ns
    began = time.monotonic()
    again = train(settings, tmp_path / "run", progress=False)
    assert again.last_held_out == result.last_held_out and os.stat(result.weights).st_mtime_ns == written
    assert time.monotonic() - began < 5
    with pytest.raises(UserError, match="other settings: train.learning_rate is"):
        train(preset(drawn_corpus, "learning_rate=1"), tmp_path / "run", progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_noised_clip_trains_on_two_workers(drawn_corpus, tmp_path):
    settings = tiny_clip(f"data.corpus={drawn_corpus / 'train'}", f"data.held_out={drawn_corpus / 'held_out'}", "batch=8", "steps=4",
                         "log_every=2", "evaluate_every=4", "checkpoint_every=4", "zero_stage=3", "model.clip.scale=1")
    result = train(settings, tmp_path / "run", progress=False)
    model, config = load_model(result.weights)
    assert config == settings.model and all("accuracy" in row or "held_out_accuracy" in row for row in read_metrics(result.metrics))
    loss = read_metrics(result.metrics)[1]["loss"]
    assert loss == pytest.approx(math.log(8), abs=0.4)      # with logits this flat a guess among 8 captions, not the 4 on each worker


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_the_user_can_mend_is_said_before_or_instead_of_training(drawn_corpus, tmp_path):
    with pytest.raises(UserError, match="corpus .*empty is empty"):
        train(preset(drawn_corpus, f"data.corpus={tmp_path / 'empty'}"), tmp_path / "a", progress=False)
    with pytest.raises(UserError, match="40 workers and the data stream want 41 CPUs"):
        train(preset(drawn_corpus, "workers=40", "batch=40"), tmp_path / "b", progress=False)
    with pytest.raises(UserError, match="fp16 needs a GPU"):       # found in the workers
        train(preset(drawn_corpus, "precision=fp16"), tmp_path / "c", progress=False)
    assert not (tmp_path / "c" / "weights.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_or_interrupted_goes_on_from_its_checkpoint_with_the_same_command(drawn_corpus, tmp_path):
    out = tmp_path / "run"
    settings = [*TINY_BASE, f"data.corpus={drawn_corpus / 'train'}", f"data.held_out={drawn_corpus / 'held_out'}", "data.min_size=16",
                "batch=4", "workers=1", "steps=2000", "log_every=1", "evaluate_every=2000", "checkpoint_every=10"]
    command = [os.path.join(os.path.dirname(sys.executable), "glide"), "train", "nano-base", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def start(*changes):
        flags = [flag for setting in (*settings, *changes) for flag in ("--set", setting)]
        return subprocess.Popen([*command, *flags], start_new_session=True, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def checkpoints():
        """Steps of the checkpoints that Ray has committed."""
        try:
            snapshot = json.loads((out / "ray" / "checkpoint_manager_snapshot.json").read_text())
            return [made["metrics"]["step"] for made in snapshot["checkpoint_results"]]
        except (FileNotFoundError, ValueError, KeyError):
            return []

    def wait_until(happened):
        deadline = time.monotonic() + 150
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.2)

    def resumed_after_a_checkpoint(line, at_least):
        """What Ray's controller commits in the seconds by which it outlives the driver counts too."""
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

    second = start()
    wait_until(lambda: len(lines()) > before)
    os.kill(second.pid, signal.SIGINT)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "goes on from here" in output and "Traceback" not in output, output
    assert resumed_after_a_checkpoint(before, kept)

    kept, before = max(checkpoints()), len(lines())
    third = start(f"steps={max(row['step'] for row in read_metrics(out / 'metrics.jsonl')) + 20}")
    output, _ = third.communicate(timeout=240)
    assert third.returncode == 0, output
    assert resumed_after_a_checkpoint(before, kept)
    assert (out / "weights.safetensors").exists()
