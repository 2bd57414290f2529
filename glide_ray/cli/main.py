"""The command line `glide`: names and options of its commands.

`commands.py`, `assess.py` and `pictures.py` implement them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import presets
from ..config.data import CleanConfig, FilterConfig
from ..config.models import SHIPPED
from ..config.serving import ServeConfig
from ..data.styles import STYLES
from ..errors import UserError
from ..progress import show_messages
from . import assess, commands, doctor, pictures
from .arguments import local_path, positive
from .commands import CLIP, DEMO
from .extras import remedy

DESCRIPTION = """\
Train and serve GLIDE (Nichol et al. 2021), text-to-image diffusion for generation and editing.

  glide demo                                     everything once, on this machine, in minutes
  glide corpus --out runs/corpus                 the emoji corpus as tar shards
  glide train emoji-base --set steps=5000        a preset, with settings of your own
  glide generate "a red apple, 3D render"        pictures from trained weights; \
edit, vary and scene change them
  glide reproduce generate.png                   the same picture again, from what its PNG says
  glide serve                                    the OpenAI Images API on http://127.0.0.1:8000
  glide evaluate runs/pictures                   FID, precision and recall, CLIP score and \
more, beside real pictures
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code.

    0 on success, 130 after Ctrl-C, and 2 for an error that the user can fix, with one sentence
    about it on standard error.
    """
    options = _parser().parse_args(arguments)
    show_messages(to_stderr=options.command is commands.bench)
    try:
        options.command(options)
    except UserError as error:
        print(f"glide: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if sentence := remedy(error):
            print(f"glide: {sentence}", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("\nglide: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("glide", description=DESCRIPTION, formatter_class=form)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, function, help, epilog=None):
        command = subparsers.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=form,
        )
        command.set_defaults(command=function)
        return command

    command = add(
        "demo",
        commands.demo,
        "pictures from the shipped weights, a new style taught to them, and edits over HTTP, on "
        "one page",
    )
    command.add_argument(
        "--out", type=local_path, default=DEMO, help="folder of the results (default: %(default)s)"
    )
    command.add_argument(
        "--packages",
        type=local_path,
        metavar="FOLDER",
        help="npm tarballs of the new style (default: fetch them with npm)",
    )
    command.add_argument(
        "--images",
        type=local_path,
        metavar="FOLDER",
        help="only copy the pictures of a demo that was made, as small WebP files, to this folder",
    )

    command = add(
        "corpus",
        commands.corpus,
        "make the emoji corpus as tar shards and count it, or count one of your own",
        "examples:\n  glide corpus --scenes 100000\n"
        "  glide corpus --styles outline --out runs/outline\n"
        "  glide corpus --packages FOLDER      (npm tarballs, for a machine without npm)",
    )
    command.add_argument(
        "--out",
        default="runs/corpus",
        help="folder or s3:// prefix for train/, held_out/, held_out_pairs/ and tones/, "
        "and for scenes/ and held_out_colours/ (default: %(default)s)",
    )
    command.add_argument(
        "--styles",
        metavar="NAMES",
        help=f"of {', '.join(STYLES)}, with commas (default: all but outline)",
    )
    command.add_argument(
        "--packages",
        type=local_path,
        metavar="FOLDER",
        help="npm tarballs to read the pictures from (default: fetch them with npm)",
    )
    command.add_argument(
        "--scenes",
        type=positive,
        default=0,
        metavar="N",
        help="compose N rows of known content: backgrounds, colours, counts, relations",
    )
    command.add_argument(
        "--survey",
        metavar="PATH",
        help="only stream and count this corpus: a folder or s3:// prefix of .tar or .parquet",
    )
    command.add_argument(
        "--min-size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="drop images smaller on a side (default: %(default)s)",
    )

    command = add(
        "clean",
        commands.clean,
        "judge every image and caption of a corpus, drop near-duplicates, write the rest as shards",
        "settings, as --set KEY=VALUE:\n  "
        + "  ".join(f"{name}={value}" for name, value in CleanConfig().model_dump().items())
        + "\nexample:\n"
        "  glide clean s3://bucket/raw --out s3://bucket/clean --set min_size=256 "
        "--rule my_rules:is_outdoors",
    )
    command.add_argument(
        "source",
        help="a folder or s3:// prefix of .tar, .parquet or images with captions, or "
        "data/{00000..00999}.tar",
    )
    command.add_argument(
        "--out",
        required=True,
        help="folder or s3:// prefix for the shards, their index, and the list of what was dropped",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    command.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a rule of your own: a function of a Candidate (glide_ray/data/filters.py) that is "
        "true for what may stay",
    )

    command = subparsers.add_parser(
        "filter",
        help="find content in a corpus that it is to be freed of, by labels of some of its images "
        "(app. F.1)",
    )
    steps = command.add_subparsers(title="steps", required=True, metavar="STEP")
    settings = "settings, as --set KEY=VALUE:\n  " + "  ".join(
        f"{name}={value}" for name, value in FilterConfig().model_dump().items()
    )
    fit = steps.add_parser(
        "fit",
        formatter_class=form,
        help="ask for labels and fit the filter to them",
        description="Ask for labels, in a CSV and with a sheet of pictures, and fit an SVM to "
        "them on CLIP's features, its bias set so that it misses few. Run it again after each "
        "round of labels. The emoji corpus answers itself for people and weapons.",
        epilog=settings + "\nexamples:\n  glide filter fit people\n"
        '  glide filter fit smoke --corpus s3://bucket/clean --search "a cigarette" '
        "--clip s3://models/clip-vit-base-patch16",
    )
    fit.set_defaults(command=commands.fit_filter)
    fit.add_argument(
        "name",
        help="name of the content to find; the folder runs/filters/NAME holds the labels, the "
        "filter and its page",
    )
    fit.add_argument(
        "--corpus", help=f"where to look for it (default: the emoji corpus, {commands.EMOJI}/train)"
    )
    fit.add_argument(
        "--search",
        action="append",
        metavar="WORDS",
        help="words whose pictures are asked about first; may be repeated",
    )
    fit.add_argument(
        "--truth",
        metavar="MODULE:FUNCTION",
        help="a function of a Candidate (glide_ray/data/filters.py) that answers instead of people",
    )
    fit.add_argument(
        "--held-out",
        help="a corpus to assess the filter on where the truth is known "
        f"(default: {commands.EMOJI}/held_out)",
    )
    fit.add_argument(
        "--clip",
        default=str(CLIP),
        help="weights of a CLIP of ours, or the folder of a public one, local or s3:// "
        "(default: %(default)s)",
    )
    fit.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    fit.add_argument(
        "--out",
        type=local_path,
        help="folder of the labels and the filter (default: runs/filters/NAME)",
    )
    apply = steps.add_parser(
        "apply",
        formatter_class=form,
        help="write a corpus without what the filter finds",
        description="Write the rows of a corpus that a filter lets pass, with an index, a list of "
        "those dropped, and a page to look at.",
        epilog="example:\n  glide filter apply people runs/corpus/train --out runs/without_people",
    )
    apply.set_defaults(command=commands.apply_filter)
    apply.add_argument(
        "filter", help="its name, if it was fitted here, or its file, local or s3://"
    )
    apply.add_argument(
        "source", help="the corpus: a folder or s3:// prefix, or data/{00000..00999}.tar"
    )
    apply.add_argument("--out", required=True, help="folder or s3:// prefix to write to")
    apply.add_argument(
        "--clip",
        help="where the CLIP is now that the filter was fitted with (default: where it was)",
    )
    apply.add_argument(
        "--truth",
        metavar="MODULE:FUNCTION",
        help="a function of a Candidate that knows the content: the page then shows what was "
        "missed",
    )
    apply.add_argument(
        "--per-shard", type=positive, default=10_000, metavar="ROWS", help="default: %(default)s"
    )

    names = ", ".join(presets.PRESETS)
    settings = (
        "examples of settings:\n"
        "  --set steps=5000 --set batch=256 --set data.corpus=s3://bucket/train "
        "--set train.zero_stage=3"
    )
    command = add(
        "train",
        commands.train,
        "train a preset under Ray Train; the same command goes on with an interrupted run",
        settings,
    )
    command.add_argument("preset", help=names)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    command.add_argument(
        "--out",
        help="folder of the run, which all nodes see, or s3:// prefix (default: runs/PRESET)",
    )
    command.add_argument(
        "--no-ray",
        action="store_true",
        help="train in this one process, without Ray and DeepSpeed, with the corpus in memory",
    )
    command.add_argument(
        "--minutes",
        type=float,
        help="with --no-ray: minutes after which to stop, with the weights so far",
    )

    command = add(
        "pretrain",
        commands.pretrain,
        "the weights that ship, from package tarballs to files, in one process: on one GPU in "
        "minutes",
        "example:\n  glide pretrain emoji-base --packages tarballs --minutes 9 --out weights",
    )
    command.add_argument("model", help="emoji-base or emoji-upsampler")
    command.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="of training; the same command goes on (default: %(default)s)",
    )
    command.add_argument(
        "--packages",
        type=local_path,
        metavar="FOLDER",
        help="npm tarballs (default: fetch them with npm)",
    )
    command.add_argument(
        "--scenes",
        type=positive,
        default=20_000,
        metavar="N",
        help="composed rows of the corpus (default: %(default)s)",
    )
    command.add_argument(
        "--corpus",
        type=local_path,
        default=Path("runs/corpus"),
        help="folder of the corpus, made unless it is there (default: %(default)s)",
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
        help="folder for weights, in parts, figures and a sheet (default: %(default)s)",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the preset"
    )

    command = add(
        "export",
        commands.export,
        "weights from a checkpoint, tensor by tensor: without a GPU, in the memory of the largest",
        "examples:\n  glide export runs/filtered-base --ema-rate 0.999 --out weights.safetensors\n"
        "  glide export runs/emoji-base --half --out emoji-base.safetensors",
    )
    command.add_argument(
        "checkpoint", help="a run's folder, whose last whole checkpoint is taken, or a checkpoint's"
    )
    command.add_argument(
        "--ema-rate",
        type=float,
        help="which of the run's averages (default: the first of its train.ema_rates)",
    )
    command.add_argument(
        "--half",
        action="store_true",
        help="write float16, with the recipe, and the sources that the corpus's card.json names",
    )
    command.add_argument(
        "--out",
        help="weights file to write, local or s3:// (default: exported.safetensors in that folder)",
    )

    _add_cards(add)

    command = add("generate", pictures.generate, "pictures for a prompt")
    command.add_argument("prompt")
    command.add_argument(
        "-n", type=positive, default=1, help="how many, with seeds one after the other (default: 1)"
    )
    command.add_argument(
        "--best-of",
        type=positive,
        default=1,
        metavar="N",
        help="make N for each and keep the one that --clip scores highest",
    )
    _add_sampling(command, "generate.png")

    command = add("edit", pictures.edit, "paint a part of a picture anew")
    command.add_argument("prompt")
    command.add_argument("--image", required=True, help="the picture; its centred square is used")
    command.add_argument(
        "--mask", required=True, help="a PNG of the same size, transparent where to paint"
    )
    _add_sampling(command, "edit.png")

    command = add(
        "vary",
        pictures.vary,
        "make a picture anew from what it shows, or from a sketch on it (SDEdit)",
        "example:\n"
        '  glide vary "a red house" --image photo.png --sketch strokes.png --mask hole.png '
        "--strength 0.7",
    )
    command.add_argument("prompt")
    command.add_argument(
        "--image", required=True, help="the picture to begin from; its centred square is used"
    )
    command.add_argument(
        "--strength",
        type=float,
        default=0.6,
        help="above 0, at most 1: how far from the picture (default: %(default)s)",
    )
    command.add_argument(
        "--mask",
        help="a PNG of the same size, transparent where it may change; the rest stays exactly",
    )
    command.add_argument(
        "--sketch", help="a PNG of the same size whose opaque strokes are laid on the picture first"
    )
    _add_sampling(command, "vary.png")

    command = add(
        "scene",
        pictures.scene,
        "a picture built up by edits, one after the other",
        "example:\n"
        '  glide scene "a cozy living room" --edit wall.png "a painting of a corgi" '
        '--edit floor.png "a round table"',
    )
    command.add_argument(
        "prompt", nargs="?", help="of the picture to begin with, unless --image gives it"
    )
    command.add_argument("--image", help="a picture to begin with; its centred square is used")
    command.add_argument(
        "--edit",
        nargs=2,
        action="append",
        required=True,
        metavar=("MASK", "PROMPT"),
        help="a PNG that is transparent where to paint, and what; may be repeated, in order",
    )
    _add_sampling(
        command,
        "scene.png",
        "PNGs to write, with the number of the edit before the ending (default: %(default)s)",
    )

    command = add(
        "reproduce",
        pictures.reproduce,
        "make a picture again from the recipe in its PNG, and compare the two",
    )
    command.add_argument("picture", help="a PNG that glide wrote")
    for role in ("base", "upsampler", "clip"):
        command.add_argument(
            f"--{role}",
            type=local_path,
            help="where its weights are now (default: where they were; they must be the same)",
        )
    command.add_argument("--out", type=local_path, help="write the new picture here")

    command = add(
        "import-released",
        commands.import_released,
        "OpenAI's published checkpoints as weights files of ours, checked key by key",
        "examples:\n  glide import-released base.pt\n"
        "  glide import-released image-enc.pt text-enc.pt --vocabulary "
        "bpe_simple_vocab_16e6.txt.gz\nPickled code is refused, never run.",
    )
    command.add_argument(
        "files",
        nargs="+",
        help="base.pt, base-inpaint.pt, upsample.pt or upsample-inpaint.pt; or both encoders of "
        "CLIP",
    )
    command.add_argument("--vocabulary", help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    command.add_argument(
        "--out",
        type=local_path,
        help="weights file to write (default: runs/NAME/weights.safetensors)",
    )

    command = add(
        "export-released",
        commands.export_released,
        "a weights file of ours under the released names, as a .pt file",
    )
    command.add_argument(
        "weights",
        type=local_path,
        help="a weights file of a base model, an upsampler or noised CLIP",
    )
    command.add_argument(
        "--out",
        type=local_path,
        help=".pt file to write; CLIP's two encoders add their names (default: beside the weights)",
    )

    command = add(
        "serve",
        commands.serve,
        "the OpenAI Images API for trained weights, on Ray Serve",
        "settings, as --set KEY=VALUE:\n  "
        + "  ".join(f"{name}={value}" for name, value in _flat(ServeConfig()).items())
        + "\nexamples:\n  glide serve --clip runs/nano-clip/weights.safetensors\n"
        "  glide serve --host 0.0.0.0 --keys keys.json --set base_scale.max_replicas=4",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="default: %(default)s, this machine only; any other needs --keys",
    )
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    command.add_argument(
        "--clip",
        help="weights of noised CLIP, or the folder of a public CLIP, for clip_scale and best_of",
    )
    command.add_argument("--keys", help="file of API keys that `glide key` writes")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    _add_weights(command)

    command = add(
        "key",
        commands.key,
        "a new API key for the server; the file keeps only its hash",
        "example:\n  glide key ann --per-minute 60\n"
        "To take a key back, delete its name from the file and start or deploy the server anew.",
    )
    command.add_argument("name", help="whose it is, as the server's log will call them")
    command.add_argument(
        "--keys",
        type=local_path,
        default=Path("keys.json"),
        help="file to write to (default: %(default)s)",
    )
    command.add_argument(
        "--at-once",
        type=positive,
        metavar="IMAGES",
        help="that are made for this key at once (default: as many as the server takes)",
    )
    command.add_argument(
        "--per-minute",
        type=positive,
        metavar="IMAGES",
        help="that this key may ask for (default: no limit)",
    )

    assess.add_commands(add)
    command = add(
        "compose",
        assess.compose,
        "whether generated pictures show the objects, styles, "
        "colours, counts and positions of their prompts",
        "examples:\n  glide compose --prompts 200\n"
        "  glide compose --size 64 --prompts 32 --steps 20 --categories seen colour count\n"
        "  glide compose --real\n"
        "The judge is fitted once to the corpus's real pictures, in some minutes. The same "
        "command resumes an interrupted run.",
    )
    assess.add_compose_options(command)
    _add_weights(command)

    command = add(
        "settings",
        commands.settings,
        "every setting of training, cleaning, filtering, serving and bulk generation",
        "The same as docs/configuration.md, in Markdown: name, kind, default and meaning.\n"
        "example:\n  glide settings | grep -i checkpoint",
    )

    command = add("info", commands.info, "parameters by part, memory and operations of a preset")
    command.add_argument("preset", help=names)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )

    command = add(
        "plan",
        commands.plan,
        "what training a preset takes: memory of a worker by part, the ZeRO stage that fits, days "
        "and price",
        "examples:\n  glide plan paper-base --gpus 64 --gpu h100 --set batch=2048 --price 2.5\n"
        "  glide plan nano-base --gpu cpu\n"
        "It computes and starts nothing. What it prints as --set is for `glide train`. FLOP/s and "
        "links are of data sheets, and how much of\n"
        "them training reaches is assumed, unless you give what you have measured.",
    )
    command.add_argument("preset", help=names)
    command.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="workers, one to a GPU (default: the preset's train.workers)",
    )
    command.add_argument(
        "--gpu",
        metavar="KIND",
        help="h100, a100-80gb, l40s and so on, or cpu for this machine's (default: this machine)",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    command.add_argument("--price", type=float, help="of an hour of one GPU, in any currency")
    command.add_argument(
        "--utilisation",
        type=float,
        metavar="PART",
        help="of its peak FLOP/s that a GPU reaches in training (default: 0.35, assumed)",
    )
    command.add_argument(
        "--tflops",
        type=float,
        help="TFLOP/s that one worker reaches in training, where you have measured them",
    )
    command.add_argument(
        "--link",
        type=float,
        metavar="GB/S",
        help="what a worker sends in one direction (default: the data sheet's, of NVLink for "
        "up to 8 GPUs, else of the network of AWS's machines with them)",
    )

    command = add(
        "bench",
        commands.bench,
        "measure this machine, or what trained models do; prints one line of JSON",
    )
    command.add_argument(
        "what",
        choices=[
            "forward",
            "sample",
            "cascade",
            "train",
            "plan",
            "serve",
            "data",
            "memory",
            "samplers",
            "inpainting",
            "guidance",
            "recipe",
        ],
        help="forward: one network call; sample: one guided step as a ratio to the released form; "
        "cascade: seconds for a picture, and pictures a second; train: a training step as a ratio "
        "to a plain PyTorch loop's, and to a bare one of the same precision; plan: the memory "
        "that `glide plan` says as a ratio to what training takes on the CPU; serve: latency and "
        "cost of the server as ratios to whole-request batching and to a server that does "
        "nothing; data: the stream's images a second as a ratio to webdataset's; memory: its peak "
        "over 10 and 100 thousand; of trained models, samplers: distance to 250 DDIM steps; "
        "inpainting: error at a hole's border, of --base and of --inpaint; guidance: score by "
        "--clip over the guidance scale; recipe: held-out error of emoji-base with other settings "
        "of training, at equal seconds of computing",
    )
    command.add_argument(
        "--base", type=local_path, help=f"default: {commands.BASE} for inpainting, else {SHIPPED}"
    )
    command.add_argument(
        "--inpaint",
        type=local_path,
        default=Path("runs/nano-base-inpaint/weights.safetensors"),
        help="default: %(default)s",
    )
    command.add_argument(
        "--clip",
        type=local_path,
        default=Path("runs/nano-clip/weights.safetensors"),
        help="default: %(default)s",
    )
    command.add_argument(
        "--corpus",
        type=local_path,
        default=Path("runs/corpus/held_out"),
        help="pictures to inpaint (default: %(default)s)",
    )
    command.add_argument(
        "--shards",
        default="runs/corpus/train",
        help="corpus of data and memory (default: %(default)s)",
    )
    command.add_argument(
        "--preset",
        help="default: paper-base for forward, filtered-base for sample, emoji-base for train, "
        "all of its shapes for plan, nano for serve, of nano and emoji; filtered for cascade, of "
        "paper, filtered, emoji and nano",
    )
    command.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="default: %(default)s"
    )
    command.add_argument(
        "--size",
        type=int,
        choices=[64, 256],
        default=64,
        help="of the pictures for serve: 64 asks the base model only (default: %(default)s)",
    )
    command.add_argument(
        "--seconds",
        type=positive,
        default=120,
        help="of open-loop load for serve, of computing for each run of recipe "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--repeats",
        type=positive,
        help="default: 1 for forward, 5 for sample and train, 3 for cascade, data and plan",
    )
    doctor.add_parser(add)
    return parser


def _add_cards(add) -> None:
    """Add the commands that pack weights for release and that show their model card."""
    command = add(
        "pack",
        commands.pack,
        "a base model and an upsampler as they ship: in float16, with a model card",
        """examples:
  glide pack runs/emoji-base runs/emoji-upsampler --notes notes.json
  glide pack base.safetensors upsampler.safetensors --corpus runs/corpus/train \
