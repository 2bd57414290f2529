"""What a training step computes, one function a task: a new task is one objective and one preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from ..config.models import ClipModelConfig
from ..config.training import Preset
from ..diffusion.loss import hybrid_loss, min_snr_weight
from ..diffusion.process import q_sample
from ..diffusion.schedule import Schedule
from ..tensors import Batch

Losses = dict[
    str, Tensor
]  # name -> (B,) float32; "loss" is the one to minimise, the others are for people
QUARTILES = 4  # of the timesteps, by which a run tells its loss
Objective = Callable[[Callable, Schedule, Batch, Tensor, Tensor], Losses]


def denoising(
    network: Callable,
    schedule: Schedule,
    batch: Batch,
    i: Tensor,
    noise: Tensor,
    weight: Callable[[Schedule, Tensor], Tensor | None] = lambda schedule, i: None,
) -> Losses:
    """The hybrid loss of noised images at the indices i (B,), for given noise like batch.image (sec. 2.1); `weight` of eps' error.

    Where pixels are known the samplers put them into the predicted image, whatever the network says of them; so does the loss, and
    eps is there the noise itself. Left to the network, the copying of known pixels spoils those beside them (docs/editing.md).
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
    """Noised CLIP's loss (sec. 4.4; Radford et al. 2021, fig. 3): each image is to find its caption among all, and the reverse.

    "All" are those of one network call on every rank: of a batch that takes several calls, each is contrasted by itself, and so a smaller
    micro-batch is another, easier task. A rank's loss is of its own rows; the gather hands gradients back to where an embedding came from, so
    that the mean over ranks, which data parallelism takes, is the gradient of the loss of all. Held-out batches are not gathered.
    """
    return _contrast(
        network, q_sample(schedule, batch.image, i, noise), schedule.timestep.to(i.device)[i], batch
    )


def contrastive_without_noise(
    network: Callable, schedule: Schedule, batch: Batch, i: Tensor, noise: Tensor
) -> Losses:
    """The same loss of a CLIP that is to judge finished images: they are shown as they are, at timestep 0."""
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
    own = first + torch.arange(len(i), device=i.device)
    to_text, to_image = output.scale * output.image @ texts.T, output.scale * output.text @ images.T
    loss = (
        F.cross_entropy(to_text, own, reduction="none")
        + F.cross_entropy(to_image, own, reduction="none")
    ) / 2
    return {"loss": loss, "accuracy": (to_text.argmax(1) == own).float()}


# An upsampler's loss is the base model's; its batches carry the low-resolution image in their conditioning.
OBJECTIVES: dict[str, Objective] = {"base": denoising, "upsampler": denoising, "clip": contrastive}


def objective_of(preset: Preset) -> Objective:
    """What a preset's training steps compute."""
    if isinstance(preset.model, ClipModelConfig) and not preset.model.clip.noised:
        return contrastive_without_noise
    if preset.train.min_snr is not None:
        least = 0.0 if preset.model.unet.prediction == "eps" else 1.0
        return partial(
            denoising, weight=partial(min_snr_weight, most=preset.train.min_snr, least=least)
        )
    return OBJECTIVES[preset.train.objective]


def draw(
    schedule: Schedule, batch: Batch, seed: int, step: int, power: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Indices i (B,) with a density proportional to i^power, and standard normal noise like
    batch.image, on the CPU.

    Each image has a generator of its own, seeded by the run, the step and the image's row in the corpus: what a step computes does
    not depend on how its batch is split over workers and micro-batches.
    """
    i, noise = torch.empty(len(batch.image), dtype=torch.int64), torch.empty(batch.image.shape)
    for n, row in enumerate(row_numbers(batch).tolist()):
        generator = torch.Generator().manual_seed(mix(seed, step, row))
        i[n] = _index(len(schedule), power, generator)
        torch.randn(noise.shape[1:], generator=generator, out=noise[n])
    return i, noise


def _index(steps: int, power: float, generator: torch.Generator) -> Tensor:
    """One of the numbers below `steps`."""
    if power == 0:
        return torch.randint(0, steps, (), generator=generator)
    uniform = torch.rand((), generator=generator, dtype=torch.float64)
    return (uniform ** (1 / (1 + power)) * steps).long()


def row_numbers(batch: Batch) -> Tensor:
    """Which rows of the corpus these are (B,), on the CPU; of a batch that does not say, 0, 1, 2..."""
    return torch.arange(len(batch.image)) if batch.rows is None else batch.rows.cpu()


def mix(seed: int, step: int, row: int) -> int:
    """One 63-bit seed from three numbers, different for each."""
    return (seed * 1_000_003 + step * 8191 + row) % 2**63


def images_in(batches: Iterable[Batch]) -> int:
    """How many held-out images there are in batches: rows of number -1 only fill theirs."""
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
    """Sums over the batches of all that the objective gives: float64 scalars.

    `batch.rows` number the held-out images from 0 to `images`, over all workers (`images_in`); those of number -1 do not count.
    Indices lie evenly over the schedule, and noise is fixed, so that the figure moves with the weights only.
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
    """Sums of eps' error (B,) over the rows of each quarter of the timesteps, q0 the least noisy, and how many rows these are."""
    quartile = F.one_hot(i * QUARTILES // steps, QUARTILES).to(mse.dtype)
    sums, counts = mse @ quartile, quartile.sum(0)
    return {
        **{f"mse_q{n}": sums[n] for n in range(QUARTILES)},
        **{f"rows_q{n}": counts[n] for n in range(QUARTILES)},
    }


def quartile_means(figures: dict[str, float]) -> dict[str, float]:
    """Figures with the quarters' sums divided by their rows; a quarter that no row fell into is left out."""
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
