"""First stage of the demo: things by styles from the shipped weights, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ... import storage
from ...data.images import encode
from ...evaluation.report import grid
from ...precision import fastest_precision
from ...pretrained.shipped import Pair
from ...progress import stage_bars
from ...sampling.cascade import Cascade
from ...sampling.recipe import ModelSet, save_picture
from .figures import SHEET
from .plan import Plan
from .results import Result

IMAGES_PER_CALL = 8  # images per model call


def make_sheet(out: Path, plan: Plan, pair: Pair) -> Result:
    """Write SHEET and each of its pictures, with recipes. The pictures of a row share a seed.

    Returns `rows`, among others: the file names of each thing's pictures, in the order of `styles`.
    """
    cascade = Cascade.load(
        pair.base, pair.upsampler, fastest_precision(), IMAGES_PER_CALL, batched=True
    )
    prompts = [f"{thing}, {style}" for thing in plan.things for style in plan.styles]
    seeds = [row for row in range(len(plan.things)) for _ in plan.styles]
    images = _with_bars(cascade, prompts, seeds, plan)
    model_set, names = ModelSet.of(cascade), []
    for prompt, seed, image in zip(prompts, seeds, images, strict=True):
        names.append(f"pictures/{file_name(prompt)}.png")
        recipe = model_set.recipe("generate", prompt, seed, plan.sheet_options)
        save_picture(image, out / names[-1], recipe)
    width = len(plan.styles)
    rows = [images[start : start + width] for start in range(0, len(images), width)]
    sheet = grid(rows, plan.styles, plan.things)
    storage.put(encode(np.asarray(sheet)), out / SHEET)
    return {
        "things": list(plan.things),
        "styles": list(plan.styles),
        "files": [SHEET, *names],
        "rows": [names[start : start + width] for start in range(0, len(names), width)],
    }


def file_name(prompt: str) -> str:
    """A prompt as part of a file name: "a red apple, 3D render" -> "a-red-apple-3d-render"."""
    return "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())


def _with_bars(
    cascade: Cascade, prompts: list[str], seeds: list[int], plan: Plan
) -> list[np.ndarray]:
    with stage_bars(indent="  ") as progress:
        return cascade.generate(prompts, seeds, plan.sheet_options, progress)
