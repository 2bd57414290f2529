"""A stage of `glide clean` after judging: choose rows by CLIP score and by reference images.

It follows data/baselines.py. The judged files of the chosen rows are new ones, which the later
stages read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import ray

from ...config.data import CleanConfig
from ...data.baselines import CLUSTERED, needs_scores
from ...data.filters import Candidate, first_broken, image_rules
from ...data.sources import Part, read_part
from ...errors import ConfigError, UserError
from ...progress import bar
from .clusters import FEATURE_ROWS, FeatureSearch, cluster_count, fit_clusters, nearest
from .features import (
    PartFeatures,
    limit_threads,
    load_features,
    reference_parts,
    run_with_network,
    save_features,
)
from .judge import (
    RESULT,
    Judged,
    PartResult,
    count_row,
    died,
    judged_file,
    read_result,
    save_judged,
    state_of,
    write_judged,
)
from .search import group_starts, run_once
from .tables import load
from .tasks import run_each

# rows of a cluster on average: DataComp has 100,000 clusters for its smallest pool of 12.8 million
CLUSTER_ROWS = 128
BINS = 1 << 16
UNLIKE = "in a cluster without a reference image"


@dataclass(frozen=True)
class Choice:
    """What all tasks of choosing share."""

    out: str  # folder of the judged files that are written
    share: float
    threshold: float | None  # lowest CLIP score that is kept; None: any
    wanted: np.ndarray | None  # clusters that are kept; None: any


def choose_rows(
    parts: Sequence[Part], judged: Judged, work: str, folder: str, config: CleanConfig
) -> tuple[Judged, str]:
    """Drop the rows that the baseline drops by score or by cluster.

    `work`: folder of the judged files and features; `folder`: of this stage. Returns the counts and
    the folder of the new judged files. Raises ConfigError if no reference image can be read.
    """
    starts = group_starts(judged.read, FEATURE_ROWS)
    search = FeatureSearch("", work, folder, starts, 0, features=work)
    threshold = wanted = centroids = None
    if needs_scores(config):
        threshold = score_threshold(search, config.clip_share)
    if config.baseline in CLUSTERED and judged.kept.any():
        reference = f"{work}/reference"
        count = _embed_references(reference_parts(config), reference, config)
        rows = int(judged.kept.sum())
        centroids = fit_clusters(search, rows, cluster_count(rows, CLUSTER_ROWS))
        found = run_each(_clusters_of, ((reference, n, centroids) for n in range(count)))
        wanted = np.array(sorted({cluster for some in found for cluster in some}), np.int32)
    choice = ray.put(Choice(f"{folder}/chosen", config.clip_share, threshold, wanted))
    chosen = Judged(len(parts))
    arguments = ((number, search, choice, centroids) for number in range(len(parts)))
    with bar("choose", "part", len(parts)) as progress:
        for result in run_each(_choose_part, arguments):
            chosen.add(result)
            progress.update(1)
    return chosen, f"{folder}/chosen"


def _choose_part(
    number: int, search: FeatureSearch, choice: Choice, centroids: np.ndarray | None
) -> PartResult:
    if (earlier := read_result(choice.out, number)) is not None:
        return earlier
    table = load(judged_file(search.judged, number))
    result = PartResult(**json.loads(table.schema.metadata[RESULT]))
    result = replace(result, read=0, kept=0, dropped={}, examples={})
    reason = np.array(table["reason"].to_pylist(), object)
    if choice.threshold is not None:
        score = table["score"].to_numpy()
        low = (reason == "") & ~(score >= np.float32(choice.threshold))
        reason[low] = f"with a CLIP score not among the highest {choice.share:.0%}"
    if choice.wanted is not None and centroids is not None:
        position, _, features = search.kept(number)
        unlike = position[~np.isin(nearest(features, centroids)[0], choice.wanted)]
        reason[unlike[reason[unlike] == ""]] = UNLIKE
    for key, why in zip(table["key"].to_pylist(), reason.tolist(), strict=True):
        count_row(result, key, why)
    kept = pyarrow.array(reason == "")
    columns = {name: table[name] for name in table.column_names}
    for name in ("hash", "sketch", "digest", "fingerprint"):
        columns[name] = pyarrow.compute.if_else(kept, table[name], None)
    columns["reason"] = pyarrow.array(reason.tolist(), table["reason"].type)
    save_judged(pyarrow.table(columns, table.schema), result, choice.out)
    return result


# -- CLIP scores -----------------------------------------------------------------------------------


def score_threshold(search: FeatureSearch, share: float) -> float:
    """The lowest of the highest scores that make up this share of all rows with a score.

    Exact: a histogram of the upper half of the numbers' bits, then one of the lower half.
    """
    counts = _histogram(search, "upper", -1)
    wanted = max(1, round(share * int(counts.sum())))
    upper, above = _bin_of(counts, wanted)
    lower, _ = _bin_of(_histogram(search, "lower", upper), wanted - above)
    return float(_float_of(upper * BINS + lower))


def _histogram(search: FeatureSearch, kind: str, upper: int) -> np.ndarray:
    counts = np.zeros(BINS, np.int64)
    for _, (bins, numbers) in run_once(search, kind, _count, range(search.groups), upper):
        counts[np.array(bins, np.int64)] += np.array(numbers, np.int64)
    return counts


def _count(search: FeatureSearch, group: int, upper: int) -> tuple[list[int], list[int]]:
    """Bins with their numbers of rows: by the upper bits (`upper` -1), or by the lower bits."""
    scores = [
        load(judged_file(search.judged, part), ["score"])["score"].drop_null().to_numpy()
        for part in search.parts(group)
    ]
    code = _code_of(np.concatenate(scores))
    chosen = code // BINS if upper < 0 else code[code // BINS == upper] % BINS
    bins, numbers = np.unique(chosen, return_counts=True)
    return bins.tolist(), numbers.tolist()


def _bin_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin of the row of rank `wanted`, from 1 for the highest, and the rows in higher bins."""
    above = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(above, wanted)), BINS - 1)
    return BINS - 1 - place, int(above[place - 1]) if place else 0


