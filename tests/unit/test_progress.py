"""Messages of long operations: shown as plain lines, and only by programs that ask for it."""

import contextlib
import io
import logging
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from glide_ray import progress


@pytest.fixture(autouse=True)
def logger():
    logger = logging.getLogger("glide_ray")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers, logger.level = handlers, level


def test_a_library_user_sees_no_messages_and_each_warning_once():
    script = (
        "import logging; log = logging.getLogger('glide_ray.data.emoji'); "
        "log.info('rendering'); log.warning('no upsampler')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and done.stderr == "no upsampler\n"


def test_messages_are_plain_lines_and_warnings_name_the_program(logger, capsys):
    progress.show_messages()
    progress.show_messages()  # a second call does not double the lines
    logger.getChild("data.emoji").info("rendering 1,000 pictures, 50% done")
    logger.getChild("pretrained").warning("no upsampler was given")
    logger.getChild("data").debug("detail")
    assert tuple(capsys.readouterr()) == (
        "rendering 1,000 pictures, 50% done\n",
        "glide: no upsampler was given\n",
    )


def test_messages_can_be_kept_off_standard_output(logger, capsys):
    progress.show_messages(to_stderr=True)
    logger.info("measuring")
    assert tuple(capsys.readouterr()) == ("", "measuring\n")


def test_messages_of_a_stage_are_indented_even_after_an_error(logger, capsys):
    progress.show_messages()
    with pytest.raises(ValueError), progress.indented():
        logger.info("part of it")
        raise ValueError
    logger.info("next")
    assert capsys.readouterr().out == "  part of it\nnext\n"


def test_a_log_gets_lines_at_intervals_and_one_at_the_end(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    log = io.StringIO()
    with progress.Bar(
        total=50, desc="train nano", unit="step", file=log, dynamic_ncols=True
    ) as bar:
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
    with (
        open(theirs, "w") as terminal,
        progress.Bar(total=3, desc="x", file=terminal, mininterval=0) as bar,
    ):
        bar.update(3)
    written = b""
    with contextlib.suppress(OSError):  # at the end of what the closed terminal received
        while chunk := os.read(ours, 10000):
            written += chunk
    os.close(ours)
    assert b"\rx: 100%" in written
