"""Features of pictures for the judge.

Object and texture features of a pretrained network, and a histogram of exact colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from ..models.efficientnet import EfficientNetLite0, load_efficientnet, normalise
from .regions import Box, Regions, crop, resized

INPUT = 128  # side of the network's input in pixels
IMAGES_PER_CALL = 32  # pictures in one forward pass
SHAPE_STAGES = (4, 5, 6)  # stages whose feature maps, pooled to 2 x 2, describe the object
# Stages whose channel means and deviations describe the style; stages whose covariances do, too.
STYLE_STAGES, PAIRED = (0, 1, 2, 3, 4), (0, 1)
STEPS = 65  # bins per colour channel: fine, because exact colours identify an artist
MAX_FLAT_GRADIENT = 20.0  # of 255: pixels with a smaller gradient are not on an edge
GRADIENT_BINS = 16  # bins of the histogram of gradients
WHITE_DISTANCE = 20  # of 255, in any channel: pixels further from white count as not white


@dataclass(frozen=True)
class View:
    """A square picture uint8 (H, H, 3) and a box of it, in pixels at side `regions.SIDE`."""

    picture: np.ndarray
    regions: Regions
    box: Box

    @classmethod
    def of(cls, picture: np.ndarray) -> View:
        """A view of the whole foreground."""
        regions = Regions.of(picture)
        return cls(picture, regions, regions.box)

    @cached_property
    def cut(self) -> np.ndarray:
        """The network's input: the content of the box on white, (INPUT, INPUT, 3) uint8."""
        return resized(crop(self.picture, self.box, self.regions.background), INPUT)


@dataclass(frozen=True)
class JudgeFeatures:
    """Features of N pictures.

    `shapes` (N, 2496): of the object. `textures` (N, 997) and `colours` (N, STEPS^3): of the style.
    """

    shapes: np.ndarray
    textures: np.ndarray
    colours: sparse.csr_matrix

    def __len__(self) -> int:
        return len(self.shapes)

    @classmethod
    def concatenate(cls, parts: Sequence[JudgeFeatures]) -> JudgeFeatures:
        return cls(
            np.concatenate([part.shapes for part in parts]),
            np.concatenate([part.textures for part in parts]),
            sparse.vstack([part.colours for part in parts]).tocsr(),
        )


class FeatureExtractor:
    """Feature extractor. `dtype`: of the pretrained network."""

    def __init__(
        self, network: EfficientNetLite0 | None = None, dtype: torch.dtype = torch.float32
    ):
        self._network, self._dtype = (network or load_efficientnet()).to(dtype), dtype

    def shapes(self, views: Sequence[View]) -> np.ndarray:
        """Object features alone: (N, 2496) float32."""
        return np.concatenate([_shape(maps).numpy() for _, maps in self._maps(views)])

    def of(self, views: Sequence[View]) -> JudgeFeatures:
        """All features."""
        shapes_and_textures = [
            (_shape(maps).numpy(), _texture(squares, maps).numpy())
            for squares, maps in self._maps(views)
        ]
        regions = [view.regions for view in views]
        gradients = [_gradients(region.pixels) for region in regions]
        steepness = np.stack(
            [
                _steepness(region, gradient)
                for region, gradient in zip(regions, gradients, strict=True)
            ]
        )
        colours = _colours(
            [
                region.pixels[region.foreground & (gradient < MAX_FLAT_GRADIENT)]
                for region, gradient in zip(regions, gradients, strict=True)
            ]
        )
        return JudgeFeatures(
            np.concatenate([shape for shape, _ in shapes_and_textures]),
            np.concatenate(
                [np.concatenate([texture for _, texture in shapes_and_textures]), steepness], 1
            ),
            colours,
        )

    def _maps(self, views: Sequence[View]):
        """Batches of network input (B, 3, INPUT, INPUT) uint8 and its feature maps in float32."""
        for start in range(0, len(views), IMAGES_PER_CALL):
            squares = torch.from_numpy(
                np.stack([view.cut for view in views[start : start + IMAGES_PER_CALL]])
            ).permute(0, 3, 1, 2)
            with torch.no_grad():
                maps = self._network.maps(
                    normalise(squares).to(self._dtype, memory_format=torch.channels_last)
                )
            yield squares, [map_.float() for map_ in maps]


