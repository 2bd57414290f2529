"""`glide bench`: repeatable measurements; comparisons are ratios within one run."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import presets
from ..config.models import ModelConfig
from ..config.overrides import override
from ..config.sampling import SampleOptions
from ..config.training import SAMPLE_PROMPTS as PROMPTS
from ..config.training import Preset
from ..diffusion.guidance import combine
from ..diffusion.schedule import kept_timesteps, make_schedule
from ..errors import UserError, nearest
from ..models.cost import example_batch, example_conditioning, inspect, operations
from ..models.unet import GlideUNet
from ..models.weights import build_model
from ..precision import DTYPES
from ..sampling.cascade import Cascade
from ..sampling.request import SampleRequest
from ..sampling.stepper import Stepper
from ..tensors import Batch, Conditioning
from ..train.hardware import measured_peak


def bench_forward(
    preset: Preset, precision: str = "bf16", repeats: int = 1
) -> dict[str, float | int | str]:
    """Time and memory of one forward pass of the preset's model on the CPU, at batch size 1.

    The weights are drawn at random in `precision`.
    """
    config = preset.model
    info = inspect(config)
    began = time.perf_counter()
    model = random_model(config, DTYPES[precision])
    drawn = time.perf_counter() - began
    size = config.unet.image_size
    x, timestep = torch.randn(1, 3, size, size), torch.tensor([500])
    with torch.inference_mode():
        times = [
            _timed(lambda: model(x, timestep, example_conditioning(config, 1)))
            for _ in range(repeats)
        ]
    seconds = min(times)
    flops = info.flops + info.text_flops
    return {
        "preset": config.name,
        "precision": precision,
        "parameters_million": round(info.parameters / 1e6, 2),
        "draw_weights_s": round(drawn, 2),
        "forward_s": round(seconds, 3),
        "gflop": round(flops / 1e9, 1),
        "gflop_per_s": round(flops / seconds / 1e9, 1),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2),
    }


def bench_sample(
    preset: Preset, precision: str = "bf16", repeats: int = 5
) -> dict[str, float | int | str]:
    """One guided step of the stepper against the same step in the released code's form, on a CPU.

    The released form uses float32 and contiguous memory, and encodes the caption and the empty
    caption again at every step. The two are timed alternately.
    """
    config = preset.model
    torch.manual_seed(0)
    plain = random_model(config, torch.float32, channels_last=False)
    ours = GlideUNet(config.unet)
    ours.load_state_dict(plain.state_dict())
    stepper = Stepper(ours, config, dtype=DTYPES[precision])
    conditioning = example_conditioning(config, 1)
    size = config.unet.image_size
    x, timestep, scale = torch.randn(1, 3, size, size), torch.tensor([500]), torch.tensor([3.0])
    twice = Conditioning.join([conditioning, conditioning])
    twice.mask[1] = False

    def released_step():
        with torch.inference_mode():
            output = plain(torch.cat([x, x]), timestep.repeat(2), twice)
            return combine(output.eps[:1], output.eps[1:], scale)

    stepper.submit(SampleRequest(conditioning, seed=0, guidance_scale=3.0))
    stepper.step()  # warm-up: the first step encodes the caption
    released_step()
    pairs = [(_timed(stepper.step), _timed(released_step)) for _ in range(repeats)]
    ratios = [theirs / own for own, theirs in pairs]
    return {
        "preset": config.name,
        "precision": precision,
        "step_s": round(statistics.median(a for a, _ in pairs), 3),
        "released_form_s": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "pairs": repeats,
        "threads": torch.get_num_threads(),
    }


def bench_cascade(
    family: str = "filtered", precision: str = "fp16", repeats: int = 3, at_once: int = 16
) -> dict[str, float | int | str]:
    """Seconds per picture of `FAMILY-base` and `FAMILY-upsampler`, and pictures per second.

    The rate is that of `at_once` pictures sampled together. Weights are drawn at random. Measured
    with the models' own steps (the paper's 150 and 27, app. B.2), and with 20 DPM++ steps and 20
    steps of the upsampler. Runs on the GPU if there is one, without Ray.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steppers = []
    for role in ("base", "upsampler"):
        config = presets.get(f"{family}-{role}").model
        steppers.append(
            Stepper(
                random_model(config, DTYPES[precision], device=device),
                config,
                device,
                DTYPES[precision],
                at_once,
            )
        )
    cascade, figures = Cascade(*steppers), {}
    own = [stepper.config.sampling.respacing for stepper in steppers]
    work = sum(
        inspect(stepper.config).flops
        * (1 if stepper.config.sampling.guidance_scale == 1 else 2)
        * len(kept_timesteps(1000, steps))
        for stepper, steps in zip(steppers, own, strict=True)
    )
    for name, options in (
        ("own", SampleOptions()),
        ("20", SampleOptions(sampler="dpm++", steps=20, upsampler_steps=20)),
    ):
        for count in (1, at_once):  # warm-up: chooses kernels and records CUDA graphs
            cascade.generate(
                (PROMPTS * at_once)[:count],
                list(range(count)),
                SampleOptions(steps=2, upsampler_steps=2),
            )
        times = [
            _timed(
                lambda seed=seed, options=options: cascade.generate(PROMPTS[:1], [seed], options)
            )
            for seed in range(repeats)
        ]
        many = _timed(
            lambda options=options: cascade.generate(
                [PROMPTS[n % len(PROMPTS)] for n in range(at_once)], list(range(at_once)), options
            )
        )
        figures |= {
            f"steps_{name}_s": round(statistics.median(times), 3),
            f"steps_{name}_s_min": round(min(times), 3),
            f"steps_{name}_s_max": round(max(times), 3),
            f"steps_{name}_images_per_s": round(at_once / many, 3),
        }
    figures["steps_own_tflop_per_s"] = round(work / figures["steps_own_s"] / 1e12, 1)
    return {
        "models": family,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "precision": precision,
        "own_steps": own,
        "at_once": at_once,
        "repeats": repeats,
        **figures,
    }


