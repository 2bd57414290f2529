"""Progress of commands, on a terminal and in a log."""

import contextlib
import io
import os
import pty
import re
import time

from glide_ray import bars
from glide_ray.bars import Bar


def test_a_log_gets_lines_at_intervals_and_one_at_the_end(monkeypatch):
    monkeypatch.setattr(bars, "LINE_SECONDS", 0.2)
    log = io.StringIO()
    with Bar(total=50, desc="train nano", unit="step", file=log, dynamic_ncols=True) as bar:
        for n in range(50):
            time.sleep(0.02)
            bar.set_postfix({"loss": n}, refresh=False)
            bar.update() or bar.refresh()
    written = log.getvalue().splitlines()
    assert 3 <= len(written) <= 7 and "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert re.fullmatch(
        r"train nano: 50/50 steps in 00:0\d, 00:00 to go, [\d.]+ ?step/s, loss=49", written[-1]
    )


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, Bar(total=3, desc="x", file=terminal, mininterval=0) as bar:
        bar.update(3)
    written = b""
    with contextlib.suppress(OSError):  # at the end of what the closed terminal received
        while chunk := os.read(ours, 10000):
            written += chunk
    os.close(ours)
    assert b"\rx: 100%" in written
