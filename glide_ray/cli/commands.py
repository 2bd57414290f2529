"""Implementation of the commands of `glide`.

Each function imports its own libraries, so that a command loads no others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..config import presets
from ..config.data import CleanConfig, FilterConfig
from ..config.models import SHIPPED
from ..config.overrides import override, validate
from ..config.serving import ServeConfig
from ..config.training import Preset
from ..errors import UserError

EMOJI, FILTERS, DEMO = "runs/corpus", Path("runs/filters"), Path("runs/demo")
BASE = Path("runs/nano-base/weights.safetensors")
CLIP = Path("runs/nano-plain-clip/weights.safetensors")
# Content that the emoji corpus can label by itself: rule, settings, search words.
# "people" is most of the corpus, so random rows are labelled, as in the paper. Its 320 kinds are
# too few to guarantee 1% missed at 95% confidence without dropping nearly everything.
KNOWN = {
    "people": (
        "glide_ray.data.emoji:shows_people",
        ["labels=2000", "first=2000", "confidence=0.55"],
        [],
    ),
    "weapons": (
        "glide_ray.data.emoji:shows_weapon",
        [],
        [
            f"{name}, {style}"
            for style in ("3D render", "flat icon")
            for name in (
                "weapon",
                "dagger",
                "kitchen knife",
                "water pistol",
                "bomb",
                "bow and arrow",
                "axe",
            )
        ],
    ),
}


def demo(options) -> None:
    if options.images:
        from ..experiments.demo.page import copy_pictures

        for path in copy_pictures(options.out, options.images):
            print(f"{path}: {path.stat().st_size:,} bytes")
        return
    from ..experiments.demo.run import run

    run(options.out, packages=options.packages)


def corpus(options) -> None:
    from ..distributed.curation.corpus import prepare, survey

    made = (
        [survey(options.survey, options.min_size)]
        if options.survey
        else prepare(
            options.out,
            options.min_size,
            (options.styles or "").split(","),
            options.packages,
            options.scenes,
        )
    )
    for part in made:
        print(
            f"{part.path}: {part.rows}; {part.captions:,} captions, {part.cut_captions} cut at "
            "128 tokens"
        )


def clean(options) -> None:
    config = override(CleanConfig(), options.set)
    from ..data.filters import users_rules

    rules = users_rules(options.rule)
    from ..distributed.curation import clean as cleaning
    from ..distributed.rows import DROPPED

    done = cleaning.clean(options.source, options.out, config, rules)
    print(f"{done.report}")
    print(
        f"{options.out}: {done.report.kept:,} rows in shards of at most {config.per_shard:,}, "
        f"{sum(shard['bytes'] for shard in done.index['shards']) / 1e6:,.1f} MB; what was left "
        f"out and why: {DROPPED}"
    )
    print(cleaning.write_page(done, options.source, options.out))


def fit_filter(options) -> None:
    from ..data.filters import users_rules

    known = KNOWN.get(options.name) if options.corpus is None else None
    truth, settings, words = known or (None, [], [])
    rules = users_rules([truth for truth in (options.truth or truth,) if truth], "--truth")
    config = override(override(FilterConfig(), settings), options.set)
    out = options.out or FILTERS / options.name
    from ..distributed.curation.fit_filter import FILTER, LABELS, SHEET, fit_content

    done = fit_content(
        options.name,
        options.corpus or f"{EMOJI}/train",
        out,
        options.clip,
        config,
        options.search or words,
        next(iter(rules.values()), None),
        options.held_out or (f"{EMOJI}/held_out" if options.corpus is None else None),
    )
    if done.content is not None:
        print(f"{out / FILTER}: {done.on_labels}")
    if done.assessment is not None:
        print(done.assessment)
    if done.content is not None:
        print(f"{out}/report.html")
    if done.waiting:
        print(
            f"{done.labelled:,} rows are labelled; {done.waiting} more are in {out / LABELS}, "
            f"their pictures in {out / SHEET}: write 1 or 0 for each, "
            "and run the same command again"
            + (", or use the filter as it is." if done.content is not None else ".")
        )


def apply_filter(options) -> None:
    from ..data.filters import users_rules

    truth = next(
        iter(users_rules([options.truth] if options.truth else [], "--truth").values()), None
    )
    from ..distributed.curation.apply_filter import apply_content
    from ..distributed.curation.fit_filter import FILTER

    named = FILTERS / options.filter / FILTER
    done = apply_content(
        named if named.exists() else options.filter,
        options.source,
        options.out,
        options.clip,
        truth,
        options.per_shard,
    )
    print(done.report)
    if done.assessment is not None:
        print(done.assessment)
    print(f"{options.out.rstrip('/')}/report.html")


def train(options) -> None:
    preset = _preset(options)
    out = options.out or Path("runs") / preset.model.name
    if options.no_ray:
        from ..train.without_ray import train_alone

        done = train_alone(preset, out, options.minutes)
        print(
            f"step {done.step:,}"
            + (
                ""
                if done.finished
                else f" of {preset.train.steps:,}; the same command goes on from here"
            )
            + f": {done.images_per_s:,.1f} images/s; EMA weights in {done.weights}"
        )
        return
    if options.minutes is not None:
        raise UserError("--minutes goes with --no-ray; leave it out, or set steps.")
    from ..distributed.training.run import train as run

    result = run(preset, out)
    if result.rows:
        print(f"rows streamed: {result.rows}")
    print(
        f"step {result.steps:,}: held-out loss {result.first_held_out:.4f} -> "
        f"{result.last_held_out:.4f}; EMA weights in {result.weights}"
    )


def pretrain(options) -> None:
    from ..experiments.pretrain import pretrain as run

    done = run(
        options.model,
        options.out,
        options.minutes,
        options.corpus,
        options.run or Path("runs") / options.model,
        options.packages,
        options.scenes,
        options.set,
    )
    print(f"step {done.step:,}; the same command goes on from here")


def export(options) -> None:
    from ..storage import is_remote
    from ..train.checkpoint import find_checkpoint
    from ..train.partition import export_to

    out = (
        options.out
        or (Path() if is_remote(options.checkpoint) else Path(options.checkpoint))
        / "exported.safetensors"
    )
    if options.half:
        return _export_half(find_checkpoint(options.checkpoint), out, options.ema_rate)
    preset, step, rate = export_to(find_checkpoint(options.checkpoint), out, options.ema_rate)
    print(f"{out}: {preset.model.name} after step {step:,}, averaged at rate {rate:g}")


def _export_half(checkpoint: str, out: str | Path, ema_rate: float | None) -> None:
    from ..train.pack import read_trained, write_half

    trained = read_trained(checkpoint, ema_rate=ema_rate)
    write_half(trained, out)
    recipe = trained.recipe
    said = (
        f"{len(trained.sources)} sources"
        if trained.sources
        else "no sources, for its corpus has no card.json"
    )
    print(
        f"{out}: {trained.config.name} after step {recipe['steps']:,}, EMA {recipe['EMA']}, in "
        f"float16; {said}"
    )


def pack(options) -> None:
    from ..pretrained import shipped
    from ..train import pack as packing

    recipes = [packing.read_recipe(path) for path in options.recipe] if options.recipe else [{}, {}]
    notes = packing.read_notes(options.notes) if options.notes else None
    pair = [
        packing.read_trained(path, options.corpus, recipe)
        for path, recipe in zip((options.base, options.upsampler), recipes, strict=True)
    ]
    card, folder = packing.pack(*pair, options.out, notes), options.out or shipped.FOLDER
    for file in card.files:
        print(
            f"{folder / file.name}: {file.model}, {file.parameters / 1e6:,.2f}M parameters, "
            f"{file.bytes:,} bytes, SHA-256 {file.sha256[:16]}..."
        )
    print(
        f"{folder / shipped.CARD}, {shipped.PAGE}: {len(card.sources)} sources, "
        f"{len(card.figures)} figures"
    )


def card(options) -> None:
    from ..pretrained import shipped
    from ..pretrained.card import card_of, render

    if str(options.base) == SHIPPED:
        shipped.find()
        print(render(shipped.shipped_card()), end="")
    else:
        print(render(card_of(shipped.locate(options.base, "base"))), end="")


def serve(options) -> None:
    given = {name: getattr(options, name) for name in ("host", "port", "precision", "clip", "keys")}
    given |= {
        "base": str(options.base),
        **({"upsampler": str(options.upsampler)} if options.upsampler else {}),
    }
    config = override(validate(ServeConfig, given), options.set)
    if options.upsampler is None and config.upsampler == SHIPPED:
        from ..pretrained.shipped import upsampler_for

        config = config.model_copy(update={"upsampler": upsampler_for(config.base)})
    from ..distributed.cluster import connect, joined
    from ..serving.deployment import build_application, check_port, cpus, serving

    build_application(config)  # reports a missing file before Ray starts
    if not joined():
        check_port(config)
    connect(cpus(config))
    with serving(config) as url:
        print(
            f"{url}/v1/images/generations  (documentation at {url}/docs; Ctrl-C ends it)",
            flush=True,
        )
        import threading

        threading.Event().wait()


def key(options) -> None:
    from ..serving.api_keys import new_key

    made = new_key(options.name, options.keys, options.at_once, options.per_minute)
    print(
        f"{made}\n"
        f"This is the only time it is shown; {options.keys} has its hash. Serve with --keys "
        f"{options.keys}."
    )


def import_released(options) -> None:
    from ..models.released import import_files
    from ..models.weights import save_weights

    config, state, metadata = import_files(options.files, options.vocabulary)
    out = options.out or Path("runs") / config.name / "weights.safetensors"
    save_weights(out, state, config, source="released", **metadata)
    print(
        f"{out}: {config.name}, {sum(tensor.numel() for tensor in state.values()) / 1e6:,.2f}M "
        "parameters, every key and shape checked"
    )


def export_released(options) -> None:
    from ..models.released import export_files
    from ..models.weights import load_weights

    config, state = load_weights(options.weights)
    for path in export_files(state, config, options.out or options.weights.with_suffix(".pt")):
        print(f"{path}: {config.name} under the released names")


def settings(options) -> None:
    from ..config import data, models, sampling, serving, training
    from ..config.reference import reference

    configs = [
        training.TrainConfig,
        data.DataConfig,
        models.ModelConfig,
        models.UNetConfig,
        models.TextConfig,
        models.ClipModelConfig,
        models.ClipConfig,
        models.DiffusionConfig,
        models.SamplingConfig,
        data.CleanConfig,
        data.FilterConfig,
        sampling.BulkConfig,
        sampling.SampleOptions,
        serving.ServeConfig,
        serving.ServedModel,
        serving.Scale,
    ]
    print(
        "# Settings\n\nWritten by `glide settings` from the config classes. `--set KEY=VALUE` "
        f"sets one by its dotted name; `none` is no value.\n\n{reference(configs)}",
        end="",
    )


def info(options) -> None:
    preset = _preset(options)
    from ..models.cost import describe

    print(describe(preset))


def plan(options) -> None:
    settings = [*options.set, *([f"workers={options.gpus}"] if options.gpus else [])]
    preset = override(presets.get(options.preset), settings)
    from ..train.hardware import find_machine
    from ..train.plan import describe

    machine = find_machine(
        options.gpu,
        preset.train.workers,
        preset.train.precision,
        options.utilisation,
        options.tflops,
        options.link,
    )
    text, chosen = describe(preset, machine, options.price)
    print(text)
    if chosen is None:
        raise UserError(
            f"{preset.model.name} does not fit {preset.train.workers} x {machine.name} in any of "
            "these ways; take more of them, or some with more memory."
        )


def bench(options) -> None:
    from ..bench import quality, training
    from ..bench import speed as benches

    base = options.base or SHIPPED
    run = {
        "forward": lambda: benches.bench_forward(
            presets.get(options.preset or "paper-base"), options.precision, options.repeats or 1
        ),
        "sample": lambda: benches.bench_sample(
            presets.get(options.preset or "filtered-base"), options.precision, options.repeats or 5
        ),
        "cascade": lambda: benches.bench_cascade(
            options.preset or "filtered", options.precision, options.repeats or 3
        ),
        "train": lambda: training.bench_train(
            presets.get(options.preset or "emoji-base"), options.precision, options.repeats or 5
        ),
        "plan": lambda: training.bench_plan(options.preset, options.repeats or 3),
        "samplers": lambda: quality.bench_samplers(base),
        "inpainting": lambda: quality.bench_inpainting(
            options.base or BASE, options.inpaint, options.corpus
        ),
        "data": lambda: _measure().bench_data(options.shards, options.repeats or 3),
        "memory": lambda: _measure().bench_memory(options.shards),
        "serve": lambda: _bench_serve(options),
        "recipe": lambda: _bench_recipe(options),
        "guidance": lambda: quality.bench_guidance(base, options.clip),
    }[options.what]
    print(json.dumps(run()))


def _bench_recipe(options) -> dict:
    from ..bench.recipe import bench_recipe

    return bench_recipe(
        options.shards,
        str(options.corpus),
        options.seconds,
        options.repeats or 3,
    )


def _bench_serve(options) -> dict:
    from ..bench.serving import bench_serve

    return bench_serve(
        options.preset or "nano",
        options.size,
        options.seconds,
    )


def _measure():
    from ..bench import data as measure

    return measure


# -- shared by commands ----------------------------------------------------------------------------


def _preset(options) -> Preset:
    return override(presets.get(options.preset), options.set)


def note(line: str) -> None:
    print(f"glide: {line}", file=sys.stderr)
