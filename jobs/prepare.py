"""Build the emoji corpus, as a Ray job.

ray job submit --working-dir . -- python jobs/prepare.py --out s3://bucket/corpus

At the end it prints one line of JSON. Submitting the same command again skips everything that is
done.
"""

import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.corpus import add_corpus_options
from glide_ray.distributed.job import run, run_once


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_corpus_options(parser, str)
    return parser


def main() -> int:
    options = parser().parse_args()
    styles = (options.styles or "").split(",")

    def work() -> dict:
        from glide_ray.distributed.curation.corpus import prepare

        return {
            part.path: {
                "kept": part.rows.kept,
                "dropped": dict(part.rows.dropped),
                "captions": part.captions,
            }
            for part in prepare(
                options.out,
                options.min_size,
                styles=styles,
                packages=options.packages,
                scenes=options.scenes,
            )
        }

    asked = {"min_size": options.min_size, "styles": styles, "scenes": options.scenes}
    return run("prepare", lambda: run_once(f"{options.out.rstrip('/')}/prepare.json", asked, work))


if __name__ == "__main__":
    sys.exit(main())
