"""Text-to-image cascade (prompt -> 64x64 -> 256x256) and image editing (sec. 4, 4.3; app. B.2).

Every task is a few calls of `Stepper.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.models import SHIPPED, ModelConfig
from ..config.sampling import SampleOptions
from ..data.images import area_downsample, to_8_bits, to_tensor, to_uint8
from ..data.tokenizer import Tokenizer
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import ScheduleError, kept_timesteps
from ..errors import UserError, nearest
from ..models.clip_scorer import ClipScorer, load_critic
from ..models.weights import check_pair, load_unet
from ..precision import DTYPES, resolve_precision
from ..pretrained.shipped import locate
from ..tensors import Conditioning
from .request import SampleRequest
from .stepper import Stepper

MAX_SCALE = 100.0  # largest scale of classifier-free and CLIP guidance
TIMESTEPS = 1000  # default number of diffusion timesteps when the model is unknown
# Arguments: stage name, denoising steps done in this stage, denoising steps of this stage.
Progress = Callable[[str, int, int], None]


class RequestError(UserError):
    """An invalid request. `param`: name of the invalid field."""

    def __init__(self, message: str, param: str):
        super().__init__(message)
        self.param = param

    # By default an exception is unpickled from the arguments of its base class, without `param`.
    def __reduce__(self):
        return type(self), (str(self), self.param)


# -- requests --------------------------------------------------------------------------------------


def check_options(
    options: SampleOptions,
    seed: int | None = None,
    strength: float | None = None,
    base: ModelConfig | None = None,
    upsampler: ModelConfig | None = None,
) -> None:
    """Raise RequestError for an invalid option, seed or strength.

    Steps are checked against the timesteps of the models, or TIMESTEPS for a model that is None.
    """
    for param, least in (("guidance_scale", 0), ("clip_scale", 0)):
        scale = getattr(options, param)
        if scale is not None and not least <= scale <= MAX_SCALE:  # true for NaN, too
            raise RequestError(
                f"{param} must lie between {least} and {MAX_SCALE:g} (given: {scale}); 3 is usual.",
                param,
            )
    for param, model in (("steps", base), ("upsampler_steps", upsampler)):
        steps, total = getattr(options, param), model.diffusion.steps if model else TIMESTEPS
        try:
            kept_timesteps(total, "1" if steps is None else steps)
        except ScheduleError as error:
            hint = (
                f" Steps may be a number from 1 to {total}."
                if str(steps).lstrip("-").isdecimal()
                else ""
            )
            raise RequestError(f"{error}{hint}", param) from None
    if options.sampler is not None and options.sampler not in SAMPLERS:
        raise RequestError(
            f"There is no sampler {options.sampler!r}; {nearest(options.sampler, SAMPLERS)}",
            "sampler",
        )
    low, high = options.guidance_interval
    if not 0 <= low <= high <= 1:
        raise RequestError(
            f"guidance_interval must be two numbers from 0 to 1, the smaller first "
            f"(given: {low} and {high}).",
            "guidance_interval",
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise RequestError(f"seed must lie between 0 and 2^63 - 1 (given: {seed}).", "seed")
    if strength is not None and not 0 < strength <= 1:
        raise RequestError(
            f"strength must lie above 0 and at most at 1 (given: {strength}); "
            f"0.6 keeps a picture's outline.",
            "strength",
        )


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
    if options.clip_scale and critic is None:
        raise RequestError(
            "clip_scale asks for CLIP guidance, which needs a CLIP model; give one with it.",
            "clip_scale",
        )
    return SampleRequest(
        _conditioning(config, prompt, None, known, known_mask),
        seed,
        _spacing(options.steps),
        options.sampler,
        options.guidance_scale,
        options.guidance_interval,
        critic.embed([prompt]) if options.clip_scale else None,
        options.clip_scale,
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
    known: np.ndarray | None = None,
    known_mask: np.ndarray | None = None,
) -> SampleRequest:
    """Build the request for one sample of an upsampler.

    `low_res` (3, h, w): the base stage's image, rounded here to the 8 bits of a saved image.
    `known` and `known_mask`: as in `base_request`, at the upsampler's image size.
    """
    return SampleRequest(
        _conditioning(config, prompt, to_8_bits(low_res)[None], known, known_mask),
        seed,
        _spacing(options.upsampler_steps),
    )


def shrink_known(
    image: np.ndarray, known_mask: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink an edit's image (H, H, 3) and mask (H, H) to the image size of a smaller model.

    A small pixel is known only if all the pixels that it covers are known.
    """
    factor = len(known_mask) // size
    return area_downsample(image, size), known_mask.reshape(size, factor, size, factor).all(
        axis=(1, 3)
    )


