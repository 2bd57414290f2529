"""Rows of a Parquet file: images as bytes, base64 or paths, with captions in another column.

Only columns of images, captions, sources, licences, authors and plain values are read. Text is
decoded row by row: a value that is not UTF-8 costs its own row, not the file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from ...errors import UserError
from ..caption_text import CAPTION_COLUMNS, find_captions
from ..credits import is_credit, text_of
from ..sample import IS_POINTER, POINTER, Sample, ShardError, image_suffix

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "images")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "url")
ROWS_PER_BATCH, BATCH_BYTES = 64, 2**26  # at most, to be read together
BUFFER = 2**22  # bytes of a column that are read together
MAX_PATH, MAX_NAME = 4096, 255  # bytes of a path, and of each name in it
URL_SAFE = bytes.maketrans(b"-_", b"+/")
SEVERAL = "with a list of several images"
NOT_AN_IMAGE = "with an image column that holds neither bytes nor a path"
UNREADABLE = "with a value that cannot be read"
NOT_DOWNLOADED = "with a URL in place of an image (img2dataset downloads them)"

Source = str | IO[bytes]  # a path, or a file in which one can seek
Fetch = Callable[[str], tuple[bytes, str]]  # path -> content, and why there is none


@dataclass(frozen=True)
class _Columns:
    """Columns to read. `needed` are those of images and captions."""

    images: tuple[str, ...]
    needed: tuple[str, ...]
    others: tuple[str, ...]  # plain values and credits, for a row's `meta`


def has_images(source: Source) -> bool | None:
    """Whether a Parquet file has a column that may be of images, not only of paths and URLs.

    None if it cannot be read.
    """
    try:
        schema = _open(source).schema_arrow
    except UserError:
        raise
    except Exception:  # pyarrow raises many kinds for a damaged footer
        return None
    import pyarrow

    return any(
        "binary" in str(field.type)
        or (field.name in IMAGE_COLUMNS and not _is_text(pyarrow, field.type))
        for field in schema
    )


def count_rows(source: Source, url: str) -> int:
    """Rows of a Parquet file, from its footer. Raises ShardError."""
    try:
        return _open(source).metadata.num_rows
    except UserError:
        raise
    except Exception:
        raise ShardError(f"{url} is not a whole Parquet file; copy it again.") from None


def named_files(source: Source) -> Iterator[str]:
    """The paths of images in a Parquet file that has no column of image bytes, in its order.

    Raises UserError of the storage. A damaged file gives those before the damage.
    """
    try:
        table = _open(source)
        names = [
            name for name in (*IMAGE_COLUMNS, *PATH_COLUMNS) if name in table.schema_arrow.names
        ]
        if not all(_is_text_column(table.schema_arrow, name) for name in names):
            return
        for row in _rows(table, names):
            values = (row[name] for name in names if isinstance(row[name], str))
            yield from (one for one in values if _names_file(one))
    except UserError:
        raise
    except Exception:  # as in `read_parquet`, which says so
        return


def _names_file(text: str) -> bool:
    web = text.startswith(("http://", "https://"))
    return bool(text) and not web and _is_path(text) and _decoder(text.encode()) is None


def names_images(source: Source) -> bool:
    """Whether a Parquet file has a column of paths, and is no list of URLs of img2dataset."""
    try:
        names = set(_open(source).schema_arrow.names)
    except UserError:
        raise
    except Exception:
        return False
    return bool(names & {*IMAGE_COLUMNS, *PATH_COLUMNS} - {"url"})


def has_captions(source: Source, column: str | None) -> bool:
    """Whether a Parquet file has a column of captions: `column`, or one with a usual name."""
    return not {column, *CAPTION_COLUMNS}.isdisjoint(_open(source).schema_arrow.names)


def read_parquet(
    source: Source, url: str, fetch: Fetch, column: str | None = None
) -> Iterator[Sample]:
    """Yield the rows of a file, in order.

    `url` is used in error messages and keys, `fetch` reads the images at paths, `column` holds the
    captions. Raises ShardError for a file that is missing or broken, after the rows before the
    damage.
    """
    try:
        table = _open(source)
        chosen = _choose(url, table.schema_arrow, column)
    except FileNotFoundError:
        raise ShardError(f"There is no file {url}.") from None
    except UserError:
        raise
    except Exception:  # pyarrow raises many kinds for a damaged footer
        why = IS_POINTER if _is_pointer(source) else "is not a whole Parquet file; copy it again."
        raise ShardError(f"{url} {why}") from None
    position = 0
    # Damage in a column of `meta` must not cost the images behind it: without it, go on.
    for names in ([*chosen.needed, *chosen.others], chosen.needed):
        try:
            for number, row in enumerate(_rows(table, names)):
                if number >= position:
                    position += 1
                    yield _sample(row, chosen, url, number, fetch, column)
            return
        except UserError:  # of the storage
            raise
        except Exception:  # pyarrow raises many kinds for a damaged page
            continue
    raise ShardError(f"{url} is broken after its first {position:,} rows; copy it again.") from None


def _open(source: Source) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet  # comes with ray[data]; not needed to read tars

    # Without these, pyarrow reads a whole column of a row group at once.
    return pyarrow.parquet.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)


def _is_pointer(source: Source) -> bool:
    with suppress(OSError), open(source, "rb") if isinstance(source, str) else source as file:
        file.seek(0)
        return file.read(len(POINTER)) == POINTER
    return False


def _choose(url: str, schema: pyarrow.Schema, column: str | None) -> _Columns:
    """The columns to read. Raises ShardError if there is none of images or none of captions."""
    import pyarrow

    names = schema.names
    columns = (*IMAGE_COLUMNS, *PATH_COLUMNS)
    images = [name for name in columns if name in names]
    # A column of bytes is preferred to a name beside it.
    images.sort(key=lambda name: names.count(name) == 1 and _is_text_column(schema, name))
    captions = [name for name in (column or "", *CAPTION_COLUMNS) if name in names]
    twice = next((name for name in (*images, *captions) if names.count(name) > 1), None)
    if twice is not None:
        raise ShardError(f"{url} has several columns named {twice}; rename all but one.")
    for found, wanted, remedy in (
        (images, columns, "; rename that of the images to image"),
        (captions, CAPTION_COLUMNS, "; name one with --caption-column (data.caption_column)"),
    ):
        if not found:
            raise ShardError(
                f"{url} has no column named {' or '.join(wanted)}; it has: {', '.join(names)}"
                f"{remedy}."
            )
    needed = dict.fromkeys([*images, *captions, *(["key"] if "key" in names else [])])
    return _Columns(
        tuple(images),
        tuple(needed),
        tuple(
            name
            for name in names
            if name not in needed
            and (is_credit(name) or _is_plain(pyarrow, schema.field(name).type))
        ),
    )


def _is_text_column(schema: pyarrow.Schema, name: str) -> bool:
    import pyarrow

    return _is_text(pyarrow, schema.field(name).type)


def _is_text(arrow: Any, kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    return arrow.types.is_string(kind) or arrow.types.is_large_string(kind)


def _is_plain(arrow: Any, kind: pyarrow.DataType) -> bool:
    of = arrow.types
    return (
        _is_text(arrow, kind) or of.is_integer(kind) or of.is_floating(kind) or of.is_boolean(kind)
    )


# -- values ----------------------------------------------------------------------------------------


def _rows(table: pyarrow.parquet.ParquetFile, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for batch in table.iter_batches(_rows_per_batch(table), columns=list(names)):
        values = {name: _values(batch.column(name)) for name in batch.schema.names}
        for number in range(batch.num_rows):
            yield {name: column[number] for name, column in values.items()}


def _rows_per_batch(table: pyarrow.parquet.ParquetFile) -> int:
    """ROWS_PER_BATCH, or fewer if some row group has rows that are large on average."""
    groups = (table.metadata.row_group(n) for n in range(table.num_row_groups))
    largest = max((one.total_byte_size / max(1, one.num_rows) for one in groups), default=0)
    return max(1, min(ROWS_PER_BATCH, int(BATCH_BYTES / max(1.0, largest))))


def _values(column: pyarrow.Array) -> list:
    """Python values of a column, text with U+FFFD for bytes that are not UTF-8.

    A value that cannot be converted is an exception in its place.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    as_bytes = _bytes_type(pyarrow, kind)
    try:
        if as_bytes == kind:
            return column.to_pylist()
        return [_decoded(pyarrow, value, kind) for value in column.cast(as_bytes).to_pylist()]
    except Exception:
        values: list[Any] = []
        for value in column:
            try:
                values.append(value.as_py())
            except Exception as error:
                values.append(error)
        return values


