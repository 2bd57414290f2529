"""Rows of a WebDataset tar: the files of a row share a name.

The headers are read first, so that files of a row need not lie side by side. Read are tars that are
compressed (gzip, bzip2, xz, zstd, lz4), several tars joined into one, and names with dots. What
makes no row is given as a row without an image, with the reason, so that it is counted and not
lost.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import tarfile
import tempfile
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from ... import storage
from ..caption_text import find_captions, json_fault, read_meta
from ..sample import (
    ARCHIVES,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    IS_POINTER,
    POINTER,
    TEXT_SUFFIXES,
    Sample,
    ShardError,
    ending,
)
from ..tar_headers import QuickTarInfo

# raised by tarfile for damaged files
BROKEN = (tarfile.TarError, OSError, KeyError, ValueError, OverflowError, RecursionError)
UNPACKING = (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
BY_PYARROW = {  # the second is how pzstd begins
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
IN_MEMORY = 2**26  # bytes of an unpacked tar, before it goes to a temporary file
CHUNK = 2**20  # bytes
NOT_READ = "in files of a kind that is not read"
ARCHIVED = "in an archive inside a tar (unpack it)"
COMPOUND = "with an image and a text of different names (name them KEY.jpg and KEY.txt)"
AMBIGUOUS = "with a name that is there several times, with other files each time"
LOST_LINK = "with a link to a file that is not in the tar (make it with tar --dereference)"
LOOP = "with a link that leads back to itself (replace it with the file)"


class _Tar(tarfile.TarFile):
    """A tar that finds the targets of links among the headers that were read.

    `tarfile` would read on to the end of the tar, which a damaged one does not have.
    """

    members: list[tarfile.TarInfo]  # those that were read

    @cached_property
    def _named(self) -> dict[str, list[tarfile.TarInfo]]:
        """Members by path, in the order of the tar."""
        named: dict[str, list[tarfile.TarInfo]] = {}
        for info in self.members:
            named.setdefault(posixpath.normpath(info.name), []).append(info)
        return named

    def target(self, info: tarfile.TarInfo) -> tuple[tarfile.TarInfo | None, str]:
        """(the file that a member is or leads to, ""); without one, (None, reason)."""
        passed = set[int]()
        while info.issym() or info.islnk():
            if info.offset in passed:
                return None, LOOP
            passed.add(info.offset)
            folder = posixpath.dirname(info.name) if info.issym() else ""
            same = self._named.get(posixpath.normpath(posixpath.join(folder, info.linkname)), [])
            # a hard link leads to an earlier member
            end = bisect_left(same, info.offset, key=_offset) if info.islnk() else len(same)
            if not end:
                return None, LOST_LINK
            info = same[end - 1]
        return (info, "") if info.isfile() and info.size >= 0 else (None, LOST_LINK)


def _offset(info: tarfile.TarInfo) -> int:
    return info.offset


@dataclass
class _Member:
    """A file of a tar. Its name is split at the first dot and at the last one."""

    tar: _Tar
    info: tarfile.TarInfo
    name: str
    stem: str  # WebDataset's key: up to the first dot of the file's name
    rest: str  # after the first dot, in lower case
    long_stem: str  # up to the last dot
    suffix: str  # after the last dot, in lower case


@dataclass
class _Headers:
    """Members of a tar in order, the last name before any damage, and whether it is whole."""

    members: list[_Member] = field(default_factory=list)
    last: str = ""
    ended: bool = False

    def groups(self) -> list[list[_Member]]:
        """Members grouped by WebDataset's key, in the order in which the keys begin."""
        groups: dict[str, list[_Member]] = {}
        for member in self.members:
            groups.setdefault(member.stem, []).append(member)
        return list(groups.values())


def read_shard(
    data: bytes | str | Path, name: str | None = None, column: str | None = None, etag: str = ""
) -> Iterator[Sample]:
    """Yield the samples of one tar in order, also those without an image or a caption.

    Raises ShardError for a broken or truncated tar, after the samples before the damage, and
    StorageError. `data`: the tar, or its path, local or s3://. `name` is used in error messages;
    `column` is the field of a row's JSON that holds its captions; `etag`: that of the object.
    """
    name = name or ("a shard" if isinstance(data, bytes) else str(data))
    with closing(_open(data, name, etag)) as file:
        unpacked, whole = _seekable(file, name)
        with closing(unpacked):
            headers = _read_headers(unpacked, name)
            ended, groups = headers.ended and whole, headers.groups()
            for number, group in enumerate(groups):
                # Files that the last row lacks are perhaps behind the damage.
                cut = not ended and number == len(groups) - 1
                try:
                    yield from _rows(group, column, cut)
                except BROKEN:
                    ended = False
    if not ended:
        raise ShardError(
            f"{name} is broken or cut after {headers.last or 'its beginning'}; copy it again."
        )


