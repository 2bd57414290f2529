"""Image-text shards: WebDataset tars in img2dataset's layout.

`000000.tar` holds KEY.webp, KEY.txt and KEY.json of each sample. `index.json` is written last: a
folder that has it is complete, and one with MARKER is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from ..s3 import S3, list_objects, split_url
from ..storage import (
    MissingError,
    is_remote,
    put,
    put_new,
    read,
    remove,
    remove_folder,
    size,
    storage_errors,
)
from .caption_text import captions_of, read_meta
from .readers.tar import read_shard
from .sample import IMAGE_SUFFIXES, SHARD_SUFFIXES, TEXT_SUFFIXES, Sample, ShardError
from .tar_headers import header_of, padding

__all__ = [  # what reads a shard is imported from here together with what writes one
    "IMAGE_SUFFIXES",
    "INDEX",
    "TEXT_SUFFIXES",
    "Sample",
    "ShardError",
    "begin",
    "captions_of",
    "finish",
    "read_index",
    "read_meta",
    "read_shard",
    "write_shard",
    "write_shards",
]

INDEX = "index.json"
# In a folder that is being written: temporary files, the marker that readers refuse, and the names
# of the shards that the earlier corpus there had.
WORK = ".work"
MARKER, EARLIER = f"{WORK}/run.json", f"{WORK}/earlier.json"
SHARDS = (".tar", ".parquet")
Result = TypeVar("Result")
SHARD_REQUEST = 2**30  # bytes of a shard up to which S3 receives it in one request
BESIDE = ("report.html", "summary.json", "card.json")  # what a corpus has beside its shards
DROPPED = "dropped.parquet"  # beside shards that `glide clean` wrote: the rows that it left out


def write_shards(
    folder: str | Path, samples: Iterable[Sample], per_shard: int = 1000
) -> dict[str, Any]:
    """Write all samples and then the index, each file atomically. Returns the index."""
    begin(folder)
    batches = enumerate(in_batches(samples, per_shard))
    return finish(folder, [write_shard(folder, number, batch) for number, batch in batches])


def in_batches(samples: Iterable[Sample], count: int) -> Iterator[Iterator[Sample]]:
    """Batches of `count` samples, the last one smaller; each must be read before the next one."""
    rest = iter(samples)
    while (first := next(rest, None)) is not None:
        yield chain([first], islice(rest, count - 1))


def begin(folder: str | Path, run: bytes = b"{}") -> None:
    """Mark a folder as unfinished until `finish`, and delete the index of an earlier corpus.

    `run`: content of the marker. Raises ShardError if the folder holds shards of others. Calling
    it again after an interruption is allowed.
    """
    refuse_others(folder)
    put_new(run, _inside(folder, MARKER))
    claim_earlier(folder)


def refuse_others(folder: str | Path) -> None:
    """Raise ShardError if a folder holds shards, an index or a report that are not ours.

    Writing there would overwrite them or mix them with the new ones. Ours are what an index or a
    marker of ours covers.
    """
    if _has_marker(folder):
        return
    names = _names_in(folder, INDEX)
    if names is None:
        raise ShardError(
            f"{folder} holds an {INDEX} of another program; write to an empty folder, or remove "
            "that file."
        )
    if not names and (other := _report_in(folder)):
        raise ShardError(
            f"{folder} holds a {other} without a corpus; write to an empty folder, or remove it."
        )
    ours = {*names, DROPPED}
    for file in list_folder(folder, SHARDS):
        if (name := file.rpartition("/")[2]) not in ours:
            raise ShardError(
                f"{folder} holds shards that no index names, such as {name}; write to an empty "
                "folder, or remove them."
            )


def _report_in(folder: str | Path) -> str | None:
    """Name of a file or folder that a corpus has beside its shards; None without one."""
    found = {file.rpartition("/")[2] for file in list_folder(folder, (".html", ".json"))}
    if not is_remote(folder) and Path(folder, WORK).is_dir():
        return WORK
    return next((name for name in BESIDE if name in found), None)


def list_folder(path: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """Files directly in a folder or prefix whose names end in one of `suffixes`, sorted.

    `suffixes` as in `list_files`. Raises StorageError (DeniedError without the right to list).
    """
    path = str(path).rstrip("/")
    if not is_remote(path):
        files = sorted(str(file) for file in Path(path).glob("*"))
        return [file for file in files if file.lower().endswith(suffixes)]
    bucket, prefix = split_url(f"{path}/")
    with storage_errors(path):
        keys = [item["Key"] for item in list_objects(bucket, prefix, Delimiter="/")]
        return [f"{S3}{bucket}/{key}" for key in keys if key.lower().endswith(suffixes)]


def claim_earlier(folder: str | Path, shards: Iterable[str] = ()) -> None:
    """Remember the shards that `finish` may delete, and delete the index that names them.

    `shards`: names besides those in the index.
    """
    earlier = {*read_names(folder), *read_names(folder, EARLIER), *shards}
    if earlier:
        content = json.dumps({"shards": [{"name": name} for name in sorted(earlier)]})
        put(content.encode(), _inside(folder, EARLIER))
    remove(_inside(folder, INDEX))


def refuse_unfinished(path: str | Path) -> None:
    """Raise ShardError if a folder, or the folder of a file or range, is marked as unfinished."""
    folder = str(path).rstrip("/")
    if folder.lower().endswith(SHARD_SUFFIXES):
        folder = folder.rpartition("/")[0] or "."
    if _has_marker(folder):
        raise ShardError(
            f"{folder} is unfinished: the command that writes it was interrupted or still runs; "
            "run it again, or delete the folder."
        )


def write_shard(folder: str | Path, number: int, samples: Iterable[Sample]) -> dict[str, Any]:
    """Write one shard atomically, local or s3://. Returns its entry for the index.

    The shard passes through a file, so that memory holds one sample at a time.
    """

    def add(file: _Written) -> int:
        count = _add_all(file, samples)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(padding(file.bytes, tarfile.RECORDSIZE))
        return count

    name = shard_name(number)
    written, count = _write(folder, name, add)
    sha256 = written.sha256.hexdigest()
    return {"name": name, "count": count, "bytes": written.bytes, "sha256": sha256}


def _write(
    folder: str | Path, name: str, add: Callable[[_Written], Result]
) -> tuple[_Written, Result]:
    """Write a file atomically, local or in S3, as `add` writes its content."""
    path = _inside(folder, name)
    with storage_errors(path), _new_file(folder, name) as file:
        written = _Written(file)
        result = add(written)
        if is_remote(path):
            file.seek(0)
            put(file, path, written.sha256.hexdigest(), one_request_up_to=SHARD_REQUEST)
    return written, result


@contextmanager
def _new_file(folder: str | Path, name: str) -> Iterator[IO[bytes]]:
    """A file to write: it becomes `name` in a local folder, or is deleted if the folder is in S3.

    Until then it is in WORK, which `finish` deletes, also after a process was killed.
    """
    if is_remote(folder):
        with tempfile.TemporaryFile() as file:
            yield file
        return
    work = Path(_inside(folder, WORK))
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f"{name}.{uuid.uuid4().hex[:8]}"
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, Path(folder) / name)
    finally:
        partial.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: the folder of a run
            work.rmdir()


class _Written:
    """A file that counts and hashes the bytes that are written to it."""

    def __init__(self, file: IO[bytes]):
        self._file, self.bytes, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self.sha256.update(data)
        return self._file.write(data)


def _add_all(file: _Written, samples: Iterable[Sample]) -> int:
    """Write the files of all samples as members of a tar. Returns the number of samples."""
    names: set[str] = set()
    for sample in samples:
        name = _free_name(sample.key, names)
        names.add(name)
        meta = {
            **sample.meta,
            "key": sample.key,
            "caption": sample.captions[0] if sample.captions else "",
            "captions": list(sample.captions),
        }
        for suffix, content in (
            (sample.suffix, sample.image),
            ("txt", meta["caption"].encode(errors="replace")),
            ("json", _to_json(meta).encode(errors="replace")),
        ):
            header = header_of(f"{name}.{suffix}", len(content))
            file.write(b"".join((header, content, padding(len(content)))))
    return len(names)


def _to_json(value: Any) -> str:
    """A value as JSON, with null for the numbers that JSON does not have: NaN and the infinite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(finite, ensure_ascii=False)


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"


