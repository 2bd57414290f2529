"""Options that several commands and jobs share, argument types, and the table of commands.

Each shared option is declared once, in a function that adds it to a parser. `path` is the type of
paths: `local_path` for commands that run on this machine, `str` for jobs, which also take s3://.
"""

from __future__ import annotations

import argparse
import secrets
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..config import presets
from ..config.models import SHIPPED
from ..errors import UserError
from ..storage import is_remote

if TYPE_CHECKING:
    from ..config.sampling import BulkConfig, SampleOptions
    from ..config.training import Preset

CORPUS = "runs/corpus"  # where `glide corpus` writes the emoji corpus
CLIP = Path("runs/nano-plain-clip/weights.safetensors")
DEVICES = ("auto", "cpu", "gpu")
PRECISIONS = ("fp32", "bf16", "fp16")
SAMPLE_SIZES = (64, 256)  # pixels of the base model and of the upsampler

PathType = Callable[[str], Any]
Parser = Any  # an ArgumentParser or one of its argument groups


# -- argument types --------------------------------------------------------------------------------


def local_path(text: str) -> Path:
    """A path on this machine. Raises ArgumentTypeError for a URL.

    pathlib would turn s3://a into a folder named `s3:`.
    """
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is not on this machine; give a local path")
    return Path(text)


def positive(text: str) -> int:
    """A whole number from 1 upwards. Raises ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 upwards")
    return int(text)


def seed_or_random(text: str) -> int:
    """A seed, or a new one below 2^32 for "random". Raises ArgumentTypeError for anything else."""
    if text == "random":
        return secrets.randbelow(2**32)
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a whole number nor `random`"
        ) from None


def check_text(text: str, name: str) -> None:
    """Raise UserError for text that is not Unicode, from an argument that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at character {error.start + 1}; set the terminal or the script "
            "to UTF-8."
        ) from None


