"""What a training step computes, one function a task: a new task is one objective and one preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..data.masks import random_known
from ..diffusion.loss import HybridLoss, hybrid_loss
from ..diffusion.process import q_sample
from ..diffusion.schedule import Schedule
from ..forms import Batch, Conditioning, ModelOutput

Network = Callable[[Tensor, Tensor, Conditioning], ModelOutput]


def denoising(network: Network, schedule: Schedule, batch: Batch, i: Tensor, noise: Tensor) -> HybridLoss:
    """The hybrid loss of noised images at the indices i (B,), for given noise like batch.image (sec. 2.1)."""
    x_t = q_sample(schedule, batch.image, i, noise)
    output = network(x_t, schedule.timestep.to(i.device)[i], batch.conditioning)
    return hybrid_loss(schedule, output, batch.image, x_t, i, noise)


# An upsampler's loss is the base model's; its batches carry the low-resolution image in their conditioning.
OBJECTIVES: dict[str, Callable[..., HybridLoss]] = {"base": denoising, "upsampler": denoising}


def with_known_pixels(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch of the inpainting task (sec. 4.3): each image with a part of it known. An upsampler has the whole low-res image."""
    pencil = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    size = batch.image.shape[-1]
    mask = torch.from_numpy(np.stack([random_known(size, pencil) for _ in range(len(batch.image))])[:, None]).float()
    return replace(batch, conditioning=replace(batch.conditioning, known=batch.image, known_mask=mask.to(batch.image.device)))


def draw(schedule: Schedule, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform indices (B,) and standard normal noise like batch.image, from a CPU generator, on the batch's device."""
    i = torch.randint(0, len(schedule), (len(batch.image),), generator=generator)
    noise = torch.randn(batch.image.shape, generator=generator)
    return i.to(batch.image.device), noise.to(batch.image.device)


@torch.no_grad()
def held_out_sums(objective: Callable[..., HybridLoss], network: Network, schedule: Schedule, batches: Sequence[Batch],
                  seed: int = 0, inpaint: bool = False) -> Tensor:
    """Sums of (total, mse, vb) over the batches and their number of images: float64 (4,).

    Indices lie evenly over the schedule, and noise and masks are fixed, so that the figure moves with the weights only.
    """
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(batch.image) for batch in batches)
    everywhere = ((torch.arange(count) + 0.5) / max(1, count) * len(schedule)).long()
    everywhere = everywhere[torch.randperm(count, generator=generator)]
    sums, start = torch.zeros(4, dtype=torch.float64), 0
    for batch in batches:
        i = everywhere[start:start + len(batch.image)].to(batch.image.device)
        noise = torch.randn(batch.image.shape, generator=generator).to(batch.image.device)
        batch = with_known_pixels(batch, generator) if inpaint else batch
        loss = objective(network, schedule, batch, i, noise)
        sums += torch.stack([loss.total.sum(), loss.mse.sum(), loss.vb.sum(), loss.total.new_tensor(len(i))]).double().cpu()
        start += len(i)
    return sums
