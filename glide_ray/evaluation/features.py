"""Images and words as a CLIP sees them: the features that content is judged by (app. F.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import storage
from ..critic import load_clip
from ..data.images import three_crops, to_tensor
from ..models.weights import WeightsError

AT_ONCE = 64            # crops in one call of the network
CLIP_FILES = (".safetensors", ".json", ".txt")      # of a public CLIP's folder: weights, settings, vocabulary


class ClipFeatures:
    """A CLIP as a function of images and of words. `path`: noised CLIP's weights file, or a public CLIP's folder, local or s3://.

    Raises WeightsError, StorageError.
    """

    def __init__(self, path: str | Path, device: torch.device | str | None = None):
        self._critic = load_clip(fetch_clip(path), device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.width = self._critic.embedding

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """RGB images of any size -> (N, E) float32: the mean over three crops along the longer side, of vectors of length 1."""
        crops = [three_crops(picture, self._critic.image_size) for picture in pictures]
        flat = [crop for several in crops for crop in several]
        seen = [self._critic.see(to_tensor(np.stack(flat[start:start + AT_ONCE]))).float().cpu().numpy()
                for start in range(0, len(flat), AT_ONCE)]
        ends = np.cumsum([len(several) for several in crops])[:-1]
        return np.stack([part.mean(0) for part in np.split(np.concatenate(seen), ends)]) if crops else np.empty((0, self.width), np.float32)

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """Words or captions -> (N, E) float32, of length 1: a picture that shows them lies near."""
        return self._critic.embed(texts).float().cpu().numpy()


def fetch_clip(path: str | Path) -> Path:
    """A local path for a CLIP: itself, or copies of what lies under s3:// in the cache. Raises WeightsError, StorageError."""
    if not storage.is_remote(path) and not Path(path).exists():
        raise WeightsError(f"There is no weights file {path}; train one with `glide train nano-plain-clip`, or give another CLIP with --clip.")
    if not storage.is_remote(path) or str(path).endswith(".safetensors"):
        return storage.fetch(path) if storage.is_remote(path) else Path(path)
    return storage.fetch_folder(path, CLIP_FILES)
