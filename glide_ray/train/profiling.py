"""`train.profile_steps`: a trace of some steps by PyTorch's profiler."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TABLE_ROWS = 40  # operations in the table, those with the most time of their own


class StepProfiler:
    """Profile the steps FIRST to LAST of "FIRST:LAST", and give `save` the files of the result.

    `save` receives a name and a local file that is deleted afterwards: a trace for Perfetto or
    chrome://tracing, and a table of the slowest operations. `steps`: None for no profile.
    """

    def __init__(self, steps: str | None, save: Callable[[str, Path], None] | None):
        self._save = save
        self._first, self._last = parse(steps) if steps and save else (0, 0)
        self._profile: Any = None

    def before(self, number: int) -> None:
        """Call before step `number`."""
        if number == self._first:
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=kinds)
            self._profile.start()

    def after(self, number: int) -> None:
        """Call after step `number`."""
        if self._profile is None or number < self._last or self._save is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"steps-{self._first}-{self._last}"
        order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        with tempfile.TemporaryDirectory(prefix="glide-profile-") as folder:
            trace, table = (Path(folder) / f"{name}.{end}" for end in ("json.gz", "txt"))
            profile.export_chrome_trace(str(trace))
            table.write_text(profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS))
            for file in (trace, table):
                self._save(file.name, file)


def parse(steps: str) -> tuple[int, int]:
    """(first step, last step) of "FIRST:LAST"."""
    first, _, last = steps.partition(":")
    return int(first), int(last)
