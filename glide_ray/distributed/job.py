"""Helpers of the scripts in `jobs/`.

`run` prints the result as one line of JSON, or one sentence for an error that the user can
correct. `run_once` skips work that an earlier run has finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .. import records
from ..errors import UserError
from ..interrupts import exit_code, sigterm_raises
from ..progress import show_messages


def run(name: str, work: Callable[[], Mapping[str, Any]]) -> int:
    """Print the result of `work` as a line of JSON. Returns the exit code.

    2 for a UserError, 130 after Ctrl-C, 143 after SIGTERM.
    """
    show_messages(to_stderr=True)
    try:
        with sigterm_raises():
            result = work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{name}: interrupted; submit it again to resume.", file=sys.stderr)
        return exit_code(interrupt)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


def run_once(
    record: str, asked: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Like `records.cached_result`; `done_before` in the result: an earlier run did the work.

    A result with `faults`, such as shards that could not be read, is made again.
    """
    result, done_before = records.cached_result(
        record, asked, work, usable=lambda made: not made.get("faults")
    )
    return {**result, "done_before": done_before}
