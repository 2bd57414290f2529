"""`glide tune`: fine-tune weights on a folder of pictures, with settings that suit its size."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import storage
from ..config import presets
from ..config.data import CleanConfig
from ..config.models import SHIPPED, ModelConfig
from ..config.overrides import override
from ..config.training import Preset
from ..data.filters import NO_CAPTION, Candidate, Report, first_broken, image_rules
from ..data.images import encode
from ..data.shards import Sample, write_shards
from ..data.sources import find_parts, read_part
from ..errors import UserError
from ..evaluation.report import contact_sheet
from ..models.cost import inspect
from ..models.weights import load_config
from ..pretrained import shipped
from ..sampling.cascade import Cascade
from .prior import Prior, corpus_of, equal_mixture
from .run_folder import ADAPTER, METRICS, read_metrics, result_of
from .samples import files_of, sample_grid

SPLIT = "data/split.json"  # what the shards in data/ were made from
FEWEST, MOST = 4, 100_000  # pictures
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 256
# Pictures seen in training for each square root of a picture: 20 pictures are seen 90 times each,
# 200 28 times, 20,000 3 times. The demo's 1,500 pictures need 5 times to show their style.
SEEN = 400
LARGE = 100e6  # parameters of a model that takes the small learning rate
RATES = {True: 2e-5, False: 3e-4}  # large model or not: learning rate at a batch of 64
# Learning rate of an adapter, in multiples of that of the weights: with 20 pictures the shipped
# weights and an adapter of rank 8 then reach the same held-out loss (0.0156 and 0.0155).
LORA_RATE = 9
PROMPTS = 2  # captions of held-out pictures on the sheets, and of pictures in training
SHEET = "before_after.png"


@dataclass(frozen=True)
class Tuned:
    """Result: files, numbers of pictures and steps, held-out loss before and after."""

    weights: Path
    sheet: Path
    pictures: Report
    held_out_pictures: int
    steps: int
    before: float
    after: float

    @property
    def what(self) -> str:
        return "adapter" if self.weights.name == ADAPTER else "weights"


def tune(
    weights: str,
    folder: str,
    out: str | Path,
    train: Callable[[Preset, Path], object],
    settings: Sequence[str] = (),
    prompts: Sequence[str] = (),
    caption: str | None = None,
    column: str | None = None,
    lora: int = 0,
    prior: Prior | None = None,
) -> Tuned:
    """Fine-tune `weights` (a file or "emoji") on the pictures of a corpus; the same call resumes.

    `train`: trains a preset into a folder, such as `train_alone`. `settings`: overrides of the
    preset. `prompts`: of the sheets, by default captions of pictures. `caption`: of pictures
    without one. `column`: field or column of captions. `lora`: rank of the adapter; 0: train the
    weights themselves. `prior`: pictures to keep. Raises UserError.
    """
    out = Path(storage.absolute(out))
    start = shipped.fetch(weights, "base")
    config = load_config(start)
    if not isinstance(config, ModelConfig):
        raise UserError(f"{weights} is a CLIP; glide tune takes a base model or an upsampler.")
    storage.check_writable(out)
    report = _split(folder, out, config.image_size, caption, column)
    held_out, known = (_captions(out / "data" / name) for name in ("held_out", "train"))
    kept = corpus_of(prior, report.kept, config, start, out) if prior else None
    preset = tuning_preset(config, weights, out, report.kept, len(held_out), settings, lora, kept)
    shown = tuple(prompts) or (*held_out[:PROMPTS], *known[:PROMPTS])
    preset = preset.model_copy(
        update={"train": preset.train.model_copy(update={"sample_prompts": shown})}
    )
    train(preset, out)
    _write_sheet(start, out, preset)
    losses = [row["held_out"] for row in read_metrics(out / METRICS) if "held_out" in row]
    return Tuned(
        out / result_of(preset.train),
        out / SHEET,
        report,
        len(held_out),
        preset.train.steps,
        losses[0],
        losses[-1],
    )


# -- settings --------------------------------------------------------------------------------------


def tuning_preset(
    model: ModelConfig,
    weights: str,
    out: Path,
    pictures: int,
    held_out: int,
    settings: Sequence[str] = (),
    lora: int = 0,
    prior: str | None = None,
) -> Preset:
    """Preset that fine-tunes a model on `pictures`, the `held_out` ones included.

    The batch grows with the pictures, the learning rate with the root of the batch, and each
    picture is seen more often the fewer there are. `lora`: as of `tune`. `prior`: corpus of
    pictures to keep, which are half of those that are seen. `settings` override the result.
    """
    recipe = _recipe_of(model)
    batch = 2 ** round(math.log2(min(64, max(8, pictures / 2))))
    steps = max(20, round(SEEN * math.sqrt(pictures) / batch))
    rate = RATES[inspect(model).parameters > LARGE] * math.sqrt(batch / 64)
    corpus = str(out / "data" / "train")
    if prior:
        steps, corpus = 2 * steps, equal_mixture(corpus, prior)
    if lora:
        rate *= LORA_RATE
    data = recipe.data.model_copy(
        update={
            "corpus": corpus,
            "held_out": str(out / "data" / "held_out"),
            "shares": {},
            "min_size": 1,  # `_split` has dropped the small ones
        }
    )
    named = model.model_copy(update={"name": f"{model.name}-tuned"})
    return override(
        recipe.model_copy(update={"model": named, "data": data}),
        [
            f"start_from={weights}",
            f"lora_rank={lora or None}",
            "workers=1",
            f"steps={steps}",
            f"batch={batch}",
            f"learning_rate={rate:.2g}",
            f"warmup_steps={max(5, steps // 20)}",
            f"ema_rates={1 - 1 / max(10, steps // 10):.4g}",
            f"held_out_images={held_out}",
            *("precision=auto", "constant_steps=none", "clip_norm=1"),
            *("empty_caption_rate=0.1", "log_every=5"),
            f"evaluate_every={max(1, steps // 8)}",
            *(f"{name}_every={max(1, steps // 4)}" for name in ("checkpoint", "sample")),
            *settings,
        ],
    )


def _recipe_of(model: ModelConfig) -> Preset:
    """The preset that a model like this one is trained with."""
    family = "emoji" if model.unet.prediction == "x0" else "filtered"
    return presets.get(f"{family}-{'upsampler' if model.low_res_size else 'base'}")


# -- pictures --------------------------------------------------------------------------------------


def _split(
    folder: str, out: Path, min_size: int, caption: str | None, column: str | None
) -> Report:
    """Copy the usable pictures to shards in out/data, with a tenth held out by their keys' hashes.

    Does nothing if an earlier call has done it for the same pictures.
    """
    parts = find_parts(folder, column)
    asked = {"parts": [repr(part) for part in parts], "caption": caption, "min_size": min_size}
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    path = out / SPLIT
    if path.exists() and (saved := json.loads(path.read_text()))["digest"] == digest:
        counts = saved["report"]
        return Report(counts["kept"], 0, Counter(counts["dropped"]), counts["examples"])
    if (out / METRICS).exists():
        raise UserError(
            f"{out} holds a run on other pictures; give another folder with --out, or delete it."
        )
    report, keys = Report(), []
    for sample in _usable(folder, min_size, caption, column, report):
        keys.append(_order(sample))
        if len(keys) > MOST:
            raise UserError(
                f"{folder} has more than {MOST:,} pictures; clean it with glide clean and train "
                "with glide train, which streams them."
            )
    if len(keys) < FEWEST:
        raise UserError(
            f"{folder} has {len(keys)} usable pictures ({report}); give at least {FEWEST}, each "
            f"of {min_size} pixels a side or more and with a caption (NAME.txt beside NAME.jpg, "
            "or --caption TEXT for all)."
        )
    number = min(MOST_HELD_OUT, max(2, round(HELD_OUT_SHARE * len(keys))))
    last = sorted(keys)[number - 1]
    for name, is_held_out in (("held_out", True), ("train", False)):
        samples = _usable(folder, min_size, caption, column, Report())
        write_shards(
            out / "data" / name, (one for one in samples if (_order(one) <= last) == is_held_out)
        )
    saved = {"kept": report.kept, "dropped": report.dropped, "examples": report.examples}
    storage.put(json.dumps({"digest": digest, "report": saved}).encode(), path)
    return report


def _usable(
    folder: str, min_size: int, caption: str | None, column: str | None, report: Report
) -> Iterator[Sample]:
    rules = image_rules(CleanConfig(min_size=min_size))
    for part in find_parts(folder, column):
        for sample in read_part(part):
            if not any(text.strip() for text in sample.captions) and caption:
                sample = replace(sample, captions=(caption,))
            reason = first_broken(Candidate(sample), rules)
            if reason is None and not any(text.strip() for text in sample.captions):
                reason = NO_CAPTION
            report.add(sample.key, reason)
            if reason is None:
                yield sample


def _order(sample: Sample) -> str:
    return hashlib.sha256(f"tune/{sample.key}".encode()).hexdigest()


def _captions(shards: Path) -> list[str]:
    return [sample.captions[0] for part in find_parts(str(shards)) for sample in read_part(part)]


# -- before and after ------------------------------------------------------------------------------


def _write_sheet(start: Path, out: Path, preset: Preset) -> None:
    """Write SHEET: each prompt with the weights before and after, from the same noise."""
    result = out / result_of(preset.train)
    if preset.model.low_res_size:  # an upsampler: its input, its sample and the original
        grids = [sample_grid(one, preset) for one in (start, result)]
        sheet = np.concatenate([grid for grid in grids if grid is not None])
    else:
        prompts = list(preset.train.sample_prompts)
        upsampler = SHIPPED if preset.train.start_from == SHIPPED else None
        before_after = [
            Cascade.load(one, upsampler, loras=loras).generate(prompts, list(range(len(prompts))))
            for one, loras in ((start, ()), files_of(result, preset))
        ]
        pictures = [picture for pair in zip(*before_after, strict=True) for picture in pair]
        labels = [f"{when}: {text}" for text in prompts for when in ("before", "after")]
        sheet = np.asarray(contact_sheet(pictures, labels, 4))
    storage.put(encode(sheet), out / SHEET)
