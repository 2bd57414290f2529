"""Closed-form measurements of a picture: background, foreground, separate parts, colours.

Everything is measured at `SIDE` pixels, slightly smoothed, so that results are the same for
pictures of 64 and of 256 pixels and do not depend on single pixels.
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
FRAME = 2  # width in pixels of the border from which the background colour is read
# Of 255, in any channel: pixels further from the background are foreground.
FOREGROUND_DISTANCE = 28
MIN_PART_SHARE = 0.0025  # share of the picture below which a part is discarded as noise
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of SIDE


@dataclass(frozen=True)
class Regions:
    """A picture divided into background and foreground, S = SIDE.

    `pixels`: (S, S, 3) float32. `background`: its colour (3,). `foreground`: (S, S) bool.
    """

    pixels: np.ndarray
    background: np.ndarray
    foreground: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray) -> Regions:
        """From a square picture, uint8 (H, H, 3)."""
        pixels = _smoothed(resized(picture, SIDE))
        background = _border_colour(pixels)
        is_foreground = np.abs(pixels - background).max(-1) > FOREGROUND_DISTANCE
        return cls(pixels, background, _without_specks(is_foreground))

    @property
    def background_name(self) -> str:
        """The named colour nearest to the background's."""
        return nearest_colour(self.background)

    @property
    def box(self) -> Box:
        """The box of the whole foreground; of the whole picture if it has almost no foreground."""
        return (
            _box(self.foreground) if self.foreground.mean() > MIN_PART_SHARE else (0, 0, SIDE, SIDE)
        )

    def colour_name(self) -> str:
        """The named colour that fits most of the foreground.

        Each pixel is compared with the shades that a colour has in a recoloured picture.
        """
        inside = ndimage.binary_erosion(self.foreground)
        pixels = self.pixels[inside if inside.any() else self.foreground]
        if not len(pixels):
            return self.background_name
        names, distances = _shade_distances(pixels)
        return names[int(np.minimum(distances, MAX_COLOUR_DISTANCE).mean(0).argmin())]


# Cap on a pixel's distance to a colour, so that outliers such as eyes and outlines count little.
MAX_COLOUR_DISTANCE = 60.0


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """A square picture at another size: box filter for shrinking, bicubic for enlarging."""
    if len(picture) == side:
        return picture
    filter_ = Image.Resampling.BOX if len(picture) > side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize((side, side), filter_))


