"""Commands that make pictures: generate, edit, vary, scene, enlarge and reproduce."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import (
    Commands,
    Parser,
    add_sampling,
    add_seed,
    add_upsampler_sampling,
    add_weights,
    check_text,
    local_path,
    positive,
    sample_options,
    seed_or_random,
)
from .picture_files import (
    ANIMATIONS,
    check_hole,
    check_inputs,
    check_out,
    check_recipe_fits,
    crop_square,
    draw_sketch,
    numbered,
    open_picture,
    picture_pixels,
    read_mask,
    save_animation,
    unused,
)
from .picture_series import Wanted, is_there, write, write_missing
from .terminal import print_note, with_step_bars

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..config.sampling import SampleOptions
    from ..sampling.cascade import Cascade
    from ..sampling.recipe import ModelSet, Recipe

MASK_HELP = "mask of the same size as the picture, transparent, or white on black,"
CROP = "crop the picture and its mask to a square around it"


def add_commands(commands: Commands) -> None:
    _add_generate(commands)
    _add_edit(commands)
    _add_vary(commands)
    _add_scene(commands)
    _add_enlarge(commands)
    _add_reproduce(commands)


# -- generate --------------------------------------------------------------------------------------


def _add_generate(commands: Commands) -> None:
    command = commands.add("generate", generate, "generate pictures for a prompt")
    command.add_argument("prompt", help="text that the pictures should show")
    _add_number(command)
    command.add_argument(
        "--best-of",
        type=positive,
        default=1,
        metavar="N",
        help="generate N candidates for each picture and keep the one with the highest score by "
        "--clip (default: %(default)s)",
    )
    command.add_argument(
        "--frames",
        type=local_path,
        metavar="FILE",
        help="also write an animation of the predicted picture after each step, as .gif or .webp",
    )
    _add_picture_options(command, "generate.png")


def generate(options: Namespace) -> None:
    if options.frames and (options.n > 1 or options.best_of > 1):
        raise UserError("--frames shows one picture; leave out -n and --best-of.")
    _check(options)
    if options.frames:
        check_out(options.frames, "--frames", ANIMATIONS)
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..sampling.recipe import ModelSet

    model_set = ModelSet.of(cascade)
    if options.best_of > 1:
        _write_best(cascade, model_set, options, sampling)
        return

    frames: list[np.ndarray] = []

    def make(group: Sequence[Wanted]) -> list[np.ndarray]:
        seeds = [one.recipe.seed for one in group]
        on_frame = (lambda n, pixels: frames.append(pixels)) if options.frames else None
        return with_step_bars(
            lambda progress: cascade.generate(
                [options.prompt] * len(seeds), seeds, sampling, progress, on_frame
            )
        )

    wanted = [
        Wanted(path, model_set.recipe("generate", options.prompt, options.seed + n, sampling))
        for n, path in enumerate(_paths(options))
    ]
    write_missing(wanted, make, cascade.at_once, options.keep and not options.frames)
    if options.frames:
        save_animation(frames, options.frames)
        print(f"{options.frames}  {len(frames)} frames")


def _write_best(
    cascade: Cascade, model_set: ModelSet, options: Namespace, sampling: SampleOptions
) -> None:
    """Write the best candidate for each picture, with a remark on the scores."""
    for n, path in enumerate(_paths(options)):
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
        recipe = model_set.recipe("generate", options.prompt, best.seed, sampling)
        write(Wanted(path, recipe, remark=remark), best.image)


# -- edit ------------------------------------------------------------------------------------------


def _add_edit(commands: Commands) -> None:
    command = commands.add("edit", edit, "repaint the masked part of a picture (inpainting)")
    command.add_argument("prompt", help="text that the edited picture should show")
    command.add_argument(
        "--image", required=True, help="picture to edit; the result has its size and shape"
    )
    command.add_argument("--mask", required=True, help=f"{MASK_HELP} where to paint")
    _add_invert_mask(command)
    command.add_argument(
        "--centred-square",
        action="store_true",
        help="use the picture's centred square at the model's size, and write only that",
    )
    _add_number(command)
    _add_picture_options(command, "edit.png")


def edit(options: Namespace) -> None:
    _check(options)
    picture = open_picture(options.image)
    known = read_mask(options.mask, picture, options.invert_mask)
    if options.centred_square:
        check_hole(options.mask, known, "leave out --centred-square")
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..sampling.recipe import ModelSet
    from ..sampling.regions import Part, part_to_paint, paste

    size, whole = cascade.size, not options.centred_square
    if whole:
        pixels = picture_pixels(picture, known)
        part = part_to_paint(pixels, known, size)
        whole = known.shape != (size, size)
    else:
        part = Part((0, 0, size), *crop_square(picture, size, known))
    inputs = {"image": part.image, "mask": part.known} | ({"whole_mask": known} if whole else {})

    def make(group: Sequence[Wanted]) -> list[np.ndarray]:
        seed = group[0].recipe.seed
        painted = with_step_bars(
            lambda progress: cascade.edit(
                part.image, part.known, options.prompt, seed, sampling, progress
            )
        )
        return [paste(pixels, known, part.square, painted) if whole else painted]

    recipe = ModelSet.of(cascade).recipe("edit", options.prompt, options.seed, sampling)
    recipe = recipe.model_copy(update={"square": part.square if whole else None})
    write_missing(_series(options, recipe, inputs), make, 1, options.keep)


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
        "--mask", help=f"{MASK_HELP} where it may change; other pixels stay exactly as they are"
    )
    _add_invert_mask(command)
    command.add_argument(
        "--sketch",
        help="PNG of the same size as the picture, with opaque strokes that are drawn over it",
    )
    _add_number(command)
    _add_picture_options(command, "vary.png")


def vary(options: Namespace) -> None:
    _check(options)
    picture, known, sketch = open_picture(options.image), None, None
    if options.mask is not None:
        known = read_mask(options.mask, picture, options.invert_mask)
        check_hole(options.mask, known, CROP)
    if options.sketch:
        sketch = draw_sketch(options.sketch, picture)
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..sampling.recipe import ModelSet

    inputs = {}
    inputs["image"], mask = crop_square(picture, cascade.size, known)
    if known is not None:
        inputs["mask"] = mask
    if sketch is not None:
        inputs["sketch"], _ = crop_square(sketch, cascade.size)

    def make(group: Sequence[Wanted]) -> list[np.ndarray]:
        given = (options.prompt, group[0].recipe.seed, options.strength)
        more = (inputs.get("mask"), inputs.get("sketch"), sampling)
        return [
            with_step_bars(lambda progress: cascade.vary(inputs["image"], *given, *more, progress))
        ]

    recipe = ModelSet.of(cascade).recipe(
        "vary", options.prompt, options.seed, sampling, options.strength
    )
    remark = f", strength {options.strength:g}"
    write_missing(_series(options, recipe, inputs, remark), make, 1, options.keep)


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
        help="a mask, transparent or white where to paint, and the prompt; may be repeated, in the "
        "order of the edits",
    )
    _add_invert_mask(command)
    _add_picture_options(
        command,
        "scene.png",
        "files to write, with the number of the edit before the ending (default: {})",
    )


def scene(options: Namespace) -> None:
    if (options.prompt is None) == (options.image is None):
        raise UserError("a scene begins with a prompt or with --image; give one of the two.")
    _check(options)
    picture = open_picture(options.image) if options.image else None
    masks = [read_mask(mask, picture, options.invert_mask) for mask, _ in options.edit]
    for known, (mask, _) in zip(masks, options.edit, strict=True):
        check_hole(mask, known, CROP)
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..data.masks import centre_crop_mask

    prompts = [prompt for _, prompt in options.edit]
    for prompt in prompts:
        _warn_of_cut(prompt, cascade)
    edits = [
        (centre_crop_mask(known, cascade.size), prompt)
        for known, prompt in zip(masks, prompts, strict=True)
    ]
    _write_scene(cascade, picture, edits, options, sampling)


def _write_scene(
    cascade: Cascade,
    picture: Image.Image | None,
    edits: list[tuple[np.ndarray, str]],
    options: Namespace,
    sampling: SampleOptions,
) -> None:
    """Write the picture after each edit, numbered from 1; number 0 is generated without a picture.

    Picture n has the seed of the options + n; with a first picture, the edits begin at that seed.
    """
    from ..sampling.recipe import ModelSet

    model_set, seed = ModelSet.of(cascade), options.seed
    if picture is None:
        recipe = model_set.recipe("generate", options.prompt, seed, sampling)
        first = Wanted(numbered(options.out, 0), recipe, remark=f"  {options.prompt}")
        make = partial(cascade.generate, [options.prompt], [seed], sampling)
        image = _kept(first, options)
        if image is None:
            [image] = with_step_bars(make)
            write(first, image)
        seed += 1
    else:
        image, _ = crop_square(picture, cascade.size)
    for n, (known, prompt) in enumerate(edits):
        one = Wanted(
            numbered(options.out, n + 1),
            model_set.recipe("edit", prompt, seed + n, sampling),
            {"image": image, "mask": known},
            f"  {prompt}",
        )
        after = _kept(one, options)
        if after is None:
            after = with_step_bars(partial(cascade.edit, image, known, prompt, seed + n, sampling))
            write(one, after)
        image = after


def _kept(one: Wanted, options: Namespace) -> np.ndarray | None:
    """The pixels of a scene's picture that is there already, exactly as they were made."""
    if not options.keep or one.path.suffix.lower() != ".png" or not is_there(one):
        return None
    from ..sampling.recipe import read_recipe

    return read_recipe(one.path)[2]


