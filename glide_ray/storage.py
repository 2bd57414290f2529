"""Local paths and `s3://` through one interface: list, read, fetch to a cache, put.

Writes are atomic, and objects are verified by SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from .object_cache import cache_entry, make_room
from .s3 import (
    CHUNK,
    S3,
    MissingError,
    ObjectStream,
    RangeReader,
    StorageError,
    client,
    delete_prefix,
    etag,
    head,
    list_objects,
    put_object,
    put_object_if_absent,
    read_object_range,
    read_verified,
    split_url,
    storage_errors,
)

# also the known ones with a single slash, which would be written to a local folder such as "s3:"
SCHEME = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://|(?:s3[an]?|gs|gcs|hdfs|https?|ftp|file|abfss?|wasbs?|az|hf):/",
    re.I,
)


class UnsupportedError(StorageError):
    """A URL of a storage that is not supported."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is in S3. Raises UnsupportedError for a URL of another kind."""
    if str(path).startswith(S3):
        return True
    if other := SCHEME.match(str(path)):
        raise UnsupportedError(
            f"{path} begins with {other[0]}, which is not supported; give a local path or one that "
            f"begins with {S3}, and copy or mount other storage."
        )
    return False


def absolute(path: str | Path) -> str:
    """The absolute path, valid in processes with another working directory.

    Raises StorageError for a URL that is not of S3, or names no bucket.
    """
    if not is_remote(path):
        return os.path.abspath(path)
    split_url(str(path))
    return str(path)


