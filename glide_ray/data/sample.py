"""One row of a corpus, whatever form it was read from, and the endings of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import UserError

# Endings of pictures that Pillow decodes here, in order of preference for a row with several.
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "jfif", "avif", "gif", "bmp", "tif", "tiff"),
    *("jp2", "j2k", "jpx", "jpf", "jpe", "apng"),
)
CAPTION_SUFFIXES = ("txt", "caption")
TEXT_SUFFIXES = (*CAPTION_SUFFIXES, "json")
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.zst", ".tzst", ".tar.lz4"),
)
SHARD_SUFFIXES = (*TAR_SUFFIXES, ".parquet")
ARCHIVES = (
    *("tar", "tgz", "gz", "tbz2", "tbz", "bz2", "txz", "xz", "tzst", "zst", "lz4", "lzma", "br"),
    *("zip", "rar", "7z", "parquet", "arrow"),
)
# Files of pictures, or of whole corpora, that are not read.
NOT_READ = (
    *("heic", "heif", "jxl", "svg", "psd", "ico", "tga", "exr", "hdr", "ppm", "eps", "pdf"),
    *("cr2", "nef", "arw", "dng", "raw", "orf", "pgm", "pbm", "pnm", "dib"),
    *("tfrecord", "h5", "hdf5", "lmdb", "npz", "mdb", "beton", "pq", "parq", "feather", "orc"),
    *("avro", "pkl", "pickle", "sqlite", "msgpack"),
)
# Git leaves pointers in the place of large files that it was not told to fetch.
POINTER = b"version https://git-lfs"
IS_POINTER = "is a pointer of Git LFS; run `git lfs pull`."
MAGIC = {  # first bytes of a picture -> ending
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP": "jp2",
    b"\xff\x4f\xff\x51": "j2k",
}

Row = TypeVar("Row")


class ShardError(UserError):
    """A corpus that cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One image with its captions. `meta` is the content of the sample's .json file.

    `no_image` and `no_caption` say why a row has none, and complete a count of rows as the names
    of rules do: "3 with a caption that is not UTF-8". "" if nothing is known beyond that.
    """

    key: str
    image: bytes
    suffix: str  # of the image's file, without a dot
    captions: tuple[str, ...]
    meta: Mapping[str, Any]
    no_image: str = ""
    no_caption: str = ""
    captions_unread: int = 0  # damaged captions that were left out

    @property
    def bytes(self) -> int:
        """Size of the encoded image and the captions."""
        return len(self.image) + sum(map(len, self.captions))


def in_groups(
    rows: Iterable[Row], count: int, limit: int, bytes_of: Callable[[Row], int]
) -> Iterator[list[Row]]:
    """Consecutive rows in groups. A group ends with row `count`, or the row that reaches `limit`.

    `limit`: bytes, as `bytes_of` gives them. A group exceeds it by less than one row.
    """
    group, held = list[Row](), 0
    for row in rows:
        group.append(row)
        held += bytes_of(row)
        if len(group) >= count or held >= limit:
            yield group
            group, held = [], 0
    if group:
        yield group


def image_suffix(content: bytes) -> str:
    """File ending of an image by its first bytes; "" for other content."""
    if content[8:12] == b"WEBP":
        return "webp"
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((suffix for head, suffix in MAGIC.items() if content.startswith(head)), "")


def ending(name: str) -> str:
    """Ending of a file's name in lower case, without a dot; "" if it has none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""
