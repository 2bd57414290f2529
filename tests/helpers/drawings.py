"""Drawings of coloured shapes, as samples of a corpus."""

import numpy as np
from PIL import Image, ImageDraw

from glide_ray.data.images import encode
from glide_ray.data.shards import Sample

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
}


def draw(colour, shape, size=64):
    image = Image.new("RGB", (size, size), (255, 255, 255))
    getattr(ImageDraw.Draw(image), shape)(
        (size // 5, size // 5, size * 4 // 5, size * 4 // 5), fill=COLOURS[colour]
    )
    return np.asarray(image)


def drawn_samples(count, size=64):
    for n in range(count):
        colour, shape = list(COLOURS)[n % 4], ("ellipse", "rectangle")[n // 4 % 2]
        yield Sample(
            f"{n:05d}",
            encode(draw(colour, shape, size)),
            "png",
            (f"a {colour} {shape}", colour),
            {"number": n},
        )
