"""Remove rows from a training corpus, as a Ray job.

ray job submit --working-dir . -- python jobs/filter.py SOURCE --out OUT

Without --content it drops rows that break a rule of image or caption, and near-duplicates
(`glide clean`). With --content it keeps the rows that pass a content filter (`glide filter apply`).
At the end it prints one line of JSON. Submitting the same command again does nothing, unless SOURCE
or the content filter has changed; a job that was stopped resumes.
"""

import sys
from argparse import ArgumentParser, Namespace

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.curation import add_clean_options, add_filter_clip, clean_config
from glide_ray.data.filters import Report, import_rules
from glide_ray.data.patterns import absolute
from glide_ray.data.sources import find_parts, state
from glide_ray.distributed.job import run, run_once
from glide_ray.errors import UserError
from glide_ray.storage import fetch, fingerprint


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_clean_options(parser)
    parser.add_argument(
        "--content",
        metavar="FILTER",
        help="apply this content filter, a local or s3:// file, instead of the rules",
    )
    add_filter_clip(parser)
    return parser


def main() -> int:
    options = parser().parse_args()
    return run("filter", lambda: filter_once(options))


def filter_once(options: Namespace) -> dict:
    asked = with_state(options)
    from glide_ray.distributed.rows import RECORD

    work = apply_content_filter if options.content else apply_rules

    def report() -> dict:
        done = work(options)
        if not done.kept:
            raise UserError(f"No row of {options.source} is kept: {done}")
        return {
            "out": options.out,
            "kept": done.kept,
            "dropped": dict(done.dropped),
            "faults": done.faults,
        }

    return run_once(f"{options.out.rstrip('/')}/{RECORD}", asked, report)


def with_state(options: Namespace) -> dict:
    """The options, with the state of the files that they name: a changed file is a new job."""
    source = absolute(options.source)
    parts = find_parts(source, options.caption_column)
    content = {"content_is": fingerprint(fetch(options.content))} if options.content else {}
    return {**vars(options), "source_is": state(source, parts), **content}


def apply_content_filter(options: Namespace) -> Report:
    from glide_ray.distributed.curation.apply_filter import apply_content

    return apply_content(
        options.content,
        options.source,
        options.out,
        options.clip,
        column=options.caption_column,
    ).report


def apply_rules(options: Namespace) -> Report:
    config, rules = clean_config(options), import_rules(options.rule)
    from glide_ray.distributed.curation.clean import clean

    return clean(options.source, options.out, config, rules).report


if __name__ == "__main__":
    sys.exit(main())
