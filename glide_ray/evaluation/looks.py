"""What the judge sees of a picture: features of a pretrained network, how its colours are spread, and how sharply they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.efficientnet import EfficientNetLite0, load_efficientnet, normalise
from .regions import Box, Regions, crop, resized

INPUT = 128             # pixels of what the network is shown
AT_ONCE = 32            # pictures in one call of the network
SHAPE_STAGES = (4, 5, 6)        # of the network, whose maps in quarters say what is shown
SHAPE_WIDTH = 4 * (112 + 192 + 320)
STYLE_STAGES = (0, 1, 2, 3, 4)  # whose means and deviations say how it is drawn
STEPS = 9               # of each channel in the histogram of colours
FLAT = 20.0             # of 255: smaller changes to the neighbours than this are no edge
CHANGES = 16            # bins of the histogram of changes


@dataclass(frozen=True)
class View:
    """A square picture uint8 (H, H, 3), or what is in a box of it, in pixels of `regions.SIDE`."""

    picture: np.ndarray
    regions: Regions
    box: Box

    @classmethod
    def of(cls, picture: np.ndarray) -> View:
        """Of the whole foreground."""
        regions = Regions.of(picture)
        return cls(picture, regions, regions.box)

    def cut(self) -> np.ndarray:
        """What the network is shown: the box on white, (INPUT, INPUT, 3) uint8."""
        return resized(crop(self.picture, self.box, self.regions.background), INPUT)


class Looks:
    """The features of pictures, from the pretrained network and from their colours. `dtype`: of the network."""

    def __init__(self, network: EfficientNetLite0 | None = None, dtype: torch.dtype = torch.float32):
        self._network, self._dtype = (network or load_efficientnet()).to(dtype), dtype

    def shapes(self, views: Sequence[View]) -> np.ndarray:
        """What is shown: (N, 2496) float32."""
        return self._all(views, self._shape)

    def both(self, views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
        """What is shown (N, 2496), and how it is drawn (N, 2019), float32."""
        seen = self._all(views, lambda maps: torch.cat([self._shape(maps), self._style(maps)], 1))
        colours = np.stack([colour_features(view.regions) for view in views])
        return seen[:, :SHAPE_WIDTH], np.concatenate([seen[:, SHAPE_WIDTH:], colours], 1)

    @torch.no_grad()
    def _all(self, views: Sequence[View], features: Callable[[list[Tensor]], Tensor]) -> np.ndarray:
        found = []
        for start in range(0, len(views), AT_ONCE):
            squares = np.stack([view.cut() for view in views[start:start + AT_ONCE]])
            x = normalise(torch.from_numpy(squares).permute(0, 3, 1, 2)).to(self._dtype, memory_format=torch.channels_last)
            found.append(features([of.float() for of in self._network.maps(x)]).numpy())
        return np.concatenate(found)

    @staticmethod
    def _shape(maps: list[Tensor]) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(maps[n], 2).flatten(1) for n in SHAPE_STAGES], 1)

    @staticmethod
    def _style(maps: list[Tensor]) -> Tensor:
        return torch.cat([part for n in STYLE_STAGES for part in (maps[n].mean((2, 3)), maps[n].std((2, 3)))], 1)


def colour_features(regions: Regions) -> np.ndarray:
    """Roots of histograms over the foreground: of the colours away from edges, of all colours, of the changes to the neighbours.

    (2 * STEPS^3 + CHANGES + 1,) float32; the last is the share of the picture that is foreground.
    """
    mask = regions.foreground
    changes = _changes(regions.pixels)
    flat = mask & (changes < FLAT)
    steep = np.histogram(np.log2(changes[mask] + 1), CHANGES, (0, 8))[0]
    parts = [_histogram(regions.pixels[flat]), _histogram(regions.pixels[mask]), steep / max(mask.sum(), 1)]
    return np.concatenate([*(np.sqrt(part) for part in parts), [mask.mean()]]).astype(np.float32)


def _changes(pixels: np.ndarray) -> np.ndarray:
    """The largest difference of each pixel to a neighbour, in any channel: (S, S)."""
    found = np.zeros(pixels.shape[:2], np.float32)
    for axis in (0, 1):
        step = np.abs(np.diff(pixels, axis=axis)).max(-1)
        for pad in ((0, 1), (1, 0)):
            found = np.maximum(found, np.pad(step, [pad if n == axis else (0, 0) for n in (0, 1)]))
    return found


def _histogram(colours: np.ndarray) -> np.ndarray:
    """Shares of colours (N, 3) from 0 to 255 in a grid of STEPS^3, each spread over the eight corners around it."""
    place = colours.clip(0, 255) / 255 * (STEPS - 1)
    low = np.minimum(place.astype(int), STEPS - 2)
    part, found = place - low, np.zeros(STEPS**3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(np.array(corner) == 1, part, 1 - part).prod(1)
        found += np.bincount((low + corner) @ _strides(), weight, STEPS**3)
    return found / max(len(colours), 1)


@cache
def _strides() -> np.ndarray:
    return np.array([STEPS**2, STEPS, 1])
