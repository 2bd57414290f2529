"""Recipes: how an image was made, stored in its file, from which it can be reproduced.

A recipe holds the prompt, seed, options and the models with their hashes. A PNG also holds the
input images of an edit; JPEG and WebP hold the recipe alone, as a comment of EXIF.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError, model_validator

from ..config.lora import Lora
from ..config.models import AnyModelConfig, ClipModelConfig, Frozen, ModelConfig
from ..config.sampling import SampleOptions
from ..data.images import ImageError, comment_of, decode, encode, open_image
from ..errors import UserError
from ..models.adapters import check_roles, loras_of, read_adapters
from ..models.clip_scorer import check_clip, fetch_clip
from ..models.weights import check_pair, check_role, load_config, load_metadata
from ..pretrained import shipped
from ..pretrained.card import Source, sources_in, union
from ..storage import MissingError, fetch, fingerprint, put, read
from .cascade import Cascade
from .prompt import literal
from .regions import Square

CHUNK = "glide_ray"  # keyword of the PNG text chunk; inputs have chunks named CHUNK.NAME
INPUTS = ("image", "mask", "sketch", "whole_mask")
NEEDED = {
    "generate": (),
    "edit": ("image", "mask"),
    "vary": ("image",),
    "enlarge": ("image",),
}  # of old recipes, by task
FORMATS = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}  # by the ending of a file; else PNG


class RecipeError(UserError):
    """An image that cannot be reproduced."""


class ModelUsed(Frozen):
    """Weights that made an image.

    `path`: as the user wrote it, or the name of the shipped weights; "" in images from a server,
    which does not disclose its paths. `sha256`: of the file's bytes.
    """

    name: str
    path: str
    sha256: str


class LoraUsed(Frozen):
    """An adapter that was added to the models of an image.

    `path` and `sha256`: as those of `ModelUsed`. `scale`: its strength. `name`: under which a
    server had loaded it, if the request named it.
    """

    name: str = ""
    path: str
    sha256: str
    scale: float

    @classmethod
    def of(cls, lora: Lora, path: str | None = None) -> LoraUsed:
        """`path`: to record, by default the adapter's own."""
        sha256 = fingerprint(fetch(lora.path))
        return cls(path=lora.path if path is None else path, sha256=sha256, scale=lora.scale)


class Recipe(Frozen):
    """How one image was made, with a value for every option."""

    task: Literal["generate", "edit", "vary", "enlarge"]
    prompt: str
    seed: int
    options: SampleOptions
    strength: float = 1.0
    precision: str  # fp32, bf16 or fp16; auto: a server chose it by device
    models: dict[str, ModelUsed]  # by role: base, upsampler, clip
    loras: tuple[LoraUsed, ...] = ()
    made_with: str  # versions and device, to explain a difference when reproducing
    # Left, top and side of the square that was painted of a larger picture, whose mask is stored
    # as `whole_mask`; None: the whole picture.
    square: Square | None = None
    # Names of the inputs of a stored recipe, so that a missing one is noticed; None: old recipes,
    # and recipes that are not stored.
    inputs: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_old_recipes(cls, given: Any) -> Any:
        """Recipes before version 0.2 name no noise scheme; theirs is the first.

        In their prompts all brackets are ordinary characters.
        """
        options = given.get("options") if isinstance(given, dict) else None
        if not isinstance(options, dict) or "noise_scheme" in options:
            return given
        prompt = given.get("prompt")
        return {
            **given,
            "prompt": literal(prompt) if isinstance(prompt, str) else prompt,
            "options": {"noise_scheme": 1, **options},
        }


