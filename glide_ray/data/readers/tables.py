"""Tables of captions beside images: metadata.jsonl, metadata.csv and COCO's annotations."""

from __future__ import annotations

import csv
import json
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ... import storage
from ..caption_text import CAPTION_COLUMNS, LINE, Captions, decode_text, find_captions, read_meta
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


def is_table(file: str) -> bool:
    """Whether a file is a table of captions, by its name."""
    folder, _, name = file.rpartition("/")
    return name in TABLES or (
        name.startswith("captions") and name.endswith(".json") and "annotations" in folder
    )


def read_tables(
    files: Sequence[str], images: Sequence[str], column: str | None
) -> tuple[dict[str, Captions], list[str]]:
    """Captions of images by path, and paths in the tables that are not among `images`.

    `column` holds the captions. Raises StorageError.
    """
    there, found = set(images), dict[str, Captions]()
    by_name: dict[str, list[str]] = {}
    for image in images:
        by_name.setdefault(posixpath.basename(image), []).append(image)
    missing: dict[str, None] = {}
    for file in files:
        coco = file.endswith(".json")
        for name, captions in _coco(file) if coco else _table(file, column):
            same_name = by_name.get(posixpath.basename(name), [])
            path = (
                _coco_image(same_name, file)
                if coco
                else _listed_image(posixpath.join(posixpath.dirname(file), name), same_name, file)
            )
            if path not in there:
                missing[path or name] = None
                continue
            known = found.get(path, Captions())
            found[path] = Captions(
                (*known.texts, *captions.texts),
                "" if known.texts or captions.texts else known.reason or captions.reason,
                known.unread + captions.unread,
            )
    return found, list(missing)


def _table(file: str, column: str | None) -> Iterator[tuple[str, Captions]]:
    """(path relative to the table, captions) of each row that names a file."""
    data = storage.read(file)
    rows = (
        _csv(data, file)
        if not file.endswith(".jsonl")
        else map(_json, LINE.split(decode_text(data)))
    )
    for row in rows:
        name = next((row[name] for name in ("image", *PATH_COLUMNS) if row.get(name)), None)
        if not isinstance(name, str):
            continue
        captions = find_captions(None, row, column)
        if not captions.texts and not {column, *CAPTION_COLUMNS} & set(row):
            captions = Captions((), _no_column(file, row))
        yield posixpath.normpath(name.replace("\\", "/")), captions


def _json(line: str) -> dict[str, Any]:
    return read_meta(line.encode(errors="replace"))


def _csv(data: bytes, file: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    lines = decode_text(data).replace("\0", "\ufffd").splitlines(keepends=True)
    yield from csv.DictReader(lines, delimiter=TABLES[posixpath.basename(file)])


def _no_column(file: str, row: Mapping[str, Any]) -> str:
    fields = [str(name)[:32] for name in row][:MAX_FIELDS]
    return (
        f"without a caption: {posixpath.basename(file)} has {', '.join(fields)} "
        "(--caption-column names one)"
    )


def _coco(file: str) -> Iterator[tuple[str, Captions]]:
    """(file name, captions) of the annotations of COCO; nothing for other JSON."""
    try:
        content = json.loads(storage.read(file))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in names and "caption" in annotation:
                yield (
                    names[annotation["image_id"]],
                    find_captions(None, {"caption": annotation["caption"]}),
                )
    except (ValueError, KeyError, TypeError):
        return


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
