"""Prompts with weights of words and with a change on the way.

    a (red:1.5) apple          "red" counts one and a half times
    a [dog:cat:0.4] in a hat   a dog for the noisiest 40% of the process, then a cat

A backslash before a bracket makes it an ordinary character. Brackets without a number are ordinary,
too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from .checks import RequestError

MAX_WEIGHT = 4.0  # beyond about 3, pictures break
MAX_WEIGHTS = 16  # in a caption; each takes one more run of the text transformer
MAX_CHANGES = 16  # shares of the process at which a prompt changes
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_WEIGHT = re.compile(rf"(?<!\\)\(([^()]+):\s*{_NUMBER}\s*\)")
_PART = r"((?:\([^()]*\)|[^\[\]:()])*)"  # weights inside have a colon of their own
_CHANGE = re.compile(rf"(?<!\\)\[{_PART}:{_PART}:\s*{_NUMBER}\s*\]")
_ESCAPED = re.compile(r"\\([()\[\]])")


@dataclass(frozen=True)
class Caption:
    """What the model reads: tokens and mask (1, K), and the words with a weight.

    `emphasis`: pairs of a mask (1, K) without the weighted words, and their weight.
    `begin`: from this share of the process on, 0 = from pure noise.
    """

    tokens: Tensor
    mask: Tensor
    emphasis: tuple[tuple[Tensor, float], ...] = ()
    begin: float = 0.0


def read_prompt(prompt: str, context: int) -> tuple[Caption, ...]:
    """The captions of a prompt in the order of sampling, the first with `begin` 0.

    `context`: tokens that the model reads. Raises RequestError as `check_prompt` does.
    """
    return tuple(_caption(text, share, context) for share, text in _checked_texts(prompt))


def check_prompt(prompt: str) -> None:
    """Raise RequestError for a weight or a share that is out of range, or for too many."""
    _checked_texts(prompt)


def plain_text(prompt: str) -> str:
    """The prompt's first caption without weights, for models that read text alone."""
    return _plain(_at(prompt, 0.0))


def is_cut(prompt: str, context: int) -> bool:
    """Whether a caption of the prompt is longer than the tokens that the model reads."""
    tokenizer = Tokenizer(context)
    return any(tokenizer.encode(_plain(text)).cut for _, text in _checked_texts(prompt))


def literal(prompt: str) -> str:
    """The prompt that reads as this text, with its brackets as ordinary characters."""
    if not any(pattern.search(prompt) for pattern in (_WEIGHT, _CHANGE, _ESCAPED)):
        return prompt
    return re.sub(r"([()\[\]])", r"\\\1", prompt)


def _checked_texts(prompt: str) -> list[tuple[float, str]]:
    """The shares at which the captions begin, and their texts with weights and backslashes."""
    shares = {0.0}
    for change in _CHANGE.finditer(prompt):
        share = float(change[3])
        if not 0 < share < 1:
            raise RequestError(
                f"{change[0]!r} must change at a share of the process above 0 and below 1, "
                f"such as 0.4.",
                "prompt",
            )
        shares.add(share)
    if len(shares) > MAX_CHANGES + 1:
        raise RequestError(
            f"A prompt may change {MAX_CHANGES} times; this one changes {len(shares) - 1} times.",
            "prompt",
        )
    texts = [(share, _at(prompt, share)) for share in sorted(shares)]
    for _, text in texts:
        _check_weights(text)
    return texts


def _check_weights(text: str) -> None:
    weights = [*_WEIGHT.finditer(text)]
    if len(weights) > MAX_WEIGHTS:
        raise RequestError(
            f"A prompt may have {MAX_WEIGHTS} weights at a time; this one has {len(weights)}.",
            "prompt",
        )
    for found in weights:
        if float(found[2]) > MAX_WEIGHT:
            raise RequestError(
                f"The weight in {found[0]!r} may be at most {MAX_WEIGHT:g}; 1 is without effect. A "
                "backslash before each bracket makes it ordinary.",
                "prompt",
            )


def _plain(text: str) -> str:
    """A caption's text without weights and backslashes."""
    text = _WEIGHT.sub(lambda found: found[1], text)
    return _ESCAPED.sub(lambda found: found[1], text)


def _at(prompt: str, share: float) -> str:
    """The prompt at a share of the process, with its changes resolved."""
    return _CHANGE.sub(lambda change: change[2 if share >= float(change[3]) else 1], prompt)


def _caption(text: str, begin: float, context: int) -> Caption:
    """Split a text without changes into plain text and spans of weighted characters."""
    plain, spans, end = "", [], 0
    for found in _WEIGHT.finditer(text):
        plain += _ESCAPED.sub(lambda match: match[1], text[end : found.start()])
        first = len(plain.lower())  # a few letters, such as İ, have longer lower forms
        plain += _ESCAPED.sub(lambda match: match[1], found[1])
        spans.append((first, len(plain.lower()), float(found[2])))
        end = found.end()
    plain += _ESCAPED.sub(lambda match: match[1], text[end:])
    tokenizer = Tokenizer(context)
    tokens, mask = tokenizer.batch([plain])
    emphasis = []
    token_spans = tokenizer.spans(plain) if spans else []
    for first, last, weight in spans:
        words = [start < last and end > first for start, end in token_spans]
        if weight != 1 and any(words):
            without = mask.clone()
            without[0, : len(words)] &= ~torch.tensor(words)
            emphasis.append((without, weight))
    return Caption(tokens, mask, tuple(emphasis), begin)