@dataclass(frozen=True)
class ModelSet:
    """The models of a cascade, without their tensors, and the metadata that recipes record."""

    base: ModelConfig
    upsampler: ModelConfig | None
    models: Mapping[str, ModelUsed]
    precision: str
    made_with: str
    sources: tuple[Source, ...] = ()  # origins of the training images, if the weights name them
    loras: tuple[LoraUsed, ...] = ()

    @classmethod
    def read(
        cls,
        paths: Mapping[str, str | None],
        precision: str,
        device: str,
        loras: Sequence[str] = (),
    ) -> ModelSet:
        """Read weights by role (local path, s3:// URL or name) without loading their tensors.

        `loras`: adapters as FILE or FILE:SCALE. Leaves the paths out of the recipes. Raises
        UserError if a file is missing, broken, of the wrong role, or incompatible with another.
        """
        added = loras_of(loras)
        check_roles(added, [role for role, path in paths.items() if path])
        configs: dict[str, AnyModelConfig] = {}
        used: dict[str, ModelUsed] = {}
        sources: list[tuple[Source, ...]] = []
        for role, path in paths.items():
            if path is None:
                continue
            local = fetch_clip(path) if role == "clip" else shipped.fetch(path, role)
            if role != "clip" or local.is_file():
                configs[role] = load_config(local)
                check_role(configs[role], role, path)
                sources.append(sources_in(load_metadata(local), path))
                read_adapters(added, role, local)
            name = configs[role].name if role in configs else "public CLIP"
            used[role] = ModelUsed(name=name, path="", sha256=fingerprint(local))
        base, upsampler, clip = (configs.get(role) for role in ("base", "upsampler", "clip"))
        # `check_role` has found each of its kind.
        assert isinstance(base, ModelConfig) and isinstance(upsampler, ModelConfig | None)
        check_pair(base, upsampler)
        if isinstance(clip, ClipModelConfig):
            check_clip(clip, base, str(paths["clip"]))
        return cls(
            base,
            upsampler,
            used,
            precision,
            versions(device),
            union(*sources, *map(_sources_of, added)),
            tuple(LoraUsed.of(lora, "") for lora in added),
        )

    @classmethod
    def of(cls, cascade: Cascade) -> ModelSet:
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
            ),
            *map(_sources_of, cascade.loras),
        )
        return cls(
            base,
            upsampler,
            models,
            cascade.precision,
            versions(cascade.base.device.type),
            sources,
            tuple(map(LoraUsed.of, cascade.loras)),
        )

    def recipe(
        self, task: str, prompt: str, seed: int, options: SampleOptions, strength: float = 1.0
    ) -> Recipe:
        """The recipe of a request to these models, whose defaults fill unset options."""
        stages = {"": self.base} | ({"upsampler_": self.upsampler} if self.upsampler else {})
        filled: dict[str, str | float] = {}
        for prefix, config in stages.items():
            own, sampler = config.sampling, getattr(options, f"{prefix}sampler")
            filled[f"{prefix}sampler"] = sampler or own.sampler
            steps = getattr(options, f"{prefix}steps")
            filled[f"{prefix}steps"] = own.respacing_for(steps, sampler)
            scale = getattr(options, f"{prefix}guidance_scale")
            filled[f"{prefix}guidance_scale"] = own.guidance_scale if scale is None else scale
        models = {
            role: used for role, used in self.models.items() if role != "clip" or options.clip_scale
        }
        return Recipe(
            task=task,
            prompt=prompt,
            seed=seed,
            options=options.model_copy(update=filled),
            strength=strength,
            precision=self.precision,
            models=models,
            loras=self.loras,
            made_with=self.made_with,
        )


def _sources_of(lora: Lora) -> tuple[Source, ...]:
    return sources_in(load_metadata(fetch(lora.path)), lora.path)


def png_text(recipe: Recipe, inputs: Mapping[str, np.ndarray] | None = None) -> dict[str, str]:
    """PNG text chunks of a recipe and its inputs.

    `inputs`: the input images of an edit: `image` and `sketch` uint8 (S, S, 3), `mask` bool (S, S),
    true = known; `whole_mask` bool (H, W) of a larger picture.
    """
    text = {CHUNK: _with_inputs(recipe, inputs).model_dump_json()}
    for name, array in (inputs or {}).items():
        pixels = np.where(array, 255, 0).astype(np.uint8) if array.dtype == bool else array
        text[f"{CHUNK}.{name}"] = base64.b64encode(encode(pixels)).decode()
    return text