def _open(data: bytes | str | Path, name: str, etag: str) -> IO[bytes]:
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if storage.is_remote(data):
        return storage.open_stream(data, etag)
    try:
        return open(data, "rb")
    except FileNotFoundError:
        raise ShardError(f"There is no file {name}.") from None
    except OSError as error:
        raise ShardError(f"{name} cannot be read: {error.strerror or error}.") from None


# -- headers ---------------------------------------------------------------------------------------


def _seekable(file: IO[bytes], name: str) -> tuple[IO[bytes], bool]:
    """The tar unpacked, and whether that was possible to its end.

    An object, or a compressed tar, is read once, into memory or a temporary file: files of a row
    need not lie side by side, so the headers of the whole tar are needed before the first row.
    """
    head = file.read(6) if file.seekable() else file.peek(6)[:6]  # type: ignore[attr-defined]
    if file.seekable():
        file.seek(0)
    unpack = next((of for mark, of in COMPRESSED.items() if head.startswith(mark)), None)
    if codec := BY_PYARROW.get(head[:4]):
        try:
            import pyarrow  # comes with ray[data]; not needed to read other tars
        except ImportError:
            raise ShardError(
                f"{name} is compressed by {codec}, which needs pyarrow; run `pip install pyarrow`, "
                "or unpack it to a .tar."
            ) from None
        unpack = partial(pyarrow.CompressedInputStream, compression=codec)
    if unpack is None and file.seekable():
        return file, True
    unpacked = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)
    whole = True
    try:
        source: Any = nullcontext(file) if unpack is None else unpack(file)
        with source as stream:
            while chunk := stream.read1(CHUNK):
                unpacked.write(chunk)
    except UNPACKING:
        whole = False
    unpacked.seek(0)
    return unpacked, whole  # type: ignore[return-value]


def _read_headers(file: IO[bytes], name: str) -> _Headers:
    """Headers of a tar and of the tars that follow its end. Raises ShardError if it is none."""
    headers = _Headers()
    start: int | None = 0
    while start is not None:
        file.seek(start)
        try:
            tar = _Tar.open(fileobj=file, mode="r:", tarinfo=QuickTarInfo)
        except BROKEN:
            if start == 0:
                file.seek(0)
                if file.read(len(POINTER)) == POINTER:
                    raise ShardError(f"{name} {IS_POINTER}") from None
                raise ShardError(f"{name} is not a tar file; copy it again.") from None
            headers.ended = False
            break
        start = _read_members(tar, headers)
    return headers


def _read_members(tar: _Tar, headers: _Headers) -> int | None:
    """Read the headers up to the end of a tar. Returns where another tar begins, or None."""
    headers.ended, before = False, -1
    try:
        while (info := tar.next()) is not None:
            # A damaged size can lead back to a member that was read, for ever (CVE-2025-8194).
            if info.size < 0 or tar.offset <= before:
                return None
            before = tar.offset
            if (member := _member(tar, info)) is not None:
                headers.members.append(member)
                headers.last = member.long_stem
        # tarfile raises nothing if a header is broken or the file ends in place of one: check
        # for the block of zeros at the end of a complete tar.
        file: Any = tar.fileobj
        file.seek(tar.offset)
        headers.ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        return _after_zeros(file) if headers.ended else None
    except BROKEN:
        return None


def _after_zeros(file: IO[bytes]) -> int | None:
    """Offset of the first block with content, from the current one; None at the end."""
    while chunk := file.read(CHUNK):
        if content := chunk.lstrip(b"\0"):
            place = file.tell() - len(content)
            return place - place % tarfile.BLOCKSIZE
    return None


