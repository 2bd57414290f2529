"""Captions of a row, from a text file, a JSON object or a cell of a table.

Each line of a text file is a caption. Texts that are damaged are left out and counted: bytes that
are not UTF-8 (UTF-16 and UTF-32 are read if they begin with a byte order mark), U+FFFD, NUL. Empty
texts, NaN and the words that programs write for a missing value are no captions.
"""

from __future__ import annotations

import codecs
import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Fields of captions, in order of preference. The text file comes after the first two.
CAPTION_FIELDS = ("captions", "caption")
TEXT_FIELDS = ("text", "txt", "TEXT")
CAPTION_COLUMNS = (*CAPTION_FIELDS, *TEXT_FIELDS)
INNER_FIELDS = ("caption", "text", "raw", "sentence", "value")  # of a caption that is an object
LANGUAGE = re.compile(r"[a-z]{2,3}([-_]\w+)?", re.IGNORECASE)
MARKS = (  # byte order mark -> encoding; UTF-32 before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LINE = re.compile(r"\r\n|\r|\n")
# tags that web pages leave in a caption; other text in angle brackets stays
TAG = re.compile(
    r"</?(?:p|br|b|i|em|strong|u|a|span|div|font|small|sup|sub|li|ul|ol|h[1-6])"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
ENTITY = re.compile(r"&(?:#\d+|#x[0-9a-f]+|[a-z][a-z0-9]+);", re.IGNORECASE)
# zero-width spaces and marks of direction; joiners stay, which emoji and some scripts need
INVISIBLE = re.compile("[\ufeff\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069]")
SURROGATE = re.compile("[\ud800-\udfff]")
# as Python, NumPy, JSON, pandas, spreadsheets and JavaScript write a missing value
NO_CAPTION = ("none", "nan", "null", "<na>", "n/a", "#n/a", "undefined")
NO_JSON = "with a json that cannot be read"
NOT_UTF8 = "with a caption that is not UTF-8"
DAMAGED = "with a damaged caption (U+FFFD or NUL)"
NO_FIELD = "without a caption in its json (--caption-column names the field)"
UNKNOWN_FORM = "with a caption of a form that is not read"


@dataclass(frozen=True)
class Captions:
    """Captions of a row. `reason` says why there is none; `unread` counts those left out."""

    texts: tuple[str, ...] = ()
    reason: str = ""
    unread: int = 0


def find_captions(
    text: bytes | None, meta: Mapping[str, Any], column: str | None = None
) -> Captions:
    """Captions of a row from its text file and the fields of its JSON or of its table.

    The first place with captions wins: `column` if it is given, `captions`, `caption`, the text
    file, `text`, `txt`, `TEXT`.
    """
    first = tuple(filter(None, (column, *CAPTION_FIELDS)))
    places = [*((meta.get(name),) for name in first), _lines(text)]
    places += [(meta.get(name),) for name in TEXT_FIELDS]
    faults: list[str] = []
    for values in places:
        texts: list[str] = []
        before = len(faults)
        for value in values:
            texts += _texts(value, faults)
        if texts:
            return Captions(tuple(texts), unread=len(faults) - before)
    if faults:
        return Captions((), faults[0], len(faults))
    named = text is not None or any(name in meta for name in (*CAPTION_COLUMNS, column))
    return Captions((), "" if named or not meta else NO_FIELD)


def captions_of(text: str | None, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Captions of a row whose text file has the content `text`; () if there is none."""
    return find_captions(text.encode(errors="replace") if text else None, meta).texts


def read_meta(data: bytes | None) -> dict[str, Any]:
    """Parse a sample's .json; {} if it is missing or not a JSON object.

    A list of texts becomes `captions`. NaN, which is not JSON, becomes None. Lone surrogates, which
    JSON allows and UTF-8 does not, become U+FFFD: a caption with one is damaged.
    """
    try:
        meta = json.loads(data or b"{}", parse_constant=lambda _: None)
        if b"\\ud" in (data or b"").lower():
            meta = json.loads(SURROGATE.sub("\ufffd", json.dumps(meta, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return {}
    if isinstance(meta, list) and all(isinstance(value, str) for value in meta):
        return {"captions": meta}
    return meta if isinstance(meta, dict) else {}


def json_fault(data: bytes | None, meta: Mapping[str, Any]) -> str:
    """The reason for having no captions if the JSON `data` is damaged; "" otherwise.

    `meta`: the result of `read_meta(data)`.
    """
    return NO_JSON if data and not meta and data.strip() not in (b"{}", b"[]", b"null") else ""


def decode_text(data: bytes) -> str:
    """Text of a file, by its byte order mark or as UTF-8, with U+FFFD for other bytes."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, errors="replace")
    return data.decode(errors="replace")


def _lines(data: bytes | None) -> Sequence[str | bytes]:
    """Lines of a text file: as bytes if it is UTF-8, so that each is decoded by itself."""
    if not data:
        return ()
    if any(data.startswith(mark) for mark, _ in MARKS):
        return LINE.split(decode_text(data))
    return re.split(rb"\r\n|\r|\n", data)


def _texts(value: object, faults: list[str], depth: int = 0) -> Iterator[str]:
    """Captions in one value of any form; adds a reason to `faults` for each that is left out."""
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError:
            faults.append(NOT_UTF8)
            return
    if isinstance(value, float) and not math.isfinite(value):
        return
    if isinstance(value, (int, float)):
        value = str(value)
    if isinstance(value, str):
        caption = clean_text(value)  # an entity such as &#0; becomes U+FFFD
        if any(mark in text for mark in "\ufffd\0" for text in (value, caption)):
            faults.append(DAMAGED)
        elif caption:
            yield caption
    elif isinstance(value, Sequence) and value and depth < 3 and isinstance(value[0], tuple):
        yield from _of_object(dict(value), faults, depth)  # pyarrow's form of a map
    elif isinstance(value, Sequence) and depth < 3:
        for one in value:
            yield from _texts(one, faults, depth + 1)
    elif isinstance(value, Mapping) and depth < 3:
        yield from _of_object(value, faults, depth)
    else:
        faults.append(UNKNOWN_FORM)


def _of_object(value: Mapping, faults: list[str], depth: int) -> Iterator[str]:
    """Captions in an object: in a field with a usual name, or one for each language."""
    for name in INNER_FIELDS:
        if name in value:
            yield from _texts(value[name], faults, depth + 1)
            return
    if value and all(LANGUAGE.fullmatch(str(name)) for name in value):
        for one in value.values():
            yield from _texts(one, faults, depth + 1)
    elif value:
        faults.append(UNKNOWN_FORM)


def clean_text(text: str) -> str:
    """A caption without tags, entities, invisible marks and surrounding blanks; "" for none."""
    if "<" in text:
        text = TAG.sub("", text)
    if "&" in text:
        text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
    text = INVISIBLE.sub("", text).strip()
    return "" if text.lower() in NO_CAPTION else text
