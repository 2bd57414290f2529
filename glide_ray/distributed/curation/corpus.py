"""Corpus jobs: build the emoji corpus, and survey any corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ...data import emoji
from ...data.card import counts_of
from ...data.filters import Report
from ...data.sources import find_parts
from ...data.tokenizer import Tokenizer
from ..cluster import connect
from ..stream import Tally, open_parts


@dataclass(frozen=True)
class CorpusReport:
    """Counts of a corpus. `cut_captions` are those longer than the model's context.

    `licences` are the fields of a corpus card that count the kept rows.
    """

    path: str
    rows: Report
    captions: int
    cut_captions: int
    licences: Mapping[str, Any]


def prepare(
    out: str | Path,
    min_size: int = 64,
    styles: Sequence[str] = (),
    packages: str | Path | None = None,
    scenes: int = 0,
) -> list[CorpusReport]:
    """Build the emoji corpus under `out`, local or s3://, unless it exists, and survey its splits.

    `styles`, `packages` and `scenes` as in `emoji.build_corpus`. Raises UserError.
    """
    splits = emoji.build_corpus(out, styles=styles, packages=packages, scenes=scenes)
    return [
        survey(f"{str(out).rstrip('/')}/{split}", min_size)
        for split, index in splits.items()
        if index["count"]
    ]


def survey(path: str, min_size: int = 64, column: str | None = None) -> CorpusReport:
    """Stream a corpus once, local or s3://, and count. Raises ShardError if it is empty.

    `column` is the field or column of captions.
    """
    parts = find_parts(path, column)  # report an empty corpus before starting Ray
    connect(2)
    tally = Tally.remote()
    captions = cut = 0
    for batch in (
        open_parts(parts, min_size, tally)
        .map_batches(_count_captions)
        .iter_batches(batch_size=None)
    ):
        captions += int(batch["captions"].sum())
        cut += int(batch["cut"].sum())
    report, credits = ray.get([tally.report.remote(), tally.credits.remote()])
    return CorpusReport(path, report, captions, cut, counts_of(credits))


def _count_captions(rows: dict) -> dict:
    tokenizer = Tokenizer()
    counts = [
        [tokenizer.encode(caption).cut for caption in json.loads(captions)]
        for captions in rows["captions"]
    ]
    return {"captions": [len(row) for row in counts], "cut": [sum(row) for row in counts]}
