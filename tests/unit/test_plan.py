"""The planned needs of a run, against the memory that it really saves, keeps and occupies."""

import re
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import tiny, tiny_clip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glide_ray.bench.training import RETURNED_MEMORY, measure_training, single_worker
from glide_ray.cli.main import main
from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.diffusion.schedule import make_schedule
from glide_ray.errors import ConfigError
from glide_ray.models.cost import example_batch, inspect, launches, operations
from glide_ray.models.lora import add_adapters
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import build_model
from glide_ray.precision import DTYPES
from glide_ray.train.activations import training_pass
from glide_ray.train.hardware import (
    GPUS,
    USABLE_GPU_MEMORY,
    Machine,
    cpu_budget,
    find_machine,
    gpu_named,
    measured_peak,
    peak_flops,
)
from glide_ray.train.memory import choose_micro_batch, memory, trained_sizes
from glide_ray.train.objectives import objective_of
from glide_ray.train.plan import best, describe, plans, step_time
from glide_ray.train.trained_part import part_of

CROPPED = ["model.unet.image_size=64", "model.unet.low_res_size=16", "data.crop=32"]
# Of models of the paper: their widths make the memory, and the layers the time of a test.
SHALLOW = ["model.unet.blocks=1", "model.unet.text.layers=2"]


def sized(*settings, batch=4):
    return tiny("base", "workers=1", f"batch={batch}", *settings)


def parameters(preset):
    return sum(parameter.numel() for parameter in build_model(preset.model).parameters())


def bytes_at(moment, images):
    """(bytes saved, bytes in total) at a moment of the pass, for this number of images."""
    saved, rest = (
        sum(size * images**power for power, size in enumerate(sizes))
        for sizes in (moment.saved, moment.rest)
    )
    return saved, saved + rest


class Alive(TorchDispatchMode):
    """Peak size in bytes of the storages that real operations allocate."""

    def __init__(self, model):
        super().__init__()
        self.sizes = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage()._cdata not in self.sizes
            ):
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def real_pass(preset, precision, images):
    """(bytes saved for the backward pass, peak bytes alive) of a real pass on this CPU.

    Parameters and gradients are not counted: a gradient is dropped once it is accumulated.
    """
    torch.manual_seed(0)
    model = build_model(preset.model).train().to(DTYPES[precision])
    model.activation_checkpointing = preset.train.activation_checkpointing
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: setattr(parameter, "grad", None)
        )
    schedule, alive, saved = make_schedule("cosine", 1000), Alive(model), {}
    own = set(alive.sizes)

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with alive:
        batch = example_batch(preset, images)
        noise = torch.randn_like(batch.image)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective_of(preset)(model, schedule, batch, torch.arange(images) * 9, noise)[
                "loss"
            ].mean()
        loss.backward()
    return sum(saved.values()), alive.most


# -- pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "preset",
    [
        sized(),
        sized("model.unet.dropout=0.1"),
        tiny("upsampler"),
        tiny("upsampler", *CROPPED),
        tiny_clip(),
        sized("model.unet.inpaint=true"),
        sized("activation_checkpointing=true"),
    ],
    ids=["base", "dropout", "upsampler", "crop", "clip", "inpaint", "checkpointing"],
)
def test_the_memory_of_a_pass_on_the_meta_device_equals_that_of_a_real_pass(preset, precision):
    saved, most = real_pass(preset, precision, 4)
    planned = [bytes_at(moment, 4) for moment in training_pass(preset, precision, "cpu")]
    assert max(alive for _, alive in planned) == pytest.approx(most, rel=0.02)
    assert max(kept for kept, _ in planned) == pytest.approx(saved, rel=0.01)


def test_a_pass_on_a_gpu_keeps_float32_copies_for_group_norm_and_a_byte_per_dropout_value():
    # With many levels the attention weights, which only a CPU keeps, are a small part of the total.
    deep = sized("model.unet.image_size=32", "model.unet.multipliers=1,1,1,1")
    greatest = {
        device: max(bytes_at(moment, 4)[0] for moment in training_pass(deep, "bf16", device))
        for device in ("cpu", "cuda")
    }
    assert greatest["cuda"] > 1.1 * greatest["cpu"]
    preset = sized("model.unet.dropout=0.1")
    assert (
        training_pass(preset, "fp16") == training_pass(preset, "fp16", "cuda")
        and F.dropout.__module__ == "torch.nn.functional"
    )
    noise, mask = (
        max(bytes_at(moment, 4)[0] for moment in training_pass(preset, "fp32", device))
        for device in ("cpu", "cuda")
    )
    unet = preset.model.unet
    dropped = 4 * sum(
        block.out_conv.in_channels * _pixels(name, unet)
        for name, block in build_model(preset.model).named_modules()
        if hasattr(block, "dropout")
    )
    # Dropout keeps float32 noise on a CPU, and a mask of bytes on a GPU.
    assert noise - mask == 3 * dropped


