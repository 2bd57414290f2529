"""Unit-length features of whole pictures, to compare them with each other and with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.images import centre_crop, to_tensor
from ..models.clip_scorer import fetch_clip, load_clip
from ..models.efficientnet import HEAD, load_efficientnet, normalise
from .judge_features import INPUT

SQUARES_PER_CALL = 64  # squares in one forward pass


class PictureFeatures:
    """Features of the centred square of a picture: of a CLIP, or of EfficientNet-Lite0.

    `clip`: weights file of glide_ray or folder of a public CLIP, local or s3://; None: the
    network of the judge, with ImageNet weights, whose last feature maps are averaged (HEAD,).

    `side`: of the square in pixels; `width`: of a feature. Raises WeightsError, StorageError,
    MissingNetworkError.
    """

    def __init__(self, clip: str | None = None):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if clip is None:
            self._network = load_efficientnet().to(self._device)
            self.side, self.width = INPUT, HEAD
        else:
            self._clip = load_clip(fetch_clip(clip), self._device)
            self.side, self.width = self._clip.image_size, self._clip.embedding
        self._has_clip = clip is not None

    def square(self, picture: Image.Image) -> np.ndarray:
        """The input of the network, uint8 (side, side, 3), from an RGB image of any size."""
        return centre_crop(picture, self.side)

    def of(self, squares: Sequence[np.ndarray]) -> np.ndarray:
        """Features (N, width) float32 of length 1."""
        found = [
            self._of(np.stack(squares[start : start + SQUARES_PER_CALL]))
            for start in range(0, len(squares), SQUARES_PER_CALL)
        ]
        return np.concatenate([np.empty((0, self.width), np.float32), *found])

    @torch.no_grad()
    def _of(self, squares: np.ndarray) -> np.ndarray:
        if self._has_clip:
            features = self._clip.embed_images(to_tensor(squares))
        else:
            pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self._device)
            features = F.normalize(self._network.maps(normalise(pixels))[-1].mean((2, 3)), dim=-1)
        return features.float().cpu().numpy()

    def of_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Features (N, width) float32 of length 1 of captions, by the CLIP."""
        found = [
            self._clip.embed(captions[start : start + SQUARES_PER_CALL]).float().cpu().numpy()
            for start in range(0, len(captions), SQUARES_PER_CALL)
        ]
        return np.concatenate([np.empty((0, self.width), np.float32), *found])
