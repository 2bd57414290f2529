"""What every PNG carries of how it was made, and making it again: prompt, seed, options, models with their hashes, and inputs."""

from __future__ import annotations

import base64
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError

from ..config.models import SHIPPED, Frozen, ModelConfig
from ..config.sampling import SampleOptions
from ..data.images import decode, encode, open_image
from ..errors import UserError
from ..models.clip_scorer import check_clip, fetch_clip
from ..models.weights import check_pair, check_role, load_config, load_metadata
from ..pretrained import shipped
from ..pretrained.card import Source, sources_in, union
from ..storage import fingerprint, put, read
from .cascade import Cascade, Progress

CHUNK = "glide_ray"  # of the PNG's text; the inputs have chunks of their own beside it
INPUTS = ("image", "mask", "sketch")


class RecipeError(UserError):
    """A picture that cannot be made again."""


class ModelUsed(Frozen):
    """A weights file: its path as the user gave it, or the name of the shipped weights ("" where a server does not tell),
    and the SHA-256 of its bytes."""

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
    precision: str  # fp32, bf16, fp16; auto where a server chose by its device
    models: dict[str, ModelUsed]  # base, upsampler, clip
    made_with: str  # versions and device, to explain a difference


@dataclass(frozen=True)
class Maker:
    """The models that make pictures, as their recipes name them."""

    base: ModelConfig
    upsampler: ModelConfig | None
    models: Mapping[str, ModelUsed]
    precision: str
    made_with: str
    sources: tuple[
        Source, ...
    ] = ()  # whose pictures they were trained on, as far as the weights say

    @classmethod
    def read(cls, paths: Mapping[str, str | None], precision: str, device: str) -> Maker:
        """Of weights by role, local, s3:// or a name, without their tensors. Where they lie is not said.

        Raises WeightsError, StorageError where one is missing, broken, of the wrong kind, or does not go with another.
        """
        configs, used, sources = {}, {}, []
        for role, path in paths.items():
            if path is None:
                continue
            local = fetch_clip(path) if role == "clip" else shipped.fetch(path, role)
            if role != "clip" or local.is_file():
                configs[role] = load_config(local)
                check_role(configs[role], role, path)
                sources.append(sources_in(load_metadata(local), path))
            name = configs[role].name if role in configs else "public CLIP"
            used[role] = ModelUsed(name=name, path="", sha256=fingerprint(local))
        check_pair(configs["base"], configs.get("upsampler"))
        if "clip" in configs:
            check_clip(configs["clip"], configs["base"], paths["clip"])
        return cls(
            configs["base"],
            configs.get("upsampler"),
            used,
            precision,
            versions(device),
            union(*sources),
        )

    @classmethod
    def of(cls, cascade: Cascade) -> Maker:
        base, upsampler = (
            cascade.base.config,
            cascade.upsampler.config if cascade.upsampler else None,
        )
        names = {
            "base": base.name,
            "upsampler": upsampler.name if upsampler else "",
            "clip": getattr(getattr(cascade.base.critic, "config", None), "name", "public CLIP"),
        }
        models = {
            role: ModelUsed(name=names[role], path=shipped.name_of(path), sha256=fingerprint(path))
            for role, path in cascade.sources.items()
        }
        sources = union(
            *(
                sources_in(load_metadata(path), path)
                for path in cascade.sources.values()
                if Path(path).is_file()
            )
        )
        return cls(
            base, upsampler, models, cascade.precision, versions(cascade.base.device.type), sources
        )

    def recipe(
        self, task: str, prompt: str, seed: int, options: SampleOptions, strength: float = 1.0
    ) -> Recipe:
        """Of what these models make of a request. What it leaves to them is filled in."""
        own = {
            "sampler": self.base.sampling.sampler,
            "steps": self.base.sampling.respacing,
            "guidance_scale": self.base.sampling.guidance_scale,
        }
        if self.upsampler is not None:
            own["upsampler_steps"] = self.upsampler.sampling.respacing
        filled = options.model_copy(
            update={name: value for name, value in own.items() if getattr(options, name) is None}
        )
        models = {
            role: used for role, used in self.models.items() if role != "clip" or options.clip_scale
        }
        return Recipe(
            task=task,
            prompt=prompt,
            seed=seed,
            options=filled,
            strength=strength,
            precision=self.precision,
            models=models,
            made_with=self.made_with,
        )


