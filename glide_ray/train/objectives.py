"""Training objectives, one function per task: a new task is one objective and one preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ..config.models import ClipModelConfig, ModelConfig
from ..config.training import Preset
from ..diffusion.loss import hybrid_loss, min_snr_weight
from ..diffusion.process import q_sample
from ..diffusion.schedule import Schedule
from ..tensors import Batch

# Metric name -> (B,) float32. "loss" is minimised, the others are for logging only.
Losses = dict[str, Tensor]
QUARTILES = 4  # equal ranges of timesteps for which the mse is logged separately
Objective = Callable[[Callable, Schedule, Batch, Tensor, Tensor], Losses]


def denoising(
    network: Callable,
    schedule: Schedule,
    batch: Batch,
    i: Tensor,
    noise: Tensor,
    weight: Callable[[Schedule, Tensor], Tensor | None] = lambda schedule, i: None,
) -> Losses:
    """The hybrid loss (sec. 2.1) of images noised to timestep indices i (B,).

    `noise` has the shape of batch.image. `weight` returns the weight of the eps error, (B,), or
    None for 1. In inpainting, samplers overwrite the known pixels of the predicted image; so does
    the loss, by replacing eps there with the true noise. If the network had to copy the known
    pixels itself, it would spoil the pixels beside them (docs/editing.md).
    """
    x_t = q_sample(schedule, batch.image, i, noise)
    output = network(x_t, schedule.timestep.to(i.device)[i], batch.conditioning)
    if batch.conditioning.known_mask is not None:
        output = replace(
            output,
            eps=torch.where(
                batch.conditioning.known_mask > 0.5, noise.to(output.eps.dtype), output.eps
            ),
        )
    loss = hybrid_loss(schedule, output, batch.image, x_t, i, noise, weight(schedule, i))
    return {"loss": loss.total, "mse": loss.mse, "vb": loss.vb}


def contrastive(
    network: Callable, schedule: Schedule, batch: Batch, i: Tensor, noise: Tensor
) -> Losses:
    """Noised CLIP's loss (sec. 4.4; Radford et al. 2021, fig. 3), on images noised to indices i.

    Cross-entropy of each image against all captions and of each caption against all images. "All"
    means the rows of one network call on every rank: with gradient accumulation each micro-batch
    is contrasted separately, so a smaller micro-batch makes the task easier and changes the loss.

    Each rank computes the loss of its own rows. The all-gather passes gradients back to the rank
    of an embedding, so that the mean over ranks, taken by data parallelism, is the gradient of the
    loss over all rows. Held-out batches are not gathered.
    """
    return _contrast(
        network, q_sample(schedule, batch.image, i, noise), schedule.timestep.to(i.device)[i], batch
    )


def contrastive_without_noise(
    network: Callable, schedule: Schedule, batch: Batch, i: Tensor, noise: Tensor
) -> Losses:
    """The contrastive loss for a CLIP that scores finished images: no noise, timestep 0."""
    return _contrast(network, batch.image, torch.zeros_like(i), batch)


def _contrast(network: Callable, x: Tensor, timestep: Tensor, batch: Batch) -> Losses:
    output, i = network(x, timestep, batch.conditioning.tokens, batch.conditioning.mask), timestep
    images, texts, first = output.image, output.text, 0
    if torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1:
        images, texts = (
            torch.cat(all_gather(images.contiguous())),
            torch.cat(all_gather(texts.contiguous())),
        )
        first = dist.get_rank() * len(i)
    targets = first + torch.arange(len(i), device=i.device)
    to_text, to_image = output.scale * output.image @ texts.T, output.scale * output.text @ images.T
    loss = (
        F.cross_entropy(to_text, targets, reduction="none")
        + F.cross_entropy(to_image, targets, reduction="none")
    ) / 2
    return {"loss": loss, "accuracy": (to_text.argmax(1) == targets).float()}


# Upsamplers have the base model's loss; their conditioning contains the low-resolution image.
OBJECTIVES: dict[str, Objective] = {"base": denoising, "upsampler": denoising, "clip": contrastive}


def objective_of(preset: Preset) -> Objective:
    """The objective of a preset, with its Min-SNR weighting if that is set."""
    if isinstance(preset.model, ClipModelConfig) and not preset.model.clip.noised:
        return contrastive_without_noise
    if isinstance(preset.model, ModelConfig) and preset.train.min_snr is not None:
        least = 0.0 if preset.model.unet.prediction == "eps" else 1.0
        return partial(
            denoising, weight=partial(min_snr_weight, most=preset.train.min_snr, least=least)
        )
    return OBJECTIVES[preset.train.objective]


def draw(
    schedule: Schedule, batch: Batch, seed: int, step: int, power: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw timestep indices i (B,) and standard normal noise like batch.image, on the CPU.

    The density of i is proportional to i^power. Each image has its own generator, seeded by the
    run's seed, the step and the image's row in the corpus, so that a step does not depend on how
    its batch is split over workers and micro-batches.
    """
    i, noise = torch.empty(len(batch.image), dtype=torch.int64), torch.empty(batch.image.shape)
    for n, row in enumerate(row_numbers(batch).tolist()):
        generator = torch.Generator().manual_seed(mix(seed, step, row))
        i[n] = _index(len(schedule), power, generator)
        torch.randn(noise.shape[1:], generator=generator, out=noise[n])
    return i, noise


