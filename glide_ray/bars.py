"""Progress bars: tqdm's on a terminal, and a line at intervals where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # least seconds between two lines of progress in a log
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}s in {elapsed}, {rate_fmt}{postfix}"


class Bar(tqdm):
    """A tqdm bar on standard error; takes tqdm's arguments.

    Where standard error is no terminal, as in the log of a submitted job, a bar would be one line
    of thousands of carriage returns. There it writes a line every LINE_SECONDS, and one at the end.
    """

    def __init__(self, *args: Any, file: Any = None, **options: Any):
        file = file or sys.stderr
        self.in_lines, self._written = not file.isatty(), time.monotonic()
        if self.in_lines:
            options |= {
                "dynamic_ncols": False,
                "miniters": 1,
                "smoothing": 0,  # the rate since the start
                "bar_format": LINE if options.get("total") else LINE_WITHOUT_TOTAL,
            }
        super().__init__(*args, file=file, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self.in_lines:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self._written >= LINE_SECONDS:
            self._write_line()
        return False

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


def say(text: str) -> None:
    """Write a line to standard error, above the bars of a terminal."""
    Bar.write(text, file=sys.stderr)
