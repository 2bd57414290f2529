"""Export the weights of a run's checkpoint, as a Ray job.

ray job submit --working-dir . -- \\
    python jobs/export.py RUN --out s3://bucket/weights/base.safetensors

Needs no GPU, and without --half only the memory of the largest tensor. At the end it prints one
line of JSON. Submitting the same command again does nothing, unless the run has a newer checkpoint.
"""

import argparse
import sys

from glide_ray.distributed.job import once, run
from glide_ray.storage import absolute
from glide_ray.train.checkpoint import find_checkpoint
from glide_ray.train.pack import read_trained, write_half
from glide_ray.train.partition import export_to


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        help="folder or s3:// prefix of a run, whose last complete checkpoint is exported, "
        "or of a checkpoint",
    )
    parser.add_argument("--out", required=True, help="weights file to write, local or s3://")
    parser.add_argument(
        "--ema-rate",
        type=float,
        help="which of the run's averages (default: the first of its train.ema_rates)",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="write float16, with the recipe and the corpus's sources; "
        "needs the memory of the whole model",
    )
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
