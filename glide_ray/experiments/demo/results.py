"""Results of the demo's stages on disk, so that a stage is not done twice."""

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
    """The folder of the demo; `stages/NAME.json` in it has what a stage has made."""

    folder: Path

    def once(self, stage: str, key: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        """The result of a stage: from disk, or of `make`, which is then written there.

        `key` is all that the result depends on: another one has it made again. So has a missing
        file of `result["files"]`, names relative to the folder. Adds the `seconds` that it took.
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
        """What a stage has made, None where it has not been done."""
        return self._read(stage).get("result")

    def _read(self, stage: str) -> dict[str, Any]:
        try:
            there = json.loads(self._path(stage).read_text())
        except (FileNotFoundError, ValueError):  # not there, or cut off in writing
            return {}
        return there if isinstance(there, dict) and isinstance(there.get("result"), dict) else {}

    def _whole(self, result: Result) -> bool:
        return all((self.folder / name).exists() for name in result.get("files", ()))

    def _path(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.json"
