"""Reading a corpus: tar shards, Parquet with image bytes or paths, or folders of images.

A corpus consists of parts, and one task reads one part. The path of a corpus is a folder, a file,
an `s3://` prefix, or a pattern of them (`patterns.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from .. import storage
from ..s3 import DeniedError
from . import patterns
from .readers.fetch import Fetcher, resolved
from .readers.folder import ImageFile, find_images, lone_texts, read_images
from .readers.parquet import (
    Source,
    count_rows,
    has_captions,
    has_images,
    named_files,
    names_images,
    read_parquet,
)
from .readers.tables import METADATA as METADATA
from .readers.tar import read_shard
from .sample import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    NOT_READ,
    SHARD_SUFFIXES,
    TAR_SUFFIXES,
    TEXT_SUFFIXES,
    Sample,
    ShardError,
    ending,
)
from .shards import DROPPED, INDEX, MARKER, list_folder, refuse_unfinished

log = logging.getLogger(__name__)

FILES_PER_PART = 256
MAX_IMAGES = 10**6  # single files of a corpus: the list of them is in memory
TABLE_SUFFIXES = ("jsonl", "csv", "tsv")
ASIDE_KIND = "in files of a kind that is not read"
ASIDE_TABLE = "in Parquet files without images, left aside"
ASIDE_SCORES = (
    "in Parquet files that name images without captions, left aside (--caption-column names the "
    "column of captions)"
)
ASIDE_LINK = "in links that lead nowhere"
ASIDE_NAME = "in files whose names are not UTF-8 (rename them)"
ASIDE_INDEX = "in shards that are not in the index of their folder"
ASIDE_IMAGE = "in images beside the shards that the index of their folder names"
SPLIT = re.compile(r"(?:^|[/_.-])(train|test|val)(?:ing|id|idation)?\d*(?=$|[/_.-])")


@dataclass(frozen=True, slots=True)  # slots: a driver holds a million of them
class Part:
    """A shard, some images of a folder, or files of a corpus that are left aside."""

    url: str
    count: int | None = None  # number of rows, if the corpus has an index
    files: tuple[ImageFile, ...] = ()  # images of a folder; empty for a shard
    # (file, reason) of unread files; each becomes a row without an image, so that it is counted
    aside: tuple[tuple[str, str], ...] = ()
    column: str | None = None  # field or column of captions, if it was named
    share: float = 1.0  # share of the rows that an epoch reads, in a mixture by weight
    # of each image in S3 and its texts, as they were listed
    etags: tuple[str, ...] = field(default=(), repr=False)


def find_parts(path: str | Path, column: str | None = None) -> list[Part]:
    """The parts of a corpus, in order. Raises ShardError if there are none.

    `column` names the field or the column of captions. The shards that a pattern names are not
    checked. Of a folder with our index, the shards that the index names are read, and others that
    lie beside them are left aside. Any path without a pattern is listed once.
    """
    path = patterns.absolute(str(path))
    if weights := patterns.mixture(path):
        return _mixed(path, [(find_parts(one, column), weight) for one, weight in weights])
    count_image, several = _image_limit(path), patterns.is_pattern(path)
    if not (paths := patterns.expand(path)):
        raise ShardError("The path of the corpus is empty; give a folder, a file or s3://...")
    found = [part for one in paths for part in _parts_of(one, column, several, count_image)]
    named = {one.rpartition("/")[0] for one in paths if one.endswith(SHARD_SUFFIXES)}
    for folder in sorted(named):
        refuse_unfinished(folder)
    return found


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
    read: tuple[str, ...] = SHARD_SUFFIXES
    if any(part.files for part in parts):
        read = tuple(f".{one}" for one in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES))
        read += SHARD_SUFFIXES if any(not part.files for part in parts) else ()
    roots = patterns.expand(patterns.absolute(str(path)))
    shards = {one for one in roots if storage.is_remote(one) and one.endswith(SHARD_SUFFIXES)}
    # The shards of a range on S3 are listed by folder, not one by one.
    folders = dict.fromkeys(one.rpartition("/")[0] for one in roots if one in shards)
    states = [
        [one for one in storage.list_states(folder, read) if one[0] in shards] for folder in folders
    ] + [list(storage.list_states(root, read)) for root in roots if root not in shards]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def read_corpus(path: str | Path) -> Iterator[Sample]:
    """Yield the samples of all parts of a corpus in order. Raises ShardError, StorageError."""
    for part in find_parts(path):
        yield from read_part(part)


def read_part(part: Part, etags: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield the samples of one part, always in the same order.

    `etags`: of the shard in S3, or of each image and its texts, if they must not have changed.
    Raises ShardError or StorageError for a part that is missing, broken, or has another number of
    rows than the index says, after the samples that could be read; ChangedError for a shard with
    another ETag.
    """
    rows = 0
    for sample in _read(part, etags):
        rows += 1
        yield sample
    if part.count is not None and rows != part.count:
        raise ShardError(
            f"{part.url} has {rows} rows and its index says {part.count}; copy it again."
        )


