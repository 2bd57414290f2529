"""Build the emoji corpus, as a Ray job.

ray job submit --working-dir . -- python jobs/prepare.py --out s3://bucket/corpus

At the end it prints one line of JSON. Submitting the same command again skips everything that is
done.
"""

import argparse
import sys

from glide_ray.cli.arguments import positive
from glide_ray.data.styles import STYLES
from glide_ray.distributed.curation.corpus import prepare
from glide_ray.distributed.job import once, run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        default="runs/corpus",
        help="folder, which all nodes see, or s3:// "
        "prefix for train/, held_out/ and the others (default: %(default)s)",
    )
    parser.add_argument(
        "--styles",
        metavar="NAMES",
        help=f"of {', '.join(STYLES)}, with commas (default: all but outline)",
    )
    parser.add_argument(
        "--packages",
        metavar="FOLDER",
        help="npm tarballs to read the pictures from (default: fetch them with npm)",
    )
    parser.add_argument(
        "--scenes",
        type=positive,
        default=0,
        metavar="N",
        help="also compose N scenes of known content",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        default=64,
        help="shortest side in pixels; smaller images are dropped and counted "
        "(default: %(default)s)",
    )
    return parser


def main() -> int:
    options = parser().parse_args()
    styles = (options.styles or "").split(",")

    def work() -> dict:
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
    return run("prepare", lambda: once(f"{options.out.rstrip('/')}/prepare.json", asked, work))


if __name__ == "__main__":
    sys.exit(main())
