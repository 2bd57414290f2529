"""Generated pictures beside real ones, for `ray job submit --working-dir . -- python jobs/evaluate.py PICTURES --reference CORPUS --out OUT`.

PICTURES is what jobs/generate.py left, or any corpus. OUT gets figures.json, report.html, and the features of both sides. Prints one line
of JSON at its end. Submitted again it looks only at what it has not seen whole.
"""

import argparse
import sys

from glide_ray.cli import CLIP
from glide_ray.distributed.evaluate import evaluate
from glide_ray.distributed.job import run


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="a folder or s3:// prefix of pictures with captions")
    parser.add_argument("--reference", required=True, help="a corpus of real ones: a folder or s3:// prefix")
    parser.add_argument("--out", required=True, help="folder, which all nodes see, or s3:// prefix to write to")
    parser.add_argument("--clip", default=str(CLIP), help="weights of a CLIP of ours, or the folder of a public one, local or s3:// (default: %(default)s)")
    return parser


def main() -> int:
    options = parser().parse_args()
    return run("evaluate", lambda: evaluate(options.pictures, options.reference, options.out, options.clip, lambda line: print(line, file=sys.stderr)))


if __name__ == "__main__":
    sys.exit(main())
