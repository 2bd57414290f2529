"""Commands that remove rows from a corpus: clean, filter fit and filter apply."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config.data import BASELINES, CleanConfig, FilterConfig
from ..errors import UserError
from .arguments import (
    CORPUS,
    Commands,
    Parser,
    add_caption_column,
    add_judge_clip,
    add_settings,
    add_shared_out,
    local_path,
    positive,
    settings_epilog,
)

if TYPE_CHECKING:
    from ..data.filters import Rule
    from ..distributed.curation.fit_filter import FilterFit

AnyConfig = TypeVar("AnyConfig", CleanConfig, FilterConfig)
FILTERS = Path("runs/filters")
WEAPONS = ("weapon", "dagger", "kitchen knife", "water pistol", "bomb", "bow and arrow", "axe")
# Content that the emoji corpus can label by itself: rule, settings, search words.
# "people" is most of the corpus, so random rows are labelled, as in the paper. Its 320 kinds are
# too few to guarantee 1% missed at 95% confidence without dropping nearly everything.
KNOWN: dict[str, tuple[str, list[str], list[str]]] = {
    "people": (
        "glide_ray.data.emoji:shows_people",
        ["labels=2000", "first=2000", "confidence=0.55"],
        [],
    ),
    "weapons": (
        "glide_ray.data.emoji:shows_weapon",
        [],
        [f"{name}, {style}" for style in ("3D render", "flat icon") for name in WEAPONS],
    ),
}


def add_commands(commands: Commands) -> None:
    _add_clean(commands)
    command = commands.add(
        "filter",
        None,
        "train and apply a content filter from a few labelled images (app. F.1)",
    )
    steps = Commands(command, "steps", "STEP")
    _add_fit(steps)
    _add_apply(steps)


# -- clean -----------------------------------------------------------------------------------------


def _add_clean(commands: Commands) -> None:
    command = commands.add(
        "clean",
        clean,
        "check every image and caption of a corpus, drop near-duplicates, write the rest as shards",
        f"{settings_epilog(CleanConfig())}\n"
        f"baselines of DataComp: {', '.join(BASELINES)}\nexamples:\n"
        "  glide clean s3://bucket/raw --out s3://bucket/clean --set min_size=256 "
        "--rule my_rules:is_outdoors\n"
        "  glide clean s3://bucket/raw --out s3://bucket/clean --set semantic=0.95 "
        "--set baseline=clip_score --set clip=s3://models/clip-vit-large-patch14",
    )
    add_clean_options(command)


def add_clean_options(parser: Parser) -> None:
    """Add the options that `glide clean` and jobs/filter.py share."""
    parser.add_argument(
        "source",
        help="corpus: a folder or s3:// prefix of .tar, .parquet or images with captions, or "
        "data/{00000..00999}.tar",
    )
    add_shared_out(parser, None)
    add_settings(parser)
    add_caption_column(parser)
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your own rule: a function of a Candidate (glide_ray/data/filters.py) that returns "
        "true for rows to keep; may be repeated",
    )


def clean_config(options: Namespace) -> CleanConfig:
    """The settings of `glide clean` and jobs/filter.py."""
    from ..config.overrides import override

    return _with_column(override(CleanConfig(), options.set), options)


def _with_column(config: AnyConfig, options: Namespace) -> AnyConfig:
    """The settings with the column that --caption-column names, if it does."""
    column = options.caption_column or config.caption_column
    return config.model_copy(update={"caption_column": column})


def clean(options: Namespace) -> None:
    from ..data.card import licences_line
    from ..data.filters import import_rules

    config = clean_config(options)
    rules = import_rules(options.rule)
    from ..distributed.curation.clean import clean as clean_corpus
    from ..distributed.rows import DROPPED, PAGE

    done = clean_corpus(options.source, options.out, config, rules)
    print(f"{done.report}")
    megabytes = sum(shard["bytes"] for shard in done.index["shards"]) / 1e6
    print(
        f"{options.out}: {done.report.kept:,} rows in shards of at most {config.per_shard:,}, "
        f"{megabytes:,.1f} MB; dropped rows and reasons: {DROPPED}"
    )
    print(licences_line(done.card))
    print(f"{options.out.rstrip('/')}/{PAGE}")
    if not done.report.kept:
        raise UserError(f"No row of {options.source} is kept.")


# -- filter fit ------------------------------------------------------------------------------------


def _add_fit(steps: Commands) -> None:
    command = steps.add(
        "fit",
        fit_filter,
        "ask for labels and fit the filter to them",
        f"{settings_epilog(FilterConfig())}\nexamples:\n  glide filter fit people\n"
        '  glide filter fit smoke --corpus s3://bucket/clean --search "a cigarette" '
        "--clip s3://models/clip-vit-base-patch16",
        "Write rows to label to a CSV and a sheet of pictures, and fit an SVM to the labels on "
        "CLIP features, with a bias that keeps the missed share low. Run it again after each "
        "round of labelling. For people and weapons the emoji corpus labels itself.",
    )
    command.add_argument(
        "name",
        help="name of the content to find; the folder runs/filters/NAME holds its labels, filter "
        "and page",
    )
    command.add_argument(
        "--corpus", help=f"corpus to take rows from (default: the emoji corpus, {CORPUS}/train)"
    )
    command.add_argument(
        "--search",
        action="append",
        metavar="WORDS",
        help="label the pictures that match these words first; may be repeated",
    )
    _add_truth(command, "that labels the rows, so that nobody has to")
    command.add_argument(
        "--held-out",
        help=f"corpus to assess the filter on, with --truth (default: {CORPUS}/held_out)",
    )
    add_judge_clip(command)
    add_settings(command)
    add_caption_column(command)
    command.add_argument(
        "--out",
        type=local_path,
        help="folder of the labels and the filter (default: runs/filters/NAME)",
    )


def _add_truth(parser: Parser, purpose: str) -> None:
    parser.add_argument(
        "--truth",
        metavar="MODULE:FUNCTION",
        help=f"function of a Candidate (glide_ray/data/filters.py) {purpose}",
    )


def fit_filter(options: Namespace) -> None:
    from ..config.overrides import override

    known = KNOWN.get(options.name) if options.corpus is None else None
    own_truth, settings, words = known or (None, [], [])
    truth = _truth(options.truth or own_truth)
    config = _with_column(override(override(FilterConfig(), settings), options.set), options)
    out = options.out or FILTERS / options.name
    from ..distributed.curation.fit_filter import fit_content

    done = fit_content(
        options.name,
        options.corpus or f"{CORPUS}/train",
        out,
        options.clip,
        config,
        options.search or words,
        truth,
        options.held_out or (f"{CORPUS}/held_out" if options.corpus is None else None),
    )
    _print_fit(done, out)


def _truth(rule: str | None) -> Rule | None:
    """The function that --truth names. Raises UserError."""
    from ..data.filters import import_rules

    return next(iter(import_rules([rule] if rule else [], "--truth").values()), None)


def _print_fit(done: FilterFit, out: Path) -> None:
    from ..distributed.curation.fit_filter import FILTER, LABELS, SHEET

    if done.content is not None:
        print(f"{out / FILTER}: {done.on_labels}")
    if done.assessment is not None:
        print(done.assessment)
    if done.content is not None:
        print(f"{out}/report.html")
    if done.waiting:
        print(
            f"{done.labelled:,} rows are labelled; {done.waiting} more are in {out / LABELS}, "
            f"their pictures in {out / SHEET}: write 1 or 0 for each, "
            "and run the same command again"
            + (", or use the filter as it is." if done.content is not None else ".")
        )


# -- filter apply ----------------------------------------------------------------------------------


def _add_apply(steps: Commands) -> None:
    command = steps.add(
        "apply",
        apply_filter,
        "copy a corpus without the content that the filter finds",
        "example:\n  glide filter apply people runs/corpus/train --out runs/without_people",
        "Write the rows of a corpus that pass a filter, with an index, a list of the dropped rows "
        "and a page of examples.",
    )
    command.add_argument(
        "filter", help="name of a filter fitted on this machine, or a filter file, local or s3://"
    )
    command.add_argument(
        "source", help="corpus: a folder or s3:// prefix, or data/{00000..00999}.tar"
    )
    add_shared_out(command, None)
    add_filter_clip(command)
    add_caption_column(command)
    _add_truth(command, "that returns true for the content; the page then shows missed rows")
    command.add_argument(
        "--per-shard",
        type=positive,
        default=10_000,
        metavar="ROWS",
        help="rows of a shard (default: %(default)s)",
    )


def add_filter_clip(parser: Parser) -> None:
    """Add --clip of a fitted content filter, for `glide filter apply` and jobs/filter.py."""
    parser.add_argument(
        "--clip",
        help="new location of the CLIP that the content filter was fitted with (default: the "
        "location stored in the filter)",
    )


def apply_filter(options: Namespace) -> None:
    truth = _truth(options.truth)
    from ..data.card import licences_line
    from ..distributed.curation.apply_filter import apply_content
    from ..distributed.curation.fit_filter import FILTER

    named = FILTERS / options.filter / FILTER
    done = apply_content(
        named if named.exists() else options.filter,
        options.source,
        options.out,
        options.clip,
        truth,
        options.per_shard,
        options.caption_column,
    )
    print(done.report)
    print(licences_line(done.card))
    if done.assessment is not None:
        print(done.assessment)
    print(f"{options.out.rstrip('/')}/report.html")
    if not done.report.kept:
        raise UserError(f"No row of {options.source} is kept.")
