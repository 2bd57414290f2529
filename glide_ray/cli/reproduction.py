"""Command that makes a picture again from its recipe: reproduce."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, local_path
from .picture_files import check_inputs, check_out
from .terminal import with_step_bars

if TYPE_CHECKING:
    import numpy as np


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "reproduce",
        reproduce,
        "make a picture again from the recipe in its file, and compare the two",
    )
    command.add_argument("picture", help="picture that glide wrote")
    for model in ("base", "upsampler", "CLIP"):
        command.add_argument(
            f"--{model.lower()}",
            type=local_path,
            help=f"new location of the {model} weights, which must be unchanged (default: the "
            "location in the recipe)",
        )
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="new location of an adapter, which must be unchanged; may be repeated (default: the "
        "location in the recipe)",
    )
    command.add_argument("--out", type=local_path, help="file to write the new picture to")


def reproduce(options: Namespace) -> None:
    from ..sampling.recipe import read_recipe, save_picture
    from ..sampling.reproduction import find_loras, find_models, reproduce_picture

    check_inputs(options)
    if options.out:
        check_out(options.out)
    recipe, inputs, before = read_recipe(options.picture)
    roles = ("base", "upsampler", "clip")
    models = find_models(recipe, {role: getattr(options, role) for role in roles})
    from ..sampling.cascade import Cascade

    cascade = Cascade.load(
        models["base"],
        models.get("upsampler"),
        recipe.precision,
        clip=models.get("clip"),
        loras=find_loras(recipe, options.lora),
    )
    result = with_step_bars(
        lambda progress: reproduce_picture(cascade, recipe, inputs, progress, before)
    )
    print(
        f"{recipe.task} {recipe.prompt!r}, seed {recipe.seed}, {recipe.options.sampler} "
        f"{recipe.options.steps}, guidance scale {recipe.options.guidance_scale:g}, "
        f"{recipe.models['base'].name}"
    )
    print(_compare(options.picture, before, result, recipe.made_with))
    if options.out:
        save_picture(result, options.out, recipe, inputs)
        print(options.out)


def _compare(path: str, before: np.ndarray, result: np.ndarray, made_with: str) -> str:
    """A sentence on the difference of two pictures, uint8 (H, W, 3)."""
    if result.shape != before.shape:
        return (
            f"{path} has been resized since: it is {before.shape[1]}x{before.shape[0]} and was "
            f"made at {result.shape[1]}x{result.shape[0]}"
        )
    difference = abs(result.astype(int) - before)
    if not difference.any():
        return f"the same as {path}, to the last 8-bit value"
    why = f"it was made with {made_with}"
    if Path(path).suffix.lower() != ".png":
        why += ", and saving it in this format has changed values: only a PNG keeps them"
    return (
        f"differs from {path} by up to {difference.max()} of 255, in "
        f"{(difference > 0).mean():.2%} of its values; {why}"
    )
