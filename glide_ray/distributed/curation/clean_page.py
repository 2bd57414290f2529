"""Report page of `glide clean`, from a few parts of the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

from ...data.filters import Report
from ...data.sources import Part
from ...evaluation.pages import Picture, Section, histogram, page, thumbnail
from ..rows import read_rows
from .judge import Judged, judged_file
from .search import Search, dropped_copies
from .tables import load

# parts drawn, near-duplicate pairs, examples of each rule, random kept rows
PAGE_PARTS, PAGE_PAIRS, PAGE_EXAMPLES, PAGE_SAMPLES = 12, 16, 8, 32

Place = tuple[int, int]  # part and position of a row


@dataclass
class _Examples:
    """Rows to show on the page: (kept, dropped) copies and dropped rows by reason, and kept rows.

    `captions`: of these rows. `sizes` and `lengths`: of all kept rows of the parts drawn, in
    pixels of the shorter side and characters of the first caption.
    """

    copies: dict[str, list[tuple[Place, Place]]]
    dropped: dict[str, list[Place]]
    kept: list[Place]
    captions: dict[Place, str]
    sizes: np.ndarray
    lengths: np.ndarray
    parts: int


def clean_page(
    title: str,
    parts: Sequence[Part],
    judged: Judged,
    report: Report,
    folder: str,
    searches: Sequence[Search],
    card: Mapping[str, Any],
    seed: int = 0,
) -> str:
    """HTML of sizes, caption lengths, drops by rule with examples, copies, and random rows.

    `folder`: of the judged files.
    """
    examples = _choose_examples(judged, report, folder, searches, np.random.default_rng(seed))
    some = examples.parts < len(parts)
    rows = f"kept rows of {examples.parts:,} of {len(parts):,} parts" if some else "kept rows"
    sections = [
        *_count_sections(len(parts), judged, report),
        *credit_sections(card),
        Section(f"Pixels on the shorter side, {rows}", bars=histogram(examples.sizes)),
        Section(f"Characters of the first caption, {rows}", bars=histogram(examples.lengths)),
        *_example_sections(examples, _pictures(parts, examples)),
    ]
    return page(title, sections)


def _count_sections(parts: int, judged: Judged, report: Report) -> list[Section]:
    captions = judged.captions_dropped
    dropped = (
        f" Captions dropped, those of dropped rows included: {captions:,}." if captions else ""
    )
    return [
        Section(
            "Rows by outcome",
            f"Rows read: {judged.read.sum():,}. Parts: {parts:,}.{dropped}",
            bars=[("kept", report.kept), *report.dropped.most_common()],
        ),
        Section(
            "Parts with a fault",
            "Their rows before the fault were read.",
            lines=sorted(set(report.faults)),
        ),
    ]


def _example_sections(examples: _Examples, pictures: Mapping[Place, Picture]) -> list[Section]:
    return [
        *(
            Section(
                f"Dropped: {why}",
                "Left: kept. Right: dropped.",
                groups=[[pictures[kept], pictures[copy]] for kept, copy in pairs],
            )
            for why, pairs in examples.copies.items()
        ),
        *(
            Section(f"Dropped: {why}", groups=[[pictures[row]] for row in of_rule])
            for why, of_rule in examples.dropped.items()
        ),
        Section("Random kept rows", groups=[[pictures[row]] for row in examples.kept]),
    ]


def credit_sections(card: Mapping[str, Any]) -> list[Section]:
    """Sections of a page on the licences and the sources that the card of a corpus counts."""
    without, unnamed = card["without_licence"], card["without_source"]
    bars = [*card["licences"].items(), *([("no licence named", without)] if without else [])]
    sources = [("source", "licence", "author", "rows")] + [
        (
            f"{one.get('package')}{'@' if one.get('version') else ''}{one.get('version') or ''}",
            str(one.get("licence") or ""),
            str(one.get("author") or ""),
            f"{one['pictures']:,}" if "pictures" in one else "",
        )
        for one in card["sources"]
    ]
    text = f"{unnamed:,} of {card['rows']:,} name no source." if unnamed else ""
    return [
        Section("Licences of the kept rows", text, bars=bars),
        Section(
            "Sources of the kept rows",
            "Credit these authors where you pass on the pictures, or weights trained on them.",
            table=sources if len(sources) > 1 else (),
        ),
    ]


def _choose_examples(
    judged: Judged,
    report: Report,
    folder: str,
    searches: Sequence[Search],
    rng: np.random.Generator,
) -> _Examples:
    # Showing a row costs a read of its shard: take the examples from a few shards.
    read = np.flatnonzero(judged.read)
    drawn = sorted(rng.choice(read, min(PAGE_PARTS, len(read)), replace=False).tolist())
    rows: list[pyarrow.Table] = []
    copies: dict[str, list[tuple[Place, Place]]] = {search.reason: [] for search in searches}
    for part in drawn:
        table = load(judged_file(folder, part), ["reason", "caption", "width", "height"])
        reason = np.array(table["reason"].to_pylist(), object)
        for search in searches:
            found = dropped_copies(search, part)
            reason[found["position"].to_numpy()] = search.reason
            copies[search.reason] += [
                ((row["kept_part"], row["kept_position"]), (part, row["position"]))
                for row in found.to_pylist()
            ]
        rows += [
            {**row, "reason": why, "place": (part, position)}
            for position, (row, why) in enumerate(zip(table.to_pylist(), reason, strict=True))
        ]

    def choose(some: Sequence, count: int) -> list:
        picked = rng.choice(len(some), min(count, len(some)), replace=False)
        return [some[n] for n in sorted(picked.tolist())]

    kept = [row for row in rows if row["reason"] == ""]
    dropped = {
        why: choose([row["place"] for row in rows if row["reason"] == why], PAGE_EXAMPLES)
        for why, _ in report.dropped.most_common()
        if why not in copies
    }
    return _Examples(
        {why: choose(pairs, PAGE_PAIRS) for why, pairs in copies.items()},
        dropped,
        choose([row["place"] for row in kept], PAGE_SAMPLES),
        {row["place"]: row["caption"] for row in rows},
        np.array([min(row["width"], row["height"]) for row in kept if row["width"]]),
        np.array([len(row["caption"]) for row in kept]),
        len(drawn),
    )


def _pictures(parts: Sequence[Part], examples: _Examples) -> dict[Place, Picture]:
    """Pictures of all examples and of the rows kept in place of near-duplicates."""
    places = sorted(
        {
            *examples.kept,
            *(place for pairs in examples.copies.values() for pair in pairs for place in pair),
            *(place for of_rule in examples.dropped.values() for place in of_rule),
        }
    )
    samples = read_rows(parts, places)
    pictures = {}
    for place in places:
        sample = samples.get(place)
        text = examples.captions.get(place)
        if not text and sample is not None:
            text = sample.captions[0] if sample.captions else sample.key
        pictures[place] = Picture(thumbnail(sample.image) if sample else None, text or "")
    return pictures
