"""The training loop in one process: ZeRO stages against plain PyTorch, EMA, checkpoints, errors."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from deepspeed.utils.config import get_timers_config
from helpers.drawings import drawn_samples
from helpers.tiny import tiny
from helpers.training import STEPS, batch, epochs, preset, run

from glide_ray.data.images import centre_crop, decode, to_tensor
from glide_ray.data.masks import random_known
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.diffusion.schedule import make_schedule
from glide_ray.errors import ConfigError, UserError
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import WeightsError, load_model, load_weights, with_known_channels
from glide_ray.precision import training_precision
from glide_ray.tensors import Batch, Conditioning, ModelOutput
from glide_ray.train import partition, steps
from glide_ray.train.batch_split import BatchSplit
from glide_ray.train.checkpoint import CheckpointError, TrainingPosition
from glide_ray.train.ema import Ema
from glide_ray.train.loop import Trainer, TrainingError
from glide_ray.train.objectives import denoising, draw, held_out_sums
from glide_ray.train.optimizer import deepspeed_config, learning_rate
from glide_ray.train.step_clock import StepClock, timings
from glide_ray.train.steps import TrainCallbacks, norm_figures, train_loop


def plain_adamw(settings, steps=STEPS):
    """The same training without DeepSpeed: (losses, norms of the gradients, EMA state)."""
    torch.manual_seed(settings.train.seed)
    model = GlideUNet(settings.model.unet).train()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.train.learning_rate,
        weight_decay=settings.train.weight_decay,
    )
    schedule, losses, norms = make_schedule("cosine"), [], []
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    numbers = [10 * epoch + n for epoch in range(9) for n in range(3)]
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = settings.train.learning_rate * min(1, step / 3)
        given = batch(numbers[step - 1])
        loss = denoising(model, schedule, given, *draw(schedule, given, 0, step))["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.train.clip_norm)
        norms.append(norm.item())
        optimiser.step()
        losses.append(loss.item())
        rate = min(settings.train.ema_rates[0], (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name] = rate * average[name] + (1 - rate) * parameter.detach()
    return losses, norms, average


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_as_plain_adamw_does(stage):
    settings = preset(f"zero_stage={stage}")
    losses, norms, average = plain_adamw(settings)
    metrics, _, weights = run(Trainer(settings))
    lines = [row for row in metrics if "loss" in row]
    assert [row["loss"] for row in lines] == pytest.approx(losses, rel=1e-4)
    if stage:  # DeepSpeed computes no norm under stage 0
        assert [row["grad_norm"] for row in lines] == pytest.approx(norms, rel=1e-3)
        assert not any(row["skipped_steps"] for row in lines)
    assert set(weights) == set(average)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and tensor.shape == average[name].shape
        assert torch.allclose(tensor, average[name], atol=2e-5), name


def test_accumulation_and_activation_checkpointing_change_nothing_in_20_steps():
    def losses(*settings, batches=epochs):
        metrics = run(
            Trainer(preset("steps=20", "evaluate_every=20", "checkpoint_every=50", *settings)),
            batches=batches,
        )[0]
        return [row["loss"] for row in metrics if "loss" in row]

    def halves(epoch, rows):
        return (part for given in epochs(epoch, rows) for part in (given[:2], given[2:]))

    whole = losses()
    assert losses("activation_checkpointing=true") == pytest.approx(whole, rel=1e-5)
    assert losses("micro_batch=2", batches=halves) == pytest.approx(whole, rel=1e-4)


def test_bf16_follows_float32_closely():
    exact = [row["loss"] for row in run(Trainer(preset()))[0] if "loss" in row]
    rough = [row["loss"] for row in run(Trainer(preset("precision=bf16")))[0] if "loss" in row]
    assert rough == pytest.approx(exact, rel=0.02)


def test_the_loss_falls_when_one_batch_is_learnt():
    metrics, _, _ = run(
        Trainer(
            preset(
                "steps=60",
                "learning_rate=3e-3",
                "evaluate_every=60",
                "log_every=60",
                "checkpoint_every=60",
            )
        ),
        batches=lambda epoch, rows: iter([batch(999)] * 60),
    )
    held_out = [row["held_out"] for row in metrics if "held_out" in row]
    assert held_out[-1] < 0.7 * held_out[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path, stage):
    settings = preset(f"zero_stage={stage}", "model.unet.dropout=0.3")
    whole, saved, weights = run(Trainer(settings), tmp_path)
    assert len(saved) == 2
    second = Trainer(settings)
    second.load(saved[0])
    assert second.progress == TrainingPosition(step=2, epoch=0, rows=8)  # in the middle of an epoch
    rest, _, weights_again = run(second)
    assert [row["loss"] for row in rest if "loss" in row] == [
        row["loss"] for row in whole if "loss" in row
    ][2:]
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_dropout_draws_anew_on_each_rank_in_each_step_and_call():
    trainer, drawn = Trainer(preset("micro_batch=2")), []
    objective = trainer.objective
    trainer.objective = lambda *given: (
        drawn.append(torch.nn.functional.dropout(torch.ones(64))) or objective(*given)
    )
    for trainer.rank, number in ((0, 1), (1, 1), (0, 2), (0, 1)):
        trainer.step(iter([batch(1)[:2], batch(1)[2:]]), number)
    assert len({mask.numpy().tobytes() for mask in drawn[:6]}) == 6
    assert all(torch.equal(again, mask) for again, mask in zip(drawn[6:], drawn[:2], strict=True))


def test_images_per_second_are_of_the_steps_and_not_of_what_is_done_between_them(monkeypatch):
    now, figures = [0.0], []

    def takes(seconds, result=None):
        def do(*_):
            now[0] += seconds
            return result

        return do

    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    fake = SimpleNamespace(
        preset=preset("log_every=3", "evaluate_every=2", "checkpoint_every=2"),
        progress=TrainingPosition(),
        world=1,
        save=None,
        start=takes(5),
        held_out=takes(100, {}),
        step=takes(1, {}),
        scale=dict,
        summed=lambda values: values,
        gathered=lambda values: [values],
        clock=StepClock(torch.device("cpu")),
    )
    monkeypatch.setattr(steps, "quartile_means", lambda figures: {})
    fake.step = takes(1, {"loss": torch.ones(())})
    train_loop(fake, epochs, [], TrainCallbacks(figures.append, takes(1000)))
    lines = [row for row in figures if "images_per_s" in row]
    assert [row["images_per_s"] for row in lines] == [4, 4]
    assert [row["evaluation_s"] for row in lines] == [100, 100]
    assert [row["checkpoint_s"] for row in lines] == [1000, 1000]


def test_a_log_line_names_the_slowest_rank_and_the_longest_wait_of_any_rank():
    ranks = [
        {"data": 3.0, "forward": 2.0, "memory": 2.0**31},
        {"data": 1.0, "forward": 5.0, "memory": 2.0**30},
        {"data": 0.0, "forward": 2.5, "memory": 2.0**30},
    ]
    assert timings(ranks, 10) == {
        "data_wait_s": 0.3,
        "memory_gib": 2.0,
        "slowest_rank": 1,
        "slowest_rank_ratio": 2.0,
    }
    assert "slowest_rank" not in timings(ranks[:1], 10)


def test_the_gradient_norm_of_a_log_line_leaves_out_its_skipped_steps():
    figures = []
    norms = iter([2.0, float("inf"), 4.0])
    fake = SimpleNamespace(
        preset=preset("steps=3", "log_every=3", "evaluate_every=5", "checkpoint_every=5"),
        progress=TrainingPosition(),
        world=1,
        start=lambda: None,
        held_out=lambda batches: {},
        step=lambda batches, number: norm_figures(torch.tensor(next(norms))),
        scale=dict,
        summed=lambda values: {name: value.item() for name, value in values.items()},
        gathered=lambda values: [values],
        clock=StepClock(torch.device("cpu")),
    )
    train_loop(fake, epochs, [], TrainCallbacks(figures.append, lambda write: None))
    [line] = [row for row in figures if "grad_norm" in row]
    assert line["grad_norm"] == pytest.approx(3.0) and line["skipped_steps"] == 1


def test_a_checkpoint_of_another_shape_is_refused_by_the_setting_that_differs(tmp_path):
    _, saved, _ = run(Trainer(preset("steps=3")), tmp_path)
    with pytest.raises(
        CheckpointError, match="another model: model.unet.channels is 16 there and 32 here"
    ):
        Trainer(preset("model.unet.channels=32")).load(saved[0])
    with pytest.raises(CheckpointError, match="not a complete glide_ray checkpoint"):
        Trainer(preset()).load(tmp_path)


def test_a_loss_that_is_not_a_number_stops_the_run_and_says_where():
    with pytest.raises(
        TrainingError,
        match="The loss is not finite at step 2: "
        "4 of the batch's 4 images are not finite .rows 200, 201",
    ):
        run(
            Trainer(preset()),
            batches=lambda epoch, rows: iter([batch(1), batch(2, broken=True), batch(3)]),
        )


def test_a_corpus_without_a_whole_batch_stops_the_run():
    with pytest.raises(TrainingError, match="too few usable images for one batch of 4"):
        run(Trainer(preset()), batches=lambda epoch, rows: iter([]))


def test_another_number_of_processes_than_the_config_says_is_refused():
    with pytest.raises(TrainingError, match="train.workers is 2, but 1 processes"):
        Trainer(preset("workers=2"))


# -- components ------------------------------------------------------------------------------------


def test_the_averages_are_their_closed_form_and_can_stand_in_for_the_weights():
    weights = torch.zeros(3)
    ema = Ema([weights], rates=(0.5, 0.2))
    expected = {0.5: torch.zeros(3), 0.2: torch.zeros(3)}
    for step in range(1, 6):
        weights += 1
        ema.update(step)
        for rate, average in expected.items():
            now = min(rate, (1 + step) / (10 + step))
            expected[rate] = now * average + (1 - now) * weights
    for rate, average in expected.items():
        with ema.in_place(rate):
            assert torch.allclose(weights, average)
    assert weights.tolist() == [5, 5, 5] and not torch.equal(*expected.values())


def test_the_held_out_loss_is_of_evenly_spread_timesteps_and_repeats():
    seen, schedule = [], make_schedule("cosine")
    unet = tiny().model.unet
    model = GlideUNet(unet).eval()

    def spying(network, schedule, batch, i, noise):
        seen.extend(i.tolist())
        return denoising(network, schedule, batch, i, noise)

    first = held_out_sums(spying, model, schedule, [batch(1), batch(2)], 0, 8)
    assert sorted(seen) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert first == held_out_sums(denoising, model, schedule, [batch(1), batch(2)], 0, 8)
    assert first["mse"].item() / 8 == pytest.approx(1, abs=0.05)  # a fresh model predicts no noise


def test_precision_is_chosen_by_device_and_fp16_refused_on_a_cpu():
    assert (training_precision("auto", "cpu"), training_precision("auto", "cuda")) == (
        "bf16",
        "fp16",
    )
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        training_precision("fp16", "cpu")


def test_the_deepspeed_config_says_what_the_train_config_does():
    train, share = preset("zero_stage=3").train, BatchSplit(4, 1, 0, 2)
    made = deepspeed_config(train, "fp16", share)
    assert (
        made["train_batch_size"],
        made["train_micro_batch_size_per_gpu"],
        made["gradient_accumulation_steps"],
    ) == (4, 2, 2)
    assert not get_timers_config(made).enabled
    assert (
        made["zero_optimization"]["stage"] == 3
        and made["fp16"]["enabled"]
        and "loss_scale" not in made["fp16"]
    )
    with pytest.raises(ConfigError, match="zero_stage: 0 keeps no float32 master weights for bf16"):
        deepspeed_config(preset("zero_stage=0").train, "bf16", share)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_timesteps_are_drawn_with_a_density_proportional_to_their_power(power):
    schedule, given = make_schedule("cosine"), Batch(torch.zeros(4000, 3, 1, 1), None)
    i, noise = draw(schedule, given, 0, 1, power)
    assert i.min() >= 0 and i.max() < 1000 and abs(noise.std().item() - 1) < 0.05
    for part in (0.25, 0.5, 0.9):  # P(timestep < part * T) = part^(power + 1)
        share = part ** (power + 1)
        tolerance = 4 * (share * (1 - share) / 4000) ** 0.5
        assert (i < 1000 * part).double().mean().item() == pytest.approx(share, abs=tolerance)


def test_the_learning_rate_warms_up_linearly():
    train = preset("learning_rate=1").train
    assert [round(learning_rate(train, step), 3) for step in (1, 2, 3, 50)] == [0.333, 0.667, 1, 1]


def test_after_its_constant_steps_the_learning_rate_falls_with_the_root_of_the_step():
    train = preset("learning_rate=1", "constant_steps=100").train
    assert [round(learning_rate(train, step), 3) for step in (50, 100, 400, 10_000)] == [
        1,
        1,
        0.5,
        0.1,
    ]


def test_a_model_learns_what_its_captions_mean():
    """Eight drawings (four colours, two shapes); their own captions must give a lower loss."""
    # Most steps at the noisy timesteps, where the caption says what the picture cannot.
    settings = tiny(
        "base",
        "precision=fp32",
        "workers=1",
        "batch=16",
        "learning_rate=3e-3",
        "warmup_steps=20",
        "timestep_power=1",
        "empty_caption_rate=0",
    )
    drawings = list(drawn_samples(8))
    image = to_tensor(np.stack([centre_crop(decode(drawing.image), 16) for drawing in drawings]))
    tokens, mask = Tokenizer().batch([drawing.captions[0] for drawing in drawings])
    trainer = Trainer(settings)
    generator = torch.Generator().manual_seed(1)

    def drawn():
        while True:
            rows = torch.randint(0, 8, (16,), generator=generator)
            yield Batch(image[rows], Conditioning(tokens[rows], mask[rows]))

    batches = drawn()
    for number in range(1, 251):
        trainer.step(batches, number)
    rows = torch.arange(64) % 8
    other = (rows + 1 + torch.arange(64) // 8 % 7) % 8
    losses = [
        trainer.held_out([Batch(image[rows], Conditioning(tokens[told], mask[told]))])[
            "held_out_mse"
        ]
        for told in (rows, other)
    ]
    assert losses[0] < 0.9 * losses[1]


# -- inpainting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_right_after_surgery_an_inpainting_model_gives_the_very_output_of_the_model_it_comes_from(
    kind, tiny_weights
):
    config, state = load_weights(tiny_weights[kind])
    unet = config.unet.model_copy(update={"inpaint": True})
    before, after = load_model(tiny_weights[kind])[0], GlideUNet(unet).eval()
    after.load_state_dict(with_known_channels(state, unet))
    size = unet.image_size
    tokens, mask = Tokenizer().batch(["a red circle", ""])
    low_res = torch.randn(2, 3, 16, 16) if kind == "upsampler" else None
    given = Conditioning(
        tokens, mask, low_res, torch.randn(2, 3, size, size), torch.ones(2, 1, size, size)
    )
    x, t = torch.randn(2, 3, size, size), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(after(x, t, given).eps, before(x, t, given).eps)


def test_an_inpainting_run_starts_from_weights_and_learns_to_use_what_is_known(tiny_weights):
    """Trains on one image, with random erasures.

    The noise of known pixels can be inferred, so the weights of the known channels must grow.
    """
    unet = ["model.unet.inpaint=true", f"start_from={tiny_weights['base']}"]
    trainer = Trainer(preset("learning_rate=2e-3", *unet))
    trainer.start()
    stem = trainer.engine.module.stem.weight
    assert not stem[:, 3:7].any() and torch.equal(
        stem[:, :3], load_weights(tiny_weights["base"])[1]["stem.weight"]
    )

    def erased(number):
        given, pencil = batch(1), np.random.default_rng(number)
        known_mask = torch.from_numpy(np.stack([random_known(16, pencil) for _ in given.image]))[
            :, None
        ].float()
        return replace(
            given,
            conditioning=replace(given.conditioning, known=given.image, known_mask=known_mask),
        )

    first = trainer.held_out([erased(0)])["held_out"]
    for number in range(1, 61):
        trainer.step(iter([erased(number)]), number)
    assert stem[:, 3:6].abs().max() > 1e-3 and stem[:, 6:7].abs().max() > 1e-3
    assert trainer.held_out([erased(0)])["held_out"] < first / 2


def test_loss_is_hybrid_where_unknown_and_ignores_eps_where_known():
    schedule, given = make_schedule("cosine"), batch(1)
    i, noise = draw(schedule, given, 0, 2)
    known_mask = (torch.arange(16) < 6).float().expand(4, 1, 16, 16)
    edit = Batch(given.image, replace(given.conditioning, known=given.image, known_mask=known_mask))
    for wrong in (0.0, 1.0):

        def network(x, timestep, conditioning, wrong=wrong):
            return ModelOutput(noise + 0.5 + wrong * known_mask, torch.zeros_like(x))

        losses, whole = (
            denoising(network, schedule, edit, i, noise),
            denoising(network, schedule, given, i, noise),
        )
        # The mean is over all pixels, as in the paper.
        assert torch.allclose(losses["mse"], torch.full((4,), 0.25 * 10 / 16), atol=1e-6)
        assert (whole["mse"] > 0.249).all()


def test_weights_of_another_shape_are_no_start(tiny_weights):
    with pytest.raises(
        WeightsError,
        match="checkpoint of another shape: text.token.weight|"
        "checkpoint of another shape|no tensor",
    ):
        Trainer(preset(f"start_from={tiny_weights['upsampler']}")).start()
    with pytest.raises(UserError, match="no file nowhere"):
        Trainer(preset("start_from=nowhere.safetensors")).start()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fine_tuning_in_16_bits_begins_from_the_files_float32_weights_to_the_last_bit(
    tiny_weights, tmp_path, stage
):
    trainer = Trainer(
        preset("precision=bf16", f"zero_stage={stage}", f"start_from={tiny_weights['base']}")
    )
    trainer.start()
    trainer.save(tmp_path)
    state = load_weights(tiny_weights["base"])[1]
    with partition.CheckpointReader(tmp_path) as parts:
        for kind in ("weights", "average/0.9"):
            assert all(
                torch.equal(parts.full(kind, name), tensor) for name, tensor in state.items()
            ) and set(parts.shapes) == set(state)
    model = load_model(tiny_weights["base"])[0].to(torch.bfloat16)
    given = batch(1)
    x, timestep = given.image.to(torch.bfloat16), torch.tensor([3, 200, 500, 900])
    trainer.engine.eval()
    with torch.no_grad():
        assert torch.equal(
            trainer.engine(x, timestep, given.conditioning).eps,
            model(x, timestep, given.conditioning).eps,
        )


def test_a_fine_tuning_that_goes_on_has_no_more_use_for_the_weights_it_began_from(
    tiny_weights, tmp_path
):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(Path(tiny_weights["base"]).read_bytes())
    settings = preset(f"start_from={weights}", "steps=3")
    whole, saved, _ = run(Trainer(settings), tmp_path / "run")
    weights.unlink()
    later = Trainer(settings)
    later.load(saved[0])
    rest, _, _ = run(later)
    assert [row["loss"] for row in rest if "loss" in row] == [
        row["loss"] for row in whole if "loss" in row
    ][2:]
    with pytest.raises(UserError, match="no file"):
        run(Trainer(settings))


def test_random_erasures_are_of_every_kind_and_the_same_for_the_same_seed():
    shares = [random_known(64, np.random.default_rng(seed)).mean() for seed in range(300)]
    assert (
        0.05 < np.mean([share == 0 for share in shares]) < 0.2
        and 0 < np.mean([share == 1 for share in shares]) < 0.1
    )
    assert 0.05 < np.mean([share == 0.5 for share in shares]) < 0.25 and 0.2 < np.mean(shares) < 0.8
    assert len(set(shares)) > 150
    assert np.array_equal(
        random_known(64, np.random.default_rng(5)), random_known(64, np.random.default_rng(5))
    )
