"""What every PNG carries of how it was made, and making it again: prompt, seed, options, models with their hashes, and inputs."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError

from .cascade import Cascade, Progress
from .config import Frozen, ModelConfig, SampleOptions, UserError
from .data.images import decode, encode, open_image
from .storage import put, read

CHUNK = "glide_ray"            # of the PNG's text; the inputs have chunks of their own beside it
INPUTS = ("image", "mask", "sketch")


class RecipeError(UserError):
    """A picture that cannot be made again."""


class ModelUsed(Frozen):
    """A weights file: its path as the user gave it, and the SHA-256 of its bytes."""

    name: str
    path: str
    sha256: str


class Recipe(Frozen):
    """How one picture was made, nothing left to a default."""

    task: Literal["generate", "edit", "vary"]
    prompt: str
    seed: int
    options: SampleOptions
    strength: float = 1.0
    precision: str
    models: dict[str, ModelUsed]          # base, upsampler, clip
    made_with: str                        # versions and device, to explain a difference


def write_recipe(cascade: Cascade, task: str, prompt: str, seed: int, options: SampleOptions, strength: float = 1.0) -> Recipe:
    """The recipe of what `cascade` makes of these."""
    base = cascade.base
    resolved = {**resolve_options(base.config, options).model_dump()}
    if cascade.upsampler is not None and options.upsampler_steps is None:
        resolved["upsampler_steps"] = cascade.upsampler.config.sampling.respacing
    names = {"base": base.config.name, "upsampler": cascade.upsampler.config.name if cascade.upsampler else "",
             "clip": getattr(getattr(base.critic, "config", None), "name", "public CLIP")}
    models = {role: ModelUsed(name=names[role], path=str(path), sha256=fingerprint(path)) for role, path in cascade.sources.items()
              if role != "clip" or options.clip_scale}
    return Recipe(task=task, prompt=prompt, seed=seed, options=SampleOptions(**resolved), strength=strength, precision=cascade.precision,
                  models=models, made_with=_here(cascade))


def resolve_options(config: ModelConfig, options: SampleOptions) -> SampleOptions:
    """The options with what they leave to the base model filled in."""
    own = config.sampling
    filled = {"sampler": own.sampler, "steps": own.respacing, "guidance_scale": own.guidance_scale}
    return options.model_copy(update={name: value for name, value in filled.items() if getattr(options, name) is None})


def save_picture(pixels: np.ndarray, path: str | Path, recipe: Recipe, inputs: Mapping[str, np.ndarray] | None = None) -> None:
    """Write a PNG with its recipe. `inputs`: the image and sketch (S, S, 3) uint8 and known mask (S, S) bool that it was made from."""
    text = {CHUNK: recipe.model_dump_json()}
    for name, given in (inputs or {}).items():
        pixels_given = np.where(given, 255, 0).astype(np.uint8) if given.dtype == bool else given
        text[f"{CHUNK}.{name}"] = base64.b64encode(encode(pixels_given)).decode()
    put(encode(pixels, text=text), path)


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, np.ndarray], np.ndarray]:
    """The recipe of a PNG, the inputs beside it, and its pixels. Raises RecipeError, ImageError."""
    data = read(path)
    opened = open_image(data)
    pixels = np.asarray(decode(data))       # reads the chunks that follow the pixels, too
    text = getattr(opened, "text", {})
    if CHUNK not in text:
        raise RecipeError(f"{path} carries no recipe: only PNGs that `glide` wrote do, and a program that has saved one since may have "
                          f"dropped it.")
    try:
        recipe = Recipe.model_validate_json(text[CHUNK])
        inputs = {name: np.asarray(decode(base64.b64decode(text[f"{CHUNK}.{name}"]))) for name in INPUTS if f"{CHUNK}.{name}" in text}
    except (ValidationError, ValueError) as error:
        raise RecipeError(f"{path} carries a recipe that this version does not read ({str(error).splitlines()[0]}).") from None
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"][:, :, 0] > 127
    return recipe, inputs, pixels


def find_models(recipe: Recipe, elsewhere: Mapping[str, Path | None]) -> dict[str, Path]:
    """The weights files of a recipe, where it says or `elsewhere`. Raises RecipeError where one is missing or is another."""
    found = {}
    for role, used in recipe.models.items():
        path = Path(elsewhere.get(role) or used.path)
        if not path.exists():
            raise RecipeError(f"The {role} weights {path} are not there; give the path of {used.name} (SHA-256 {used.sha256[:16]}...) with "
                              f"--{role}.")
        if fingerprint(path) != used.sha256:
            raise RecipeError(f"{path} is not the file that made this picture: its SHA-256 begins {fingerprint(path)[:16]} and that of "
                              f"{used.name} {used.sha256[:16]}; give the path of the right one with --{role}.")
        found[role] = path
    return found


def make_again(cascade: Cascade, recipe: Recipe, inputs: Mapping[str, np.ndarray], progress: Progress | None = None) -> np.ndarray:
    """The picture of a recipe: uint8 (S, S, 3)."""
    if recipe.task == "generate":
        return cascade.generate([recipe.prompt], [recipe.seed], recipe.options, progress)[0]
    if recipe.task == "edit":
        return cascade.edit(inputs["image"], inputs["mask"], recipe.prompt, recipe.seed, recipe.options, progress)
    return cascade.vary(inputs["image"], recipe.prompt, recipe.seed, recipe.strength, inputs.get("mask"), inputs.get("sketch"),
                        recipe.options, progress)


@lru_cache(maxsize=16)
def fingerprint(path: str | Path) -> str:
    """SHA-256 of a weights file, or of the weights in a public CLIP's folder."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _here(cascade: Cascade) -> str:
    return f"glide_ray {importlib.metadata.version('glide_ray')}, torch {torch.__version__}, {cascade.base.device.type}"
