"""Pretraining of a base model's text transformer, before its U-Net is trained.

It predicts downscaled images from captions with an L2 loss, whose optimum is the mean image that
the diffusion model should predict from pure noise. A caption costs an eighth of a U-Net training
image, and a U-Net that cannot draw yet passes little gradient to the text transformer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.unet import GlideUNet
from ..tensors import Batch

log = logging.getLogger(__name__)

SIDE = 16  # side of the predicted images, in pixels
CAPTIONS = 128  # captions per step
LEARNING_RATE, WARMUP, BETAS, CLIP = 1.5e-3, 50, (0.9, 0.99), 1.0
SPREAD = 0.5  # final standard deviation of the pooled text embedding over captions
SEEN = 50  # latest steps that the explained variance and the pooled statistics are taken over


def learn_words(
    model: GlideUNet,
    batches: Iterator[Batch],
    minutes: float,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Train `model.text` for `minutes`, at least one step; the rest of the model is unchanged.

    `batches`: endless batches of CAPTIONS images of the model's image size; `dtype`: precision of
    the matrix products. Returns the fraction of the images' variance that the captions explain,
    over the last SEEN steps. Finally normalises the pooled text embedding to mean 0 and standard
    deviation SPREAD, because the U-Net adds it to the time embedding.
    """
    text, device = model.text.train(), next(model.parameters()).device
    first = next(batches)
    mean = _small(first.image.to(device)).mean(0)
    head = nn.Linear(text.pool.out_features, mean.numel(), device=device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(mean)
    parameters = [*text.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, fused=True)
    errors: deque[tuple[float, float]] = deque(maxlen=SEEN)
    captions: deque[tuple[Tensor, Tensor]] = deque(maxlen=SEEN)
    began, step, batch = time.monotonic(), 0, first
    while step == 0 or time.monotonic() - began < 60 * minutes:
        left = 1 - (time.monotonic() - began) / (60 * minutes) if minutes else 1.0
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * min(1, 2 * max(left, 0))
        target = _small(batch.image.to(device))
        caption = batch.conditioning.tokens.to(device), batch.conditioning.mask.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = head(F.silu(text(*caption)[1]))
        loss = F.mse_loss(predicted.float(), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        errors.append((loss.item(), (target - mean).square().mean().item()))
        captions.append(caption)
        step += 1
        if step % (10 * SEEN) == 0:
            log.info(
                f"text transformer: {step * len(target):,} captions, {explained(errors):.0%} of "
                "the pictures' variance explained"
            )
        batch = next(batches)
    with torch.no_grad():
        standardise(text.pool, torch.cat([text(*caption)[1] for caption in captions]))
    return explained(errors)


def explained(errors: deque[tuple[float, float]]) -> float:
    """Fraction of variance explained (R^2), from the (squared error, variance) of some steps."""
    return 1 - sum(error for error, _ in errors) / sum(variance for _, variance in errors)


@torch.no_grad()
def standardise(pool: nn.Linear, pooled: Tensor) -> None:
    """Rescale layer `pool`, so that its outputs `pooled` (N, C) get mean 0 and std SPREAD."""
    scale = SPREAD / pooled.std(0).mean().clamp_min(1e-6)
    pool.weight.mul_(scale)
    pool.bias.sub_(pooled.mean(0)).mul_(scale)


def _small(images: Tensor) -> Tensor:
    """Downscale and flatten: (B, 3, S, S) -> (B, 3 * SIDE^2)."""
    return F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)
