"""Training of a base model's text transformer alone, before its U-Net.

It predicts small pictures from captions, with an L2 loss: the mean of what the model should draw
from pure noise. A caption costs an eighth of a U-Net's training image, and a U-Net that cannot draw
yet passes little gradient to the text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.unet import GlideUNet
from ..tensors import Batch

SIDE = 16  # pixels of the small pictures
CAPTIONS = 128  # in a step
LEARNING_RATE, WARMUP, BETAS, CLIP = 1.5e-3, 50, (0.9, 0.99), 1.0
SPREAD = 0.5  # standard deviation of the pooled text over captions, at the end
SEEN = 50  # steps that the report is of
Report = Callable[[str], None]


def learn_words(
    model: GlideUNet,
    batches: Iterator[Batch],
    minutes: float,
    report: Report = lambda line: None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Train `model.text` for `minutes`, at least one step; the rest of the model stays.

    `batches`: batches of CAPTIONS without end, of the model's image size; `dtype`: of the matrix
    products. Gives the share of the pictures' variance that the captions explain, over the last
    steps. The pooled text is then brought to mean 0 and standard deviation SPREAD, as the U-Net
    adds it to the time embedding.
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
            report(
                f"words: {step * len(target):,} captions, {explained(errors):.0%} of the "
                f"pictures' variance explained"
            )
        batch = next(batches)
    with torch.no_grad():
        standardise(text.pool, torch.cat([text(*caption)[1] for caption in captions]))
    return explained(errors)


def explained(errors: deque[tuple[float, float]]) -> float:
    """The share of a variance that is explained, from (squared error, variance) of some steps."""
    return 1 - sum(error for error, _ in errors) / sum(variance for _, variance in errors)


@torch.no_grad()
def standardise(pool: nn.Linear, pooled: Tensor) -> None:
    """Change the last layer so that what was `pooled` (N, C) has mean 0 and deviation SPREAD."""
    scale = SPREAD / pooled.std(0).mean().clamp_min(1e-6)
    pool.weight.mul_(scale)
    pool.bias.sub_(pooled.mean(0)).mul_(scale)


def _small(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3 SIDE^2)."""
    return F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)
