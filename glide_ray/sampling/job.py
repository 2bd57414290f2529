"""A job, which is one image to make, and the requests to the stages that make it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config.lora import NamedLora
from ..config.models import ModelConfig
from ..config.sampling import SampleOptions
from ..data.images import area_downsample, to_8_bits, to_tensor
from ..data.tokenizer import Tokenizer
from ..models.clip_scorer import ClipScorer
from ..tensors import Conditioning
from .checks import check_clip, check_negative
from .prompt import Caption, plain_text, read_prompt
from .request import SampleRequest


@dataclass(frozen=True)
class Source:
    """Input of an edit or variation, at the cascade's largest image size S.

    `image`: (S, S, 3) uint8. `known_mask`: (S, S) bool, true = known. `sketch`: (S, S, 3) uint8,
    from which a variation starts instead of `image`.
    """

    image: np.ndarray
    known_mask: np.ndarray
    sketch: np.ndarray | None = None


@dataclass(frozen=True)
class Job:
    """One image to make, of `size` x `size` pixels.

    With `source` it is an edit; with `source` and `strength` it is a variation, which starts from
    the source image plus noise (SDEdit). `loras` are added to those of the loaded models.
    """

    prompt: str
    seed: int
    size: int
    options: SampleOptions = SampleOptions()
    source: Source | None = None
    strength: float | None = None
    best_of: int = 1
    previews: int = 0
    request: str = ""  # request id; images of one request are scheduled as one sample
    loras: tuple[NamedLora, ...] = ()

    @property
    def task(self) -> Literal["generate", "edit", "vary"]:
        return "generate" if self.source is None else "edit" if self.strength is None else "vary"

    def base_request(self, config: ModelConfig, critic: ClipScorer | None = None) -> SampleRequest:
        """The request to the base model. Raises RequestError for CLIP guidance without a CLIP."""
        if self.source is None:
            request = base_request(config, self.prompt, self.seed, self.options, critic=critic)
        else:
            source = self.source
            start = source.image if source.sketch is None else source.sketch
            request = edit_request(
                config,
                source.image,
                source.known_mask,
                self.prompt,
                self.seed,
                self.options,
                critic=critic,
                start=None if self.strength is None else start,
                strength=1.0 if self.strength is None else self.strength,
            )
        return replace(request, group=self.request or None)

    def upsampler_request(self, config: ModelConfig, low_res: Tensor) -> SampleRequest:
        """The request to the upsampler. `low_res` (3, h, w): the base stage's image."""
        source = self.source
        request = upsampler_request(
            config,
            self.prompt,
            self.seed,
            low_res,
            self.options,
            task=self.task,
            known=None if source is None else source.image,
            known_mask=None if source is None else source.known_mask,
        )
        return replace(request, group=self.request or None)


def base_request(
    config: ModelConfig,
    prompt: str,
    seed: int,
    options: SampleOptions = SampleOptions(),
    *,
    critic: ClipScorer | None = None,
    known: np.ndarray | None = None,
    known_mask: np.ndarray | None = None,
    start: np.ndarray | None = None,
    strength: float = 1.0,
) -> SampleRequest:
    """Build the request for one sample of a base model.

    At the model's image size: `known` (known pixels) and `start` (initial image of SDEdit) uint8
    (H, W, 3), `known_mask` bool (H, W), true = keep. Raises RequestError for CLIP guidance without
    a `critic`.
    """
    check_clip(options.clip_scale, critic is not None)
    check_negative(config, options)
    caption, *later = read_prompt(prompt, config.unet.text.context)
    return SampleRequest(
        _conditioning(caption, None, known, known_mask),
        seed,
        task="vary" if start is not None else "generate" if known is None else "edit",
        noise_scheme=options.noise_scheme,
        respacing=config.sampling.respacing_for(options.steps, options.sampler),
        sampler=options.sampler,
        guidance_scale=options.guidance_scale,
        emphasis=caption.emphasis,
        later=tuple(later),
        negative=_negative(config, options.negative_prompt, options.guidance_scale),
        guidance_interval=options.guidance_interval,
        clip_text=(
            critic.embed([plain_text(prompt)])
            if critic is not None and options.clip_scale
            else None
        ),
        clip_scale=options.clip_scale,
        start=None if start is None else to_tensor(start),
        strength=strength,
    )


def edit_request(
    config: ModelConfig,
    image: np.ndarray,
    known_mask: np.ndarray,
    prompt: str,
    seed: int,
    options: SampleOptions = SampleOptions(),
    *,
    critic: ClipScorer | None = None,
    start: np.ndarray | None = None,
    strength: float = 1.0,
) -> SampleRequest:
    """Build the base model's request for an edit, or for a variation that starts from `start`.

    At the cascade's image size: `image` and `start` uint8 (S, S, 3), `known_mask` bool (S, S),
    true = keep. They are shrunk to the base model's size here.
    """
    size = config.image_size
    known, mask = shrink_known(image, known_mask, size)
    return base_request(
        config,
        prompt,
        seed,
        options,
        critic=critic,
        known=known,
        known_mask=mask,
        start=None if start is None else area_downsample(start, size),
        strength=strength,
    )


def upsampler_request(
    config: ModelConfig,
    prompt: str,
    seed: int,
    low_res: Tensor,
    options: SampleOptions = SampleOptions(),
    *,
    task: Literal["generate", "edit", "vary"] = "generate",
    known: np.ndarray | None = None,
    known_mask: np.ndarray | None = None,
) -> SampleRequest:
    """Build the request for one sample of an upsampler.

    `low_res` (3, h, w): the base stage's image, rounded here to the 8 bits of a saved image.
    `known` and `known_mask`: as in `base_request`, at the upsampler's image size.
    """
    caption, *later = read_prompt(prompt, config.unet.text.context)
    return SampleRequest(
        _conditioning(caption, to_8_bits(low_res)[None], known, known_mask),
        seed,
        task=task,
        noise_scheme=options.noise_scheme,
        respacing=config.sampling.respacing_for(options.upsampler_steps, options.upsampler_sampler),
        sampler=options.upsampler_sampler,
        guidance_scale=options.upsampler_guidance_scale,
        emphasis=caption.emphasis,
        later=tuple(later),
        negative=_negative(config, options.negative_prompt, options.upsampler_guidance_scale),
    )


def shrink_known(
    image: np.ndarray, known_mask: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink an edit's image (H, H, 3) and mask (H, H) to the image size of a smaller model.

    A small pixel is known only if all the pixels that it covers are known.
    """
    factor = len(known_mask) // size
    squares = known_mask.reshape(size, factor, size, factor)
    return area_downsample(image, size), np.all(squares, axis=(1, 3))


def _negative(config: ModelConfig, prompt: str, scale: float | None) -> Conditioning | None:
    """The negative prompt's caption; None if it is empty or this model does not guide."""
    guided = (config.sampling.guidance_scale if scale is None else scale) != 1
    if not prompt or not guided:
        return None
    return Conditioning(*Tokenizer(config.unet.text.context).batch([prompt]))


def _conditioning(
    caption: Caption,
    low_res: Tensor | None,
    known: np.ndarray | None,
    known_mask: np.ndarray | None,
) -> Conditioning:
    tokens, mask = caption.tokens, caption.mask
    if known is None:
        return Conditioning(tokens, mask, low_res)
    keep = torch.tensor(known_mask)[None, None].float()
    return Conditioning(tokens, mask, low_res, to_tensor(known)[None], keep)
