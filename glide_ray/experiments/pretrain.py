"""`glide pretrain`: train the shipped weights from package tarballs, without Ray or network."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import storage
from ..config import presets
from ..config.models import ModelConfig
from ..config.overrides import override
from ..config.training import Preset
from ..data.emoji import build_corpus
from ..data.images import encode
from ..errors import ConfigError, nearest
from ..models.weights import build_model, save_weights
from ..precision import DTYPES, single_precision
from ..train.pack import read_trained, write_half
from ..train.run_folder import METRICS
from ..train.samples import sample_grid
from ..train.text_first import CAPTIONS, SIDE, learn_words
from ..train.without_ray import MemoryCorpus, StartResult, train_alone

log = logging.getLogger(__name__)

MODELS = BASE, UPSAMPLER = "emoji-base", "emoji-upsampler"
# Weights with a pretrained text transformer; share of the minutes for its training
WORDS, WORDS_PART = "words.safetensors", 0.25
PART_BYTES = 15 * 2**20  # part of a weights file: fits in an e-mail or a small store
# Overrides on a GPU: with a CPU's batch size, kernel launches would be most of a step
ON_GPU = {
    BASE: [
        "batch=256",
        "learning_rate=2e-3",
        "constant_steps=1500",
        "evaluate_every=1000",
        "checkpoint_every=1000",
    ],
    UPSAMPLER: ["batch=64", "learning_rate=1.5e-3", "constant_steps=1500"],
}


def pretrain(
    name: str,
    out: Path,
    minutes: float,
    corpus: Path,
    run: Path,
    packages: Path | None = None,
    scenes: int = 20_000,
    settings: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> StartResult:
    """Build the corpus if it is missing, train for `minutes`, and write these files to `out`.

    `NAME.safetensors.0`, `.1`...   float16 weights with their sources and recipe, in parts of at
                                    most 15 MiB
    `NAME.json`                     SHA-256 and bytes of the whole file, and how it was trained
    `NAME.png`                      a sheet of samples
    `NAME.metrics.jsonl`            the run's metrics

    A base model's text transformer is trained first and alone, in WORDS_PART of the minutes, and
    then frozen: it forgets when trained together with the U-Net. The same command resumes an
    interrupted run. Raises UserError.
    """
    if name not in MODELS:
        raise ConfigError(f"{name!r} is not one of the shipped models; {nearest(name, MODELS)}")
    log.info(f"the corpus in {corpus}")
    build_corpus(corpus, styles=styles, packages=packages, scenes=scenes)
    preset = _preset(name, corpus, settings)
    if name == BASE and preset.train.start_from is None:
        if not (run / WORDS).exists():
            _learn_words(preset, run / WORDS, WORDS_PART * minutes)
            minutes *= 1 - WORDS_PART
        preset = override(preset, [f"start_from={run / WORDS}", "text_rate=0", *settings])
    done = train_alone(preset, run, minutes)
    log.info(f"{done.step:,} steps, {done.images_per_s:,.0f} images/s")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    trained = read_trained(run, recipe={"device": device})
    write_half(trained, run / "half.safetensors")
    _write_parts(run / "half.safetensors", out, name, dict(trained.recipe))
    grid = sample_grid(done.weights, preset)
    assert grid is not None  # none of MODELS is a CLIP
    storage.put(encode(grid), out / f"{name}.png")
    storage.put((run / METRICS).read_bytes(), out / f"{name}.{METRICS}")
    log.info(f"{out}: join the parts with `cat {name}.safetensors.* > {name}.safetensors`")
    return done


def _preset(name: str, corpus: Path, settings: Sequence[str]) -> Preset:
    return override(
        presets.get(name),
        [
            "trackers=",
            "sample_every=none",
            f"data.held_out={corpus}/held_out",
            f"data.corpus={corpus}/{{train,tones,scenes}}",
            *(ON_GPU[name] if torch.cuda.is_available() else []),
            *settings,
        ],
    )


def _learn_words(preset: Preset, path: Path, minutes: float) -> None:
    """Train only the text transformer of a new model, and write the model's weights to `path`."""
    torch.manual_seed(preset.train.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert isinstance(preset.model, ModelConfig)  # a base model, see `pretrain`
    model = build_model(preset.model).to(device)
    corpus = MemoryCorpus(preset)
    at_once = min(CAPTIONS, max(preset.train.batch, len(corpus.rows) // 8))
    corpus.preset = override(preset, [f"batch={at_once}"])
    precision = single_precision(preset.train.precision, device)
    explained = learn_words(model, corpus.endless(), minutes, DTYPES[precision])
    log.info(
        f"text transformer: captions explain {explained:.0%} of the variance of pictures of "
        f"{SIDE} pixels"
    )
    save_weights(path, model.state_dict(), preset.model)


def _write_parts(path: Path, out: Path, name: str, recipe: dict) -> None:
    """Write a file in parts, and the checksum and size that verify the joined file."""
    data = path.read_bytes()
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        storage.put(data[start : start + PART_BYTES], out / f"{name}.safetensors.{number}")
    about = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "recipe": recipe}
    storage.put(json.dumps(about, indent=1).encode(), out / f"{name}.json")
