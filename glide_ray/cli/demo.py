"""Command that shows everything once: demo."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands, add_packages, local_path


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "demo",
        demo,
        "generate with the shipped weights, fine-tune them on a new style and edit over HTTP, all "
        "shown on one page",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/demo"),
        help="folder for the results (default: %(default)s)",
    )
    add_packages(command)
    command.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="only copy the pictures of a finished demo to this folder, as small WebP files",
    )


def demo(options: Namespace) -> None:
    if options.images:
        from ..experiments.demo.page import copy_pictures

        for path in copy_pictures(options.out, options.images):
            print(f"{path}: {path.stat().st_size:,} bytes")
        return
    from ..experiments.demo.run import run

    run(options.out, packages=options.packages)
