"""Objects in S3: client, listing, verified reads, streams, and errors of storage.

`storage.py` is the interface for local paths and S3. S3 goes through boto3 with its usual chain
for credentials, region and endpoint (AWS_ENDPOINT_URL), and its own retries.
"""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import UserError

S3 = "s3://"
CHECKSUM = "sha256"  # object metadata that `put` writes and `read` verifies
CHUNK = 2**22  # bytes per read
READ = 2**18  # bytes of a stream that are read together, and read again if the connection breaks
TAIL = 2**16  # bytes at the end of an object that `RangeReader` reads first, for a Parquet footer
RETRY_WAITS = (0.1, 0.2, 0.4, 0.8)  # seconds before each retry of an incomplete or damaged object


Result = TypeVar("Result")


class StorageError(UserError):
    """A path that cannot be read or written."""


class MissingError(StorageError):
    """A path where no file or object exists."""


class ChangedError(StorageError):
    """An object that was replaced while it was read, or since it was listed or judged."""

    def __init__(self, path: str):
        super().__init__(f"{path} has changed since it was read first; run the command again.")


class DamagedError(StorageError):
    """An object whose content is not the one that was stored."""


class DeniedError(StorageError):
    """An action that the storage does not allow this user."""


def list_objects(bucket: str, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
    lister = client().get_paginator("list_objects_v2")
    for page in lister.paginate(Bucket=bucket, Prefix=prefix, **options):
        yield from page.get("Contents", ())


def read_verified(path: str, use: Callable[[Any], tuple[Result, str]], etag: str = "") -> Result:
    """Apply `use` to an object's body and verify its SHA-256, with retries.

    `use` returns a result and the SHA-256 of all bytes that it read. The object is requested again
    if the body breaks off or its checksum does not match: boto3's own retries end once the response
    headers have arrived. Raises StorageError, and ChangedError for another ETag than `etag`.
    """
    for wait in (*RETRY_WAITS, None):
        answer = _get(path, etag)
        try:
            result, sha256 = use(answer["Body"])
            expected = answer["Metadata"].get(CHECKSUM)
            if not expected or sha256 == expected:
                return result
            fault: StorageError = damaged(path)
        except _broken() as error:
            fault = StorageError(f"{path} cannot be used: {error}.")
        if wait is not None:
            # Jitter, so that readers do not all retry at once.
            time.sleep(wait * random.uniform(0.5, 1))
    raise fault


def damaged(path: str) -> DamagedError:
    return DamagedError(
        f"{path} is damaged: its SHA-256 is not the one it was stored with; put it there again."
    )


def read_object_range(path: str, start: int, stop: int, etag: str = "") -> bytes:
    """The bytes from `start` to `stop` of an object, requested again if the body breaks off.

    Raises ChangedError if the object has another ETag than `etag`.
    """
    wanted = f"bytes={start}-{stop - 1}"
    data, _ = _whole_answer(path, wanted, lambda _: stop - start, etag)
    return data


def _whole_answer(
    path: str, wanted: str, length: Callable[[Mapping[str, Any]], int], etag: str
) -> tuple[bytes, Mapping[str, Any]]:
    """Body and headers of the answer to a range; `length` tells the bytes that it must have."""
    for wait in (*RETRY_WAITS, None):
        answer = _get(path, etag, Range=wanted)
        try:
            data = answer["Body"].read()
            if len(data) == length(answer):
                return data, answer
            fault = f"{path} is shorter than the range {wanted}."
        except _broken() as error:
            fault = f"{path} cannot be used: {error}."
        if wait is not None:
            time.sleep(wait * random.uniform(0.5, 1))
    raise StorageError(fault)


def _get(path: str, etag: str = "", **options: str) -> Mapping[str, Any]:
    """Answer to a GET. Raises ChangedError for another ETag than `etag`, unless that is empty."""
    bucket, key = split_url(path)
    answer = client().get_object(Bucket=bucket, Key=key, **options)
    if etag and answer["ETag"].strip('"') != etag:
        answer["Body"].close()
        raise ChangedError(path)
    return answer


def _broken() -> tuple[type[Exception], ...]:
    """Errors of a body that breaks off."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    return (BotoCoreError, HTTPError, ConnectionError, TimeoutError)


class ObjectStream(io.RawIOBase):
    """The bytes of an object from its beginning, in one request.

    A body that breaks off is requested again from there, unless it breaks off several times without
    a byte. Raises StorageError, also at the end of an object with a wrong SHA-256, and ChangedError
    for one that is replaced meanwhile, or has another ETag than `etag`.
    """

    def __init__(self, path: str, etag: str = ""):
        self._path, self._etag = path, etag
        self._body: Any = None
        self._offset, self._size = 0, 0
        self._sha256, self._expected = hashlib.sha256(), ""
        with storage_errors(path):
            self._request()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._path):
            data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._offset += len(data)
        self._sha256.update(data)
        if self._offset == self._size and self._expected not in ("", self._sha256.hexdigest()):
            raise damaged(self._path)
        return len(data)

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
        super().close()

    def _read(self, count: int) -> bytes:
        for wait in (*RETRY_WAITS, None):
            try:
                if self._body is None:
                    self._request()
                data = self._body.read(min(count, READ, self._size - self._offset))
                if data or self._offset == self._size:
                    return data
                fault: Any = "the connection was closed"
            except _broken() as error:
                fault = error
            self._body = None
            if wait is not None:
                time.sleep(wait * random.uniform(0.5, 1))
        raise StorageError(
            f"{self._path} cannot be used: after {self._offset:,} of {self._size:,} bytes, {fault}."
        )

    def _request(self) -> None:
        if not self._offset:
            answer = _get(self._path, self._etag)
            self._size, self._etag = answer["ContentLength"], answer["ETag"].strip('"')
            self._expected = answer["Metadata"].get(CHECKSUM, "")
        else:
            answer = _get(self._path, self._etag, Range=f"bytes={self._offset}-")
        self._body = answer["Body"]


class RangeReader(io.RawIOBase):
    """An object as a file in which one can seek; each read is a request, except near the end.

    Raises StorageError, and ChangedError for an object that is replaced meanwhile, or has another
    ETag than `etag`.
    """

    def __init__(self, path: str, etag: str = ""):
        self._path, self._position = path, 0
        with storage_errors(path):
            self._tail, self._size, self._etag = self._read_tail(etag)

    def _read_tail(self, etag: str) -> tuple[bytes, int, str]:
        """The last bytes of the object, its size and its ETag."""
        from botocore.exceptions import ClientError

        def length(answer: Mapping[str, Any]) -> int:
            return min(TAIL, _size_of(answer))

        try:
            data, answer = _whole_answer(self._path, f"bytes=-{TAIL}", length, etag)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("InvalidRange", "416"):
                raise
            return b"", 0, etag  # an object without a byte
        return data, _size_of(answer), answer["ETag"].strip('"')

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = min(self._position, self._size)
        stop = min(start + len(buffer), self._size)
        before = self._size - len(self._tail)  # bytes before the tail
        if start >= before:
            data = self._tail[start - before : stop - before]
        else:
            with storage_errors(self._path):
                data = read_object_range(self._path, start, stop, self._etag)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)


def _size_of(answer: Mapping[str, Any]) -> int:
    """Bytes of the object of an answer, which has a part of it or all of it."""
    _, _, size = answer.get("ContentRange", "").rpartition("/")
    return int(size) if size else answer["ContentLength"]


def put_object(
    data: bytes | Path | IO[bytes], path: str, sha256: str | None, one_request_up_to: int
) -> None:
    """Store bytes, or a file with its SHA-256; a larger file goes in parts."""
    bucket, key = split_url(path)
    if isinstance(data, bytes):
        meta = {CHECKSUM: hashlib.sha256(data).hexdigest()}
        client().put_object(Bucket=bucket, Key=key, Body=data, Metadata=meta)
        return
    from boto3.s3.transfer import TransferConfig

    options = {
        "ExtraArgs": {"Metadata": {CHECKSUM: sha256} if sha256 else {}},
        "Config": TransferConfig(multipart_threshold=one_request_up_to + 1),
    }
    if isinstance(data, Path):
        client().upload_file(str(data), bucket, key, **options)
    else:
        client().upload_fileobj(data, bucket, key, **options)


def put_object_if_absent(path: str, data: bytes) -> bool:
    """Store an object unless one exists. Returns whether it holds `data` now."""
    from botocore.exceptions import ClientError

    bucket, key = split_url(path)
    try:
        client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        return True
    except ClientError as error:
        if error.response["Error"]["Code"] not in (
            "PreconditionFailed",
            "ConditionalRequestConflict",
            "412",
            "409",
        ):
            raise
    # A request whose answer was lost is sent again, and then refused because of itself.
    return client().get_object(Bucket=bucket, Key=key)["Body"].read() == data


def delete_objects(bucket: str, keys: Sequence[str]) -> None:
    """Delete objects, 1,000 with each request. Raises ClientError for the first that is refused."""
    from botocore.exceptions import ClientError

    for start in range(0, len(keys), 1000):
        objects = [{"Key": key} for key in keys[start : start + 1000]]
        done = client().delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        for error in done.get("Errors", ()):  # the request as a whole succeeds even so
            raise ClientError({"Error": error}, "DeleteObjects")


def delete_prefix(path: str) -> None:
    """Delete all objects under a prefix, and abort unfinished uploads to it."""
    bucket, prefix = split_url(path.rstrip("/") + "/")
    for upload in client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ()):
        client().abort_multipart_upload(
            Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
    delete_objects(bucket, [item["Key"] for item in list_objects(bucket, prefix)])


def etag(path: str | Path) -> str:
    """ETag of an object; it changes when the object changes."""
    with storage_errors(path):
        return head(path)["ETag"].strip('"')


def head(path: str | Path) -> Mapping[str, Any]:
    bucket, key = split_url(str(path))
    return client().head_object(Bucket=bucket, Key=key)


def split_url(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix(S3).partition("/")
    if not bucket:
        raise StorageError(f"{path} names no bucket; write s3://bucket/path.")
    return bucket, key


@lru_cache(maxsize=1)
def client():
    try:
        import boto3  # optional dependency, for s3:// only
        from botocore.config import Config
    except ImportError:
        raise StorageError(
            "s3:// paths need boto3; run `pip install 'glide_ray[cluster]'`."
        ) from None
    return boto3.client("s3", config=Config(retries={"mode": "adaptive", "max_attempts": 6}))


class storage_errors:
    """Convert the errors of the system and of boto3 about `path` to StorageError."""

    def __init__(self, path: str | Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise MissingError(f"There is no file {self.path}.") from None
        if isinstance(error, OSError):
            raise StorageError(f"{self.path} cannot be used: {error.strerror or error}.") from None
        if kind is not None and kind.__module__.startswith(("botocore", "boto3", "s3transfer")):
            code = getattr(error, "response", {}).get("Error", {}).get("Code")
            if code in ("NoSuchKey", "404"):
                raise MissingError(f"There is no object {self.path}.") from None
            if code in ("AccessDenied", "403"):
                raise DeniedError(f"{self.path} cannot be used: {error}.") from None
            raise StorageError(f"{self.path} cannot be used: {error}.") from None
