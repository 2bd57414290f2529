"""Whether a corpus has rows to train on, found out before a run starts."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from .filters import Candidate, Report, first_broken, header_rules
from .sample import ShardError
from .sources import Part, read_part

MAX_PARTS, MAX_ROWS = 4, 2000  # parts and rows to look at


def check_usable(corpus: str, parts: Sequence[Part], min_size: int, batch: int) -> None:
    """Raise ShardError, with the reasons, if a corpus has fewer usable rows than one batch.

    Only the beginning of a large corpus is read, until it has given a batch.
    """
    report, rules, rows = Report(), header_rules(min_size), 0
    for part in parts[:MAX_PARTS]:
        try:
            for sample in read_part(part):
                reason = first_broken(Candidate(sample), rules)
                report.add(sample.key, reason, sample.captions_unread)
                rows += 1
                if report.kept >= batch or rows >= MAX_ROWS:
                    return
        except UserError as error:
            report.faults.append(str(error))
    if len(parts) <= MAX_PARTS:
        raise ShardError(too_few(corpus, batch, report))


def too_few(corpus: str, batch: int, report: Report) -> str:
    """Message on a corpus with fewer usable rows than one batch."""
    return (
        f"The corpus {corpus} has {report.kept:,} usable rows, fewer than one batch of {batch:,}; "
        f"lower train.batch, or add images. Its rows: {report}"
    )
