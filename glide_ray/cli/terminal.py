"""Output on the terminal: notes on standard error, and progress bars.

tqdm is imported at first use, so that `glide --help` stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

Result = TypeVar("Result")


def note(line: str) -> None:
    """Print a note or an error on standard error, after the program's name."""
    print(f"glide: {line}", file=sys.stderr)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function of the number done and the total that shows a bar from its first call."""
    from tqdm import tqdm

    bars: list[tqdm[Any]] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=label, dynamic_ncols=True))
        bars[0].update(done - bars[0].n)

    yield progress
    for bar in bars:
        bar.close()


def with_step_bars(run: Callable[[Callable[[str, int, int], None]], Result]) -> Result:
    """Call `run` with a progress function that shows the denoising steps of each stage as a bar."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage) or bars.setdefault(
            stage, tqdm(total=total, desc=stage, unit="step", dynamic_ncols=True)
        )
        bar.update(done - bar.n)
        if done == total:
            bars.pop(stage).close()

    return run(progress)
