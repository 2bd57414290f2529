"""Generate pictures in bulk, as a Ray job.

ray job submit --working-dir . -- python jobs/generate.py PROMPTS --out OUT

PROMPTS is a file, local or s3://, with one prompt per line; a .jsonl file has one object per line,
with `prompt` and optionally `seed`. The PNGs are written to OUT/00000/, each with its recipe, and
their prompts to OUT/metadata.jsonl, which makes OUT a corpus. At the end the job prints one line of
JSON. Submitting the same command again generates only the missing pictures.
"""

import argparse
import dataclasses
import sys

from glide_ray.cli.arguments import positive
from glide_ray.cli.main import add_sampling
from glide_ray.cli.pictures import sample_options
from glide_ray.config.models import SHIPPED
from glide_ray.config.overrides import validate
from glide_ray.config.sampling import BulkConfig
from glide_ray.distributed.generate import generate
from glide_ray.distributed.job import run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", help="a file of prompts, local or s3://")
    parser.add_argument("--out", required=True, help="folder, which all nodes see, or s3:// prefix")
    parser.add_argument(
        "--base",
        default=SHIPPED,
        help="weights of the base model, on a path that all nodes see, or s3:// "
        "(default: %(default)s, which ships with glide_ray)",
    )
    parser.add_argument(
        "--upsampler",
        help=f"weights of the upsampler (default: {SHIPPED} with that base model, none with "
        "another: pictures of its size)",
    )
    parser.add_argument(
        "--no-upsampler", action="store_true", help="pictures of the base model's size"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "gpu"],
        help="auto: use GPUs if the cluster has any; gpu: wait for the autoscaler to add them",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="default: fp16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first picture; each picture adds one (default: %(default)s)",
    )
    parser.add_argument(
        "--per-prompt",
        type=positive,
        default=1,
        metavar="N",
        help="pictures for each prompt (default: %(default)s)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--workers", type=positive, help="GPUs to use, or cores where there are none (default: all)"
    )
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        if options.upsampler is None and options.base == SHIPPED:
            options.upsampler = SHIPPED
        if options.no_upsampler:
            options.upsampler = None
        given = {
            name: getattr(options, name)
            for name in ("base", "upsampler", "clip", "device", "precision", "seed", "per_prompt")
        }
        config = validate(BulkConfig, {**given, "options": sample_options(options)})
        return dataclasses.asdict(
            generate(
                options.prompts,
                options.out,
                config,
                options.workers,
            )
        )

    return run("generate", work)


if __name__ == "__main__":
    sys.exit(main())
