"""What the scripts of `jobs/` share: one line of JSON at the end, one sentence where the user can mend something, nothing done twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import storage
from ..errors import UserError


def run(name: str, work: Callable[[], Mapping[str, Any]]) -> int:
    """Print what `work` made as a line of JSON; the script's exit code, 2 for what the user can mend."""
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
    """What `work` makes, or has made before: the file `record`, beside it, says of what. Asked for something else, it is done anew."""
    asked = json.loads(json.dumps(asked))  # as it is read back
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
