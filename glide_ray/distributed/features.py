"""Images of a corpus as a CLIP sees them, or as a content filter scores them, by a pool of actors that each load the CLIP once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import ray
import torch
from tqdm import tqdm

from ..config import CleanConfig, UserError
from ..data.content import ContentError, ContentFilter
from ..data.filters import BROKEN, Candidate, Report, Rule, first_broken, image_rules
from ..data.images import ImageError, decode
from ..data.sources import Part, read_part
from ..evaluation.features import ClipFeatures
from .stream import Tally, quiet

ROWS_AT_ONCE = 64                   # images that one actor is given
ACTORS = 2                          # on a cluster without GPUs


class Embedder:
    """What an actor of the pool does: images to features, or to a filter's scores. It loads the CLIP once, for all blocks it is given."""

    def __init__(self, clip: str, content: ContentFilter | None):
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ACTORS))
        self._clip, self._content = ClipFeatures(clip), content

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        pictures, reasons = [], []
        for image, reason in zip(block["image"].to_pylist(), block["reason"].to_pylist(), strict=True):
            try:
                pictures.append(decode(image) if not reason else None)
            except ImageError:
                pictures.append(None)
                reason = BROKEN
            reasons.append(reason)
        seen = iter(self._clip.images([picture for picture in pictures if picture is not None]))
        features = np.stack([np.full(self._clip.width, np.nan, np.float32) if picture is None else next(seen) for picture in pictures])
        block = block.drop_columns(["image", "reason"]).append_column("reason", pyarrow.array(reasons, pyarrow.string()))
        if self._content is not None:
            return block.append_column("score", pyarrow.array(self._content.score(features)))
        return block.append_column("features", pyarrow.array(list(features), pyarrow.list_(pyarrow.float32())))


def embed(parts: Sequence[Part], clip: str, truth: Rule | None = None, content: ContentFilter | None = None, group: str = "",
          limit: int | None = None) -> tuple[pyarrow.Table, Report]:
    """Every row: part, position, key, caption, group, truth, reason ("" where the image is whole), and its features or a filter's score.

    `truth` says whether a row has the content. `limit` ends the reading after so many rows. The report counts rows, and names parts
    with a fault.
    """
    shared, tally = ray.put(list(parts)), Tally.remote()

    def read(batch: dict[str, np.ndarray]) -> Iterator[pyarrow.Table]:
        for number in batch["item"]:
            report, rows = Report(), []
            for row in _rows(int(number), ray.get(shared)[number], truth, group, report):
                rows.append(row)
                if len(rows) == ROWS_AT_ONCE:
                    yield pyarrow.Table.from_pylist(rows, READ)
                    rows = []
            if rows:
                yield pyarrow.Table.from_pylist(rows, READ)
            ray.get(tally.add.remote(report))

    gpus = int(ray.cluster_resources().get("GPU", 0))
    stream = quiet().from_items(list(range(len(parts))), override_num_blocks=len(parts)).map_batches(read, batch_size=1)
    stream = stream.map_batches(Embedder, fn_constructor_args=(clip, content), batch_format="pyarrow", batch_size=ROWS_AT_ONCE,
                                concurrency=min(len(parts), gpus or ACTORS), num_gpus=1 if gpus else 0)
    stream.context.execution_options.preserve_order = True      # a limit takes the same rows each time
    tables, done = [], 0
    with tqdm(desc="look", unit="image", dynamic_ncols=True, disable=None, total=limit) as bar:
        for table in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            done += len(table)
            bar.update(len(table))
            if limit is not None and done >= limit:
                break
    if not tables:
        raise ContentError(f"No row of the corpus can be read: {' '.join(ray.get(tally.report.remote()).faults)[:300]}")
    rows = pyarrow.concat_tables(tables).sort_by([("part", "ascending"), ("position", "ascending")])
    return rows, ray.get(tally.report.remote())


READ = pyarrow.schema([("part", pyarrow.int32()), ("position", pyarrow.int32()), ("key", pyarrow.string()), ("caption", pyarrow.string()),
                       ("group", pyarrow.string()), ("truth", pyarrow.bool_()), ("reason", pyarrow.string()), ("image", pyarrow.binary())])


def _rows(number: int, part: Part, truth: Rule | None, group: str, report: Report) -> Iterator[dict[str, Any]]:
    rules = {name: rule for name, rule in image_rules(CleanConfig(min_size=1, max_aspect=None)).items() if name != BROKEN}    # the actor decodes
    try:
        for position, sample in enumerate(read_part(part)):
            candidate = Candidate(sample)
            reason = first_broken(candidate, rules) or ""
            yield {"part": number, "position": position, "key": sample.key, "caption": sample.captions[0] if sample.captions else "",
                   "group": str(sample.meta.get(group) or f"{part.url}#{position}"), "truth": bool(truth(candidate)) if truth else None,
                   "reason": reason, "image": b"" if reason else sample.image}
    except UserError as error:
        report.faults.append(str(error))
