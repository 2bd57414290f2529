"""Command that builds and counts a corpus: corpus."""

from __future__ import annotations

from argparse import Namespace

from ..data.styles import STYLES
from ..errors import UserError
from .arguments import (
    CORPUS,
    Commands,
    Parser,
    PathType,
    add_caption_column,
    add_packages,
    local_path,
    positive,
)


def add_commands(commands: Commands) -> None:
    command = commands.add(
        "corpus",
        corpus,
        "build the emoji corpus as tar shards and count it, or count another corpus",
        "examples:\n  glide corpus --scenes 100000\n"
        "  glide corpus --styles outline --out runs/outline\n"
        "  glide corpus --packages FOLDER      (npm tarballs, for a machine without npm)",
    )
    add_corpus_options(command)
    command.add_argument(
        "--survey",
        metavar="PATH",
        help="build nothing; only stream and count this corpus: a folder or s3:// prefix of .tar "
        "or .parquet files or images, or a pattern such as data/{00000..00999}.tar",
    )
    command.add_argument(
        "--row",
        type=int,
        metavar="NUMBER",
        help="with --survey: only name the file of this row, whose number a training run reported",
    )
    add_caption_column(command)


def add_corpus_options(parser: Parser, path: PathType = local_path) -> None:
    """Add the options that `glide corpus` and jobs/prepare.py share."""
    parser.add_argument(
        "--out",
        default=CORPUS,
        help="folder, visible to all nodes, or s3:// prefix; holds train/, held_out/, "
        "held_out_pairs/ and tones/, and with --scenes also scenes/ and held_out_colours/ "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--styles",
        metavar="NAMES",
        help=f"comma-separated styles: {', '.join(STYLES)} (default: all but outline)",
    )
    add_packages(parser, path)
    parser.add_argument(
        "--scenes",
        type=positive,
        default=0,
        metavar="N",
        help="also compose N scenes whose contents are known: backgrounds, colours, counts, "
        "positions (default: none)",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="drop images with a side shorter than this (default: %(default)s)",
    )


def corpus(options: Namespace) -> None:
    if options.row is not None:
        if not options.survey:
            raise UserError("--row needs --survey PATH, the corpus that has the row.")
        from ..data.sources import find_row

        print(find_row(options.survey, options.row, options.caption_column))
        return
    from ..data.card import licences_line
    from ..distributed.curation.corpus import prepare, survey

    if options.survey:
        reports = [survey(options.survey, options.min_size, options.caption_column)]
    else:
        styles = (options.styles or "").split(",")
        reports = prepare(options.out, options.min_size, styles, options.packages, options.scenes)
    for part in reports:
        print(
            f"{part.path}: {part.rows}; {part.captions:,} captions, {part.cut_captions} cut at "
            "128 tokens"
        )
        if options.survey:
            print(licences_line(part.licences))
    if options.survey and not reports[0].rows.kept:
        raise UserError(f"No row of {options.survey} can be used.")
