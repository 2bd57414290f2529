"""Errors that a user can fix; each message is one clear sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. The message is one sentence with the cause and the remedy."""


class ConfigError(UserError):
    """An invalid setting."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Hint for a misspelled name: the closest known name, or all of them if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of: " + ", ".join(known) + "."
