"""The training images that others lie nearest to, as a CLIP sees both: near-copies in a reference, and what a model may have learnt by heart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from ..data.duplicates import find_duplicates, fingerprint


@dataclass(frozen=True)
class Nearest:
    """Of each of N images, the row of the nearest original and its cosine distance: 0 for the same direction, 1 for no likeness."""

    rows: np.ndarray
    distances: np.ndarray


def nearest(features: np.ndarray, originals: np.ndarray) -> Nearest:
    """Exact, of CLIP's features (N, E) among originals (M, E), of any length."""
    features, originals = (
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features, originals)
    )
    lengths, rows = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(originals).kneighbors(features)
    )
    return Nearest(rows[:, 0], lengths[:, 0].astype(np.float64) ** 2 / 2)  # of vectors of length 1


def to_own(
    features: np.ndarray, captions: list[str], originals: np.ndarray, original_captions: list[str]
) -> Nearest:
    """Of each image the nearest original that has its very caption; row -1 and no distance (NaN) where there is none."""
    of: dict[str, list[int]] = {}
    for row, caption in enumerate(original_captions):
        of.setdefault(caption, []).append(row)
    rows, distances = np.full(len(captions), -1), np.full(len(captions), np.nan)
    for n, caption in enumerate(captions):
        if candidates := of.get(caption):
            found = nearest(features[n : n + 1], originals[candidates])
            rows[n], distances[n] = candidates[int(found.rows[0])], found.distances[0]
    return Nearest(rows, distances)


def same_picture(one: Image.Image, other: Image.Image) -> bool:
    """Whether two RGB images are one picture, resized or compressed anew: by pixels, not by what CLIP makes of them."""
    prints = np.stack([np.frombuffer(fingerprint(image), np.uint8) for image in (one, other)])
    return bool((find_duplicates(prints, np.array([1, 1])) >= 0).any())
