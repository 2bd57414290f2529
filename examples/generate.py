"""Text to pictures with the weights that ship with the package.

python examples/generate.py "a red apple, 3D render" "a blue heart, flat icon"
"""

import argparse
from pathlib import Path

from PIL import Image

import glide_ray

parser = argparse.ArgumentParser(description="Generate a picture for each prompt.")
parser.add_argument("prompts", nargs="+", metavar="PROMPT")
parser.add_argument("--steps", type=int, default=25, help="denoising steps at 64 pixels")
parser.add_argument("--out", type=Path, default=Path("generated"), help="folder for the pictures")
options = parser.parse_args()

cascade = glide_ray.load()  # base model and upsampler; on a GPU if there is one
seeds = range(len(options.prompts))  # the same seed always gives the same picture
pictures = cascade.generate(options.prompts, seeds, glide_ray.SampleOptions(steps=options.steps))

options.out.mkdir(parents=True, exist_ok=True)
for seed, picture in zip(seeds, pictures, strict=True):
    Image.fromarray(picture).save(options.out / f"{seed}.png")  # uint8 (256, 256, 3)
