"""Commands of `glide` that measure models and their pictures: options and implementation.

Each function imports its own libraries, as in `commands.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..config.models import SHIPPED
from ..errors import UserError
from .arguments import local_path, positive
from .commands import CLIP, EMOJI

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """Add these commands to the command line.

    `add` takes a name, a function of the parsed options, one line of help, and the epilog.
    """
    add_evaluate_options(
        add(
            "evaluate",
            evaluate,
            "FID, IS, precision, recall, CLIP score, KID and CMMD of pictures beside real ones",
            "examples:\n  glide evaluate runs/pictures --reference runs/corpus/held_out\n"
            "  glide evaluate --images 2000 --guidance-scale 1 1.5 2 3 4 --clip-scale 1 2 "
            "--noised-clip runs/nano-clip/weights.safetensors\n"
            "The second makes the pictures first, of captions of the reference, and plots the "
            "fronts of figure 6. The same command goes on with what was interrupted.",
        )
    )
    _add_originals(add)
    _add_probe(add)
    command = add(
        "miniature",
        miniature,
        "figures 6, 9 and 11 and tables 1 and 2 of the paper at "
        "small scale with the shipped weights, and which findings hold",
        "It trains two small models and two CLIPs and makes some 2,000 pictures of 64 "
        "pixels: about 25 minutes of one core. The same command goes on "
        "with what was interrupted.",
    )
    command.add_argument(
        "--corpus",
        type=local_path,
        default=Path(EMOJI),
        help="as `glide corpus` builds it, with all its styles; built if it is not there "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/miniature"),
        help="folder of the results (default: %(default)s)",
    )
    _add_rate(
        add(
            "rate",
            rate,
            "a page on which people compare pictures of models, blind, on a phone or by keyboard",
            "example:\n"
            "  glide rate guided=runs/guided unguided=runs/unguided clip=runs/clip "
            "--out runs/study --real runs/corpus/held_out\n"
            "  glide rate --out runs/study\n"
            "The first begins a study and copies its pictures; the second, or the first again, "
            "goes on with it. `glide elo` counts the votes.",
        )
    )
    command = add(
        "elo",
        elo,
        "Elo scores of models by question, and how often each wins against each other, from "
        "people's votes",
        "examples:\n  glide elo runs/study --json elo.json\n  glide elo votes.csv",
    )
    command.add_argument(
        "votes",
        help="a study's folder, the URL of its database, or a .csv with the columns question, "
        "first, second and winner (a model, or tie)",
    )
    command.add_argument("--json", metavar="FILE", help="write the figures here, too")


# -- evaluate --------------------------------------------------------------------------------------


def add_evaluate_options(command: argparse.ArgumentParser) -> None:
    """Add the options that `glide evaluate` and jobs/evaluate.py share."""
    command.add_argument(
        "pictures",
        nargs="*",
        metavar="[NAME=]PICTURES",
        help="folders or s3:// prefixes, as bulk generation leaves them, or any corpora "
        "(default: pictures are made with --base)",
    )
    command.add_argument(
        "--reference",
        default=f"{EMOJI}/held_out",
        help="real images: a corpus, or the reference.safetensors of an earlier evaluation "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--out",
        default="runs/evaluation",
        help="folder, which all nodes see, or s3:// prefix to write to (default: %(default)s)",
    )
    command.add_argument(
        "--clip",
        default=str(CLIP),
        help="the CLIP that judges: weights of ours, or the folder of a public one "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--inception",
        metavar="FILE",
        help="inception-2015-12-05.pt, NVIDIA's TorchScript file, for FID and IS (default: none; "
        "distances are of the CLIP's features)",
    )
    command.add_argument(
        "--leave-out",
        metavar="FILE",
        help="list of the reference's images that are near-copies of training images, for "
        "distances without them",
    )
    command.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="of the pictures as they are compared (default: as they are made)",
    )
    made = command.add_argument_group("pictures to be made, where none are given")
    made.add_argument(
        "--noised-clip",
        metavar="CLIP",
        help="weights of noised CLIP, or the folder of a public CLIP, for --clip-scale",
    )
    made.add_argument(
        "--guidance-scale",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="of classifier-free guidance, a set for each; 1 is none",
    )
    made.add_argument(
        "--clip-scale",
        type=float,
        nargs="+",
        default=[],
        metavar="SCALE",
        help="of CLIP guidance, a set for each; 0 is none",
    )
    _add_bulk(made, "of each set, of as many captions of the reference")


def _add_bulk(made, images: str, option: str = "--images", default: int = 30_000) -> None:
    """Add the options for generating the pictures of a measurement, which `bulk` reads."""
    made.add_argument(
        option, type=positive, default=default, help=f"{images} (default: %(default)s)"
    )
    made.add_argument(
        "--base",
        default=SHIPPED,
        metavar="WEIGHTS",
        help="of the base model (default: %(default)s, which ships with glide_ray)",
    )
    made.add_argument(
        "--upsampler",
        help="weights of the upsampler (default: none, pictures of the base model's size, as "
        "figure 6 has them)",
    )
    made.add_argument(
        "--steps",
        help="base model: a number, or a respacing such as 10,10,3,2,2 (default: the model's own; "
        "the paper's figures are of 250)",
    )
    made.add_argument("--sampler", help="ancestral, ddim, plms or dpm++ (default: the model's own)")
    made.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture of each set; it counts up (default: %(default)s)",
    )
    made.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "gpu"],
        help="auto: a GPU, if the cluster has one now; gpu: also if it is to grow",
    )
    made.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="default: fp16 on a GPU, fp32 on a CPU",
    )


def bulk(options, clip: str | None = None, guidance_scale: float | None = None):
    """The options of `_add_bulk` as a BulkConfig."""
    from ..config.overrides import validate
    from ..config.sampling import BulkConfig, SampleOptions

    asked = SampleOptions(
        sampler=options.sampler, steps=options.steps, guidance_scale=guidance_scale
    )
    given = {
        name: getattr(options, name)
        for name in ("base", "upsampler", "device", "precision", "seed")
    }
    return validate(BulkConfig, {**given, "clip": clip, "options": asked})


def evaluated(options) -> dict[str, Any]:
    """Run the evaluation that the options describe. Returns its figures. Raises UserError."""
    sets = named(options.pictures)
    config = bulk(options, options.noised_clip)
    if any(scale > 0 for scale in options.clip_scale) and not options.noised_clip:
        raise UserError(
            "--clip-scale guides by a CLIP; give one with --noised-clip, trained by "
            "`glide train nano-clip` for example."
        )
    from ..distributed.evaluation import evaluate as evaluation
    from ..evaluation.features import fetch_network

    judges = evaluation.Judges(options.clip, options.inception)
    # Report a missing network before generating pictures
    for path in filter(None, (options.clip, options.inception)):
        fetch_network(path)
    from ..distributed.evaluation.near_copies import left_out

    gone = left_out(options.leave_out) if options.leave_out else None
    if not sets:
        captions = evaluation.captions_of(options.reference)
        sets = evaluation.sweep(
            config,
            options.guidance_scale,
            options.clip_scale,
            captions,
            options.images,
            options.out,
        )
    return evaluation.evaluate(sets, options.reference, options.out, judges, gone, options.size)


def evaluate(options) -> None:
    from ..evaluation.report import aligned, number

    found = evaluated(options)
    columns = (
        "pictures",
        "frechet_distance",
        "inception_score",
        "precision",
        "recall",
        "clip_score",
    )
    heads = (
        "",
        "pictures",
        *(("FID", "IS") if found["inception"] else ("distance", "score")),
        "precision",
        "recall",
        "CLIP score",
    )
    rows = [
        heads,
        *(
            (name, *(number(row[column]) for column in columns))
            for name, row in found["sets"].items()
        ),
    ]
    print(aligned(rows))
    print(f"{options.out}/report.html, figures.json, fronts.png")


# -- compose ---------------------------------------------------------------------------------------


def add_compose_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `glide compose`, except those for the weights."""
    from ..evaluation.categories import CATEGORIES

    command.add_argument(
        "--corpus",
        default=EMOJI,
        help="the corpus that the judge is fitted to and prompts are made from, "
        "with all its styles (default: %(default)s)",
    )
    command.add_argument(
        "--prompts",
        type=positive,
        default=200,
        metavar="N",
        help="per category (default: %(default)s)",
    )
    command.add_argument(
        "--categories",
        nargs="+",
        choices=CATEGORIES,
        default=list(CATEGORIES),
        metavar="NAME",
        help=f"of {', '.join(CATEGORIES)} (default: all)",
    )
    command.add_argument(
        "--new-style",
        metavar="CORPUS",
        help="a corpus of one more style, such as one used for fine-tuning; adds "
        "prompts in that style",
    )
    command.add_argument(
        "--size",
        type=int,
        choices=[64, 256],
        default=256,
        help="pixels of the pictures; 64 uses the base model alone (default: %(default)s)",
    )
    command.add_argument(
        "--real",
        action="store_true",
        help="judge the real pictures of the prompts; generate nothing",
    )
    command.add_argument(
        "--sampler", help="of the base model: ancestral, ddim, plms or dpm++ (default: its own)"
    )
    command.add_argument("--steps", help="base model: a number, or a respacing (default: its own)")
    command.add_argument("--upsampler-steps", help="likewise for the upsampler")
    command.add_argument(
        "--guidance-scale",
        type=float,
        help="how strongly the prompt pulls (default: the model's own)",
    )
    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first picture of each category; the others count up (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        type=local_path,
        default=Path("runs/compose"),
        help="folder for the pictures, figures.json and report.html (default: %(default)s)",
    )