def lora(text: str) -> str:
    """An adapter as FILE or FILE:SCALE. Raises ArgumentTypeError for a scale that is no number."""
    from ..config.lora import read_lora

    try:
        return str(read_lora(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def named_sets(arguments: list[str]) -> dict[str, str]:
    """Parse arguments NAME=FOLDER, or FOLDER named after its last part, into name -> folder.

    Raises UserError for a duplicate name or one that is not valid as a file name.
    """
    found: dict[str, str] = {}
    for text in arguments:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = PurePosixPath(text).name, text
        if not name or name.startswith(".") or "/" in name:
            raise UserError(f"{text} has no name; write NAME=FOLDER.")
        if name in found:
            raise UserError(
                f"Two sets of pictures are called {name}; tell them apart as NAME=FOLDER."
            )
        found[name] = folder
    return found


# -- parsers ---------------------------------------------------------------------------------------


class Commands:
    """The commands of a parser."""

    def __init__(self, parser: ArgumentParser, title: str = "commands", metavar: str = "COMMAND"):
        self._subparsers = parser.add_subparsers(title=title, required=True, metavar=metavar)

    def add(
        self,
        name: str,
        function: Callable[[Namespace], None] | None,
        help: str,
        epilog: str | None = None,
        description: str | None = None,
    ) -> ArgumentParser:
        """Add a command and return its parser.

        `function` receives the parsed options; None for a command that has commands of its own.
        `help`: one line for the list of commands. `epilog`: examples and notes, printed as they
        are. `description`: text above the options, by default `help` as a sentence.
        """
        command = self._subparsers.add_parser(
            name,
            help=help,
            description=description or f"{help[0].upper()}{help[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if function is not None:
            command.set_defaults(command=function)
        return command


def job_parser(description: str | None) -> ArgumentParser:
    """Parser of a script in jobs/, whose docstring is the description."""
    return ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


# -- presets, settings, files ----------------------------------------------------------------------


def add_preset(parser: Parser) -> None:
    """Add the positional argument PRESET and --set, which `read_preset` reads."""
    parser.add_argument("preset", help=", ".join(presets.PRESETS))
    add_settings(parser)


def read_preset(options: Namespace) -> Preset:
    """The preset with the settings of --set. Raises ConfigError."""
    return presets.with_settings(options.preset, options.set)


def add_settings(parser: Parser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )


def settings_epilog(config: Any) -> str:
    """Names and defaults of the settings of a flat config, for an epilog."""
    values = "  ".join(f"{name}={value}" for name, value in config.model_dump().items())
    return f"settings, as --set KEY=VALUE:\n  {values}"


def add_packages(parser: Parser, path: PathType = local_path) -> None:
    parser.add_argument(
        "--packages",
        type=path,
        metavar="FOLDER",
        help="folder of npm tarballs to read the pictures from (default: fetch them with npm)",
    )


def add_caption_column(parser: Parser) -> None:
    parser.add_argument(
        "--caption-column",
        metavar="NAME",
        help="field or column of captions in tables, Parquet and JSON (default: captions, "
        "caption, text, txt)",
    )


def add_shared_out(parser: Parser, default: str | None) -> None:
    """Add --out for results that workers on several nodes write. `default` None: required."""
    parser.add_argument(
        "--out",
        default=default,
        required=default is None,
        help="output folder, visible to all nodes, or s3:// prefix"
        + (" (default: %(default)s)" if default else ""),
    )


def add_judge_clip(parser: Parser) -> None:
    parser.add_argument(
        "--clip",
        default=str(CLIP),
        help="CLIP that computes the image features: a weights file of glide_ray, or the folder "
        "of a public CLIP, local or s3:// (default: %(default)s)",
    )


# -- models and sampling ---------------------------------------------------------------------------


def add_base(
    parser: Parser, path: PathType = local_path, what: str = "weights of the base model"
) -> None:
    parser.add_argument(
        "--base",
        type=path,
        default=path(SHIPPED),
        metavar="WEIGHTS",
        help=f"{what} (default: %(default)s, which ships with glide_ray)",
    )


def add_upsampler(parser: Parser, default: str, path: PathType = local_path) -> None:
    """Add --upsampler. `default`: what happens without it, for the help text."""
    parser.add_argument(
        "--upsampler",
        type=path,
        metavar="WEIGHTS",
        help=f"weights of the upsampler (default: {default})",
    )


def add_precision(parser: Parser) -> None:
    parser.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="number format of the networks; auto: fp16 on a GPU, fp32 on a CPU "
        "(default: %(default)s)",
    )


def add_loras(parser: Parser) -> None:
    """Add --lora, whose texts `Cascade.load` reads."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora,
        metavar="FILE[:SCALE]",
        help="adapter (LoRA) to add to the base model or the upsampler, whichever it was trained "
        "on; 0.5 halves its effect (default: 1); may be repeated",
    )


def add_weights(parser: Parser) -> None:
    """Add --base, --upsampler, --lora and --precision of a cascade on this machine."""
    add_base(parser)
    add_upsampler(parser, f"{SHIPPED}, if it fits the size of the base model")
    add_loras(parser)
    add_precision(parser)


def add_seed(
    parser: Parser,
    help: str = "the same seed gives the same picture (default: %(default)s)",
    kind: Callable[[str], int] = int,
) -> None:
    parser.add_argument("--seed", type=kind, default=0, help=help)


SAMPLER_NAMES = "ancestral, ddim, plms, dpm++, or unipc for 6 to 30 steps"
STEPS_HELP = "a number, or a respacing such as mixed15 or 10,10,3,2,2 (default: the model's own)"


def add_sampler(parser: Parser) -> None:
    """Add --sampler and --steps, of the base model."""
    parser.add_argument(
        "--sampler",
        help=f"sampler of the base model: {SAMPLER_NAMES} (default: the model's own)",
    )
    parser.add_argument("--steps", help=f"steps of the base model: {STEPS_HELP}")


def add_upsampler_sampling(parser: Parser) -> None:
    """Add the upsampler's sampler, steps and guidance scale."""
    parser.add_argument(
        "--upsampler-sampler",
        metavar="SAMPLER",
        help="sampler of the upsampler, as --sampler (default: the model's own)",
    )
    parser.add_argument("--upsampler-steps", help=f"steps of the upsampler: {STEPS_HELP}")
    parser.add_argument(
        "--upsampler-guidance-scale",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance scale of the upsampler (default: the model's own)",
    )


def add_guidance_scale(parser: Parser) -> None:
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance scale; 1: no guidance (default: the model's own)",
    )


def add_guiding_clip(parser: Parser) -> None:
    parser.add_argument(
        "--clip",
        metavar="WEIGHTS",
        help="CLIP for CLIP guidance and for choosing the best of several candidates: weights of "
        "noised CLIP, or the folder of a public CLIP",
    )


def add_sampling(parser: Parser) -> None:
    """Add the sampling options of a request, which `sample_options` reads."""
    add_sampler(parser)
    add_upsampler_sampling(parser)
    add_guidance_scale(parser)
    parser.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="text that the pictures should not show; needs a guidance scale other than 1",
    )
    add_guiding_clip(parser)
    parser.add_argument(
        "--clip-scale",
        type=float,
        default=0.0,
        metavar="SCALE",
        help="CLIP guidance scale, needs --clip; 0: no CLIP guidance (default: %(default)g)",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="interval of the timesteps with guidance, where 1 is the noisiest (default: 0 1)",
    )


def sample_options(options: Namespace) -> SampleOptions:
    """The sampling options of a request. Raises RequestError if one is invalid."""
    from ..config.sampling import SampleOptions
    from ..sampling.checks import check_options

    check_text(getattr(options, "negative_prompt", ""), "The negative prompt")
    names = SampleOptions.model_fields.keys() & vars(options).keys()
    sampling = SampleOptions(**{name: getattr(options, name) for name in names})
    check_options(sampling, options.seed, getattr(options, "strength", None))
    return sampling


# -- bulk generation -------------------------------------------------------------------------------


def add_device(parser: Parser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help="auto: GPUs if the cluster has any now; gpu: wait for the autoscaler to add them "
        "(default: %(default)s)",
    )


def add_bulk(
    parser: Parser, count_help: str, option: str = "--images", default: int = 30_000
) -> None:
    """Add the options of pictures that a measurement generates, which `bulk_config` reads.

    `option` sets their number, with `default` and `count_help`.
    """
    parser.add_argument(
        option, type=positive, default=default, help=f"{count_help} (default: %(default)s)"
    )
    add_base(parser, str)
    add_upsampler(parser, "none; pictures have the size of the base model", str)
    add_loras(parser)
    add_sampler(parser)
    add_seed(parser, "seed of the first picture; each next one adds 1 (default: %(default)s)")
    add_device(parser)
    add_precision(parser)


def bulk_config(
    options: Namespace, clip: str | None = None, guidance_scale: float | None = None
) -> BulkConfig:
    """The options of `add_bulk` as a BulkConfig. Raises ConfigError."""
    from ..config.overrides import validate
    from ..config.sampling import BulkConfig, SampleOptions

    sampling = SampleOptions(
        sampler=options.sampler, steps=options.steps, guidance_scale=guidance_scale
    )
    names = ("base", "upsampler", "device", "precision", "seed")
    settings = {name: getattr(options, name) for name in names}
    return validate(
        BulkConfig, {**settings, "clip": clip, "loras": options.lora, "options": sampling}
    )
