"""A folder of images: the captions of each image are in a file of its name or in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..caption_text import find_captions, json_fault, read_meta
from ..sample import CAPTION_SUFFIXES, IMAGE_SUFFIXES, TEXT_SUFFIXES, Sample, ending
from .fetch import Fetcher
from .tables import is_table, read_tables

# Folders side by side that hold the images and the texts of the same names.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")
TEXT_FOLDERS = ("texts", "text", "txt", "captions", "caption", "prompts")
OTHER_TABLES = ("csv", "tsv", "jsonl", "json", "xlsx")
UNKNOWN_KIND = "in files with a text beside them, whose ending is not that of a picture"
NO_PICTURE = "in texts without a picture of their name"


class ImageFile(NamedTuple):
    """An image of a folder, and where its captions are."""

    path: str
    captions: tuple[str, ...] | None = None  # from a table; None: no table lists it
    texts: tuple[str, ...] = ()  # files of its name; read only without `captions`
    reason: str = ""  # why a table has no caption for it
    unread: int = 0  # damaged captions of the table
    credit: tuple[tuple[str, str], ...] = ()  # fields of the table: source, licence, author


def find_images(
    root: str, files: Sequence[str], column: str | None
) -> tuple[list[ImageFile], list[tuple[str, str]]]:
    """The images among the files of a folder, and (file or line, reason) of rows without an image.

    `column` holds the captions in tables. Raises StorageError for a table that cannot be read.
    """
    images = [file for file in files if ending(file) in IMAGE_SUFFIXES]
    tables = [file for file in files if is_table(file)]
    captions, without_image = read_tables(tables, images, column)
    texts: dict[str, list[str]] = {}
    apart: dict[str, list[str]] = {}
    for file in files:
        if ending(file) in TEXT_SUFFIXES and not is_table(file):
            texts.setdefault(_stem(file), []).append(file)
            if (key := _without(root, file, TEXT_FOLDERS)) is not None:
                apart.setdefault(key, []).append(file)
    found = []
    for file in images:
        listed = captions.get(file)
        # of 0.jpg: 0.txt, or 0.jpg.txt as programs for downloads name it
        beside = texts.get(_stem(file)) or texts.get(file, [])
        if not beside and apart and (key := _without(root, file, IMAGE_FOLDERS)) is not None:
            beside = apart.get(key, [])
        image = ImageFile(file, None, tuple(beside))
        if listed is not None:
            own = (
                listed.texts if listed.texts or not beside else None
            )  # an empty cell beats no text
            image = ImageFile(file, own, image.texts, listed.reason, listed.unread, listed.credit)
        found.append(image)
    if any(image.captions is None and not image.texts for image in found):
        found = _with_hint(found, files)
    return found, without_image


def _with_hint(images: Sequence[ImageFile], files: Sequence[str]) -> list[ImageFile]:
    """Images, with a reason if they have no caption and a table is there that is not read."""
    stems = {_stem(image.path) for image in images}
    table = next(
        (
            file
            for file in files
            if ending(file) in OTHER_TABLES
            and not is_table(file)
            and _stem(file) not in stems
            and "stats" not in file  # img2dataset's
        ),
        None,
    )
    if table is None:
        return list(images)
    name = PurePosixPath(table).name
    reason = f"without a caption: {name} is not read (metadata.csv and metadata.jsonl are)"
    return [
        image if image.captions is not None or image.texts else image._replace(reason=reason)
        for image in images
    ]


def lone_texts(files: Sequence[str], images: Sequence[ImageFile]) -> Iterator[tuple[str, str]]:
    """(file, reason) of texts without an image: the file that is perhaps the image, or the text."""
    taken = {file for image in images for file in image.texts}
    listed = {_stem(image.path) for image in images if image.captions is not None}
    lone = [
        file
        for file in files
        if ending(file) in CAPTION_SUFFIXES
        and file not in taken
        and not is_table(file)
        and _stem(file) not in listed
    ]
    if lone:
        others = {_stem(file): file for file in files if ending(file) not in TEXT_SUFFIXES}
        for file in lone:
            other = others.get(_stem(file))
            yield (file, NO_PICTURE) if other is None else (other, UNKNOWN_KIND)


def _stem(file: str) -> str:
    """A path without its ending."""
    folder, slash, name = file.rpartition("/")
    return f"{folder}{slash}{name[: name.rindex('.')] if '.' in name else name}"


def _without(root: str, file: str, folders: Sequence[str]) -> str | None:
    """Path below `root` without its ending and its first folder of these names; None without."""
    parts = _stem(file).removeprefix(f"{root}/").split("/")
    place = next((n for n, name in enumerate(parts[:-1]) if name.lower() in folders), None)
    return None if place is None else "/".join([*parts[:place], *parts[place + 1 :]])


def read_images(
    images: Sequence[ImageFile], url: str, column: str | None = None, etags: Sequence[str] = ()
) -> Iterator[Sample]:
    """Yield images with captions from a table, or from files of their name.

    `etags`: of each image and its texts in S3, if they must not have changed. Raises ShardError
    after the last image if the storage failed for a file, or one has changed.
    """
    fetch, expected = Fetcher(""), iter(etags)
    for image in images:
        etag, *etags_of_texts = (next(expected, "") for _ in (image.path, *image.texts))
        content, no_image = fetch(image.path, etag)
        captions, reason, unread = image.captions, image.reason, image.unread
        meta: dict[str, Any] = dict(image.credit)
        if captions is None:
            content_of, failures = {}, []
            for file, etag in zip(image.texts, etags_of_texts, strict=True):
                content_of[ending(file)], failed = fetch(file, etag)
                failures.append(failed)
            data = content_of.get("json")
            own = read_meta(data)
            text = next((content_of[one] for one in CAPTION_SUFFIXES if one in content_of), None)
            found = find_captions(text, own, column)
            captions, unread, meta = found.texts, unread + found.unread, meta | own
            faults = (*failures, json_fault(data, own), found.reason, reason)
            reason = next(filter(None, faults), "")
        yield Sample(
            PurePosixPath(_stem(image.path)).name,
            content,
            ending(image.path),
            captions,
            meta,
            no_image,
            reason,
            unread,
        )
    fetch.check(url)
