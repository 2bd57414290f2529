"""Prompt -> 64x64 -> 256x256, and edits of an image: a few calls of the stepper (sec. 4, 4.3; app. B.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig, UserError
from .data.images import area_downsample, to_tensor, to_uint8
from .diffusion.schedule import ScheduleError, kept_timesteps
from .forms import Conditioning
from .models.weights import WeightsError, load_model
from .stepper import SampleRequest, Stepper
from .tokenizer import Tokenizer

MAX_GUIDANCE_SCALE = 100.0
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Progress = Callable[[str, int, int], None]     # stage, denoising steps done in it, and in all


class RequestError(UserError):
    """A request that cannot be served. `param` names the field."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param


# -- requests ---------------------------------------------------------------------------------------------------------

def check_options(guidance_scale: float | None = None, steps: int | str | None = None, seed: int | None = None,
                  param: str = "steps") -> None:
    """Raises RequestError for a guidance scale, a number of steps (or respacing) or a seed that makes no sense."""
    if guidance_scale is not None and not 0 <= guidance_scale <= MAX_GUIDANCE_SCALE:   # also false for nan
        raise RequestError(f"guidance_scale must lie between 0 and {MAX_GUIDANCE_SCALE:g} (given: {guidance_scale}); 3 is usual.",
                           "guidance_scale")
    if steps is not None:
        try:
            kept_timesteps(1000, steps)
        except ScheduleError as error:
            hint = " Steps may be a number from 1 to 1000." if str(steps).lstrip("-").isdecimal() else ""
            raise RequestError(f"{error}{hint}", param) from None
    if seed is not None and not 0 <= seed < 2**63:
        raise RequestError(f"seed must lie between 0 and 2^63 - 1 (given: {seed}).", "seed")


def base_request(config: ModelConfig, prompt: str, seed: int, *, guidance_scale: float | None = None,
                 steps: int | str | None = None, sampler: str | None = None, known: np.ndarray | None = None,
                 known_mask: np.ndarray | None = None) -> SampleRequest:
    """One sample of a base model. `known` uint8 (H, W, 3) and `known_mask` bool (H, W), true = keep, at the model's size."""
    return SampleRequest(_conditioning(config, prompt, None, known, known_mask), seed, _spacing(steps), sampler, guidance_scale)


def upsampler_request(config: ModelConfig, prompt: str, seed: int, low_res: Tensor, *, steps: int | str | None = None,
                      known: np.ndarray | None = None, known_mask: np.ndarray | None = None) -> SampleRequest:
    """One sample of an upsampler from `low_res` (3, h, w), the base stage's image, taken at the 8 bits it would be saved in."""
    pixels = ((low_res.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    return SampleRequest(_conditioning(config, prompt, pixels[None], known, known_mask), seed, _spacing(steps))


def shrink_known(image: np.ndarray, known_mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An edit's image (H, H, 3) and mask (H, H) at a smaller model's size: a pixel is known if all it covers is known."""
    factor = len(known_mask) // size
    return area_downsample(image, size), known_mask.reshape(size, factor, size, factor).all(axis=(1, 3))


def _conditioning(config, prompt, low_res, known, known_mask) -> Conditioning:
    tokens, mask = Tokenizer(config.unet.text.context).batch([prompt])
    if known is not None:
        known, known_mask = to_tensor(known)[None], torch.from_numpy(np.ascontiguousarray(known_mask))[None, None].float()
    return Conditioning(tokens, mask, low_res, known, known_mask)


def _spacing(steps: int | str | None) -> str | None:
    return None if steps is None else str(steps)


# -- the cascade ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cascade:
    """A base model and, for pictures four times as large, an upsampler."""

    base: Stepper
    upsampler: Stepper | None = None

    @classmethod
    def load(cls, base: str | Path, upsampler: str | Path | None = None, precision: str = "auto",
             max_in_flight: int = 8) -> Cascade:
        """From weights files, on the GPU if there is one. Raises WeightsError."""
        return cls(load_stepper(base, "base", precision, max_in_flight),
                   load_stepper(upsampler, "upsampler", precision, max_in_flight) if upsampler else None)

    @property
    def size(self) -> int:
        return (self.upsampler or self.base).config.unet.image_size

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float | None = None,
                 steps: int | str | None = None, upsampler_steps: int | str | None = None, sampler: str | None = None,
                 progress: Progress | None = None) -> list[np.ndarray]:
        """A picture for each prompt and seed: uint8 (S, S, 3). `progress` is told of each step."""
        requests = [base_request(self.base.config, prompt, seed, guidance_scale=guidance_scale, steps=steps, sampler=sampler)
                    for prompt, seed in zip(prompts, seeds, strict=True)]
        small = self.base.run(requests, _stage(progress, "base"))
        if self.upsampler is None:
            return [to_uint8(image) for image in small]
        requests = [upsampler_request(self.upsampler.config, prompt, seed, image, steps=upsampler_steps)
                    for prompt, seed, image in zip(prompts, seeds, small, strict=True)]
        return [to_uint8(image) for image in self.upsampler.run(requests, _stage(progress, "upsampler"))]

    def edit(self, image: np.ndarray, known_mask: np.ndarray, prompt: str, seed: int, guidance_scale: float | None = None,
             steps: int | str | None = None, upsampler_steps: int | str | None = None,
             progress: Progress | None = None) -> np.ndarray:
        """Paint anew where `known_mask` (S, S) is false; every known pixel of `image` uint8 (S, S, 3) comes out as it was."""
        if known_mask.shape != (self.size, self.size) or image.shape != (self.size, self.size, 3):
            raise RequestError(f"The image and its mask must be {self.size}x{self.size} pixels (given: "
                               f"{image.shape[1]}x{image.shape[0]} and {known_mask.shape[1]}x{known_mask.shape[0]}).", "mask")
        small_size = self.base.config.unet.image_size
        known, mask = shrink_known(image, known_mask, small_size)
        small = self.base.run([base_request(self.base.config, prompt, seed, guidance_scale=guidance_scale, steps=steps,
                                            known=known, known_mask=mask)], _stage(progress, "base"))[0]
        if self.upsampler is None:
            return to_uint8(small)
        request = upsampler_request(self.upsampler.config, prompt, seed, small, steps=upsampler_steps, known=image,
                                    known_mask=known_mask)
        return to_uint8(self.upsampler.run([request], _stage(progress, "upsampler"))[0])


def load_stepper(path: str | Path, role: str, precision: str = "auto", max_in_flight: int = 8) -> Stepper:
    """A weights file as a Stepper for `role`, "base" or "upsampler". Raises WeightsError if it is the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_model(path, resolve_precision(precision, device), device)
    check_role(config, role, path)
    return Stepper(model, config, device, next(model.parameters()).dtype, max_in_flight)


def check_role(config: ModelConfig, role: str, path: str | Path) -> None:
    """Raises WeightsError where an upsampler is given as the base model or the other way round."""
    actual = "upsampler" if config.unet.low_res_size else "base"
    if actual != role:
        raise WeightsError(f"{path} holds {config.name}, a model of the kind {actual!r}, where one of the kind {role!r} is "
                           f"wanted; were the two exchanged?")


def resolve_precision(precision: str, device: str) -> torch.dtype:
    """`auto`: fp16 on a GPU as the paper trained, fp32 on a CPU, where small models are no faster in less."""
    return PRECISIONS["fp16" if device == "cuda" else "fp32"] if precision == "auto" else PRECISIONS[precision]


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
