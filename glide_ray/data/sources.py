"""Reading a corpus: tar shards, Parquet with image bytes or paths, or folders of images.

A corpus consists of parts, and one task reads one part. The path of a corpus is a folder, a file,
an `s3://` prefix, a range of shards such as `data/{00000..00999}.tar`, or several paths such as
`corpus/{train,scenes}`.
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
# beside images, as in Hugging Face's ImageFolder; one {"file_name": ..., "text": ...} per line
METADATA = "metadata.jsonl"
FILES_PER_PART = 256
ROWS_PER_BATCH = 64
IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)))
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SEVERAL = re.compile(r"\{([^{},]+(?:,[^{},]+)+)\}")  # several corpora: corpus/{train,scenes}


@dataclass(frozen=True)
class Part:
    """A shard, or some images of a folder."""

    url: str
    count: int | None = None  # number of rows, if the corpus has an index
    # images of a folder: path, and captions if METADATA has them; empty for a shard
    files: tuple[tuple[str, tuple[str, ...] | None], ...] = ()


def find_parts(path: str | Path) -> list[Part]:
    """The parts of a corpus, in order. Raises ShardError if there are none.

    The files of a range are not checked, and a folder with our index is not listed: the index names
    its shards. Any other path is listed once.
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
    # img2dataset writes 00000.parquet beside 00000.tar, or beside a folder 00000 of images. It has
    # metadata of the rows but no images: leave it out.
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
            f"The corpus {path} is empty: no .tar or .parquet file and no image is there; make the "
            f"default one with `glide corpus`, or give the path of another."
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
    """Expand the lists in braces of a path; a path without a list gives itself."""
    if not (names := SEVERAL.search(path)):
        return [path]
    return [
        one
        for name in names.group(1).split(",")
        for one in each_path(path[: names.start()] + name + path[names.end() :])
    ]


def folder_name(part: Part) -> str:
    """Name of the folder that contains a part."""
    return PurePosixPath(part.url).parent.name


def share_of(shares: Mapping[str, float], folder: str, sample: Sample) -> float:
    """The share of rows like this one that an epoch reads.

    The share of the folder times the share of the row's `group`; each is 1 if not in `shares`.
    """
    return shares.get(folder, 1.0) * shares.get(str(sample.meta.get("group")), 1.0)


