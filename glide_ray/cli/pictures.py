"""Implementation of the commands of `glide` that make pictures.

Each function imports its own libraries, as in `commands.py`.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .commands import note
from .files import check_files


def generate(options) -> None:
    cascade, asked = _cascade(options), sample_options(options)
    from ..sampling.recipe import Maker, save_picture

    seeds = list(range(options.seed, options.seed + options.n))
    if options.best_of > 1:
        ranked = [
            _with_bar(
                lambda progress, first=seed: cascade.best_of(
                    options.prompt, range(first, first + options.best_of), asked, progress
                )
            )
            for seed in range(
                options.seed, options.seed + options.n * options.best_of, options.best_of
            )
        ]
        seeds, images = [best.seed for best in ranked], [best.image for best in ranked]
        notes = [
            f"  best of {options.best_of}: CLIP score {best.scores[best.seed]:.2f}, mean "
            f"{sum(best.scores.values()) / options.best_of:.2f}"
            for best in ranked
        ]
    else:
        images = _with_bar(
            lambda progress: cascade.generate([options.prompt] * options.n, seeds, asked, progress)
        )
        notes = [""] * options.n
    for n, (image, seed, line) in enumerate(zip(images, seeds, notes, strict=True)):
        path = options.out if options.n == 1 else options.out.with_stem(f"{options.out.stem}-{n}")
        save_picture(image, path, Maker.of(cascade).recipe("generate", options.prompt, seed, asked))
        print(f"{path}  seed {seed}{line}")


def edit(options) -> None:
    cascade, asked = _cascade(options), sample_options(options)
    image, known = _image_and_mask(options.image, options.mask, cascade.size)
    from ..sampling.recipe import Maker, save_picture

    made = _with_bar(
        lambda progress: cascade.edit(image, known, options.prompt, options.seed, asked, progress)
    )
    save_picture(
        made,
        options.out,
        Maker.of(cascade).recipe("edit", options.prompt, options.seed, asked),
        {"image": image, "mask": known},
    )
    print(f"{options.out}  seed {options.seed}")


def vary(options) -> None:
    cascade, asked = _cascade(options), sample_options(options)
    from ..data.images import centre_crop, flatten, lay_over
    from ..data.masks import check_sizes
    from ..sampling.recipe import Maker, save_picture

    inputs = dict(
        zip(
            ("image", "mask"),
            _image_and_mask(options.image, options.mask, cascade.size),
            strict=False,
        )
    )
    if options.sketch:
        picture, sketch = _open(options.image), _open(options.sketch)
        check_sizes(picture, sketch, "sketch")
        inputs["sketch"] = centre_crop(lay_over(flatten(picture), sketch), cascade.size)
    made = _with_bar(
        lambda progress: cascade.vary(
            inputs["image"],
            options.prompt,
            options.seed,
            options.strength,
            inputs.get("mask"),
            inputs.get("sketch"),
            asked,
            progress,
        )
    )
    save_picture(
        made,
        options.out,
        Maker.of(cascade).recipe("vary", options.prompt, options.seed, asked, options.strength),
        inputs,
    )
    print(f"{options.out}  seed {options.seed}, strength {options.strength:g}")


def scene(options) -> None:
    if (options.prompt is None) == (options.image is None):
        raise UserError("a scene begins with a prompt or with --image; give one of the two.")
    cascade, asked = _cascade(options), sample_options(options)
    from ..data.images import centre_crop, flatten
    from ..data.masks import centre_crop_mask, mask_of
    from ..sampling.recipe import Maker, save_picture

    def path(n: int) -> Path:
        return options.out.with_stem(f"{options.out.stem}-{n}")

    edits = [
        (
            centre_crop_mask(_named(mask, lambda mask=mask: mask_of(_open(mask))), cascade.size),
            prompt,
        )
        for mask, prompt in options.edit
    ]
    for _, prompt in edits:
        _warn_of_cut(prompt, cascade.base.config.context)
    if options.image:
        image, seed = centre_crop(flatten(_open(options.image)), cascade.size), options.seed
    else:
        image, seed = (
            _with_bar(
                lambda progress: cascade.generate([options.prompt], [options.seed], asked, progress)
            )[0],
            options.seed + 1,
        )
        save_picture(
            image,
            path(0),
            Maker.of(cascade).recipe("generate", options.prompt, options.seed, asked),
        )
        print(f"{path(0)}  seed {options.seed}  {options.prompt}")

    def apply(progress, image=image) -> None:
        for n, made in enumerate(cascade.scene(image, edits, seed, asked, progress)):
            known, prompt = edits[n]
            save_picture(
                made,
                path(n + 1),
                Maker.of(cascade).recipe("edit", prompt, seed + n, asked),
                {"image": image, "mask": known},
            )
            print(f"{path(n + 1)}  seed {seed + n}  {prompt}")
            image = made

    _with_bar(apply)


def reproduce(options) -> None:
    from ..sampling.recipe import find_models, make_again, read_recipe, save_picture

    check_files(options)
    recipe, inputs, before = read_recipe(options.picture)
    models = find_models(
        recipe, {"base": options.base, "upsampler": options.upsampler, "clip": options.clip}
    )
    from ..sampling.cascade import Cascade

    cascade = Cascade.load(
        models["base"], models.get("upsampler"), recipe.precision, clip=models.get("clip")
    )
    made = _with_bar(lambda progress: make_again(cascade, recipe, inputs, progress))
    print(
        f"{recipe.task} {recipe.prompt!r}, seed {recipe.seed}, {recipe.options.sampler} "
        f"{recipe.options.steps}, guidance scale {recipe.options.guidance_scale:g}, "
        f"{recipe.models['base'].name}"
    )
    apart = abs(made.astype(int) - before) if made.shape == before.shape else None
    if apart is not None and not apart.any():
        print(f"the same as {options.picture}, to the last 8-bit value")
    elif apart is not None:
        print(
            f"differs from {options.picture} by up to {apart.max()} of 255, in "
            f"{(apart > 0).mean():.2%} of its values; it was made with {recipe.made_with}"
        )
    else:
        print(
            f"{options.picture} has been resized since: it is {before.shape[1]}x{before.shape[0]} "
            f"and was made at {made.shape[1]}x{made.shape[0]}"
        )
    if options.out:
        save_picture(made, options.out, recipe, inputs)
        print(options.out)


# -- shared by commands ----------------------------------------------------------------------------


def sample_options(options):
    """The sampling options as SampleOptions. Raises RequestError if they are invalid."""
    from ..config.sampling import SampleOptions
    from ..sampling.checks import check_options

    asked = SampleOptions(
        sampler=options.sampler,
        steps=options.steps,
        upsampler_steps=options.upsampler_steps,
        guidance_scale=options.guidance_scale,
        clip_scale=options.clip_scale,
        guidance_interval=options.guidance_interval,
    )
    check_options(asked, options.seed, getattr(options, "strength", None))
    return asked


def _cascade(options):
    sample_options(options)  # reject invalid options before loading anything
    check_files(options)
    if options.prompt is not None and not options.prompt.strip():
        note("the prompt is empty; the picture will be of anything.")
    if (options.clip_scale or getattr(options, "best_of", 1) > 1) and not options.clip:
        raise UserError(
            "--clip-scale and --best-of need a CLIP model; give one with --clip, trained by "
            "`glide train nano-clip` for example."
        )
    from ..pretrained.shipped import locate, upsampler_for
    from ..sampling.cascade import Cascade

    upsampler = None if options.no_upsampler else options.upsampler or upsampler_for(options.base)
    cascade = Cascade.load(
        locate(options.base, "base"), upsampler, options.precision, clip=options.clip
    )
    _warn_of_cut(options.prompt or "", cascade.base.config.context)
    return cascade


def _open(path: str):
    """A picture from a file, rotated upright. Raises an ImageError that names the file."""
    from ..data.images import load, open_image
    from ..storage import read

    return _named(path, lambda: load(open_image(read(path))))


def _named(path: str, work):
    """The result of `work`; its UserErrors, except StorageError, gain the file's name."""
    from ..storage import StorageError

    try:
        return work()
    except StorageError:
        raise
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def _image_and_mask(image: str, mask: str | None, size: int):
    """The centred square of a picture, and of its mask if there is one, at `size` pixels.

    The mask is true where pixels are known. Returns a tuple of one or two arrays.
    """
    from ..data.images import centre_crop, flatten
    from ..data.masks import centre_crop_mask, check_sizes, mask_of

    picture = _open(image)
    pixels = centre_crop(flatten(picture), size)
    if mask is None:
        return (pixels,)
    opened = _open(mask)
    check_sizes(picture, opened)
    return pixels, centre_crop_mask(_named(mask, lambda: mask_of(opened)), size)


def _warn_of_cut(prompt: str, context: int) -> None:
    from ..data.tokenizer import Tokenizer

    if Tokenizer(context).encode(prompt).cut:
        note(f"the prompt is longer than {context} tokens; what comes after them is not read.")


def _with_bar(run):
    """Call `run` with a progress function that shows a bar of denoising steps for each stage."""
    from ..bars import Bar

    bars: dict[str, Bar] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage) or bars.setdefault(
            stage, Bar(total=total, desc=stage, unit="step", dynamic_ncols=True)
        )
        bar.update(done - bar.n)
        if done == total:
            bars.pop(stage).close()

    return run(progress)
