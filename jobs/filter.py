"""Remove rows from a training corpus, as a Ray job.

ray job submit --working-dir . -- python jobs/filter.py SOURCE --out OUT

Without --content it drops rows that break a rule of image or caption, and near-duplicates
(`glide clean`). With --content it keeps the rows that pass a content filter (`glide filter apply`).
At the end it prints one line of JSON. Submitting the same command again does nothing, unless SOURCE
or the content filter has changed.
"""

import argparse
import sys

from glide_ray.config.data import CleanConfig
from glide_ray.config.overrides import override
from glide_ray.data.filters import users_rules
from glide_ray.data.sources import find_parts, state
from glide_ray.distributed.curation.apply_filter import apply_content
from glide_ray.distributed.curation.clean import clean, write_page
from glide_ray.distributed.job import once, run
from glide_ray.distributed.rows import RECORD
from glide_ray.storage import absolute, fetch, fingerprint


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        help="a folder or s3:// prefix of .tar, .parquet or images with captions, "
        "or data/{00000..00999}.tar",
    )
    parser.add_argument(
        "--out", required=True, help="folder, which all nodes see, or s3:// prefix to write to"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the rules; may be repeated",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="a rule of your own; may be repeated",
    )
    parser.add_argument(
        "--content",
        metavar="FILTER",
        help="a content filter's file, local or s3://, instead of the rules",
    )
    parser.add_argument(
        "--clip",
        help="present path of the CLIP that the content filter was fitted with "
        "(default: the path at that time)",
    )
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
