"""Results of finished work on disk, so that the same work is not done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from . import storage

Result = dict[str, Any]


def cached_result(
    record: str,
    asked: Any,
    work: Callable[[], Mapping[str, Any]],
    usable: Callable[[Result], bool] = lambda result: True,
) -> tuple[Result, bool]:
    """(result of `work`, False), or (its result in the file `record`, True) if that is current.

    `record`: a JSON file, local or s3://, with the arguments `asked` and the result. The work is
    done again for other arguments, for a broken file, and for an earlier result that is not
    `usable`.
    """
    asked = json.loads(json.dumps(asked))  # types as read from the record, to compare with it
    earlier = _read(record)
    if earlier is not None and earlier["asked"] == asked and usable(earlier["made"]):
        return earlier["made"], True
    if earlier is not None:
        storage.remove(record)  # describes files that `work` may overwrite
    made = dict(work())
    content = json.dumps({"asked": asked, "made": made}, indent=1, ensure_ascii=False)
    storage.put(content.encode(), record)
    return made, False


def read_result(record: str) -> Result | None:
    """The result in a record, or None if there is no record."""
    earlier = _read(record)
    return None if earlier is None else earlier["made"]


def _read(record: str) -> dict[str, Any] | None:
    try:
        earlier = json.loads(storage.read(record))
    except (storage.MissingError, ValueError):  # ValueError: truncated by an interruption
        return None
    complete = (
        isinstance(earlier, dict) and "asked" in earlier and isinstance(earlier.get("made"), dict)
    )
    return earlier if complete else None
