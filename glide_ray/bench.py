"""`glide bench`: measurements that anyone can repeat, as ratios within one run where two things are compared."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

from .config import ModelConfig, Preset
from .diffusion.guidance import combine
from .forms import Conditioning
from .info import example_conditioning, inspect
from .models.unet import GlideUNet
from .stepper import SampleRequest, Stepper

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench_forward(preset: Preset, precision: str = "bf16", repeats: int = 1) -> dict[str, float | int | str]:
    """One real forward of the preset's model on the CPU, its weights drawn at random in `precision`."""
    config = preset.model
    info = inspect(config)
    began = time.perf_counter()
    model = random_model(config, PRECISIONS[precision])
    drawn = time.perf_counter() - began
    size = config.unet.image_size
    x, timestep = torch.randn(1, 3, size, size), torch.tensor([500])
    with torch.inference_mode():
        times = [_timed(lambda: model(x, timestep, example_conditioning(config, 1))) for _ in range(repeats)]
    seconds = min(times)
    flops = info.flops + info.text_flops
    return {"preset": config.name, "precision": precision, "parameters_million": round(info.parameters / 1e6, 2),
            "draw_weights_s": round(drawn, 2), "forward_s": round(seconds, 3), "gflop": round(flops / 1e9, 1),
            "gflop_per_s": round(flops / seconds / 1e9, 1), "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2)}


def bench_sample(preset: Preset, precision: str = "bf16", repeats: int = 5) -> dict[str, float | int | str]:
    """One guided step in the stepper against the same step as the released code takes it on a CPU, in turn.

    The other side: float32, contiguous memory, and caption and empty caption encoded anew at every step.
    """
    config = preset.model
    torch.manual_seed(0)
    plain = random_model(config, torch.float32, channels_last=False)
    ours = GlideUNet(config.unet)
    ours.load_state_dict(plain.state_dict())
    stepper = Stepper(ours, config, dtype=PRECISIONS[precision])
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
    stepper.step()          # the first encodes the caption
    released_step()
    pairs = [(_timed(stepper.step), _timed(released_step)) for _ in range(repeats)]
    ratios = [theirs / own for own, theirs in pairs]
    return {"preset": config.name, "precision": precision, "step_s": round(statistics.median(a for a, _ in pairs), 3),
            "released_form_s": round(statistics.median(b for _, b in pairs), 3),
            "ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
            "pairs": repeats, "threads": torch.get_num_threads()}


def random_model(config: ModelConfig, dtype: torch.dtype, channels_last: bool = True) -> GlideUNet:
    """A model drawn directly in `dtype`: never in memory twice, nor in float32 first. Its zeros are drawn too."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = GlideUNet(config.unet).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=model.memory_format)


def peak_memory_bytes() -> int:
    """The most that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _timed(function: Callable) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
