"""Numerical precision: overflow, skipped steps, error messages, float32 parts, offload.

fp16 needs a GPU: DeepSpeed and glide_ray refuse it elsewhere. The fixture `fp16` disables both
checks, so that DeepSpeed's fp16 with its dynamic loss scale runs on the CPU. This shows faithfully
how overflows are handled, but nothing about the numerics of a GPU.
"""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import has_inf_or_nan
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from helpers.tiny import tiny, tiny_clip
from torch.utils._python_dispatch import TorchDispatchMode

from glide_ray.diffusion.schedule import make_schedule
from glide_ray.errors import ConfigError
from glide_ray.models.clip import NoisedClip
from glide_ray.models.layers import AttentionBlock, GroupNorm
from glide_ray.models.unet import GlideUNet
from glide_ray.tensors import Batch, Conditioning, ModelOutput
from glide_ray.train import deepspeed_engine, loop
from glide_ray.train import optimizer as zero
from glide_ray.train.batch_split import BatchSplit
from glide_ray.train.deepspeed_engine import scale_collapsed, stepped
from glide_ray.train.ema import Ema
from glide_ray.train.loop import Trainer
from glide_ray.train.nonfinite import TrainingError, check_step, locate_nonfinite
from glide_ray.train.objectives import contrastive, denoising, draw
from glide_ray.train.optimizer import deepspeed_config

SMALL = [
    "workers=1",
    "batch=4",
    "micro_batch=4",  # or each new model's memory is planned
    "warmup_steps=3",
    "ema_rates=0.9",
    "clip_norm=0.5",
    "model.unet.channels=8",
    "model.unet.multipliers=1,1",
    "model.unet.head_channels=8",
    "model.unet.attention_sizes=",
    "model.unet.text.context=16",
    "model.unet.text.vocabulary=300",
]
SMALL_CLIP = [
    "workers=1",
    "batch=4",
    "micro_batch=4",
    "model.clip.context=16",
    "model.clip.vocabulary=300",
]


