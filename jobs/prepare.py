"""The corpus job, for `ray job submit --working-dir . -- python jobs/prepare.py`. Prints one line of JSON at its end."""

import argparse
import json
import sys

from glide_ray.config import UserError
from glide_ray.distributed.corpus import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/corpus", help="folder for train/ and held_out/ (default: %(default)s)")
    parser.add_argument("--min-size", type=int, default=64, help="drop images smaller on a side (default: %(default)s)")
    options = parser.parse_args()
    try:
        parts = prepare(options.out, options.min_size)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(json.dumps({part.path: {"kept": part.rows.kept, "dropped": part.rows.dropped, "captions": part.captions} for part in parts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
