"""Make the pictures of README.md and docs/results.md from the shipped weights.

    python docs/images/make.py            # all of them, a few minutes on two cores
    python docs/images/make.py edit scene

Each function below returns one picture, which is written beside this file under its name.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import glide_ray
from glide_ray.evaluation.report import grid, show_hole

OPTIONS = glide_ray.SampleOptions()
THINGS = (
    "a red apple",
    "a red heart",
    "a grinning face",
    "a tangerine",
    "a sunflower",
    "a dog face",
)
STYLES = ("3D render", "flat icon", "Noto", "Twemoji")
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
CALLS = (("ancestral", 150), ("dpm++", 25), ("unipc", 15), ("unipc", 8), ("unipc", 6))


def prompt(cascade):
    """Pictures of three prompts, side by side."""
    prompts = ["a red apple, 3D render", "a grinning face, 3D render", "a red heart, flat icon"]
    return Image.fromarray(np.concatenate(cascade.generate(prompts, [4, 2, 1], OPTIONS), axis=1))


def edit(cascade):
    """A red apple, its right half as a hole, and the hole painted as a green apple."""
    before = cascade.generate(["a red apple, 3D render"], [4], OPTIONS)[0]
    known = _left(len(before), 1 / 2)
    after = cascade.edit(before, known, "a green apple, 3D render", 3, OPTIONS)
    return Image.fromarray(np.concatenate([before, show_hole(before, known), after], axis=1))


def sketch(cascade):
    """A drawing, and the picture that starts from it."""
    drawing = Image.new("RGB", (256, 256), "white")
    pencil = ImageDraw.Draw(drawing)
    pencil.ellipse((28, 28, 228, 228), fill=(250, 200, 60))
    for x in (96, 160):
        pencil.ellipse((x - 14, 82, x + 14, 118), fill=(60, 30, 20))
    pencil.pieslice((70, 100, 186, 206), 0, 180, fill=(120, 20, 40))
    pixels = np.asarray(drawing)
    made = cascade.vary(pixels, "a grinning face, 3D render", 1, 0.8, options=OPTIONS)
    return Image.fromarray(np.concatenate([pixels, made], axis=1))


def scene(cascade):
    """A strip that grows to the right: each edit keeps the end of it and paints what follows."""
    first, *more = ("a red apple", "a red heart", "a grinning face", "a tangerine")
    strip = cascade.generate([f"{first}, flat icon"], [1], OPTIONS)[0]
    for seed, thing in enumerate(more, 2):
        window = np.full_like(strip[:, :256], 255)
        window[:, :32] = strip[:, -32:]
        known = _left(256, 1 / 8)
        made = cascade.edit(window, known, f"{thing}, flat icon", seed, OPTIONS)
        strip = np.concatenate([strip[:, :-32], made], axis=1)
    return Image.fromarray(strip)


def styles(cascade):
    """Things by styles; the pictures of a row have the same seed."""
    rows = [
        cascade.generate([f"{thing}, {style}" for style in STYLES], [seed] * len(STYLES), OPTIONS)
        for seed, thing in enumerate(THINGS)
    ]
    return grid(rows, STYLES, THINGS)


def guidance(cascade):
    """The same prompts and seeds at several guidance scales."""
    prompts = ("a red apple, 3D render", "a dog face, Noto")
    columns = [
        cascade.generate(prompts, [1, 2], OPTIONS.model_copy(update={"guidance_scale": scale}))
        for scale in SCALES
    ]
    return grid(list(zip(*columns, strict=True)), [f"scale {scale:g}" for scale in SCALES], prompts)


def steps(cascade):
    """The same prompts and seeds by samplers and numbers of network calls of the base model."""
    prompts = ("a red apple, 3D render", "a grinning face, 3D render", "a tangerine, Twemoji")
    columns = [
        cascade.generate(
            prompts, [4, 2, 5], OPTIONS.model_copy(update={"sampler": sampler, "steps": calls})
        )
        for sampler, calls in CALLS
    ]
    names = [f"{sampler}, {calls} steps" for sampler, calls in CALLS]
    return grid(list(zip(*columns, strict=True)), names, prompts)


def _left(size, share):
    """Mask (size, size), true in the left `share` of the columns."""
    return np.broadcast_to(np.arange(size) < share * size, (size, size))


PICTURES = {made.__name__: made for made in (prompt, edit, sketch, scene, styles, guidance, steps)}

if __name__ == "__main__":
    loaded = glide_ray.load()
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name](loaded).save(Path(__file__).with_name(f"{name}.png"), optimize=True)
