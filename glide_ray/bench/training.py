"""`glide bench train` and `glide bench plan`: training speed, and memory against the plan."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import presets
from ..config.overrides import override
from ..config.training import Preset
from ..diffusion.schedule import make_schedule
from ..errors import UserError, nearest
from ..models.cost import example_batch, example_conditioning, operations
from ..models.weights import build_model
from ..precision import DTYPES, training_precision
from ..tensors import Batch
from ..train.hardware import measured_peak
from ..train.memory import memory
from .speed import timed, unet_config

# Cases for checking `glide plan`: preset, micro-batch, further settings. The last two recompute
# activations, and accumulate the gradients of two micro-batches.
SHAPES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("nano-base", 16, ()),
    ("nano-upsampler", 8, ()),
    ("nano-clip", 64, ()),
    ("emoji-base", 8, ()),
    ("emoji-upsampler", 2, ()),
    ("emoji-base", 16, ("activation_checkpointing=true",)),
    ("nano-base", 16, ("batch=32",)),
    ("emoji-base", 8, ("start_from=emoji", "lora_rank=8")),
    ("emoji-base", 8, ("start_from=emoji", "freeze=text,attention")),
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
    rows = [_planned_and_measured(*shape, steps) for shape in SHAPES if preset in (None, shape[0])]
    if preset is not None and not rows:
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


def _planned_and_measured(name: str, images: int, settings: Sequence[str], steps: int) -> dict:
    preset = override(presets.get(name), single_worker(images, settings))
    precision = training_precision(preset.train.precision, "cpu")
    planned = memory(preset, 1, images, precision, "cpu").total
    found, default = (
        measure_training(name, images, settings, steps, malloc) for malloc in (RETURNED_MEMORY, {})
    )
    passes = 4 if preset.train.activation_checkpointing else 3
    work = passes * operations(preset) * preset.train.batch
    return {
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


def single_worker(images: int, settings: Sequence[str]) -> list[str]:
    """Overrides for one worker and one micro-batch of `images` per step, then `settings`."""
    return ["workers=1", f"batch={images}", f"micro_batch={images}", "start_from=none", *settings]


def measure_training(
    name: str, images: int, settings: Sequence[str], steps: int, malloc: Mapping[str, str]
) -> dict[str, float]:
    """Run `_train_and_measure` in a new process with the environment variables `malloc`.

    Raises UserError if the process fails.
    """
    call = (
        f"from glide_ray.bench.training import _train_and_measure as run; run({name!r}, {images}, "
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

    def train(preset: Preset, count: int) -> list[float]:
        trainer, batch = (
            Trainer(preset),
            example_batch(preset, images if preset.train.batch > 2 else 2),
        )
        batch = replace(batch, image=torch.rand_like(batch.image))
        return [
            timed(
                lambda number=number: trainer.step(
                    iter([batch] * trainer.batch_split.calls), number
                )
            )
            for number in range(1, count + 1)
        ]

    preset = override(presets.get(name), single_worker(images, settings))
    train(override(presets.get("nano-base"), [*TINY, f"precision={preset.train.precision}"]), 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak, VmHWM
    times = train(preset, steps)
    used = _resident("VmHWM") - process
    peak = measured_peak(DTYPES[training_precision(preset.train.precision, "cpu")])
    print(json.dumps({"bytes": used, "process": process, "step_s": min(times), "peak": peak}))


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
    """Training steps of this trainer and of two other loops, alternately on the same batch.

    `plain`: a PyTorch loop in float32 and contiguous memory. `bare`: a loop in our precision with
    float32 master weights and EMA, which shows the cost of DeepSpeed. Raises UserError for a CLIP.
    """
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed reports on standard output that it had to guess the accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ..train.deepspeed_engine import quiet
    from ..train.loop import Trainer  # imports DeepSpeed, which only this benchmark needs

    quiet()
    preset = override(preset, single_worker(images, [f"precision={precision}"]))
    batch, trainer = _random_batch(preset, images), Trainer(preset)
    on_device = batch.to(trainer.device)
    steps = {
        "ours": lambda number: trainer.step(iter([batch]), number),
        "plain": _plain_loop(preset, on_device, torch.float32, torch.contiguous_format),
        "bare": _plain_loop(preset, on_device, DTYPES[precision], torch.channels_last),
    }
    for step in steps.values():
        step(1)
    times = [
        {name: timed(lambda step=step, number=number: step(number)) for name, step in steps.items()}
        for number in range(2, repeats + 2)
    ]
    ratios = [row["plain"] / row["ours"] for row in times]
    costs = [row["ours"] / row["bare"] for row in times]
    return {
        "preset": preset.model.name,
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


def _random_batch(preset: Preset, images: int) -> Batch:
    size = preset.data.crop or preset.model.image_size
    conditioning = example_conditioning(unet_config(preset), images)
    if conditioning.low_res is not None:
        conditioning = replace(
            conditioning, low_res=conditioning.low_res[..., : size // 4, : size // 4]
        )
    return Batch(torch.rand(images, 3, size, size) * 2 - 1, conditioning)


def _plain_loop(
    preset: Preset, batch: Batch, dtype: torch.dtype, memory_format: torch.memory_format
) -> Callable[[int], None]:
    """A training step in plain PyTorch, by number; below float32 with master weights and EMA."""
    from ..train.ema import Ema
    from ..train.objectives import denoising, draw

    model, device = preset.model, batch.image.device
    schedule = make_schedule(model.diffusion.schedule, model.diffusion.steps).to(device)
    network = build_model(model).train().to(device, dtype)
    network.memory_format = memory_format
    masters = (
        [parameter.detach().float().requires_grad_() for parameter in network.parameters()]
        if dtype != torch.float32
        else list(network.parameters())
    )
    # AdamW: fused in the bare loop, as in our trainer; PyTorch's default in the plain loop
    optimiser = torch.optim.AdamW(
        masters, lr=1e-4, weight_decay=0.0, fused=dtype != torch.float32 or None
    )
    ema = Ema(masters, preset.train.ema_rates)

    def step(number: int) -> None:
        i, noise = (tensor.to(device) for tensor in draw(schedule, batch, 0, number))
        denoising(network, schedule, batch, i, noise)["loss"].mean().backward()
        for master, parameter in zip(masters, network.parameters(), strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, network.parameters(), strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        if dtype != torch.float32:
            ema.update(number)

    return step
