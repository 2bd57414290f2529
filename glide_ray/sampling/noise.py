"""The noise of a sample: a function of its seed, its task and its stage alone.

Drawn on the CPU, so that a picture does not depend on the rest of the batch, on the replica or on
retries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class NoiseSource(Protocol):
    """A stream of standard normal noise."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """The next numbers, float32, on the CPU."""
        ...


class HashedNoise:
    """Scheme 2: a Philox generator whose key is a hash of seed, task and stage.

    All bits of the seed count, and an edit or variation with the seed of a generated picture draws
    other noise than that picture was made from. With the same noise, variations come out with
    burnt colours.
    """

    def __init__(self, seed: int, task: str, stage: str):
        digest = hashlib.sha256(f"glide_ray {seed} {task} {stage}".encode()).digest()
        key = np.frombuffer(digest[:16], "<u8")
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(self._generator.standard_normal(tuple(shape), dtype=np.float32))


class SeededNoise:
    """Scheme 1, of recipes before version 0.2: torch's generator, for every task and stage alike.

    It keeps 32 bits of the seed.
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def noise_source(scheme: int, seed: int, task: str, stage: str) -> NoiseSource:
    """The noise of a sample. `task`: generate, edit or vary; `stage`: base or upsampler."""
    return SeededNoise(seed) if scheme == 1 else HashedNoise(seed, task, stage)
