"""Time and memory of the search for semantic duplicates of `glide clean`, on drawn features."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np

from ..distributed.cluster import connect
from ..distributed.curation.clusters import MAX_CLUSTERS, nearest, unit
from ..distributed.curation.features import save_features
from ..distributed.curation.judge import Judged, PartResult, write_judged
from ..distributed.curation.search import dropped_copies
from ..distributed.curation.semantic import (
    BLOCK_ROWS,
    find_semantic_duplicates,
    most_similar_earlier,
)
from ..distributed.curation.tasks import run_each
from ..models.efficientnet import HEAD
from .clean import Watch

ROWS, PART_ROWS, COPIES = 10**5, 10_000, 300  # drawn features, of a part, and planted in each part
CENTRES, SPREAD = 1000, 1.0  # of the drawn features; neighbours have a similarity of 0.5
NOISE, LIMIT = 0.1, 0.95  # copies have a similarity of 0.995


def bench_semantic() -> dict[str, Any]:
    """Seconds and peak memory of the search among ROWS drawn features of EfficientNet's width.

    The memory is that of all processes, Ray's included; `driver_mib` is the growth of this one.
    `copies_found` is the share of planted pairs that lose one of the two. `slopes` gives the rest.
    """
    connect(2)
    with tempfile.TemporaryDirectory() as folder:
        judged = Judged(ROWS // PART_ROWS)
        for part in run_each(_draw_part, ((n, folder) for n in range(ROWS // PART_ROWS))):
            judged.add(part)
        began = time.monotonic()
        with Watch() as watch:
            search = find_semantic_duplicates(judged, folder, folder, f"{folder}/x", None, LIMIT)
        seconds = time.monotonic() - began
        found = false = 0
        for number in range(ROWS // PART_ROWS):
            places = dropped_copies(search, number)["position"].to_numpy() % (PART_ROWS - COPIES)
            found += int((places < COPIES).sum())
            false += int((places >= COPIES).sum())
    return {
        "rows": ROWS,
        "width": HEAD,
        "seconds": round(seconds, 1),
        "peak_mib": round(watch.total / 2**20),
        "driver_mib": round(watch.driver / 2**20),
        "copies_found": round(found / (COPIES * ROWS // PART_ROWS), 5),
        "false_alarms": false,
        **slopes(),
    }


def slopes() -> dict[str, float]:
    """Processor time per row and per pair of a cluster at the size of 10^9 rows, in one process.

    At that size there are MAX_CLUSTERS clusters, and a row is assigned to one of them and then
    compared with half of its cluster. Processor time, because other processes may run.
    """
    draws = np.random.default_rng(0)
    centroids = unit(draws.standard_normal((MAX_CLUSTERS, HEAD), np.float32))
    features = draws.standard_normal((2 * BLOCK_ROWS, HEAD), np.float32).astype(np.float16)
    began = time.process_time()
    nearest(features[:BLOCK_ROWS], centroids)
    assigned = time.process_time()
    most_similar_earlier(features, np.arange(len(features)), LIMIT)
    compared = time.process_time()
    pairs = len(features) * (len(features) - 1) / 2
    return {
        "assign_ms_per_row": round((assigned - began) / BLOCK_ROWS * 1e3, 3),
        "compare_ns_per_pair": round((compared - assigned) / pairs * 1e9, 1),
    }


def _draw_part(number: int, folder: str) -> PartResult:
    """Features around the centres; the last COPIES rows are noisy copies of the first ones."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, HEAD), np.float32)
    draws = np.random.default_rng([1, number])
    features = centres[draws.integers(0, CENTRES, PART_ROWS)]
    features += SPREAD * draws.standard_normal(features.shape, np.float32)
    noise = draws.standard_normal((COPIES, HEAD), np.float32)
    features[-COPIES:] = features[:COPIES] + NOISE * np.sqrt(1 + SPREAD**2) * noise
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    save_features(folder, number, np.arange(PART_ROWS), features)
    rows = [{"key": f"{number}-{n}", "reason": "", "caption": ""} for n in range(PART_ROWS)]
    result = PartResult(number, "drawn")
    write_judged(rows, result, folder)
    return result
