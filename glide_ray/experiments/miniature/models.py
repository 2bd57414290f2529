"""Models of the experiments: the shipped base model, small models like it, and two CLIPs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...config import presets
from ...config.models import SHIPPED, ModelConfig
from ...config.overrides import override
from ...config.training import Preset
from ...data import emoji
from ...data.filters import Candidate
from ...data.images import centre_crop, decode, encode
from ...data.shards import Sample, read_index, write_shards
from ...data.sources import find_parts, folder_name, in_share, read_corpus, read_part, share_of
from ...models.weights import load_weights, save_weights, without_known_channels
from ...pretrained import shipped
from ...train.without_ray import train_alone

log = logging.getLogger(__name__)

SIDE = 64  # pixels of every picture
# Share of the rows to read: tones and scenes are many variants of the same few things
VARIANTS = {"tones": 0.1, "scenes": 0.2}
LARGE, JUDGE, CLIP, SMALL, FILTERED = "large", "judge", "clip", "small", "small-filtered"
STRIPPED = "large-stripped"

# A tenth of the shipped model's parameters, like the paper's 300M of 3.5B
SMALL_NET = [
    "model.unet.channels=16",
    "model.unet.groups=16",
    "model.unet.head_channels=16",
    "model.unet.text.width=32",
    "batch=64",
    "learning_rate=2e-3",
    "warmup_steps=100",
    "ema_rates=0.995",
    "steps=900",
]
CLIP_NET = ["model.clip.context=32", "batch=256", "steps=300", "ema_rates=0.98", "precision=auto"]


@dataclass(frozen=True)
class Model:
    """How a model is trained: its preset, overrides of it, and the folder of the pictures."""

    preset: str
    settings: list[str]
    corpus: str = "everyone"


MODELS = {
    JUDGE: Model("nano-plain-clip", CLIP_NET),  # only scores: trained without noise
    CLIP: Model("nano-clip", CLIP_NET),  # sec. 4.4
    SMALL: Model("emoji-base", SMALL_NET),  # app. C
    FILTERED: Model("emoji-base", SMALL_NET, "nobody"),  # sec. 5.4, without people
}


def train_all(out: Path, corpus: Path) -> dict[str, Path]:
    """Weights of all models by name; trains those that are missing. Raises UserError."""
    shrink(corpus, out)
    weights = {LARGE: Path(shipped.locate(SHIPPED, "base"))}
    for name in MODELS:
        done = train_alone(preset(name, out), out / name)
        weights[name] = done.weights
        if done.images_per_s:
            log.info(f"{name}: {done.step:,} steps, {done.images_per_s:,.0f} images/s")
    weights[STRIPPED] = out / f"{STRIPPED}.safetensors"
    strip(weights[LARGE], weights[STRIPPED])
    return weights


def preset(name: str, out: Path) -> Preset:
    """The complete preset for training one of MODELS."""
    model = MODELS[name]
    return override(
        presets.get(model.preset),
        [
            "data.cache_gib=1",
            "sample_every=none",
            "trackers=",
            "workers=1",
            "evaluate_every=100",
            "checkpoint_every=100",
            *model.settings,
            f"data.corpus={out / 'corpus' / model.corpus}",
            f"data.held_out={out / 'corpus' / 'held_out'}",
        ],
    )


def strip(inpainting: Path, out: Path) -> None:
    """Write an inpainting model's weights without the input channels of the known pixels.

    The same network, but it does not see the known pixels.
    """
    config, state = load_weights(inpainting)
    assert isinstance(config, ModelConfig)  # no CLIP inpaints
    unet = config.unet.model_copy(update={"inpaint": False})
    stripped = config.model_copy(update={"name": f"{config.name}-stripped", "unet": unet})
    save_weights(out, without_known_channels(state, unet), stripped)


# -- pictures of 64 pixels -------------------------------------------------------------------------


def shrink(corpus: Path, out: Path) -> None:
    """Copy the corpus at SIDE pixels to `out`/corpus, so that every model decodes it quickly.

    The folders are `everyone`, `nobody` (the same without people) and `held_out`. Raises ShardError
    if there is no corpus.
    """
    folder = out / "corpus"
    if not read_index(folder / "everyone"):
        log.info(f"pictures of {SIDE} pixels of {corpus}")
        write_shards(
            folder / "everyone",
            _shrunk(
                f"{corpus}/{{train,tones,scenes}}"
                if (corpus / "scenes").exists()
                else f"{corpus}/{{train,tones}}"
            ),
        )
    if not read_index(folder / "nobody"):
        people = {
            sample.meta.get("emoji")
            for sample in read_corpus(folder / "everyone")
            if emoji.shows_people(Candidate(sample))
        }
        write_shards(
            folder / "nobody",
            (sample for sample in read_corpus(folder / "everyone") if not people & _things(sample)),
        )
    if not read_index(folder / "held_out"):
        write_shards(folder / "held_out", _shrunk(f"{corpus}/held_out_pairs"))


def _things(sample: Sample) -> set:
    """Code points of the emoji that a picture or scene shows."""
    return {
        sample.meta.get("emoji"),
        *(one.get("emoji") for one in sample.meta.get("objects") or ()),
    }


def _shrunk(path: str) -> Iterator[Sample]:
    for part in find_parts(path):
        folder = folder_name(part)
        for sample in read_part(part):
            variant = "tones" if "tone" in sample.meta else folder
            if in_share(sample.key, 0, 0, share_of(VARIANTS, variant, sample)):
                pixels = centre_crop(decode(sample.image), SIDE)
                yield Sample(
                    sample.key, encode(pixels, fast=True), "png", sample.captions, sample.meta
                )