def _bytes_type(arrow: Any, kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type with binary in place of text, which pyarrow converts without a check of UTF-8."""
    of = arrow.types
    if of.is_string(kind):
        return arrow.binary()
    if of.is_large_string(kind):
        return arrow.large_binary()
    if of.is_list(kind):
        return arrow.list_(_bytes_type(arrow, kind.value_type))
    if of.is_large_list(kind):
        return arrow.large_list(_bytes_type(arrow, kind.value_type))
    if of.is_struct(kind):
        return arrow.struct([(field.name, _bytes_type(arrow, field.type)) for field in kind])
    return kind


def _decoded(arrow: Any, value: Any, kind: pyarrow.DataType) -> Any:
    """A value read as `_bytes_type(kind)` in the form that `kind` has."""
    of = arrow.types
    if value is None:
        return None
    if _is_text(arrow, kind):
        return value.decode(errors="replace")
    if of.is_list(kind) or of.is_large_list(kind):
        return [_decoded(arrow, one, kind.value_type) for one in value]
    if of.is_struct(kind):
        return {field.name: _decoded(arrow, value[field.name], field.type) for field in kind}
    return value


# -- rows ------------------------------------------------------------------------------------------


def _sample(
    row: dict[str, Any],
    chosen: _Columns,
    url: str,
    number: int,
    fetch: Fetch,
    column: str | None,
) -> Sample:
    content, reason, source = b"", "", ""
    for name in chosen.images:
        content, why = _content(row[name], fetch)
        reason, source = reason or why, name
        if content:
            break
    found = find_captions(None, {name: _plain(value) for name, value in row.items()}, column)
    broken = any(
        isinstance(row[name], Exception) for name in chosen.needed if name not in chosen.images
    )
    captions = column if column in row else next((n for n in CAPTION_COLUMNS if n in row), "")
    value = row[source]
    path = isinstance(value, str) and _is_path(value) and _decoder(value.encode()) is None
    used = {captions, "" if path else source}
    key = row.get("key")
    return Sample(
        str(key) if isinstance(key, (str, int)) else f"{PurePosixPath(url).stem}-{number:06d}",
        content,
        image_suffix(content) or "jpg",
        found.texts,
        {
            name: value
            for name, value in ((name, _meta_value(name, row[name])) for name in row)
            if name not in used and isinstance(value, (str, int, float))
        },
        no_image="" if content else reason,
        no_caption=UNREADABLE if broken else found.reason,
        captions_unread=found.unread,
    )


def _meta_value(name: str, value: Any) -> Any:
    """A value for `meta`; that of a source, licence or author in any form as text."""
    plain = isinstance(value, (str, int, float))
    return value if plain or not is_credit(name) else text_of(value) or None


def _plain(value: Any) -> Any:
    return None if isinstance(value, Exception) else value


def _content(value: Any, fetch: Fetch) -> tuple[bytes, str]:
    """Bytes of an image from a cell, and the reason if there are none.

    A cell holds bytes, a path, base64, Hugging Face's {bytes, path}, a list with one of these, or a
    list of numbers.
    """
    if value is None:
        return b"", ""
    if isinstance(value, Exception):
        return b"", UNREADABLE
    if isinstance(value, dict):
        if not value.keys() & {"bytes", "path"}:
            return b"", NOT_AN_IMAGE
        return _content(value.get("bytes") or value.get("path"), fetch)
    if isinstance(value, list):
        return _content_of_list(value, fetch)
    if isinstance(value, bytes):
        decode = _decoder(value)
        return (decode(value) if decode else value), ""
    if not isinstance(value, str):
        return b"", NOT_AN_IMAGE
    if decode := _decoder(text := value.encode(errors="replace")):
        return decode(text), ""
    if value.startswith(("http://", "https://")):
        return b"", NOT_DOWNLOADED
    if not value:
        return b"", ""
    return fetch(value) if _is_path(value) else (b"", NOT_AN_IMAGE)


def _content_of_list(values: list, fetch: Fetch) -> tuple[bytes, str]:
    """Bytes of the image in a list: its only item, or numbers, signed or not."""
    if values and all(isinstance(one, int) and -128 <= one < 256 for one in values):
        return bytes(one & 255 for one in values), ""
    if len(values) < 2:
        return _content(values[0], fetch) if values else (b"", "")
    several = all(one is None or isinstance(one, (bytes, str, dict)) for one in values)
    return b"", SEVERAL if several else NOT_AN_IMAGE


def _is_path(text: str) -> bool:
    """Whether text may be a path: anything longer is an image in an encoding that is not known."""
    data = text.encode(errors="replace")
    names = max(map(len, data.replace(b"\\", b"/").split(b"/")))
    return len(data) < MAX_PATH and names <= MAX_NAME and b"\0" not in data and b"\n" not in data


def _decoder(text: bytes) -> Callable[[bytes], bytes] | None:
    """The function that decodes an image in base64 or hexadecimal digits; None for other content.

    Base64 may follow `data:...;base64,`, may have line breaks, "-" and "_" in the place of "+" and
    "/", and lack the padding; hexadecimal digits may follow the "\\x" of PostgreSQL.
    """
    head = text[:128].lstrip()
    if head.startswith(b"data:"):
        head = head.partition(b"base64,")[2]
    digits = head.removeprefix(b"\\x")[:24]
    with suppress(binascii.Error, ValueError):
        if len(text) >= 64 and image_suffix(binascii.unhexlify(digits)):
            return _from_hexadecimal
    with suppress(binascii.Error, ValueError):
        if len(text) >= 64 and image_suffix(
            base64.b64decode(head[:24].translate(URL_SAFE), validate=True)
        ):
            return _from_base64
    return None


def _from_hexadecimal(text: bytes) -> bytes:
    digits = b"".join(text.lstrip().removeprefix(b"\\x").split())
    try:
        return binascii.unhexlify(digits[: len(digits) // 2 * 2])
    except binascii.Error:
        return b""


def _from_base64(text: bytes) -> bytes:
    """The bytes of base64 text; without its last digit if that makes no byte."""
    if text[:64].lstrip().startswith(b"data:"):
        text = text.partition(b"base64,")[2]
    digits = b"".join(text.translate(URL_SAFE).split()).rstrip(b"=")
    digits = digits[: len(digits) - (len(digits) % 4 == 1)]
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4))
    except (binascii.Error, ValueError):
        return b""
