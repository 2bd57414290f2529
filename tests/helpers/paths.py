"""Folders of the checkout, and ports of this machine."""

import os
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"


def python_path():
    """PYTHONPATH of a process that imports `helpers`: tests/ and this process's own."""
    return os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))


def answers(port):
    """Whether a process listens on this port of the loopback address."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
