"""Messages and progress of long operations.

Modules log messages with `logging.getLogger(__name__)`, at level INFO. Nothing is shown until a
program calls `show_messages`, as the command line and the jobs do.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]  # receives the number done, and the total


def show_messages(to_stderr: bool = False) -> None:
    """Show the messages of glide_ray as plain lines, above progress bars.

    On standard output, or with `to_stderr` on standard error, for programs whose output is data.
    Warnings always go to standard error. Calling it again replaces the earlier choice.
    """
    logger = logging.getLogger("glide_ray")
    for handler in _handlers():
        logger.removeHandler(handler)
    logger.addHandler(_Lines(to_stderr))
    logger.setLevel(logging.INFO)


@contextmanager
def indented() -> Iterator[None]:
    """Indent the messages that are logged in this context, as parts of a stage."""
    for handler in _handlers():
        handler.indent = "  "
    try:
        yield
    finally:
        for handler in _handlers():
            handler.indent = ""


def bar(description: str, unit: str, total: int | None = None) -> tqdm:
    """A progress bar; hidden where standard error is no terminal."""
    return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, disable=None)


@contextmanager
def stage_bars(indent: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of a stage's name, its steps done and their total: a bar for each stage."""
    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=indent + stage, unit="step", dynamic_ncols=True)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars.pop(stage).close()

    try:
        yield progress
    finally:
        for unfinished in bars.values():
            unfinished.close()


class _Lines(logging.Handler):
    indent = ""

    def __init__(self, to_stderr: bool):
        super().__init__()
        self._to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        line = f"glide: {record.getMessage()}" if warning else self.indent + record.getMessage()
        tqdm.write(line, file=sys.stderr if warning or self._to_stderr else sys.stdout)


def _handlers() -> list[_Lines]:
    return [one for one in logging.getLogger("glide_ray").handlers if isinstance(one, _Lines)]
