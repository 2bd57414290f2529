"""Image-text shards: WebDataset tars in img2dataset's layout.

`000000.tar` holds KEY.webp, KEY.txt and KEY.json of each sample. `index.json` is written last: a
folder that has it is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import MissingError, is_remote, put, read, remove, size

INDEX = "index.json"
IMAGE_SUFFIXES, TEXT_SUFFIXES = ("jpg", "jpeg", "png", "webp"), ("txt", "json")
# raised by tarfile for damaged files: links to nowhere or to themselves, broken lengths
BROKEN = (
    tarfile.TarError,
    OSError,
    KeyError,
    ValueError,
    OverflowError,
    RecursionError,
)


class ShardError(UserError):
    """A corpus that cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One image with its captions. `meta` is the content of the sample's .json file."""

    key: str
    image: bytes
    suffix: str  # of the image's file, without a dot
    captions: tuple[str, ...]
    meta: Mapping[str, Any]


def write_shards(
    folder: str | Path, samples: Iterable[Sample], per_shard: int = 1000
) -> dict[str, Any]:
    """Write all samples and then the index, each file atomically. Returns the index."""
    begin(folder)
    rest = iter(samples)
    batches = iter(lambda: list(islice(rest, per_shard)), [])
    return finish(
        folder, [write_shard(folder, number, batch) for number, batch in enumerate(batches)]
    )


def begin(folder: str | Path) -> None:
    """Delete the index of an earlier corpus: the folder is incomplete until `finish`."""
    remove(f"{str(folder).rstrip('/')}/{INDEX}")


def write_shard(folder: str | Path, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """Write one shard atomically, local or s3://. Returns its entry for the index."""
    buffer = io.BytesIO()
    names: set[str] = set()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for sample in samples:
            name = _free_name(sample.key, names)
            names.add(name)
            meta = {
                **sample.meta,
                "key": sample.key,
                "caption": sample.captions[0] if sample.captions else "",
                "captions": list(sample.captions),
            }
            for suffix, content in (
                (sample.suffix, sample.image),
                ("txt", meta["caption"].encode(errors="replace")),
                ("json", json.dumps(meta, ensure_ascii=False).encode(errors="replace")),
            ):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data, name = buffer.getvalue(), f"{number:06d}.tar"
    put(data, f"{str(folder).rstrip('/')}/{name}")
    return {
        "name": name,
        "count": len(samples),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def finish(folder: str | Path, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the index of a corpus, after all of its shards. Returns the index.

    In a local folder, deletes the other shards, which an earlier and longer corpus left there.
    """
    if not is_remote(folder):
        for stale in set(Path(folder).glob("*.tar")) - {
            Path(folder) / shard["name"] for shard in shards
        }:
            if re.fullmatch(r"\d{6}\.tar", stale.name):  # a name that `write_shard` gives
                stale.unlink()
    index = {"count": sum(shard["count"] for shard in shards), "shards": list(shards)}
    put(json.dumps(index, indent=1).encode(), f"{str(folder).rstrip('/')}/{INDEX}")
    return index


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of a folder or s3:// prefix, or None if it is not complete.

    Not complete: without an index, or with a shard that is missing or has another size.
    """
    folder = str(folder).rstrip("/")
    try:
        index = json.loads(read(f"{folder}/{INDEX}"))
        return (
            index
            if all(size(f"{folder}/{shard['name']}") == shard["bytes"] for shard in index["shards"])
            else None
        )
    except (MissingError, ValueError, KeyError):
        return None


def read_shard(data: bytes | str | Path, name: str | None = None) -> Iterator[Sample]:
    """Yield the samples of one tar in order, also those without an image or a caption.

    Raises ShardError for a broken or truncated tar, after the samples before the damage. `name` is
    used in error messages.
    """
    name = name or ("a shard" if isinstance(data, bytes) else str(data))
    try:
        tar = (
            tarfile.open(fileobj=io.BytesIO(data), mode="r:")
            if isinstance(data, bytes)
            else tarfile.open(data, mode="r:")
        )
    except FileNotFoundError:
        raise ShardError(f"There is no file {name}.") from None
    except BROKEN:
        raise ShardError(f"{name} is not a tar file; copy it again.") from None
    with tar:
        parts: dict[str, bytes] = {}
        current, ended = "", True
        try:
            for member in tar:
                key, suffix = _key_and_suffix(member.name)
                if not suffix:
                    continue
                if key != current and parts:
                    yield from _sample(current, parts)
                    parts = {}
                current = key
                content = tar.extractfile(member)
                if content is not None:
                    parts[suffix] = content.read()
            # tarfile raises nothing if a header is broken or the file ends in place of one: check
            # for the block of zeros at the end of a complete tar.
            tar.fileobj.seek(tar.offset)
            ended = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except BROKEN:
            ended = False
        if parts and (
            ended
            or all(any(suffix in parts for suffix in of) for of in (IMAGE_SUFFIXES, TEXT_SUFFIXES))
        ):
            yield from _sample(current, parts)
    if not ended:
        raise ShardError(
            f"{name} is broken or cut after {current or 'its beginning'}; copy it again."
        )


def captions_of(text: str | None, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a sample: our `captions`, else img2dataset's `caption`, else the .txt.

    () if there is none.
    """
    several = meta.get("captions")
    if isinstance(several, Sequence) and not isinstance(several, str):
        return tuple(
            str(caption).strip() for caption in several if isinstance(caption, (str, int, float))
        )
    single = meta.get("caption")
    single = single if single and isinstance(single, (str, int, float)) else text
    return (str(single).strip(),) if single else ()


def read_meta(data: bytes | None) -> dict[str, Any]:
    """Parse a sample's .json; {} if it is missing or not a JSON object.

    Lone surrogates, which JSON allows and UTF-8 does not, become "?".
    """
    try:
        meta = json.loads(data or b"{}")
        if b"\\ud" in (data or b"").lower():
            meta = json.loads(json.dumps(meta, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _sample(key: str, parts: Mapping[str, bytes]) -> Iterator[Sample]:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    if suffix is None and not any(suffix in parts for suffix in TEXT_SUFFIXES):
        return
    meta = read_meta(parts.get("json"))
    text = parts["txt"].decode(errors="replace") if "txt" in parts else None
    key = meta["key"] if isinstance(meta.get("key"), str) else key
    yield Sample(key, parts.get(suffix or "", b""), suffix or "", captions_of(text, meta), meta)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix by WebDataset's rule: at the file's first dot.

    The suffix is "" for a hidden file, or a file that belongs to no sample.
    """
    # names need not be UTF-8
    folder, slash, file = name.encode(errors="replace").decode().removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower() if stem else ""


def _free_name(key: str, taken: set[str]) -> str:
    """Name of a sample's files in a shard: its key without "." and "/", made unique in the shard.

    "." and "/" would split the name; the .json keeps the unchanged key.
    """
    name = re.sub(r"[./]", "_", key)
    return (
        name
        if name and name not in taken
        else next(other for n in count(len(taken)) if (other := f"{name}-{n}") not in taken)
    )
