"""Export the weights of a run's checkpoint, as a Ray job.

ray job submit --working-dir . -- \\
    python jobs/export.py RUN --out s3://bucket/weights/base.safetensors

Needs no GPU, and without --half only the memory of the largest tensor. At the end it prints one
line of JSON. Submitting the same command again does nothing, unless the run has a newer checkpoint.
"""

import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.weights import add_export_options
from glide_ray.distributed.job import once, run
from glide_ray.storage import absolute
from glide_ray.train.checkpoint import find_checkpoint
from glide_ray.train.pack import read_trained, write_half
from glide_ray.train.partition import export_to


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_export_options(parser)
    parser.add_argument("--out", required=True, help="weights file to write, local or s3://")
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        checkpoint = find_checkpoint(absolute(options.checkpoint))

        def export() -> dict:
            if options.half:
                trained = read_trained(checkpoint, ema_rate=options.ema_rate)
                write_half(trained, options.out)
                return {
                    "weights": options.out,
                    "model": trained.config.name,
                    "step": trained.recipe["steps"],
                    "ema": trained.recipe["EMA"],
                }
            preset, step, rate = export_to(checkpoint, options.out, options.ema_rate)
            return {
                "weights": options.out,
                "model": preset.model.name,
                "step": step,
                "ema_rate": rate,
            }

        made_from = {"checkpoint": checkpoint, "ema_rate": options.ema_rate, "half": options.half}
        return once(f"{options.out}.json", made_from, export)

    return run("export", work)


if __name__ == "__main__":
    sys.exit(main())
