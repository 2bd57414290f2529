"""What may enter a corpus: small named predicates over a row's bytes and captions, and a count of what each one dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .images import ImageError, open_image


@dataclass
class Report:
    """Rows kept, rows dropped by the name of the rule, and examples of each."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, reason: str | None) -> None:
        """Count one row: kept, or dropped for `reason`."""
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, key)

    def merge(self, other: Report) -> None:
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.examples = {**other.examples, **self.examples}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {rule} (such as {self.examples[rule]})" for rule, count in self.dropped.most_common())
        return f"{self.kept:,} kept" + (f"; dropped: {reasons}" if reasons else ", none dropped")


def reason_to_drop(image: bytes, captions: Sequence[str], min_size: int) -> str | None:
    """The name of the first rule that a row breaks, or None. Reads the header of the image, not its pixels."""
    if not image:
        return "without an image"
    try:
        width, height = open_image(image).size
    except ImageError:
        return "with an unreadable image"
    if min(width, height) < min_size:
        return f"smaller than {min_size} pixels"
    if not any(caption.strip() for caption in captions):
        return "without a caption"
    return None