def _index(steps: int, power: float, generator: torch.Generator) -> Tensor:
    """Draw an index in [0, steps) with density proportional to index^power."""
    if power == 0:
        return torch.randint(0, steps, (), generator=generator)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return (uniform ** (1 / (1 + power)) * steps).long()


def row_numbers(batch: Batch) -> Tensor:
    """Row numbers in the corpus (B,), on the CPU; 0, 1, 2... if the batch has none."""
    return torch.arange(len(batch.image)) if batch.rows is None else batch.rows.cpu()


def mix(seed: int, step: int, row: int) -> int:
    """Combine three numbers into one 63-bit seed."""
    return (seed * 1_000_003 + step * 8191 + row) % 2**63


def images_in(batches: Iterable[Batch]) -> int:
    """Number of held-out images in `batches`, without padding rows (row number -1)."""
    return sum(int((row_numbers(batch) >= 0).sum()) for batch in batches)


@torch.no_grad()
def held_out_sums(
    objective: Objective,
    network: Callable,
    schedule: Schedule,
    batches: Iterable[Batch],
    seed: int,
    images: int,
) -> dict[str, Tensor]:
    """Sums of the objective's metrics over held-out batches: float64 scalars.

    `batch.rows` numbers the held-out images of all workers from 0 to `images` - 1 (`images_in`);
    padding rows (-1) do not count. Timestep indices are spread evenly over the schedule and the
    noise is fixed, so that the metrics change with the weights only.
    """
    everywhere = ((torch.arange(images) + 0.5) / max(1, images) * len(schedule)).long()
    everywhere = everywhere[torch.randperm(images, generator=torch.Generator().manual_seed(seed))]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        rows = row_numbers(batch)
        i, counts = everywhere[rows % images].to(batch.image.device), (rows >= 0).double()
        noise = torch.stack(
            [
                torch.randn(
                    batch.image.shape[1:],
                    generator=torch.Generator().manual_seed(mix(seed, 0, row)),
                )
                for row in rows.tolist()
            ]
        )
        for name, values in objective(
            network, schedule, batch, i, noise.to(batch.image.device)
        ).items():
            sums[name] = sums.get(name, 0) + (values.double().cpu() * counts).sum()
    return sums


def by_quartile(mse: Tensor, i: Tensor, steps: int) -> dict[str, Tensor]:
    """Sum of the eps error `mse` (B,) and row count per quartile of the timesteps i (B,).

    q0 is the least noisy quartile.
    """
    quartile = F.one_hot(i * QUARTILES // steps, QUARTILES).to(mse.dtype)
    sums, counts = mse @ quartile, quartile.sum(0)
    return {
        **{f"mse_q{n}": sums[n] for n in range(QUARTILES)},
        **{f"rows_q{n}": counts[n] for n in range(QUARTILES)},
    }


def quartile_means(figures: dict[str, float]) -> dict[str, float]:
    """Replace the sums and counts of `by_quartile` by means, leaving out empty quartiles."""
    rows = {
        name.removeprefix("rows_"): value
        for name, value in figures.items()
        if name.startswith("rows_q")
    }
    means = {
        f"mse_{quarter}": figures[f"mse_{quarter}"] / count
        for quarter, count in rows.items()
        if count
    }
    return {name: value for name, value in figures.items() if "_q" not in name} | means
