"""Remove rows from a training corpus, as a Ray job.

ray job submit --working-dir . -- python jobs/filter.py SOURCE --out OUT

Without --content it drops rows that break a rule of image or caption, and near-duplicates
(`glide clean`). With --content it keeps the rows that pass a content filter (`glide filter apply`).
At the end it prints one line of JSON. Submitting the same command again does nothing, unless SOURCE
or the content filter has changed.
"""

import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.curation import add_clean_options, add_filter_clip
from glide_ray.config.data import CleanConfig
from glide_ray.config.overrides import override
from glide_ray.data.filters import users_rules
from glide_ray.data.sources import find_parts, state
from glide_ray.distributed.curation.apply_filter import apply_content
from glide_ray.distributed.curation.clean import clean, write_page
from glide_ray.distributed.job import once, run
from glide_ray.distributed.rows import RECORD
from glide_ray.storage import absolute, fetch, fingerprint


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
    return run(
        "filter",
        lambda: once(f"{options.out.rstrip('/')}/{RECORD}", asked(options), lambda: work(options)),
    )


def asked(options) -> dict:
    """The arguments, with the state of the files that they name: a changed file is a new job."""
    source = absolute(options.source)
    content = {"content_is": fingerprint(fetch(options.content))} if options.content else {}
    return {**vars(options), "source_is": state(source, find_parts(source)), **content}


def work(options) -> dict:
    if options.content:
        done = apply_content(options.content, options.source, options.out, options.clip).report
    else:
        cleaned = clean(
            options.source,
            options.out,
            override(CleanConfig(), options.set),
            users_rules(options.rule),
        )
        write_page(cleaned, options.source, options.out)
        done = cleaned.report
    return {
        "out": options.out,
        "kept": done.kept,
        "dropped": dict(done.dropped),
        "faults": done.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
