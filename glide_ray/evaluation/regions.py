"""What can be measured of a picture in closed form: its background's colour, its foreground and the separate parts of it, and their colours.

Everything is measured at `SIDE` pixels, slightly smoothed, so that it is the same for pictures of 64 and of 256 pixels and does not
depend on single pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data.sprites import COLOURS, recolour

SIDE = 64
FRAME = 2  # pixels at each edge that tell the background's colour
APART = 28  # of 255, in some channel: from here on a pixel is no background
SPECK = 0.0025  # share of the picture below which a part is dirt
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of SIDE


@dataclass(frozen=True)
class Regions:
    """A picture at SIDE pixels as float32 (S, S, 3), its background's colour (3,), and which pixels are no background, (S, S) bool."""

    pixels: np.ndarray
    background: np.ndarray
    foreground: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray) -> Regions:
        """From a square picture, uint8 (H, H, 3)."""
        pixels = _smoothed(resized(picture, SIDE))
        background = _border_colour(pixels)
        apart = np.abs(pixels - background).max(-1) > APART
        return cls(pixels, background, _without_specks(apart))

    @property
    def background_name(self) -> str:
        """The named colour that the background is nearest to."""
        return nearest_colour(self.background)

    @property
    def box(self) -> Box:
        """Around the whole foreground; the whole picture where there is next to none."""
        return _box(self.foreground) if self.foreground.mean() > SPECK else (0, 0, SIDE, SIDE)

    def colour_name(self) -> str:
        """The named colour of most of the foreground, each pixel by the shades that a colour has in a recoloured picture."""
        inside = ndimage.binary_erosion(self.foreground)
        seen = self.pixels[inside if inside.any() else self.foreground]
        if not len(seen):
            return self.background_name
        names, distances = _shade_distances(seen)
        return names[int(np.minimum(distances, FAR).mean(0).argmin())]


FAR = 60.0  # a pixel this far from a colour's shades says no more against it: eyes, outlines


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture at another size: box filter downwards, bicubic upwards."""
    if len(picture) == side:
        return picture
    filter_ = Image.Resampling.BOX if len(picture) > side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((side, side), filter_))


def nearest_colour(rgb: Sequence[float] | np.ndarray) -> str:
    """The name of the corpus's colour that is nearest to RGB values from 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], rgb))))


def parts(foreground: np.ndarray, least: float = 0.2, gap: int = 0) -> list[Box]:
    """Boxes of the separate parts of a foreground (S, S) that have at least `least` of the largest one's area, largest first.

    Parts that are at most `gap` pixels apart count as one.
    """
    joined = ndimage.binary_dilation(foreground, iterations=gap) if gap else foreground
    labels, count = ndimage.label(joined, np.ones((3, 3)))
    areas = ndimage.sum_labels(foreground, labels, range(1, count + 1))
    order = [n for n in np.argsort(areas)[::-1] if areas[n] >= least * areas.max()]
    return [_box(foreground & (labels == n + 1)) for n in order]


def crop(
    picture: np.ndarray, box: Box, background: np.ndarray | None = None, margin: float = 0.08
) -> np.ndarray:
    """The square around a box, with a margin of its side, laid on white where it reaches over the picture's edge or shows background.

    uint8 (H, H, 3) -> uint8 (h, h, 3); `box` in pixels of SIDE.
    """
    scale = len(picture) / SIDE
    left, top, right, bottom = (edge * scale for edge in box)
    side = max(right - left, bottom - top) * (1 + 2 * margin)
    x, y, size = (left + right - side) / 2, (top + bottom - side) / 2, max(round(side), 8)
    out = np.full((size, size, 3), 255, np.uint8)
    x0, y0 = round(x), round(y)
    from_x, from_y = max(x0, 0), max(y0, 0)
    to_x, to_y = min(x0 + size, len(picture)), min(y0 + size, len(picture))
    seen = picture[from_y:to_y, from_x:to_x]
    out[from_y - y0 : to_y - y0, from_x - x0 : to_x - x0] = (
        seen if background is None else on_white(seen, background)
    )
    return out


