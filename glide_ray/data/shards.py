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
from collections.abc import Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from ..storage import MissingError, is_remote, put, read, remove, size
from .caption_text import captions_of, read_meta
from .readers.tar import read_shard
from .sample import IMAGE_SUFFIXES, TEXT_SUFFIXES, Sample, ShardError

__all__ = [  # what reads a shard is imported from here together with what writes one
    "IMAGE_SUFFIXES",
    "INDEX",
    "TEXT_SUFFIXES",
    "Sample",
    "ShardError",
    "begin",
    "captions_of",
    "finish",
    "read_index",
    "read_meta",
    "read_shard",
    "write_shard",
    "write_shards",
]

INDEX = "index.json"


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
