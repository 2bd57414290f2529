"""Embed the images of a corpus with a network, or score them with a content filter.

A pool of Ray actors does the work; each actor loads the network once. Small corpora are embedded
in this process.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import ray
import torch

from .. import storage
from ..config.data import CleanConfig
from ..data.content import ContentError, ContentFilter
from ..data.filters import BROKEN, Candidate, Report, Rule, first_broken, image_rules
from ..data.images import ImageError, decode
from ..data.readers.fetch import NO_FILE
from ..data.sources import METADATA, Part, find_parts, read_part, state
from ..errors import UserError
from ..evaluation.features import ClipFeatures, Network, fetch_network, load_network
from ..evaluation.pages import Picture, thumbnail
from ..progress import bar
from ..storage import fingerprint
from .rows import INLINE_IMAGES, read_rows
from .stream import Tally, each_alone, in_order, its_own, task_errors

log = logging.getLogger(__name__)

JOB = "job.json"  # beside generated pictures: the settings and models that made them
ROWS_PER_BATCH = 64  # rows in a batch of an actor
ACTORS = 2  # on a cluster without GPUs
PARTS_AT_ONCE = 1024  # of a stream, whose parts the driver holds; many more than a pool needs

# (part number, part, report) -> tables of the part's rows; read errors are added to the report
Blocks = Callable[[int, Part, Report], Iterator[pyarrow.Table]]


class Embedder:
    """Encoded images to features, or to a filter's scores, in this process or as a pool actor.

    Loads the network once, for all its blocks of rows. `threads`: an actor's share of the cores.
    """

    def __init__(
        self,
        load: Callable[[str], Network],
        path: str,
        content: ContentFilter | None,
        threads: int | None = None,
    ):
        if threads and not torch.cuda.is_available():
            torch.set_num_threads(threads)
        self._network, self._content = load(path), content

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        pictures, reasons = [], []
        for image, reason in zip(
            block["image"].to_pylist(), block["reason"].to_pylist(), strict=True
        ):
            try:
                pictures.append(decode(image) if not reason else None)
            except ImageError:
                pictures.append(None)
                reason = BROKEN
            reasons.append(reason)
        rows = iter(self._network.images([picture for picture in pictures if picture is not None]))
        features = np.stack(
            [
                np.full(self._network.width, np.nan, np.float32) if picture is None else next(rows)
                for picture in pictures
            ]
        )
        block = block.drop_columns(["image", "reason"]).append_column(
            "reason", pyarrow.array(reasons, pyarrow.large_string())
        )
        if self._content is not None:
            return block.append_column("score", pyarrow.array(self._content.score(features)))
        return block.append_column(
            "features", pyarrow.array(list(features), pyarrow.list_(pyarrow.float32()))
        )


def embed(
    parts: Sequence[Part],
    path: str,
    truth: Rule | None = None,
    content: ContentFilter | None = None,
    group: str = "",
    limit: int | None = None,
    load: Callable[[str], Network] = ClipFeatures,
) -> tuple[pyarrow.Table, Report]:
    """Embed every row with a network, or score it with the filter `content`.

    Returns a table with the columns part, position, key, caption, group, truth, reason ("" if the
    image is readable), and features (E,) or score; and a report that names the parts with a fault.
    `load` builds the network from the file or folder `path`, which all nodes can read. `truth`
    returns whether a row has the content. `group`: metadata field of rows of the same thing.
    `limit`: stop after the block of rows that reaches it. Raises ContentError if no row can be
    read.
    """

    def blocks(number: int, part: Part, report: Report) -> Iterator[pyarrow.Table]:
        rows = rows_to_embed(number, part, truth, group, report)
        while block := list(itertools.islice(rows, ROWS_PER_BATCH)):
            yield pyarrow.Table.from_pylist(block, READ_SCHEMA)

    counts = [part.count or len(part.files) for part in parts]
    run = _in_process if all(counts) and sum(counts) <= INLINE_IMAGES else _by_actors
    embedded, report = run(parts, blocks, load, path, content)
    tables, done = [], 0
    with (
        bar("embed", "image", limit) as progress,
        task_errors(),
    ):
        for table in embedded:
            tables.append(table)
            done += len(table)
            progress.update(len(table))
            if limit is not None and done >= limit:
                break
    if not tables:
        raise ContentError(f"No row of the corpus can be read: {' '.join(report().faults)[:300]}")
    return in_order(tables), report()


def _in_process(
    parts: Sequence[Part], blocks: Blocks, *embedder: Any
) -> tuple[Iterator[pyarrow.Table], Callable[[], Report]]:
    """Embed all parts in this process. Returns the tables, and a function for the report so far."""
    report, embed_block = Report(), Embedder(*embedder)
    return (
        embed_block(block)
        for number, part in enumerate(parts)
        for block in blocks(number, part, report)
    ), lambda: report


def _by_actors(
    parts: Sequence[Part], blocks: Blocks, *embedder: Any
) -> tuple[Iterator[pyarrow.Table], Callable[[], Report]]:
    """Like `_in_process`, with a pool of actors, for PARTS_AT_ONCE parts after each other."""
    tally, gpus = Tally.remote(), int(ray.cluster_resources().get("GPU", 0))

    def read(batch: dict[str, np.ndarray]) -> Iterator[pyarrow.Table]:
        report = Report()
        number, part = its_own(batch)
        yield from blocks(number, part, report)
        ray.get(tally.add.remote(report))

    def tables() -> Iterator[pyarrow.Table]:
        for start in range(0, len(parts), PARTS_AT_ONCE):
            some = parts[start : start + PARTS_AT_ONCE]
            stream = each_alone(list(enumerate(some, start))).map_batches(read, batch_size=1)
            stream = stream.map_batches(
                Embedder,
                fn_constructor_args=(*embedder, max(1, (os.cpu_count() or 1) // ACTORS)),
                batch_format="pyarrow",
                batch_size=ROWS_PER_BATCH,
                concurrency=min(len(some), gpus or ACTORS),
                num_gpus=1 if gpus else 0,
            )
            # A limit must select the same rows each time.
            stream.context.execution_options.preserve_order = True
            yield from stream.iter_batches(batch_size=None, batch_format="pyarrow")

    return tables(), lambda: ray.get(tally.report.remote())


READ_SCHEMA = pyarrow.schema(
    [
        ("part", pyarrow.int32()),
        ("position", pyarrow.int32()),
        ("key", pyarrow.large_string()),
        ("caption", pyarrow.large_string()),
        ("group", pyarrow.large_string()),
        ("truth", pyarrow.bool_()),
        ("reason", pyarrow.large_string()),
        ("image", pyarrow.binary()),
    ]
)


def rows_to_embed(
    number: int, part: Part, truth: Rule | None, group: str, report: Report
) -> Iterator[dict[str, Any]]:
    """Rows of a part with the fields of READ_SCHEMA; read errors are added to the report."""
    # Without the rule that decodes the image: the actor decodes it anyway.
    rules = {
        name: rule
        for name, rule in image_rules(CleanConfig(min_size=1, max_aspect=None)).items()
        if name != BROKEN
    }
    missing = 0  # files that a table names and that are not there
    try:
        for position, sample in enumerate(read_part(part)):
            candidate = Candidate(sample)
            missing += sample.no_image == NO_FILE
            shows, failed = _truth_of(candidate, truth)
            reason = first_broken(candidate, rules) or failed
            yield {
                "part": number,
                "position": position,
                "key": sample.key,
                "caption": sample.captions[0] if sample.captions else "",
                "group": str(sample.meta.get(group) or f"{part.url}#{position}"),
                "truth": shows,
                "reason": reason,
                "image": b"" if reason else sample.image,
            }
    except UserError as error:
        report.faults.append(str(error))
    if missing:
        report.faults.append(
            f"{missing:,} images of {part.url} cannot be read; check that they exist."
        )


def _truth_of(candidate: Candidate, truth: Rule | None) -> tuple[bool | None, str]:
    """(result of `truth` for a row or None without a rule, reason to drop the row if it raised)."""
    try:
        return (bool(truth(candidate)) if truth else None), ""
    except Exception as error:  # an error in a user's function must not end the run
        return False, f"on which the truth rule raised {type(error).__name__}"


# -- embedded corpora ------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Rows of a corpus with readable images, and their features by one network."""

    names: Sequence[str]  # PART#POSITION, independent of the current folder
    places: Sequence[tuple[int, int]]  # (index into `parts`, position in that part)
    parts: Sequence[Part]
    captions: Sequence[str]
    groups: np.ndarray  # (N,) int, equal for rows of the same thing
    truth: np.ndarray | None  # (N,) bool
    features: np.ndarray  # (N, E)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that figures depend on: names, captions and features."""
        return hashlib.sha256(
            json.dumps([self.names, self.captions]).encode()
            + np.ascontiguousarray(self.features).tobytes()
        ).hexdigest()

    @classmethod
    def of(cls, table: pyarrow.Table, parts: Sequence[Part]) -> EmbeddedCorpus:
        """Readable rows of a table of `embed`. Raises ContentError if there are none."""
        table = table.filter(pyarrow.compute.equal(table["reason"], ""))
        if not len(table):
            raise ContentError(
                "No image of the corpus can be read; check it with `glide corpus --survey PATH`."
            )
        places = list(zip(table["part"].to_pylist(), table["position"].to_pylist(), strict=True))
        truth = table["truth"].to_pylist()
        return cls(
            [f"{parts[part].url}#{position}" for part, position in places],
            places,
            parts,
            table["caption"].to_pylist(),
            np.unique(table["group"].to_pylist(), return_inverse=True)[1],
            None if truth[0] is None else np.array(truth, bool),
            _matrix(table["features"]),
        )

    def pictures(
        self, rows: Sequence[int], labels: Sequence[str] | None = None
    ) -> list[list[Picture]]:
        """Pictures of rows, each a group of its own in a section of a page."""
        found = read_rows(self.parts, [self.places[n] for n in rows])
        return [
            [
                Picture(
                    thumbnail(found[self.places[n]].image) if self.places[n] in found else None,
                    label,
                )
            ]
            for n, label in zip(rows, labels or [self.captions[n] for n in rows], strict=True)
        ]