def _member(tar: _Tar, info: tarfile.TarInfo) -> _Member | None:
    """None for a folder, a device or a hidden file."""
    # names need not be UTF-8
    name = info.name.encode(errors="replace").decode().removeprefix("./")
    folder, slash, file = name.rpartition("/")
    image, _, text = file.rpartition(".")
    if text.lower() in TEXT_SUFFIXES and ending(image) in IMAGE_SUFFIXES:
        # 0.jpg.txt, as programs for downloads name the text of 0.jpg
        file = f"{image.rpartition('.')[0]}.{text}"
    stem, _, rest = file.partition(".")
    if not (info.isfile() or info.issym() or info.islnk()) or not stem or "__MACOSX" in folder:
        return None
    long_stem, dot, suffix = file.rpartition(".")
    return _Member(
        tar,
        info,
        name,
        f"{folder}{slash}{stem}",
        rest.lower(),
        f"{folder}{slash}{long_stem if dot else file}",
        suffix.lower() if dot else "",
    )


# -- rows ------------------------------------------------------------------------------------------


def _rows(group: Sequence[_Member], column: str | None, cut: bool) -> Iterator[Sample]:
    """The rows of one key: one, or several if names have dots or are there more than once."""
    plain = [one for one in group if one.rest in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES)]
    if any(one.rest in IMAGE_SUFFIXES for one in plain):
        yield from _same_name(plain, column, cut)
        return
    named: dict[str, list[_Member]] = {}
    for one in group:
        if one.suffix in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
            named.setdefault(one.long_stem, []).append(one)
    images = [one for one in group if one.suffix in IMAGE_SUFFIXES]
    texts = [one for one in group if one.suffix in TEXT_SUFFIXES]
    complete = any(
        {one.suffix for one in same} & set(IMAGE_SUFFIXES)
        and {one.suffix for one in same} & set(TEXT_SUFFIXES)
        for same in named.values()
    )
    if images and texts and not complete:
        yield from (Sample(one.name, b"", "", (), {}, COMPOUND) for one in images)
    elif images:
        for same in named.values():
            yield from _same_name(same, column, cut)
    else:
        yield from _without_image(group, texts, column, cut)


def _same_name(members: Sequence[_Member], column: str | None, cut: bool) -> Iterator[Sample]:
    """The rows of members with one name. A suffix that is there again begins another row."""
    rows: list[dict[str, _Member]] = [{}]
    for member in members:
        if member.suffix in rows[-1]:
            rows.append({})
        rows[-1][member.suffix] = member
    if len({frozenset(row) for row in rows}) > 1:  # which text belongs to which image?
        yield Sample(members[0].name, b"", "", (), {}, AMBIGUOUS)
        return
    last = rows[-1]
    for row in rows:
        incomplete = not set(row) & set(IMAGE_SUFFIXES) or not set(row) & set(TEXT_SUFFIXES)
        if not (row is last and incomplete and cut):
            yield _sample(row, column)


def _without_image(
    group: Sequence[_Member], texts: Sequence[_Member], column: str | None, cut: bool
) -> Iterator[Sample]:
    """A row for a key without an image that can be read, named by the file that is not read."""
    other = next((one for one in group if one not in texts), None)
    if other is None:
        if not cut:
            yield _sample({one.suffix: one for one in texts}, column)
    else:
        why = ARCHIVED if ending(other.name) in ARCHIVES else NOT_READ
        yield Sample(other.name, b"", "", (), {}, why)


def _sample(row: dict[str, _Member], column: str | None) -> Sample:
    content, reasons = {}, {}
    for suffix, one in row.items():
        content[suffix], reasons[suffix] = _content(one)
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in row]
    suffix = next((one for one in images if content[one]), next(iter(images), ""))
    meta = read_meta(content.get("json"))
    text = next((content[one] for one in CAPTION_SUFFIXES if one in content), None)
    found = find_captions(text, meta, column)
    key = meta["key"] if isinstance(meta.get("key"), str) else next(iter(row.values())).long_stem
    no_text = next((reasons[one] for one in TEXT_SUFFIXES if reasons.get(one)), "")
    return Sample(
        key,
        content.get(suffix, b""),
        suffix,
        found.texts,
        meta,
        no_image=reasons.get(suffix, ""),
        no_caption=no_text or json_fault(content.get("json"), meta) or found.reason,
        captions_unread=found.unread,
    )


def _content(member: _Member) -> tuple[bytes, str]:
    """Content of a file of the tar, or of that which a link leads to; else (b"", reason)."""
    info, reason = member.tar.target(member.info)
    if info is None:
        return b"", reason
    if info.issparse():
        stream = member.tar.extractfile(info)
        return (b"" if stream is None else stream.read()), ""
    file: Any = member.tar.fileobj  # quicker than extractfile's buffered file for each member
    file.seek(info.offset_data)
    content = file.read(info.size)
    if len(content) < info.size:
        raise tarfile.ReadError("unexpected end of data")
    return content, ""
