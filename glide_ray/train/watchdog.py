"""A thread that ends its process where that makes no progress: a collective that hangs has no end of its own, and holds all other ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable


class Watchdog:
    """`say` is told what hung, in a sentence, before the process is killed. Nothing is watched before the first `beat`, nor after `rest` and `close`."""

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None],
        kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ):
        self._seconds, self._say, self._kill = seconds, say, kill
        self._last: tuple[float, str] | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="glide-watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Something has been done, and `doing` comes next."""
        self._last = time.monotonic(), doing

    def rest(self) -> None:
        """Nothing is watched until the next beat."""
        self._last = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if (last := self._last) is None:
                continue
            since, doing = last
            if time.monotonic() - since > self._seconds:
                # In a thread of its own: whatever hangs may hang this as well.
                saying = threading.Thread(
                    target=self._say,
                    args=(f"{doing} has taken more than {self._seconds:g} s",),
                    daemon=True,
                )
                saying.start()
                saying.join(5)
                self._kill()
                return
