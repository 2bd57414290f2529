"""A watchdog thread that kills its process when it makes no progress.

A hanging collective never returns by itself, and blocks all other ranks.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Kills the process if the next `beat` does not come within `seconds`.

    `on_event` receives a clause about the operation that hangs before the process is killed.
    Inactive before the first `beat` and after `rest` or `close`.
    """

    def __init__(
        self,
        seconds: float,
        on_event: Callable[[str], None],
        kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ):
        self._seconds, self._on_event, self._kill = seconds, on_event, kill
        self._last: tuple[float, str] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="glide-watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Report progress; `doing` names the operation that starts now."""
        self._last = time.monotonic(), doing

    def rest(self) -> None:
        """Pause until the next beat."""
        self._last = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if (last := self._last) is None:
                continue
            since, doing = last
            if time.monotonic() - since > self._seconds:
                # In a separate thread, with a timeout: the call may hang for the same reason.
                notice = threading.Thread(
                    target=self._on_event,
                    args=(f"{doing} has taken more than {self._seconds:g} s",),
                    daemon=True,
                )
                notice.start()
                notice.join(5)
                self._kill()
                return
