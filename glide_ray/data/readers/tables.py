"""Tables of captions beside images: metadata.jsonl, metadata.csv and COCO's annotations."""

from __future__ import annotations

import csv
import io
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ... import storage
from ..caption_text import (
    CAPTION_COLUMNS,
    LINE,
    Captions,
    decode_text,
    find_captions,
    json_fault,
    read_meta,
)
from ..credits import credit_fields
from .parquet import PATH_COLUMNS

# as in Hugging Face's ImageFolder; one {"file_name": ..., "text": ...} per line
METADATA = "metadata.jsonl"
TABLES = {  # file -> what separates its columns
    METADATA: "",
    "metadata.csv": ",",
    "metadata.tsv": "\t",
    "captions.csv": ",",
    "captions.txt": ",",  # of Flickr8k
}
MAX_FIELDS = 8  # fields named in a reason
NOT_LISTED = "listed in a table of captions without their image"
NOT_JSON = "in lines of a table that are not JSON"
NAMELESS = "in lines of a table that name no file (file_name, path or image)"
TORN = "in lines of a table with a quotation mark that is not closed"
SHORT = "in lines of a table that have fewer fields than its heading"
LONG = "in lines of a table that have more fields than its heading (quote captions with commas)"
NOT_COCO = "in annotations of another form than those of COCO"


def is_table(file: str) -> bool:
    """Whether a file is a table of captions, by its name."""
    folder, _, name = file.rpartition("/")
    return name in TABLES or (
        name.startswith("captions") and name.endswith(".json") and "annotations" in folder
    )


class Listed(NamedTuple):
    """A row of a table: a file with its captions and credit, or why there is none."""

    name: str  # path relative to the table; of a line that cannot be read: its place
    texts: tuple[str, ...] = ()
    reason: str = ""
    unread: int = 0
    credit: tuple[tuple[str, str], ...] = ()
    fault: str = ""

    def with_row(self, row: Listed) -> Listed:
        """The captions of this row and of another one of the same file."""
        texts = (*self.texts, *row.texts)
        reason = "" if texts else self.reason or row.reason
        unread, credit = self.unread + row.unread, self.credit or row.credit
        return Listed(self.name, texts, reason, unread, credit)


def read_tables(
    files: Sequence[str], images: Sequence[str], column: str | None
) -> tuple[dict[str, Listed], list[tuple[str, str]]]:
    """Rows of images by path, and (file or line, reason) of rows without one of `images`.

    `column` holds the captions. Raises StorageError.
    """
    there, found = set(images), dict[str, Listed]()
    by_name: dict[str, list[str]] = {}
    for image in images:
        by_name.setdefault(posixpath.basename(image), []).append(image)
    without_image: dict[str, str] = {}
    for file in files:
        coco = file.endswith(".json")
        for row in _coco(file) if coco else _table(file, column):
            if row.fault:
                without_image[row.name] = row.fault
                continue
            same_name = by_name.get(posixpath.basename(row.name), [])
            folder = posixpath.dirname(file)
            path = (
                _coco_image(same_name, file)
                if coco
                else _listed_image(posixpath.join(folder, row.name), same_name, file)
            )
            if path is None or path not in there:
                without_image[path or row.name] = NOT_LISTED
            else:
                found[path] = found[path].with_row(row) if path in found else row
    return found, list(without_image.items())


