"""Sample requests, and the stepper's state of each sample until it is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.samplers import History
from ..tensors import Conditioning, Rows, TextFeatures


@dataclass(frozen=True)
class SampleRequest:
    """Request for one image. `conditioning` has one row.

    None for `respacing`, `sampler` or `guidance_scale`: the model's own SamplingConfig.
    """

    conditioning: Conditioning
    seed: int
    respacing: str | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    # As fractions of the timesteps, 1 = noisiest. No guidance of either kind outside the interval.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    # (1, E), embedded by the stepper's critic; needed for CLIP guidance.
    clip_text: Tensor | None = None
    clip_scale: float = 0.0
    noise: Tensor | None = None  # (3, H, W), initial x_T instead of the seed's (`Stepper.invert`)
    start: Tensor | None = None  # (3, H, W), initial image, to which noise is added (SDEdit)
    strength: float = 1.0  # fraction of the schedule that is run from `start`
    group: str | None = None  # samples of a group are scheduled as if they were one sample
    previews: int = 0  # number of calls of `watch`, evenly spaced over the steps
    watch: Callable[[Tensor], None] | None = None  # receives the predicted x_0 (3, H, W)


@dataclass(frozen=True)
class SampleBatch(Rows):
    """The tensors of S samples, one row each."""

    x: Tensor  # (S, 3, H, W) float32
    clip_text: Tensor  # (S, E)
    history: History
    conditioning: Conditioning
    text: TextFeatures


@dataclass
class ActiveSample:
    """State of a sample on the host, readable without a device synchronisation.

    `row`: its tensors on the device, while they are not part of a joint batch.
    """

    ticket: int
    request: SampleRequest
    respacing: str
    sampler: str
    scale: float  # classifier-free guidance scale
    generator: torch.Generator
    steps: int  # total number of steps
    left: int  # remaining steps; the next is at index left - 1 of the schedule
    due: float  # deadline, in sample-steps of the stepper; the earliest goes first
    edits: bool = False  # whether it has known pixels
    row: SampleBatch | None = None

    def guides(self, timestep: int, timesteps: int) -> bool:
        """Whether guidance (classifier-free or CLIP) is on at this timestep of `timesteps`."""
        low, high = self.request.guidance_interval
        return low * timesteps <= timestep <= high * timesteps

    def shows(self) -> bool:
        """Whether a preview is due after the step that was just done."""
        taken, parts = self.steps - self.left, self.request.previews + 1
        return (
            parts > 1
            and taken * parts // self.steps > (taken - 1) * parts // self.steps
            and self.left > 0
        )
