"""A corpus of eight things drawn in three styles, small enough to fit a judge in seconds."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from glide_ray.data.captions import emoji_captions
from glide_ray.data.shards import Sample, write_shards
from glide_ray.data.splits import share

SIZE = 256
# The colours of each style; each style also has its own way of drawing (`draw_thing`).
STYLES = {
    "3D render": [(235, 80, 90), (70, 120, 235), (250, 190, 70), (60, 180, 120)],
    "flat icon": [(249, 47, 96), (0, 166, 237), (252, 213, 63), (0, 210, 106)],
    "Twemoji": [(190, 25, 49), (85, 172, 238), (255, 172, 51), (119, 178, 85)],
}
THINGS = {
    "a0": "ball",
    "a1": "box",
    "a2": "tent",
    "a3": "ring",
    "a4": "star",
    "a5": "ladder",
    "a6": "arrow",
    "a7": "cross",
}
PAIRS = {("a2", "Twemoji"), ("a3", "Twemoji"), ("a1", "flat icon"), ("a4", "flat icon")}
UNSEEN = {"a7"}


def outline(thing: str, turn: float, side: float) -> list[list[tuple[float, float]]]:
    """The polygons of a thing, centred; those after the first are holes or further parts."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    shapes = {
        "ball": [circle],
        "box": [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85],
        "tent": [np.array([(0, -1), (1, 0.8), (-1, 0.8)])],
        "ring": [circle, circle * 0.55],
        "star": [
            np.stack([np.sin(n * np.pi / 5), -np.cos(n * np.pi / 5)]) * (1 if n % 2 == 0 else 0.42)
            for n in range(10)
        ],
        "ladder": [
            np.array([(-0.6, -1), (-0.3, -1), (-0.3, 1), (-0.6, 1)]),
            np.array([(0.3, -1), (0.6, -1), (0.6, 1), (0.3, 1)]),
            *(
                np.array([(-0.5, y - 0.1), (0.5, y - 0.1), (0.5, y + 0.1), (-0.5, y + 0.1)])
                for y in (-0.6, 0, 0.6)
            ),
        ],
        "arrow": [
            np.array(
                [
                    (-1, -0.25),
                    (0.2, -0.25),
                    (0.2, -0.7),
                    (1, 0),
                    (0.2, 0.7),
                    (0.2, 0.25),
                    (-1, 0.25),
                ]
            )
        ],
        "cross": [
            np.array(
                [
                    (-0.3, -1),
                    (0.3, -1),
                    (0.3, -0.3),
                    (1, -0.3),
                    (1, 0.3),
                    (0.3, 0.3),
                    (0.3, 1),
                    (-0.3, 1),
                    (-0.3, 0.3),
                    (-1, 0.3),
                    (-1, -0.3),
                    (-0.3, -0.3),
                ]
            )
        ],
    }
    polygons = shapes[thing] if thing != "star" else [np.array(shapes[thing])]
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return [
        [tuple(point) for point in np.asarray(polygon) @ turned.T * side + SIZE / 2]
        for polygon in polygons
    ]


def draw_thing(emoji: str, style: str) -> Image.Image:
    """An RGBA drawing; the rotation and size depend on the thing and the style."""
    turn, side = (
        (share(f"turn/{emoji}/{style}") - 0.5) * 0.5,
        90 + 30 * share(f"side/{emoji}/{style}"),
    )
    colour = STYLES[style][int(share(f"colour/{emoji}/{style}") * 4)]
    image, mask = Image.new("RGBA", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE))
    polygons, pen = outline(THINGS[emoji], turn, side), ImageDraw.Draw(mask)
    for n, polygon in enumerate(polygons):
        pen.polygon(polygon, fill=0 if n and THINGS[emoji] == "ring" else 255)
    pixels = np.zeros((SIZE, SIZE, 3)) + colour
    if style == "3D render":
        pixels *= np.linspace(1.15, 0.6, SIZE)[:, None, None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA")
    image.putalpha(mask)
    if style == "Twemoji":
        for polygon in polygons:
            ImageDraw.Draw(image).line([*polygon, polygon[0]], fill=(41, 47, 51, 255), width=7)
    return image


def sample(emoji: str, style: str) -> Sample:
    buffer = io.BytesIO()
    draw_thing(emoji, style).save(buffer, "PNG")
    name = THINGS[emoji]
    about = {
        "emoji": emoji,
        "name": name,
        "group": "Objects",
        "style": style,
        "author": "the tests",
        "licence": "MIT",
        "source": "drawn",
    }
    return Sample(
        f"{style}-{name}".replace(" ", "-"),
        buffer.getvalue(),
        "png",
        tuple(emoji_captions(name, [], style)),
        about,
    )


def write_corpus(folder: Path) -> Path:
    """Write the splits train/, held_out/ and held_out_pairs/."""
    every = [(emoji, style) for emoji in THINGS for style in STYLES]
    splits = {
        "train": [pair for pair in every if pair not in PAIRS and pair[0] not in UNSEEN],
        "held_out": [pair for pair in every if pair[0] in UNSEEN],
        "held_out_pairs": sorted(PAIRS),
    }
    for split, pairs in splits.items():
        write_shards(folder / split, [sample(*pair) for pair in pairs])
    return folder