# Cases for checking `glide plan`: preset, micro-batch, further settings. The last two recompute
# activations, and accumulate the gradients of two micro-batches.
SHAPES = (
    ("nano-base", 16, ()),
    ("nano-upsampler", 8, ()),
    ("nano-clip", 64, ()),
    ("emoji-base", 8, ()),
    ("emoji-upsampler", 2, ()),
    ("emoji-base", 16, ("activation_checkpointing=true",)),
    ("nano-base", 16, ("batch=32",)),
)
# Makes glibc return freed memory to the system at once: a set threshold stays at its initial value
# instead of growing with the freed blocks.
RETURNED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
# Model that only loads all code before a measurement
TINY = [
    "model.unet.image_size=16",
    "model.unet.multipliers=1,2",
    "model.unet.attention_sizes=8",
    "model.unet.head_channels=16",
    "model.unet.text.width=16",
    "model.unet.text.layers=1",
    "model.unet.text.heads=1",
    "batch=2",
    "workers=1",
]


def bench_plan(preset: str | None = None, steps: int = 3) -> dict:
    """Memory that `glide plan` predicts against the measured peak of training with one worker.

    Each case trains on this CPU in its own process. Its figure is the peak resident memory above
    that of the process after two steps of a tiny model, when all code is loaded but no model is.

    `measured`: with RETURNED_MEMORY; `default_malloc`: with the default malloc, which keeps freed
    memory in fragments. In MB of 10^6 bytes. `utilisation`: FLOP/s of the fastest step as a
    fraction of those of a matrix product. Raises UserError.
    """
    from ..train.optimizer import training_precision
    from ..train.plan import memory

    rows = []
    for name, images, settings in SHAPES:
        if preset in (None, name):
            whole = override(presets.get(name), plan_settings(images, settings))
            precision = training_precision(whole.train.precision, "cpu")
            planned = memory(whole, 1, images, precision, "cpu").total
            found, default = (
                measure_training(name, images, settings, steps, malloc)
                for malloc in (RETURNED_MEMORY, {})
            )
            work = (
                (4 if whole.train.activation_checkpointing else 3)
                * operations(whole)
                * whole.train.batch
            )
            rows.append(
                {
                    "preset": name,
                    "precision": precision,
                    "images": images,
                    "settings": list(settings),
                    "planned_mb": round(planned / 1e6, 1),
                    "measured_mb": round(found["bytes"] / 1e6, 1),
                    "ratio": round(planned / found["bytes"], 3),
                    "default_malloc_mb": round(default["bytes"] / 1e6, 1),
                    "default_malloc_ratio": round(default["bytes"] / found["bytes"], 3),
                    "process_mb": round(found["process"] / 1e6, 1),
                    "step_s": round(default["step_s"], 3),
                    "gflop_per_s": round(work / default["step_s"] / 1e9, 1),
                    "utilisation": round(work / default["step_s"] / default["peak"], 3),
                }
            )
    if not rows:
        raise UserError(
            f"bench plan has no shape of {preset!r}; "
            f"{nearest(preset, dict.fromkeys(name for name, *_ in SHAPES))}"
        )
    return {
        "ratio_min": min(row["ratio"] for row in rows),
        "ratio_max": max(row["ratio"] for row in rows),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "malloc": RETURNED_MEMORY,
        "shapes": rows,
    }


def plan_settings(images: int, settings: Sequence[str]) -> list[str]:
    """Overrides for one worker and one micro-batch of `images` per step, then `settings`."""
    return ["workers=1", f"batch={images}", f"micro_batch={images}", "start_from=none", *settings]


