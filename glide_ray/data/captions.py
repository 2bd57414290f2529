"""Captions: the emoji's from its names and keywords, and the choice of one per image and epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def emoji_captions(name: str, keywords: Sequence[str], style: str) -> list[str]:
    """Several true sentences about one picture: "a red apple, 3D render", the bare name, the name with keywords."""
    name = name.strip().lower()
    useful = [word for word in (keyword.replace("_", " ").lower() for keyword in keywords) if word not in name][:4]
    captions = [f"{_article(name)}{name}, {style}", f"{name} emoji, {style}", name]
    if useful:
        captions += [f"{name}, {', '.join(useful)}, {style}", f"{style} of {_article(name)}{name}, {useful[0]}"]
    return captions


def choose(captions: Sequence[str], key: str, epoch: int, seed: int, empty_rate: float = 0.0) -> str:
    """One caption of an image for this epoch, or the empty one at `empty_rate` (sec. 4.2): always the same for the same arguments."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < empty_rate:
        return ""
    return captions[int.from_bytes(digest[8:16], "big") % len(captions)]


def _article(name: str) -> str:
    """"a " or "an " before a countable name; nothing before plurals, numbers, flags and other proper names."""
    if not name[:1].isalpha() or name.endswith("s") or name.startswith(("flag", "keycap", "input", "people", "men ", "women ")):
        return ""
    return "an " if name[0] in "aeiou" else "a "
