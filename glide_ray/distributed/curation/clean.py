"""`glide clean`: judge every row of a corpus, drop duplicates, write the other rows as shards.

Duplicates are searched across the whole corpus. The corpus is read twice, once to judge and once to
copy. In between the rows are in files of the output folder, and the driver holds some bytes
per part. A run that was interrupted resumes from these files.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ... import storage
from ...config.data import CleanConfig
from ...data.baselines import CLUSTERED, baseline_caption_rules, needs_scores
from ...data.filters import Report, Rule, caption_rules, clean_captions
from ...data.sources import Part, find_parts
from ..cluster import connect, ship_modules
from ..rows import PAGE, refuse_source
from .baseline import choose_rows
from .clean_page import clean_page
from .features import check_settings
from .judge import Judged, judge
from .near_duplicates import find_near_duplicates
from .run_folder import RunFolder, own
from .search import Search
from .semantic import find_semantic_duplicates
from .write import Writing, close, finish_corpus, write_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CleanResult:
    """Result of `clean`: the rows read, and index and card of the shards that were written."""

    read: int
    report: Report
    captions_dropped: int
    index: Mapping[str, Any]
    card: Mapping[str, Any]


def clean(
    source: str,
    out: str,
    config: CleanConfig,
    rules: Mapping[str, Rule] | None = None,
) -> CleanResult:
    """Write the rows of `source` that break no rule to `out`, local or s3://, with an index.

    DROPPED lists the rows that were left out, with reasons, and PAGE shows some. `rules` are the
    user's, applied after the built-in ones. Raises UserError.
    """
    rules = rules or {}
    parts = find_parts(source, config.caption_column)
    refuse_source(source, parts, out)
    storage.check_writable(out)  # fail before hours of reading
    files = check_settings(config)
    if config.clip is not None:  # for processes with another working directory
        config = config.model_copy(update={"clip": storage.absolute(config.clip)})
    folder = storage.absolute(out).rstrip("/")
    settings = [config.model_dump(), sources_of(rules), digest_of(parts), files]
    with own(folder, ["clean", settings]) as run:
        connect(2)
        ship_modules(rules.values())
        log.info(f"reading {len(parts):,} parts of {source}")
        judged = judge(parts, run.work, config, rules)
        run.check()
        later, chosen = f"{run.work}/{judged.digest}", run.work
        if needs_scores(config) or config.baseline in CLUSTERED:
            log.info(f"choosing rows as {config.baseline} among {judged.kept.sum():,}")
            judged, chosen = choose_rows(parts, judged, run.work, f"{later}/baseline", config)
            run.check()
        searches = _find_duplicates(judged, run, chosen, later, config)
        log.info(f"writing {judged.kept.sum():,} rows to {out}")
        edit = partial(_clean, config=config)
        writing = Writing(folder, chosen, later, config.per_shard, searches, edit)
        entries, faults, tasks = write_rows(parts, judged, run, writing)
        report = judged.report(faults)
        report.kept = entries.rows
        about: dict[str, Any] = {"source": source, "settings": config.model_dump()}
        about["captions_dropped"] = judged.captions_dropped
        card = finish_corpus(parts, judged, report, writing, tasks, about)
        title = f"{source} cleaned into {out}"
        html = clean_page(title, parts, judged, report, chosen, searches, card)
        storage.put(html.encode(), f"{folder}/{PAGE}")
        index = close(run, entries)
    return CleanResult(int(judged.read.sum()), report, judged.captions_dropped, index, card)


def _find_duplicates(
    judged: Judged, run: RunFolder, chosen: str, later: str, config: CleanConfig
) -> list[Search]:
    """Search for the duplicates that the settings name. `chosen`: folder of the judged files."""
    searches: list[Search] = []
    if config.duplicates:
        log.info(f"looking for near-duplicates among {judged.kept.sum():,} images")
        searches.append(find_near_duplicates(judged, chosen, f"{later}/search"))
        run.check()
    if config.semantic is not None:
        log.info(f"looking for semantic duplicates among {judged.kept.sum():,} images")
        near, limit = next(iter(searches), None), config.semantic
        searches.append(
            find_semantic_duplicates(judged, chosen, run.work, f"{later}/semantic", near, limit)
        )
        run.check()
    return searches


def _clean(captions: Sequence[str], config: CleanConfig) -> tuple[str, ...]:
    rules = {**caption_rules(config), **baseline_caption_rules(config)}
    return clean_captions(captions, rules)[0]


def sources_of(functions: Mapping[str, Callable]) -> dict[str, str]:
    """Hash of the module of each function: an edited rule begins another run."""
    hashes = {}
    for name, function in functions.items():
        module = sys.modules.get(getattr(function, "__module__", ""))
        try:
            text = inspect.getsource(module) if module else repr(function)
        except (OSError, TypeError):  # typed at a prompt, or compiled
            text = repr(function)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def digest_of(parts: Sequence[Part]) -> str:
    """Hash of the names of all parts, of their files and their numbers of rows."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()
