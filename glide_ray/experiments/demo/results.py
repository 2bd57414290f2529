"""Results of the demo's stages on disk, so that no stage runs twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import storage

Result = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The demo's folder; `stages/NAME.json` in it holds the result of a stage."""

    folder: Path

    def once(self, stage: str, key: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        """The result of a stage: from disk, or from `make`, in which case it is stored.

        `key` holds everything that the result depends on. The stage runs again if the key changed
        or one of the files in `result["files"]`, relative to the folder, is missing. The result
        gains `seconds`, the time that `make` took.
        """
        key = json.loads(json.dumps(key))
        there = self._read(stage)
        if there.get("key") == key and self._whole(there["result"]):
            return there["result"]
        began = time.monotonic()
        result = make()
        result = {**result, "seconds": round(time.monotonic() - began, 1)}
        text = json.dumps({"key": key, "result": result}, indent=1, ensure_ascii=False)
        storage.put(text.encode(), self._path(stage))
        return result

    def read(self, stage: str) -> Result | None:
        """The stored result of a stage, or None."""
        return self._read(stage).get("result")

    def _read(self, stage: str) -> dict[str, Any]:
        try:
            there = json.loads(self._path(stage).read_text())
        except (FileNotFoundError, ValueError):  # missing, or truncated by an interruption
            return {}
        return there if isinstance(there, dict) and isinstance(there.get("result"), dict) else {}

    def _whole(self, result: Result) -> bool:
        return all((self.folder / name).exists() for name in result.get("files", ()))

    def _path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"
