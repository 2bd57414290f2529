"""Second stage of `glide clean`: the near-duplicates among all rows that were judged and kept.

The result is that of `find_duplicates` in data/duplicates.py, computed by tasks that read and write
files in the folder of the run. No process holds all rows; a task that compares holds 28 bytes for
each of COMPARED_ROWS, and the task that joins pairs some 100 bytes per row that resembles another.

Ray Data's hash shuffle would send a row per image and pair of bands: 6.6 million for 10^5 images
took 28 s and 1.9 GB on two cores without comparing any; all the steps below took 0.9 s.

1. `_partition`: the rows of a group of parts, in buckets by their fingerprint's hash.
2. `_collapse`: in a bucket, the best row of each distinct fingerprint ("best": most pixels, then
   first), and the rows equal to it.
3. `_compare`: pairs of best rows whose hashes agree in some bands, and whose sketches agree.
4. `_connect`: the connected components of these pairs, a few thousand rows to a set.
5. `_fetch`: the fingerprints and keys of these rows, from the judged files.
6. `_resolve`: in a set, which rows stay, by their thumbnails.
7. `_replace_equal`: for the rows of step 2 that equal another, the row that stays for it.
8. `_gather`: by group of parts, the rows to drop and the rows that stay in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow
import ray

from ...data.duplicates import (
    FINGERPRINT_BYTES,
    alike,
    band_masks,
    candidates,
    slice_of,
    stays_of,
)
from ...data.filters import NEAR_DUPLICATE
from .judge import Judged, judged_file
from .search import CopiesOfGroup, Search, gather_copies, group_starts, run_once, span
from .tables import load, load_each, load_one, save, save_many, split

GROUP_ROWS = 1 << 20  # rows of a group of parts, unless a single part has more
BUCKET_ROWS = 1 << 20  # rows of a bucket of fingerprints, on average
SET_ROWS = 1 << 15  # rows of a set of components, unless a single component has more
COMPARED_ROWS = 1 << 26  # rows that one task compares at most, on average
MASK_ROWS = 1 << 22  # rows, times masks, that one task compares at least


def find_near_duplicates(judged: Judged, judged_folder: str, folder: str) -> Search:
    """Find the near-duplicates of all parts; `dropped_copies` reads them. Counts them in `judged`.

    Each finished task's file is kept, so that a run that resumes repeats only unfinished tasks.
    """
    rows = int(judged.kept.sum())
    buckets = -(-rows // BUCKET_ROWS) or 1
    starts = group_starts(judged.kept, GROUP_ROWS)
    search = Search(NEAR_DUPLICATE, judged_folder, folder, starts, buckets, SET_ROWS)
    run_once(search, "partition", _partition, range(search.groups))
    distinct = np.zeros(search.buckets, np.int64)
    for bucket, count in run_once(search, "collapse", _collapse, range(search.buckets)):
        distinct[bucket] = count
    offsets = np.concatenate([[0], np.cumsum(distinct)])
    compared = _compare_all(search, distinct)
    [(_, sets)] = run_once(search, "connect", _connect, [0], offsets, compared)
    run_once(search, "fetch", _fetch, range(search.groups), sets)
    run_once(search, "resolve", _resolve, range(sets), offsets)
    run_once(search, "equal", _replace_equal, range(search.buckets), sets, offsets)
    for _, copies in run_once(search, "copies", _gather, range(search.groups), sets):
        judged.drop_copies(search.reason, *copies)
    return search


def _partition(search: Search, group: int) -> None:
    columns = ["reason", "width", "height", "hash", "sketch", "digest"]
    tables = []
    for part in search.parts(group):
        rows = load(judged_file(search.judged, part), columns)
        position = np.flatnonzero(rows["hash"].is_valid().to_numpy())
        rows = rows.take(position)
        pixels = rows["width"].to_numpy().astype(np.int64) * rows["height"].to_numpy()
        tables.append(
            pyarrow.table(
                {
                    "part": np.full(len(position), part, np.int32),
                    "position": position.astype(np.int32),
                    "pixels": pixels,
                    **{name: rows[name].to_numpy() for name in ("hash", "sketch", "digest")},
                }
            )
        )
    rows = pyarrow.concat_tables(tables)
    bucket = rows["digest"].to_numpy() % np.uint64(search.buckets)
    save_many(split(rows, bucket.astype(np.int64), search.buckets), search.path("partition", group))


def _collapse(search: Search, bucket: int) -> int:
    rows = load_each(search.paths("partition", search.groups), bucket)
    of = {name: rows[name].to_numpy() for name in rows.column_names}
    order = np.lexsort(
        [of[name] for name in ("position", "part")]
        + [-of["pixels"]]
        + [of[name] for name in ("digest", "hash")]
    )
    hashes, digests = of["hash"][order], of["digest"][order]
    first = np.ones(len(order), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (digests[1:] != digests[:-1])
    best = np.cumsum(first) - 1
    copies = np.bincount(best, minlength=int(first.sum())) > 1
    names = ("part", "position", "pixels", "hash", "sketch")
    save(
        pyarrow.table({name: of[name][order[first]] for name in names} | {"copied": copies}),
        search.path("distinct", bucket),
    )
    equal = order[~first]
    save(
        pyarrow.table(
            {
                "part": of["part"][equal],
                "position": of["position"][equal],
                "best": best[~first],
            }
        ),
        search.path("same", bucket),
    )
    return int(first.sum())


def _compare_all(search: Search, distinct: np.ndarray) -> int:
    """Compare all distinct rows. Returns the number of files of pairs.

    A task compares all rows by several masks, or the rows of one of several slices by one mask.
    """
    rows = int(distinct.sum())
    masks = band_masks(rows)
    slices = -(-rows // COMPARED_ROWS) or 1
    each = max(1, min(len(masks), MASK_ROWS // max(1, rows))) if slices == 1 else 1
    tasks = -(-len(masks) // each) * slices
    loaded = [
        ray.remote(_load_hashes).remote(search.path("distinct", bucket))
        for bucket in range(search.buckets)
    ]
    run_once(search, "pairs", _compare, range(tasks), each, slices, rows, loaded)
    return tasks


def _load_hashes(path: str) -> np.ndarray:
    rows = load(path, ["hash", "sketch"])
    return np.stack([rows["hash"].to_numpy(), rows["sketch"].to_numpy()])


def _compare(
    search: Search,
    number: int,
    each: int,
    slices: int,
    rows: int,
    loaded: Sequence[ray.ObjectRef],
) -> None:
    masks = band_masks(rows)
    first, piece = number // slices * each, number % slices
    chosen: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    before = 0
    for ref in loaded:
        some = ray.get(ref)
        if slices == 1:
            inside = np.arange(some.shape[1])
        else:
            inside = np.flatnonzero(slice_of(some[0], masks[first], slices) == piece)
        chosen.append(some[:, inside])
        ids.append(inside + before)
        before += some.shape[1]
        del some
    (hashes, sketches), row = np.concatenate(chosen, axis=1), np.concatenate(ids)
    del chosen, ids
    found = [
        candidates(hashes, sketches, masks, mask)
        for mask in range(first, min(len(masks), first + each))
    ]
    pairs = row[np.concatenate(found)]
    save(pyarrow.table({"one": pairs[:, 0], "other": pairs[:, 1]}), search.path("pairs", number))


def _connect(search: Search, _: int, offsets: np.ndarray, compared: int) -> int:
    """Divide the rows that resemble another into sets of components. Returns their number."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = pyarrow.concat_tables([load(path) for path in search.paths("pairs", compared)])
    pairs = np.stack([found["one"].to_numpy(), found["other"].to_numpy()], axis=1)
    ids, flat = np.unique(pairs, return_inverse=True)
    flat = flat.reshape(pairs.shape)
    nodes = max(1, len(ids))
    graph = coo_array((np.ones(len(flat), np.int8), (flat[:, 0], flat[:, 1])), (nodes, nodes))
    component = connected_components(graph, directed=False)[1][: len(ids)]
    # Components in the order of their first rows, as many to a set as make `set_rows`.
    sizes = np.bincount(component, minlength=1)
    before = np.cumsum(sizes) - sizes
    set_of = before[component] // search.set_rows
    sets = int(set_of.max(initial=0)) + 1
    wanted = []
    for bucket in range(search.buckets):
        rows = load(search.path("distinct", bucket), ["part", "position", "pixels", "copied"])
        inside = slice(*np.searchsorted(ids, offsets[bucket : bucket + 2]))
        local = ids[inside] - offsets[bucket]
        # A row with equal ones is wanted too, for its key; alone, it may be in any set.
        alone = np.setdiff1d(np.flatnonzero(rows["copied"].to_numpy()), local)
        chosen = np.concatenate([local, alone])
        wanted.append(
            rows.take(chosen)
            .append_column("id", pyarrow.array(chosen + offsets[bucket]))
            .append_column("set", pyarrow.array(np.concatenate([set_of[inside], alone % sets])))
        )
    rows = pyarrow.concat_tables(wanted)
    save_many(
        split(rows, search.group_of(rows["part"].to_numpy()), search.groups), search.path("wanted")
    )
    save_many(split(found, set_of[flat[:, 0]], sets), search.path("alike"))
    return sets