def measure_training(
    name: str, images: int, settings: Sequence[str], steps: int, malloc: Mapping[str, str]
) -> dict[str, float]:
    """Run `_train_and_measure` in a new process with the environment variables `malloc`.

    Raises UserError if the process fails.
    """
    call = (
        f"from glide_ray.bench.speed import _train_and_measure as run; run({name!r}, {images}, "
        f"{tuple(settings)!r}, {steps})"
    )
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "MASTER_"))
        and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    done = subprocess.run(
        [sys.executable, "-c", call],
        env={**environment, **malloc, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"measuring {name} failed: "
            f"{(done.stderr.strip() or 'killed, perhaps for want of memory').splitlines()[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _train_and_measure(name: str, images: int, settings: Sequence[str], steps: int) -> None:
    from ..train.loop import Trainer
    from ..train.optimizer import training_precision

    def train(preset: Preset, count: int) -> list[float]:
        trainer, batch = (
            Trainer(preset),
            example_batch(preset, images if preset.train.batch > 2 else 2),
        )
        batch = replace(batch, image=torch.rand_like(batch.image))
        return [
            _timed(lambda number=number: trainer.step(iter([batch] * trainer.share.calls), number))
            for number in range(1, count + 1)
        ]

    preset = override(presets.get(name), plan_settings(images, settings))
    train(override(presets.get("nano-base"), [*TINY, f"precision={preset.train.precision}"]), 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak, VmHWM
    times = train(preset, steps)
    taken = _resident("VmHWM") - process
    peak = measured_peak(DTYPES[training_precision(preset.train.precision, "cpu")])
    print(json.dumps({"bytes": taken, "process": process, "step_s": min(times), "peak": peak}))


def _resident(field: str) -> int:
    """A memory field of /proc/self/status, in bytes."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


def bench_train(
    preset: Preset, precision: str = "bf16", repeats: int = 5, images: int = 16
) -> dict[str, float | int | str]:
    """A training step of ours against those of two other loops, alternately on the same batch.

    `plain`: a PyTorch loop in float32 and contiguous memory. `bare`: a loop in our precision with
    float32 master weights and EMA, which shows the cost of DeepSpeed.
    """
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed reports on standard output that it had to guess the accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ..train.ema import Ema  # imports DeepSpeed, which only this benchmark needs
    from ..train.loop import Trainer, quiet
    from ..train.objectives import denoising, draw

    quiet()
    preset = override(
        preset,
        [
            "workers=1",
            f"batch={images}",
            f"micro_batch={images}",
            f"precision={precision}",
            "start_from=none",
        ],
    )
    model, size = preset.model, preset.data.crop or preset.model.image_size
    conditioning = example_conditioning(model, images)
    if conditioning.low_res is not None:
        conditioning = replace(
            conditioning, low_res=conditioning.low_res[..., : size // 4, : size // 4]
        )
    batch = Batch(torch.rand(images, 3, size, size) * 2 - 1, conditioning)
    trainer, schedule = (
        Trainer(preset),
        make_schedule(model.diffusion.schedule, model.diffusion.steps),
    )
    schedule, on_device = schedule.to(trainer.device), batch.to(trainer.device)

    def loop(dtype: torch.dtype, memory_format: torch.memory_format) -> Callable[[int], None]:
        network = build_model(model).train().to(trainer.device, dtype)
        network.memory_format = memory_format
        masters = (
            [parameter.detach().float().requires_grad_() for parameter in network.parameters()]
            if dtype != torch.float32
            else list(network.parameters())
        )
        # Fused in the bare loop, as in ours; PyTorch's default in the plain one
        optimiser = torch.optim.AdamW(
            masters, lr=1e-4, weight_decay=0.0, fused=dtype != torch.float32 or None
        )
        ema = Ema(masters, preset.train.ema_rates)

        def step(number: int) -> None:
            drawn = (tensor.to(trainer.device) for tensor in draw(schedule, on_device, 0, number))
            denoising(network, schedule, on_device, *drawn)["loss"].mean().backward()
            for master, parameter in zip(masters, network.parameters(), strict=True):
                if master is not parameter:
                    master.grad, parameter.grad = parameter.grad.float(), None
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                for master, parameter in zip(masters, network.parameters(), strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
            if dtype != torch.float32:
                ema.update(number)

        return step

    steps = {
        "ours": lambda number: trainer.step(iter([batch]), number),
        "plain": loop(torch.float32, torch.contiguous_format),
        "bare": loop(DTYPES[precision], torch.channels_last),
    }
    for step in steps.values():
        step(1)
    times = [
        {
            name: _timed(lambda step=step, number=number: step(number))
            for name, step in steps.items()
        }
        for number in range(2, repeats + 2)
    ]
    ratios, costs = (
        [row["plain"] / row["ours"] for row in times],
        [row["ours"] / row["bare"] for row in times],
    )
    return {
        "preset": model.name,
        "precision": precision,
        "batch": images,
        **{
            f"{name}_step_s": round(statistics.median(row[name] for row in times), 3)
            for name in steps
        },
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "to_bare": round(statistics.median(costs), 3),
        "to_bare_min": round(min(costs), 3),
        "to_bare_max": round(max(costs), 3),
        "repeats": repeats,
    }


def random_model(
    config: ModelConfig, dtype: torch.dtype, channels_last: bool = True, device: str = "cpu"
) -> GlideUNet:
    """A model with random weights, drawn directly in `dtype` on `device`.

    It is never in memory twice, nor in float32 first. Zero-initialised parameters are drawn too.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = GlideUNet(config.unet, config.diffusion).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=model.memory_format)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(function: Callable) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
