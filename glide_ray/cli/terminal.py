"""Output on the terminal: notes on standard error, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..progress import Bar, bar, stage_bars

Result = TypeVar("Result")


def print_note(line: str) -> None:
    """Print a note or an error on standard error, after the program's name."""
    print(f"glide: {line}", file=sys.stderr)


@contextmanager
def progress_bar(label: str, unit: str = "picture") -> Iterator[Callable[[int, int], None]]:
    """A function of the number done and the total that shows a bar from its first call."""
    shown: list[Bar] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(bar(label, unit, total))
        shown[0].update(done - shown[0].n)

    yield progress
    for one in shown:
        one.close()


def with_step_bars(run: Callable[[Callable[[str, int, int], None]], Result]) -> Result:
    """Call `run` with a progress function that shows the denoising steps of each stage as a bar."""
    with stage_bars() as progress:
        return run(progress)
