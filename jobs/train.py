"""Train a model, as a Ray job.

ray job submit --working-dir . -- python jobs/train.py PRESET --out s3://bucket/runs/NAME

At the end it prints one line of JSON. Submitting again with the same --out resumes an interrupted
run; for a finished run it returns at once.
"""

import argparse
import dataclasses
import sys

from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.distributed.job import run
from glide_ray.distributed.training.run import train


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help=", ".join(presets.PRESETS))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; may be repeated",
    )
    parser.add_argument(
        "--out",
        help="folder of the run, which all nodes see, or s3:// prefix (default: runs/PRESET)",
    )
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        preset = override(presets.get(options.preset), options.set)
        result = train(preset, options.out or f"runs/{preset.model.name}")
        return dataclasses.asdict(dataclasses.replace(result, rows=None))

    return run("train", work)


if __name__ == "__main__":
    sys.exit(main())
