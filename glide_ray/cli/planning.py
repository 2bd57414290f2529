"""Commands that compute and start nothing: settings, presets, info and plan."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..config import presets
from ..config.models import SHIPPED
from ..errors import UserError
from .arguments import Commands, Parser, add_preset, add_settings, positive, read_preset


def add_commands(commands: Commands) -> None:
    commands.add(
        "settings",
        settings,
        "every setting of training, cleaning, filtering, serving and bulk generation",
        "The same as docs/configuration.md, in Markdown: name, kind, default and meaning.\n"
        "example:\n  glide settings | grep -i checkpoint",
    )
    commands.add(
        "presets",
        list_presets,
        "every preset of training, with the size of its pictures and of its training",
        "A preset is a model with the settings of its training; docs/presets.md describes each.",
    )
    command = commands.add(
        "info",
        info,
        "what a preset or a file of weights is: parameters, size, operations, sampling, sources",
        "examples:\n  glide info filtered-base\n  glide info runs/mine/weights.safetensors\n"
        "  glide info adapter.safetensors\n  glide info base.pt\n  glide info emoji\n"
        "Of a preset it prints the parameters of each part, memory and operations; of a file what "
        "it is,\nits parameters, size, SHA-256, default sampling, recipe and sources.",
    )
    command.add_argument(
        "preset",
        metavar="PRESET|FILE",
        help="a preset (`glide presets`); or a weights file, an adapter, a published .pt file, a "
        "CLIP, the folder of a run, local or s3://, or emoji, the shipped weights",
    )
    add_settings(command)
    _add_plan(commands)


def settings(options: Namespace) -> None:
    from ..config import data, models, sampling, serving, training
    from ..config.models import Frozen
    from ..config.reference import reference

    configs: list[type[Frozen]] = [
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


def list_presets(options: Namespace) -> None:
    rows = []
    for name in presets.PRESETS:
        preset = presets.get(name)
        train = preset.train
        rows.append(
            (name, f"{preset.model.image_size} px", f"{train.steps:,} steps of {train.batch:,}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    print(
        "\n`glide info PRESET` has its parameters, `glide plan PRESET` its memory, days and price."
    )


def info(options: Namespace) -> None:
    name = options.preset
    if name not in presets.PRESETS and (name == SHIPPED or _is_path(name)):
        if options.set:
            raise UserError("--set changes a preset, and a file stays as it is; leave it out.")
        from ..pretrained.about import about

        return print(about(name))
    preset = read_preset(options)
    from ..models.cost import describe

    print(describe(preset))


def _is_path(text: str) -> bool:
    """Whether a text can only be a path: it has a slash or an ending, or is there."""
    return "/" in text or bool(Path(text).suffix) or Path(text).exists()


# -- plan ------------------------------------------------------------------------------------------


def _add_plan(commands: Commands) -> None:
    command = commands.add(
        "plan",
        plan,
        "cost of training a preset: memory of a worker by part, the ZeRO stage that fits, days and "
        "price",
        "examples:\n  glide plan paper-base --gpus 64 --gpu h100 --set batch=2048 --price 2.5\n"
        "  glide plan nano-base --gpu cpu\n"
        "It computes and starts nothing. The --set options that it prints are for `glide train`.\n"
        "Peak FLOP/s and link speeds come from data sheets, the time to launch operations from a\n"
        "measurement. The part of the peak that training reaches is assumed, unless you pass it.",
    )
    add_preset(command)
    command.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="number of workers, one per GPU (default: the preset's train.workers)",
    )
    command.add_argument(
        "--gpu",
        metavar="KIND",
        help="kind of GPU: h100, a100-80gb, l40s and others, or cpu for the CPU of this machine "
        "(default: this machine)",
    )
    command.add_argument(
        "--price", type=float, help="price of one GPU for one hour, in any currency"
    )
    _add_measured(command)


def _add_measured(parser: Parser) -> None:
    """Add measured values of one worker that replace assumptions."""
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="PART",
        help="part of the peak FLOP/s that training reaches, from 0 to 1 (default: 0.35, assumed)",
    )
    parser.add_argument("--tflops", type=float, help="measured TFLOP/s of one worker in training")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="memory of one GPU (default: from the data sheet); with --tflops, any --gpu will do",
    )
    parser.add_argument(
        "--link",
        type=float,
        metavar="GB/S",
        help="GB/s that a worker sends in one direction (default: from the data sheet, of NVLink "
        "for up to 8 GPUs, of the network of AWS's machines for more)",
    )


def plan(options: Namespace) -> None:
    from ..config.overrides import override

    workers = [f"workers={options.gpus}"] if options.gpus else []
    preset = override(presets.get(options.preset), [*options.set, *workers])
    from ..train.hardware import find_machine
    from ..train.plan import describe

    machine = find_machine(
        options.gpu,
        preset.train.workers,
        preset.train.precision,
        options.utilisation,
        options.tflops,
        options.link,
        options.memory,
    )
    text, chosen = describe(preset, machine, options.price)
    print(text)
    if chosen is None:
        raise UserError(
            f"{preset.model.name} does not fit {preset.train.workers} x {machine.name} in any of "
            "these ways; use more workers, or GPUs with more memory."
        )