class ShardEntries:
    """Entries of many shards for an index, in the order of their numbers; 48 bytes each."""

    def __init__(self, shards: int):
        columns = [("count", np.int64), ("bytes", np.int64), ("sha256", np.void, 32)]
        self._table = np.zeros(shards, columns)

    def add(self, entry: Mapping[str, Any]) -> None:
        number = int(entry["name"].removesuffix(".tar"))
        digest = np.void(bytes.fromhex(entry["sha256"]))
        self._table[number] = (entry["count"], entry["bytes"], digest)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self._table)):
            count, size, digest = self._table[number].item()
            if size:  # a shard that became empty when its rows were read again is not written
                name = shard_name(number)
                yield {"name": name, "count": count, "bytes": size, "sha256": digest.hex()}

    @property
    def rows(self) -> int:
        return int(self._table["count"].sum())


def finish(folder: str | Path, shards: Sequence[dict[str, Any]] | ShardEntries) -> dict[str, Any]:
    """Write the index of a corpus, after all of its shards. Returns the index.

    Deletes the shards that only the earlier index named, and the marker.
    """
    stale = {*read_names(folder, EARLIER)}
    if stale:
        stale.difference_update(shard["name"] for shard in shards)
    for name in stale:
        if "/" not in name:
            remove(_inside(folder, name))
    count = sum(shard["count"] for shard in shards)
    _write(folder, INDEX, lambda file: _write_index(file, count, shards))
    remove(_inside(folder, MARKER))
    remove_folder(_inside(folder, WORK))
    return {"count": count, "shards": shards}