def _conditioning(config, prompt, low_res, known, known_mask) -> Conditioning:
    tokens, mask = Tokenizer(config.unet.text.context).batch([prompt])
    if known is not None:
        known, known_mask = to_tensor(known)[None], torch.tensor(known_mask)[None, None].float()
    return Conditioning(tokens, mask, low_res, known, known_mask)


def _spacing(steps: int | str | None) -> str | None:
    return None if steps is None else str(steps)


# -- the cascade -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """The best of several images, its seed, and the CLIP score of every candidate by seed."""

    image: np.ndarray
    seed: int
    scores: dict[int, float]


@dataclass(frozen=True)
class Cascade:
    """A base model with an optional CLIP (`base.critic`), and an optional 4x upsampler."""

    base: Stepper
    upsampler: Stepper | None = None
    sources: Mapping[str, str | Path] = field(default_factory=dict)  # role -> loaded weights file
    precision: str = "fp32"

    @classmethod
    def load(
        cls,
        base: str | Path,
        upsampler: str | Path | None = None,
        precision: str = "auto",
        max_in_flight: int = 8,
        clip: str | Path | None = None,
        batched: bool | None = None,
    ) -> Cascade:
        """Load weights files, on the GPU if there is one. Raises WeightsError.

        `clip` may also be the folder of a public CLIP. `batched`: up to `max_in_flight` images in
        each network call, which is faster. The default on a CPU is one image per call, so that an
        image is bit-identical whatever else is in flight. "emoji" names the shipped weights: as
        `base` alone it loads both the base model and the upsampler.
        """
        if str(base) == SHIPPED and upsampler is None:
            upsampler = SHIPPED
        base, upsampler = (
            locate(base, "base"),
            locate(upsampler, "upsampler") if upsampler else None,
        )
        made = cls(
            load_stepper(base, "base", precision, max_in_flight, clip, batched=batched),
            load_stepper(upsampler, "upsampler", precision, max_in_flight, batched=batched)
            if upsampler
            else None,
        )
        check_pair(made.base.config, made.upsampler.config if made.upsampler else None)
        sources = {
            role: path
            for role, path in (("base", base), ("upsampler", upsampler), ("clip", clip))
            if path
        }
        dtype = next(made.base.model.parameters()).dtype
        return replace(
            made,
            sources=sources,
            precision=next(name for name, kind in DTYPES.items() if kind == dtype),
        )

    @property
    def size(self) -> int:
        return (self.upsampler or self.base).config.image_size

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> list[np.ndarray]:
        """Generate an image uint8 (S, S, 3) for each prompt and seed. Calls `progress` per step."""
        return self._enlarged(
            self._small(prompts, seeds, options, progress), prompts, seeds, options, progress
        )

    def best_of(
        self,
        prompt: str,
        seeds: Sequence[int],
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> Ranked:
        """Generate an image per seed and keep the one with the highest CLIP score (app. E: 64).

        Only the best base image is upsampled. Raises RequestError without a CLIP.
        """
        if self.base.critic is None:
            raise RequestError(
                "The best of several pictures is chosen by CLIP; give a CLIP model.", "best_of"
            )
        images = self._small([prompt] * len(seeds), seeds, options, progress)
        scores = self.score(images, [prompt] * len(seeds))
        best = int(np.argmax(scores))
        image = self._enlarged(images[best : best + 1], [prompt], [seeds[best]], options, progress)[
            0
        ]
        return Ranked(image, seeds[best], dict(zip(seeds, scores, strict=True)))

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """CLIP score (sec. 5.2) of each base-size image (N, 3, h, w): its logit with its prompt."""
        return clip_scores(self.base.critic, self.base.device, images, prompts)

    def edit(
        self,
        image: np.ndarray,
        known_mask: np.ndarray,
        prompt: str,
        seed: int,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Inpaint the pixels where `known_mask` (S, S) is false.

        Returns uint8 (S, S, 3); every known pixel has exactly the value it has in `image`.
        """
        return self._painted(image, known_mask, None, 1.0, prompt, seed, options, progress)

    def vary(
        self,
        image: np.ndarray,
        prompt: str,
        seed: int,
        strength: float,
        known_mask: np.ndarray | None = None,
        sketch: np.ndarray | None = None,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Vary an image by SDEdit (Meng et al. 2021; fig. 4).

        Sampling starts from `image` uint8 (S, S, 3) plus noise and runs the last `strength`
        fraction of the schedule. `sketch`, the image with strokes drawn on it, replaces the image
        as the start. Pixels that `known_mask` (S, S) keeps are those of `image`.
        """
        known_mask = np.zeros((self.size, self.size), bool) if known_mask is None else known_mask
        return self._painted(
            image,
            known_mask,
            image if sketch is None else sketch,
            strength,
            prompt,
            seed,
            options,
            progress,
        )

    def scene(
        self,
        image: np.ndarray,
        edits: Sequence[tuple[np.ndarray, str]],
        seed: int,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray]:
        """Apply edits (known mask, prompt) one after another, each to the last result (fig. 3).

        Edit n uses the seed `seed` + n. Yields the image after each edit.
        """
        for n, (known_mask, prompt) in enumerate(edits):
            image = self.edit(image, known_mask, prompt, seed + n, options, progress)
            yield image

    def _small(self, prompts, seeds, options, progress) -> Tensor:
        requests = [
            base_request(self.base.config, prompt, seed, options, critic=self.base.critic)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self.base.run(requests, _stage(progress, "base"))

    def _enlarged(self, small, prompts, seeds, options, progress) -> list[np.ndarray]:
        if self.upsampler is None:
            return [to_uint8(image) for image in small]
        requests = [
            upsampler_request(self.upsampler.config, prompt, seed, image, options)
            for prompt, seed, image in zip(prompts, seeds, small, strict=True)
        ]
        return [
            to_uint8(image) for image in self.upsampler.run(requests, _stage(progress, "upsampler"))
        ]

    def _painted(
        self, image, known_mask, start, strength, prompt, seed, options, progress
    ) -> np.ndarray:
        """Run both stages of an edit, from noise or, if `start` is set, by SDEdit."""
        for pixels in (image, start if start is not None else image):
            if known_mask.shape != (self.size, self.size) or pixels.shape != (
                self.size,
                self.size,
                3,
            ):
                raise RequestError(
                    f"The image and its mask must be {self.size}x{self.size} pixels "
                    f"(given: {pixels.shape[1]}x{pixels.shape[0]} and "
                    f"{known_mask.shape[1]}x{known_mask.shape[0]}).",
                    "mask",
                )
        request = edit_request(
            self.base.config,
            image,
            known_mask,
            prompt,
            seed,
            options,
            critic=self.base.critic,
            start=start,
            strength=strength,
        )
        small = self.base.run([request], _stage(progress, "base"))[0]
        if self.upsampler is None:
            return to_uint8(small)
        request = upsampler_request(
            self.upsampler.config, prompt, seed, small, options, known=image, known_mask=known_mask
        )
        return to_uint8(self.upsampler.run([request], _stage(progress, "upsampler"))[0])


@torch.no_grad()
def clip_scores(
    critic: ClipScorer, device: torch.device | str, images: Tensor, prompts: Sequence[str]
) -> list[float]:
    """CLIP logit of each image (N, 3, h, w) with its prompt. Images are first rounded to 8 bits."""
    images = to_8_bits(images).to(device)
    return critic.score(
        images, torch.zeros(len(images), dtype=torch.int64, device=device), critic.embed(prompts)
    ).tolist()


def load_stepper(
    path: str | Path,
    role: str,
    precision: str = "auto",
    max_in_flight: int = 8,
    clip: str | Path | None = None,
    lanes: int = 1,
    batched: bool | None = None,
) -> Stepper:
    """Load weights, by path or name, into a Stepper for `role`: "base" or "upsampler".

    Raises WeightsError, also for weights of another role.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = locate(path, role)
    model, config = load_unet(
        path, role, DTYPES[resolve_precision(precision, device, portable=True)], device
    )
    critic = load_critic(clip, config, device) if clip else None
    dtype = next(model.parameters()).dtype
    return Stepper(model, config, device, dtype, max_in_flight, batched, critic, lanes)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
