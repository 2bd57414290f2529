"""Export the weights of a run's checkpoint, as a Ray job.

ray job submit --working-dir . -- \\
    python jobs/export.py RUN --out s3://bucket/weights/base.safetensors

Needs no GPU, and without --half only the memory of the largest tensor. At the end it prints one
line of JSON. Submitting the same command again does nothing, unless the run has a newer checkpoint.
"""

import sys
from argparse import ArgumentParser, Namespace

from glide_ray.cli.arguments import job_parser
from glide_ray.cli.weights import add_export_options
from glide_ray.distributed.job import run, run_once
from glide_ray.storage import absolute
from glide_ray.train.checkpoint import find_checkpoint


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    add_export_options(parser)
    parser.add_argument("--out", required=True, help="weights file to write, local or s3://")
    return parser


def main() -> int:
    options = parser().parse_args()
    return run("export", lambda: export_once(options))


def export_once(options: Namespace) -> dict:
    checkpoint = find_checkpoint(absolute(options.checkpoint))
    asked = {"checkpoint": checkpoint, "ema_rate": options.ema_rate, "half": options.half}
    if options.ema_length is not None:
        asked["ema_length"] = options.ema_length
    work = export_half if options.half else export
    if options.ema_length is not None:
        work = export_length
    return run_once(f"{options.out}.json", asked, lambda: work(checkpoint, options))


def export(checkpoint: str, options: Namespace) -> dict:
    from glide_ray.train.pack import source_metadata
    from glide_ray.train.partition import export_to

    preset, step, rate = export_to(checkpoint, options.out, options.ema_rate, source_metadata)
    return {"weights": options.out, "model": preset.model.name, "step": step, "ema_rate": rate}


def export_length(checkpoint: str, options: Namespace) -> dict:
    from glide_ray.train import ema_length
    from glide_ray.train.pack import source_metadata

    length, run = options.ema_length, absolute(options.checkpoint)
    preset, step, _ = ema_length.export_length(run, options.out, length, source_metadata)
    return {"weights": options.out, "model": preset.model.name, "step": step, "ema_length": length}


def export_half(checkpoint: str, options: Namespace) -> dict:
    from glide_ray.train.pack import read_trained, write_half

    trained = read_trained(checkpoint, ema_rate=options.ema_rate)
    write_half(trained, options.out)
    return {
        "weights": options.out,
        "model": trained.config.name,
        "step": trained.recipe["steps"],
        "ema": trained.recipe["EMA"],
    }


if __name__ == "__main__":
    sys.exit(main())