# -- enlarge ---------------------------------------------------------------------------------------


def _add_enlarge(commands: Commands) -> None:
    command = commands.add(
        "enlarge",
        enlarge,
        "enlarge a picture four times with the upsampler alone",
        "The centred square of the picture is used, shrunk to the size that the upsampler reads:\n"
        "64 pixels for the shipped weights, which become 256. Details of a larger picture are\n"
        "painted anew.",
    )
    command.add_argument("image", metavar="FILE", help="picture to enlarge")
    command.add_argument("--prompt", default="", help="text that describes the picture")
    _add_number(command)
    _add_seed(command)
    add_upsampler_sampling(command)
    _add_out(command, "enlarge.png")
    add_weights(command)
    command.set_defaults(no_upsampler=False, clip=None, clip_scale=0.0, negative_prompt="")


def enlarge(options: Namespace) -> None:
    _check(options)
    picture = open_picture(options.image)
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..sampling.recipe import ModelSet

    low_res, _ = crop_square(picture, cascade.low_res_size)

    def make(group: Sequence[Wanted]) -> list[np.ndarray]:
        seed = group[0].recipe.seed
        return [
            with_step_bars(
                lambda progress: cascade.enlarge(low_res, options.prompt, seed, sampling, progress)
            )
        ]

    recipe = ModelSet.of(cascade).recipe("enlarge", options.prompt, options.seed, sampling)
    write_missing(_series(options, recipe, {"image": low_res}), make, 1, options.keep)


