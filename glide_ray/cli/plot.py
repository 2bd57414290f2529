"""Command that compares settings on one sheet of pictures: plot."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import (
    Commands,
    add_sampling,
    add_seed,
    add_weights,
    check_text,
    local_path,
    sample_options,
)
from .picture_files import check_out
from .terminal import with_step_bars


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "plot",
        plot,
        "generate a labelled sheet of pictures over two settings",
        "examples:\n"
        '  glide plot "a red apple, Noto" --x guidance-scale=1,2.5,5 --y steps=4,8,15\n'
        '  glide plot "a dog" --x sampler=ddim,dpm++,unipc --y seed=0,1,2\n'
        '  glide plot "" --x "prompt=a red apple|a green apple" --y "steps=8|10,10,3,2,2"\n'
        "Settings are the options of this command with values, prompt and seed. Rerunning makes "
        "only the pictures that are missing.",
    )
    command.add_argument("prompt", help="text that the pictures should show")
    for axis, place in (("--x", "columns"), ("--y", "rows")):
        command.add_argument(
            axis,
            required=True,
            metavar="NAME=VALUES",
            help=f"setting of the {place} and its values, separated by commas, or by | if they "
            "have commas",
        )
    add_seed(command)
    add_sampling(command)
    command.add_argument(
        "--no-upsampler",
        action="store_true",
        help="plot the base model's pictures, without upsampling",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("plot.png"),
        help="sheet to write; its pictures go into a folder of that name (default: %(default)s)",
    )
    add_weights(command)


def plot(options: Namespace) -> None:
    import numpy as np

    from ..data.images import encode
    from ..evaluation.plot import Axis, make_cells, make_plot
    from ..evaluation.report import grid
    from ..storage import put
    from .picture_options import load_cascade

    check_text(options.prompt, "The prompt")
    check_out(options.out, endings=(".png",))
    columns, rows = Axis.read(options.x), Axis.read(options.y)
    cells = make_cells(options.prompt, options.seed, sample_options(options), columns, rows)
    cascade, folder = load_cascade(options), options.out.with_suffix("")
    pictures = with_step_bars(lambda progress: make_plot(cascade, cells, folder, progress))
    sheet = grid(pictures, columns.labels, rows.labels, max(128, cascade.size))
    put(encode(np.asarray(sheet)), options.out)
    print(f"{options.out}: {len(rows.values)} x {len(columns.values)} pictures, from {folder}/")
