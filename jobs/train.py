"""Train a model, as a Ray job.

ray job submit --working-dir . -- python jobs/train.py PRESET --out s3://bucket/runs/NAME

At the end it prints one line of JSON. Submitting again with the same --out resumes an interrupted
run; for a finished run it returns at once.
"""

import dataclasses
import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import job_parser, read_preset
from glide_ray.cli.training import add_train_options
from glide_ray.distributed.job import run


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_train_options(parser)
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        preset = read_preset(options)
        from glide_ray.distributed.training.run import train
        from glide_ray.train.run_folder import go_back

        out = options.out or f"runs/{preset.model.name}"
        if options.from_step is not None:
            go_back(out, options.from_step)
        result = train(preset, out)
        return dataclasses.asdict(dataclasses.replace(result, rows=None))

    return run("train", work)


if __name__ == "__main__":
    sys.exit(main())