def preset(*settings):
    return tiny("base", *SMALL, "precision=fp32", *settings)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    tokens, mask = (
        torch.randint(0, 300, (4, 16), generator=generator),
        torch.arange(16) < torch.tensor([[3], [7], [16], [1]]),
    )
    return Batch(
        torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1,
        Conditioning(tokens, mask),
        100 * number + torch.arange(4),
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread, because a second one costs more than it saves for such small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fp16(monkeypatch):
    """FOR TESTS ONLY: allow fp16 on a CPU. The module's docstring says what this can show."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr(loop, "training_precision", lambda precision, device: precision)


def step(trainer, number, given=None, check=True):
    """One optimizer step as in the training loop; returns the mean loss of this rank."""
    given = batch(number) if given is None else given
    calls = trainer.batch_split.calls
    parts = [
        given[len(given.image) * n // calls : len(given.image) * (n + 1) // calls]
        for n in range(calls)
    ]
    loss = trainer.step(iter(parts), number)["loss"]
    if check:
        check_step(trainer, parts, number, loss)
    return loss.item()


def steps(trainer, first, last):
    return [step(trainer, number) for number in range(first, last + 1)]


def scaler(trainer):
    return trainer.engine.optimizer.loss_scaler


def masters(trainer):
    return [tensor.detach().clone() for tensor in trainer.ema.masters]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Steep(torch.autograd.Function):
    """The identity function with the derivative `by`."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.by, None


# -- loss scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_skips_the_step_and_the_second_one_halves_the_scale(fp16, stage):
    trainer = Trainer(preset("precision=fp16", f"zero_stage={stage}"))
    step(trainer, 1)
    assert stepped(trainer.engine) and scaler(trainer).cur_scale == 2**16
    before, loss = masters(trainer), trainer.held_out([batch(9)])
    scaler(trainer).cur_scale = 2.0**40
    for number, scale in ((2, 2**40), (3, 2**39), (4, 2**38)):  # hysteresis of 2 overflows
        step(trainer, number)
        assert not stepped(trainer.engine) and scaler(trainer).cur_scale == scale
    assert (
        same(before, masters(trainer))
        and trainer.held_out([batch(9)]) == loss
        and deepspeed_engine.adam_steps(trainer.engine) == 1
    )
    scaler(trainer).cur_scale = 2.0**10
    step(trainer, 5)
    assert (
        stepped(trainer.engine)
        and not same(before, masters(trainer))
        and deepspeed_engine.adam_steps(trainer.engine) == 2
    )


def test_the_scale_doubles_after_as_many_good_steps_as_its_window_has(fp16, monkeypatch):
    monkeypatch.setitem(zero.FP16, "loss_scale_window", 3)
    monkeypatch.setitem(zero.FP16, "initial_scale_power", 8)
    trainer, scales = Trainer(preset("precision=fp16")), []
    for number in range(1, 8):
        step(trainer, number)
        scales.append(scaler(trainer).cur_scale)
    assert scales == [2**8] * 3 + [2**9] * 3 + [2**10]
    scaler(trainer).cur_scale = 2.0**40
    step(trainer, 8)
    step(trainer, 9)
    assert (scaler(trainer).cur_scale, scaler(trainer).cur_hysteresis) == (2**39, 1)
    scaler(trainer).cur_scale = 2.0**8
    for number in range(10, 14):
        step(trainer, number)
    # A window without overflows restores the hysteresis.
    assert (scaler(trainer).cur_scale, scaler(trainer).cur_hysteresis) == (2**9, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_loss_scale_goes_on_from_a_checkpoint_as_if_the_run_had_not_stopped(
    fp16, monkeypatch, tmp_path, stage
):
    monkeypatch.setitem(zero.FP16, "loss_scale_window", 3)
    whole = Trainer(preset("precision=fp16", f"zero_stage={stage}"))
    steps(whole, 1, 2)
    scaler(whole).cur_scale = 2.0**40
    steps(whole, 3, 4)
    scaler(whole).cur_scale = 2.0**12
    step(whole, 5)
    whole.save(tmp_path)
    resumed = Trainer(preset("precision=fp16", f"zero_stage={stage}"))
    resumed.load(tmp_path)
    assert vars(scaler(resumed)) == vars(scaler(whole)) and scaler(resumed).cur_hysteresis == 1
    assert deepspeed_engine.adam_steps(resumed.engine) == 3
    assert steps(resumed, 6, 9) == steps(whole, 6, 9)
    assert (
        vars(scaler(resumed)) == vars(scaler(whole))
        and scaler(whole).cur_scale == 2**13
        and same(masters(whole), masters(resumed))
    )


def test_a_checkpoint_of_bf16_gives_fp16_its_first_scale(fp16, tmp_path):
    before = Trainer(preset("precision=bf16"))
    step(before, 1)
    before.save(tmp_path)
    later = Trainer(preset("precision=fp16"))
    later.load(tmp_path)
    assert scaler(later).cur_scale == 2**16 and same(masters(before), masters(later))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_overflow_whatever_the_scale_stop_the_run_with_their_module_named(
    fp16, monkeypatch, stage
):
    monkeypatch.setitem(zero.FP16, "initial_scale_power", 4)
    trainer = Trainer(preset("precision=fp16", f"zero_stage={stage}", "clip_norm=0"))
    # The last layer is zero before this step, so no gradient reaches other layers.
    step(trainer, 1)
    trainer.engine.module.middle[0].attention.register_forward_hook(
        lambda module, given, output: Steep.apply(output, 1e30)
    )
    before = masters(trainer)
    steps(trainer, 2, 5)
    assert scaler(trainer).cur_scale == 2 and not scale_collapsed(trainer.engine)
    with pytest.raises(
        TrainingError,
        match=r"^The gradients overflow in fp16 at every loss scale at step 6: "
        r"the gradient that arrives at "
        r"middle\.0\.attention\.\w+ is inf in fp16 at loss scale 2 \(largest before it \S+\); "
        r"lower train.learning_rate, raise train.warmup_steps, set train.clip_norm=1 or set "
        r"train.precision=bf16\.$",
    ):
        step(trainer, 6)
    assert same(before, masters(trainer))


@pytest.mark.parametrize(
    "settings",
    [
        ["precision=fp32", "zero_stage=1"],
        ["precision=bf16", "zero_stage=2"],
        ["precision=bf16", "zero_stage=3"],
    ],
)
def test_without_a_loss_scale_gradients_that_are_not_finite_stop_the_run_at_once(settings):
    trainer = Trainer(preset(*settings))
    step(trainer, 1)
    before = masters(trainer)
    trainer.engine.module.text.norm.register_forward_hook(
        lambda module, given, output: Steep.apply(output, float("inf"))
    )
    with pytest.raises(
        TrainingError,
        match=r"^The gradients are not finite at step 2: "
        r"the gradient that arrives at text.\S+ is (inf|nan) in ",
    ):
        step(trainer, 2)
    assert same(before, masters(trainer))  # DeepSpeed skipped the step


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_not_looked_at_one_by_one_where_their_norm_says_the_same(
    fp16, monkeypatch, stage, precision
):
    looked = []
    monkeypatch.setattr(
        DeepSpeedZeroOptimizer,
        "_has_inf_or_nan",
        staticmethod(lambda gradient, j=None: looked.append(gradient) or has_inf_or_nan(gradient)),
    )
    trainer = Trainer(preset(f"precision={precision}", f"zero_stage={stage}", "micro_batch=2"))
    steps(trainer, 1, 2)
    before = masters(trainer)
    trainer.engine.module.stem.weight.register_hook(
        lambda gradient: torch.where(gradient == gradient.max(), float("nan"), gradient)
    )
    step(trainer, 3, check=False) if precision == "fp16" else pytest.raises(
        TrainingError, step, trainer, 3
    )
    assert not looked and not trainer.engine.was_step_applied() and same(before, masters(trainer))


# -- causes ----------------------------------------------------------------------------------------

STAGES = [
    ["precision=fp32", "zero_stage=0"],
    ["precision=fp16", "zero_stage=1", "micro_batch=2"],
    ["precision=bf16", "zero_stage=2", "micro_batch=2", "activation_checkpointing=true"],
    ["precision=fp16", "zero_stage=3", "activation_checkpointing=true", "offload_optimizer=true"],
]


@pytest.mark.parametrize("settings", STAGES)
def test_images_that_are_not_finite_are_named_by_their_rows(fp16, settings):
    trainer = Trainer(preset(*settings))
    step(trainer, 1)
    given = batch(2)
    given.image[1, 0, 3, 3], given.image[3, 2] = float("nan"), float("inf")
    with pytest.raises(
        TrainingError,
        match=r"^The loss is not finite at step 2: 2 of the batch's 4 images are not finite "
        r"\(rows 201, 203 of the corpus\); leave them out\.$",
    ):
        step(trainer, 2, given)


@pytest.mark.parametrize("settings", STAGES)
def test_weights_that_are_not_finite_are_named(fp16, settings):
    trainer = Trainer(preset(*settings))
    step(trainer, 1)
    assert (
        locate_nonfinite(trainer, batch(1), 1) == "all values are finite when the step is repeated"
    )
    piece = next(
        piece for piece in trainer.param_slices if piece.name == "middle.1.block.in_conv.weight"
    )
    since = "an earlier step" if trainer.preset.train.zero_stage else "this or an earlier step"
    for value, what in (
        (1e5, "weights of up to 1e+05 are too large for fp16 (middle.1.block.in_conv.weight)"),
        (
            float("inf"),
            f"weights are not finite since the update of {since} (middle.1.block.in_conv.weight)",
        ),
    ):
        trainer.ema.masters[piece.master].reshape(-1)[piece.offset + 5] = value
        if value > 1e5 or trainer.precision == "fp16":
            assert locate_nonfinite(trainer, batch(2), 2) == what
    deepspeed_engine.refresh(trainer.engine)
    with pytest.raises(
        TrainingError,
        match=r"^The loss is not finite at step 2: weights are not finite .*; "
        r"resume from an earlier checkpoint, and ",
    ):
        step(trainer, 2)


@pytest.mark.parametrize("settings", STAGES[1:])
def test_the_first_module_that_gives_what_is_not_finite_is_named(fp16, settings):
    trainer = Trainer(preset(*settings))
    steps(trainer, 1, 2)
    inner = trainer.engine.module.middle[1].block.in_conv
    inner.register_forward_hook(
        lambda module, given, output: torch.where(output == output.amax(), float("inf"), output)
    )
    with pytest.raises(
        TrainingError,
        match=rf"^The loss is not finite at step 3: middle.1.block.in_conv gives inf in "
        rf"{trainer.precision} "
        r"\(largest input \d(\.\d)?\); lower",
    ):
        step(trainer, 3)


def test_a_sum_between_modules_is_blamed_on_the_one_around_them(fp16):
    """x + branch in an attention block: both are finite in fp16, but their sum is not."""
    trainer = Trainer(preset("precision=fp16"))
    attention = trainer.engine.module.middle[0].attention
    attention.register_forward_pre_hook(
        lambda module, given: (torch.full_like(given[0], 6e4), *given[1:])
    )
    attention.out.register_forward_hook(lambda module, given, output: torch.full_like(output, 6e4))
    assert (
        locate_nonfinite(trainer, batch(1), 1)
        == "middle.0.attention gives inf in fp16 (largest input 6e+04)"
    )


def test_rows_whose_own_loss_is_not_finite_are_named():
    trainer = Trainer(preset())
    objective = trainer.objective

    def broken(*arguments):
        losses = objective(*arguments)
        return losses | {"loss": losses["loss"] / torch.tensor([1, 1, 0, 1])}

    trainer.objective = broken
    assert (
        locate_nonfinite(trainer, batch(1), 1)
        == "every output of the network is finite, but the loss is not (row 102 of the corpus)"
    )


@pytest.mark.parametrize("settings", STAGES)
def test_a_search_leaves_everything_as_it_was(fp16, settings):
    settings = preset("model.unet.dropout=0.1", *settings)
    plain, searched, after = Trainer(settings), Trainer(settings), []
    losses = steps(plain, 1, 3)
    for number in range(1, 4):
        after.append(step(searched, number))
        drawn = torch.get_rng_state()
        locate_nonfinite(
            searched,
            [batch(number)[:2], batch(number)[2:]]
            if searched.batch_split.calls == 2
            else batch(number),
            number,
        )
        assert torch.equal(torch.get_rng_state(), drawn)
    assert after == losses and same(masters(plain), masters(searched))
    assert all(parameter.grad is None for parameter in searched.engine.module.parameters())


def test_clip_is_searched_as_the_unet_is(fp16):
    trainer = Trainer(tiny_clip(*SMALL_CLIP, "precision=fp16"))
    step(trainer, 1)
    trainer.engine.module.image.blocks[0].mlp_in.register_forward_hook(
        lambda module, given, output: output * 1e6
    )
    with pytest.raises(
        TrainingError, match=r"image.blocks.0.mlp_in gives inf in fp16 \(largest input"
    ):
        step(trainer, 2)


# -- float32 parts ---------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Records the dtype of the first argument of the operators with these names."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.types = names, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket.__name__ in self.names:
            self.types.append(arguments[0].dtype)
        return function(*arguments, **(keywords or {}))


def test_group_norm_is_computed_in_float32_on_devices_that_are_not_a_cpu():
    """On the meta device, as on a GPU, each group norm computes in float32 and returns bf16."""
    with torch.device("meta"):
        model = GlideUNet(tiny().model.unet).to(torch.bfloat16)
        given = Conditioning(
            torch.zeros(2, 128, dtype=torch.int64), torch.ones(2, 128, dtype=torch.bool)
        )
        with Seen("native_group_norm") as seen:
            output = model(torch.randn(2, 3, 16, 16), torch.zeros(2), given)
    norms = sum(isinstance(module, GroupNorm) for module in model.modules())
    assert seen.types == [torch.float32] * norms and output.eps.dtype == torch.float32
    assert (
        GroupNorm(2, 4)
        .to("meta", torch.bfloat16)(torch.empty(1, 4, 2, 2, dtype=torch.bfloat16, device="meta"))
        .dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("norm", [GroupNorm(2, 32), torch.nn.LayerNorm(16)])
def test_norms_of_numbers_whose_squares_overflow_fp16_are_right_on_a_cpu(norm):
    x = 1000 * torch.randn(2, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = norm(x.half().float())
    assert (x.half() ** 2).isinf().any()
    assert torch.allclose(norm.half()(x.half()).float(), expected, atol=2e-3)


def test_attention_scores_that_overflow_fp16_do_no_harm():
    torch.manual_seed(0)
    block = AttentionBlock(64, 64, 16, 32).requires_grad_(False)
    block.qkv.weight.normal_(std=40)
    x, text = torch.randn(2, 64, 8, 8).half(), torch.randn(2, 5, 16).half()
    block = block.half()
    query, key = (
        block.qkv(block.norm(x).permute(0, 2, 3, 1).reshape(2, 64, 64))
        .view(2, 64, 3, 64)
        .unbind(2)[:2]
    )
    assert (query @ key.transpose(1, 2) / 8).isinf().any()
    assert block(x, *block.text_keys_values(text)).isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["base", "clip"])
def test_losses_masters_moments_and_averages_are_float32_at_every_precision(fp16, precision, kind):
    trainer, given = (
        Trainer(
            preset(f"precision={precision}")
            if kind == "base"
            else tiny_clip(*SMALL_CLIP, f"precision={precision}")
        ),
        batch(1),
    )
    step(trainer, 1, given)
    losses = trainer.objective(
        trainer.engine, trainer.schedule, given, *draw(trainer.schedule, given, 0, 1)
    )
    assert {values.dtype for values in losses.values()} == {torch.float32}
    assert (
        next(trainer.engine.module.parameters()).dtype
        == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    )
    assert {tensor.dtype for tensors in trainer.state().values() for tensor in tensors} == {
        torch.float32
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_themselves_are_computed_in_float32_from_what_a_network_of_16_bits_gives(dtype):
    given = batch(1)
    i, noise = draw(make_schedule("cosine"), given, 0, 1)
    output = ModelOutput(noise.to(dtype), torch.zeros_like(noise, dtype=dtype))
    rough = denoising(lambda *_: output, make_schedule("cosine"), given, i, noise)
    exact = denoising(
        lambda *_: ModelOutput(output.eps.float(), output.variance.float()),
        make_schedule("cosine"),
        given,
        i,
        noise,
    )
    assert all(
        torch.equal(rough[name], exact[name]) and rough[name].dtype == torch.float32
        for name in exact
    )
    clip = NoisedClip(tiny_clip(*SMALL_CLIP).model.clip).to(dtype)
    assert (
        contrastive(clip, make_schedule("cosine"), batch(1), i, noise)["loss"].dtype
        == torch.float32
    )


def test_the_average_follows_what_a_network_in_bf16_cannot_see():
    """Adam's small steps add up in the float32 masters, which the EMA averages."""
    weight = torch.ones(4)
    ema = Ema([weight], rates=(0.5,))
    for number in range(1, 9):
        weight += 1e-4
        ema.update(number)
    assert weight.to(torch.bfloat16).tolist() == [1, 1, 1, 1]
    assert 1.0005 < ema.averages["0.5"][0][0] < weight[0]


# -- optimizer offload -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_trains_as_one_on_the_device_does(stage, precision):
    settings = preset(
        f"zero_stage={stage}",
        f"precision={precision}",
        f"micro_batch={2 if precision == 'fp32' else 4}",
    )
    on_device, offloaded = Trainer(settings), Trainer(with_offload(settings))
    start = masters(on_device)
    assert (
        type(offloaded.engine.optimizer.optimizer) is torch.optim.AdamW
        and offloaded.engine.zero_use_cpu_optimizer()
    )
    assert steps(offloaded, 1, 4) == pytest.approx(steps(on_device, 1, 4), rel=1e-4)
    assert apart(masters(offloaded), masters(on_device)) < (
        0.01 if precision == "fp32" else 0.1
    ) * apart(masters(on_device), start)
    assert {tensor.device.type for tensors in offloaded.state().values() for tensor in tensors} == {
        "cpu"
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_with_and_without_offload_as_if_it_had_not_stopped(tmp_path, stage):
    settings = preset(f"zero_stage={stage}", "precision=bf16")
    first = Trainer(with_offload(settings))
    steps(first, 1, 2)
    first.save(tmp_path)
    rest = steps(first, 3, 4)
    for later in (Trainer(with_offload(settings)), Trainer(settings)):
        later.load(tmp_path)
        assert (
            steps(later, 3, 4) == pytest.approx(rest, rel=1e-4)
            and deepspeed_engine.adam_steps(later.engine) == 4
        )


def apart(one, other):
    """Euclidean distance of the parameters of two models.

    Rounding makes it positive: for gradients close to 0, Adam still takes steps of full size.
    """
    return sum((a - b).square().sum() for a, b in zip(one, other, strict=True)).sqrt()


def with_offload(settings):
    return settings.model_copy(
        update={"train": settings.train.model_copy(update={"offload_optimizer": True})}
    )


def test_offload_is_told_to_deepspeed_and_refused_where_there_is_nothing_to_offload():
    train = preset("offload_optimizer=true", "zero_stage=1").train
    assert deepspeed_config(train, "bf16", BatchSplit(4, 1, 0, 4))["zero_optimization"] == {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    with pytest.raises(
        ConfigError,
        match="train.offload_optimizer: train.zero_stage 0 steps the network's own weights "
        "on its device; use 1, 2 or 3",
    ):
        deepspeed_config(
            preset("offload_optimizer=true", "zero_stage=0").train, "fp32", BatchSplit(4, 1, 0, 4)
        )


# -- two ranks -------------------------------------------------------------------------------------


def rank_of_two(rank, folder, settings):
    """One of two ranks: train in float32, then inject faults on rank 1 only; records the errors."""
    trainer = Trainer(preset("workers=2", *settings))
    own = slice(2 * rank, 2 * rank + 2)
    losses = [step(trainer, number, batch(number)[own]) for number in range(1, 5)]
    trainer.save(Path(folder))
    said = [locate_nonfinite(trainer, batch(4)[own], 4)]
    broken = batch(5)
    broken.image[3] = float("nan")
    said.append(locate_nonfinite(trainer, broken[own], 5))
    if rank == 1:
        handle = trainer.engine.module.middle[1].block.out_conv.register_forward_hook(
            lambda module, given, output: output * float("inf")
        )
    try:
        step(trainer, 5, batch(5)[own])
    except TrainingError as error:
        said.append(str(error))
    if rank == 1:
        handle.remove()
        trainer.engine.module.out.register_forward_hook(
            lambda module, given, output: Steep.apply(output, float("inf"))
        )
    said.append(locate_nonfinite(trainer, batch(5)[own], 5))
    (Path(folder) / f"rank.{rank}.json").write_text(json.dumps({"losses": losses, "said": said}))


@pytest.mark.parametrize("settings", [["zero_stage=3", "offload_optimizer=true"], ["zero_stage=2"]])
def test_two_ranks_train_as_one_does_offloaded_or_not_and_agree_on_what_is_to_blame(
    tmp_path, settings, two_ranks
):
    two_ranks.run(rank_of_two, str(tmp_path), settings)
    ranks = [json.loads((tmp_path / f"rank.{rank}.json").read_text()) for rank in range(2)]
    alone = Trainer(preset("zero_stage=1"))
    start = masters(alone)
    assert [
        sum(losses) / 2 for losses in zip(*(rank["losses"] for rank in ranks), strict=True)
    ] == pytest.approx(steps(alone, 1, 4), rel=1e-4)
    later = Trainer(preset("zero_stage=1"))
    later.load(tmp_path)
    assert apart(masters(later), masters(alone)) < 0.01 * apart(masters(alone), start)

    said = ranks[0]["said"]
    assert ranks[1]["said"] == said and said[0] == "all values are finite when the step is repeated"
    assert said[1] == "1 of the batch's 4 images are not finite (row 503 of the corpus)"
    assert (
        "at step 5: middle.1.block.out_conv gives" in said[2] and "on rank 1 of 2; lower" in said[2]
    )
    assert said[3].startswith("the gradient that arrives at out.") and said[3].endswith(
        "on rank 1 of 2"
    )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_normalisation_in_16_bits_has_the_gradients_of_float32_and_keeps_the_layout(layout):
    torch.manual_seed(0)
    norm, gradient = GroupNorm(8, 32).bfloat16(), torch.randn(4, 32, 16, 16).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(4, 32, 16, 16).bfloat16().to(memory_format=layout).requires_grad_()
    y = norm(x)
    y.backward(gradient)
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, norm.weight, norm.bias)]
    expected = torch.nn.functional.group_norm(exact[0], 8, *exact[1:])
    expected.backward(gradient.float())
    assert y.is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout)
    for made, right in zip(
        (y, x.grad, norm.weight.grad, norm.bias.grad),
        (expected, *(tensor.grad for tensor in exact)),
        strict=True,
    ):
        assert (made.float() - right).abs().max() < 2**-7 * right.abs().max()