def _with_inputs(recipe: Recipe, inputs: Mapping[str, np.ndarray] | None) -> Recipe:
    return recipe.model_copy(update={"inputs": tuple(inputs or ())})


def save_picture(
    pixels: np.ndarray,
    path: str | Path,
    recipe: Recipe,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a picture uint8 (H, W, 3) with its recipe, in the format of the path's ending.

    A PNG also has the inputs, which a JPEG or WebP has no room for.
    """
    form = FORMATS.get(Path(path).suffix.lower())
    if form is None:
        put(encode(pixels, text=png_text(recipe, inputs)), path)
    else:
        comment = json.dumps({CHUNK: _with_inputs(recipe, inputs).model_dump(mode="json")})
        put(encode(pixels, form, comment=comment), path)


def read_recipe(path: str | Path) -> tuple[Recipe, dict[str, np.ndarray], np.ndarray]:
    """Read a picture's recipe, inputs and pixels.

    Raises RecipeError, also if an input is missing, and ImageError.
    """
    data = read(path)
    opened = open_image(data)
    pixels = np.asarray(decode(data))
    # `.text` loads the pixels too, because text chunks may follow them.
    text = getattr(opened, "text", {})
    stored = text.get(CHUNK) or _in_comment(comment_of(opened))
    if stored is None:
        raise RecipeError(
            f"{path} carries no recipe: only pictures that `glide` wrote do, and a program that "
            f"has saved one since may have dropped it."
        )
    try:
        recipe = Recipe.model_validate_json(stored)
        inputs = {
            name: np.asarray(decode(base64.b64decode(text[f"{CHUNK}.{name}"])))
            for name in INPUTS
            if f"{CHUNK}.{name}" in text
        }
    except (ValidationError, ValueError) as error:
        raise RecipeError(
            f"{path} carries a recipe that this version does not read "
            f"({str(error).splitlines()[0]})."
        ) from None
    _check_inputs(path, recipe, inputs)
    for name in ("mask", "whole_mask"):
        if name in inputs:
            inputs[name] = inputs[name][:, :, 0] > 127
    return recipe.model_copy(update={"inputs": None}), inputs, pixels


def _in_comment(comment: str) -> str | None:
    """The recipe in the comment of a JPEG or WebP, as JSON; None if there is none."""
    try:
        return json.dumps(json.loads(comment)[CHUNK])
    except (ValueError, KeyError, TypeError):
        return None


def _check_inputs(path: str | Path, recipe: Recipe, inputs: Mapping[str, np.ndarray]) -> None:
    """Raise RecipeError unless all inputs of the recipe are there."""
    needed = NEEDED[recipe.task] if recipe.inputs is None else recipe.inputs
    missing = [name.replace("_", " ") for name in needed if name not in inputs]
    if missing:
        raise RecipeError(
            f"{path} lacks the {' and the '.join(missing)} of its {recipe.task}, so that it cannot "
            "be made again: only the PNG that glide wrote has them, and a program that has saved "
            "it since may have dropped them."
        )


def stored_picture(
    path: str | Path, recipe: Recipe, inputs: Mapping[str, np.ndarray] | None = None
) -> np.ndarray | None:
    """The picture in a file, uint8 (H, W, 3); None if missing or of another recipe or input.

    `made_with` may differ.
    """
    try:
        stored, stored_inputs, picture = read_recipe(path)
    except (MissingError, ImageError, RecipeError):
        return None
    same = stored.model_copy(update={"made_with": recipe.made_with}) == recipe
    wanted = inputs or {}
    if not same or stored_inputs.keys() != wanted.keys():
        return None
    equal = all(np.array_equal(stored_inputs[name], wanted[name]) for name in wanted)
    return picture if equal else None


def versions(device: str) -> str:
    """Versions and device: possible causes of a difference between two images of one recipe."""
    return (
        f"glide_ray {importlib.metadata.version('glide_ray')}, torch {torch.__version__}, {device}"
    )
