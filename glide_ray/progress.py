"""Messages and progress bars of long operations.

Modules log messages with `logging.getLogger(__name__)`, at level INFO. Nothing is shown until a
program calls `show_messages`, as the command line and the jobs do.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

Progress = Callable[[int, int], None]  # receives the number done, and the total

LINE_SECONDS = 30.0  # least seconds between two lines of progress in a log
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}s in {elapsed}, {rate_fmt}{postfix}"


class Bar(tqdm):
    """A tqdm bar on standard error; takes tqdm's arguments.

    Where standard error is no terminal, as in the log of a submitted job, a bar would be one line
    of thousands of carriage returns. There it writes a line every LINE_SECONDS, and one at the end.
    """

    def __init__(self, *args: Any, file: Any = None, **options: Any) -> None:
        file = file or sys.stderr
        self.in_lines, self._written = not file.isatty(), time.monotonic()
        if self.in_lines:
            options |= {
                "dynamic_ncols": False,
                "miniters": 1,
                "smoothing": 0,  # the rate since the start
                "bar_format": LINE if options.get("total") else LINE_WITHOUT_TOTAL,
            }
        # The stubs accept no starred arguments.
        super().__init__(*args, file=file, **options)  # type: ignore[call-overload]

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_lines:
            super().display(msg, pos)
        elif msg is None and time.monotonic() - self._written >= LINE_SECONDS:
            self._write_line()

    def clear(self, *args: Any, **options: Any) -> None:
        if not self.in_lines:
            super().clear(*args, **options)

    def close(self) -> None:
        if self.in_lines and not self.disable:
            self._write_line()
            self.leave = False  # or tqdm adds an empty line
        super().close()

    def _write_line(self) -> None:
        self._written = time.monotonic()
        self.fp.write(str(self).strip() + "\n")
        self.fp.flush()


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


def bar(description: str, unit: str, total: int | None = None) -> Bar:
    return Bar(total=total, desc=description, unit=unit, dynamic_ncols=True)


@contextmanager
def stage_bars(indent: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of a stage's name, its steps done and their total: a bar for each stage."""
    bars: dict[str, Bar] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = bar(indent + stage, "step", total)
        bars[stage].update(done - bars[stage].n)
        if done == total:
            bars.pop(stage).close()

    try:
        yield progress
    finally:
        for unfinished in bars.values():
            unfinished.close()


def write_line(text: str) -> None:
    """Write a line to standard error, above the bars of a terminal."""
    Bar.write(text, file=sys.stderr)


class _Lines(logging.Handler):
    indent = ""

    def __init__(self, to_stderr: bool):
        super().__init__()
        self._to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        line = f"glide: {record.getMessage()}" if warning else self.indent + record.getMessage()
        Bar.write(line, file=sys.stderr if warning or self._to_stderr else sys.stdout)


def _handlers() -> list[_Lines]:
    return [one for one in logging.getLogger("glide_ray").handlers if isinstance(one, _Lines)]
