"""Objects in S3: client, listing, verified reads, and errors of storage.

`storage.py` is the interface for local paths and S3. S3 goes through boto3 with its usual chain
for credentials, region and endpoint (AWS_ENDPOINT_URL), and its own retries.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

S3 = "s3://"
CHECKSUM = "sha256"  # object metadata that `put` writes and `read` verifies
CHUNK = 2**22  # bytes per read
RETRY_WAITS = (0.1, 0.2, 0.4, 0.8)  # seconds before each retry of an incomplete or damaged object


Result = TypeVar("Result")


class StorageError(UserError):
    """A path that cannot be read or written."""


class MissingError(StorageError):
    """A path where no file or object exists."""


def list_objects(bucket: str, prefix: str) -> Iterator[Mapping[str, Any]]:
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", ())


def read_verified(path: str, use: Callable[[Any], tuple[Result, str]]) -> Result:
    """Apply `use` to an object's body and verify its SHA-256, with retries.

    `use` returns a result and the SHA-256 of all bytes that it read. The object is requested again
    if the body breaks off or its checksum does not match: boto3's own retries end once the response
    headers have arrived. Raises StorageError.
    """
    bucket, key = split_url(path)
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    for wait in (*RETRY_WAITS, None):
        answer = client().get_object(Bucket=bucket, Key=key)
        try:
            result, sha256 = use(answer["Body"])
            expected = answer["Metadata"].get(CHECKSUM)
            if not expected or sha256 == expected:
                return result
            fault = (
                f"{path} is damaged: its SHA-256 is not the one it was stored with; "
                f"put it there again."
            )
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            fault = f"{path} cannot be used: {error}."
        if wait is not None:
            # Jitter, so that readers do not all retry at once.
            time.sleep(wait * random.uniform(0.5, 1))
    raise StorageError(fault)


def read_object_range(path: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of an object, requested again if the body breaks off."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    bucket, key = split_url(path)
    for wait in (*RETRY_WAITS, None):
        answer = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        try:
            data = answer["Body"].read()
            if len(data) == stop - start:
                return data
            fault = f"{path} is shorter than {stop:,} bytes."
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            fault = f"{path} cannot be used: {error}."
        if wait is not None:
            time.sleep(wait * random.uniform(0.5, 1))
    raise StorageError(fault)


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
            if getattr(error, "response", {}).get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                raise MissingError(f"There is no object {self.path}.") from None
            raise StorageError(f"{self.path} cannot be used: {error}.") from None
