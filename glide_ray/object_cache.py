"""The folder for local copies of objects: where it is, and room in it for more.

`storage.fetch` and `storage.fetch_folder` fill it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from .s3 import StorageError

CACHE_GB = 200  # GB (1e9 bytes), default size limit of the cache of objects
IN_USE_SECONDS = 600  # seconds since its last use before a copy may be deleted


def cache_folder() -> Path:
    """Folder for copies of objects: GLIDE_CACHE, or ~/.cache/glide_ray."""
    return Path(os.environ.get("GLIDE_CACHE") or Path.home() / ".cache" / "glide_ray")


def cache_entry(name: str, cache: str | Path | None) -> Path:
    """Cache folder for `name`, marked as used now."""
    folder = Path(cache or cache_folder()) / hashlib.sha256(name.encode()).hexdigest()[:16]
    with suppress(FileNotFoundError):
        os.utime(folder)  # mark as used
    return folder


def make_room(folder: Path, wanted: int) -> None:
    """Delete the least recently used copies until `wanted` more bytes fit into the cache.

    The limit is GLIDE_CACHE_GB. Copies used in the last IN_USE_SECONDS are kept. Raises
    StorageError for an invalid limit.
    """
    given = os.environ.get("GLIDE_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(given) * 1e9
    except ValueError:
        raise StorageError(
            f"GLIDE_CACHE_GB is {given!r}; give a number of gigabytes, such as {CACHE_GB}."
        ) from None
    used, held = {}, {}
    for entry in folder.parent.glob("[0-9a-f]" * 16):
        with suppress(FileNotFoundError):  # deleted by another process
            used[entry], held[entry] = (
                entry.stat().st_mtime,
                sum(file.stat().st_size for file in entry.iterdir() if file.is_file()),
            )
    for entry in sorted(held, key=used.__getitem__):
        if sum(held.values()) + wanted <= limit or time.time() - used[entry] < IN_USE_SECONDS:
            return
        if entry != folder:
            shutil.rmtree(entry, ignore_errors=True)
            del held[entry]
