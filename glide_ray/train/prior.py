"""Prior preservation (DreamBooth, Ruiz et al. 2022): pictures that a fine-tuned model is to keep.

Training mixes them with the new pictures at equal weight, so that the words keep their meaning.
They are made by the weights before training, from prompts, or are a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import storage
from ..config.models import ModelConfig
from ..data import patterns
from ..data.images import encode
from ..data.shards import Sample, write_shards
from ..errors import UserError
from ..precision import fastest_precision
from ..sampling.cascade import Cascade
from .run_folder import METRICS

FOLDER = "data/prior"
ASKED = "data/prior.json"  # what the pictures in FOLDER were made from
PICTURES_PER_CALL = 16


@dataclass(frozen=True)
class Prior:
    """What the model is to keep: pictures made from `prompts`, or those of `corpus`.

    `pictures`: number to make, if that is more than the new ones.
    """

    prompts: tuple[str, ...] = ()
    pictures: int = 100
    corpus: str | None = None

    def __bool__(self) -> bool:
        return bool(self.prompts or self.corpus)


def corpus_of(prior: Prior, new: int, config: ModelConfig, weights: Path, out: Path) -> str:
    """The corpus of pictures to keep; pictures are made by `weights`, once. Raises UserError.

    `new`: number of new pictures. An epoch of an equal mixture reads no more of them than there
    are pictures to keep.
    """
    if prior.corpus:
        if prior.prompts:
            raise UserError("--prior makes pictures and --prior-corpus reads them; give one.")
        return prior.corpus
    if config.low_res_size:
        raise UserError(
            f"--prior makes pictures with a base model, and {config.name} is an upsampler; give "
            "pictures with --prior-corpus."
        )
    folder, number = out / FOLDER, max(new, prior.pictures)
    asked = json.dumps({"prompts": prior.prompts, "pictures": number}).encode()
    if storage.exists(out / ASKED) and storage.read(out / ASKED) == asked:
        return str(folder)
    if (out / METRICS).exists():
        raise UserError(
            f"{out} holds a run with other prior pictures; give another folder with --out, or "
            "delete it."
        )
    storage.remove_folder(folder)
    write_shards(folder, _made(prior.prompts, number, weights))
    storage.put(asked, out / ASKED)
    return str(folder)


def equal_mixture(new: str, kept: str) -> str:
    """A mixture with half its rows from `new`, half from `kept` (a corpus or a mixture)."""
    parts = patterns.mixture(kept) or [(kept, 1.0)]
    total = sum(weight for _, weight in parts)
    return ",".join([f"{new}:0.5", *(f"{one}:{weight / total / 2:.6g}" for one, weight in parts)])


def _made(prompts: Sequence[str], number: int, weights: Path) -> list[Sample]:
    """Pictures of the prompts, each equally often, with consecutive seeds."""
    cascade = Cascade.load(weights, None, fastest_precision(), PICTURES_PER_CALL, batched=True)
    prompts = [prompts[n % len(prompts)] for n in range(number)]
    images = cascade.generate(prompts, range(number))
    return [
        Sample(f"prior-{n}", encode(image), "png", (prompt,), {})
        for n, (image, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
