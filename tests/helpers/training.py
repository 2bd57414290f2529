"""A training run of six steps on random batches, in this process or by two ranks."""

import os
import tempfile
from pathlib import Path

import torch

from glide_ray.data.tokenizer import Tokenizer
from glide_ray.tensors import Batch, Conditioning
from glide_ray.train import deepspeed_engine, partition
from glide_ray.train.steps import TrainCallbacks, train_loop
from helpers.tiny import tiny

STEPS = 6


def preset(*settings):
    return tiny(
        "base",
        "workers=1",
        "batch=4",
        "micro_batch=4",  # or each new model's memory is planned
        f"steps={STEPS}",
        "log_every=1",
        "evaluate_every=3",
        "checkpoint_every=2",
        "precision=fp32",
        "warmup_steps=3",
        "ema_rates=0.9",
        "clip_norm=0.5",
        *settings,
    )


def join_two_ranks(rank, port):
    """Join the process group of two ranks whose rank 0 listens at `port` of this machine."""
    import deepspeed

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    deepspeed_engine.quiet()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def batch(number, size=4, broken=False):
    generator = torch.Generator().manual_seed(number)
    tokens, mask = Tokenizer().batch(["a red circle", "a dog", "x", "a b c"][:size])
    image = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    rows = 100 * number + torch.arange(size)
    return Batch(image * float("nan") if broken else image, Conditioning(tokens, mask), rows)


def epochs(epoch, rows):
    """Three batches of 4 rows an epoch, numbered across epochs, without the first `rows` rows."""
    return iter([batch(10 * epoch + n) for n in range(rows // 4, 3)])


def run(trainer, folder=None, batches=epochs):
    """Train to the end; returns (metrics, checkpoint folders, EMA weights)."""
    metrics, saved = [], []

    def checkpoint(write):
        if folder is not None:
            saved.append(folder / str(len(saved)))
            saved[-1].mkdir(parents=True)
            write(saved[-1])

    train_loop(trainer, batches, [batch(999)], TrainCallbacks(metrics.append, checkpoint))
    return metrics, saved, averaged(trainer)


def averaged(trainer):
    """The EMA weights as this rank's checkpoint stores them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder))
        with partition.CheckpointReader(Path(folder)) as parts:
            return {
                name: parts.full(f"average/{trainer.preset.train.ema_rates[0]:g}", name)
                for name in parts.shapes
            }
