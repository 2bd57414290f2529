"""A sample from its request to its end, as the stepper keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.samplers import History
from ..tensors import Conditioning, Rows, TextFeatures


@dataclass(frozen=True)
class SampleRequest:
    """One image to make. `conditioning` has one row; None takes the model's own SamplingConfig."""

    conditioning: Conditioning
    seed: int
    respacing: str | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (
        0.0,
        1.0,
    )  # of the timesteps, 1 the noisiest: outside of it nothing guides
    clip_text: Tensor | None = (
        None  # (1, E): the caption as the stepper's critic embeds it, for CLIP guidance
    )
    clip_scale: float = 0.0
    noise: Tensor | None = None  # (3, H, W): to begin from, instead of the seed's (see `invert`)
    start: Tensor | None = None  # (3, H, W): an image to begin from instead of noise (SDEdit)
    strength: float = 1.0  # how much of the schedule is run from `start`
    group: str | None = None  # samples of one group count as one when it is decided who goes first
    previews: int = (
        0  # how often on the way, evenly, `watch` is shown the predicted image (3, H, W)
    )
    watch: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class SampleBatch(Rows):
    """The tensors of S samples, a row each."""

    x: Tensor  # (S, 3, H, W) float32
    clip_text: Tensor  # (S, E)
    history: History
    conditioning: Conditioning
    text: TextFeatures


@dataclass
class ActiveSample:
    """What is known of a sample without asking the device, and its row while it is not batched with others."""

    ticket: int
    request: SampleRequest
    respacing: str
    sampler: str
    scale: float  # of classifier-free guidance
    generator: torch.Generator
    steps: int  # in all
    left: int  # still to go: the next one is at index left - 1 of its schedule
    due: float  # the smallest goes first
    edits: bool = False  # whether it has known pixels
    row: SampleBatch | None = None

    def guides(self, timestep: int, timesteps: int) -> bool:
        """Whether guidance of either kind holds at this timestep."""
        low, high = self.request.guidance_interval
        return low * timesteps <= timestep <= high * timesteps

    def shows(self) -> bool:
        """Whether a preview falls on the step that has just been taken."""
        taken, parts = self.steps - self.left, self.request.previews + 1
        return (
            parts > 1
            and taken * parts // self.steps > (taken - 1) * parts // self.steps
            and self.left > 0
        )
