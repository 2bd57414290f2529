"""`glide bench forward`, `sample` and `cascade`: speed of the network and of sampling.

Comparisons are ratios within one run.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..config import presets
from ..config.models import ModelConfig
from ..config.sampling import SampleOptions
from ..config.training import SAMPLE_PROMPTS as PROMPTS
from ..config.training import Preset
from ..diffusion.guidance import combine
from ..diffusion.schedule import make_schedule, respace
from ..errors import UserError
from ..models.cost import example_conditioning, inspect
from ..models.layers import channels_last as in_channels_last
from ..models.unet import GlideUNet
from ..precision import DTYPES
from ..sampling.cascade import Cascade
from ..sampling.request import SampleRequest
from ..sampling.stepper import Stepper
from ..tensors import Conditioning


def bench_forward(
    preset: Preset, precision: str = "bf16", repeats: int = 1
) -> dict[str, float | int | str]:
    """Time and memory of one forward pass of the preset's model on the CPU, at batch size 1.

    The weights are drawn at random in `precision`. Raises UserError for a CLIP.
    """
    config = unet_config(preset)
    info = inspect(config)
    began = time.perf_counter()
    model = random_model(config, DTYPES[precision])
    drawn = time.perf_counter() - began
    size = config.unet.image_size
    x, timestep = torch.randn(1, 3, size, size), torch.tensor([500])
    with torch.inference_mode():
        times = [
            timed(lambda: model(x, timestep, example_conditioning(config, 1)))
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
    Raises UserError for a CLIP.
    """
    config = unet_config(preset)
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
    pairs = [(timed(stepper.step), timed(released_step)) for _ in range(repeats)]
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
) -> dict[str, Any]:
    """Seconds per picture of `FAMILY-base` and `FAMILY-upsampler`, and pictures per second.

    The rate is that of `at_once` pictures sampled together. Weights are drawn at random. Measured
    with the models' own steps (the paper's 150 and 27, app. B.2), and with 20 DPM++ steps and 20
    steps of the upsampler. Runs on the GPU if there is one, without Ray.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steppers = []
    for role in ("base", "upsampler"):
        config, dtype = unet_config(presets.get(f"{family}-{role}")), DTYPES[precision]
        model = random_model(config, dtype, device=device)
        steppers.append(Stepper(model, config, device, dtype, at_once))
    cascade = Cascade(steppers[0], steppers[1])
    figures: dict[str, float] = {}
    own = [stepper.config.sampling.respacing for stepper in steppers]
    work = sum(
        inspect(stepper.config).flops
        * (1 if stepper.config.sampling.guidance_scale == 1 else 2)
        * len(respace(make_schedule(stepper.config.diffusion.schedule), steps))
        for stepper, steps in zip(steppers, own, strict=True)
    )
    for name, options in (
        ("own", SampleOptions()),
        ("20", SampleOptions(sampler="dpm++", steps=20, upsampler_steps=20)),
    ):
        figures |= _cascade_times(cascade, f"steps_{name}", options, repeats, at_once)
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


def _cascade_times(
    cascade: Cascade, name: str, options: SampleOptions, repeats: int, at_once: int
) -> dict[str, float]:
    for count in (1, at_once):  # warm-up: chooses kernels and records CUDA graphs
        cascade.generate(
            (PROMPTS * at_once)[:count],
            list(range(count)),
            SampleOptions(steps=2, upsampler_steps=2),
        )
    times = [
        timed(lambda seed=seed: cascade.generate(PROMPTS[:1], [seed], options))
        for seed in range(repeats)
    ]
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(at_once)]
    many = timed(lambda: cascade.generate(prompts, list(range(at_once)), options))
    return {
        f"{name}_s": round(statistics.median(times), 3),
        f"{name}_s_min": round(min(times), 3),
        f"{name}_s_max": round(max(times), 3),
        f"{name}_images_per_s": round(at_once / many, 3),
    }


def unet_config(preset: Preset) -> ModelConfig:
    """The model of a preset. Raises UserError for a CLIP."""
    if not isinstance(preset.model, ModelConfig):
        raise UserError(
            f"{preset.model.name} is a CLIP, which this benchmark does not measure; give the "
            "preset of a base model or an upsampler."
        )
    return preset.model


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
    if channels_last:
        model.memory_format = torch.channels_last
        return in_channels_last(model)
    model.memory_format = torch.contiguous_format
    return model


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timed(function: Callable) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
