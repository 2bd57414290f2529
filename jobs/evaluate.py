"""Generated pictures beside real ones, for `ray job submit --working-dir . -- python jobs/evaluate.py PICTURES --reference CORPUS --out OUT`.

PICTURES is what jobs/generate.py left, or any corpus; without it pictures of the reference's captions are made first. OUT gets figures.json,
report.html, fronts.png, the reference's statistics to be used again, and what was seen of all images. Prints one line of JSON at its end. Submitted
again it goes on with what is missing.
"""

import argparse
import sys

from glide_ray.cli.assess import add_evaluate_options, evaluated
from glide_ray.distributed.job import run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_evaluate_options(parser)
    return parser


def main() -> int:
    options = parser().parse_args()
    return run("evaluate", lambda: evaluated(options, lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    sys.exit(main())
