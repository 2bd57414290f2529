"""Goodput of a training run whose workers are killed at fixed times."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from ..errors import UserError
from ..train.run_folder import EVENTS, METRICS

EVERY_SECONDS = 60.0  # seconds between two kills
START_SECONDS = 300.0  # limit for the first step
SETTINGS = (
    "workers=2",
    "steps=1000000",
    "batch=16",
    "log_every=1",
    "evaluate_every=1000000",
    "checkpoint_every=20",
    "max_failures=-1",
    "trackers=",
)


def bench_faults(corpus: str, held_out: str, seconds: float) -> dict[str, Any]:
    """Train `nano-base` on two workers, and kill one of them every minute for `seconds`.

    `goodput`: seconds in steps that were kept, over the seconds since the first step.
    `kill_to_step_s`: seconds from a kill to the next step, median and largest. `log`: the run's own
    last line, in which its start counts too. Raises UserError.
    """
    with tempfile.TemporaryDirectory(prefix="glide-faults-") as folder:
        out = Path(folder, "run")
        settings = [*SETTINGS, f"data.corpus={corpus}", f"data.held_out={held_out}"]
        flags = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "glide_ray", "train", "nano-base", "--out", str(out)]
        environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
        run = subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL)
        try:
            began = _wait_for_step(run, out, 1)
            recoveries = _kill_workers(run, out, began + seconds)
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait()
        wall = time.monotonic() - began
        lines = (out / EVENTS).read_text().splitlines()
    found = re.search(r"goodput \d+%: ([\d,]+) s in steps", lines[-1])
    kept = float(found[1].replace(",", "")) if found else 0.0
    return {
        "goodput": kept / wall,
        "kills": len(recoveries),
        "kill_to_step_s": [median(recoveries), max(recoveries)] if recoveries else None,
        "seconds": wall,
        "log": lines[-1].partition(": ")[2],
    }


def _kill_workers(run: subprocess.Popen, out: Path, end: float) -> list[float]:
    """Kill a random worker every EVERY_SECONDS until `end`. Returns seconds to each next step."""
    draws, recoveries = np.random.default_rng(0), []
    due = time.monotonic() + EVERY_SECONDS
    while due < end:
        time.sleep(max(0.0, due - time.monotonic()))
        victims = _workers(run)
        victims[draws.integers(len(victims))].kill()
        killed = time.monotonic()
        starts = (out / EVENTS).read_text().count("training resumes")
        while (out / EVENTS).read_text().count("training resumes") == starts:
            _check_alive(run)
            time.sleep(0.05)
        _wait_for_step(run, out, len((out / METRICS).read_text().splitlines()) + 1)
        recoveries.append(time.monotonic() - killed)
        due += EVERY_SECONDS
    time.sleep(max(0.0, end - time.monotonic()))
    return recoveries


def _workers(run: subprocess.Popen) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if "TrainWorker" in " ".join(process.cmdline())
    ]


def _wait_for_step(run: subprocess.Popen, out: Path, lines: int) -> float:
    """Wait until the metrics have that number of lines. Returns the time."""
    began = time.monotonic()
    while not (out / METRICS).exists() or len((out / METRICS).read_text().splitlines()) < lines:
        _check_alive(run)
        if time.monotonic() - began > START_SECONDS:
            raise UserError(f"The run made no step within {START_SECONDS:.0f} s.")
        time.sleep(0.05)
    return time.monotonic()


def _check_alive(run: subprocess.Popen) -> None:
    if run.poll() is not None:
        raise UserError(f"The run has ended with exit code {run.returncode}.")
