"""Evaluate generated pictures against real ones, as a Ray job.

ray job submit --working-dir . -- \\
    python jobs/evaluate.py PICTURES --reference CORPUS --out OUT

PICTURES is the output of jobs/generate.py, or any corpus. Without PICTURES the job first generates
pictures from the captions of the reference. It writes to OUT: figures.json, report.html,
fronts.png, the statistics of the reference for later runs, and the features of all images. At the
end it prints one line of JSON. Submitting the same command again does only what is missing.
"""

import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.evaluation import add_evaluate_options, run_evaluation
from glide_ray.distributed.job import run


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_evaluate_options(parser)
    return parser


def main() -> int:
    options = parser().parse_args()
    return run("evaluate", lambda: run_evaluation(options))


if __name__ == "__main__":
    sys.exit(main())