def _pixels(name, unet):
    """Output pixels of a residual block in the tiny model, which has two levels of one block."""
    half, whole = (unet.image_size // 2) ** 2, unet.image_size**2
    return {
        "down.0.block": whole,
        "down.1.block": half,
        "down.2.block": half,
        "middle.0.block": half,
        "middle.1.block": half,
        "up.0.block": half,
        "up.1.block": half,
        "up.1.resample": whole,
        "up.2.block": whole,
        "up.3.block": whole,
    }[name]


def test_a_rank_plans_without_communicating_with_the_others(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert training_pass(tiny_clip("model.clip.embedding=24"), "fp32", "cpu")
    assert torch.distributed.is_initialized()


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, precision",
    [(0, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")],
)
def test_the_planned_training_state_equals_that_of_a_trainer(stage, precision):
    from glide_ray.train import deepspeed_engine
    from glide_ray.train.loop import Trainer

    preset = sized(f"zero_stage={stage}", f"precision={precision}", "ema_rates=0.9,0.99")
    trainer = Trainer(preset)
    kept = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (
            *(
                getattr(parameter, "ds_tensor", parameter)
                for parameter in trainer.engine.module.parameters()
            ),
            *deepspeed_engine.masters(trainer.engine),
            *(
                tensor
                for tensors in deepspeed_engine.moments(trainer.engine).values()
                for tensor in tensors
            ),
            *(tensor for tensors in trainer.ema.averages.values() for tensor in tensors),
        )
    }
    fixed = max((memory(preset, 1, 4, precision, "cpu"),), key=lambda needs: needs.total)
    assert fixed.parameters + fixed.optimizer + fixed.averages == pytest.approx(
        sum(kept.values()), rel=0.001
    )


def test_each_zero_stage_reduces_memory_by_the_computed_amount():
    preset = override(presets.get("paper-base"), SHALLOW)
    whole, world = inspect(preset.model).parameters, 64
    part = -(-whole // world)
    needs = [
        memory(
            override(preset, [f"zero_stage={stage}", "activation_checkpointing=false"]),
            world,
            16,
            "fp16" if stage else "fp32",
        )
        for stage in range(4)
    ]
    assert (needs[0].parameters, needs[0].optimizer, needs[0].averages) == (
        4 * whole,
        8 * whole,
        4 * whole,
    )
    for stage in (1, 2, 3):
        assert (needs[stage].optimizer, needs[stage].averages) == (12 * part, 4 * part)
    assert needs[1].parameters == needs[2].parameters == 2 * whole
    assert needs[1].gradients >= 2 * whole and needs[2].gradients < 2 * whole
    assert needs[0].total > needs[1].total > needs[2].total > needs[3].total


def test_an_offloaded_optimizer_frees_gpu_memory_and_costs_memory_on_a_cpu():
    preset = override(presets.get("paper-base"), SHALLOW)
    away = override(preset, ["offload_optimizer=true"])
    assert memory(away, 8, 1, "fp16").averages == 0
    assert memory(preset, 8, 1, "fp16").total - memory(away, 8, 1, "fp16").total >= 16 * (
        inspect(preset.model).parameters // 8
    )
    assert memory(away, 8, 1, "bf16", "cpu").total > memory(preset, 8, 1, "bf16", "cpu").total


def test_each_further_average_takes_four_bytes_per_parameter_of_the_shard():
    preset = sized("zero_stage=1")
    one, two = (
        memory(override(preset, [f"ema_rates={rates}"]), 2, 2, "bf16")
        for rates in ("0.9", "0.9,0.99")
    )
    assert two.averages - one.averages == 4 * -(-parameters(preset) // 2) == one.averages


def test_gradients_stay_in_memory_between_the_calls_of_a_batch():
    preset = override(presets.get("paper-upsampler"), SHALLOW)
    whole = inspect(preset.model).parameters
    for stage, kept in ((1, 2 * whole), (2, 2 * -(-whole // 64))):
        once, often = (
            memory(
                override(
                    preset,
                    [f"zero_stage={stage}", "activation_checkpointing=false", f"batch={batch}"],
                ),
                64,
                2,
                "fp16",
            )
            for batch in (128, 256)
        )
        assert often.gradients - once.gradients == pytest.approx(kept, rel=0.001)


def test_stage_0_without_float32_master_weights_is_refused_as_in_training():
    with pytest.raises(ConfigError, match="zero_stage: 0 keeps no float32 master weights"):
        memory(sized("zero_stage=0"), 1, 1, "bf16")


# -- micro-batch -----------------------------------------------------------------------------------


def test_the_micro_batch_is_the_largest_that_fits_split_evenly():
    preset = sized(batch=50)
    for budget in (
        memory(preset, 1, images, "fp32", "cpu").total for images in (1, 7, 12, 24, 26, 49)
    ):
        chosen = choose_micro_batch(preset, 1, "fp32", budget, "cpu")
        fitting = [
            images
            for images in range(1, 51)
            if memory(preset, 1, images, "fp32", "cpu").total <= budget
        ]
        assert chosen == -(-50 // -(-50 // max(fitting))) and chosen in fitting
    assert choose_micro_batch(preset, 1, "fp32", 1e12, "cpu") == 50
    assert choose_micro_batch(preset, 3, "fp32", 1e12, "cpu") == 17  # the largest of three parts
    assert (
        choose_micro_batch(
            presets.get("paper-base"), 64, "fp16", USABLE_GPU_MEMORY * GPUS["h100"].memory
        )
        == 32
    )


def test_a_micro_batch_from_the_settings_is_used_unchanged():
    preset = sized("micro_batch=3", batch=8)
    assert (
        choose_micro_batch(preset, 1, "fp32", 1, "cpu") == 3
        and choose_micro_batch(preset, 4, "fp32", 1, "cpu") == 2
    )


@pytest.mark.parametrize(
    "name, world, gpu, precision",
    [
        ("paper-base", 8, "l4", "fp16"),
        ("paper-base", 64, "v100", "fp16"),
        ("paper-base", 2, "a100", "fp16"),
        ("paper-base", 1, "l40s", "fp16"),
    ],
)
def test_if_no_image_fits_one_sentence_names_a_remedy_that_works(name, world, gpu, precision):
    preset, budget = (
        override(presets.get(name), ["activation_checkpointing=false", "zero_stage=1"]),
        GPUS[gpu].memory * USABLE_GPU_MEMORY,
    )
    with pytest.raises(ConfigError) as error:
        choose_micro_batch(preset, world, precision, budget)
    message = str(error.value)
    assert (
        message.startswith(f"Training {name} on {world} worker")
        and message.endswith(".")
        and "\n" not in message
    )
    workers = re.search(r"use (\d+) workers", message)
    changed = override(
        preset, [setting.rstrip(".") for setting in re.findall(r"train\.\S+=\S+", message)]
    )
    assert (
        changed != preset
        and memory(changed, int(workers[1]) if workers else world, 1, precision).total <= budget
    )


def test_a_model_that_no_setting_makes_fit_is_reported():
    with pytest.raises(ConfigError, match="set train.zero_stage=2|use a device"):
        choose_micro_batch(override(presets.get("nano-base"), ["zero_stage=0"]), 2, "fp32", 1e8)
    with pytest.raises(ConfigError, match="use a device with more memory"):
        large = override(presets.get("paper-upsampler"), SHALLOW)
        choose_micro_batch(large, 64, "fp16", 1e9)


# -- time ------------------------------------------------------------------------------------------


def test_a_step_takes_3_or_4_times_the_forward_operations_plus_communication():
    preset, machine = presets.get("filtered-base"), Machine("given", 1e12, 1e14, 5e10)
    info = inspect(preset.model)
    forward, sent = info.flops + info.text_flops, 2 * info.parameters * 15 / 16 / 5e10
    for settings, calls, times, factor in (
        (["zero_stage=1"], 4, 3, 3),
        (["zero_stage=2"], 4, 9, 3),
        (["zero_stage=3", "activation_checkpointing=true"], 2, 6, 4),
    ):
        step = step_time(override(preset, settings), 16, 128 // calls, "fp16", machine)
        assert step.compute == pytest.approx(
            factor * forward * 128 / 1e14
        ) and step.communication == pytest.approx(times * sent)
        assert step.total == pytest.approx(step.compute + step.communication)
    assert step_time(preset, 1, 2048, "fp16", machine).communication == 0


def test_small_batches_take_the_time_to_launch_their_operations():
    machine = find_machine("h100", 256, "fp16")
    preset = override(presets.get("filtered-base"), ["batch=4096", "zero_stage=1"])
    forward, tensors = launches(preset.model)
    assert 1600 < forward < 2000 and tensors == len(list(GlideUNet(preset.model.unet).parameters()))
    step = step_time(override(preset, ["batch=16"]), 1, 16, "bf16", machine)
    # A plain loop of PyTorch takes 0.188 s for the same images (docs/benchmarks.md).
    # How many operations attention has depends on the backend that PyTorch chooses.
    assert step.launch == pytest.approx(0.188 + 4.2 * tensors * 0.188 / 4112, rel=0.1)
    assert step.total == step.launch > 2 * step.compute
    two = step_time(override(preset, ["batch=32"]), 1, 16, "bf16", machine)
    assert two.launch - step.launch == pytest.approx(0.188, rel=0.15)
    large = step_time(override(preset, ["batch=256"]), 1, 256, "bf16", machine)
    assert large.launch == step.launch < large.compute == large.total
    assert step_time(preset, 16, 4, "fp32", find_machine("cpu", 16, "fp32", tflops=1)).launch == 0


def test_a_plan_tells_the_size_of_a_checkpoint(tmp_path):
    preset = tiny("base", "workers=1", "ema_rates=0.9,0.99", "zero_stage=1", "precision=fp32")
    text, _ = describe(preset, find_machine("cpu", 1, "fp32", tflops=1))
    size = 20 * inspect(preset.model).parameters / 1e9
    assert f"a checkpoint has {size:,.3f} GB, {size:,.3f} a worker" in text


def test_operations_are_counted_at_the_training_size():
    whole, cropped = (
        presets.get("nano-upsampler").model_copy(
            update={"data": override(presets.get("nano-upsampler"), [f"crop={crop}"]).data}
        )
        for crop in ("none", "64")
    )
    text = inspect(whole.model).text_flops
    assert operations(whole) == inspect(whole.model).flops + text
    # At 32 x 32 pixels attention is a small part, so operations are proportional to the area.
    assert operations(cropped) - text == pytest.approx((operations(whole) - text) / 16, rel=0.05)


def test_the_best_plan_fits_and_is_within_10_percent_of_the_fastest():
    preset = override(presets.get("paper-base"), [*SHALLOW, "workers=8", "batch=64"])
    machine = find_machine("a100-80gb", 8, "fp16")
    ways = plans(preset, 8, "fp16", machine)
    chosen = best(ways, preset, "fp16")
    assert len(ways) == 14 and chosen.fits and chosen.memory.total <= machine.budget
    assert chosen.time.total <= 1.1 * min(way.time.total for way in ways if way.fits)
    assert best([replace(way, fits=False) for way in ways], preset, "fp16") is None


# -- hardware --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, precision, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA A10G", "fp16", 70),
        ("NVIDIA A10", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),
        ("NVIDIA GeForce RTX 3060", "fp16", 25.5),
        ("NVIDIA RTX A6000", "fp16", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", "fp16", 364.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_a_gpu_is_recognised_by_the_name_from_its_driver(name, precision, tflops):
    assert peak_flops(name, precision) == pytest.approx(tflops * 1e12)


def test_figures_missing_from_a_data_sheet_are_not_guessed():
    assert (
        peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
        and peak_flops("Some GPU 3000", "fp16") is None
    )
    with pytest.raises(ConfigError, match="v100 has no bf16 arithmetic; use fp16"):
        find_machine("v100", 1, "bf16")
    assert gpu_named("A100 80GB") is GPUS["a100-80gb"]


def test_a_gpu_outside_the_table_needs_its_memory_and_its_speed():
    given = find_machine("rtx-9999", 1, "fp16", tflops=50, memory=12)
    assert given.name == "rtx-9999" and given.flops == 50e12
    assert given.budget == pytest.approx(12e9 * 0.9) and given.launch > 0
    assert find_machine("h100", 1, "fp16", memory=40).budget == pytest.approx(40e9 * 0.9)
    with pytest.raises(ConfigError, match="no GPU 'rtx-9999' in the table.*--memory and --tflops"):
        find_machine("rtx-9999", 1, "fp16", tflops=50)


def test_the_cpu_is_measured_and_workers_share_its_memory():
    assert 1e9 < measured_peak(torch.float32, seconds=0.05) < 1e14
    assert (
        0 < cpu_budget(2) < cpu_budget(1)
        and find_machine("cpu", 1, "auto", tflops=2, link=3).flops == 2e12
    )


# -- command ---------------------------------------------------------------------------------------


def test_a_plan_shows_memory_time_and_price_and_its_options_work_for_training(capsys):
    assert (
        main(
            [
                "plan",
                "paper-base",
                "--gpus",
                "64",
                "--gpu",
                "h100",
                "--set",
                "batch=2048",
                "--price",
                "2.5",
                "--utilisation",
                "0.4",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for word in (
        "3,554.41M parameters",
        "parameters  gradients  optimizer  averages  activations  workspace",
        "396 TFLOP/s",
        "40% of its peak",
        "days",
        "at 2.5 each",
    ):
        assert word in printed
    flags = re.findall(r"--set (\S+)", printed)
    run = override(presets.get("paper-base"), flags)
    assert run.train.workers == 64 and run.train.batch == 2048
    assert (
        memory(run, 64, run.train.micro_batch, "fp16").total
        <= USABLE_GPU_MEMORY * GPUS["h100"].memory
    )
    hours, worker_hours, price = (
        float(re.search(pattern, printed)[1].replace(",", ""))
        for pattern in (r"in ([\d,.]+) days", r"([\d,.]+) worker", r"each ([\d,]+)")
    )
    assert worker_hours == pytest.approx(hours * 24 * 64, rel=0.01) and price == pytest.approx(
        2.5 * worker_hours, rel=0.001
    )


def test_plan_has_detailed_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0 and "It computes and starts nothing" in capsys.readouterr().out


def test_a_plan_for_this_machine_needs_no_gpu(capsys):
    assert main(["plan", "nano-base", "--gpu", "cpu", "--gpus", "2", "--tflops", "0.1"]) == 0
    assert "in fp32, on 2 x cpu: batch 16, 8 images a worker" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h10"], "There is no GPU 'h10' in the table; did you mean 'h100'?"),
        (["--gpu", "v100", "--set", "precision=bf16"], "v100 has no bf16"),
        (["--gpu", "h100", "--utilisation", "40"], "utilisation must lie above 0 and at most at 1"),
        (["--gpu", "h100", "--set", "train.step=3"], "did you mean"),
        (["--gpu", "h100", "--tflops", "-1"], "above 0"),
    ],
)
def test_an_invalid_plan_is_refused_in_one_sentence(capsys, arguments, message):
    assert main(["plan", "paper-base", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_a_run_that_does_not_fit_is_shown_and_refused(capsys):
    assert (
        main(
            [
                "plan",
                "nano-base",
                "--gpus",
                "1",
                "--gpu",
                "t4",
                "--set",
                "batch=8",
                "--set",
                "model.unet.channels=4096",
            ]
        )
        == 2
    )
    printed = capsys.readouterr()
    assert (
        printed.out.count("does not fit") == 14
        and "does not fit 1 x t4 in any of these ways" in printed.err
    )


def test_the_table_marks_the_best_plan_and_counts_its_calls():
    preset = override(presets.get("nano-base"), ["workers=1", "batch=8192"])
    text, chosen = describe(preset, find_machine("t4", 1, "fp16"))
    (row,) = (line for line in text.splitlines() if line.startswith("*"))
    assert row.split()[4:6] == [str(chosen.micro_batch), str(-(-8192 // chosen.micro_batch))]


# -- against this machine --------------------------------------------------------------------------


def test_the_planned_memory_of_nano_base_is_within_15_percent_of_a_trainers():
    planned = memory(
        override(presets.get("nano-base"), single_worker(8, ())), 1, 8, "fp32", "cpu"
    ).total
    measured = measure_training("nano-base", 8, (), 2, RETURNED_MEMORY)["bytes"]
    assert abs(planned / measured - 1) < 0.15


@pytest.mark.parametrize(
    "settings, names",
    [
        (["lora_rank=4"], lambda name: ".lora." in name),
        (["freeze=text,attention"], lambda name: part_of(name) == "convolutions"),
    ],
    ids=["an adapter", "parts"],
)
def test_weights_that_a_run_keeps_need_no_gradient_and_no_optimizer(settings, names):
    preset = override(
        presets.get("nano-base"), ["workers=1", "zero_stage=1", "start_from=any", *settings]
    )
    whole = build_model(preset.model)
    if preset.train.lora_rank:
        add_adapters(whole, 4, preset.train.lora_alpha)
    trained = sum(one.numel() for name, one in whole.named_parameters() if names(name))
    assert sum(trained_sizes(preset)) == trained
    needs = memory(preset, 1, 4, "bf16", "cuda")
    assert needs.parameters == 2 * sum(one.numel() for one in whole.parameters())
    assert needs.optimizer == 12 * trained
    assert needs.averages == 4 * trained * preset.train.averages
    every = override(presets.get("nano-base"), ["workers=1", "zero_stage=1"])
    assert needs.total < memory(every, 1, 4, "bf16", "cuda").total