# -- reproduce -------------------------------------------------------------------------------------


def _add_reproduce(commands: Commands) -> None:
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
    from ..sampling.recipe import (
        find_loras,
        find_models,
        read_recipe,
        reproduce_picture,
        save_picture,
    )

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


# -- shared by the commands ------------------------------------------------------------------------


OUT_HELP = "file to write, as .png, .jpg or .webp (default: {})"


def _add_picture_options(parser: Parser, out: str, out_help: str = OUT_HELP) -> None:
    """Add sampling options, --out and the weights."""
    _add_seed(parser)
    add_sampling(parser)
    parser.add_argument(
        "--no-upsampler",
        action="store_true",
        help="write the base model's picture, without upsampling",
    )
    _add_out(parser, out, out_help)
    add_weights(parser)


def _add_seed(parser: Parser) -> None:
    add_seed(
        parser,
        "the same seed gives the same picture; random: a new one, which is printed "
        "(default: %(default)s)",
        seed_or_random,
    )


def _add_out(parser: Parser, out: str, out_help: str = OUT_HELP) -> None:
    """Add --out. Without it, no picture is overwritten."""
    default = f"{out}, with a number if there is one"
    parser.add_argument("--out", type=local_path, help=out_help.format(default))
    parser.set_defaults(default_out=Path(out))


def _add_number(parser: Parser) -> None:
    parser.add_argument(
        "-n",
        type=positive,
        default=1,
        help="number of pictures, with consecutive seeds (default: %(default)s)",
    )


def _add_invert_mask(parser: Parser) -> None:
    parser.add_argument(
        "--invert-mask",
        action="store_true",
        help="paint where the mask is opaque, or black, instead",
    )


def _check(options: Namespace) -> None:
    """Check all that needs no model, and choose the name of the output. Raises UserError."""
    texts = [options.prompt, *(prompt for _, prompt in getattr(options, "edit", None) or ())]
    from ..sampling.prompt import check_prompt

    for text in filter(None, texts):
        check_text(text, "The prompt")
        check_prompt(text)
    options.keep = options.out is not None  # files of an interrupted run with this name
    options.out = options.out or unused(options.default_out)
    missing = "all pictures" if getattr(options, "best_of", 1) > 1 else "the missing pictures"
    options.after_interrupt = (
        f"run the same command with --seed {options.seed} --out {shlex.quote(str(options.out))} "
        f"to make {missing}"
    )
    check_inputs(options)
    check_out(options.out, written=_paths(options))
    check_recipe_fits(options.out, [*filter(None, texts), getattr(options, "negative_prompt", "")])
    sample_options(options)
    if (options.clip_scale or getattr(options, "best_of", 1) > 1) and not options.clip:
        raise UserError(
            "--clip-scale and --best-of need a CLIP model; give one with --clip, trained by "
            "`glide train nano-clip` for example."
        )


def load_cascade(options: Namespace) -> Cascade:
    """The models of the options. Raises UserError."""
    if options.prompt is not None and not options.prompt.strip():
        print_note("the prompt is empty, so it does not guide the picture.")
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
    from ..sampling.prompt import is_cut

    context = cascade.base.config.context
    if is_cut(prompt, context):
        print_note(f"the prompt is longer than {context} tokens; the model does not read the rest.")


def _paths(options: Namespace) -> list[Path]:
    """The files of a command's pictures."""
    if hasattr(options, "edit"):
        first = 1 if options.prompt is None else 0
        return [numbered(options.out, n) for n in range(first, len(options.edit) + 1)]
    return [options.out] if options.n == 1 else [numbered(options.out, n) for n in range(options.n)]


def _series(
    options: Namespace, recipe: Recipe, inputs: Mapping[str, np.ndarray], remark: str = ""
) -> list[Wanted]:
    """The pictures of -n, of one recipe with consecutive seeds."""
    return [
        Wanted(path, recipe.model_copy(update={"seed": options.seed + n}), inputs, remark)
        for n, path in enumerate(_paths(options))
    ]