def _table(file: str, column: str | None) -> Iterator[Listed]:
    """The rows of a table, with a fault for each line that names no file or is damaged."""
    text = decode_text(storage.read(file))
    lines = _json_lines(text) if file.endswith(".jsonl") else _csv_lines(text, file)
    for number, row, fault in lines:
        name = next((row[name] for name in ("image", *PATH_COLUMNS) if row.get(name)), None)
        if not isinstance(name, str):
            yield Listed(f"{file}:{number}", fault=fault or NAMELESS)
            continue
        name = posixpath.normpath(name.replace("\\", "/"))
        captions = find_captions(None, row, column)
        if fault == LONG or (fault and not captions.texts):
            captions = Captions((), fault, 1)
        elif not captions.texts and not {column, *CAPTION_COLUMNS} & set(row):
            captions = Captions((), _no_column(file, row))
        yield Listed(name, captions.texts, captions.reason, captions.unread, credit_fields(row))


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(number from 1, object, fault) of each line that is not empty."""
    for number, line in enumerate(LINE.split(text), 1):
        data = line.encode(errors="replace")
        if line.strip():
            row = read_meta(data)
            yield number, row, NOT_JSON if json_fault(data, row) else ""


def _csv_lines(text: str, file: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(number of its line from 1, row by the heading, fault) of each row after the heading."""
    heading: list[str] = []
    first, delimiter = LINE.split(text, maxsplit=1)[0], TABLES[posixpath.basename(file)]
    if delimiter not in first:  # programs write semicolons where a comma is the decimal point
        delimiter = next((one for one in ";\t" if one in first), delimiter)
    for number, cells in _cells(text, delimiter):
        if cells is None:
            yield number, {}, TORN
        elif not heading:
            heading = cells
        elif cells:
            fault = LONG if any(cells[len(heading) :]) else ""
            fault = SHORT if len(cells) < len(heading) else fault
            yield number, dict(zip(heading, cells, strict=False)), fault


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """(number of its first line, cells) of each row; None for a quotation mark without a partner.

    Such a mark costs its own line, not all lines up to the next mark.
    """
    csv.field_size_limit(sys.maxsize)
    # newline="": lines end at line feeds and carriage returns, not at the other separators
    lines = list(io.StringIO(text.replace("\0", "\ufffd"), newline=""))
    style: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": True}
    place = 0
    while place < len(lines):
        start = place
        reader = csv.reader((lines[n] for n in range(start, len(lines))), strict=True, **style)
        try:
            for cells in reader:
                yield place + 1, cells
                place = start + reader.line_num
        except csv.Error:
            line = lines[place]
            # marks in pairs, such as "a" b, are read as a spreadsheet does
            pairs = line.count('"') % 2 == 0
            yield place + 1, next(csv.reader([line], **style)) if pairs else None
            place += 1


def _no_column(file: str, row: Mapping[str, Any]) -> str:
    fields = [str(name)[:32] for name in row][:MAX_FIELDS]
    return (
        f"without a caption: {posixpath.basename(file)} has {', '.join(fields)} "
        "(--caption-column names one)"
    )


def _coco(file: str) -> Iterator[Listed]:
    """The annotations of COCO, with a fault for a file that cannot be read or is none of them."""
    data = storage.read(file)
    content = read_meta(data)
    if fault := json_fault(data, content):
        yield Listed(file, fault=fault)
        return
    images, annotations = content.get("images"), content.get("annotations")
    if not isinstance(images, list) or not isinstance(annotations, list):
        yield Listed(file, fault=NOT_COCO)
        return
    licences = {str(one.get("id")): one for one in _objects(content.get("licenses"))}
    named = {str(one.get("id")): one for one in _objects(images) if one.get("file_name")}
    for annotation in _objects(annotations):
        number = str(annotation.get("image_id"))
        if "caption" not in annotation:  # of an object in the image
            continue
        if (image := named.get(number)) is None:
            yield Listed(f"{file}#{number}", fault=NOT_LISTED)
            continue
        found = find_captions(None, {"caption": annotation["caption"]})
        licence = image.get("license")
        row = {**image, "license": licences.get(str(licence), licence)}
        credit = credit_fields(row)
        yield Listed(str(image["file_name"]), found.texts, found.reason, found.unread, credit)


def _objects(values: Any) -> list[dict[str, Any]]:
    return [one for one in values if isinstance(one, dict)] if isinstance(values, list) else []


def _listed_image(path: str, images: Sequence[str], file: str) -> str:
    """The image at a path; else the only one of its name in a folder below the table."""
    below = [image for image in images if image.startswith(f"{posixpath.dirname(file)}/")]
    return below[0] if path not in images and len(below) == 1 else path


def _coco_image(images: Sequence[str], file: str) -> str | None:
    """The image with the name that annotations give; of several, that of the annotations' split.

    captions_train2017.json goes with the folder train2017.
    """
    split = posixpath.basename(file).removesuffix(".json").rpartition("_")[2]
    same = [image for image in images if split in image.split("/")]
    return next(iter(same or images), None)
