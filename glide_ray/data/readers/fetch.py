"""Single files that a part of a corpus names: their content, or why there is none."""

from __future__ import annotations

import posixpath

from ... import storage
from ...s3 import ChangedError
from ..sample import POINTER, ShardError

NO_FILE = "without the file that their path names"
POINTERS = "in pointers of Git LFS (git lfs pull fetches the files)"
BACKSLASH = chr(92)
FAILED = "with a file that the storage could not give"
CHANGED = "with a file that was replaced while the corpus was read"


def resolved(folder: str, path: str) -> str:
    """A path that a table in `folder` names. Raises StorageError for a URL that is not of S3.

    A relative path may have backslashes, as Windows writes them.
    """
    if storage.is_remote(path) or path.startswith("/"):
        return path
    path = posixpath.normpath(path.replace(BACKSLASH, "/"))
    while path.startswith("../") and storage.is_remote(folder):  # S3 has no such folder
        folder, path = folder.rpartition("/")[0], path.removeprefix("../")
    return f"{folder}/{path}"


class Fetcher:
    """Read files one by one. Failures of the storage are counted, not taken for missing files."""

    def __init__(self, folder: str):
        self._folder = folder
        self._failed: list[str] = []

    def __call__(self, path: str, etag: str = "") -> tuple[bytes, str]:
        """(content, "") of a path, absolute or relative to the folder; else (b"", reason).

        `etag`: that of an object, if it must not have changed.
        """
        try:
            content = storage.read(resolved(self._folder, path), etag)
            return (b"", POINTERS) if content.startswith(POINTER) else (content, "")
        except storage.MissingError:
            return b"", NO_FILE
        except storage.StorageError as error:  # boto3 has retried by now
            self._failed.append(str(error))
            return b"", CHANGED if isinstance(error, ChangedError) else FAILED

    def check(self, url: str) -> None:
        """Raise ShardError if the storage failed for a file of the part `url`."""
        if self._failed:
            raise ShardError(
                f"{len(self._failed):,} files of {url} could not be read, such as: "
                f"{self._failed[0]}"
            )
