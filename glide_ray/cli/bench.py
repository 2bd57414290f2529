"""Command that measures speed, memory, serving and quality: bench."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import presets
from ..config.models import SHIPPED
from .arguments import CORPUS, PRECISIONS, SAMPLE_SIZES, Commands, Parser, local_path, positive

BASE = Path("runs/nano-base/weights.safetensors")
INPAINT = Path("runs/nano-base-inpaint/weights.safetensors")
NOISED_CLIP = Path("runs/nano-clip/weights.safetensors")

EPILOG = """\
benchmarks of this machine, with random weights:
  forward     one forward pass of --preset (default paper-base)
  sample      one guided step of --preset (default filtered-base), as a ratio to the released code
  cascade     seconds per picture and pictures per second of --preset paper, filtered (default),
              emoji or nano
  train       a training step of --preset (default emoji-base), as ratios to a plain PyTorch loop
              and to a bare loop of the same precision
  plan        memory that `glide plan` predicts, as a ratio to the measured memory of training on
              the CPU, for all measured presets or only --preset
  faults      goodput of a run on two workers, one of them killed every minute, for --seconds
  serve       latency and cost of the server with --preset nano (default) or emoji, as ratios to
              whole-request batching and to a server without a model
  data        images per second of the stream, as a ratio to webdataset; milliseconds to decode a
              photo of 12 megapixels, as a ratio to decoding it whole
  feeder      CPU milliseconds of the feeder for a training step of 256 workers
  clean       images per second of `glide clean`, as a ratio to a loop over Pillow
  duplicates  seconds and peak memory of its search for near-duplicates, at 10^5 to 10^7 images
  semantic    seconds and peak memory of its search for semantic duplicates, at 10^5 images
  memory      peak memory of the stream over 100,000 images, as a ratio to 10,000
benchmarks of trained models:
  samplers    RMSE of each sampler and grid to 250 DDIM steps, of --base and --upsampler
  distance    distance to real pictures of the corpus beside --shards, as a ratio to 150 and 27
              ancestral steps, of --base and --upsampler
  inpainting  error at the border of the hole, of --base and of --inpaint
  guidance    score by --clip over the guidance scale
  recipe      held-out error of emoji-base with other training settings, at equal computing time
