"""A corpus of any form as parts, and a part as samples: tar shards, Parquet with image bytes or paths, folders of images.

A part is what one task reads. A path is a folder, a file or an `s3://` prefix, or a range of shards such as `data/{00000..00999}.tar`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .. import storage
from .shards import IMAGE_SUFFIXES, INDEX, Sample, ShardError, captions_of, read_meta, read_shard

SHARD_SUFFIXES = (".tar", ".parquet")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "url")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "TEXT")
METADATA = "metadata.jsonl"  # beside images, as Hugging Face's ImageFolder has it: {"file_name": ..., "text": ...} a line
FILES_PER_PART = 256
ROWS_AT_ONCE = 64
IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)))
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SEVERAL = re.compile(r"\{([^{},]+(?:,[^{},]+)+)\}")  # corpora side by side: corpus/{train,scenes}


@dataclass(frozen=True)
class Part:
    """A shard, or some of a folder's images: `files` are then their paths, each with its captions where METADATA gives them."""

    url: str
    count: int | None = None  # rows, where the corpus has an index that says so
    files: tuple[tuple[str, tuple[str, ...] | None], ...] = ()


def find_parts(path: str | Path) -> list[Part]:
    """The parts of a corpus in their order. Raises ShardError where there are none.

    A range is not looked up, and a folder with our index is not listed: its index says what is there. Anything else is listed once.
    """
    path = str(path)
    if SEVERAL.search(path):
        return [part for one in each_path(path) for part in find_parts(one)]
    if span := RANGE.search(path):
        first, last = span.groups()
        if int(last) < int(first):
            raise ShardError(f"The corpus {path} is empty: its range ends before it begins.")
        return [
            Part(f"{path[: span.start()]}{n:0{len(first)}d}{path[span.end() :]}")
            for n in range(int(first), int(last) + 1)
        ]
    if indexed := _read_index(path):
        return indexed
    files = list(storage.list_files(path, (*SHARD_SUFFIXES, *IMAGE_ENDINGS, METADATA)))
    images = [file for file in files if file.endswith(IMAGE_ENDINGS)]
    # img2dataset writes 00000.parquet beside 00000.tar, or beside a folder 00000 of images: what it knows of the rows, without their images.
    known = {file.removesuffix(".tar") for file in files if file.endswith(".tar")} | {
        file.rpartition("/")[0] for file in images
    }
    if shards := [
        file
        for file in files
        if file.endswith(".tar")
        or file.endswith(".parquet")
        and file.removesuffix(".parquet") not in known
    ]:
        return [Part(file) for file in shards]
    captions = _metadata([file for file in files if PurePosixPath(file).name == METADATA])
    if not images:
        raise ShardError(
            f"The corpus {path} is empty: no .tar or .parquet file and no image is there; make the default one with "
            f"`glide corpus`, or give the path of another."
        )
    return [
        Part(
            f"{path}#{start}",
            files=tuple(
                (file, captions.get(file)) for file in images[start : start + FILES_PER_PART]
            ),
        )
        for start in range(0, len(images), FILES_PER_PART)
    ]


def each_path(path: str) -> list[str]:
    """The paths that one with a list in braces stands for; of any other, itself."""
    if not (names := SEVERAL.search(path)):
        return [path]
    return [
        one
        for name in names.group(1).split(",")
        for one in each_path(path[: names.start()] + name + path[names.end() :])
    ]


def folder_name(part: Part) -> str:
    """The name of the folder in which a part lies."""
    return PurePosixPath(part.url).parent.name


def share_of(shares: Mapping[str, float], folder: str, sample: Sample) -> float:
    """The share of such rows that an epoch reads: that of their folder times that of their `group`, each 1 where not given."""
    return shares.get(folder, 1.0) * shares.get(str(sample.meta.get("group")), 1.0)


