"""Second stage of the demo: a corpus of a new style, and fine-tuning of the base model on it."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path

import torch

from ... import storage
from ...config import presets
from ...config.data import CleanConfig
from ...config.overrides import override
from ...config.training import Preset
from ...data import emoji
from ...data.images import centre_crop, decode, encode
from ...data.sources import read_corpus
from ...distributed.curation.clean import clean
from ...distributed.training.run import train
from ...evaluation.report import loss_curves
from ...models.weights import load_config
from ...progress import indented
from ...train.pack import read_trained, write_half
from ...train.run_folder import read_metrics
from .figures import LOSS
from .plan import STYLE, Plan
from .results import Result, Results

log = logging.getLogger(__name__)

SPLITS = "train", "held_out"  # splits to build: training pictures without skin tones
RECIPE = "emoji-base"  # preset of the shipped base model
PICTURES_SHOWN = 12  # pictures of the corpus on the page


# -- the corpus ----------------------------------------------------------------------------------


def make_corpus(out: Path, packages: Path | None) -> Result:
    """Render the style, clean both splits, and write some of its pictures for the page.

    `packages`: folder of npm tarballs; None fetches them with npm. Returns numbers of rows, among
    others: `read` of both splits, `kept` of each split, and `dropped` by reason. The clean shards
    are in `out`/clean. Raises UserError.
    """
    raw, folder = out / "corpus", out / "clean"
    with indented():
        emoji.build_corpus(raw, styles=(STYLE,), packages=packages, splits=SPLITS)
    read = 0
    kept: dict[str, int] = {}
    dropped: dict[str, int] = {}
    for split in SPLITS:
        with indented():
            done = clean(f"{raw}/{split}", f"{folder}/{split}", CleanConfig())
        read, kept[split] = read + done.read, done.report.kept
        for reason, count in done.report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    return {"read": read, "kept": kept, "dropped": dropped, **_write_examples(folder, out)}


def _write_examples(folder: Path, out: Path) -> Result:
    names: list[str] = []
    captions: list[str] = []
    for sample in islice(read_corpus(folder / "train"), PICTURES_SHOWN):
        names.append(f"pictures/corpus-{len(names):02d}.png")
        captions.append(sample.captions[0])
        storage.put(encode(centre_crop(decode(sample.image), 256)), out / names[-1])
    return {"examples": names, "captions": captions, "files": names}


# -- fine-tuning ---------------------------------------------------------------------------------


def tune(out: Path, plan: Plan, base: Path) -> Result:
    """Fine-tune the base model, and write LOSS and float16 weights with their sources.

    An interrupted run resumes, unless it began from other weights or settings. Returns the file
    name of the `weights`, the model's `name`, `steps`, `images`, and the held-out loss `before` and
    `after`, among others. Raises UserError.
    """
    preset = tuning_preset(out, plan, base)
    name, train_config = preset.model.name, preset.train
    run, weights = out / name, f"{name}.safetensors"
    key = {"base": storage.fingerprint(base), "settings": list(plan.settings)}
    Results(out).cached_result("run", key, lambda: _clear(run))
    done = train(preset, run)
    write_half(read_trained(run), out / weights)
    loss_curves({name: read_metrics(done.metrics)}, out / LOSS)
    return {
        "name": name,
        "weights": weights,
        "steps": done.steps,
        "images": done.steps * train_config.batch,
        "workers": train_config.workers,
        "zero_stage": train_config.zero_stage,
        "before": done.first_held_out,
        "after": done.last_held_out,
        "files": [weights, LOSS],
    }


def tuning_preset(out: Path, plan: Plan, base: Path) -> Preset:
    """Preset that fine-tunes the weights file `base` on the new style.

    RECIPE with that file's model and weights, the demo's corpus and the plan's settings; a single
    worker if there is a single GPU.
    """
    preset, model = presets.get(RECIPE), load_config(base)
    folder = out / "clean"
    return override(
        preset.model_copy(
            update={
                "model": model.model_copy(update={"name": f"{model.name}-{STYLE}"}),
                "data": preset.data.model_copy(
                    update={
                        "corpus": str(folder / "train"),
                        "held_out": str(folder / "held_out"),
                        "shares": {},
                        "min_size": model.image_size,
                    }
                ),
                "train": preset.train.model_copy(update={"start_from": str(base)}),
            }
        ),
        (*plan.settings, *(["workers=1"] if torch.cuda.device_count() == 1 else [])),
    )


def _clear(run: Path) -> Result:
    """Delete a run that began from other weights or settings."""
    if run.exists():
        shutil.rmtree(run)
    return {}