def in_share(key: str, epoch: int, seed: int, share: float) -> bool:
    """Whether an epoch that reads a share of the rows reads this one: decided by a hash."""
    if share == 1:
        return True
    digest = hashlib.sha256(f"share/{seed}/{epoch}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def state(path: str | Path, parts: Sequence[Part]) -> str:
    """SHA-256 of a corpus that changes when its files are rewritten.

    Images that a Parquet file refers to by path do not count.
    """
    read = (
        (*IMAGE_ENDINGS, ".txt", ".json") if any(part.files for part in parts) else SHARD_SUFFIXES
    )
    roots = [part.url for part in parts] if RANGE.search(str(path)) else each_path(str(path))
    return hashlib.sha256(
        json.dumps([list(storage.list_states(root, read)) for root in roots]).encode()
    ).hexdigest()


def read_corpus(path: str | Path) -> Iterator[Sample]:
    """Yield the samples of all parts of a corpus in order. Raises ShardError, StorageError."""
    for part in find_parts(path):
        yield from read_part(part)


def read_part(part: Part) -> Iterator[Sample]:
    """Yield the samples of one part, always in the same order.

    Raises ShardError or StorageError for a part that is missing, broken, or has another number of
    rows than the index says, after the samples that could be read.
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


# -- rows ------------------------------------------------------------------------------------------


def row_id(part: str, position: int) -> int:
    """Signed 64-bit id of a row, from the URL of its part and its position there.

    It does not depend on the row's key, or on parts that are added to the corpus.
    """
    return int.from_bytes(
        hashlib.sha256(f"{part}#{position}".encode()).digest()[:8], "big", signed=True
    )


def columns(samples: Iterable[tuple[int, Sample]]) -> dict[str, list]:
    """Pairs of row id and sample as the columns that `Collate` reads."""
    rows = [
        (number, sample.key, sample.image, json.dumps(sample.captions))
        for number, sample in samples
    ]
    return {
        name: [row[n] for row in rows] for n, name in enumerate(("id", "key", "image", "captions"))
    }


# -- reading of each form --------------------------------------------------------------------------


def _read_index(path: str) -> list[Part]:
    if path.endswith(SHARD_SUFFIXES):
        return []
    folder = path.rstrip("/")
    try:
        index = storage.read(f"{folder}/{INDEX}")
    except storage.MissingError:  # no other error: an index that cannot be read must not be ignored
        return []
    try:
        return [
            Part(f"{folder}/{shard['name']}", shard["count"])
            for shard in json.loads(index)["shards"]
        ]
    except (ValueError, KeyError, TypeError):  # an index.json of another program
        return []


def _read_parquet(url: str) -> Iterator[Sample]:
    import pyarrow.parquet  # comes with ray[data]; not needed to read tars

    data = storage.read(url) if storage.is_remote(url) else url
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data) if isinstance(data, bytes) else data)
    except FileNotFoundError:
        raise ShardError(f"There is no file {url}.") from None
    except (pyarrow.ArrowInvalid, OSError):
        raise ShardError(f"{url} is not a whole Parquet file; copy it again.") from None
    names = table.schema_arrow.names
    # A column of images is preferred to one of paths.
    image, caption = (
        _column(url, names, wanted) for wanted in ((*IMAGE_COLUMNS, *PATH_COLUMNS), CAPTION_COLUMNS)
    )
    embedded = image if image in IMAGE_COLUMNS else None
    position = 0
    try:
        for batch in table.iter_batches(ROWS_PER_BATCH):
            for row in batch.to_pylist():
                content = _content(url, row[image])
                captions = _captions(row[caption])
                meta = {
                    name: value
                    for name, value in row.items()
                    if name not in (embedded, caption) and isinstance(value, (str, int, float))
                }
                yield Sample(
                    str(row.get("key", f"{PurePosixPath(url).stem}-{position:06d}")),
                    content,
                    _suffix(content),
                    captions,
                    meta,
                )
                position += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):  # a broken page inside the file
        raise ShardError(
            f"{url} is broken after its first {position:,} rows; copy it again."
        ) from None


def _column(url: str, names: Sequence[str], wanted: Sequence[str]) -> str:
    """The first of the wanted column names that is there. Raises ShardError."""
    for name in wanted:
        if name in names:
            return name
    raise ShardError(
        f"{url} has no column named {' or '.join(wanted)}; it has: {', '.join(names)}."
    )


def _content(url: str, value: object) -> bytes:
    """Bytes of an image from a Parquet cell: bytes, a path, or either in Hugging Face's format."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return _beside(url, value)
    return value if isinstance(value, bytes) else b""


def _read_files(part: Part) -> Iterator[Sample]:
    """Images with captions from METADATA, or from a .txt or .json of the same name beside them."""
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
    """The image at a path, absolute or relative to the folder of the file `url` that names it.

    b"" if there is none.
    """
    if not path or path.startswith(("http://", "https://")):  # to be downloaded by img2dataset
        return b""
    path = (
        path
        if storage.is_remote(path) or path.startswith("/")
        else f"{url.rpartition('/')[0]}/{path}"
    )
    return _read_or_none(path) or b""


def _captions(value: object) -> tuple[str, ...]:
    """Captions in one field, which holds a list or a single one."""
    return captions_of(None, {"captions" if isinstance(value, list) else "caption": value})


def _read_or_none(path: str) -> bytes | None:
    try:
        return storage.read(path)
    except storage.StorageError:
        return None


def _metadata(files: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Image path -> captions, from all METADATA files."""
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
    """File suffix for an image, by its first bytes."""
    head = content[:12]
    return "png" if head.startswith(b"\x89PNG") else "webp" if head[8:12] == b"WEBP" else "jpg"