def named_by_path(part: Part) -> Iterator[str]:
    """The images that a Parquet part names by path; nothing for another part.

    Raises StorageError.
    """
    if part.url.lower().endswith(".parquet") and not part.files:
        folder = part.url.rpartition("/")[0]
        for path in named_files(_source(part.url)):
            with suppress(storage.UnsupportedError):  # `read_part` says why
                yield resolved(folder, path)


# -- rows ------------------------------------------------------------------------------------------


def row_id(part: str, position: int) -> int:
    """Signed 64-bit id of a row, from the URL of its part and its position there.

    It does not depend on the row's key, or on parts that are added to the corpus.
    """
    return int.from_bytes(
        hashlib.sha256(f"{part}#{position}".encode()).digest()[:8], "big", signed=True
    )


def find_row(path: str, number: int, column: str | None = None) -> str:
    """The part and the key of the row with this id, as "PART: KEY". Raises ShardError.

    Ids are computed, not read; only the part that holds the row is read, and those that no index
    counts.
    """
    for part in find_parts(path, column):
        if part.count is not None and number not in (
            row_id(part.url, position) for position in range(part.count)
        ):
            continue
        for position, sample in enumerate(read_part(part)):
            if row_id(part.url, position) == number:
                return f"{part.url}: {sample.key}"
    raise ShardError(
        f"{path} has no row {number}; give the corpus that the run was trained on, under the same "
        "path."
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


def _read(part: Part, etags: Sequence[str]) -> Iterator[Sample]:
    etag = "".join(etags[:1])
    if part.aside:
        yield from (Sample(file, b"", "", (), {}, reason) for file, reason in part.aside)
    elif part.files:
        yield from read_images(part.files, part.url, part.column, etags)
    elif not part.url.lower().endswith(".parquet"):
        yield from read_shard(part.url, part.url, part.column, etag)
    else:
        fetch = Fetcher(part.url.rpartition("/")[0])
        yield from read_parquet(_source(part.url, etag), part.url, fetch, part.column)
        fetch.check(part.url)


# -- finding parts ---------------------------------------------------------------------------------


def _image_limit(corpus: str) -> Callable[[str], None]:
    """A function that is called with each file of a corpus, and raises at too many images."""
    counts = Counter[bool]()

    def count(file: str) -> None:
        counts[ending(file) in IMAGE_SUFFIXES] += 1
        if counts[True] > MAX_IMAGES:
            raise ShardError(
                f"The corpus {corpus} has more than {MAX_IMAGES:,} images in files of their own; "
                "make shards first, with `tar` as docs/curation.md shows, and give their folder."
            )

    return count


def _parts_of(
    path: str, column: str | None, named: bool, found: Callable[[str], None]
) -> list[Part]:
    """Parts of one path. A shard that a pattern names need not be there.

    `found` is called with each file that is listed.
    """
    is_shard = path.lower().endswith(SHARD_SUFFIXES)
    if is_shard and (named or storage.is_remote(path) and storage.exists(path)):
        return [Part(path, column=column)]
    if not is_shard and (indexed := _read_index(path, column)):
        return indexed
    if ending(path) in IMAGE_SUFFIXES and not Path(path).is_dir():
        raise ShardError(f"{path} is a picture; give the folder that holds it and its caption.")
    listed = dict(storage.list_states(path, ("",), found))
    for file in listed:
        if file.endswith(f"/{MARKER}"):
            refuse_unfinished(file.removesuffix(f"/{MARKER}"))
    files, aside = _readable(path, listed)
    if files == [path] and not is_shard:
        raise ShardError(f"{path} is no corpus; give a .tar or .parquet file, or a folder.")
    etags = listed if storage.is_remote(path) else {}
    parts = _parts_of_files(path.rstrip("/"), files, aside, column)
    return [_with_etags(part, etags) for part in parts]


def _readable(root: str, listed: Mapping[str, str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Files with readable names that are not hidden, and (file, reason) of others in `listed`."""
    files: list[str] = []
    aside: list[tuple[str, str]] = []
    for file, state in listed.items():
        if _is_hidden(root, file):
            continue
        name = file.encode(errors="replace").decode()
        if name != file and (_is_data(file) or ending(file) in (*IMAGE_SUFFIXES, "parquet")):
            aside.append((name, ASIDE_NAME))
        elif not state:
            aside.append((file, ASIDE_LINK))
        elif name == file:
            files.append(file)
    return files, aside


def _with_etags(part: Part, etags: Mapping[str, str]) -> Part:
    files = (file for image in part.files for file in (image.path, *image.texts))
    found = tuple(etags[file].strip('"') for file in files if file in etags)
    return replace(part, etags=found) if found else part


def _parts_of_files(
    root: str, files: Sequence[str], aside: list[tuple[str, str]], column: str | None
) -> list[Part]:
    """Parts of a folder, from its files: shards, images, and files that are not read.

    `aside`: (file, reason) of more files that are not read.
    """
    images, without_image = find_images(root, files, column)
    aside += without_image
    chosen = {file for file in files if file.lower().endswith(TAR_SUFFIXES)}
    tables = [file for file in files if file.lower().endswith(".parquet")]
    paths, named = {image.path for image in images}, set[str]()
    if chosen or images:
        # img2dataset writes 00000.parquet beside 00000.tar, or beside a folder 00000 of images.
        # It has metadata of the rows but no images.
        known = {path.rpartition("/")[0] for path in paths}
        known |= {file.removesuffix(".tar") for file in chosen}
        tables = [file for file in tables if file.removesuffix(".parquet") not in known]
        reasons = {file: _no_rows(file, column) for file in tables}
        aside += [(file, reason) for file, reason in reasons.items() if reason]
        tables = [file for file in tables if not reasons[file]]
        for file in tables if images else ():
            if reasons[file] is None:
                named |= paths.intersection(named_by_path(Part(file)))
    chosen.update(tables)
    shards = [file for file in files if file in chosen]
    aside += [(file, ASIDE_KIND) for file in files if _is_data(file) and file not in chosen]
    if images or not shards:  # beside shards alone, a text is a note on them
        aside = list((dict(lone_texts(files, images)) | dict(aside)).items())
    images = [image for image in images if image.path not in named]
    parts = [Part(file, column=column) for file in shards] + [
        Part(f"{root}#{start}", files=tuple(images[start : start + FILES_PER_PART]), column=column)
        for start in range(0, len(images), FILES_PER_PART)
    ]
    if not parts:
        raise ShardError(_emptiness(root, aside))
    _warn_of_mixtures(root, shards, images)
    return [*parts, _left_aside(root, aside, column)] if aside else parts


def _no_rows(file: str, column: str | None) -> str | None:
    """Why a Parquet file beside other shards or images is not read.

    "" for a file that is read, None if it names its images by path. A damaged file counts as read:
    the error of reading it names the damage.
    """
    source = _source(file)
    if has_images(source) is not False:
        return ""
    if not names_images(source) or next(named_by_path(Part(file)), None) is None:
        return ASIDE_TABLE
    return None if has_captions(source, column) else ASIDE_SCORES


def _source(file: str, etag: str = "") -> Source:
    return storage.open_ranges(file, etag) if storage.is_remote(file) else file


def _left_aside(root: str, aside: Sequence[tuple[str, str]], column: str | None) -> Part:
    return Part(f"{root}/#aside", aside=tuple(aside), column=column)


def _is_hidden(root: str, file: str) -> bool:
    inside = file.removeprefix(root).strip("/").split("/")
    return any(name.startswith(".") or name == "__MACOSX" for name in inside)


def _is_data(file: str) -> bool:
    """Whether a file is of a kind that may hold rows, but is not read."""
    return ending(file) in NOT_READ or (ending(file) in ARCHIVES and ending(file) != "parquet")


def _emptiness(root: str, aside: Sequence[tuple[str, str]]) -> str:
    left = f", but {len(aside):,} {aside[0][1]} (such as {aside[0][0]})" if aside else ""
    pattern = storage.is_remote(root) or re.search(r"[*?,{]|::|\.\.", root)
    if not aside and not pattern and not Path(root).exists():
        return f"There is no corpus {root}: no folder or file of that name; give another path."
    if "," in root and re.search(r":[\d.]", root):
        left += "; a mixture has a weight for each corpus, as A:0.7,B:0.3"
    return (
        f"The corpus {root} is empty: no .tar or .parquet file and no image is there{left}; make "
        "the default one with `glide corpus`, or give the path of another."
    )


def _warn_of_mixtures(root: str, shards: Sequence[str], images: Sequence[ImageFile]) -> None:
    if shards and images:
        _warn(f"{root} has {len(shards):,} shards and {len(images):,} images: all are read.")
    files = [*shards, *(image.path for image in images)]
    splits = {found for file in files for found in SPLIT.findall(file.removeprefix(root).lower())}
    if "train" in splits and len(splits) > 1:
        _warn(
            f"{root} has files of {', '.join(sorted(splits))}: they are read as one corpus; give "
            "the path of one to leave out the others, such as PATH/train-*."
        )


@lru_cache(maxsize=256)
def _warn(text: str) -> None:
    """Log a warning, once in a process."""
    log.warning(text)


def _read_index(path: str, column: str | None) -> list[Part]:
    """The parts that our index of a folder names; [] without one."""
    folder = path.rstrip("/")
    try:
        index = storage.read(f"{folder}/{INDEX}").decode(errors="replace")
    except storage.MissingError:  # no other error: an index that cannot be read must not be ignored
        return []

    def part_of(entry: dict) -> dict | Part:
        """An entry at once as its part, which takes less memory; the index itself unchanged."""
        if "name" not in entry:
            return entry
        return Part(f"{folder}/{entry['name']}", entry["count"], column=column)

    try:
        named = json.loads(index, object_hook=part_of)["shards"]
        parts = list({part.url: part for part in named}.values())
    except (ValueError, KeyError, TypeError, AttributeError):  # of another program
        return []
    files = [file for file in _rows_in(folder) if posixpath.basename(file) != DROPPED]
    known = {part.url for part in parts} if files else set()
    aside = [
        (file, ASIDE_INDEX if file.lower().endswith(SHARD_SUFFIXES) else ASIDE_IMAGE)
        for file in files
        if file not in known
    ]
    return [*parts, _left_aside(folder, aside, column)] if aside else parts


def _rows_in(folder: str) -> list[str]:
    """Shards and images directly in a folder; none where one may read but not list."""
    try:
        return list_folder(folder, (*SHARD_SUFFIXES, *(f".{one}" for one in IMAGE_SUFFIXES)))
    except DeniedError as error:
        _warn(f"{folder} is read by its index alone, because it may not be listed: {error}")
        return []


def _mixed(path: str, corpora: Sequence[tuple[list[Part], float]]) -> list[Part]:
    """Parts of a mixture, each with the share of its rows that an epoch reads.

    The epoch is as long as the weights allow without reading a row twice.
    """
    total = sum(weight for _, weight in corpora)
    corpora = [(parts, weight / total) for parts, weight in corpora]
    counts = [sum(map(_count, parts)) for parts, _ in corpora]
    if not all(counts):
        raise ShardError(f"A corpus of {path} is empty; a mixture by weight needs rows of each.")
    rows = min(count / weight for count, (_, weight) in zip(counts, corpora, strict=True) if weight)
    return [
        replace(part, share=min(1.0, rows * weight / count))
        for count, (parts, weight) in zip(counts, corpora, strict=True)
        for part in parts
        if weight and not part.aside
    ]


def _count(part: Part) -> int:
    """Rows of a part. Raises ShardError for a tar that no index counts."""
    if part.count is not None or part.files or part.aside:
        return part.count or len(part.files)
    if part.url.lower().endswith(".parquet"):
        return count_rows(_source(part.url), part.url)
    raise ShardError(
        f"A mixture by weight needs the numbers of rows, and {part.url} is in no index; write one "
        "with `glide clean`."
    )
