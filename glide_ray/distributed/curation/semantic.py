"""Semantic duplicates of `glide clean`: SemDeDup (Abbas et al. 2023) on files and tasks.

The features are clustered by k-means, and images are compared within their cluster. Of the images
of a cluster, those least similar to the centroid come first, and one is dropped if its cosine
similarity to an earlier one exceeds the limit, whether or not the earlier one is kept, as in the
authors' program. A task holds the features of a group of parts, or blocks of those of a cluster.

1. `fit_clusters`: the centroids, from a sample.
2. `_assign`: the rows of a group of parts, in buckets of clusters.
3. `_compare`: in a bucket, the rows to drop and the rows that stay in their place.
4. `_gather`: the same by group of parts.
"""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np
import pyarrow

from ...data.filters import SEMANTIC_DUPLICATE
from .clusters import FEATURE_ROWS, FeatureSearch, cluster_count, fit_clusters, nearest, unit
from .features import column_of
from .judge import Judged
from .search import CopiesOfGroup, Search, gather_copies, group_starts, run_once
from .tables import load_each, load_one, save_many, split

CLUSTER_ROWS = 8192  # rows of a cluster on average; the paper has 440 million in 50,000 clusters
BUCKET_ROWS = 1 << 16  # rows of the clusters of a task, on average
BLOCK_ROWS = 4096  # rows compared at once with as many others
ASSIGNED = pyarrow.schema(
    [
        ("part", pyarrow.int32()),
        ("position", pyarrow.int32()),
        ("key", pyarrow.large_string()),
        ("cluster", pyarrow.int32()),
        ("similarity", pyarrow.float32()),
        ("feature", pyarrow.binary()),
    ]
)


def find_semantic_duplicates(
    judged: Judged,
    judged_folder: str,
    features_folder: str,
    folder: str,
    near: Search | None,
    limit: float,
) -> FeatureSearch:
    """Find the semantic duplicates of all parts; `dropped_copies` reads them. Counts them.

    `limit`: cosine similarity above which two images are duplicates. `near`: the near-duplicates,
    which are dropped before. As in `find_near_duplicates`, a run that resumes repeats only
    unfinished tasks.
    """
    rows = int(judged.kept.sum())
    search = FeatureSearch(
        SEMANTIC_DUPLICATE,
        judged_folder,
        folder,
        group_starts(judged.kept, FEATURE_ROWS),
        -(-rows // BUCKET_ROWS) or 1,
        features=features_folder,
        near=near,
    )
    centroids = fit_clusters(search, rows, cluster_count(rows, CLUSTER_ROWS))
    run_once(search, "assign", _assign, range(search.groups), centroids)
    run_once(search, "compare", _compare, range(search.buckets), limit)
    for _, copies in run_once(search, "copies", _gather, range(search.groups)):
        judged.drop_copies(search.reason, *copies)
    return search


def _assign(search: FeatureSearch, group: int, centroids: np.ndarray) -> None:
    save_many(_by_bucket(search, group, centroids), search.path("assign", group))


def _by_bucket(search: FeatureSearch, group: int, centroids: np.ndarray) -> list[pyarrow.Table]:
    pieces = [[ASSIGNED.empty_table()] for _ in range(search.buckets)]
    for part in search.parts(group):
        position, key, features = search.kept(part)
        if len(position):
            cluster, similarity = nearest(features, centroids)
            columns = [np.full(len(position), part, np.int32), position, key, cluster, similarity]
            rows = pyarrow.table([*columns, column_of(features)], schema=ASSIGNED)
            bucket = cluster.astype(np.int64) * search.buckets // len(centroids)
            # part by part: sorting all rows of the group at once would take twice the memory
            for some, piece in zip(pieces, split(rows, bucket, search.buckets), strict=True):
                some.append(piece)
    return [pyarrow.concat_tables(some) for some in pieces]


def _compare(search: FeatureSearch, bucket: int, limit: float) -> None:
    tables = []
    with tempfile.TemporaryFile() as file:  # a cluster may not fit into memory
        for path in search.paths("assign", search.groups):
            table = load_one(path, bucket)
            file.writelines(table["feature"].to_pylist())
            tables.append(table.drop_columns(["feature"]))
        file.flush()
        rows = pyarrow.concat_tables(tables)
        stays = _stays(rows, file, limit)
    kept = rows.select(["part", "position", "key"]).take(stays)
    found = rows.select(["part", "position"])
    for name in kept.column_names:
        found = found.append_column(f"kept_{name}", kept[name])
    found = found.filter(stays != np.arange(len(rows)))
    group = search.group_of(found["part"].to_numpy())
    save_many(split(found, group, search.groups), search.path("found", bucket))


def _stays(rows: pyarrow.Table, file: IO[bytes], limit: float) -> np.ndarray:
    """For each of the rows of some clusters, the row that stays in its place, or itself: (N,).

    `file`: of the features (N, E) float16.
    """
    stays = np.arange(len(rows))
    if not len(rows):
        return stays
    features = np.memmap(file, np.float16, "r").reshape(len(rows), -1)
    of = {name: rows[name].to_numpy() for name in ("cluster", "similarity", "part", "position")}
    order = np.lexsort([of["position"], of["part"], of["similarity"], of["cluster"]])
    ends = np.flatnonzero(np.diff(of["cluster"][order], append=-1)) + 1
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        inside = order[first:last]
        match = most_similar_earlier(features, inside, limit)
        for place in np.flatnonzero(match >= 0).tolist():  # in order: the earlier one is resolved
            stays[inside[place]] = stays[inside[match[place]]]
    return stays


def most_similar_earlier(features: np.ndarray, order: np.ndarray, limit: float) -> np.ndarray:
    """For each place in `order` (N,), the place before it of the most similar feature.

    -1 where the cosine similarity of `features` (M, E) to all earlier ones is at most `limit`,
    which is positive. Blocks of features are read, not all at once.
    """
    match, best = np.full(len(order), -1), np.full(len(order), limit, np.float32)
    for start in range(0, len(order), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        later = unit(features[order[here]])
        for first in range(0, start + 1, BLOCK_ROWS):
            if first < start:
                similar = unit(features[order[first : first + BLOCK_ROWS]]) @ later.T
            else:
                similar = np.triu(later @ later.T, 1)
            place = similar.argmax(0)
            top = similar[place, np.arange(len(later))]
            better = top > best[here]
            match[here][better], best[here][better] = place[better] + first, top[better]
    return match


def _gather(search: FeatureSearch, group: int) -> CopiesOfGroup:
    return gather_copies(search, group, [load_each(search.paths("found", search.buckets), group)])
