"""Command that prints a script for the completion of commands and options: completion."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

from ..config import presets
from .arguments import Commands, local_path

SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: Commands, whole: Callable[[], ArgumentParser]) -> None:
    """Add the command. `whole` builds the parser of all commands."""
    command = commands.add(
        "completion",
        lambda options: completion(options, whole()),
        "print a script that completes commands and options in your shell",
        "examples:\n"
        "  glide completion bash > ~/.local/share/bash-completion/completions/glide\n"
        "  glide completion zsh > ~/.zfunc/_glide      (a folder in fpath, before compinit)\n"
        "  glide completion fish > ~/.config/fish/completions/glide.fish",
    )
    command.add_argument("shell", choices=SHELLS, help="shell to complete in")


def completion(options: Namespace, parser: ArgumentParser) -> None:
    import shtab

    for action in _arguments(parser):
        if action.dest == "preset" and not action.option_strings:
            action.choices = list(presets.PRESETS)
        elif action.nargs != 0 and not action.choices and action.type in (None, str, local_path):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.shell))


def _arguments(parser: ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        else:
            yield action