def on_white(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with its background's colour (3,) replaced by white, softly at the edges."""
    if np.abs(background - 255).max() <= APART:
        return picture
    apart = np.abs(picture.astype(np.float32) - background).max(-1, keepdims=True)
    opaque = np.clip(apart / APART - 0.5, 0, 1)
    return (picture * opaque + 255 * (1 - opaque)).round().astype(np.uint8)


def _smoothed(pixels: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(pixels.astype(np.float32), (0.6, 0.6, 0), truncate=2.0)


def _border_colour(pixels: np.ndarray) -> np.ndarray:
    frame = np.ones(pixels.shape[:2], bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return np.median(pixels[frame], 0)


def _without_specks(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return mask
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return (areas >= SPECK * mask.size)[labels]


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shade_distances(pixels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The colours' names, and each pixel's (N, 3) distance to the nearest shade of each: (N, C)."""
    names, shades = _shades()
    distances = [np.sqrt(((pixels[:, None] - of[None]) ** 2).sum(-1)).min(1) for of in shades]
    return names, np.stack(distances, 1)


@cache
def _shades() -> tuple[list[str], list[np.ndarray]]:
    """The colours' names, and the shades that each has in a recoloured picture: (32, 3) float32."""
    greys = np.arange(0, 256, 8, np.uint8)
    ramp = Image.merge(
        "RGBA", [Image.fromarray(greys[None])] * 3 + [Image.new("L", (len(greys), 1), 255)]
    )
    return list(COLOURS), [
        np.asarray(recolour(ramp, name).convert("RGB"), np.float32)[0] for name in COLOURS
    ]


# -- several objects --------------------------------------------------------------------------------------------------

COUNT_SIDE, EROSIONS, LARGEST = (
    128,
    4,
    6,
)  # pixels at which parts are counted; how often edges are taken off; parts looked at


def part_areas(picture: np.ndarray) -> np.ndarray:
    """What counts are read from: for each of EROSIONS foregrounds, with ever more of its edges taken off, the shares of its largest
    parts and how many are large. A square picture uint8 -> (EROSIONS * (LARGEST + 2),) float32."""
    pixels = resized(picture, COUNT_SIDE).astype(np.float32)
    mask = np.abs(pixels - _border_colour(pixels)).max(-1) > APART
    whole, found = max(mask.sum(), 1), []
    for _ in range(EROSIONS):
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        areas = np.sort(np.bincount(labels.ravel())[1:])[::-1] / whole
        largest = np.zeros(LARGEST)
        largest[: min(len(areas), LARGEST)] = areas[:LARGEST]
        found += [*largest, (areas > 0.1).sum() / 4, (areas > 0.03).sum() / 4]
        mask = ndimage.binary_erosion(mask)
    return np.array(found, np.float32)


@dataclass(frozen=True)
class Halves:
    """Two objects beside or above each other: the boxes of the left or upper and of the right or lower one."""

    beside: bool
    first: Box
    second: Box


def halves(foreground: np.ndarray, least: float = 0.12, most: float = 0.5) -> Halves | None:
    """Cut a foreground (S, S) in two where least of it is cut, across or down; None where nothing is apart.

    `least`: share of the foreground on either side. `most`: of the mean line through the foreground, that a cut may go through.
    """
    cuts = [cut for axis in (0, 1) if (cut := _cut(foreground, axis, least))]
    if not cuts or min(cuts)[0] > most:
        return None
    _, axis, place = min(cuts)
    first, second = foreground.copy(), foreground.copy()
    (first[:, place:] if axis == 0 else first[place:])[...] = False
    (second[:, :place] if axis == 0 else second[:place])[...] = False
    return Halves(axis == 0, _box(first), _box(second))


def _cut(foreground: np.ndarray, axis: int, least: float) -> tuple[float, int, int] | None:
    """The cheapest cut between columns (axis 0) or rows (1): what it goes through beside the mean line, the axis, and its place."""
    lines = foreground.sum(axis).astype(float)
    before = lines.cumsum()[:-1] / max(lines.sum(), 1)
    places = np.flatnonzero((before >= least) & (before <= 1 - least))
    if not len(places):
        return None
    costs = np.minimum(lines[places], lines[places + 1]) / lines[lines > 0].mean()
    cheapest = places[costs == costs.min()]
    return float(costs.min()), axis, int(cheapest[len(cheapest) // 2]) + 1  # of a gap, its middle
