"""Commands that make pictures: generate, edit, vary, scene and enlarge."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import (
    Commands,
    add_upsampler_sampling,
    add_weights,
    local_path,
    positive,
    sample_options,
)
from .picture_files import (
    ANIMATIONS,
    check_hole,
    check_out,
    crop_square,
    draw_sketch,
    numbered,
    open_picture,
    picture_pixels,
    read_mask,
    save_animation,
)
from .picture_options import (
    add_invert_mask,
    add_number,
    add_out,
    add_picture_options,
    add_picture_seed,
    check_pictures,
    load_cascade,
    paths_of,
    series_of,
    warn_of_cut,
)
from .picture_series import Wanted, is_there, write, write_missing
from .terminal import with_step_bars

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..config.sampling import SampleOptions
    from ..sampling.cascade import Cascade
    from ..sampling.recipe import ModelSet

MASK_HELP = "mask of the same size as the picture, transparent, or white on black,"
CROP = "crop the picture and its mask to a square around it"


def add_commands(commands: Commands) -> None:
    _add_generate(commands)
    _add_edit(commands)
    _add_vary(commands)
    _add_scene(commands)
    _add_enlarge(commands)


# -- generate --------------------------------------------------------------------------------------


def _add_generate(commands: Commands) -> None:
    command = commands.add("generate", generate, "generate pictures for a prompt")
    command.add_argument("prompt", help="text that the pictures should show")
    add_number(command)
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
    add_picture_options(command, "generate.png")


def generate(options: Namespace) -> None:
    if options.frames and (options.n > 1 or options.best_of > 1):
        raise UserError("--frames shows one picture; leave out -n and --best-of.")
    check_pictures(options)
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
        for n, path in enumerate(paths_of(options))
    ]
    write_missing(wanted, make, cascade.at_once, options.keep and not options.frames)
    if options.frames:
        save_animation(frames, options.frames)
        print(f"{options.frames}  {len(frames)} frames")


def _write_best(
    cascade: Cascade, model_set: ModelSet, options: Namespace, sampling: SampleOptions
) -> None:
    """Write the best candidate for each picture, with a remark on the scores."""
    for n, path in enumerate(paths_of(options)):
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
    add_invert_mask(command)
    command.add_argument(
        "--centred-square",
        action="store_true",
        help="use the picture's centred square at the model's size, and write only that",
    )
    add_number(command)
    add_picture_options(command, "edit.png")


def edit(options: Namespace) -> None:
    check_pictures(options)
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
    write_missing(series_of(options, recipe, inputs), make, 1, options.keep)


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
    add_invert_mask(command)
    command.add_argument(
        "--sketch",
        help="PNG of the same size as the picture, with opaque strokes that are drawn over it",
    )
    add_number(command)
    add_picture_options(command, "vary.png")


def vary(options: Namespace) -> None:
    check_pictures(options)
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
    write_missing(series_of(options, recipe, inputs, remark), make, 1, options.keep)


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
    add_invert_mask(command)
    add_picture_options(
        command,
        "scene.png",
        "files to write, with the number of the edit before the ending (default: {})",
    )


def scene(options: Namespace) -> None:
    if (options.prompt is None) == (options.image is None):
        raise UserError("a scene begins with a prompt or with --image; give one of the two.")
    check_pictures(options)
    picture = open_picture(options.image) if options.image else None
    masks = [read_mask(mask, picture, options.invert_mask) for mask, _ in options.edit]
    for known, (mask, _) in zip(masks, options.edit, strict=True):
        check_hole(mask, known, CROP)
    cascade, sampling = load_cascade(options), sample_options(options)
    from ..data.masks import centre_crop_mask

    prompts = [prompt for _, prompt in options.edit]
    for prompt in prompts:
        warn_of_cut(prompt, cascade)
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
    add_number(command)
    add_picture_seed(command)
    add_upsampler_sampling(command)
    add_out(command, "enlarge.png")
    add_weights(command)
    command.set_defaults(no_upsampler=False, clip=None, clip_scale=0.0, negative_prompt="")


def enlarge(options: Namespace) -> None:
    check_pictures(options)
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
    write_missing(series_of(options, recipe, {"image": low_res}), make, 1, options.keep)
