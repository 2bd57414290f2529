"""What a failed download leaves where weights should be."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 256
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")
LFS = b"version https://git-lfs.github.com/spec/"


def mistaken_for_weights(path: str | Path) -> str | None:
    """A sentence about a web page or a Git LFS pointer at `path`; None for any other file."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return None
    if head.startswith(PAGES):
        return (
            f"{path} is a web page and no weights: its address led to a page or an error; "
            f"download it again."
        )
    if head.startswith(LFS):
        return (
            f"{path} is a pointer of Git LFS and no weights; run `git lfs pull` where it was "
            f"cloned, or download it again."
        )
    return None
