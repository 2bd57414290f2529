"""The command line `glide`: the parser of all commands and its errors.

The other modules of this folder hold the commands, by subject: `add_commands` adds their options,
and one function for each command runs it. These functions import their own libraries, so that
`glide --help` imports neither torch nor Ray and a command imports no more than it needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import UserError, install_command
from ..interrupts import exit_code, sigterm_raises
from ..progress import show_messages
from . import (
    bench,
    completion,
    compose,
    corpus,
    curation,
    demo,
    doctor,
    evaluation,
    pictures,
    planning,
    plot,
    reproduction,
    serving,
    study,
    training,
    weights,
)
from .arguments import Commands
from .terminal import print_note

DESCRIPTION = """\
Train and serve GLIDE (Nichol et al. 2021), text-to-image diffusion for generation and editing.

  glide demo                               generate, fine-tune and edit on this machine, in minutes
  glide corpus --out runs/corpus           the emoji corpus as tar shards
  glide train emoji-base --set steps=5000  a preset, with settings of your own
  glide generate "a red apple, 3D render"  pictures from trained weights
  glide reproduce generate.png             the same picture again, from the recipe in its PNG
  glide serve                              the OpenAI Images API on http://127.0.0.1:8000
  glide evaluate runs/pictures             FID, precision, recall, CLIP score, against real pictures
"""


RESUME = "run the same command again to resume"  # after an interrupt, of most commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code.

    0 on success, 130 after Ctrl-C, 143 after SIGTERM, and 2 for an error that the user can fix,
    with one sentence about it on standard error.
    """
    options = build_parser().parse_args(arguments)
    show_messages(to_stderr=options.command is bench.bench)
    try:
        with sigterm_raises():
            options.command(options)
    except UserError as error:
        print_note(str(error))
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if command := install_command(package):
            print_note(f"this command needs {package}; run {command}.")
            return 2
        raise  # no extra has the package: a bug
    except KeyboardInterrupt as interrupt:
        print(file=sys.stderr)
        print_note(f"interrupted; {getattr(options, 'after_interrupt', RESUME)}.")
        return exit_code(interrupt)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "glide",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = Commands(parser)
    for subject in (
        demo,
        corpus,
        curation,
        training,
        weights,
        pictures,
        reproduction,
        plot,
        serving,
        evaluation,
        compose,
        study,
        planning,
        doctor,
        bench,
    ):
        subject.add_commands(commands)
    completion.add_commands(commands, build_parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
