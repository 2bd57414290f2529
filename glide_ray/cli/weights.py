"""Commands for weights files: export, pack, card, import-released and export-released."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.models import SHIPPED
from ..errors import UserError
from .arguments import (
    Commands,
    Parser,
    add_base,
    add_seed,
    add_settings,
    local_path,
    lora,
    positive,
    read_preset,
)
from .terminal import progress_bar

if TYPE_CHECKING:
    from ..config.models import AnyModelConfig, ModelConfig
    from ..sampling.grids import GridSearch


def add_commands(commands: Commands) -> None:
    _add_export(commands)
    _add_pack(commands)
    _add_tune_sampler(commands)
    _add_card(commands)
    _add_import_released(commands)
    _add_export_released(commands)


# -- export ----------------------------------------------------------------------------------------


def _add_export(commands: Commands) -> None:
    command = commands.add(
        "export",
        export,
        "write the weights of a checkpoint to a file, tensor by tensor: needs no GPU and the "
        "memory of the largest tensor",
        "examples:\n  glide export runs/filtered-base --ema-rate 0.999 --out weights.safetensors\n"
        "  glide export runs/emoji-base --half --out emoji-base.safetensors\n"
        "  glide export emoji --lora runs/mine/adapter.safetensors:0.8 --out mine.safetensors",
    )
    add_export_options(command)
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora,
        metavar="FILE[:SCALE]",
        help="adapter to add to weights: give a weights file or emoji in place of the run; may be "
        "repeated",
    )
    command.add_argument(
        "--out",
        help="weights file to write, local or s3:// (default: exported.safetensors in the folder "
        "of the checkpoint; with --lora merged.safetensors here)",
    )


def add_export_options(parser: Parser) -> None:
    """Add the options that `glide export` and jobs/export.py share."""
    parser.add_argument(
        "checkpoint",
        help="folder or s3:// prefix of a run, whose last complete checkpoint is used, or of one "
        "checkpoint",
    )
    parser.add_argument(
        "--ema-rate",
        type=float,
        help="rate of the EMA to export (default: the first of the run's train.ema_rates)",
    )
    parser.add_argument(
        "--ema-length",
        type=float,
        metavar="LENGTH",
        help="export an average of this length instead, as a share of the run, such as 0.08; "
        "combined from the averages of train.ema_lengths in the checkpoints of the run",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="write float16, with the recipe and the sources in the corpus's card.json; needs the "
        "memory of the whole model",
    )


def export(options: Namespace) -> None:
    from ..storage import is_remote
    from ..train.checkpoint import find_checkpoint
    from ..train.pack import source_metadata
    from ..train.partition import export_to

    if options.lora:
        return _export_merged(options)
    folder = Path() if is_remote(options.checkpoint) else Path(options.checkpoint)
    out = options.out or folder / "exported.safetensors"
    if options.ema_length is not None:
        return _export_length(options, out)
    checkpoint = find_checkpoint(options.checkpoint)
    if options.half:
        return _export_half(checkpoint, out, options.ema_rate)
    preset, step, rate = export_to(checkpoint, out, options.ema_rate, source_metadata)
    print(f"{out}: {preset.model.name} after step {step:,}, EMA rate {rate:g}")


def _export_length(options: Namespace, out: str | Path) -> None:
    from ..train.ema_length import export_length
    from ..train.pack import source_metadata

    if options.half or options.ema_rate is not None:
        raise UserError("--ema-length writes one average in float32; leave out --half, --ema-rate.")
    preset, step, error = export_length(
        options.checkpoint, out, options.ema_length, source_metadata
    )
    print(
        f"{out}: {preset.model.name} after step {step:,}, average of length "
        f"{options.ema_length:g}, error {error:.1%}"
    )


def _export_merged(options: Namespace) -> None:
    from ..train.pack import read_merged, write_half, write_whole

    if options.ema_rate is not None:
        raise UserError("--ema-rate is for runs, and --lora for weights files; leave one out.")
    merged = read_merged(options.checkpoint, options.lora)
    out = options.out or "merged.safetensors"
    (write_half if options.half else write_whole)(merged, out)
    print(f"{out}: {merged.config.name} with {merged.recipe['adapters']}")


def _export_half(checkpoint: str, out: str | Path, ema_rate: float | None) -> None:
    from ..train.pack import read_trained, write_half

    trained = read_trained(checkpoint, ema_rate=ema_rate)
    write_half(trained, out)
    recipe, sources = trained.recipe, "no sources, because its corpus has no card.json"
    if trained.sources:
        sources = f"{len(trained.sources)} sources"
    print(
        f"{out}: {trained.config.name} after step {recipe['steps']:,}, EMA {recipe['EMA']}, in "
        f"float16; {sources}"
    )


# -- pack ------------------------------------------------------------------------------------------


def _add_pack(commands: Commands) -> None:
    command = commands.add(
        "pack",
        pack,
        "package a base model and an upsampler for release: float16 weights and a model card",
        "examples:\n"
        "  glide pack runs/emoji-base runs/emoji-upsampler --notes notes.json\n"
        "  glide pack base.safetensors upsampler.safetensors --corpus runs/corpus/train "
        "--recipe base.json upsampler.json\n"
        "notes.json holds figures and limits for the card; without --notes those of the existing "
        "card stay:\n"
        '  {"figures": {"style right": {"value": 0.97, "interval": [0.95, 0.98], "command": '
        '"glide ..."}}, "limits": ["..."]}',
    )
    command.add_argument(
        "base", help="base model: a weights file, or the folder of a run, local or s3://"
    )
    command.add_argument(
        "upsampler", help="upsampler: a weights file, or the folder of a run, local or s3://"
    )
    command.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="FOLDER",
        help="corpus whose card.json names the sources; may be repeated (default: the sources in "
        "the weights file, or of the run's corpus)",
    )
    command.add_argument(
        "--recipe",
        nargs=2,
        metavar=("BASE.json", "UPSAMPLER.json"),
        help="JSON objects that describe the training of each model; their values override those "
        "that the run recorded",
    )
    command.add_argument("--notes", metavar="NOTES.json", help="figures and limits for the card")
    command.add_argument(
        "--out",
        type=local_path,
        metavar="FOLDER",
        help="folder to write to (default: the weights folder of the package)",
    )


def pack(options: Namespace) -> None:
    from ..pretrained import shipped
    from ..train import pack as packing

    recipes = [packing.read_recipe(path) for path in options.recipe] if options.recipe else [{}, {}]
    notes = packing.read_notes(options.notes) if options.notes else None
    base, upsampler = (
        packing.read_trained(path, options.corpus, recipe)
        for path, recipe in zip((options.base, options.upsampler), recipes, strict=True)
    )
    card, folder = packing.pack(base, upsampler, options.out, notes), options.out or shipped.FOLDER
    for file in card.files:
        print(
            f"{folder / file.name}: {file.model}, {file.parameters / 1e6:,.2f}M parameters, "
            f"{file.bytes:,} bytes, SHA-256 {file.sha256[:16]}..."
        )
    print(
        f"{folder / shipped.CARD}, {shipped.PAGE}: {len(card.sources)} sources, "
        f"{len(card.figures)} figures"
    )


# -- tune-sampler ----------------------------------------------------------------------------------


def _add_tune_sampler(commands: Commands) -> None:
    command = commands.add(
        "tune-sampler",
        tune_sampler,
        "search the timesteps at which a model needs fewest steps, in minutes on a CPU",
        "examples:\n"
        "  glide tune-sampler emoji --steps 8 15 --out base.safetensors\n"
        "  glide tune-sampler runs/mine-upsampler/weights.safetensors --base runs/mine/weights."
        "safetensors --steps 6\n"
        "Pictures of UniPC are compared with those of 250 DDIM steps from the same noise. The file "
        "that is written has the same tensors; `--sampler unipc --steps 8` then uses the grid of 8 "
        "steps.",
    )
    command.add_argument("weights", type=local_path, help="weights of a base model or an upsampler")
    command.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=[8, 15],
        metavar="N",
        help="numbers of steps to search timesteps for (default: 8 15)",
    )
    command.add_argument(
        "--default",
        type=positive,
        metavar="N",
        help="make UniPC with N of these steps the model's default (default: leave it)",
    )
    command.add_argument(
        "--pictures",
        type=positive,
        default=16,
        help="pictures to compare, spread over the prompts (default: %(default)s)",
    )
    command.add_argument(
        "--prompts", metavar="FILE", help="prompts, one a line (default: eight of the emoji corpus)"
    )
    add_base(command, what="base model whose pictures an upsampler enlarges")
    add_seed(command, "seed of the first picture (default: %(default)s)")
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("tuned.safetensors"),
        help="weights file to write (default: %(default)s)",
    )


def tune_sampler(options: Namespace) -> None:
    from ..config.models import steps_of
    from ..pretrained.shipped import locate
    from ..sampling.grids import tune_grid
    from ..train.pack import read_trained, write_whole

    if options.default is not None and options.default not in options.steps:
        raise UserError(f"--default {options.default} is not one of --steps; name it there, too.")
    path = str(options.weights)
    weights = Path(locate(path, "base")) if path == SHIPPED else options.weights
    trained = read_trained(weights)
    search, config = _grid_search(weights, trained.config, options)
    grids = {steps_of(grid): grid for grid in config.sampling.tuned_grids}
    for steps in options.steps:
        with progress_bar(f"{steps} steps", "grid") as progress:
            respacing, distance = tune_grid(search, steps, progress)
        grids[steps] = respacing
        before = search.distance(f"even{steps}", "dpm++")
        print(
            f"{steps} steps: {respacing}, RMSE {distance:.4f}; evenly spaced dpm++ {before:.4f}",
            flush=True,
        )
    tuned_grids = tuple(grids[steps] for steps in sorted(grids))
    sampling = config.sampling.model_copy(update={"tuned_grids": tuned_grids})
    if options.default is not None:
        sampling = sampling.model_copy(
            update={"sampler": "unipc", "respacing": grids[options.default]}
        )
    tuned = config.model_copy(update={"sampling": sampling})
    write_whole(replace(trained, config=tuned), options.out)
    print(f"{options.out}: {config.name} with grids of {', '.join(map(str, sorted(grids)))} steps")


def _grid_search(
    weights: Path, config: AnyModelConfig, options: Namespace
) -> tuple[GridSearch, ModelConfig]:
    """The search for the grids of these weights, with the pictures to compare to."""
    import torch

    from ..config.models import ModelConfig
    from ..config.training import SAMPLE_PROMPTS
    from ..diffusion.schedule import make_schedule
    from ..sampling.cascade import load_stepper
    from ..sampling.grids import GridSearch, base_requests, starting_grids, upsampler_requests
    from ..storage import read

    if not isinstance(config, ModelConfig):
        raise UserError(f"{weights} is a CLIP; tune-sampler takes a base model or an upsampler.")
    process = make_schedule(config.diffusion.schedule, config.diffusion.steps)
    for steps in options.steps:
        starting_grids(process, steps)  # refuse a wrong number before making pictures
    prompts: Sequence[str] = SAMPLE_PROMPTS
    if options.prompts:
        lines = read(options.prompts).decode(errors="replace").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"{options.prompts} has no prompts; write one a line.")
    prompts = [prompts[n % len(prompts)] for n in range(options.pictures)]
    seeds = range(options.seed, options.seed + options.pictures)
    load = partial(load_stepper, max_in_flight=options.pictures, batched=True)
    stepper = load(weights, config.role)
    if config.role == "base":
        return GridSearch.of(stepper, base_requests(config, prompts, seeds)), config
    base = load(options.base, "base")
    own = base.config.sampling
    requests = base_requests(base.config, prompts, seeds)(own.sampler, own.respacing)
    low_res: torch.Tensor = base.run(requests)
    return GridSearch.of(stepper, upsampler_requests(config, prompts, seeds, low_res)), config


# -- card ------------------------------------------------------------------------------------------


def _add_card(commands: Commands) -> None:
    command = commands.add(
        "card",
        card,
        "the model card of a weights file: data, licences, training, figures, limits",
    )
    add_base(command, what="weights file of any model")


def card(options: Namespace) -> None:
    from ..pretrained import shipped
    from ..pretrained.card import card_of, render

    if str(options.base) == SHIPPED:
        shipped.find()
        found = shipped.shipped_card()
    else:
        found = card_of(shipped.locate(options.base, "base"))
    print(render(found), end="")


# -- released checkpoints --------------------------------------------------------------------------


def _add_import_released(commands: Commands) -> None:
    command = commands.add(
        "import-released",
        import_released,
        "convert OpenAI's published checkpoints to weights files of glide_ray; every key and shape "
        "is checked",
        "examples:\n  glide import-released base.pt\n"
        "  glide import-released image-enc.pt text-enc.pt --vocabulary "
        "bpe_simple_vocab_16e6.txt.gz\n"
        "  glide import-released mine.pt --preset nano-base --set model.unet.channels=96\n"
        "State dicts within 'state_dict' or 'model' and prefixes such as 'module.' are unwrapped. "
        "A file of export-released needs its NAME.glide.json beside it, or --preset. Pickled code "
        "is refused, never run.",
    )
    command.add_argument(
        "files",
        nargs="+",
        help="base.pt, base-inpaint.pt, upsample.pt or upsample-inpaint.pt; or both encoders of "
        "CLIP",
    )
    command.add_argument("--vocabulary", help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    command.add_argument(
        "--preset",
        help="preset with the shape of the model, for another than the published ones",
    )
    add_settings(command)
    command.add_argument(
        "--out",
        type=local_path,
        help="weights file to write (default: runs/NAME/weights.safetensors)",
    )


def import_released(options: Namespace) -> None:
    from ..models.released_files import import_files
    from ..models.weights import save_weights

    if options.set and not options.preset:
        raise UserError("--set changes a preset; name it with --preset.")
    config = read_preset(options).model if options.preset else None
    model = import_files(options.files, options.vocabulary, config)
    out = options.out or Path("runs") / model.config.name / "weights.safetensors"
    save_weights(out, model.state, model.config, **{"source": "released", **model.metadata})
    parameters = sum(tensor.numel() for tensor in model.state.values()) / 1e6
    print(f"{out}: {model.config.name}, {parameters:,.2f}M parameters, every key and shape checked")


def _add_export_released(commands: Commands) -> None:
    command = commands.add(
        "export-released",
        export_released,
        "convert a weights file of glide_ray to a .pt file with the key names of OpenAI's release",
        "NAME.glide.json beside the .pt file has the config, with which `glide import-released "
        "NAME.pt` makes the weights file again.",
    )
    command.add_argument(
        "weights",
        type=local_path,
        help="weights file of a base model, an upsampler or noised CLIP",
    )
    command.add_argument(
        "--out",
        type=local_path,
        help=".pt file to write, one for each encoder of CLIP (default: beside the weights)",
    )


def export_released(options: Namespace) -> None:
    from ..models.released_files import export_files, settings_of
    from ..models.weights import load_metadata, load_weights

    config, state = load_weights(options.weights)
    out = options.out or options.weights.with_suffix(".pt")
    for path in export_files(state, config, out, load_metadata(options.weights)):
        print(f"{path}: {config.name} under the released names; config in {settings_of(path).name}")
