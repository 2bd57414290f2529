"""Commands that train a model: train, tune and pretrain."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..config.training import Preset
from ..errors import UserError
from .arguments import (
    CORPUS,
    Commands,
    Parser,
    add_caption_column,
    add_packages,
    add_preset,
    add_settings,
    local_path,
    positive,
    read_preset,
)


def add_commands(commands: Commands) -> None:
    _add_train(commands)
    _add_tune(commands)
    _add_pretrain(commands)


# -- train -----------------------------------------------------------------------------------------


def _add_train(commands: Commands) -> None:
    command = commands.add(
        "train",
        train,
        "train a preset under Ray Train; the same command resumes an interrupted run",
        "examples of settings:\n"
        "  --set steps=5000 --set batch=256 --set data.corpus=s3://bucket/train "
        "--set train.zero_stage=3",
    )
    add_train_options(command)
    command.add_argument(
        "--no-ray",
        action="store_true",
        help="train in this process, without Ray and DeepSpeed, with the corpus in memory",
    )
    command.add_argument(
        "--minutes",
        type=float,
        help="with --no-ray: stop after this many minutes and write the weights so far",
    )


def add_train_options(parser: Parser) -> None:
    """Add the options that `glide train` and jobs/train.py share."""
    add_preset(parser)
    parser.add_argument(
        "--out",
        help="folder of the run, visible to all nodes, or s3:// prefix (default: runs/PRESET)",
    )
    parser.add_argument(
        "--from",
        dest="from_step",
        type=int,
        metavar="STEP",
        help="go back to the checkpoint of this step, and set later ones aside; leave it out to "
        "resume afterwards",
    )


def train(options: Namespace) -> None:
    preset = read_preset(options)
    out = options.out or Path("runs") / preset.model.name
    if options.from_step is not None:
        from ..train.run_folder import go_back

        go_back(out, options.from_step)
    if options.no_ray:
        return _train_without_ray(preset, out, options.minutes)
    if options.minutes is not None:
        raise UserError("--minutes needs --no-ray; leave it out, or set steps.")
    from ..distributed.training.run import train as run

    result = run(preset, out)
    if result.rows:
        print(f"rows streamed: {result.rows}")
    print(
        f"step {result.steps:,}: held-out loss {result.first_held_out:.4f} -> "
        f"{result.last_held_out:.4f}; EMA weights in {result.weights}"
    )


def _train_without_ray(preset: Preset, out: str | Path, minutes: float | None) -> None:
    from ..train.without_ray import train_alone

    done = train_alone(preset, out, minutes)
    rest = "" if done.finished else f" of {preset.train.steps:,}; the same command resumes the run"
    print(
        f"step {done.step:,}{rest}: {done.images_per_s:,.1f} images/s; EMA weights in "
        f"{done.weights}"
    )


# -- tune ------------------------------------------------------------------------------------------


def _add_tune(commands: Commands) -> None:
    command = commands.add(
        "tune",
        tune,
        "fine-tune weights on a folder of pictures with captions; the same command resumes",
        "examples:\n  glide tune emoji my_pictures --out runs/mine\n"
        '  glide tune base.safetensors photos --caption "a photo of a zog" '
        '--prompt "a zog on a beach"\n'
        "docs/finetuning.md tells what to change for 20, 200 and 20,000 pictures.",
    )
    command.add_argument(
        "weights", help="weights to start from: a file of a base model or an upsampler, or emoji"
    )
    command.add_argument(
        "pictures", help="folder or other corpus of pictures, such as fox.jpg with fox.txt"
    )
    command.add_argument(
        "--out", type=local_path, default=Path("runs/tuned"), help="folder (default: %(default)s)"
    )
    command.add_argument("--caption", metavar="TEXT", help="caption of pictures without one")
    add_caption_column(command)
    command.add_argument(
        "--lora",
        type=positive,
        default=0,
        metavar="RANK",
        help="train an adapter of this rank (LoRA), such as 8: a small file that leaves the "
        "weights as they are (default: train the weights)",
    )
    _add_prior(command)
    command.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt of the samples before and after; may be repeated (default: captions of "
        "pictures, held out and not)",
    )
    add_settings(command)


def _add_prior(command: Parser) -> None:
    command.add_argument(
        "--prior",
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt of pictures that the weights make before training and must keep, such as the "
        "kind of thing that yours is; may be repeated (prior preservation)",
    )
    command.add_argument(
        "--prior-pictures",
        type=positive,
        default=100,
        metavar="N",
        help="number of pictures of --prior, over all prompts; at least as many as yours are made "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--prior-corpus",
        metavar="CORPUS",
        help="pictures that the weights must keep, in place of --prior",
    )


def tune(options: Namespace) -> None:
    from ..train.prior import Prior
    from ..train.tune import tune

    def train(preset: Preset, out: Path) -> None:
        if preset.train.workers > 1:
            from ..distributed.training.run import train

            train(preset, out)
        else:
            from ..train.without_ray import train_alone

            train_alone(preset, out)

    done = tune(
        options.weights,
        options.pictures,
        options.out,
        train,
        options.set,
        options.prompt,
        options.caption,
        options.caption_column,
        options.lora,
        Prior(tuple(options.prior), options.prior_pictures, options.prior_corpus),
    )
    print(
        f"{done.pictures}; {done.held_out_pictures} held out; {done.steps:,} steps: held-out loss "
        f"{done.before:.4f} -> {done.after:.4f}\nbefore and after: {done.sheet}\n"
        f"{done.what}: {done.weights}"
    )


# -- pretrain --------------------------------------------------------------------------------------


def _add_pretrain(commands: Commands) -> None:
    command = commands.add(
        "pretrain",
        pretrain,
        "train the weights that ship with glide_ray, from npm tarballs to weights files, in one "
        "process; takes minutes on one GPU",
        "example:\n  glide pretrain emoji-base --packages tarballs --minutes 9 --out weights",
    )
    command.add_argument("model", help="emoji-base or emoji-upsampler")
    command.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="minutes of training; the same command resumes the run (default: %(default)s)",
    )
    add_packages(command)
    command.add_argument(
        "--scenes",
        type=positive,
        default=20_000,
        metavar="N",
        help="composed scenes in the corpus (default: %(default)s)",
    )
    command.add_argument(
        "--corpus",
        type=local_path,
        default=Path(CORPUS),
        help="folder of the corpus, built if it does not exist (default: %(default)s)",
    )
    command.add_argument(
        "--run",
        type=local_path,
        help="folder of the run with its checkpoints (default: runs/MODEL)",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/weights"),
        help="folder for the weights in parts, the figures and a sheet of pictures "
        "(default: %(default)s)",
    )
    add_settings(command)


def pretrain(options: Namespace) -> None:
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
    print(f"step {done.step:,}; the same command resumes the run")