def embed_corpus(
    source: str,
    network: str,
    size: int,
    cache: str,
) -> EmbeddedCorpus:
    """Embed the corpus `source` for evaluation at `size` pixels, or load it from the file `cache`.

    All paths are local or s3://. The cache is valid for the same network, size and files. A corpus
    that could not be read to its end is not cached, so the next call tries again. Ray must be
    connected. Raises UserError.
    """
    source, network = storage.absolute(source), storage.absolute(network)
    parts = find_parts(source)
    try:
        # Part of the cache key: file names of generated pictures do not depend on their settings.
        job = storage.read(f"{source}/{JOB}").decode()
    except storage.StorageError:
        job = ""
    if job and any(image.captions is None for part in parts for image in part.files):
        raise UserError(
            f"{source} is unfinished: {METADATA} does not list all of its pictures; run the "
            "command that makes them again."
        )
    rows = [[part.url, part.count, part.files] for part in parts]
    key = hashlib.sha256(
        json.dumps(
            [fingerprint(fetch_network(network)), size, job, rows, state(source, parts)]
        ).encode()
    ).hexdigest()

    def embed_parts() -> tuple[pyarrow.Table, bool]:
        log.info(f"embedding {source}")
        table, counted = embed(parts, network, load=partial(load_network, size=size))
        for fault in counted.faults:
            log.info(fault)
        return table, not counted.faults

    return EmbeddedCorpus.of(cached_table(cache, key, embed_parts), parts)