def _write_index(file: _Written, count: int, shards: Iterable[dict[str, Any]]) -> None:
    """Write the index entry by entry, as `json.dumps(index, indent=1)` gives it."""
    file.write(f'{{\n "count": {count},\n "shards": ['.encode())
    comma = ""
    for shard in shards:
        fields = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in shard.items())
        file.write((f"{comma}\n  {{\n   " + ",\n   ".join(fields) + "\n  }").encode())
        comma = ","
    file.write(b"\n ]\n}" if comma else b"]\n}")


def read_names(folder: str | Path, file: str = INDEX) -> list[str]:
    """Names of the shards in an index; [] without an index of ours."""
    return _names_in(folder, file) or []


def _names_in(folder: str | Path, file: str) -> list[str] | None:
    """Names of the shards in an index, [] without an index; None for that of another program."""

    def name_of(entry: dict[str, Any]) -> Any:
        """An entry at once as its name, which takes less memory; the index itself unchanged."""
        return str(entry["name"]) if "name" in entry else entry

    try:
        names = json.loads(read(_inside(folder, file)), object_hook=name_of)["shards"]
    except MissingError:
        return []
    except (ValueError, KeyError, TypeError):
        return None
    ours = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if ours else None


def _has_marker(folder: str | Path) -> bool:
    try:
        read(_inside(folder, MARKER))
        return True
    except MissingError:
        return False


def _inside(folder: str | Path, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}"


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of a folder or s3:// prefix, or None if it is not complete.

    Not complete: without an index, or with a shard that is missing or has another size.
    """
    folder = str(folder).rstrip("/")
    try:
        index = json.loads(read(f"{folder}/{INDEX}"))
        return (
            index
            if all(size(f"{folder}/{shard['name']}") == shard["bytes"] for shard in index["shards"])
            else None
        )
    except (MissingError, ValueError, KeyError):
        return None


def _free_name(key: str, taken: set[str]) -> str:
    """Name of a sample's files in a shard: its key without "." and "/", made unique in the shard.

    "." and "/" would split the name; the .json keeps the unchanged key.
    """
    name = re.sub(r"[./]", "_", key)
    return (
        name
        if name and name not in taken
        else next(other for n in count(len(taken)) if (other := f"{name}-{n}") not in taken)
    )
