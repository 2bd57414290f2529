"""Replace the centre of a picture by something else, from a prompt.

python examples/edit.py photo.png "a yellow star, 3D render"
"""

import argparse

import numpy as np
from PIL import Image

import glide_ray

parser = argparse.ArgumentParser(description="Inpaint the centre of a picture.")
parser.add_argument("picture")
parser.add_argument("prompt")
parser.add_argument("--steps", type=int, default=25, help="denoising steps at 64 pixels")
parser.add_argument("--out", default="edited.png")
options = parser.parse_args()

cascade = glide_ray.load()
size = cascade.size  # 256 pixels
picture = np.asarray(Image.open(options.picture).convert("RGB").resize((size, size)))
known = np.ones((size, size), bool)  # true: keep this pixel, false: paint it
known[size // 4 : -size // 4, size // 4 : -size // 4] = False
sampling = glide_ray.SampleOptions(steps=options.steps)
edited = cascade.edit(picture, known, options.prompt, seed=0, options=sampling)

assert (edited[known] == picture[known]).all()  # known pixels keep their values
Image.fromarray(edited).save(options.out)
