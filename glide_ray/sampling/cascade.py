"""Text-to-image cascade (prompt -> 64x64 -> 256x256) and image editing (sec. 4, 4.3; app. B.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ..config.lora import Lora
from ..config.models import SHIPPED
from ..config.sampling import SampleOptions
from ..data.images import to_8_bits, to_tensor, to_uint8
from ..models.adapters import adding, check_roles, loras_of
from ..models.clip_scorer import ClipScorer, load_critic
from ..models.weights import check_pair, load_unet, unchanged
from ..precision import DTYPES, resolve_precision
from ..pretrained.shipped import locate
from .cascade_calls import CascadeCalls, CascadeImage, ScoreCall, StageCall, cascade_calls
from .checks import RequestError, check_clip, check_negative, check_options, check_seed
from .inputs import (
    Mask,
    Picture,
    Prompts,
    Seeds,
    known_of,
    pairs_of,
    pixels_of,
    prompt_of,
    seed_of,
    seeds_of,
)
from .job import Job, Source
from .prompt import check_prompt, plain_text
from .regions import part_to_paint, paste
from .stepper import Stepper

# Arguments: stage name, denoising steps done in this stage, denoising steps of this stage.
Progress = Callable[[str, int, int], None]
# Arguments: number of the image, its predicted pixels uint8 (s, s, 3) at the size of the stage.
OnFrame = Callable[[int, np.ndarray], None]
ALL_STEPS = 1000  # previews of a sample, so that each of its steps has one


@dataclass(frozen=True)
class Ranked:
    """The best of several images, its seed, and the CLIP score of every candidate by seed."""

    image: np.ndarray
    seed: int
    scores: dict[int, float]


@dataclass(frozen=True)
class Cascade:
    """A base model with an optional CLIP (`base.critic`), and an optional 4x upsampler.

    Its methods take seeds from 0 to 2^63 - 1 as whole numbers of Python, numpy or torch; pictures
    of `size` x `size` pixels as images of Pillow, or as arrays of uint8 from 0 to 255 or of floats
    from 0 to 1, grey, RGB or RGBA, where transparency is laid on white; and masks as arrays (S, S)
    of bool, of 0 and 1 or of 0 and 255, or as images of Pillow with these values or with alpha.
    Everything is checked before sampling: they raise RequestError, a ValueError whose `param` names
    the argument or option, and NonFiniteError for a picture that is not finite.
    """

    base: Stepper
    upsampler: Stepper | None = None
    sources: Mapping[str, str | Path] = field(default_factory=dict)  # role -> loaded weights file
    precision: str = "fp32"
    loras: tuple[Lora, ...] = ()

    @classmethod
    def load(
        cls,
        base: str | Path,
        upsampler: str | Path | None = None,
        precision: str = "auto",
        max_in_flight: int = 8,
        clip: str | Path | None = None,
        batched: bool | None = None,
        loras: Sequence[str | Lora] = (),
    ) -> Cascade:
        """Load weights files, on the GPU if there is one. Raises WeightsError, ConfigError.

        `precision`: auto, fp32, bf16 or fp16; auto is fp16 on a GPU and fp32 on a CPU.
        `loras`: adapters, as FILE or FILE:SCALE; each is added to the model that it was trained
        on, the base model or the upsampler.
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
        adapters = loras_of(loras)
        check_roles(adapters, ("base", "upsampler") if upsampler else ("base",))
        load = partial(load_stepper, batched=batched, loras=adapters)
        cascade = cls(
            load(base, "base", precision, max_in_flight, clip),
            load(upsampler, "upsampler", precision, max_in_flight) if upsampler else None,
        )
        check_pair(cascade.base.config, cascade.upsampler.config if cascade.upsampler else None)
        sources = {
            role: path
            for role, path in (("base", base), ("upsampler", upsampler), ("clip", clip))
            if path
        }
        dtype = next(cascade.base.model.parameters()).dtype
        return replace(
            cascade,
            sources=sources,
            loras=adapters,
            precision=next(name for name, kind in DTYPES.items() if kind == dtype),
        )

    @property
    def size(self) -> int:
        return (self.upsampler or self.base).config.image_size

    @property
    def low_res_size(self) -> int:
        """Side in pixels of what the upsampler enlarges. Raises RequestError without one."""
        low_res = self.upsampler.config.unet.low_res_size if self.upsampler else None
        if low_res is None:
            raise RequestError(
                "A picture is enlarged by the upsampler, and none is loaded; give its weights with "
                "--upsampler, in Python as upsampler=.",
                "upsampler",
            )
        return low_res

    @property
    def at_once(self) -> int:
        """Number of pictures that take less time together than one after another: 1 on a CPU."""
        return self.base.scheduler.max_in_flight if self.base.batched else 1

    def generate(
        self,
        prompts: Prompts,
        seeds: Seeds,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
        on_frame: OnFrame | None = None,
    ) -> list[np.ndarray]:
        """Generate an image uint8 (S, S, 3) for each prompt and seed. Calls `progress` per step.

        One str as `prompts` goes with every seed, one number as `seeds` with every prompt; lists
        must have equal lengths. Empty lists give an empty list. `on_frame` receives the image that
        is predicted after each step of each stage.
        """
        pairs = pairs_of(prompts, seeds)
        self._check(options, (prompt for prompt, _ in pairs), (seed for _, seed in pairs))
        jobs = [Job(prompt, seed, self.size, options) for prompt, seed in pairs]
        if not jobs:
            return []
        return [_pixels(image) for image in self._make([[job] for job in jobs], progress, on_frame)]

    def best_of(
        self,
        prompt: str,
        seeds: Seeds,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> Ranked:
        """Generate an image per seed and keep the one with the highest CLIP score (app. E: 64).

        Only the best base image is upsampled. Raises RequestError without a CLIP or a seed.
        """
        self._critic()
        prompt, numbers = prompt_of(prompt), seeds_of(seeds)
        if not numbers:
            raise RequestError("seeds is empty; give a seed for each candidate.", "seeds")
        self._check(options, [prompt], numbers)
        jobs = [Job(prompt, seed, self.size, options) for seed in numbers]
        (image,) = self._make([jobs], progress)
        scores = image.scores or {
            image.seed: self.score(image.base_image[None], [plain_text(prompt)])[0]
        }
        return Ranked(_pixels(image), image.seed, scores)

    def score(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """CLIP score (sec. 5.2) of each base-size image (N, 3, h, w): its logit with its prompt.

        Raises RequestError without a CLIP, and for another number of prompts.
        """
        critic = self._critic()
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise RequestError(
                f"prompts must be a list with one for each of the {len(images)} images.", "prompts"
            )
        return clip_scores(critic, self.base.device, images, prompts)

    def edit(
        self,
        image: Picture,
        known_mask: Mask,
        prompt: str,
        seed: SupportsIndex,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Inpaint the pixels where `known_mask` (S, S) is false.

        Returns uint8 (S, S, 3); every known pixel has exactly the value it has in `image`.
        """
        source = self._source(image, known_mask)
        job = Job(prompt_of(prompt), seed_of(seed), self.size, options, source)
        self._check(options, [job.prompt], [job.seed])
        return self._paint(job, progress)

    def edit_whole(
        self,
        image: Picture,
        known_mask: Mask,
        prompt: str,
        seed: SupportsIndex,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Inpaint a picture of any size and shape: `image` (H, W), `known_mask` (H, W).

        A square around the unknown pixels is painted at the cascade's size and resized back.
        Returns uint8 (H, W, 3); every known pixel has exactly the value it has in `image`. Raises
        RequestError if the two have different sizes, and MaskError if there is nothing to paint.
        """
        pixels, known = pixels_of(image), known_of(known_mask)
        if pixels.shape != (*known.shape, 3):
            raise RequestError(
                f"The image and its mask must have one size (given: {pixels.shape[1]}x"
                f"{pixels.shape[0]} and {known.shape[1]}x{known.shape[0]}).",
                "known_mask",
            )
        part = part_to_paint(pixels, known, self.size)
        painted = self.edit(part.image, part.known, prompt, seed, options, progress)
        return paste(pixels, known, part.square, painted)

    def enlarge(
        self,
        image: Picture,
        prompt: str,
        seed: SupportsIndex,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Enlarge an image (s, s) of the upsampler's low-res size by the upsampler alone.

        Returns uint8 (S, S, 3): of a base model's image, its prompt and seed, the image that
        `generate` returns. Raises RequestError without an upsampler, or for another size.
        """
        size, pixels = self.low_res_size, pixels_of(image)
        if pixels.shape != (size, size, 3):
            raise RequestError(
                f"The image must be {size}x{size} pixels, which the upsampler enlarges "
                f"(given: {pixels.shape[1]}x{pixels.shape[0]}).",
                "image",
            )
        job = Job(prompt_of(prompt), seed_of(seed), self.size, options)
        self._check(options, [job.prompt], [job.seed], first="upsampler")
        call: StageCall[Tensor] = StageCall("upsampler", [job], [to_tensor(pixels)])
        return to_uint8(self._run(call, progress)[0])

    def vary(
        self,
        image: Picture,
        prompt: str,
        seed: SupportsIndex,
        strength: float,
        known_mask: Mask | None = None,
        sketch: Picture | None = None,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Vary an image by SDEdit (Meng et al. 2021; fig. 4).

        Sampling starts from `image` (S, S, 3) plus noise and runs the last `strength` fraction,
        above 0 and at most 1, of the schedule. `sketch`, the image with strokes drawn on it,
        replaces the image as the start. Pixels that `known_mask` (S, S) keeps are those of `image`.
        Returns uint8 (S, S, 3).
        """
        known = np.zeros((self.size, self.size), bool) if known_mask is None else known_mask
        source = self._source(image, known, sketch)
        job = Job(prompt_of(prompt), seed_of(seed), self.size, options, source, strength)
        self._check(options, [job.prompt], [job.seed], strength)
        return self._paint(job, progress)

    def scene(
        self,
        image: Picture,
        edits: Iterable[tuple[Mask, str]],
        seed: SupportsIndex,
        options: SampleOptions = SampleOptions(),
        progress: Progress | None = None,
    ) -> Iterator[np.ndarray]:
        """Apply edits (known mask, prompt) one after another, each to the last result (fig. 3).

        Edit n uses the seed `seed` + n. All arguments are checked at the call; then yields the
        image uint8 (S, S, 3) after each edit.
        """
        first = seed_of(seed)
        jobs = [
            Job(
                prompt_of(prompt),
                first + n,
                self.size,
                options,
                self._source(image, known_mask),
            )
            for n, (known_mask, prompt) in enumerate(edits)
        ]
        self._check(options, (job.prompt for job in jobs), (first, *(job.seed for job in jobs)))
        return self._painted(jobs, progress)

    def _painted(self, jobs: Sequence[Job], progress: Progress | None) -> Iterator[np.ndarray]:
        """The image of each edit, from the second on of the image before."""
        image: np.ndarray | None = None
        for job in jobs:
            assert job.source is not None
            if image is not None:
                job = replace(job, source=replace(job.source, image=image))
            image = self._paint(job, progress)
            yield image

    def _paint(self, job: Job, progress: Progress | None) -> np.ndarray:
        """The image uint8 (S, S, 3) of an edit or variation."""
        return _pixels(self._make([[job]], progress)[0])

    def _check(
        self,
        options: SampleOptions,
        prompts: Iterable[str],
        seeds: Iterable[int],
        strength: float | None = None,
        first: Literal["base", "upsampler"] = "base",
    ) -> None:
        """Raise RequestError for anything in a request that these models cannot take.

        `first`: the first stage, whose guidance a negative prompt needs.
        """
        base, upsampler = self.base.config, self.upsampler.config if self.upsampler else None
        check_options(options, None, strength, base, upsampler)
        check_negative(upsampler if first == "upsampler" and upsampler else base, options)
        check_clip(options.clip_scale, self.base.critic is not None)
        for prompt in set(prompts):
            check_prompt(prompt)
        for seed in seeds:
            check_seed(seed)

    def _source(self, image: Picture, known_mask: Mask, sketch: Picture | None = None) -> Source:
        """The input of an edit or variation. Raises RequestError unless it has the right size."""
        pixels, mask, size = pixels_of(image), known_of(known_mask), self.size
        start = None if sketch is None else pixels_of(sketch, "sketch")
        given = {"image": pixels, "known_mask": mask} | ({} if start is None else {"sketch": start})
        sides = " and ".join(f"{one.shape[1]}x{one.shape[0]}" for one in given.values())
        for name, one in given.items():
            if one.shape[:2] != (size, size):
                raise RequestError(
                    f"{', '.join(given)} must be {size}x{size} pixels (given: {sides}).", name
                )
        return Source(pixels, mask, start)

    def _make(
        self,
        images: Sequence[Sequence[Job]],
        progress: Progress | None,
        on_frame: OnFrame | None = None,
    ) -> list[CascadeImage[Tensor]]:
        """Make images (3, H, W), each from its candidates, with both stages in this process."""
        calls: CascadeCalls[Tensor] = cascade_calls(images, self.upsampler is not None)
        result: Any = None
        while True:
            try:
                call = calls.send(result)
            except StopIteration as end:
                finished: list[CascadeImage[Tensor]] = end.value
                return finished
            if isinstance(call, ScoreCall):
                result = self.score(
                    torch.stack(list(call.images)), [call.prompt] * len(call.images)
                )
            else:
                result = self._run(call, progress, on_frame)

    def _run(
        self,
        call: StageCall[Tensor],
        progress: Progress | None,
        on_frame: OnFrame | None = None,
    ) -> Tensor:
        """Run a stage. Returns images (N, 3, H, W)."""
        stepper = self.base if call.stage == "base" else self.upsampler
        assert stepper is not None
        if call.stage == "base":
            requests = [job.base_request(stepper.config, stepper.critic) for job in call.jobs]
        else:
            requests = [
                job.upsampler_request(stepper.config, image)
                for job, image in zip(call.jobs, call.low_res, strict=True)
            ]
        if on_frame is not None:
            requests = [
                replace(request, previews=ALL_STEPS, on_preview=partial(_show, on_frame, n))
                for n, request in enumerate(requests)
            ]
        images = stepper.run(
            requests, None if progress is None else lambda *steps: progress(call.stage, *steps)
        )
        if on_frame is not None:
            for n, image in enumerate(images):
                _show(on_frame, n, image)
        return images

    def _critic(self) -> ClipScorer:
        if self.base.critic is None:
            raise RequestError(
                "The best of several pictures is chosen by CLIP; give a CLIP model.", "best_of"
            )
        return self.base.critic


def _show(on_frame: OnFrame, n: int, predicted: Tensor) -> None:
    on_frame(n, to_uint8(predicted))


def _pixels(image: CascadeImage[Tensor]) -> np.ndarray:
    return to_uint8(image.base_image if image.upsampled is None else image.upsampled)


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
    loras: Sequence[Lora] = (),
) -> Stepper:
    """Load weights, by path or name, into a Stepper for `role`: "base" or "upsampler".

    `loras`: adapters; those of the other role are left out. Raises WeightsError, also for weights
    of another role.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if max_in_flight < 1:
        raise RequestError(
            f"max_in_flight must be at least 1 (given: {max_in_flight}).", "max_in_flight"
        )
    path = locate(path, role)
    model, config = load_unet(
        path,
        role,
        DTYPES[resolve_precision(precision, device, portable=True)],
        device,
        adding(loras, role, path) if loras else unchanged,
    )
    critic = load_critic(clip, config, device) if clip else None
    dtype = next(model.parameters()).dtype
    return Stepper(model, config, device, dtype, max_in_flight, batched, critic, lanes)