def in_share(key: str, epoch: int, seed: int, share: float) -> bool:
    """Whether an epoch reads the row of this key, where it reads a share of all: always the same for the same arguments."""
    if share == 1:
        return True
    digest = hashlib.sha256(f"share/{seed}/{epoch}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def state(path: str | Path, parts: Sequence[Part]) -> str:
    """What tells a corpus from what it was before some of its files were written anew: a SHA-256. Images that Parquet only names do not count."""
    read = (
        (*IMAGE_ENDINGS, ".txt", ".json") if any(part.files for part in parts) else SHARD_SUFFIXES
    )
    roots = [part.url for part in parts] if RANGE.search(str(path)) else each_path(str(path))
    return hashlib.sha256(
        json.dumps([list(storage.list_states(root, read)) for root in roots]).encode()
    ).hexdigest()


def read_part(part: Part) -> Iterator[Sample]:
    """The samples of one part, in an order that does not change.

    Raises ShardError or StorageError for a part that is missing, broken, or ends before it should; what could be read came before.
    """
    read = (
        _read_files(part)
        if part.files
        else _read_parquet(part.url)
        if part.url.endswith(".parquet")
        else read_shard(
            storage.read(part.url) if storage.is_remote(part.url) else part.url, part.url
        )
    )
    rows = 0
    for sample in read:
        rows += 1
        yield sample
    if part.count is not None and rows != part.count:
        raise ShardError(
            f"{part.url} has {rows} rows and its index says {part.count}; copy it again."
        )


# -- rows -------------------------------------------------------------------------------------------------------------


def row_id(part: str, position: int) -> int:
    """One signed 64-bit number for the row of a corpus: whatever its key, and however many parts are added beside its own."""
    return int.from_bytes(
        hashlib.sha256(f"{part}#{position}".encode()).digest()[:8], "big", signed=True
    )


def columns(samples: Iterable[tuple[int, Sample]]) -> dict[str, list]:
    """Samples with their ids as the columns that `Collate` reads."""
    rows = [
        (number, sample.key, sample.image, json.dumps(sample.captions))
        for number, sample in samples
    ]
    return {
        name: [row[n] for row in rows] for n, name in enumerate(("id", "key", "image", "captions"))
    }


# --------------------------------------------------------------------------------------------------------------------


def _read_index(path: str) -> list[Part]:
    if path.endswith(SHARD_SUFFIXES):
        return []
    folder = path.rstrip("/")
    try:
        index = storage.read(f"{folder}/{INDEX}")
    except (
        storage.MissingError
    ):  # and no other error: an index that cannot be read is there all the same
        return []
    try:
        return [
            Part(f"{folder}/{shard['name']}", shard["count"])
            for shard in json.loads(index)["shards"]
        ]
    except (ValueError, KeyError, TypeError):  # another program's
        return []


def _read_parquet(url: str) -> Iterator[Sample]:
    import pyarrow.parquet  # comes with ray[data]; tars are read without it

    data = storage.read(url) if storage.is_remote(url) else url
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data) if isinstance(data, bytes) else data)
    except FileNotFoundError:
        raise ShardError(f"There is no file {url}.") from None
    except (pyarrow.ArrowInvalid, OSError):
        raise ShardError(f"{url} is not a whole Parquet file; copy it again.") from None
    names = table.schema_arrow.names
    image, path = (
        next((name for name in wanted if name in names), None)
        for wanted in (IMAGE_COLUMNS, PATH_COLUMNS)
    )
    if image is None and path is None:
        raise ShardError(
            f"{url} has no column named {' or '.join((*IMAGE_COLUMNS, *PATH_COLUMNS))}; it has: {', '.join(names)}."
        )
    caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    if caption is None:
        raise ShardError(
            f"{url} has no column named {' or '.join(CAPTION_COLUMNS)}; it has: {', '.join(names)}."
        )
    position = 0
    try:
        for batch in table.iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                content = row[image or path]
                if isinstance(content, dict):  # as Hugging Face writes it
                    content = content.get("bytes") or content.get("path")
                content = (
                    _beside(url, content)
                    if isinstance(content, str)
                    else content
                    if isinstance(content, bytes)
                    else b""
                )
                captions = _captions(row[caption])
                meta = {
                    name: value
                    for name, value in row.items()
                    if name not in (image, caption) and isinstance(value, (str, int, float))
                }
                yield Sample(
                    str(row.get("key", f"{PurePosixPath(url).stem}-{position:06d}")),
                    content,
                    _suffix(content),
                    captions,
                    meta,
                )
                position += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # a page in its midst
        raise ShardError(
            f"{url} is broken after its first {position:,} rows; copy it again."
        ) from None


def _read_files(part: Part) -> Iterator[Sample]:
    """Images with a caption in METADATA, or in a .txt or .json of their name beside them."""
    for file, captions in part.files:
        stem, meta = file[: file.rindex(".")], {}
        if captions is None:
            text, meta = _read_or_none(f"{stem}.txt"), read_meta(_read_or_none(f"{stem}.json"))
            captions = captions_of(text.decode(errors="replace") if text else None, meta)
        yield Sample(
            PurePosixPath(stem).name,
            _read_or_none(file) or b"",
            file[file.rindex(".") + 1 :],
            captions,
            meta,
        )


def _beside(url: str, path: str | None) -> bytes:
    """The image at a path that is whole, or begins at the folder of the file that names it; b"" where there is none."""
    if not path or path.startswith(("http://", "https://")):  # to be fetched by img2dataset first
        return b""
    whole = (
        path
        if storage.is_remote(path) or path.startswith("/")
        else f"{url.rpartition('/')[0]}/{path}"
    )
    return _read_or_none(whole) or b""


def _captions(value: object) -> tuple[str, ...]:
    """Those in one field: a list of them, or one."""
    return captions_of(None, {"captions" if isinstance(value, list) else "caption": value})


def _read_or_none(path: str) -> bytes | None:
    try:
        return storage.read(path)
    except storage.StorageError:
        return None


def _metadata(files: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Image path -> captions, from every METADATA file."""
    captions = {}
    for file in files:
        folder = file.rpartition("/")[0]
        for line in storage.read(file).splitlines():
            try:
                row = read_meta(line)
                captions[f"{folder}/{row['file_name']}"] = _captions(
                    next((row[name] for name in CAPTION_COLUMNS if name in row), None)
                )
            except KeyError:
                continue
    return captions


def _suffix(content: bytes) -> str:
    """The ending for an image's bytes by their first ones."""
    head = content[:12]
    return "png" if head.startswith(b"\x89PNG") else "webp" if head[8:12] == b"WEBP" else "jpg"
