"""Commands that measure generated pictures.

evaluate, filter-reference, regurgitation, probe and miniature.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .arguments import (
    CORPUS,
    Commands,
    Parser,
    add_bulk,
    add_guidance_scale,
    add_judge_clip,
    add_shared_out,
    bulk_config,
    local_path,
    named_sets,
    positive,
)


def add_commands(commands: Commands) -> None:
    _add_evaluate(commands)
    _add_filter_reference(commands)
    _add_regurgitation(commands)
    _add_probe(commands)
    _add_miniature(commands)


# -- evaluate --------------------------------------------------------------------------------------


def _add_evaluate(commands: Commands) -> None:
    command = commands.add(
        "evaluate",
        evaluate,
        "FID, IS, precision, recall, CLIP score, KID and CMMD of generated pictures against real "
        "ones",
        "examples:\n  glide evaluate runs/pictures --reference runs/corpus/held_out\n"
        "  glide evaluate --images 2000 --guidance-scale 1 1.5 2 3 4 --clip-scale 1 2 "
        "--noised-clip runs/nano-clip/weights.safetensors\n"
        "The second generates the pictures first, from captions of the reference, and plots the\n"
        "fronts of figure 6; the paper's figures use --steps 250. The same command resumes an\n"
        "interrupted evaluation.",
    )
    add_evaluate_options(command)


def add_evaluate_options(parser: Parser) -> None:
    """Add the options that `glide evaluate` and jobs/evaluate.py share."""
    parser.add_argument(
        "pictures",
        nargs="*",
        metavar="[NAME=]PICTURES",
        help="folders or s3:// prefixes of generated pictures with their prompts, from "
        "jobs/generate.py for example (default: generate them with --base)",
    )
    parser.add_argument(
        "--reference",
        default=f"{CORPUS}/held_out",
        help="real images: a corpus, or the reference.safetensors of an earlier evaluation "
        "(default: %(default)s)",
    )
    add_shared_out(parser, "runs/evaluation")
    add_judge_clip(parser)
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="NVIDIA's inception-2015-12-05.pt (TorchScript), for FID and IS (default: none; "
        "the distances use CLIP features)",
    )
    parser.add_argument(
        "--leave-out",
        metavar="FILE",
        help="list from `glide filter-reference`: also report distances without these reference "
        "images",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="side to which larger images are reduced before the comparison (default: the side of "
        "the first picture)",
    )
    _add_sweep(parser.add_argument_group("generated pictures, where none are given"))


def _add_sweep(parser: Parser) -> None:
    """Add the options of the sets of pictures that an evaluation generates."""
    parser.add_argument(
        "--noised-clip",
        metavar="CLIP",
        help="weights of noised CLIP, or the folder of a public CLIP, for --clip-scale",
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="classifier-free guidance scales, one set of pictures for each; 1: no guidance",
    )
    parser.add_argument(
        "--clip-scale",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="CLIP guidance scales, one set of pictures for each; 0: no CLIP guidance",
    )
    add_bulk(parser, "pictures of each set, from random captions of the reference")


def run_evaluation(options: Namespace) -> dict[str, Any]:
    """Run the evaluation that the options describe. Returns its figures. Raises UserError."""
    sets = named_sets(options.pictures)
    config = bulk_config(options, options.noised_clip)
    if any(scale > 0 for scale in options.clip_scale) and not options.noised_clip:
        raise UserError(
            "--clip-scale needs a CLIP for guidance; give one with --noised-clip, trained by "
            "`glide train nano-clip` for example."
        )
    from ..distributed.evaluation import evaluate as evaluation
    from ..distributed.evaluation.near_copies import left_out
    from ..evaluation.features import fetch_network

    judges = evaluation.Judges(options.clip, options.inception)
    # Report a missing network before generating pictures
    for path in filter(None, (options.clip, options.inception)):
        fetch_network(path)
    names_left_out = left_out(options.leave_out) if options.leave_out else None
    if not sets:
        sets = evaluation.generate_sets(
            config,
            options.guidance_scale,
            options.clip_scale,
            evaluation.captions_of(options.reference),
            options.images,
            options.out,
        )
    return evaluation.evaluate(
        sets, options.reference, options.out, judges, names_left_out, options.size
    )


def evaluate(options: Namespace) -> None:
    from ..evaluation.report import aligned, number

    found = run_evaluation(options)
    distance, score = ("FID", "IS") if found["inception"] else ("distance", "score")
    columns = {
        "pictures": "pictures",
        "frechet_distance": distance,
        "inception_score": score,
        "precision": "precision",
        "recall": "recall",
        "clip_score": "CLIP score",
    }
    rows = [
        (name, *(number(figures[column]) for column in columns))
        for name, figures in found["sets"].items()
    ]
    print(aligned([("", *columns.values()), *rows]))
    print(f"{options.out}/report.html, figures.json, fronts.png")


# -- near-copies of training images ----------------------------------------------------------------


def _add_filter_reference(commands: Commands) -> None:
    command = commands.add(
        "filter-reference",
        filter_reference,
        "list the reference images that are near-copies of training images, to leave them out of "
        "an evaluation (table 2, validation filtered)",
        "example:\n"
        "  glide filter-reference runs/corpus/held_out --training runs/corpus/train "
        "--distance 0.1\n"
        "  glide evaluate runs/pictures --leave-out runs/filter-reference/left-out.json\n"
        "Look at its page and choose --distance so that the pairs below it are copies.",
    )
    command.add_argument("reference", help="real images: a corpus, as a folder or s3:// prefix")
    command.add_argument(
        "--distance",
        type=float,
        default=0.1,
        help="largest cosine distance of CLIP features for a near-copy (default: %(default)s)",
    )
    _add_training(command)
    add_shared_out(command, "runs/filter-reference")
    add_judge_clip(command)


def _add_training(parser: Parser) -> None:
    parser.add_argument(
        "--training",
        default=f"{CORPUS}/train",
        help="corpus that the model was trained on (default: %(default)s)",
    )


def filter_reference(options: Namespace) -> None:
    from ..distributed.evaluation.near_copies import LEFT_OUT, filter_reference

    found = filter_reference(
        options.reference, options.training, options.out, options.clip, options.distance
    )
    print(
        f"{options.out}/{LEFT_OUT}: {found['names']:,} of {found['images']:,} images lie within "
        f"{options.distance:g} of a training image; see report.html there"
    )


def _add_regurgitation(commands: Commands) -> None:
    command = commands.add(
        "regurgitation",
        regurgitation,
        "search the training images nearest to generated pictures, to see whether the model "
        "repeats them (sec. 6)",
        "examples:\n"
        "  glide regurgitation --training s3://bucket/train --held-out s3://bucket/held_out "
        "--base runs/filtered-base/weights.safetensors\n"
        "  glide regurgitation runs/pictures\n"
        "Pictures of your own should be generated from training prompts, by jobs/generate.py for\n"
        "example.",
    )
    command.add_argument(
        "pictures",
        nargs="?",
        help="folder or s3:// prefix of generated pictures with their prompts (default: generate "
        "them with --base)",
    )
    command.add_argument(
        "--held-out",
        default=f"{CORPUS}/held_out",
        help="real images outside the training corpus, for comparison (default: %(default)s)",
    )
    _add_training(command)
    add_shared_out(command, "runs/regurgitation")
    add_judge_clip(command)
    add_bulk(
        command.add_argument_group("generated pictures, where none are given"),
        "number of pictures, from random captions of the training corpus",
    )


def regurgitation(options: Namespace) -> None:
    from ..distributed.evaluation.near_copies import regurgitation

    found = regurgitation(
        options.pictures,
        options.training,
        options.held_out,
        options.out,
        options.clip,
        bulk_config(options),
        options.images,
    )
    print(
        f"distance to the nearest training image: smallest {found['closest']:.4f}, median "
        f"{found['median']:.4f}; for held-out real images: smallest "
        f"{found['held_out_closest']:.4f}, median {found['held_out_median']:.4f}"
    )
    print(
        f"{found['copies_by_pixels']} of the {found['compared_by_pixels']} closest pairs are the "
        f"same picture by their pixels; {options.out}/report.html shows them"
    )


# -- probe -----------------------------------------------------------------------------------------


def _add_probe(commands: Commands) -> None:
    command = commands.add(
        "probe",
        probe,
        "compare the pictures of prompts that differ in one word, from the same seeds (sec. 6)",
        'example:\n  glide probe "toys for girls" "toys for boys" --words pink blue --seeds 64 '
        "--out runs/probe\n"
        "The same command resumes an interrupted probe.",
    )
    command.add_argument("prompts", nargs="+", help="two or more prompts; every pair is compared")
    command.add_argument(
        "--words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="words whose CLIP score is measured in the pictures, for example: pink blue",
    )
    add_shared_out(command, "runs/probe")
    add_judge_clip(command)
    add_guidance_scale(command)
    add_bulk(command, "pictures of each prompt, from as many seeds", "--seeds", 64)


def probe(options: Namespace) -> None:
    from ..distributed.evaluation.probe import FIGURES, PAGE, SHEET, probe
    from ..evaluation.probes import text

    found = probe(
        options.prompts,
        options.words,
        options.seeds,
        options.out,
        options.clip,
        bulk_config(options, guidance_scale=options.guidance_scale),
    )
    print(text(found))
    print(f"{options.out}/{PAGE}, {SHEET}, {FIGURES}")


# -- miniature -----------------------------------------------------------------------------------


def _add_miniature(commands: Commands) -> None:
    command = commands.add(
        "miniature",
        miniature,
        "figures 6, 9 and 11 and tables 1 and 2 of the paper at small scale with the shipped "
        "weights, and whether each finding holds",
        "It trains two small models and two CLIPs and makes about 2,000 pictures of 64 pixels, in\n"
        "about 25 minutes on one core. The same command resumes an interrupted run.",
    )
    command.add_argument(
        "--corpus",
        type=local_path,
        default=Path(CORPUS),
        help="corpus from `glide corpus` with all styles, built if it does not exist "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/miniature"),
        help="folder for the results (default: %(default)s)",
    )


def miniature(options: Namespace) -> None:
    from ..experiments.miniature import run as whole

    for finding in whole.run(options.out, options.corpus):
        verdict = "holds" if finding.holds else "does not hold"
        print(f"{verdict:14}{finding.text}\n{'':14}{finding.measured}")
    print(
        f"{options.out}/{whole.PAGE}, {whole.FIGURES}, {whole.FINDINGS}, figure-6.png, "
        f"figure-9.png, figure-11.png, sets.png"
    )