--recipe base.json upsampler.json
notes.json has the card's figures and limits; without --notes those of the card that is there stay:
  {"figures": {"style right": {"value": 0.97, "interval": [0.95, 0.98], "command": "glide ..."}}, \
"limits": ["..."]}""",
    )
    command.add_argument("base", help="weights file, or the folder of a run, local or s3://")
    command.add_argument("upsampler", help="likewise")
    command.add_argument(
        "--corpus",
        action="append",
        default=[],
        metavar="FOLDER",
        help="whose card.json names the "
        "sources; may be repeated (default: what the weights say, or the run's corpus)",
    )
    command.add_argument(
        "--recipe",
        nargs=2,
        metavar=("BASE.json", "UPSAMPLER.json"),
        help="names and values that say how each was trained, beside what a run says of itself",
    )
    command.add_argument("--notes", metavar="NOTES.json", help="figures and limits for the card")
    command.add_argument(
        "--out", type=local_path, metavar="FOLDER", help="to write to (default: the package's own)"
    )
    command = add(
        "card",
        commands.card,
        "the model card of weights: data, licences, training, figures, limits",
    )
    command.add_argument(
        "--base",
        type=local_path,
        default=Path(SHIPPED),
        metavar="WEIGHTS",
        help="a weights file of any kind (default: %(default)s, which ships with glide_ray)",
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base",
        type=local_path,
        default=Path(SHIPPED),
        metavar="WEIGHTS",
        help="of the base model (default: %(default)s, which ships with glide_ray)",
    )
    command.add_argument(
        "--upsampler",
        type=local_path,
        metavar="WEIGHTS",
        help=f"of the upsampler (default: {SHIPPED}, if it enlarges what the base model makes)",
    )
    command.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="default: fp16 on a GPU, fp32 on a CPU",
    )


def add_sampling(command: argparse.ArgumentParser) -> None:
    """Add the sampling options, which `pictures.sample_options` reads."""
    command.add_argument(
        "--sampler",
        help="ancestral, ddim, plms or dpm++, the last for 15 to 30 steps (default: the model's "
        "own)",
    )
    command.add_argument(
        "--steps",
        help="base model: a number, or a respacing such as 10,10,3,2,2 (default: the model's own)",
    )
    command.add_argument("--upsampler-steps", help="likewise for the upsampler")
    command.add_argument(
        "--guidance-scale",
        type=float,
        help="how strongly the prompt pulls; 1 is none (default: the model's own)",
    )
    command.add_argument(
        "--clip",
        help="weights of noised CLIP, or the folder of a public CLIP, for --clip-scale and "
        "--best-of",
    )
    command.add_argument(
        "--clip-scale",
        type=float,
        default=0.0,
        help="how strongly CLIP pulls, beside the other guidance (default: 0, none)",
    )
    command.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="guide only between these parts of the noise, 1 the noisiest (default: 0 1)",
    )


def _add_sampling(
    command: argparse.ArgumentParser,
    out: str,
    help_out: str = "PNG to write (default: %(default)s)",
) -> None:
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same picture (default: %(default)s)",
    )
    add_sampling(command)
    command.add_argument(
        "--no-upsampler", action="store_true", help="stop at the base model's size"
    )
    command.add_argument("--out", type=local_path, default=Path(out), help=help_out)
    _add_weights(command)


def _flat(config: ServeConfig) -> dict[str, object]:
    """Settings of a config by dotted name, without those that have an option of their own."""
    tree = config.model_dump(
        exclude={"base", "upsampler", "clip", "keys", "host", "port", "precision", "more_models"}
    )
    return {
        f"{name}.{key}" if key else name: value
        for name, given in tree.items()
        for key, value in (given if isinstance(given, dict) else {"": given}).items()
    }


if __name__ == "__main__":
    sys.exit(main())