def compose(options) -> None:
    from ..evaluation import compose as composing
    from ..evaluation.fitting import load_or_fit
    from ..evaluation.new_style import learn_style
    from ..evaluation.report import aligned

    cascade = None if options.real else _cascade(options)
    judge, rows_of_style = load_or_fit(options.corpus), ()
    if options.new_style:
        judge, rows_of_style = learn_style(judge, options.new_style, options.corpus)
    print(aligned(composing.judge_table(judge, options.size)))
    with _progress("pictures") as progress:
        run = composing.Run(
            judge,
            options.corpus,
            options.out,
            options.prompts,
            options.categories,
            options.size,
            options.seed,
            _asked(options),
            rows_of_style,
        )
        rows = run.of_real() if cascade is None else run.of_models(cascade, progress)
    print(aligned(composing.table(rows)))
    if cascade is not None:
        print(f"{options.out / composing.PAGE}, {composing.FIGURES}, {composing.PICTURES}/")


def _asked(options):
    from ..config.sampling import SampleOptions
    from ..sampling.checks import check_options

    asked = SampleOptions(
        sampler=options.sampler,
        steps=options.steps,
        upsampler_steps=options.upsampler_steps,
        guidance_scale=options.guidance_scale,
    )
    check_options(asked, options.seed)
    return asked


