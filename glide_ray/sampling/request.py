"""Sample requests, and the stepper's state of each sample until it is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..diffusion.samplers import History
from ..models.row_adapters import ScaledAdapter
from ..tensors import Conditioning, Rows, TextFeatures
from .noise import NoiseSource
from .prompt import Caption
from .scheduler import ScheduledSample


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
    noise: Tensor | None = None  # (3, H, W), initial x_T instead of the seed's, from `invert`
    start: Tensor | None = None  # (3, H, W), initial image, to which noise is added (SDEdit)
    # Share of the process's timesteps: the noisiest of the kept ones below it is the first.
    strength: float = 1.0
    adapters: tuple[ScaledAdapter, ...] = ()  # low-rank changes of the network for this sample
    group: str | None = None  # samples of a group are scheduled as if they were one sample
    previews: int = 0  # number of calls of `on_preview`, evenly spaced over the steps
    on_preview: Callable[[Tensor], None] | None = None  # receives the predicted x_0 (3, H, W)
    negative: Conditioning | None = None  # caption that guidance leads away from; None: the empty
    # Weighted words of the caption; see `prompt.Caption`
    emphasis: tuple[tuple[Tensor, float], ...] = ()
    later: tuple[Caption, ...] = ()  # captions that replace it on the way, in order
    task: Literal["generate", "edit", "vary"] = "generate"  # draws other noise than other tasks
    noise_scheme: int = 2  # see `noise.noise_source`

    def guidance_on_at(self, timestep: int, timesteps: int) -> bool:
        """Whether guidance (classifier-free or CLIP) is on at this timestep of `timesteps`."""
        low, high = self.guidance_interval
        return low * timesteps <= timestep <= high * timesteps

    @property
    def has_known_pixels(self) -> bool:
        mask = self.conditioning.known_mask
        return mask is not None and bool(mask.any())


@dataclass(frozen=True)
class SampleBatch(Rows):
    """The tensors of S samples, one row each."""

    x: Tensor  # (S, 3, H, W) float32
    clip_text: Tensor  # (S, E)
    history: History
    conditioning: Conditioning  # `known` and `known_mask` are set, with zeros if nothing is known
    text: TextFeatures
    negative: TextFeatures  # of the empty caption, or of the negative prompt


@dataclass(eq=False, kw_only=True)
class ActiveSample(ScheduledSample):
    """State of a sample on the host, readable without a device synchronisation.

    The next step is at index `steps_left` - 1 of the sample's schedule.
    """

    request: SampleRequest
    respacing: str
    sampler: str
    guidance_scale: float  # classifier-free
    noise: NoiseSource
    has_known_pixels: bool
    changes: int = 0  # number of `request.later` that have replaced the caption
    # Its tensors on the device: set at admission, outdated while it is part of a joint batch.
    row: SampleBatch = field(init=False)

    def due_caption(self, timestep: int, timesteps: int) -> Caption | None:
        """The caption that replaces the present one at this timestep of `timesteps`, if any."""
        due = None
        while self.changes < len(self.request.later):
            following = self.request.later[self.changes]
            if timestep >= (1 - following.begin) * timesteps:
                break
            due, self.changes = following, self.changes + 1
        return due

    def shows_preview(self) -> bool:
        """Whether a preview is due after the step that is being done."""
        taken, parts = self.steps - self.steps_left + 1, self.request.previews + 1
        return (
            parts > 1
            and taken * parts // self.steps > (taken - 1) * parts // self.steps
            and taken < self.steps
        )
