"""Paths of corpora: several joined, ranges and lists in braces, wildcards, mixtures by weight.

data/{00000..00999}.tar            a range of shards
data/{cc3m,cc12m}/{0..9}.tar       lists and ranges, any number of them
data/a::data/b                     several corpora
data/*.tar                         all files or objects whose names match, local or on S3
data/a:0.7,data/b:0.3              a mixture, by the share of the rows that training reads
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import chain, islice

from .. import storage
from .sample import SHARD_SUFFIXES, ShardError

RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*)\}")  # the innermost ones
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")
JOIN = "::"
MAX_EXPANDED = 10**6


def mixture(path: str) -> list[tuple[str, float]]:
    """(corpus, weight) of each corpus of a mixture; [] for another path.

    Raises ShardError if the weights are all 0.
    """
    weights = [(one, float(weight)) for one, weight in _weighted(path)]
    if weights and not any(weight for _, weight in weights):
        raise ShardError(f"The weights of {path} are all 0; give one corpus a larger one.")
    return weights


def _weighted(path: str) -> list[tuple[str, str]]:
    """(corpus, weight as it is written) of each corpus of a mixture; [] for another path."""
    pieces = _split(path)
    found = [WEIGHTED.fullmatch(piece) for piece in pieces]
    if len(pieces) < 2 or not all(found):
        return []
    return [(match[1], match[2]) for match in found if match]


def absolute(path: str) -> str:
    """The path with absolute paths of all corpora in it. Raises StorageError for another scheme."""
    if weights := _weighted(path):
        return ",".join(f"{absolute(one)}:{weight}" for one, weight in weights)
    return JOIN.join(storage.absolute(one) for one in path.split(JOIN) if one)


def expand(path: str) -> list[str]:
    """Paths without braces, wildcards and joins. Each is there once, in the order it is written.

    Raises ShardError for a range that ends before it begins, and wildcards that match nothing.
    """
    if weights := mixture(path):
        return [one for name, _ in weights for one in expand(name)]
    found = dict[str, None]()
    for one in chain.from_iterable(
        _matches(part) for name in path.split(JOIN) if name for part in _braces(name)
    ):
        found[one] = None
        if len(found) > MAX_EXPANDED:
            raise ShardError(
                f"{path} names more than {MAX_EXPANDED:,} paths; give a folder of shards."
            )
    return list(found)


def folders(path: str) -> list[str]:
    """Folders of the corpora that a path names; a shard gives its folder."""
    found = [one.rstrip("/") for one in expand(path)]
    return list(
        dict.fromkeys(
            one.rpartition("/")[0] if one.lower().endswith(SHARD_SUFFIXES) else one for one in found
        )
    )


def is_pattern(path: str) -> bool:
    """Whether a path names several paths."""
    return bool(BRACES.search(path) or JOIN in path or _weighted(path) or glob.has_magic(path))


def _split(path: str) -> list[str]:
    """Pieces of a path between commas outside braces."""
    pieces, depth = [""], 0
    for character in path:
        depth += (character == "{") - (character == "}")
        if character == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _braces(path: str) -> Iterator[str]:
    for found in BRACES.finditer(path):
        inner = found[1]
        if span := RANGE.fullmatch(inner):
            first, last = span.groups()
            if int(last) < int(first):
                raise ShardError(f"The corpus {path} is empty: its range ends before it begins.")
            names = (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        elif "," in inner:
            names = (name.strip() for name in inner.split(","))
        else:
            continue  # braces in a name
        head, tail = path[: found.start()], path[found.end() :]
        for name in names:
            yield from _braces(f"{head}{name}{tail}")
        return
    yield path


def _matches(path: str) -> list[str]:
    if not glob.has_magic(path):
        return [path]
    if storage.is_remote(path):
        found = _remote_matches(path)
        if not found and any(True for _ in storage.list_files(path, ("",))):
            return [path]  # a name with brackets
    elif os.path.exists(path):  # a name with brackets
        return [path]
    else:
        found = sorted(islice(glob.iglob(path, recursive=True), MAX_EXPANDED + 1))
    if not found:
        raise ShardError(f"Nothing matches {path}; check it, and put it in quotes for the shell.")
    return found


def _remote_matches(path: str) -> list[str]:
    """Objects and prefixes that match, sorted; the fixed beginning of the path is listed once."""
    fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    pattern = re.compile(_regex(path.rstrip("/")))
    matches: dict[str, None] = {}
    for file in storage.list_files(fixed, ("",)):
        parts = file.split("/")
        whole = (("/".join(parts[:n])) for n in range(fixed.count("/") + 2, len(parts) + 1))
        if match := next((one for one in whole if pattern.fullmatch(one)), None):
            matches[match] = None
        if len(matches) > MAX_EXPANDED:  # `expand` refuses them
            break
    return sorted(matches)


def _regex(path: str) -> str:
    """Regular expression of a path with wildcards; only ** matches a slash."""
    tokens = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", path)
    known = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}
    return "".join(
        known.get(token) or (token.replace("[!", "[^") if token[:1] == "[" else re.escape(token))
        for token in tokens
    )
