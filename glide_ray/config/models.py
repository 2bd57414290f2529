"""Model configs: network, noise process and default sampling.

`ModelConfig` (a U-Net) and `ClipModelConfig` (a CLIP) are stored inside weights files.
"""

from __future__ import annotations

import math
import operator
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

COSINE_BETA_MAX = 0.999  # Nichol & Dhariwal (2021), sec. 3.2
SHIPPED = "emoji"  # name of the shipped weights (`pretrained/`)


class Frozen(BaseModel):
    """An immutable config. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextConfig(Frozen):
    """The text transformer (sec. 4.1)."""

    width: int = Field(gt=0, description="channels of each token")
    layers: int = Field(gt=0, description="residual blocks")
    heads: int = Field(gt=0, description="attention heads; must divide width")
    context: int = Field(128, gt=0, description="tokens of a caption; longer captions are cut")
    vocabulary: int = Field(50257, gt=0, description="tokens in the vocabulary")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} is not divisible by text.heads {self.heads}")
        return self


class UNetConfig(Frozen):
    """The ADM U-Net with text (Dhariwal & Nichol 2021; GLIDE sec. 4.1)."""

    image_size: int = Field(gt=0, description="pixels a side")
    channels: int = Field(gt=0, description="channels at multiplier 1")
    multipliers: tuple[int, ...] = Field(
        min_length=1,
        description="channels of each level, in multiples of `channels`; each level "
        "has half the resolution of the one before",
    )
    blocks: int = Field(
        gt=0, description="residual blocks a level on the way down; one more on the way up"
    )
    text: TextConfig = Field(description="the text transformer")
    attention_sizes: tuple[int, ...] = Field(
        (32, 16, 8), description="feature map sides, in pixels, at which there is attention"
    )
    head_channels: int = Field(64, gt=0, description="channels of an attention head")
    groups: int = Field(32, gt=0, description="groups of the group norms")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate of the residual blocks")
    low_res_size: int | None = Field(
        None, gt=0, description="pixels a side of an upsampler's input; none: not an upsampler"
    )
    inpaint: bool = Field(
        False, description="known pixels and their mask as 4 more input channels (sec. 4.3)"
    )
    patch: int = Field(
        1,
        gt=0,
        description="pixels a side of the squares that are folded into "
        "channels at both ends (Hoogeboom et al. 2023)",
    )
    pixel_channels: int = Field(
        0,
        ge=0,
        description="channels of three convolutions at full resolution that correct the last "
        "layer's output, in which the edges of patches show; 0: none",
    )
    prediction: Literal["eps", "v", "x0"] = Field(
        "eps",
        description="output of the last layer, converted to eps; an upsampler's x0 is "
        "added to the enlarged low-res image",
    )

    @property
    def in_channels(self) -> int:
        """Input channels before folding patches: image, low-res image, known pixels and mask."""
        return 3 + (3 if self.low_res_size else 0) + (4 if self.inpaint else 0)

    @property
    def grain(self) -> int:
        """Image sides must be multiples of this number of pixels."""
        grain: int = self.patch * 2 ** (len(self.multipliers) - 1)
        return grain

    @model_validator(mode="after")
    def _shapes_fit(self) -> UNetConfig:
        halvings = len(self.multipliers) - 1
        if self.image_size % self.grain:
            folded = f" divided into squares of {self.patch} pixels and" if self.patch > 1 else ""
            raise ValueError(
                f"image_size {self.image_size} cannot be{folded} halved {halvings} times"
            )
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} are not divisible by groups {self.groups}")
        for level, multiplier in enumerate(self.multipliers):
            width = self.channels * multiplier
            size = self.image_size // self.patch >> level
            if size in self.attention_sizes and width % self.head_channels:
                raise ValueError(
                    f"{width} channels at {size} pixels are not divisible by "
                    f"head_channels {self.head_channels}"
                )
        if self.channels * self.multipliers[-1] % self.head_channels:
            raise ValueError(
                f"the middle block's {self.channels * self.multipliers[-1]} channels "
                f"are not divisible by head_channels {self.head_channels}"
            )
        return self


class ClipConfig(Frozen):
    """CLIP, noised or not (sec. 4.4)."""

    image_size: int = Field(64, gt=0, description="pixels a side")
    patch_size: int = Field(4, gt=0, description="pixels a side of a patch; must divide image_size")
    image_width: int = Field(gt=0, description="channels of the image transformer")
    image_layers: int = Field(gt=0, description="layers of the image transformer")
    image_heads: int = Field(gt=0, description="attention heads of the image transformer")
    text_width: int = Field(gt=0, description="channels of the text transformer")
    text_layers: int = Field(gt=0, description="layers of the text transformer")
    text_heads: int = Field(gt=0, description="attention heads of the text transformer")
    context: int = Field(77, gt=0, description="tokens of a caption; longer captions are cut")
    vocabulary: int = Field(50257, gt=0, description="tokens in the vocabulary")
    embedding: int = Field(512, gt=0, description="dimensions of the shared embedding")
    timesteps: int = Field(1000, gt=0, description="timesteps that the image transformer knows")
    noised: bool = Field(
        True,
        description="trained on noised images (sec. 4.4); false: on clean "
        "images at timestep 0, like public CLIPs",
    )
    scale: float = Field(
        1 / 0.07, gt=0, description="initial scale of the logits (Radford et al. 2021, sec. 2.5)"
    )
    tokenizer: Literal["gpt2", "clip"] = Field(
        "gpt2", description="clip: the published model's, whose vocabulary is in its weights file"
    )

    @model_validator(mode="after")
    def _shapes_fit(self) -> ClipConfig:
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is not divisible by {tower}_heads {heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        return self


class DiffusionConfig(Frozen):
    """The noise process."""

    schedule: Literal["cosine", "linear"] = Field(
        "cosine", description="noise schedule: cosine for base models, linear for upsamplers"
    )
    steps: int = Field(1000, gt=1, description="timesteps")

    def alpha_bar(self) -> list[float]:
        """Signal power alpha_bar at each timestep, least noisy first.

        `cosine`: Nichol & Dhariwal (2021, eq. 17). `linear`: Ho et al. (2020), rescaled to any
        number of steps.
        """
        if self.schedule == "cosine":

            def power(t: float) -> float:  # t in [0, 1]
                return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

            signal_kept = [
                max(power((n + 1) / self.steps) / power(n / self.steps), 1 - COSINE_BETA_MAX)
                for n in range(self.steps)
            ]
        else:
            first, last = 1000 / self.steps * 1e-4, 1000 / self.steps * 0.02
            signal_kept = [
                1 - (first + (last - first) * n / (self.steps - 1)) for n in range(self.steps)
            ]
        return list(accumulate(signal_kept, operator.mul))


SamplerName = Literal["ancestral", "ddim", "plms", "dpm++", "dpm++sde", "unipc"]


def steps_of(grid: str) -> int:
    """Number of steps of a list of timesteps such as `t0,90,400,995`."""
    return grid.count(",") + 1


class SamplingConfig(Frozen):
    """A model's default sampling (app. B.2)."""

    sampler: SamplerName = Field("ancestral", description="sampler of the reverse process")
    respacing: str = Field(
        "150",
        description="timesteps: a number of evenly spaced ones, numbers for equal sections such "
        "as 10,10,3,2,2, a grid such as lambda15, mixed15 or edm15, fast27, or a list such as "
        "t0,90,400,995",
    )
    tuned_grids: tuple[str, ...] = Field(
        (),
        description="lists of timesteps for unipc, one for each number of steps, as "
        "`glide tune-sampler` finds them",
    )
    guidance_scale: float = Field(3.0, ge=0, description="classifier-free guidance scale; 1: none")
    noise_scale: float = Field(
        1.0,
        gt=0,
        description="standard deviation of the initial noise; 0.997 for the released upsampler",
    )

    def respacing_for(self, steps: int | str | None, sampler: str | None) -> str:
        """The respacing of a request; None for `steps` or `sampler` is this model's own.

        A plain number means evenly spaced timesteps, except in `unipc` and `dpm++sde`: there it
        means the `mixed` grid of that size, which has at least 2, and in `unipc` a tuned one if
        there is one. The respacing that is returned can be given as `steps` again.
        """
        if steps is None:
            return self.respacing
        number = str(steps).strip()
        sampler = sampler or self.sampler
        if sampler not in ("unipc", "dpm++sde") or not number.isdecimal():
            return number
        count = int(number)
        tuned = {steps_of(grid): grid for grid in self.tuned_grids} if sampler == "unipc" else {}
        return tuned.get(count, f"mixed{count}" if count > 1 else number)


