"""Clusters of features by k-means, from a sample that is read in batches.

Centroids have length 1, and a feature belongs to the centroid with the largest cosine similarity.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute
import ray

from ... import storage
from .features import column_of, load_features, matrix_of
from .judge import judged_file
from .search import Search, dropped_copies, run_once
from .tables import load, load_each, save_many

# rows of a group of parts whose features a task holds: 168 MB at width 1280, and copies of them
FEATURE_ROWS = 1 << 16
MAX_CLUSTERS = 1 << 15  # that one process fits; 168 MB of centroids at width 1280
SAMPLED = 256  # rows of the sample per cluster, as in Faiss
BATCH_ROWS = 4  # rows per cluster of a batch of the sample, at least
MIN_BATCH = 1 << 14  # rows of a batch of the sample, at least
PASSES = 10  # over the sample
COMPARED = 1 << 24  # numbers in a block of similarities to the centroids


@dataclass(frozen=True)
class FeatureSearch(Search):
    """A search by features. `near`: the near-duplicates, which are left out."""

    features: str = ""  # folder of the features
    near: Search | None = None

    def kept(self, part: int) -> tuple[np.ndarray, pyarrow.ChunkedArray, np.ndarray]:
        """Positions (N,), keys and features (N, E) float16 of the rows of a part that are kept."""
        position, features = load_features(self.features, part)
        judged = load(judged_file(self.judged, part), ["key", "reason"])
        kept = pyarrow.compute.equal(judged["reason"], "").to_numpy().copy()
        if self.near is not None:
            kept[dropped_copies(self.near, part)["position"].to_numpy()] = False
        inside = kept[position]
        return position[inside], judged["key"].take(position[inside]), features[inside]


def cluster_count(rows: int, rows_per_cluster: int) -> int:
    return max(1, min(MAX_CLUSTERS, -(-rows // rows_per_cluster)))


def fit_clusters(search: FeatureSearch, rows: int, clusters: int) -> ray.ObjectRef:
    """Fit the clusters of `rows` kept rows. Returns the centroids (K, E) in the object store."""
    rate = min(1.0, SAMPLED * clusters / max(1, rows))
    batches = max(1, int(rate * rows) // max(MIN_BATCH, BATCH_ROWS * clusters))
    run_once(search, "sample", _sample, range(search.groups), rate, batches)
    run_once(search, "fit", _fit, [0], clusters, batches)
    return ray.remote(_load).remote(search.path("centroids"))


def _sample(search: FeatureSearch, group: int, rate: float, batches: int) -> None:
    draws = np.random.default_rng(group)
    sampled: list[list[pyarrow.Array]] = [[] for _ in range(batches)]
    for part in search.parts(group):
        features = search.kept(part)[2]
        batch = draws.integers(0, batches, len(features))
        batch[draws.random(len(features)) >= rate] = -1
        for number in np.unique(batch[batch >= 0]).tolist():
            sampled[number].append(column_of(features[batch == number]))
    columns = [pyarrow.chunked_array(some, pyarrow.binary()) for some in sampled]
    save_many([pyarrow.table({"feature": one}) for one in columns], search.path("sample", group))


def _fit(search: FeatureSearch, _: int, clusters: int, batches: int) -> None:
    from sklearn.cluster import MiniBatchKMeans  # takes a worker 1 s to import

    model = None
    for batch in [*range(batches)] * PASSES:
        rows = load_each(search.paths("sample", search.groups), batch)
        if len(rows):
            features = unit(matrix_of(rows["feature"]))
            model = model or MiniBatchKMeans(min(clusters, len(features)), random_state=0)
            model.partial_fit(features)
    centroids = np.zeros((1, 1)) if model is None else model.cluster_centers_
    content = io.BytesIO()
    np.save(content, unit(centroids))
    storage.put(content.getvalue(), search.path("centroids"))


def _load(path: str) -> np.ndarray:
    return np.load(io.BytesIO(storage.read(path)), allow_pickle=False)


def unit(features: np.ndarray) -> np.ndarray:
    """Rows (N, E) divided by their lengths, float32."""
    rows = features.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster (N,) of features (N, E), and their cosine similarity (N,) to its centroid."""
    cluster, similarity = np.zeros(len(features), np.int32), np.zeros(len(features), np.float32)
    block = max(1, COMPARED // len(centroids))
    for start in range(0, len(features), block):
        similar = unit(features[start : start + block]) @ centroids.T
        cluster[start : start + block] = similar.argmax(1)
        similarity[start : start + block] = similar.max(1)
    return cluster, similarity
