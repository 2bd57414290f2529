"""Reproducing a picture: finding the models of its recipe, and making it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config.lora import Lora
from ..config.models import SHIPPED
from ..pretrained import shipped
from ..storage import exists, fetch, fingerprint
from .cascade import Cascade, Progress
from .recipe import ModelUsed, Recipe, RecipeError
from .regions import paste


def find_models(recipe: Recipe, elsewhere: Mapping[str, Path | None]) -> dict[str, Path]:
    """Find a recipe's weights files: in `elsewhere`, at the recorded paths, or in the package.

    `elsewhere`: paths from the user, by role; they come first. Raises RecipeError if a file is
    missing or its SHA-256 differs.
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
                f"{what}; give the path of {used.name} (SHA-256 {used.sha256[:16]}...) "
                f"with --{role}."
            )
        if fingerprint(path) != used.sha256:
            raise RecipeError(
                f"{path} is not the file that made this picture: its SHA-256 begins "
                f"{fingerprint(path)[:16]} and that of {used.name} {used.sha256[:16]}; "
                f"give the path of the right one with --{role}."
            )
        found[role] = path
    return found


def find_loras(recipe: Recipe, elsewhere: Sequence[str]) -> tuple[Lora, ...]:
    """Find a recipe's adapters: among the files `elsewhere`, or at the recorded paths.

    Raises RecipeError if one is in neither.
    """
    found = []
    for used in recipe.loras:
        files = [path for path in (*elsewhere, used.path) if path and exists(path)]
        same = [path for path in files if fingerprint(fetch(path)) == used.sha256]
        if not same:
            served = f"The adapter {used.name!r}" if used.name else "An adapter of the picture"
            name = used.path or served
            raise RecipeError(
                f"{name} (SHA-256 {used.sha256[:16]}...) is not there, or has changed; give the "
                "path of the right file with --lora."
            )
        found.append(Lora(path=same[0], scale=used.scale))
    return tuple(found)


def _path_of(role: str, model: ModelUsed, elsewhere: Path | None) -> Path:
    """Expected path of a model's weights.

    If nothing exists at the recorded path, falls back to the shipped file with the same SHA-256.
    """
    path = Path(elsewhere or model.path)
    if str(path) == SHIPPED:
        return Path(shipped.locate(SHIPPED, role))
    exists = path.name and path.exists()
    return path if exists or elsewhere else shipped.with_sha256(model.sha256) or path


def reproduce_picture(
    cascade: Cascade,
    recipe: Recipe,
    inputs: Mapping[str, np.ndarray],
    progress: Progress | None = None,
    picture: np.ndarray | None = None,
) -> np.ndarray:
    """Reproduce the image of a recipe: uint8 (S, S, 3), or (H, W, 3) of an edited larger picture.

    `picture`: the stored pixels, from which the known pixels of a larger picture are taken; its
    painted pixels are made again. Raises RecipeError without them, or at another size.
    """
    if recipe.task == "generate":
        return cascade.generate([recipe.prompt], [recipe.seed], recipe.options, progress)[0]
    if recipe.task == "enlarge":
        return cascade.enlarge(
            inputs["image"], recipe.prompt, recipe.seed, recipe.options, progress
        )
    if recipe.task == "edit":
        if recipe.square is not None and (
            picture is None or picture.shape[:2] != inputs["whole_mask"].shape
        ):
            height, width = inputs["whole_mask"].shape
            raise RecipeError(
                f"The picture was edited at {width}x{height} and has been resized since; give the "
                "file as glide wrote it."
            )
        painted = cascade.edit(
            inputs["image"], inputs["mask"], recipe.prompt, recipe.seed, recipe.options, progress
        )
        if recipe.square is None:
            return painted
        assert picture is not None
        return paste(picture, inputs["whole_mask"], recipe.square, painted)
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