class ModelConfig(Frozen):
    """All that is needed to rebuild and sample a U-Net."""

    name: str = Field(description="name of the model")
    unet: UNetConfig = Field(description="the network")
    diffusion: DiffusionConfig = Field(DiffusionConfig(), description="the noise process")
    sampling: SamplingConfig = Field(SamplingConfig(), description="default sampling")

    @property
    def role(self) -> str:
        """Kind of model: "base" or "upsampler" (`ClipModelConfig`: "clip")."""
        return "upsampler" if self.unet.low_res_size else "base"

    @property
    def image_size(self) -> int:
        return self.unet.image_size

    @property
    def low_res_size(self) -> int | None:
        return self.unet.low_res_size

    @property
    def inpaint(self) -> bool:
        return self.unet.inpaint

    @property
    def context(self) -> int:
        return self.unet.text.context


class ClipModelConfig(Frozen):
    """All that is needed to rebuild a CLIP."""

    name: str = Field(description="name of the model")
    clip: ClipConfig = Field(description="the network")
    diffusion: DiffusionConfig = Field(
        DiffusionConfig(), description="the noise process; the base model's (sec. 4.4)"
    )

    role: ClassVar[str] = "clip"
    low_res_size: ClassVar[None] = None
    inpaint: ClassVar[bool] = False

    @property
    def image_size(self) -> int:
        return self.clip.image_size

    @property
    def context(self) -> int:
        return self.clip.context


def _tag(value: Any) -> str:
    has_clip = isinstance(value, dict) and "clip" in value
    return "CLIP" if isinstance(value, ClipModelConfig) or has_clip else "UNET"


TAGS = ("UNET", "CLIP")  # pydantic adds these to error locations; `validate` removes them
AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("UNET")] | Annotated[ClipModelConfig, Tag("CLIP")],
    Discriminator(_tag),
]