def same_place(path: str | Path, other: str | Path) -> bool:
    """Whether two paths name the same folder."""
    if is_remote(path) or is_remote(other):
        return str(path).rstrip("/") == str(other).rstrip("/")
    return Path(path).resolve() == Path(other).resolve()


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Files under a folder or prefix whose names end in one of `suffixes`, sorted.

    `suffixes` are in lower case, and capitals in names do not matter. Links to folders are
    followed. A path that is itself a file yields itself. S3 is listed page by page. Raises
    StorageError, also for a folder inside that may not be read.
    """
    yield from (file for file, _ in list_states(path, suffixes))


def list_states(
    path: str | Path, suffixes: tuple[str, ...], found: Callable[[str], None] = lambda file: None
) -> Iterator[tuple[str, str]]:
    """The files of `list_files`, each with a string that changes when its content changes.

    The string is the S3 ETag, or the size and modification time of a local file; it is "" for a
    link that leads nowhere. `found` is called with each file as it is found, and may raise an
    error to end the listing.
    """
    path = str(path)
    if is_remote(path):
        bucket, prefix = split_url(path)
        prefix = (
            prefix
            if prefix.endswith(tuple(filter(None, suffixes)))
            else prefix.rstrip("/") + "/"
            if prefix
            else ""
        )
        with storage_errors(path):
            for item in list_objects(bucket, prefix):
                found(item["Key"])
                if item["Key"].lower().endswith(suffixes):
                    yield f"{S3}{bucket}/{item['Key']}", item["ETag"]
    elif Path(path).is_file():
        yield path, _state(Path(path))
    else:
        yield from (
            (str(file), _state(file))
            for file in sorted(_walk(path, found))
            if file.name.lower().endswith(suffixes)
            and not file.name.startswith(".")
            and (file.is_file() or (file.is_symlink() and not file.exists()))
        )


def _walk(path: str, found: Callable[[str], None]) -> Iterator[Path]:
    """Files under a folder, also behind links to folders, each real folder once."""
    seen: set[tuple[int, int]] = set()

    def is_new(folder: str) -> bool:
        try:
            status = os.stat(folder)
        except OSError:  # deleted since it was listed, or a link to nowhere
            return False
        new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        return new

    def refuse(error: OSError) -> None:  # a folder that is not there has no files to lose
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise StorageError(f"{error.filename} cannot be read: {error.strerror or error}.")

    is_new(path)
    for folder, inside, files in os.walk(path, followlinks=True, onerror=refuse):
        within = [os.path.join(folder, name) for name in inside]
        # of a folder and a link to it beside it, the folder is taken
        within.sort(key=lambda one: (os.path.islink(one), one))
        inside[:] = [os.path.basename(one) for one in within if is_new(one)]
        for name in files:
            found(name)
            yield Path(folder, name)


def state(path: str | Path) -> str:
    """A string that changes when a file or object changes, as in `list_states`; "" without one.

    Raises StorageError.
    """
    if not is_remote(path):
        return _state(Path(path))
    try:
        return etag(path)
    except MissingError:
        return ""


def read(path: str | Path, etag: str = "") -> bytes:
    """All bytes of a file or object.

    Raises MissingError if it does not exist, StorageError if an object's SHA-256 does not match or
    it cannot be read, ChangedError if an object has another ETag than `etag`.
    """
    with storage_errors(path):
        return _read_object(str(path), etag) if is_remote(path) else Path(path).read_bytes()


def open_stream(path: str | Path, etag: str = "") -> IO[bytes]:
    """A file or object to be read from its beginning; only a local one can seek.

    Raises StorageError, also while it is read, and ChangedError if an object has another ETag than
    `etag` or is replaced meanwhile.
    """
    with storage_errors(path):
        if is_remote(path):
            return io.BufferedReader(ObjectStream(str(path), etag), CHUNK)
        return open(path, "rb")


def open_ranges(path: str | Path, etag: str = "") -> IO[bytes]:
    """A file or object in which one can seek. Raises as `open_stream` does."""
    with storage_errors(path):
        if is_remote(path):
            return RangeReader(str(path), etag)  # type: ignore[return-value]
        return open(path, "rb")


def put(
    data: bytes | str | Path | IO[bytes],
    path: str | Path,
    sha256: str | None = None,
    one_request_up_to: int = 2**23,
) -> None:
    """Store bytes, a local file of any size by its path, or an open file, atomically.

    `sha256`: checksum of the local file, if known; saves reading the file once more.
    `one_request_up_to`: bytes of a file that S3 receives whole; a larger one goes in parts, each
    with its own checksum and retries. Raises StorageError.
    """
    data = Path(data) if isinstance(data, str) else data
    with storage_errors(path):
        if is_remote(path):
            sha256 = sha256 or (digest(data) if isinstance(data, Path) else None)
            put_object(data, str(path), sha256, one_request_up_to)
            return
        with atomic_write(path) as partial:
            if isinstance(data, bytes):
                partial.write_bytes(data)
            elif isinstance(data, Path):
                shutil.copyfile(data, partial)
            else:
                with open(partial, "wb") as file:
                    shutil.copyfileobj(data, file)


def put_new(data: bytes, path: str | Path) -> bool:
    """Store bytes unless the file or object exists. Returns whether it holds these bytes now.

    Of several callers with different bytes exactly one gets True. Raises StorageError.
    """
    with storage_errors(path):
        if is_remote(path):
            return put_object_if_absent(str(path), data)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            partial.write_bytes(data)
            os.link(partial, target)  # unlike a rename, fails if the target exists
            return True
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)


def read_range(path: str | Path, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of a file or object. Raises StorageError."""
    if stop <= start:
        return b""
    with storage_errors(path):
        if is_remote(path):
            return read_object_range(str(path), start, stop)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


def remove(path: str | Path) -> None:
    """Delete a file or object, if it exists."""
    with storage_errors(path):
        if is_remote(path):
            bucket, key = split_url(str(path))
            client().delete_object(Bucket=bucket, Key=key)
        else:
            Path(path).unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a local file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:  # hashlib.file_digest needs Python 3.11
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a weights file, or of the weights in a public CLIP's folder.

    Cached until the size or modification time of a file changes.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return _sha256(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=16)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    sha256 = hashlib.sha256()
    for file, _, _ in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(CHUNK):
                sha256.update(chunk)
    return sha256.hexdigest()