def _cascade(options):
    from ..evaluation.compose import PROMPTS_PER_CALL
    from ..precision import fastest_precision
    from ..pretrained.shipped import locate, upsampler_for
    from ..sampling.cascade import Cascade

    _asked(options)  # reject invalid options before loading anything
    upsampler = None
    if options.size != 64:
        upsampler = options.upsampler or upsampler_for(options.base)
    precision = fastest_precision() if options.precision == "auto" else options.precision
    base = locate(options.base, "base")
    cascade = Cascade.load(base, upsampler, precision, PROMPTS_PER_CALL, batched=True)
    if cascade.size != options.size:
        raise UserError(
            f"These models make pictures of {cascade.size} pixels; "
            + (
                "give --size 64, or an upsampler with --upsampler."
                if cascade.size == 64
                else f"give --size {cascade.size}."
            )
        )
    return cascade


@contextmanager
def _progress(what: str):
    """A function of the number done and the total that shows a progress bar."""
    from ..bars import Bar

    bars = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(Bar(total=total, desc=what, unit="picture", dynamic_ncols=True))
        bars[0].update(done - bars[0].n)

    yield progress
    for bar in bars:
        bar.close()


# -- rate and elo ----------------------------------------------------------------------------------


def _add_rate(command: argparse.ArgumentParser) -> None:
    from ..evaluation.pairing import QUESTIONS

    command.add_argument(
        "pictures",
        nargs="*",
        metavar="[NAME=]PICTURES",
        help="of two or more models, for the same prompts: folders or s3:// prefixes as bulk "
        "generation leaves them, or any corpora (default: go on with the study that is there)",
    )
    command.add_argument(
        "--out",
        default="runs/study",
        help="folder of the study: its pictures and votes (default: %(default)s)",
    )
    command.add_argument(
        "--question",
        nargs="+",
        choices=list(QUESTIONS),
        default=list(QUESTIONS),
        help="questions to the raters (default: both)",
    )
    command.add_argument(
        "--comparisons",
        type=positive,
        default=1000,
        metavar="N",
        help="pairs of pictures, which each question is asked of (default: %(default)s)",
    )
    command.add_argument(
        "--votes-per-pair",
        type=positive,
        default=1,
        metavar="N",
        help="raters who are asked the same (default: %(default)s)",
    )
    command.add_argument(
        "--real",
        metavar="CORPUS",
        help="real images with captions, for attention checks (default: pictures of the study "
        "beside noise)",
    )
    command.add_argument(
        "--database",
        metavar="URL",
        help="as SQLAlchemy has it, with its driver installed (default: SQLite in the folder)",
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine only"
    )
    command.add_argument("--port", type=int, default=8010, help="default: %(default)s")