def cached_table(
    cache: str | Path, key: str, make: Callable[[], tuple[pyarrow.Table, bool]]
) -> pyarrow.Table:
    """Load the table in the file `cache`, local or s3://, if it has this key; else make it.

    `make` returns the table, and whether to write it to `cache`.
    """
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read(cache)))
        if _cache_key(table.schema) == key:
            return table
    except (storage.MissingError, pyarrow.ArrowInvalid):
        pass
    table, to_keep = make()
    if to_keep:
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table.replace_schema_metadata({"of": key}), sink)
        storage.put(sink.getvalue(), cache)
    return table


def cached_table_key(cache: str | Path) -> str:
    """Key of the table in the file `cache`; "" if the file is missing or broken."""
    try:
        return _cache_key(pyarrow.parquet.read_schema(io.BytesIO(storage.read(cache))))
    except (storage.MissingError, pyarrow.ArrowInvalid):
        return ""


def _cache_key(schema: pyarrow.Schema) -> str:
    return (schema.metadata or {}).get(b"of", b"").decode()


def _matrix(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Array (N, E) from a column of lists of equal length."""
    # Chunk by chunk: a single chunk could have more numbers than 32-bit list offsets can address.
    return np.concatenate(
        [
            chunk.flatten()
            .to_numpy(zero_copy_only=False)
            .astype(np.float32)
            .reshape(len(chunk), -1)
            for chunk in column.chunks
            if len(chunk)
        ]
    )
