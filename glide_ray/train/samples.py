"""What is made beside a training run from the average of a checkpoint: a grid of samples, and the held-out loss.

Prompts, seeds, pictures and noise are fixed, so that what changes from grid to grid, and from figure to figure, is the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..config.training import Preset
from ..data.images import to_uint8
from ..data.tokenizer import Tokenizer
from ..data.transforms import held_out_batches
from ..diffusion.schedule import make_schedule
from ..evaluation.report import contact_sheet, show_hole
from ..models.weights import load_config, load_metadata, load_model
from ..precision import DTYPES, resolve_precision
from ..sampling.cascade import load_stepper
from ..sampling.request import SampleRequest
from ..sampling.stepper import Stepper
from ..tensors import Batch, Conditioning
from .objectives import held_out_sums, images_in, objective_of

STEPS = (
    25  # of DDIM: enough to see what a model has learnt, in a sixth of the time of the paper's 150
)
PICTURES = 4  # held-out ones that upsamplers enlarge and inpainting models fill
IMAGES_PER_CALL = 16  # held-out images in a network call
CELL = 192  # pixels on a side of a picture in the grid, at the least

Progress = Callable[[int, int], None]  # denoising steps done, and in all


def sample_grid(
    weights: Path, preset: Preset, progress: Progress | None = None
) -> np.ndarray | None:
    """A contact sheet uint8 (H, W, 3) of what a weights file makes; None of CLIP, which makes nothing. On the GPU if there is one.

    A base model is shown the run's prompts, prompt n with seed n. Upsamplers and inpainting models are shown the first held-out pictures:
    what they are given, what they make of it, and the original. Raises WeightsError, ShardError, StorageError.
    """
    config = load_config(weights)
    if config.role == "clip":
        return None
    stepper = load_stepper(weights, config.role, _precision(preset))
    shown = (
        _given
        if config.low_res_size or config.inpaint and not preset.data.generate_rate
        else _prompted
    )
    pictures, labels, columns = shown(stepper, preset, progress)
    title = f"{config.name} after step {int(load_metadata(weights).get('step', 0)):,}"
    return np.asarray(contact_sheet(pictures, labels, columns, max(CELL, config.image_size), title))


def held_out_of_average(
    weights: Path, preset: Preset, images: int | None = None
) -> dict[str, float]:
    """The held-out figures of a weights file as training has them of its own weights: {"average_held_out": loss, "average_held_out_mse": ...}.

    `images`, at most so many, instead of `data.held_out_images`. Raises WeightsError, ShardError, StorageError.
    """
    dtype = DTYPES[resolve_precision(_precision(preset), _device(), portable=True)]
    model, config = load_model(weights, dtype, _device())
    data = (
        preset.data
        if images is None
        else preset.data.model_copy(update={"held_out_images": images})
    )
    train, schedule = (
        preset.train,
        make_schedule(config.diffusion.schedule, config.diffusion.steps).to(_device()),
    )
    if config.role == "clip":  # whose loss is of a batch, not of an image
        ranks_batch = train.micro_batch or -(-train.batch // train.workers)
        batches = list(
            _as_ranks_have_them(
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


# -- prompts and pictures --------------------------------------------------------------------------

Shown = tuple[
    list[np.ndarray], list[str], int
]  # pictures, their labels, and how many stand in a row


def _prompted(stepper: Stepper, preset: Preset, progress: Progress | None) -> Shown:
    prompts = list(preset.train.sample_prompts)
    tokens, mask = Tokenizer(stepper.config.context).batch(prompts)
    return _samples(stepper, preset, Conditioning(tokens, mask), progress), prompts, 4


def _given(stepper: Stepper, preset: Preset, progress: Progress | None) -> Shown:
    """A row for each held-out picture: its low-resolution half or its known part, or both; the sample; the original."""
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
    fills = (
        config.inpaint and not preset.data.generate_rate
    )  # else it is shown as one that generates
    if fills:
        mask = torch.from_numpy(known).float().expand(len(batch.image), 1, -1, -1)
        conditioning = replace(conditioning, known=batch.image, known_mask=mask)
    tokenizer, rows = Tokenizer(config.context), []
    for n, sample in enumerate(_samples(stepper, preset, conditioning, progress)):
        original = to_uint8(batch.image[n])
        row = (
            [(to_uint8(conditioning.low_res[n]), f"{config.low_res_size} pixels")]
            if config.low_res_size
            else []
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
    """One sample of each row of the conditioning, with seeds from 0."""
    config = stepper.config
    # A model that has seen no empty caption knows nothing to lead away from.
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
    """What is known around a square hole of half the side: (`size`, `size`) bool, true = known."""
    known = np.ones((size, size), bool)
    known[size // 4 : size - size // 4, size // 4 : size - size // 4] = False
    return known


# -- how it is computed -----------------------------------------------------------------------------------------------


def _as_ranks_have_them(whole: Batch, world: int, micro_batch: int) -> Iterator[Batch]:
    """The batches of all ranks (`held_out_batches`), from the rows of all in order."""
    filling = torch.zeros(-len(whole.image) % world, dtype=torch.int64)
    places, rows = (
        torch.cat([torch.arange(len(whole.image)), filling]),
        torch.cat([whole.rows, filling - 1]),
    )
    for rank in range(world):
        own = replace(whole[places[rank::world]], rows=rows[rank::world])
        for start in range(0, len(own.image), micro_batch):
            yield own[start : start + micro_batch]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(preset: Preset) -> str:
    """That of the training, in which the weights are known to compute; on a CPU, which is slow in less, float32."""
    return preset.train.precision if _device() == "cuda" else "fp32"
