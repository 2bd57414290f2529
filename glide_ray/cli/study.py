"""Commands of a study with human raters: rate and elo."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..evaluation.pairing import QUESTIONS
from .arguments import Commands, Parser, named_sets, positive

if TYPE_CHECKING:
    from ..evaluation.votes import StudyDefinition, Votes


def add_commands(commands: Commands) -> None:
    _add_rate(commands)
    _add_elo(commands)


# -- rate ------------------------------------------------------------------------------------------


def _add_rate(commands: Commands) -> None:
    command = commands.add(
        "rate",
        rate,
        "serve a page on which people compare pictures of models blindly, by phone or keyboard",
        "example:\n"
        "  glide rate guided=runs/guided unguided=runs/unguided clip=runs/clip "
        "--out runs/study --real runs/corpus/held_out\n"
        "  glide rate --out runs/study\n"
        "The first creates a study and copies its pictures; the second, or the first again,\n"
        "resumes it. `glide elo` counts the votes.",
    )
    command.add_argument(
        "pictures",
        nargs="*",
        metavar="[NAME=]PICTURES",
        help="pictures of two or more models for the same prompts: folders or s3:// prefixes, "
        "from jobs/generate.py for example (default: resume the study in --out)",
    )
    command.add_argument(
        "--out",
        default="runs/study",
        help="folder of the study, with its pictures and votes (default: %(default)s)",
    )
    _add_comparisons(command)
    command.add_argument(
        "--database",
        metavar="URL",
        help="SQLAlchemy URL of the database for the votes; its driver must be installed "
        "(default: SQLite in the folder)",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only)",
    )
    command.add_argument(
        "--port", type=int, default=8010, help="port to listen on (default: %(default)s)"
    )


def _add_comparisons(parser: Parser) -> None:
    """Add the options of the comparisons that raters are asked for."""
    parser.add_argument(
        "--question",
        nargs="+",
        choices=list(QUESTIONS),
        default=list(QUESTIONS),
        help="questions to the raters (default: both)",
    )
    parser.add_argument(
        "--comparisons",
        type=positive,
        default=1000,
        metavar="N",
        help="pairs of pictures for each question (default: %(default)s)",
    )
    parser.add_argument(
        "--votes-per-pair",
        type=positive,
        default=1,
        metavar="N",
        help="raters for each pair (default: %(default)s)",
    )
    parser.add_argument(
        "--real",
        metavar="CORPUS",
        help="real images with captions, for attention checks (default: pictures of the study "
        "against noise)",
    )


def rate(options: Namespace) -> None:
    from ..evaluation import rater, study

    votes = study.open_study(options.out, options.database, _asked(options))
    _print_study(votes, options.votes_per_pair)
    key = votes.study.link_key
    app = rater.build_app(votes, Path(options.out) / study.PICTURES, options.votes_per_pair, key)
    store = options.database or options.out
    rater.serve(
        app,
        options.host,
        options.port,
        key,
        lambda link: print(
            f"{link}  (Ctrl-C ends it; the same command resumes it; scores: glide elo {store})",
            flush=True,
        ),
    )


def _asked(options: Namespace) -> StudyDefinition | None:
    """The study that the options describe, or None to resume. Raises UserError."""
    from .. import storage
    from ..evaluation.votes import StudyDefinition

    sets = {name: storage.absolute(folder) for name, folder in named_sets(options.pictures).items()}
    if not sets:
        return None
    if len(sets) == 1:
        raise UserError(
            "A study compares pictures of two or more models; name each as NAME=FOLDER."
        )
    real = options.real and storage.absolute(options.real)
    return StudyDefinition(sets, options.question, options.comparisons, real)


def _print_study(votes: Votes, votes_per_pair: int) -> None:
    comparisons = votes.comparisons().values()
    checks = sum(one.check_of is not None for one in comparisons)
    print(
        f"{len(comparisons) - checks:,} pairs of {', '.join(votes.asked.folders)}, "
        f"{votes_per_pair} votes each on {' and '.join(votes.asked.questions)}; {checks:,} "
        "attention checks"
    )


# -- elo -------------------------------------------------------------------------------------------


def _add_elo(commands: Commands) -> None:
    command = commands.add(
        "elo",
        elo,
        "Elo scores of models and their win rates against each other, by question, from the votes "
        "of raters",
        "examples:\n  glide elo runs/study --json elo.json\n  glide elo votes.csv",
    )
    command.add_argument(
        "votes",
        help="folder of a study, URL of its database, or a .csv with the columns question, "
        "first, second and winner (a model, or tie)",
    )
    command.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def elo(options: Namespace) -> None:
    import json

    from .. import storage
    from ..evaluation import tables

    found = tables.figures(tables.ballot_of(options.votes))
    print(tables.text(found))
    if options.json:
        storage.put(json.dumps(found, indent=1).encode(), options.json)
