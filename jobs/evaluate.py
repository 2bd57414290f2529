"""Evaluate generated pictures against real ones, as a Ray job.

ray job submit --working-dir . -- \\
    python jobs/evaluate.py PICTURES --reference CORPUS --out OUT

PICTURES is the output of jobs/generate.py, or any corpus. Without PICTURES the job first generates
pictures from the captions of the reference. It writes to OUT: figures.json, report.html,
fronts.png, the statistics of the reference for later runs, and the features of all images. At the
end it prints one line of JSON. Submitting the same command again does only what is missing.
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
    return run("evaluate", lambda: evaluated(options))


if __name__ == "__main__":
    sys.exit(main())
