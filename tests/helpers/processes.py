"""Environment and ports of the processes that tests start."""

import os
import socket
import subprocess
import sys
from contextlib import suppress

import psutil

from helpers.paths import ROOT

# Ray runs its workers with niceness 15, so on a busy machine they hardly run at all, and Serve
# kills a proxy that is not ready after 5 s or silent for 10 s.
BUSY_MACHINE = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def python_path():
    """PYTHONPATH of a process that imports `helpers`: tests/ and this process's own."""
    return os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))


def without_ray():
    """This process's environment without settings of Ray other than `BUSY_MACHINE`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | BUSY_MACHINE


def answers(port):
    """Whether a process listens on this port of the loopback address."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def python(*arguments, cwd, **environment):
    """Run Python to its end, with the checkout on its path. `environment`: added variables."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**without_ray(), "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
        check=False,
    )


def replica_processes(deployment):
    """Processes of a deployment's replicas, found by the name that Ray sets."""
    name, found = f"ServeReplica:glide:{deployment}", []
    for process in psutil.Process().children(recursive=True):  # of this Ray and no other
        with suppress(psutil.NoSuchProcess):
            if name in "".join(process.cmdline()[:1]):
                found.append(process)
    return found
