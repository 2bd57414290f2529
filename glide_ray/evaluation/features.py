"""Image features of pretrained networks: CLIP and Inception.

CLIP judges content (app. F.1) and compares captions with pictures; Inception is for FID and IS
(app. A.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from .. import storage
from ..data.images import centre_crop, three_crops, to_tensor
from ..models.clip_scorer import fetch_clip, load_clip
from ..models.weights import WeightsError

CROPS_PER_CALL = 64  # crops in one forward pass
TORCHSCRIPT = (".pt", ".pth", ".ts", ".jit")
POOLED, CLASSES = 2048, 1008  # Inception's pooled features; classes of its 2015 training


class Network(Protocol):
    width: int

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any size -> (N, width) float32."""


class ClipFeatures:
    """CLIP features of images and texts.

    `path`: weights file of a noised CLIP, or folder of a public CLIP, local or s3://.

    Raises WeightsError, StorageError.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self._critic = load_clip(
            fetch_clip(path), device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.width = self._critic.embedding

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any size -> (N, E) float32.

        Mean of the unit-length embeddings of three crops along the longer side.
        """
        crops = [three_crops(picture, self._critic.image_size) for picture in pictures]
        flat = [crop for several in crops for crop in several]
        features = [
            self._critic.embed_images(to_tensor(np.stack(flat[start : start + CROPS_PER_CALL])))
            .float()
            .cpu()
            .numpy()
            for start in range(0, len(flat), CROPS_PER_CALL)
        ]
        ends = np.cumsum([len(several) for several in crops])[:-1]
        return (
            np.stack([part.mean(0) for part in np.split(np.concatenate(features), ends)])
            if crops
            else np.empty((0, self.width), np.float32)
        )

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Words or captions -> (N, E) float32, unit length.

        A picture that shows a text has features close to the text's.
        """
        return self._critic.embed(texts).float().cpu().numpy()


class InceptionFeatures:
    """The Inception network of FID, from NVIDIA's TorchScript file `inception-2015-12-05.pt`.

    The network in the file takes uint8 images (B, 3, H, W) and resizes them itself, as the original
    FID did. It returns pooled features with `return_features=True`, else class probabilities; with
    `no_output_bias=True` these omit the last layer's bias, as in the original IS.

    Raises WeightsError, StorageError.
    """

    width = POOLED + CLASSES

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        local = storage.fetch(path)
        try:
            # A TorchScript program computes with tensors only: it cannot run Python.
            self._network = torch.jit.load(str(local), map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{path} is not a TorchScript file ({str(error).strip().splitlines()[0][:160]}); "
                f"give the published inception-2015-12-05.pt with --inception."
            ) from None

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Square RGB images -> (N, 2048 + 1008) float32: pooled features, class probabilities."""
        rows = np.empty((len(pictures), self.width), np.float32)
        for size in {picture.size for picture in pictures}:
            alike = [n for n, picture in enumerate(pictures) if picture.size == size]
            for start in range(0, len(alike), CROPS_PER_CALL):
                some = alike[start : start + CROPS_PER_CALL]
                rows[some] = self._see(np.stack([np.asarray(pictures[n]) for n in some]))
        return rows

    def _see(self, squares: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().to(self.device)
        pooled, classes = (
            self._network(images, return_features=True),
            self._network(images, no_output_bias=True),
        )
        if pooled.shape[1:] != (POOLED,) or classes.shape[1:] != (CLASSES,):
            raise WeightsError(
                f"The Inception network gives features of {tuple(pooled.shape[1:])} and classes "
                f"of {tuple(classes.shape[1:])}, not ({POOLED},) and ({CLASSES},); give the "
                f"published inception-2015-12-05.pt with --inception."
            )
        return torch.cat([pooled, classes], 1).float().cpu().numpy()


class Squares:
    """A network applied to centred squares of images, at most `size` pixels on a side.

    Real images are then cropped like the generated ones (app. A.2).
    """

    def __init__(self, network: Network, size: int):
        self._network, self._size, self.width = network, size, network.width

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        return self._network.images(
            [
                Image.fromarray(centre_crop(picture, min(self._size, *picture.size)))
                for picture in pictures
            ]
        )


def load_network(path: str | Path, size: int) -> Network:
    """The network that evaluation uses for images of `size` pixels.

    Inception from a TorchScript file, else a CLIP. Raises WeightsError, StorageError.
    """
    return Squares(
        InceptionFeatures(path) if str(path).endswith(TORCHSCRIPT) else ClipFeatures(path), size
    )


def fetch_network(path: str | Path) -> Path:
    """Local path of a network for `load_network`. Raises WeightsError, StorageError."""
    if not str(path).endswith(TORCHSCRIPT):
        return fetch_clip(path)
    if not storage.exists(path):
        raise WeightsError(
            f"There is no Inception network {path}; download NVIDIA's inception-2015-12-05.pt and "
            f"give it with --inception, or leave that out."
        )
    return storage.fetch(path)
