"""Generate pictures in bulk, as a Ray job.

ray job submit --working-dir . -- python jobs/generate.py PROMPTS --out OUT

PROMPTS is a file, local or s3://, with one prompt per line; a .jsonl file has one object per line,
with `prompt` and optionally `seed`. The PNGs are written to OUT/00000/, each with its recipe, and
their prompts to OUT/metadata.jsonl, which makes OUT a corpus. At the end the job prints one line of
JSON. Submitting the same command again generates only the missing pictures.
"""

import dataclasses
import sys
from argparse import ArgumentParser

from glide_ray.cli.arguments import (
    add_base,
    add_device,
    add_loras,
    add_precision,
    add_sampling,
    add_seed,
    add_shared_out,
    add_upsampler,
    job_parser,
    positive,
    sample_options,
)
from glide_ray.config.models import SHIPPED
from glide_ray.config.overrides import validate
from glide_ray.config.sampling import BulkConfig
from glide_ray.distributed.job import run


def parser() -> ArgumentParser:
    parser = job_parser(__doc__)
    parser.add_argument("prompts", help="file of prompts, local or s3://")
    add_shared_out(parser, None)
    add_base(parser, str)
    add_upsampler(parser, f"{SHIPPED} for the base model {SHIPPED}, none for others", str)
    add_loras(parser)
    parser.add_argument(
        "--no-upsampler",
        action="store_true",
        help="write the base model's pictures, without upsampling",
    )
    add_device(parser)
    add_precision(parser)
    add_seed(parser, "seed of the first picture; each next one adds 1 (default: %(default)s)")
    parser.add_argument(
        "--per-prompt",
        type=positive,
        default=1,
        metavar="N",
        help="pictures of each prompt (default: %(default)s)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--workers",
        type=positive,
        help="number of GPUs to use, or of cores without GPUs (default: all)",
    )
    return parser


def main() -> int:
    options = parser().parse_args()

    def work() -> dict:
        from glide_ray.distributed.generate import generate

        if options.upsampler is None and options.base == SHIPPED:
            options.upsampler = SHIPPED
        if options.no_upsampler:
            options.upsampler = None
        given = {
            name: getattr(options, name)
            for name in ("base", "upsampler", "clip", "device", "precision", "seed", "per_prompt")
        }
        config = validate(
            BulkConfig, {**given, "loras": options.lora, "options": sample_options(options)}
        )
        return dataclasses.asdict(generate(options.prompts, options.out, config, options.workers))

    return run("generate", work)


if __name__ == "__main__":
    sys.exit(main())
