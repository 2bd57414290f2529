"""`glide bench` of trained models: effect of samplers, inpainting and guidance on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.sampling import SampleOptions
from ..config.training import SAMPLE_PROMPTS as PROMPTS
from ..data.images import centre_crop, decode, to_uint8
from ..data.sources import read_corpus
from ..errors import UserError
from ..sampling.cascade import Cascade, load_stepper
from ..sampling.job import base_request
from ..sampling.stepper import Stepper

IMAGES_PER_CALL = 32  # images per model call


def bench_inpainting(
    base: Path,
    inpaint: Path,
    corpus: Path,
    images: int = 64,
    width: int = 2,
    samplers: Sequence[str] = ("ddim", "ancestral"),
    precision: str = "fp32",
) -> dict:
    """Inpainting error at the border of a hole: implicit against explicit inpainting (sec. 4.3).

    Mean squared error, against the original picture, of the hole's pixels within `width` pixels of
    its border. "Explicit" is the model `inpaint`, which is trained for inpainting. "Implicit" is
    the model `base`, which is not: the known pixels are re-noised into each step.

    The pictures are the first `images` of `corpus`; each model uses its own number of steps.
    Raises UserError, WeightsError.
    """
    wanted = _pictures(corpus, images)
    steppers = {
        name: load_stepper(path, "base", precision, max_in_flight=IMAGES_PER_CALL, batched=True)
        for name, path in (("implicit", base), ("explicit", inpaint))
    }
    for name, path in (("implicit", base), ("explicit", inpaint)):
        if steppers[name].config.inpaint != (name == "explicit"):
            raise UserError(
                f"{path} is {'not ' if name == 'explicit' else ''}trained for inpainting; "
                "exchange the two weights files."
            )
    results = {}
    for sampler in samplers:
        border, hole = zip(
            *(_inpainting_errors(stepper, sampler, wanted, width) for stepper in steppers.values()),
            strict=True,
        )
        # Paired by picture: the same hole, filled from the same noise
        gain = border[0] - border[1]
        results[sampler] = {
            f"{part}_{name}": round(float(errors.mean()), 4)
            for part, pair in (("border", border), ("hole", hole))
            for name, errors in zip(steppers, pair, strict=True)
        }
        error = gain.std() / len(gain) ** 0.5
        results[sampler] |= {
            "border_gain": round(float(gain.mean()), 5),
            "gain_standard_error": round(float(error), 5),
        }
    return {"images": len(wanted), "border_pixels": width, **results}


def _inpainting_errors(
    stepper: Stepper, sampler: str, wanted: Sequence[tuple[Image.Image, str]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared errors (N,) of the pictures near the border of a square hole, and in all of it.

    Near the border: the hole's pixels within `width` pixels of it.
    """
    size, options = stepper.config.image_size, SampleOptions(sampler=sampler)
    y, x = np.mgrid[:size, :size]
    images = [centre_crop(pixels, size) for pixels, _ in wanted]
    insides = []  # distance to the hole's border in pixels, negative outside the hole
    for seed in range(len(wanted)):
        top, left = np.random.default_rng(seed).integers(size // 8, size // 2 - size // 8, 2)
        last = size // 2 - 1
        insides.append(
            np.minimum(np.minimum(y - top, top + last - y), np.minimum(x - left, left + last - x))
        )
    pictures = stepper.run(
        [
            base_request(
                stepper.config,
                caption,
                seed,
                options,
                known=images[seed],
                known_mask=insides[seed] < 0,
            )
            for seed, (_, caption) in enumerate(wanted)
        ]
    )
    errors = [
        np.square(to_uint8(one).astype(float) - image).mean(-1) / 255**2
        for one, image in zip(pictures, images, strict=True)
    ]
    pairs = list(zip(errors, insides, strict=True))
    border = [error[(inside >= 0) & (inside < width)].mean() for error, inside in pairs]
    return np.array(border), np.array([error[inside >= 0].mean() for error, inside in pairs])


def bench_guidance(
    base: str | Path, clip: Path, scales: Sequence[float] = (1, 2, 3, 5), seeds: int = 8
) -> dict:
    """Mean noised-CLIP score of a base model's pictures at several guidance scales.

    Classifier-free guidance (sec. 5.2, fig. 6). Raises WeightsError.
    """
    cascade = Cascade.load(base, precision="fp32", clip=clip, max_in_flight=8)
    prompts, scores, first = [prompt for prompt in PROMPTS for _ in range(seeds)], {}, None
    for scale in scales:
        requests = [
            base_request(
                cascade.base.config,
                prompt,
                n % seeds,
                SampleOptions(guidance_scale=scale, sampler="ddim"),
            )
            for n, prompt in enumerate(prompts)
        ]
        values = np.array(cascade.score(cascade.base.run(requests), prompts))
        first = values if first is None else first
        gain = values - first  # paired by picture: the same noise
        scores[scale] = {
            "score": round(float(values.mean()), 3),
            "gain": round(float(gain.mean()), 3),
            "gain_standard_error": round(float(gain.std() / len(gain) ** 0.5), 3),
        }
    return {"base": cascade.base.config.name, "pictures": len(prompts), "clip_score": scores}


def _pictures(corpus: Path, count: int) -> list[tuple[Image.Image, str]]:
    """The first `count` pictures of a corpus, with captions. Raises UserError."""
    found = [
        (decode(sample.image), sample.captions[0]) for sample in islice(read_corpus(corpus), count)
    ]
    if len(found) < count:
        raise UserError(
            f"There are only {len(found)} pictures in {corpus}; make the emoji corpus with "
            "`glide corpus`."
        )
    return found
