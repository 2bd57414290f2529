"""Options and checks that the commands for pictures share, and loading their models."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import (
    Parser,
    add_sampling,
    add_seed,
    add_weights,
    check_text,
    local_path,
    positive,
    sample_options,
    seed_or_random,
)
from .picture_files import (
    check_inputs,
    check_out,
    check_recipe_fits,
    numbered,
    unused,
)
from .picture_series import Wanted
from .terminal import print_note

if TYPE_CHECKING:
    import numpy as np

    from ..sampling.cascade import Cascade
    from ..sampling.recipe import Recipe

OUT_HELP = "file to write, as .png, .jpg or .webp (default: {})"


def add_picture_options(parser: Parser, out: str, out_help: str = OUT_HELP) -> None:
    """Add sampling options, --out and the weights."""
    add_picture_seed(parser)
    add_sampling(parser)
    parser.add_argument(
        "--no-upsampler",
        action="store_true",
        help="write the base model's picture, without upsampling",
    )
    add_out(parser, out, out_help)
    add_weights(parser)


def add_picture_seed(parser: Parser) -> None:
    add_seed(
        parser,
        "the same seed gives the same picture; random: a new one, which is printed "
        "(default: %(default)s)",
        seed_or_random,
    )


def add_out(parser: Parser, out: str, out_help: str = OUT_HELP) -> None:
    """Add --out. Without it, no picture is overwritten."""
    default = f"{out}, with a number if there is one"
    parser.add_argument("--out", type=local_path, help=out_help.format(default))
    parser.set_defaults(default_out=Path(out))


def add_number(parser: Parser) -> None:
    parser.add_argument(
        "-n",
        type=positive,
        default=1,
        help="number of pictures, with consecutive seeds (default: %(default)s)",
    )


def add_invert_mask(parser: Parser) -> None:
    parser.add_argument(
        "--invert-mask",
        action="store_true",
        help="paint where the mask is opaque, or black, instead",
    )


def check_pictures(options: Namespace) -> None:
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
    check_out(options.out, written=paths_of(options))
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
    warn_of_cut(options.prompt or "", cascade)
    return cascade


def warn_of_cut(prompt: str, cascade: Cascade) -> None:
    from ..sampling.prompt import is_cut

    context = cascade.base.config.context
    if is_cut(prompt, context):
        print_note(f"the prompt is longer than {context} tokens; the model does not read the rest.")


def paths_of(options: Namespace) -> list[Path]:
    """The files of a command's pictures."""
    if hasattr(options, "edit"):
        first = 1 if options.prompt is None else 0
        return [numbered(options.out, n) for n in range(first, len(options.edit) + 1)]
    return [options.out] if options.n == 1 else [numbered(options.out, n) for n in range(options.n)]


def series_of(
    options: Namespace, recipe: Recipe, inputs: Mapping[str, np.ndarray], remark: str = ""
) -> list[Wanted]:
    """The pictures of -n, of one recipe with consecutive seeds."""
    return [
        Wanted(path, recipe.model_copy(update={"seed": options.seed + n}), inputs, remark)
        for n, path in enumerate(paths_of(options))
    ]
