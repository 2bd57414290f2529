"""DDIM inversion: from an image to the noise that reproduces it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.samplers import ddim_inversion_step
from .request import SampleRequest
from .stepper import Stepper


@torch.inference_mode()
def invert(stepper: Stepper, requests: Sequence[SampleRequest], images: Tensor) -> Tensor:
    """The noise (N, 3, H, W) from which DDIM reproduces `images` (N, 3, H, W) in [-1, 1].

    All use the respacing of the first request. Runs the ODE of eq. 14 of Song et al. (2020)
    backwards; smaller steps reproduce the images more exactly.
    """
    samples = [stepper.prepare(request) for request in requests]
    schedule = stepper.schedules.schedule(samples[0].respacing)
    timesteps = stepper.schedules.timesteps(samples[0].respacing)
    inverted = []
    for sample, image in zip(samples, images, strict=True):
        batch = replace(sample.row, x=image[None].to(stepper.device))
        for index, timestep in enumerate(timesteps[:-1]):
            i = torch.tensor([index], device=stepper.device)
            output = stepper.denoiser.denoise([sample], batch, schedule.timestep[i], [timestep])
            batch = replace(batch, x=ddim_inversion_step(schedule, output, batch.x, i).x)
        inverted.append(batch.x)
    return torch.cat(inverted)