def _code_of(scores: np.ndarray) -> np.ndarray:
    """uint32 in the order of float32 numbers (N,)."""
    bits = scores.astype(np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _float_of(code: int) -> np.float32:
    bits = code & 0x7FFFFFFF if code >> 31 else ~code & 0xFFFFFFFF
    return np.array([bits], np.uint32).view(np.float32)[0]


# -- reference images ------------------------------------------------------------------------------


def _embed_references(parts: Sequence[Part], folder: str, config: CleanConfig) -> int:
    """Embed all reference images, which need no captions. Returns their number of parts."""
    arguments = ((number, part, folder) for number, part in enumerate(parts))
    counts = Judged(len(parts))
    with bar("embed the reference", "part", len(parts)) as progress:
        for result in run_with_network(ReferenceJudge, (config.clip,), parts, arguments, died):
            counts.add(result)
            progress.update(1)
    if not counts.kept.sum():
        why = f" ({counts.report()})"
        raise ConfigError(f"--set reference: no image of {config.reference} can be read{why}.")
    return len(parts)


class ReferenceJudge:
    """Embeds the readable images of parts, as an actor or in this process."""

    def __init__(self, clip: str | None):
        limit_threads()
        from ...evaluation.picture_features import PictureFeatures

        self._network = PictureFeatures(clip)
        self._rules = image_rules(CleanConfig(min_size=1, max_aspect=None))

    def judge(self, number: int, part: Part, folder: str) -> PartResult:
        state = state_of(part)
        earlier = read_result(folder, number)
        if earlier is not None and earlier.state == state and state and not earlier.faults:
            return earlier
        result, features = PartResult(number, state), PartFeatures(self._network, False)
        rows: list[dict[str, Any]] = []
        try:
            for position, sample in enumerate(read_part(part)):
                candidate = Candidate(sample)
                row = {"key": sample.key, "reason": first_broken(candidate, self._rules) or ""}
                rows.append(row)
                if not row["reason"]:
                    features.add(position, row, candidate.picture, ())
        except UserError as error:
            result.faults.append(str(error))
        save_features(folder, number, *features.finish())
        write_judged(rows, result, folder)
        return result


def _clusters_of(folder: str, number: int, centroids: np.ndarray) -> list[int]:
    _, features = load_features(folder, number)
    return np.unique(nearest(features, centroids)[0]).tolist() if len(features) else []
