"""Command that judges composition: compose."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..evaluation.categories import CATEGORIES
from .arguments import (
    CORPUS,
    SAMPLE_SIZES,
    Commands,
    Parser,
    add_guidance_scale,
    add_sampler,
    add_seed,
    add_upsampler_sampling,
    add_weights,
    local_path,
    positive,
    sample_options,
)
from .terminal import progress_bar

if TYPE_CHECKING:
    from ..evaluation.cases import Row
    from ..sampling.cascade import Cascade


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "compose",
        compose,
        "whether generated pictures show the objects, styles, colours, counts and positions of "
        "their prompts",
        "examples:\n  glide compose --prompts 200\n"
        "  glide compose --size 64 --prompts 32 --steps 20 --categories seen colour count\n"
        "  glide compose --real\n"
        "The judge is fitted once to the corpus's real pictures, in some minutes. The same\n"
        "command resumes an interrupted run.",
    )
    _add_prompts(command)
    command.add_argument(
        "--real",
        action="store_true",
        help="judge the real pictures of the prompts; generate nothing",
    )
    add_sampler(command)
    add_upsampler_sampling(command)
    add_guidance_scale(command)
    add_seed(
        command,
        "seed of the first picture of each category; each next one adds 1 (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/compose"),
        help="folder for the pictures, figures.json and report.html (default: %(default)s)",
    )
    add_weights(command)


def _add_prompts(parser: Parser) -> None:
    """Add the options of the prompts and of the size at which their pictures are judged."""
    parser.add_argument(
        "--corpus",
        default=CORPUS,
        help="the corpus that the judge is fitted to and prompts are made from, "
        "with all its styles (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=positive,
        default=200,
        metavar="N",
        help="prompts per category (default: %(default)s)",
    )
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=CATEGORIES,
        default=list(CATEGORIES),
        metavar="NAME",
        help=f"categories of prompts: {', '.join(CATEGORIES)} (default: all)",
    )
    parser.add_argument(
        "--new-style",
        metavar="CORPUS",
        help="a corpus of one more style, such as one used for fine-tuning; adds "
        "prompts in that style",
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=SAMPLE_SIZES,
        default=256,
        help="pixels of the pictures; 64 uses the base model alone (default: %(default)s)",
    )


def compose(options: Namespace) -> None:
    from ..evaluation import compose as composing
    from ..evaluation.fitting import load_or_fit
    from ..evaluation.new_style import learn_style
    from ..evaluation.report import aligned

    cascade = None if options.real else _load_cascade(options)
    judge = load_or_fit(options.corpus)
    rows_of_style: Sequence[Row] = ()
    if options.new_style:
        judge, rows_of_style = learn_style(judge, options.new_style, options.corpus)
    print(aligned(composing.judge_table(judge, options.size)))
    with progress_bar("pictures") as progress:
        run = composing.ComposeRun(
            judge,
            options.corpus,
            options.out,
            options.prompts,
            options.categories,
            options.size,
            options.seed,
            sample_options(options),
            rows_of_style,
        )
        rows = run.score_real() if cascade is None else run.score_models(cascade, progress)
    print(aligned(composing.table(rows)))
    if cascade is not None:
        print(f"{options.out / composing.PAGE}, {composing.FIGURES}, {composing.PICTURES}/")


def _load_cascade(options: Namespace) -> Cascade:
    """The models of the options, for pictures of --size. Raises UserError for another size."""
    from ..evaluation.compose import PROMPTS_PER_CALL
    from ..precision import fastest_precision
    from ..pretrained.shipped import locate, upsampler_for
    from ..sampling.cascade import Cascade

    sample_options(options)  # reject invalid options before loading anything
    upsampler = None
    if options.size != 64:
        upsampler = options.upsampler or upsampler_for(options.base)
    precision = fastest_precision() if options.precision == "auto" else options.precision
    base = locate(options.base, "base")
    cascade = Cascade.load(
        base, upsampler, precision, PROMPTS_PER_CALL, batched=True, loras=options.lora
    )
    if cascade.size != options.size:
        remedy = f"give --size {cascade.size}."
        if cascade.size == 64:
            remedy = "give --size 64, or an upsampler with --upsampler."
        raise UserError(f"These models make pictures of {cascade.size} pixels; {remedy}")
    return cascade
