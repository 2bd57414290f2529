"""Single files that a part of a corpus names: their content, or why there is none."""

from __future__ import annotations

import posixpath

from ... import storage
from ...s3 import ChangedError
from ..sample import ShardError

NO_FILE = "without the file that their path names"
BACKSLASH = chr(92)
FAILED = "with a file that the storage could not give"
CHANGED = "with a file that was replaced while the corpus was read"


class Fetcher:
    """Read files one by one. Failures of the storage are counted, not taken for missing files."""

    def __init__(self, folder: str):
        self._folder = folder
        self._failed: list[str] = []

    def __call__(self, path: str, etag: str = "") -> tuple[bytes, str]:
        """(content, "") of a path, absolute or relative to the folder; else (b"", reason).

        A relative path may have backslashes, as Windows writes them. `etag`: that of an object, if
        it must not have changed.
        """
        if not storage.is_remote(path) and not path.startswith("/"):
            path = f"{self._folder}/{posixpath.normpath(path.replace(BACKSLASH, '/'))}"
        try:
            return storage.read(path, etag), ""
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