"""


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "bench",
        bench,
        "measure this machine or trained models; prints one line of JSON",
        EPILOG,
    )
    command.add_argument(
        "what", choices=list(BENCHMARKS), metavar="BENCHMARK", help="see the list below"
    )
    _add_inputs(command)
    command.add_argument(
        "--preset", help="preset to measure, or family of presets for cascade and serve"
    )
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="precision of forward, sample, cascade and train (default: %(default)s)",
    )
    command.add_argument(
        "--size",
        type=int,
        choices=SAMPLE_SIZES,
        default=64,
        help="pixels of the pictures that serve makes; 64 uses the base model alone "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--seconds",
        type=positive,
        default=120,
        help="seconds of open-loop load for serve, of training for faults, of computing per run "
        "of recipe "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--pictures",
        type=positive,
        help="pictures to make (default: 64 for samplers, 200 for distance)",
    )
    command.add_argument(
        "--repeats",
        type=positive,
        help="repetitions (default: 1 for forward, 5 for sample and train, 3 for cascade, plan, "
        "data, clean and recipe)",
    )


def _add_inputs(parser: Parser) -> None:
    """Add the weights and corpora that benchmarks read."""
    parser.add_argument(
        "--base",
        type=local_path,
        help=f"weights of the base model (default: {BASE} for inpainting, {SHIPPED} otherwise)",
    )
    parser.add_argument(
        "--upsampler",
        type=local_path,
        default=Path(SHIPPED),
        help="weights of the upsampler, for samplers and distance (default: %(default)s)",
    )
    parser.add_argument(
        "--inpaint",
        type=local_path,
        default=INPAINT,
        help="weights of a base model trained for inpainting (default: %(default)s)",
    )
    parser.add_argument(
        "--clip",
        type=local_path,
        default=NOISED_CLIP,
        help="weights of noised CLIP, for guidance (default: %(default)s)",
    )
    parser.add_argument(
        "--corpus",
        type=local_path,
        default=Path(CORPUS, "held_out"),
        help="held-out corpus, for inpainting, faults and recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--shards",
        default=f"{CORPUS}/train",
        help="training corpus, for data, memory, faults, recipe and distance "
        "(default: %(default)s)",
    )


def bench(options: Namespace) -> None:
    print(json.dumps(BENCHMARKS[options.what](options)))


def _forward(options: Namespace) -> dict[str, Any]:
    from ..bench.speed import bench_forward

    preset = presets.get(options.preset or "paper-base")
    return bench_forward(preset, options.precision, options.repeats or 1)


def _sample(options: Namespace) -> dict[str, Any]:
    from ..bench.speed import bench_sample

    preset = presets.get(options.preset or "filtered-base")
    return bench_sample(preset, options.precision, options.repeats or 5)


def _cascade(options: Namespace) -> dict[str, Any]:
    from ..bench.speed import bench_cascade

    return bench_cascade(options.preset or "filtered", options.precision, options.repeats or 3)


def _train(options: Namespace) -> dict[str, Any]:
    from ..bench.training import bench_train

    preset = presets.get(options.preset or "emoji-base")
    return bench_train(preset, options.precision, options.repeats or 5)


def _plan(options: Namespace) -> dict[str, Any]:
    from ..bench.training import bench_plan

    return bench_plan(options.preset, options.repeats or 3)


def _faults(options: Namespace) -> dict[str, Any]:
    from ..bench.faults import bench_faults

    return bench_faults(options.shards, str(options.corpus), options.seconds)


def _serve(options: Namespace) -> dict[str, Any]:
    from ..bench.serving import bench_serve

    return bench_serve(options.preset or "nano", options.size, options.seconds)


def _data(options: Namespace) -> dict[str, Any]:
    from ..bench.data import bench_data

    return bench_data(options.shards, options.repeats or 3)


def _memory(options: Namespace) -> dict[str, Any]:
    from ..bench.data import bench_memory

    return bench_memory(options.shards)


def _feeder(options: Namespace) -> dict[str, Any]:
    from ..bench.feeder import bench_feeder

    return bench_feeder(options.repeats or 3)


def _clean(options: Namespace) -> dict[str, Any]:
    from ..bench.clean import bench_clean

    return bench_clean(options.repeats or 3)


def _duplicates(_: Namespace) -> dict[str, Any]:
    from ..bench.clean import bench_duplicates

    return bench_duplicates()


def _semantic(_: Namespace) -> dict[str, Any]:
    from ..bench.semantic import bench_semantic

    return bench_semantic()


def _samplers(options: Namespace) -> dict[str, Any]:
    from ..bench.samplers import bench_samplers

    return bench_samplers(options.base or SHIPPED, options.upsampler, options.pictures or 64)


def _distance(options: Namespace) -> dict[str, Any]:
    from ..bench.samplers import bench_distance

    corpus, pictures = str(Path(options.shards).parent), options.pictures or 200
    return bench_distance(options.base or SHIPPED, options.upsampler, corpus, pictures)


def _inpainting(options: Namespace) -> dict[str, Any]:
    from ..bench.quality import bench_inpainting

    return bench_inpainting(options.base or BASE, options.inpaint, options.corpus)


def _guidance(options: Namespace) -> dict[str, Any]:
    from ..bench.quality import bench_guidance

    return bench_guidance(options.base or SHIPPED, options.clip)


def _recipe(options: Namespace) -> dict[str, Any]:
    from ..bench.recipe import bench_recipe

    return bench_recipe(
        options.shards,
        str(options.corpus),
        options.seconds,
        options.repeats or 3,
    )


BENCHMARKS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "forward": _forward,
    "sample": _sample,
    "cascade": _cascade,
    "train": _train,
    "plan": _plan,
    "faults": _faults,
    "serve": _serve,
    "data": _data,
    "memory": _memory,
    "feeder": _feeder,
    "clean": _clean,
    "duplicates": _duplicates,
    "semantic": _semantic,
    "samplers": _samplers,
    "distance": _distance,
    "inpainting": _inpainting,
    "guidance": _guidance,
    "recipe": _recipe,
}
