"""Commands that make pictures: generate, edit, vary, scene and reproduce."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import (
    Commands,
    Parser,
    add_sampling,
    add_seed,
    add_weights,
    local_path,
    positive,
    sample_options,
)
from .picture_files import check_files, crop_square, open_picture, read_mask, read_sketch
from .terminal import print_note, with_step_bars

if TYPE_CHECKING:
    import numpy as np

    from ..config.sampling import SampleOptions
    from ..sampling.cascade import Cascade


def add_commands(commands: Commands) -> None:
    _add_generate(commands)
    _add_edit(commands)
    _add_vary(commands)
    _add_scene(commands)
    _add_reproduce(commands)


# -- generate --------------------------------------------------------------------------------------


def _add_generate(commands: Commands) -> None:
    command = commands.add("generate", generate, "generate pictures for a prompt")
    command.add_argument("prompt", help="text that the pictures should show")
    command.add_argument(
        "-n",
        type=positive,
        default=1,
        help="number of pictures, with consecutive seeds (default: %(default)s)",
    )
    command.add_argument(
        "--best-of",
        type=positive,
        default=1,
        metavar="N",
        help="generate N candidates for each picture and keep the one with the highest score by "
        "--clip (default: %(default)s)",
    )
    _add_picture_options(command, "generate.png")


def generate(options: Namespace) -> None:
    cascade, sampling = _load_cascade(options), sample_options(options)
    from ..sampling.recipe import ModelSet, save_picture

    if options.best_of > 1:
        results = _best_of_each(cascade, options, sampling)
    else:
        seeds = range(options.seed, options.seed + options.n)
        images = with_step_bars(
            lambda progress: cascade.generate(
                [options.prompt] * options.n, seeds, sampling, progress
            )
        )
        results = [(seed, image, "") for seed, image in zip(seeds, images, strict=True)]
    model_set = ModelSet.of(cascade)
    for n, (seed, image, remark) in enumerate(results):
        path = options.out if options.n == 1 else _numbered(options.out, n)
        save_picture(image, path, model_set.recipe("generate", options.prompt, seed, sampling))
        print(f"{path}  seed {seed}{remark}")


def _best_of_each(
    cascade: Cascade, options: Namespace, sampling: SampleOptions
) -> list[tuple[int, np.ndarray, str]]:
    """Seed, image and a remark on the scores of the best candidate for each picture."""
    found = []
    for n in range(options.n):
        first = options.seed + n * options.best_of
        best = with_step_bars(
            partial(
                cascade.best_of,
                options.prompt,
                range(first, first + options.best_of),
                sampling,
            )
        )
        mean = sum(best.scores.values()) / options.best_of
        remark = (
            f"  best of {options.best_of}: CLIP score {best.scores[best.seed]:.2f}, mean {mean:.2f}"
        )
        found.append((best.seed, best.image, remark))
    return found


# -- edit ------------------------------------------------------------------------------------------


def _add_edit(commands: Commands) -> None:
    command = commands.add("edit", edit, "repaint the masked part of a picture (inpainting)")
    command.add_argument("prompt", help="text that the edited picture should show")
    command.add_argument(
        "--image", required=True, help="picture to edit; its centred square is used"
    )
    command.add_argument(
        "--mask",
        required=True,
        help="PNG of the same size as the picture, transparent where to paint",
    )
    _add_picture_options(command, "edit.png")


def edit(options: Namespace) -> None:
    cascade, sampling = _load_cascade(options), sample_options(options)
    picture = open_picture(options.image)
    image = crop_square(picture, cascade.size)
    known = read_mask(options.mask, cascade.size, picture)
    from ..sampling.recipe import ModelSet, save_picture

    result = with_step_bars(
        lambda progress: cascade.edit(
            image, known, options.prompt, options.seed, sampling, progress
        )
    )
    recipe = ModelSet.of(cascade).recipe("edit", options.prompt, options.seed, sampling)
    save_picture(result, options.out, recipe, {"image": image, "mask": known})
    print(f"{options.out}  seed {options.seed}")


# -- vary ------------------------------------------------------------------------------------------


def _add_vary(commands: Commands) -> None:
    command = commands.add(
        "vary",
        vary,
        "vary a picture, or render a sketch drawn on it (SDEdit)",
        "example:\n"
        '  glide vary "a red house" --image photo.png --sketch strokes.png --mask hole.png '
        "--strength 0.7",
    )
    command.add_argument("prompt", help="text that the variation should show")
    command.add_argument(
        "--image", required=True, help="picture to start from; its centred square is used"
    )
    command.add_argument(
        "--strength",
        type=float,
        default=0.6,
        help="size of the change, above 0 and at most 1 (default: %(default)s)",
    )
    command.add_argument(
        "--mask",
        help="PNG of the same size as the picture, transparent where it may change; other pixels "
        "stay exactly as they are",
    )
    command.add_argument(
        "--sketch",
        help="PNG of the same size as the picture, with opaque strokes that are drawn over it",
    )
    _add_picture_options(command, "vary.png")


def vary(options: Namespace) -> None:
    cascade, sampling = _load_cascade(options), sample_options(options)
    picture = open_picture(options.image)
    inputs = {"image": crop_square(picture, cascade.size)}
    if options.mask is not None:
        inputs["mask"] = read_mask(options.mask, cascade.size, picture)
    if options.sketch:
        inputs["sketch"] = read_sketch(options.sketch, cascade.size, picture)
    from ..sampling.recipe import ModelSet, save_picture

    result = with_step_bars(
        lambda progress: cascade.vary(
            inputs["image"],
            options.prompt,
            options.seed,
            options.strength,
            inputs.get("mask"),
            inputs.get("sketch"),
            sampling,
            progress,
        )
    )
    model_set = ModelSet.of(cascade)
    recipe = model_set.recipe("vary", options.prompt, options.seed, sampling, options.strength)
    save_picture(result, options.out, recipe, inputs)
    print(f"{options.out}  seed {options.seed}, strength {options.strength:g}")


# -- scene -----------------------------------------------------------------------------------------


def _add_scene(commands: Commands) -> None:
    command = commands.add(
        "scene",
        scene,
        "build up a picture by a sequence of edits",
        "example:\n"
        '  glide scene "a cozy living room" --edit wall.png "a painting of a corgi" '
        '--edit floor.png "a round table"',
    )
    command.add_argument("prompt", nargs="?", help="prompt of the first picture, without --image")
    command.add_argument("--image", help="first picture, without a prompt; centred square is used")
    command.add_argument(
        "--edit",
        nargs=2,
        action="append",
        required=True,
        metavar=("MASK", "PROMPT"),
        help="PNG that is transparent where to paint, and the prompt; may be repeated, in the "
        "order of the edits",
    )
    _add_picture_options(
        command,
        "scene.png",
        "PNGs to write, with the number of the edit before the suffix (default: {})",
    )


def scene(options: Namespace) -> None:
    if (options.prompt is None) == (options.image is None):
        raise UserError("a scene begins with a prompt or with --image; give one of the two.")
    cascade, sampling = _load_cascade(options), sample_options(options)
    edits = [(read_mask(mask, cascade.size), prompt) for mask, prompt in options.edit]
    for _, prompt in edits:
        _warn_of_cut(prompt, cascade)
    seed = options.seed
    if options.image:
        image = crop_square(open_picture(options.image), cascade.size)
    else:
        image = _first_picture(cascade, options, sampling)
        seed += 1
    _apply_edits(cascade, image, edits, seed, sampling, options.out)


def _first_picture(cascade: Cascade, options: Namespace, sampling: SampleOptions) -> np.ndarray:
    """Generate the first picture of a scene, write it as number 0 and return it."""
    from ..sampling.recipe import ModelSet, save_picture

    [image] = with_step_bars(
        lambda progress: cascade.generate([options.prompt], [options.seed], sampling, progress)
    )
    path = _numbered(options.out, 0)
    recipe = ModelSet.of(cascade).recipe("generate", options.prompt, options.seed, sampling)
    save_picture(image, path, recipe)
    print(f"{path}  seed {options.seed}  {options.prompt}")
    return image


def _apply_edits(
    cascade: Cascade,
    image: np.ndarray,
    edits: list[tuple[np.ndarray, str]],
    seed: int,
    sampling: SampleOptions,
    out: Path,
) -> None:
    """Write the picture after each edit, numbered from 1. Edit n uses the seed `seed` + n."""
    from ..sampling.recipe import ModelSet, save_picture

    model_set = ModelSet.of(cascade)

    def run(progress) -> None:
        before = image
        for n, after in enumerate(cascade.scene(image, edits, seed, sampling, progress)):
            known, prompt = edits[n]
            path, recipe = (
                _numbered(out, n + 1),
                model_set.recipe("edit", prompt, seed + n, sampling),
            )
            save_picture(after, path, recipe, {"image": before, "mask": known})
            print(f"{path}  seed {seed + n}  {prompt}")
            before = after

    with_step_bars(run)


# -- reproduce -------------------------------------------------------------------------------------


def _add_reproduce(commands: Commands) -> None:
    command = commands.add(
        "reproduce",
        reproduce,
        "make a picture again from the recipe in its PNG, and compare the two",
    )
    command.add_argument("picture", help="PNG that glide wrote")
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
    command.add_argument("--out", type=local_path, help="PNG to write the new picture to")


def reproduce(options: Namespace) -> None:
    from ..sampling.recipe import (
        find_loras,
        find_models,
        read_recipe,
        reproduce_picture,
        save_picture,
    )

    check_files(options)
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
    result = with_step_bars(lambda progress: reproduce_picture(cascade, recipe, inputs, progress))
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
    return (
        f"differs from {path} by up to {difference.max()} of 255, in "
        f"{(difference > 0).mean():.2%} of its values; it was made with {made_with}"
    )


# -- shared by the commands ------------------------------------------------------------------------


def _add_picture_options(
    parser: Parser, out: str, out_help: str = "PNG to write (default: {})"
) -> None:
    """Add sampling options, --out and the weights. Without --out no picture is overwritten."""
    add_seed(parser)
    add_sampling(parser)
    parser.add_argument(
        "--no-upsampler",
        action="store_true",
        help="write the base model's picture, without upsampling",
    )
    default = f"{out}, with a number if there is one"
    parser.add_argument("--out", type=local_path, help=out_help.format(default))
    parser.set_defaults(default_out=Path(out))
    add_weights(parser)


def _load_cascade(options: Namespace) -> Cascade:
    """The models of the options, checked together with the options. Raises UserError."""
    sample_options(options)  # reject invalid options before loading anything
    options.out = options.out or _unused(options.default_out)
    check_files(options)
    if options.prompt is not None and not options.prompt.strip():
        print_note("the prompt is empty, so it does not guide the picture.")
    if (options.clip_scale or getattr(options, "best_of", 1) > 1) and not options.clip:
        raise UserError(
            "--clip-scale and --best-of need a CLIP model; give one with --clip, trained by "
            "`glide train nano-clip` for example."
        )
    from ..pretrained.shipped import locate, upsampler_for
    from ..sampling.cascade import Cascade

    upsampler = None
    if not options.no_upsampler:
        upsampler = options.upsampler or upsampler_for(options.base)
    cascade = Cascade.load(
        locate(options.base, "base"),
        upsampler,
        options.precision,
        clip=options.clip,
        loras=options.lora,
    )
    _warn_of_cut(options.prompt or "", cascade)
    return cascade


def _warn_of_cut(prompt: str, cascade: Cascade) -> None:
    from ..data.tokenizer import Tokenizer

    context = cascade.base.config.context
    if Tokenizer(context).encode(prompt).cut:
        print_note(f"the prompt is longer than {context} tokens; the model does not read the rest.")


def _unused(path: Path) -> Path:
    """The first of NAME.png, NAME-2.png, NAME-3.png, ... that no command has written."""
    names = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(p for p in chain([path], names) if not (p.exists() or _numbered(p, 0).exists()))


def _numbered(path: Path, n: int) -> Path:
    return path.with_stem(f"{path.stem}-{n}")
