"""Nearest training images by CLIP features.

For near-copies in a reference, and for training images that a model may have memorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from ..data.duplicates import find_duplicates, fingerprint


@dataclass(frozen=True)
class Nearest:
    """The nearest original of each of N images: its row and its cosine distance.

    Distance 0: same direction; 1: no similarity.
    """

    rows: np.ndarray
    distances: np.ndarray


def nearest(features: np.ndarray, originals: np.ndarray) -> Nearest:
    """Exact nearest neighbours of CLIP features (N, E) among originals (M, E).

    Features may have any length; distances are cosine distances.
    """
    features, originals = (
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in (features, originals)
    )
    lengths, rows = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(originals).kneighbors(features)
    )
    # Cosine distance of unit vectors: half the squared Euclidean distance.
    return Nearest(rows[:, 0], lengths[:, 0].astype(np.float64) ** 2 / 2)


def nearest_with_caption(
    features: np.ndarray,
    captions: Sequence[str],
    originals: np.ndarray,
    original_captions: Sequence[str],
) -> Nearest:
    """For each image, the nearest original with exactly the same caption.

    Row -1 and distance NaN where no original has that caption.
    """
    rows_of: dict[str, list[int]] = {}
    for row, caption in enumerate(original_captions):
        rows_of.setdefault(caption, []).append(row)
    rows, distances = np.full(len(captions), -1), np.full(len(captions), np.nan)
    for n, caption in enumerate(captions):
        if candidates := rows_of.get(caption):
            found = nearest(features[n : n + 1], originals[candidates])
            rows[n], distances[n] = candidates[int(found.rows[0])], found.distances[0]
    return Nearest(rows, distances)


def same_picture(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB images are one picture, possibly resized or recompressed.

    Compared by pixels, not by CLIP features.
    """
    fingerprints = np.stack(
        [np.frombuffer(fingerprint(image), np.uint8) for image in (first, second)]
    )
    return bool((find_duplicates(fingerprints, np.array([1, 1])) >= 0).any())
