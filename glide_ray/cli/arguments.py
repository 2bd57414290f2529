"""Argument types for argparse."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..storage import is_remote


def local_path(text: str) -> Path:
    """A path on this machine. Raises ArgumentTypeError for a URL.

    pathlib would turn s3://a into a folder named `s3:`.
    """
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; give a local path")
    return Path(text)


def positive(text: str) -> int:
    """A whole number from 1 upwards. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 upwards")
    return int(text)
