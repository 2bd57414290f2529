"""Helpers of the scripts in `jobs/`.

`run` prints the result as one line of JSON, or one sentence for an error that the user can
correct. `once` skips work that an earlier run has finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import storage
from ..errors import UserError


def run(name: str, work: Callable[[], Mapping[str, Any]]) -> int:
    """Print the result of `work` as a line of JSON. Returns the exit code, 2 for a UserError."""
    try:
        made = work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made, ensure_ascii=False), flush=True)
    return 0


def once(
    record: str, asked: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Result of `work`, or of its earlier run if the file `record` has the same arguments `asked`.

    With other arguments the work is done again. `done_before` in the result tells the two cases
    apart.
    """
    asked = json.loads(json.dumps(asked))  # types as read from the record, to compare with it
    try:
        before = json.loads(storage.read(record))
        if before["asked"] == asked:
            return {**before["made"], "done_before": True}
        storage.remove(record)
    except (storage.MissingError, ValueError, KeyError):
        pass
    made = work()
    storage.put(
        json.dumps({"asked": asked, "made": made}, indent=1, ensure_ascii=False).encode(), record
    )
    return {**made, "done_before": False}