def png_text(recipe: Recipe, inputs: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
    """The chunks that a PNG carries. `inputs`: the image and sketch (S, S, 3) uint8 and known mask (S, S) bool that it was made from."""
    text = {CHUNK: recipe.model_dump_json()}
    for name, given in (inputs or {}).items():
        pixels = np.where(given, 255, 0).astype(np.uint8) if given.dtype == bool else given
        text[f"{CHUNK}.{name}"] = base64.b64encode(encode(pixels)).decode()
    return text


def save_picture(
    pixels: np.ndarray,
    path: str | Path,
    recipe: Recipe,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a PNG with its recipe and its inputs."""
    put(encode(pixels, text=png_text(recipe, inputs)), path)


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, np.ndarray], np.ndarray]:
    """The recipe of a PNG, the inputs beside it, and its pixels. Raises RecipeError, ImageError."""
    data = read(path)
    opened = open_image(data)
    pixels = np.asarray(decode(data))  # reads the chunks that follow the pixels, too
    text = getattr(opened, "text", {})
    if CHUNK not in text:
        raise RecipeError(
            f"{path} carries no recipe: only PNGs that `glide` wrote do, and a program that has saved one since may have "
            f"dropped it."
        )
    try:
        recipe = Recipe.model_validate_json(text[CHUNK])
        inputs = {
            name: np.asarray(decode(base64.b64decode(text[f"{CHUNK}.{name}"])))
            for name in INPUTS
            if f"{CHUNK}.{name}" in text
        }
    except (ValidationError, ValueError) as error:
        raise RecipeError(
            f"{path} carries a recipe that this version does not read ({str(error).splitlines()[0]})."
        ) from None
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"][:, :, 0] > 127
    return recipe, inputs, pixels


def find_models(recipe: Recipe, elsewhere: Mapping[str, Path | None]) -> dict[str, Path]:
    """The weights files of a recipe, where it says, `elsewhere`, or in the package.

    Raises RecipeError where one is missing or is another.
    """
    found = {}
    for role, used in recipe.models.items():
        path = _path_of(role, used, elsewhere.get(role))
        if not path.exists() or not path.name:
            what = (
                f"The {role} weights {path} are not there"
                if path.name
                else f"The recipe does not say where the {role} weights are"
            )
            raise RecipeError(
                f"{what}; give the path of {used.name} (SHA-256 {used.sha256[:16]}...) with --{role}."
            )
        if fingerprint(path) != used.sha256:
            raise RecipeError(
                f"{path} is not the file that made this picture: its SHA-256 begins {fingerprint(path)[:16]} and that of "
                f"{used.name} {used.sha256[:16]}; give the path of the right one with --{role}."
            )
        found[role] = path
    return found


def _path_of(role: str, used: ModelUsed, elsewhere: Path | None) -> Path:
    """Where a model's weights should be. What a recipe does not find is looked for among the shipped weights."""
    given = Path(elsewhere or used.path)
    if str(given) == SHIPPED:
        return Path(shipped.locate(SHIPPED, role))
    there = given.name and given.exists()
    return given if there or elsewhere else shipped.with_sha256(used.sha256) or given


def make_again(
    cascade: Cascade,
    recipe: Recipe,
    inputs: Mapping[str, np.ndarray],
    progress: Progress | None = None,
) -> np.ndarray:
    """The picture of a recipe: uint8 (S, S, 3)."""
    if recipe.task == "generate":
        return cascade.generate([recipe.prompt], [recipe.seed], recipe.options, progress)[0]
    if recipe.task == "edit":
        return cascade.edit(
            inputs["image"], inputs["mask"], recipe.prompt, recipe.seed, recipe.options, progress
        )
    return cascade.vary(
        inputs["image"],
        recipe.prompt,
        recipe.seed,
        recipe.strength,
        inputs.get("mask"),
        inputs.get("sketch"),
        recipe.options,
        progress,
    )


def versions(device: str) -> str:
    """What a difference between two pictures of one recipe may come from."""
    return (
        f"glide_ray {importlib.metadata.version('glide_ray')}, torch {torch.__version__}, {device}"
    )