def nearest_colour(rgb: Sequence[float] | np.ndarray) -> str:
    """Name of the corpus's colour that is nearest to an RGB value in 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], rgb))))


def parts(foreground: np.ndarray, least: float = 0.2) -> list[Box]:
    """Boxes of the separate parts of a foreground (S, S), largest first.

    `least`: minimum area of a part, relative to the largest one's.
    """
    labels, count = ndimage.label(foreground, np.ones((3, 3)))
    areas = ndimage.sum_labels(foreground, labels, range(1, count + 1))
    order = [n for n in np.argsort(areas)[::-1] if areas[n] >= least * areas.max()]
    return [_box(foreground & (labels == n + 1)) for n in order]


def crop(
    picture: np.ndarray, box: Box, background: np.ndarray | None = None, margin: float = 0.08
) -> np.ndarray:
    """The square around a box, with a margin, on white.

    uint8 (H, H, 3) -> uint8 (h, h, 3); `box` in pixels of SIDE. `margin`: relative to the box's
    longer side. White fills the area outside the picture and replaces the `background` colour if
    passed.
    """
    scale = len(picture) / SIDE
    left, top, right, bottom = (edge * scale for edge in box)
    side = max(right - left, bottom - top) * (1 + 2 * margin)
    x, y, size = (left + right - side) / 2, (top + bottom - side) / 2, max(round(side), 8)
    out = np.full((size, size, 3), 255, np.uint8)
    x0, y0 = round(x), round(y)
    from_x, from_y = max(x0, 0), max(y0, 0)
    to_x, to_y = min(x0 + size, len(picture)), min(y0 + size, len(picture))
    visible = picture[from_y:to_y, from_x:to_x]
    out[from_y - y0 : to_y - y0, from_x - x0 : to_x - x0] = (
        visible if background is None else on_white(visible, background)
    )
    return out


def on_white(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Replace the background colour (3,) of a picture (H, W, 3) by white, softly at edges."""
    if np.abs(background - 255).max() <= FOREGROUND_DISTANCE:
        return picture
    distance = np.abs(picture.astype(np.float32) - background).max(-1, keepdims=True)
    opacity = np.clip(distance / FOREGROUND_DISTANCE - 0.5, 0, 1)
    return (picture * opacity + 255 * (1 - opacity)).round().astype(np.uint8)


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
    return (areas >= MIN_PART_SHARE * mask.size)[labels]


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shade_distances(pixels: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The C colours' names; each pixel's (N, 3) distance to their nearest shades: (N, C)."""
    names, shades = _shades()
    distances = [
        np.sqrt(((pixels[:, None] - colour_shades[None]) ** 2).sum(-1)).min(1)
        for colour_shades in shades
    ]
    return names, np.stack(distances, 1)


@cache
def _shades() -> tuple[list[str], list[np.ndarray]]:
    """The colours' names; the shades of each in a recoloured picture: (32, 3) float32."""
    greys = np.arange(0, 256, 8, dtype=np.uint8)
    ramp = Image.merge(
        "RGBA", [Image.fromarray(greys[None])] * 3 + [Image.new("L", (len(greys), 1), 255)]
    )
    return list(COLOURS), [
        np.asarray(recolour(ramp, name).convert("RGB"), np.float32)[0] for name in COLOURS
    ]


# -- several objects -------------------------------------------------------------------------------

# Side in pixels at which parts are counted; number of foregrounds, each eroded once more; number of
# largest parts that are recorded.
COUNT_SIDE, EROSIONS, LARGEST = 128, 4, 6


def part_areas(picture: np.ndarray) -> np.ndarray:
    """Features from which objects are counted: areas of the foreground's separate parts.

    Measured on EROSIONS foregrounds, each eroded once more than the one before: the largest parts'
    shares of the area, and how many parts are large.
    A square picture, uint8 -> (EROSIONS * (LARGEST + 2),) float32.
    """
    pixels = resized(picture, COUNT_SIDE).astype(np.float32)
    mask = np.abs(pixels - _border_colour(pixels)).max(-1) > FOREGROUND_DISTANCE
    total_area, areas_found = max(mask.sum(), 1), []
    for _ in range(EROSIONS):
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        areas = np.sort(np.bincount(labels.ravel())[1:])[::-1] / total_area
        largest = np.zeros(LARGEST)
        largest[: min(len(areas), LARGEST)] = areas[:LARGEST]
        areas_found += [*largest, (areas > 0.1).sum() / 4, (areas > 0.03).sum() / 4]
        mask = ndimage.binary_erosion(mask)
    return np.array(areas_found, np.float32)


@dataclass(frozen=True)
class Halves:
    """Two objects, beside each other or one above the other.

    `first`: box of the left or upper object. `second`: box of the right or lower one.
    """

    beside: bool
    first: Box
    second: Box


def halves(foreground: np.ndarray, least: float = 0.12, most: float = 0.5) -> Halves | None:
    """Cut a foreground (S, S) in two, across or down, where the cut crosses least of it.

    None if no cut separates two objects.

    `least`: minimum share of the foreground on either side. `most`: maximum number of
    foreground pixels that the cut crosses, relative to the mean of the lines with foreground.
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
    """The cheapest cut between columns (axis 0) or rows (axis 1): its cost, axis and place.

    Cost: foreground pixels crossed, relative to the mean of the lines with foreground. None if
    every cut leaves too little on one side.
    """
    lines = foreground.sum(axis).astype(float)
    before = lines.cumsum()[:-1] / max(lines.sum(), 1)
    places = np.flatnonzero((before >= least) & (before <= 1 - least))
    if not len(places):
        return None
    costs = np.minimum(lines[places], lines[places + 1]) / lines[lines > 0].mean()
    cheapest = places[costs == costs.min()]
    # The middle of a gap, whose cuts all cost the same.
    return float(costs.min()), axis, int(cheapest[len(cheapest) // 2]) + 1
