"""A training run in one process, without Ray and DeepSpeed: results, interruption, resumption."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny import TINY_BASE, corpus_settings, tiny, with_nan_for
from helpers.training import batch, epochs, run
from helpers.training import preset as training_preset

from glide_ray.cli.main import main
from glide_ray.data.shards import ShardError
from glide_ray.data.sources import folder_name
from glide_ray.errors import ConfigError, UserError
from glide_ray.models.weights import load_weights, save_weights
from glide_ray.precision import single_precision
from glide_ray.train.checkpoint import CheckpointError, Checkpoints
from glide_ray.train.loop import Trainer
from glide_ray.train.partition import CheckpointReader
from glide_ray.train.run_folder import go_back, read_metrics
from glide_ray.train.run_log import move_bar, steps_bar
from glide_ray.train.single import SingleTrainer
from glide_ray.train.without_ray import MemoryCorpus, train_alone


def preset(corpus, *settings):
    return tiny(
        "base",
        *corpus_settings(corpus),
        "batch=8",
        "workers=1",
        "steps=6",
        "log_every=1",
        "evaluate_every=6",
        "checkpoint_every=3",
        "trackers=",
        "precision=fp32",
        "model.unet.dropout=0.1",
        *settings,
    )


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


# -- computation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_single_process_trains_like_one_deepspeed_rank(precision):
    settings = training_preset(f"precision={precision}")
    single, sharded = run(SingleTrainer(settings)), run(Trainer(settings))
    expected = [row["loss"] for row in sharded[0] if "loss" in row]
    assert [row["loss"] for row in single[0] if "loss" in row] == pytest.approx(
        expected, rel=1e-5 if precision == "fp32" else 2e-3
    )
    # In 16 bits, DeepSpeed's float32 masters start from the rounded weights.
    tolerance = 2e-5 if precision == "fp32" else 4e-3
    assert all(
        torch.allclose(single[2][name], average, atol=tolerance)
        for name, average in sharded[2].items()
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_text_rate_of_zero_freezes_the_text_transformer(stage):
    settings = training_preset(
        "text_rate=0", "weight_decay=0.1", "timestep_power=1", f"zero_stage={stage}"
    )
    single, sharded = SingleTrainer(settings), Trainer(settings)
    before = dict(zip(single.names, (own.detach().clone() for own in single.masters), strict=True))
    kept, found, expected = dict(before), run(single)[2], run(sharded)[2]
    assert all(
        torch.allclose(found[name], average, atol=2e-5) for name, average in expected.items()
    )
    changed = {name for name, average in found.items() if not torch.equal(average, kept[name])}
    assert changed == {name for name in kept if not name.startswith("text.")}


def test_a_text_rate_of_one_half_halves_the_text_transformers_learning_rate():
    whole, half = SingleTrainer(training_preset()), SingleTrainer(training_preset("text_rate=0.5"))
    before = whole.masters[0].detach().clone()
    assert whole.names[0] == "text.position"
    for trainer in (whole, half):
        trainer.step(epochs(0, 0), 3)
    assert torch.allclose(half.masters[0] - before, (whole.masters[0] - before) / 2, atol=1e-8)
    last = whole.names.index("out.bias")
    assert torch.equal(half.masters[last], whole.masters[last])


def test_micro_batches_add_up_to_the_same_step():
    whole, parts = (
        run(SingleTrainer(training_preset())),
        run(SingleTrainer(training_preset("micro_batch=2")), batches=_halves),
    )
    assert [row["loss"] for row in parts[0] if "loss" in row] == pytest.approx(
        [row["loss"] for row in whole[0] if "loss" in row], rel=1e-5
    )


def _halves(epoch, rows):
    return (part for pair in epochs(epoch, rows) for part in (pair[:2], pair[2:]))


def test_checkpoints_are_interchangeable_between_one_process_and_deepspeed(tmp_path):
    settings = training_preset()
    _, saved, expected = run(SingleTrainer(settings), tmp_path)
    resumed = Trainer(settings)
    resumed.load(saved[0])
    assert resumed.progress.step == 2
    found = run(resumed)[2]
    assert all(
        torch.allclose(found[name], average, atol=2e-5) for name, average in expected.items()
    )


def test_nonfinite_gradients_skip_the_step_and_end_the_run_if_they_persist():
    trainer = SingleTrainer(training_preset())
    before = [own.detach().clone() for own in trainer.masters]
    broken = iter([batch(0, broken=True) for _ in range(20)])
    for number in range(1, 20):
        trainer.step(broken, number)
    assert all(torch.equal(own, kept) for own, kept in zip(trainer.masters, before, strict=True))
    with pytest.raises(UserError, match="20 steps in a row.*lower train.learning_rate"):
        trainer.step(broken, 20)


def test_fp16_is_refused_and_auto_is_a_supported_precision():
    with pytest.raises(ConfigError, match="use bf16, fp32 or auto"):
        single_precision("fp16", "cpu")
    assert (
        single_precision("auto", "cpu") in ("bf16", "fp32")
        and single_precision("auto", "cuda") == "bf16"
    )


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_writes_weights_metrics_and_events_and_is_not_repeated(drawn_corpus, tmp_path):
    settings = preset(drawn_corpus, "sample_every=3", "sample_prompts=a red ellipse")
    done = train_alone(settings, tmp_path / "run", progress=False)
    assert done.finished and done.step == 6 and len(losses(tmp_path / "run")) == 6
    assert load_weights(done.weights)[0] == settings.model
    assert (tmp_path / "run" / "samples" / "000000003.png").exists()
    assert "96 kept" in (tmp_path / "run" / "events.log").read_text()
    assert train_alone(settings, tmp_path / "run", progress=False).images_per_s == 0.0


def test_samples_with_nan_are_an_event_and_training_goes_on(drawn_corpus, tmp_path):
    start, model = tmp_path / "start.safetensors", tiny().model
    save_weights(start, with_nan_for("apple", model), model)
    more = [f"start_from={start}", "text_rate=0", "sample_every=3", "sample_prompts=apple"]
    result = train_alone(preset(drawn_corpus, *more), tmp_path / "run")
    assert result.step == 6 and not (tmp_path / "run" / "samples").exists()
    said = (tmp_path / "run" / "events.log").read_text()
    assert "the samples of step 3 failed: nano-base makes no picture" in said


def test_a_profile_of_some_steps_lies_in_the_folder_of_the_run(drawn_corpus, tmp_path):
    settings = preset(drawn_corpus, "profile_steps=2:3")
    train_alone(settings, tmp_path, progress=False)
    with gzip.open(tmp_path / "profile" / "steps-2-3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::conv2d" in names
    assert "aten::" in (tmp_path / "profile" / "steps-2-3.txt").read_text()


def test_a_profile_that_ends_before_it_begins_is_refused():
    with pytest.raises(ConfigError, match="profile_steps 5:3 ends before it begins"):
        training_preset("profile_steps=5:3")


def test_a_resumed_run_makes_the_same_steps(drawn_corpus, tmp_path):
    settings = preset(drawn_corpus, "data.cache_gib=1")
    train_alone(settings, tmp_path / "whole", progress=False)
    first = train_alone(settings, tmp_path / "parts", minutes=1e-9, progress=False)
    assert not first.finished and first.step == 1 and first.weights.exists()
    assert train_alone(settings, tmp_path / "parts", progress=False).finished
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_checkpoint_of_its_last_step(
    drawn_corpus, tmp_path, signal_number
):
    settings = [
        *TINY_BASE,
        *corpus_settings(drawn_corpus),
        "batch=8",
        "workers=1",
        "steps=100000",
        "trackers=",
    ]
    command = [
        os.path.join(os.path.dirname(sys.executable), "glide"),
        "train",
        "nano-base",
        "--no-ray",
        "--out",
        str(tmp_path / "run"),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 180
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and losses(tmp_path / "run")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal_number)
    output = process.communicate(timeout=180)[0]
    step = Checkpoints(tmp_path / "run").list_complete()[-1].step
    assert (
        process.returncode == 128 + signal_number
        and f"stopped after step {step:,}; the same command resumes the run" in output
    )


def test_a_run_with_only_damaged_checkpoints_is_refused(drawn_corpus, tmp_path):
    settings = preset(drawn_corpus)
    train_alone(settings, tmp_path / "run", minutes=1e-9, progress=False)
    for checkpoint in Checkpoints(tmp_path / "run").list_complete():
        path = os.path.join(checkpoint.path, "part.0.safetensors")
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    with pytest.raises(
        CheckpointError, match="No checkpoint in .* can be read.*from step 0, delete it"
    ):
        train_alone(settings, tmp_path / "run", progress=False)


def test_a_lack_of_gpu_memory_halves_the_micro_batch(drawn_corpus, tmp_path, monkeypatch):
    def step(self, batches, number, whole=SingleTrainer.step):
        if self.batch_split.micro_batch > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batches, number)

    monkeypatch.setattr(SingleTrainer, "step", step)
    settings, room = preset(drawn_corpus, "steps=2", "evaluate_every=2"), 2
    assert train_alone(settings, tmp_path / "run", progress=False).finished
    log = (tmp_path / "run" / "events.log").read_text()
    assert re.findall(r"resumes with micro-batches of (\d)", log) == ["4", "2"]
    room = 0
    with pytest.raises(UserError, match="too little memory for one image of nano-base"):
        train_alone(settings, tmp_path / "other", progress=False)


def test_another_model_is_refused_and_settings_that_fit_any_run_may_change(drawn_corpus, tmp_path):
    out = tmp_path / "run"
    train_alone(preset(drawn_corpus), out, minutes=1e-9, progress=False)
    with pytest.raises(CheckpointError, match="model.unet.dropout is 0.1 there and 0.0 here"):
        train_alone(preset(drawn_corpus, "model.unet.dropout=0"), out, progress=False)
    changes = [
        "batch=4",
        "ema_rates=0.99,0.9",
        f"data.corpus={drawn_corpus / 'held_out'}",
        "data.held_out_images=8",
        "data.empty_caption_rate=0.5",
        "model.sampling.respacing=10",
        "checkpoint_every=2",
    ]
    done = train_alone(preset(drawn_corpus, *changes), out, progress=False)
    assert done.finished and len(losses(out)) == 6
    log = (out / "events.log").read_text()
    assert "step 1: train.batch changes from 8 to 4" in log
    assert "data.held_out_images changes from 128 to 8" in log
    assert "16 kept" in log and "checkpoint_every" not in log
    last = Checkpoints(out).list_complete()[-1]
    with CheckpointReader(Path(last.path)) as reader:
        assert {"average/0.99", "average/0.9"} <= reader.kinds
    # Its data are part of the result of a finished run.
    with pytest.raises(CheckpointError, match="data.held_out_images is 8 there and 4 here"):
        train_alone(preset(drawn_corpus, *changes, "data.held_out_images=4"), out, progress=False)


def test_a_run_goes_back_to_an_earlier_checkpoint_and_makes_the_same_steps_again(
    drawn_corpus, tmp_path, capsys
):
    settings, out = preset(drawn_corpus, "checkpoint_every=2", "keep_last=5"), tmp_path / "run"
    train_alone(settings, out, progress=False)
    weights, first = (out / "weights.safetensors").read_bytes(), losses(out)
    steps = [entry.step for entry in Checkpoints(out).list_complete()]
    assert steps == [2, 4, 6]
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are .*: 2, 4, 6"):
        go_back(out, 3)
    go_back(out, 2)
    assert [entry.step for entry in Checkpoints(out).list_complete()] == [2]
    assert len(list((out / "checkpoints").glob("*/set_aside.json"))) == 2
    assert train_alone(settings, out, progress=False).finished
    assert (out / "weights.safetensors").read_bytes() == weights and losses(out) == first
    assert [json.loads(line)["step"] for line in lines_of(out)] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]


def lines_of(folder):
    return [line for line in (folder / "metrics.jsonl").open() if '"loss"' in line]


def test_the_bar_of_a_resumed_run_begins_at_its_checkpoint():
    bar = steps_bar(tiny("base", "steps=300"), 250, visible=True)
    move_bar(bar, 200)
    bar.update(10)
    assert bar.n == 210 and bar.format_dict["initial"] == 200 and bar.format_dict["elapsed"] >= 0


def test_the_number_of_a_row_leads_to_its_file(drawn_corpus, capsys):
    corpus = MemoryCorpus(preset(drawn_corpus))
    number, part, sample = corpus.rows[40]
    assert main(["corpus", "--survey", corpus.preset.data.corpus, "--row", str(number)]) == 0
    assert capsys.readouterr().out == f"{part.url}: {sample.key}\n"
    assert main(["corpus", "--survey", corpus.preset.data.corpus, "--row", "7"]) == 2
    assert "has no row 7" in capsys.readouterr().err


# -- corpus ----------------------------------------------------------------------------------------


def test_each_epoch_reads_each_row_once_in_a_new_order(drawn_corpus):
    corpus = MemoryCorpus(preset(drawn_corpus))
    first, second = (
        [row for batch in corpus.epoch_batches(epoch, 0) for row in batch.rows.tolist()]
        for epoch in (0, 1)
    )
    assert len(set(first)) == 96 and set(first) == set(second) and first != second
    assert [row for batch in corpus.epoch_batches(0, 40) for row in batch.rows.tolist()] == first[
        40:
    ]


def test_an_epoch_reads_the_requested_share_of_a_folder(drawn_corpus):
    settings = tiny(
        "base",
        f"data.corpus={drawn_corpus}/{{train,held_out}}",
        f"data.held_out={drawn_corpus / 'held_out'}",
        "data.min_size=16",
        "batch=8",
        "workers=1",
    )
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"shares": {"train": 0.5}})}
    )
    corpus = MemoryCorpus(settings)
    orders = [set(corpus._order(epoch).tolist()) for epoch in range(40)]
    held_out = {n for n, (_, part, _) in enumerate(corpus.rows) if folder_name(part) == "held_out"}
    assert len(held_out) == 16 and all(held_out <= order for order in orders)
    read = sum(len(order) - 16 for order in orders) / 40
    # Each epoch draws another half of the rows.
    assert read == pytest.approx(48, abs=4) and len(set.union(*orders)) == 112


def test_a_batch_larger_than_the_corpus_is_refused(drawn_corpus):
    with pytest.raises(ShardError, match="96 usable rows, fewer than one batch of 128"):
        MemoryCorpus(preset(drawn_corpus, "batch=128"))


def test_a_remote_folder_is_refused(drawn_corpus):
    with pytest.raises(ConfigError, match="local folder"):
        train_alone(preset(drawn_corpus), "s3://bucket/run")
