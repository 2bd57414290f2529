"""The emoji corpus, for `ray job submit --working-dir . -- python jobs/prepare.py --out s3://bucket/corpus`.

Prints one line of JSON at its end. Submitted again it does nothing that is done.
"""

import argparse
import sys

from glide_ray.distributed.corpus import prepare
from glide_ray.distributed.job import once, run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/corpus", help="folder, which all nodes see, or s3:// prefix for train/ and held_out/ (default: %(default)s)")
    parser.add_argument("--min-size", type=int, default=64, help="count as dropped what is smaller on a side (default: %(default)s)")
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        return {part.path: {"kept": part.rows.kept, "dropped": dict(part.rows.dropped), "captions": part.captions}
                for part in prepare(options.out, options.min_size)}
    return run("prepare", lambda: once(f"{options.out.rstrip('/')}/prepare.json", {"min_size": options.min_size}, work))


if __name__ == "__main__":
    sys.exit(main())
