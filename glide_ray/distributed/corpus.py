"""The corpus job: fetch the emoji, write shards, stream them once through Ray Data and count what a training run will see."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from ..data import emoji
from ..data.filters import Report
from ..tokenizer import Tokenizer
from .local import connect
from .stream import Tally, open_corpus


@dataclass(frozen=True)
class CorpusReport:
    """What is in a corpus: rows kept and dropped by rule, captions, and those longer than the model's context."""

    path: str
    rows: Report
    captions: int
    cut_captions: int


def prepare(out: str | Path, min_size: int = 64, report: Callable[[str], None] = lambda line: None) -> list[CorpusReport]:
    """Make the emoji corpus in `out/train` and `out/held_out` unless it is there, and survey both."""
    emoji.build(out, report=report)
    return [survey(str(Path(out) / split), min_size) for split in ("train", "held_out")]


def survey(path: str, min_size: int = 64) -> CorpusReport:
    """Stream any corpus once, local or s3://, and count. Raises ShardError for an empty one."""
    connect(2)
    tally = Tally.remote()
    captions = cut = 0
    for batch in open_corpus(path, min_size, tally).map_batches(_count_captions).iter_batches(batch_size=None):
        captions += int(batch["captions"].sum())
        cut += int(batch["cut"].sum())
    return CorpusReport(path, ray.get(tally.report.remote()), captions, cut)


def _count_captions(rows: dict) -> dict:
    tokenizer = Tokenizer()
    counts = [[tokenizer.encode(caption).cut for caption in json.loads(captions)] for captions in rows["captions"]]
    return {"captions": [len(row) for row in counts], "cut": [sum(row) for row in counts]}
