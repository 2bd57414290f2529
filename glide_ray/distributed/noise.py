"""Messages of Ray that report no fault of a command, kept off its terminal.

Ray's C++ core writes to file descriptor 2, past Python, so a filter process stands between the
two. Ray's messages about the cluster are printed by its Python side on standard output, where they
would mix with a command's results; they go to standard error. Everything that HARMLESS does not
name is passed on.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import ray
from ray._private import worker

HARMLESS = (
    # actor pools of Ray Data; their arguments live as long as the pool
    "has constructor arguments in the object store and max_restarts > 0",
    # Serve's controller, killed by its own shutdown
    "There are infinite retries remaining, so the task will be retried",
    # clusters of a command have no dashboard to export metrics to
    "Failed to establish connection to the metrics exporter agent",
    # told in one sentence by `cluster.connect`
    "Failed to connect to GCS at address",
    "Failed to connect to the observability pubsub at address",
    "Failed to get cluster ID from GCS server",
)
FILTER = f"""
import sys
for line in sys.stdin.buffer:
    if not any(text in line for text in {[text.encode() for text in HARMLESS]!r}):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def keep_off_terminal() -> None:
    """Filter file descriptor 2 and Ray's messages until the process ends. Later calls do nothing.

    Python's own writes to `sys.stderr` do not pass the filter, so bars stay on the terminal.
    """
    if getattr(worker.print_worker_logs, "filtered", False):
        return
    _filter_messages()
    if _is_descriptor_2(sys.stderr):
        _filter_descriptor_2()


def _filter_messages() -> None:
    show = worker.print_worker_logs

    def show_others(data: dict[str, Any], *_: Any, **options: Any) -> None:
        lines = [line for line in data["lines"] if not any(text in line for text in HARMLESS)]
        if lines:
            show({**data, "lines": lines}, sys.stderr, options.get("ignore_prefix", False))

    show_others.__dict__["filtered"] = True
    worker.print_worker_logs = show_others


def _is_descriptor_2(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError, ValueError):
        return False  # closed, or replaced by a test or a notebook


def _filter_descriptor_2() -> None:
    sys.stderr.flush()
    terminal = os.dup(2)
    # A process, not a thread: it still writes what the C++ core says before it aborts this one.
    # A session of its own keeps Ctrl-C from it.
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", FILTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        start_new_session=True,
    )
    assert process.stdin is not None  # by PIPE
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    before, sys.stderr = sys.stderr, os.fdopen(terminal, "w", 1, errors="backslashreplace")

    def restore() -> None:
        ray.shutdown()  # writes through the filter
        sys.stderr.flush()
        os.dup2(terminal, 2)
        sys.stderr = before
        with suppress(subprocess.TimeoutExpired):  # a child of this process still writes to it
            process.wait(2)

    atexit.register(restore)
