"""Images as networks see them: a CLIP, by which content is judged (app. F.1) and captions are compared with pictures, and Inception (app. A.2)."""

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

CROPS_PER_CALL = 64  # crops in one call of the network
TORCHSCRIPT = (".pt", ".pth", ".ts", ".jit")
POOLED, CLASSES = 2048, 1008  # Inception's features, and the classes of its 2015 training


class Network(Protocol):
    width: int

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any size -> (N, width) float32."""


class ClipFeatures:
    """A CLIP as a function of images and of words. `path`: noised CLIP's weights file, or a public CLIP's folder, local or s3://.

    Raises WeightsError, StorageError.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self._critic = load_clip(
            fetch_clip(path), device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.width = self._critic.embedding

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any size -> (N, E) float32: the mean over three crops along the longer side, of vectors of length 1."""
        crops = [three_crops(picture, self._critic.image_size) for picture in pictures]
        flat = [crop for several in crops for crop in several]
        seen = [
            self._critic.embed_images(to_tensor(np.stack(flat[start : start + CROPS_PER_CALL])))
            .float()
            .cpu()
            .numpy()
            for start in range(0, len(flat), CROPS_PER_CALL)
        ]
        ends = np.cumsum([len(several) for several in crops])[:-1]
        return (
            np.stack([part.mean(0) for part in np.split(np.concatenate(seen), ends)])
            if crops
            else np.empty((0, self.width), np.float32)
        )

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Words or captions -> (N, E) float32, of length 1: a picture that shows them lies near."""
        return self._critic.embed(texts).float().cpu().numpy()


class InceptionFeatures:
    """The Inception network of FID as the TorchScript file that NVIDIA publishes, `inception-2015-12-05.pt`: one that is given uint8 images
    (B, 3, H, W), resizes them itself as the first FID did, and returns pooled features with `return_features=True`, else the classes'
    probabilities, without the last layer's bias if `no_output_bias=True`, as the first IS had them.

    Raises WeightsError, StorageError.
    """

    width = POOLED + CLASSES

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        local = storage.fetch(path)
        try:
            self._network = torch.jit.load(
                str(local), map_location=self.device
            ).eval()  # a program of tensors: it cannot run Python
        except (RuntimeError, ValueError) as error:
            raise WeightsError(
                f"{path} is not a TorchScript file ({str(error).strip().splitlines()[0][:160]}); give the published "
                f"inception-2015-12-05.pt with --inception."
            ) from None

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Square RGB images -> (N, 2048 + 1008) float32: pooled features, then the classes' probabilities."""
        rows = np.empty((len(pictures), self.width), np.float32)
        for size in {picture.size for picture in pictures}:
            alike = [n for n, picture in enumerate(pictures) if picture.size == size]
            for start in range(0, len(alike), CROPS_PER_CALL):
                some = alike[start : start + CROPS_PER_CALL]
                rows[some] = self._see(np.stack([np.asarray(pictures[n]) for n in some]))
        return rows

    def _see(self, squares: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().to(self.device)
        pooled, classes = (
            self._network(given, return_features=True),
            self._network(given, no_output_bias=True),
        )
        if pooled.shape[1:] != (POOLED,) or classes.shape[1:] != (CLASSES,):
            raise WeightsError(
                f"The Inception network gives features of {tuple(pooled.shape[1:])} and classes of {tuple(classes.shape[1:])}, not "
                f"({POOLED},) and ({CLASSES},); give the published inception-2015-12-05.pt with --inception."
            )
        return torch.cat([pooled, classes], 1).float().cpu().numpy()


class Squares:
    """A network that is shown images' centred squares only, at most `size` pixels on a side: real ones as the generated ones are (app. A.2)."""

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
    """What evaluation looks at images of `size` pixels with: Inception from a TorchScript file, else a CLIP. Raises WeightsError, StorageError."""
    return Squares(
        InceptionFeatures(path) if str(path).endswith(TORCHSCRIPT) else ClipFeatures(path), size
    )


def fetch_network(path: str | Path) -> Path:
    """A local path for what `load_network` loads. Raises WeightsError, StorageError."""
    if not str(path).endswith(TORCHSCRIPT):
        return fetch_clip(path)
    if not storage.exists(path):
        raise WeightsError(
            f"There is no Inception network {path}; download NVIDIA's inception-2015-12-05.pt and give it with --inception, or leave "
            f"that out."
        )
    return storage.fetch(path)
