"""Results of the demo's stages on disk, so that no stage runs twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import records

Result = records.Result


@dataclass(frozen=True)
class Results:
    """The demo's folder; `stages/NAME.json` in it holds the result of a stage."""

    folder: Path

    def cached_result(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], Result]
    ) -> Result:
        """The result of a stage: from disk, or from `make`, in which case it is stored.

        `key` holds everything that the result depends on. The stage runs again if the key changed
        or one of the files in `result["files"]`, relative to the folder, is missing. The result
        gains `seconds`, the time that `make` took.
        """

        def timed() -> Result:
            began = time.monotonic()
            return {**make(), "seconds": round(time.monotonic() - began, 1)}

        return records.cached_result(self._path(stage), key, timed, self._has_files)[0]

    def read(self, stage: str) -> Result | None:
        """The stored result of a stage, or None."""
        return records.read_result(self._path(stage))

    def _has_files(self, result: Result) -> bool:
        return all((self.folder / name).exists() for name in result.get("files", ()))

    def _path(self, stage: str) -> str:
        return str(self.folder / "stages" / f"{stage}.json")