def _fetch(search: Search, group: int, sets: int) -> None:
    wanted = load_one(search.path("wanted"), group)
    order = np.argsort(wanted["part"].to_numpy(), kind="stable")
    wanted = wanted.take(order)
    tables = [
        wanted.slice(0, 0)
        .append_column("key", pyarrow.array([], pyarrow.large_string()))
        .append_column("fingerprint", pyarrow.array([], pyarrow.binary(FINGERPRINT_BYTES)))
    ]
    part = wanted["part"].to_numpy()
    for one in np.unique(part).tolist():
        rows = wanted.slice(*span(part, one))
        judged = load(judged_file(search.judged, one), ["key", "fingerprint"])
        taken = judged.take(rows["position"])
        tables.append(
            rows.append_column("key", taken["key"]).append_column(
                "fingerprint", taken["fingerprint"]
            )
        )
    rows = pyarrow.concat_tables(tables)
    save_many(split(rows, rows["set"].to_numpy(), sets), search.path("fetch", group))


def _resolve(search: Search, number: int, offsets: np.ndarray) -> None:
    rows = load_each(search.paths("fetch", search.groups), number)
    part, position = rows["part"].to_numpy(), rows["position"].to_numpy()
    rows = rows.take(np.lexsort((position, part, -rows["pixels"].to_numpy())))
    ids = rows["id"].to_numpy()
    prints = np.frombuffer(b"".join(rows["fingerprint"].to_pylist()), np.uint8)
    prints = prints.reshape(len(rows), FINGERPRINT_BYTES)
    found = load_one(search.path("alike"), number)
    by_id = np.argsort(ids)
    pairs = np.stack(
        [
            by_id[np.searchsorted(ids, found[name].to_numpy(), sorter=by_id)]
            for name in ("one", "other")
        ],
        axis=1,
    ).reshape(-1, 2)
    stays = stays_of(len(rows), pairs[alike(prints, pairs)])
    kept = rows.select(["part", "position", "key"]).take(stays)
    kept = kept.rename_columns(["kept_part", "kept_position", "kept_key"])
    done = rows.select(["part", "position", "id"])
    for name in kept.column_names:
        done = done.append_column(name, kept[name])
    dropped = done.filter(stays != np.arange(len(rows))).drop_columns(["id"])
    save_many(
        split(dropped, search.group_of(dropped["part"].to_numpy()), search.groups),
        search.path("near", number),
    )
    copied = done.filter(rows["copied"])
    save_many(
        split(
            copied,
            np.searchsorted(offsets, copied["id"].to_numpy(), side="right") - 1,
            search.buckets,
        ),
        search.path("copied", number),
    )


def _replace_equal(search: Search, bucket: int, sets: int, offsets: np.ndarray) -> None:
    """For each row that equals a better one: the row that stays in the place of both."""
    rows = load(search.path("same", bucket))
    kept = load_each(search.paths("copied", sets), bucket)
    best = kept["id"].to_numpy() - offsets[bucket]
    order = np.argsort(best)
    place = order[np.searchsorted(best, rows["best"].to_numpy(), sorter=order)]
    chosen = kept.select(["kept_part", "kept_position", "kept_key"]).take(place)
    rows = rows.select(["part", "position"])
    for name in chosen.column_names:
        rows = rows.append_column(name, chosen[name])
    save_many(
        split(rows, search.group_of(rows["part"].to_numpy()), search.groups),
        search.path("equal", bucket),
    )


def _gather(search: Search, group: int, sets: int) -> CopiesOfGroup:
    near = load_each(search.paths("near", sets), group)
    return gather_copies(
        search, group, [near, load_each(search.paths("equal", search.buckets), group)]
    )
