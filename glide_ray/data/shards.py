"""Image-text shards: WebDataset tars as img2dataset writes them, `000000.tar` holding KEY.webp, KEY.txt, KEY.json.

`index.json` is written last: a folder that has it is complete.
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
BROKEN = (
    tarfile.TarError,
    OSError,
    KeyError,
    ValueError,
    OverflowError,
    RecursionError,
)  # what tarfile raises: links to nowhere or themselves, broken lengths


class ShardError(UserError):
    """A corpus that cannot be read."""


@dataclass(frozen=True)
class Sample:
    """One image with its captions. `meta` is what the sample's .json says beside them."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    meta: Mapping[str, Any]


def write_shards(
    folder: str | Path, samples: Iterable[Sample], per_shard: int = 1000
) -> dict[str, Any]:
    """Write all samples and then the index, each file whole or not at all. Returns the index."""
    begin(folder)
    rest = iter(samples)
    batches = iter(lambda: list(islice(rest, per_shard)), [])
    return finish(
        folder, [write_shard(folder, number, batch) for number, batch in enumerate(batches)]
    )


def begin(folder: str | Path) -> None:
    """Take away the index of an earlier corpus in the folder: until `finish` there is none that is whole."""
    remove(f"{str(folder).rstrip('/')}/{INDEX}")


def write_shard(folder: str | Path, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """Write one shard, local or to s3://, whole or not at all. Returns its entry for the index."""
    buffer, names = io.BytesIO(), set()
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
    """Write the index of a corpus whose shards are written. Returns it."""
    if not is_remote(folder):
        for stale in set(Path(folder).glob("*.tar")) - {
            Path(folder) / shard["name"] for shard in shards
        }:
            if re.fullmatch(
                r"\d{6}\.tar", stale.name
            ):  # as `write_shard` names them: from an earlier, longer corpus in the same place
                stale.unlink()
    index = {"count": sum(shard["count"] for shard in shards), "shards": list(shards)}
    put(json.dumps(index, indent=1).encode(), f"{str(folder).rstrip('/')}/{INDEX}")
    return index


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of a complete folder or prefix, None where there is none or a shard that it names is missing."""
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
    """The samples of one tar in their order; those without an image or a caption are not left out.

    Raises ShardError for one that is broken or cut, after the samples before the damage, and calls it `name`.
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
        current, whole = None, True
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
            # Where a header is broken or the file ends at one, tarfile says nothing; a whole tar ends with a block of zeros.
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except BROKEN:
            whole = False
        if parts and (
            whole
            or all(any(suffix in parts for suffix in of) for of in (IMAGE_SUFFIXES, TEXT_SUFFIXES))
        ):
            yield from _sample(current, parts)
    if not whole:
        raise ShardError(
            f"{name} is broken or cut after {current or 'its beginning'}; copy it again."
        )


def captions_of(text: str | None, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a sample: our `captions`, else img2dataset's `caption`, else the .txt; () where there is none."""
    several = meta.get("captions")
    if isinstance(several, Sequence) and not isinstance(several, str):
        return tuple(
            str(caption).strip() for caption in several if isinstance(caption, (str, int, float))
        )
    one = meta.get("caption")
    one = one if one and isinstance(one, (str, int, float)) else text
    return (str(one).strip(),) if one else ()


def read_meta(data: bytes | None) -> dict[str, Any]:
    """What a sample's .json says, {} where it is none. Halves of surrogate pairs, which JSON may have and UTF-8 has not, become "?"."""
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
    yield Sample(key, parts.get(suffix, b""), suffix or "", captions_of(text, meta), meta)


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's key and ending, as WebDataset has them: the file's name is cut at its first dot. No ending: a hidden file, or no sample's."""
    folder, slash, file = (
        name.encode(errors="replace").decode().removeprefix("./").rpartition("/")
    )  # a name need not be UTF-8
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower() if stem else ""


def _free_name(key: str, taken: set[str]) -> str:
    """What a sample's files are called in a shard: its key, which its .json has as it is, without what cuts a name, and like no other's."""
    name = re.sub(r"[./]", "_", key)
    return (
        name
        if name and name not in taken
        else next(other for n in count(len(taken)) if (other := f"{name}-{n}") not in taken)
    )