def rate(options) -> None:
    from .. import storage
    from ..evaluation import rater, study
    from ..evaluation.votes import Asked

    sets = {name: storage.absolute(folder) for name, folder in named(options.pictures).items()}
    if len(sets) == 1:
        raise UserError(
            "A study compares pictures of two or more models; name each as NAME=FOLDER."
        )
    asked = (
        Asked(
            sets,
            options.question,
            options.comparisons,
            options.real and storage.absolute(options.real),
        )
        if sets
        else None
    )
    votes = study.open_study(options.out, options.database, asked)
    comparisons, models = votes.comparisons().values(), votes.asked.folders
    checks = sum(one.check_of is not None for one in comparisons)
    print(
        f"{len(comparisons) - checks:,} pairs of {', '.join(models)}, {options.votes_per_pair} "
        f"votes each on {' and '.join(votes.asked.questions)}; {checks:,} attention checks"
    )
    key = votes.study.link_key
    app = rater.build_app(votes, Path(options.out) / study.PICTURES, options.votes_per_pair, key)
    rater.serve(
        app,
        options.host,
        options.port,
        key,
        lambda link: print(
            f"{link}  (Ctrl-C ends it; the same command goes on; the scores: glide elo "
            f"{options.database or options.out})",
            flush=True,
        ),
    )


def elo(options) -> None:
    import json

    from .. import storage
    from ..evaluation import tables

    found = tables.figures(tables.ballot_of(options.votes))
    print(tables.text(found))
    if options.json:
        storage.put(json.dumps(found, indent=1).encode(), options.json)


def named(given: list[str]) -> dict[str, str]:
    """Parse arguments NAME=FOLDER, or FOLDER named after its last part, into name -> folder.

    Raises UserError for a duplicate name or one that is not valid as a file name.
    """
    found: dict[str, str] = {}
    for text in given:
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


# -- near-copies of training images ----------------------------------------------------------------


def _add_originals(add: Add) -> None:
    command = add(
        "filter-reference",
        filter_reference,
        "list a reference's near-copies of training images, for distances without them (table 2, "
        "validation filtered)",
        "example:\n"
        "  glide filter-reference runs/corpus/held_out --training runs/corpus/train "
        "--distance 0.1\n"
        "  glide evaluate runs/pictures --leave-out runs/filter-reference/left-out.json\n"
        "Look at its page and set the distance such that the pairs below it are copies.",
    )
    command.add_argument("reference", help="a corpus: a folder or s3:// prefix")
    command.add_argument(
        "--distance",
        type=float,
        default=0.1,
        help="cosine distance of CLIP's features (default: %(default)s)",
    )
    _add_training(command, "runs/filter-reference")
    command = add(
        "regurgitation",
        regurgitation,
        "the training images that generated pictures lie nearest to: does the model repeat them? "
        "(sec. 6)",
        "examples:\n"
        "  glide regurgitation --training s3://bucket/train --held-out s3://bucket/held_out "
        "--base runs/filtered-base/weights.safetensors\n"
        "  glide regurgitation runs/pictures\n"
        "Pictures that are given were made of training prompts, by jobs/generate.py for example.",
    )
    command.add_argument(
        "pictures",
        nargs="?",
        help="a folder or s3:// prefix of pictures with their prompts (default: they are made "
        "with --base)",
    )
    command.add_argument(
        "--held-out",
        default=f"{EMOJI}/held_out",
        help="real images that were not trained on, to compare with (default: %(default)s)",
    )
    _add_training(command, "runs/regurgitation")
    _add_bulk(
        command.add_argument_group("pictures to be made, where none are given"),
        "of as many captions of the training corpus",
    )


