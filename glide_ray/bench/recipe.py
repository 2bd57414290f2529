"""`glide bench recipe`: which training settings learn fastest.

Compares them at equal CPU time and over several seeds.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

import torch

from ..config import presets
from ..config.overrides import override
from ..config.training import Preset
from ..data.transforms import held_out_batches
from ..diffusion.process import q_sample, x0_from_eps
from ..tensors import Batch, Conditioning
from ..train.single import SingleTrainer
from ..train.without_ray import MemoryCorpus

log = logging.getLogger(__name__)

# Overrides of the preset; each variation changes one thing
VARIATIONS: dict[str, list[str]] = {
    "preset": [],
    "predict eps": ["model.unet.prediction=eps"],
    "even weight": ["min_snr=none"],
    "predict eps, even weight": ["model.unet.prediction=eps", "min_snr=none"],
    "uniform timesteps": ["timestep_power=0"],
    "half the learning rate": ["learning_rate=6e-4"],
    "twice the learning rate": ["learning_rate=2.4e-3"],
    "half the batch": ["batch=32"],
    "twice the batch": ["batch=128"],
    "squares of 8 pixels, twice the channels": [
        "model.unet.patch=8",
        "model.unet.multipliers=2,3,4",
        "model.unet.attention_sizes=4,2",
    ],
    "squares of 2 pixels, half the channels": [
        "model.unet.patch=2",
        "model.unet.channels=32",
        "model.unet.multipliers=1,2,4,8",
        "model.unet.attention_sizes=8,4",
    ],
    "attention at 8, 4 and 2": ["model.unet.attention_sizes=8,4,2"],
}
# Timesteps at which x_0 is predicted: where details, parts, shapes and colours are decided
TIMESTEPS = (200, 400, 600, 800)


def bench_recipe(
    corpus: str,
    held_out: str,
    seconds: float = 180,
    repeats: int = 3,
    names: Sequence[str] = (),
) -> dict:
    """Held-out RMSE of predicted x_0 after `seconds` of the training thread's CPU time.

    The EMA weights predict x_0 from noised images and their captions. Gives the mean over TIMESTEPS
    and its standard error over `repeats` seeds. `names`: some of VARIATIONS, all if empty.
    """
    found = {}
    for name in names or VARIATIONS:
        errors, images = [], []
        for seed in range(repeats):
            preset = override(
                presets.get("emoji-base"),
                [
                    f"data.corpus={corpus}",
                    f"data.held_out={held_out}",
                    "steps=1000000",
                    f"seed={seed}",
                    *VARIATIONS[name],
                ],
            )
            error, count = _learn(preset, seconds)
            errors.append(error)
            images.append(count)
            log.info(f"{name}, seed {seed}: {error:.4f} after {count:,} images")
        spread = statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
        found[name] = {
            "rmse": round(statistics.mean(errors), 4),
            "standard_error": round(spread, 4),
            "images": round(statistics.mean(images)),
        }
    return {
        "preset": "emoji-base",
        "seconds": seconds,
        "seeds": repeats,
        "timesteps": list(TIMESTEPS),
        "recipes": found,
    }


def _learn(preset: Preset, seconds: float) -> tuple[float, int]:
    """Train for `seconds` of CPU time. Returns the held-out RMSE and the number of images seen."""
    corpus, trainer = MemoryCorpus(preset), SingleTrainer(preset)
    # CPU time of this thread only: decoding happens in another thread, and a longer run decodes
    # once for all its epochs.
    batches, number, began = corpus.endless(), 0, time.thread_time()
    while time.thread_time() - began < seconds:
        number += 1
        trainer.step(batches, number)
    with trainer.ema.in_place(preset.train.ema_rates[0]):
        trainer.refresh()
        return x0_error(
            trainer, held_out_batches(preset.data, preset.model, 32)
        ), number * preset.train.batch


@torch.no_grad()
def x0_error(trainer: SingleTrainer, batches: Sequence[Batch]) -> float:
    """RMSE of x_0, in [-1, 1], predicted at TIMESTEPS without known pixels; the noise is fixed."""
    trainer.network.eval()
    errors = []
    for timestep in TIMESTEPS:
        generator, squares = torch.Generator().manual_seed(timestep), []
        for batch in batches:
            i = torch.full((len(batch.image),), timestep)
            noise = torch.randn(batch.image.shape, generator=generator)
            x_t = q_sample(trainer.schedule, batch.image, i, noise)
            unknown = Conditioning(batch.conditioning.tokens, batch.conditioning.mask)
            eps = trainer.network(x_t, i, unknown).eps
            squares.append(
                (x0_from_eps(trainer.schedule, x_t, i, eps).clamp(-1, 1) - batch.image)
                .square()
                .flatten(1)
                .mean(1)
            )
        errors.append(torch.cat(squares).mean().sqrt().item())
    return statistics.mean(errors)
