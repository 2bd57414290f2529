"""Evaluation of a checkpoint's EMA during training: a grid of samples, and the held-out loss.

Prompts, seeds, images and noise are fixed, so that grids and losses change with the weights only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..config.lora import Lora
from ..config.training import Preset
from ..data.images import to_uint8
from ..data.tokenizer import Tokenizer
from ..data.transforms import held_out_batches
from ..diffusion.schedule import make_schedule
from ..evaluation.report import contact_sheet, show_hole
from ..models.adapters import adding, is_adapter
from ..models.weights import load_config, load_metadata, load_model
from ..precision import DTYPES, resolve_precision
from ..pretrained import shipped
from ..progress import Progress
from ..sampling.cascade import load_stepper
from ..sampling.request import SampleRequest
from ..sampling.stepper import Stepper
from ..tensors import Batch, Conditioning
from .objectives import held_out_sums, images_in, objective_of

# DDIM steps: enough to see what a model has learnt, in a sixth of the time of the paper's 150.
STEPS = 25
PICTURES = 4  # held-out images for the grids of upsamplers and inpainting models
IMAGES_PER_CALL = 16  # held-out images per network call
CELL = 192  # minimum side of an image in the grid, in pixels


def sample_grid(
    weights: Path, preset: Preset, progress: Progress | None = None
) -> np.ndarray | None:
    """A contact sheet of samples from a weights file, uint8 (H, W, 3); None for CLIP.

    Base models sample the run's prompts, prompt n with seed n. Upsamplers and inpainting models
    sample from the first held-out images: each row shows their input, the sample and the original.
    Uses the GPU if there is one. Raises WeightsError, ShardError, StorageError.
    """
    if preset.model.role == "clip":
        return None
    whole, loras = files_of(weights, preset)
    config = load_config(whole)
    stepper = load_stepper(whole, config.role, _precision(preset), loras=loras)
    shown = (
        _from_held_out
        if config.low_res_size or config.inpaint and not preset.data.generate_rate
        else _from_prompts
    )
    pictures, labels, columns = shown(stepper, preset, progress)
    title = f"{config.name} after step {int(load_metadata(weights).get('step', 0)):,}"
    return np.asarray(contact_sheet(pictures, labels, columns, max(CELL, config.image_size), title))


def held_out_of_average(
    weights: Path, preset: Preset, images: int | None = None
) -> dict[str, float]:
    """Held-out metrics of a weights file, computed as training does for its current weights.

    Returns {"average_held_out": loss, "average_held_out_mse": ...}. `images`: maximum number of
    held-out images, instead of `data.held_out_images`. Raises WeightsError, ShardError,
    StorageError.
    """
    dtype = DTYPES[resolve_precision(_precision(preset), _device(), portable=True)]
    whole, loras = files_of(weights, preset)
    model, config = load_model(whole, dtype, _device(), adding(loras, preset.model.role, whole))
    data = (
        preset.data
        if images is None
        else preset.data.model_copy(update={"held_out_images": images})
    )
    train, schedule = (
        preset.train,
        make_schedule(config.diffusion.schedule, config.diffusion.steps).to(_device()),
    )
    if config.role == "clip":  # its loss depends on the batch: use the batches of training
        ranks_batch = train.micro_batch or -(-train.batch // train.workers)
        batches = list(
            _batches_of_all_ranks(
                Batch.join(held_out_batches(data, config, ranks_batch)), train.workers, ranks_batch
            )
        )
    else:
        batches = held_out_batches(data, config, IMAGES_PER_CALL)
    count = images_in(batches)
    sums = held_out_sums(
        objective_of(preset),
        model,
        schedule,
        (batch.to(_device()) for batch in batches),
        train.seed,
        count,
    )
    return {
        "average_held_out" if name == "loss" else f"average_held_out_{name}": float(value / count)
        for name, value in sums.items()
    }


def files_of(weights: Path, preset: Preset) -> tuple[Path, tuple[Lora, ...]]:
    """The whole weights of a run's file, and the adapters to add to them.

    A run that trains an adapter has whole weights in `start_from` only. Raises WeightsError.
    """
    if not is_adapter(weights):
        return weights, ()
    assert preset.train.start_from
    whole = shipped.fetch(preset.train.start_from, preset.model.role)
    return whole, (Lora(path=str(weights)),)


# -- prompts and pictures --------------------------------------------------------------------------

# Images of the grid, their labels, and the number of columns.
GridPictures = tuple[list[np.ndarray], list[str], int]


def _from_prompts(stepper: Stepper, preset: Preset, progress: Progress | None) -> GridPictures:
    prompts = list(preset.train.sample_prompts)
    tokens, mask = Tokenizer(stepper.config.context).batch(prompts)
    return _samples(stepper, preset, Conditioning(tokens, mask), progress), prompts, 4


def _from_held_out(stepper: Stepper, preset: Preset, progress: Progress | None) -> GridPictures:
    """A row per held-out image: model input, sample, original.

    The input is the low-resolution image, the known pixels, or both.
    """
    config = stepper.config
    batch = Batch.join(
        held_out_batches(
            preset.data.model_copy(update={"held_out_images": PICTURES}), config, PICTURES
        )
    )
    known, conditioning = (
        centre_hole(config.image_size),
        replace(batch.conditioning, known=None, known_mask=None),
    )
    # Inpainting models also trained to generate (`generate_rate`) sample without known pixels.
    fills = config.inpaint and not preset.data.generate_rate
    if fills:
        mask = torch.from_numpy(known).float().expand(len(batch.image), 1, -1, -1)
        conditioning = replace(conditioning, known=batch.image, known_mask=mask)
    low_res = conditioning.low_res if config.low_res_size else None
    tokenizer, rows = Tokenizer(config.context), []
    for n, sample in enumerate(_samples(stepper, preset, conditioning, progress)):
        original = to_uint8(batch.image[n])
        row = (
            [(to_uint8(low_res[n]), f"{config.low_res_size} pixels")] if low_res is not None else []
        )
        row += [(show_hole(original, known), "known")] if fills else []
        rows.append(
            [
                *row,
                (sample, tokenizer.decode(conditioning.tokens[n].tolist())),
                (original, "original"),
            ]
        )
    return (
        [picture for row in rows for picture, _ in row],
        [label for row in rows for _, label in row],
        len(rows[0]),
    )


def _samples(
    stepper: Stepper, preset: Preset, conditioning: Conditioning, progress: Progress | None
) -> list[np.ndarray]:
    """One sample per row of the conditioning, with seeds 0, 1, 2..."""
    config = stepper.config
    # Guidance needs the unconditional eps, which only models trained with empty captions have.
    scale = config.sampling.guidance_scale if preset.data.empty_caption_rate else 1.0
    requests = [
        SampleRequest(
            conditioning[n : n + 1],
            seed=n,
            respacing=str(min(STEPS, config.diffusion.steps)),
            sampler="ddim",
            guidance_scale=scale,
        )
        for n in range(len(conditioning.tokens))
    ]
    return [to_uint8(image) for image in stepper.run(requests, progress)]


def centre_hole(size: int) -> np.ndarray:
    """Mask with a central square hole of half the side: (`size`, `size`) bool, true = known."""
    known = np.ones((size, size), bool)
    known[size // 4 : size - size // 4, size // 4 : size - size // 4] = False
    return known


# -- batches, device and precision -----------------------------------------------------------------


def _batches_of_all_ranks(all_rows: Batch, world: int, micro_batch: int) -> Iterator[Batch]:
    """Split all held-out rows into the batches of all ranks, as `held_out_batches` does."""
    assert all_rows.rows is not None  # `held_out_batches` numbers the rows
    filling = torch.zeros(-len(all_rows.image) % world, dtype=torch.int64)
    places, rows = (
        torch.cat([torch.arange(len(all_rows.image)), filling]),
        torch.cat([all_rows.rows, filling - 1]),
    )
    for rank in range(world):
        of_rank = replace(all_rows[places[rank::world]], rows=rows[rank::world])
        for start in range(0, len(of_rank.image), micro_batch):
            yield of_rank[start : start + micro_batch]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(preset: Preset) -> str:
    """On a GPU the training precision, in which the weights are known to work; on a CPU fp32.

    CPUs are slow in 16 bits.
    """
    return preset.train.precision if _device() == "cuda" else "fp32"