def _add_training(command: argparse.ArgumentParser, out: str) -> None:
    command.add_argument(
        "--training",
        default=f"{EMOJI}/train",
        help="the corpus that was trained on (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        default=out,
        help="folder, which all nodes see, or s3:// prefix to write to (default: %(default)s)",
    )
    command.add_argument(
        "--clip",
        default=str(CLIP),
        help="the CLIP that judges: weights of ours, or the folder of a public one "
        "(default: %(default)s)",
    )


def filter_reference(options) -> None:
    from ..distributed.evaluation.near_copies import LEFT_OUT, filter_reference

    found = filter_reference(
        options.reference, options.training, options.out, options.clip, options.distance
    )
    print(
        f"{options.out}/{LEFT_OUT}: {found['names']:,} of {found['images']:,} images lie within "
        f"{options.distance:g} of a training image; see report.html there"
    )


def regurgitation(options) -> None:
    from ..distributed.evaluation.near_copies import regurgitation

    found = regurgitation(
        options.pictures,
        options.training,
        options.held_out,
        options.out,
        options.clip,
        bulk(options),
        options.images,
    )
    print(
        f"nearest training image: closest {found['closest']:.4f}, median {found['median']:.4f}; "
        f"of held-out real pictures: closest {found['held_out_closest']:.4f}, median "
        f"{found['held_out_median']:.4f}"
    )
    print(
        f"of the {found['compared_by_pixels']} closest pairs {found['copies_by_pixels']} are one "
        f"picture by their pixels; {options.out}/report.html shows them"
    )


def miniature(options) -> None:
    from ..experiments.miniature import run as whole

    for finding in whole.run(options.out, options.corpus):
        print(
            f"{'holds         ' if finding.holds else 'does not hold '}{finding.text}\n"
            f"              {finding.here}"
        )
    print(
        f"{options.out}/{whole.PAGE}, {whole.FIGURES}, {whole.FINDINGS}, figure-6.png, "
        f"figure-9.png, figure-11.png, sets.png"
    )


# -- probe -----------------------------------------------------------------------------------------


def _add_probe(add: Add) -> None:
    command = add(
        "probe",
        probe,
        "do prompts that differ in one word give unlike pictures? The same seeds, measured in "
        "pairs (sec. 6)",
        'example:\n  glide probe "toys for girls" "toys for boys" --words pink blue --seeds 64 '
        "--out runs/probe\n"
        "The same command goes on with what was interrupted.",
    )
    command.add_argument("prompts", nargs="+", help="two or more; each is compared with each other")
    command.add_argument(
        "--words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="what the CLIP is to look for in the pictures, pink and blue for example",
    )
    command.add_argument(
        "--out",
        default="runs/probe",
        help="folder, which all nodes see, or s3:// prefix to write to (default: %(default)s)",
    )
    command.add_argument(
        "--clip",
        default=str(CLIP),
        help="the CLIP that judges: weights of ours, or the folder of a public one "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="of classifier-free guidance; 1 is none (default: the model's own)",
    )
    _add_bulk(command, "how many pictures of each prompt, of as many seeds", "--seeds", 64)


def probe(options) -> None:
    from ..distributed.evaluation.probe import FIGURES, PAGE, SHEET, probe
    from ..evaluation.probes import text

    print(
        text(
            probe(
                options.prompts,
                options.words,
                options.seeds,
                options.out,
                options.clip,
                bulk(options, guidance_scale=options.guidance_scale),
            )
        )
    )
    print(f"{options.out}/{PAGE}, {SHEET}, {FIGURES}")