def _shape(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([F.adaptive_avg_pool2d(maps[n], 2).flatten(1) for n in SHAPE_STAGES], 1)


def _texture(squares: Tensor, maps: Sequence[Tensor]) -> Tensor:
    moments = [part for n in STYLE_STAGES for part in (maps[n].mean((2, 3)), maps[n].std((2, 3)))]
    not_white = ((255 - squares.int()).amax(1, keepdim=True) > WHITE_DISTANCE).float()
    return torch.cat([*moments, *(_covariances(maps[n], not_white) for n in PAIRED)], 1)


def _covariances(map_: Tensor, not_white: Tensor) -> Tensor:
    """Signed square roots of channel covariances over the pixels that are not white.

    (B, C, h, w) -> (B, C (C + 1) / 2).
    """
    mask = (F.adaptive_avg_pool2d(not_white, map_.shape[-1]) > 0.2).float()
    weight = mask / mask.sum((2, 3), keepdim=True).clamp_min(1)
    mean = (map_ * weight).sum((2, 3))
    covariances = (
        torch.einsum("bchw,bdhw->bcd", map_ * weight, map_) - mean[:, :, None] * mean[:, None]
    )
    rows, columns = torch.triu_indices(covariances.shape[1], covariances.shape[1])
    covariances = covariances[:, rows, columns]
    return covariances.sign() * covariances.abs().sqrt()


def _gradients(pixels: np.ndarray) -> np.ndarray:
    """Largest difference of each pixel to a neighbour, in any channel: (S, S, 3) -> (S, S)."""
    largest = np.zeros(pixels.shape[:2], np.float32)
    down, across = (np.abs(np.diff(pixels, axis=axis)).max(-1) for axis in (0, 1))
    for part, step in (
        (largest[1:], down),
        (largest[:-1], down),
        (largest[:, 1:], across),
        (largest[:, :-1], across),
    ):
        np.maximum(part, step, out=part)
    return largest


def _steepness(regions: Regions, gradients: np.ndarray) -> np.ndarray:
    """Square roots of the histogram of foreground gradients, then the foreground's area share.

    (CHANGES + 1,) float32.
    """
    foreground_gradients = np.log2(gradients[regions.foreground] + 1)
    histogram = np.histogram(foreground_gradients, GRADIENT_BINS, (0, 8))[0] / max(
        len(foreground_gradients), 1
    )
    return np.append(np.sqrt(histogram), regions.foreground.mean()).astype(np.float32)


def _colours(pixels: Sequence[np.ndarray]) -> sparse.csr_matrix:
    """Square roots of colour histograms: (N, STEPS^3).

    `pixels`: (n, 3) of each picture, in 0 to 255; a pixel is shared among the 8 nearest bins.
    """
    counts = [len(picture_pixels) for picture_pixels in pixels]
    row = np.repeat(np.arange(len(pixels)), counts)
    place = np.concatenate([*pixels, np.empty((0, 3), np.float32)]).clip(0, 255) / 255 * (STEPS - 1)
    low = np.minimum(place.astype(int), STEPS - 2)
    part, strides = place - low, np.array([STEPS**2, STEPS, 1])
    corners = [
        (np.where(np.array(corner) == 1, part, 1 - part).prod(1), (low + corner) @ strides)
        for corner in np.ndindex(2, 2, 2)
    ]
    histograms = sparse.csr_matrix(
        (
            np.concatenate([weight for weight, _ in corners]),
            (np.tile(row, 8), np.concatenate([code for _, code in corners])),
        ),
        shape=(len(pixels), STEPS**3),
        dtype=np.float32,
    )
    histograms = sparse.diags(1 / np.maximum(counts, 1)) @ histograms
    return histograms.sqrt().astype(np.float32).tocsr()