def exists(path: str | Path) -> bool:
    """Whether a file or object exists."""
    if not is_remote(path):
        return Path(path).exists()
    try:
        etag(path)
        return True
    except MissingError:
        return False


def size(path: str | Path) -> int:
    """Size of a file or object, in bytes. Raises MissingError."""
    with storage_errors(path):
        if not is_remote(path):
            return Path(path).stat().st_size
        return head(path)["ContentLength"]


def check_writable(folder: str | Path) -> None:
    """Write and delete a small file in a folder or prefix.

    The name is always the same, so that the next call deletes what a killed one has left. Raises
    StorageError if that fails.
    """
    probe = f"{str(folder).rstrip('/')}/.probe"
    try:
        put(b"glide_ray", probe)
        remove(probe)
    except StorageError as error:
        raise StorageError(
            f"Nothing can be written to {folder} ({error}); give another folder, or the rights "
            f"to this one."
        ) from None


@contextmanager
def no_empty_folders(folder: str | Path) -> Iterator[None]:
    """On an error, remove a new local folder and its new parents, unless they contain files."""
    local = [] if is_remote(folder) else [Path(folder), *Path(folder).parents]
    made = [path for path in local if not path.exists()]
    try:
        yield
    except BaseException:
        inside = sorted(made[0].rglob("*"), reverse=True) if made else []
        for path in (*(path for path in inside if path.is_dir()), *made):
            with suppress(OSError):  # not empty
                path.rmdir()
        raise


def remove_folder(path: str | Path) -> None:
    """Delete everything under a folder or prefix, and abort unfinished uploads to it."""
    with storage_errors(path):
        if not is_remote(path):
            shutil.rmtree(path, ignore_errors=True)
            return
        delete_prefix(str(path))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path beside `path`.

    The temporary file replaces `path` on success and is deleted on an error.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with usual_mode(partial):
            yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that is written in this context the permissions of the process's umask.

    safetensors 0.8 creates its files for their owner alone.
    """
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def fetch(path: str | Path, cache: str | Path | None = None) -> Path:
    """A local file with the content of `path`.

    A local path is returned unchanged; an object is copied to `cache`, again whenever it has
    changed. Raises StorageError.
    """
    if not is_remote(path):
        if not Path(path).exists():
            raise StorageError(f"There is no file {path}.")
        return Path(path)
    local = cache_entry(f"{path}@{etag(path)}", cache) / str(path).rpartition("/")[2]
    if not local.exists():
        make_room(local.parent, size(path))
        download(str(path), local)
    return local


def download(path: str, target: Path) -> None:
    """Copy an object of any size to a local file, atomically and verified by SHA-256."""
    with storage_errors(path), atomic_write(target) as partial, open(partial, "wb") as file:
        shutil.copyfileobj(open_stream(path), file, CHUNK)


def fetch_folder(
    path: str | Path, suffixes: tuple[str, ...], cache: str | Path | None = None
) -> Path:
    """A local folder with the files directly under `path` that end in one of `suffixes`.

    A local path is returned unchanged; objects are copied to `cache`, again whenever one of them
    has changed. Raises StorageError.
    """
    if not is_remote(path):
        return Path(path)
    files = {
        file: state
        for file, state in list_states(path, suffixes)
        if file.rpartition("/")[0] == str(path).rstrip("/")
    }
    if not files:
        raise StorageError(f"There is nothing in {path} that ends in {' or '.join(suffixes)}.")
    local = cache_entry(" ".join(f"{file}@{state}" for file, state in files.items()), cache)
    if not local.exists():
        make_room(local, sum(size(file) for file in files))
    for file in files:
        if not (target := local / file.rpartition("/")[2]).exists():
            download(file, target)
    return local


def _state(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:  # deleted since it was listed, or a link that leads nowhere
        return ""
    return f"{found.st_size}@{found.st_mtime_ns}"


def _read_object(path: str, etag: str) -> bytes:
    def whole_body(body) -> tuple[bytes, str]:
        data = body.read()
        return data, hashlib.sha256(data).hexdigest()

    return read_verified(path, whole_body, etag)
