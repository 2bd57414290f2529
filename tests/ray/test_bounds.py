"""Memory that does not grow with the size of pictures, shards, objects or corpora."""

import io
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from helpers.drawings import drawn_samples
from helpers.tiny import corpus_settings, tiny
from sklearn.metrics import roc_auc_score

from glide_ray.bench.data import bench_photos
from glide_ray.data.readers.parquet import BUFFER, read_parquet
from glide_ray.data.sample import in_groups
from glide_ray.data.shards import Sample, ShardEntries, ShardError, finish, write_shard
from glide_ray.data.sources import Part, find_parts, read_part
from glide_ray.distributed import stream
from glide_ray.distributed.curation import score_counts
from glide_ray.distributed.curation.filter_report import MISSED_SHOWN, shown_errors
from glide_ray.distributed.curation.judge import Judged, PartResult
from glide_ray.distributed.curation.score_counts import ScoreCounts
from glide_ray.distributed.curation.write import plan_tasks
from glide_ray.distributed.training import feed
from glide_ray.train import without_ray

MIB = 2**20


class Peak:
    """Peak of the bytes that Python holds, above those it held before."""

    def __enter__(self):
        tracemalloc.start()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *_):
        self.bytes = tracemalloc.get_traced_memory()[1] - self._before
        tracemalloc.stop()


def large_samples(count, size):
    """Samples of `size` bytes, made one by one; they are no pictures."""
    for n in range(count):
        yield Sample(f"{n}", bytes(size), "jpg", (f"photo {n}",), {})


# -- the shuffle window of training ----------------------------------------------------------------


def test_a_window_of_large_pictures_ends_at_its_limit_of_bytes():
    rows = enumerate(large_samples(150, 4 * MIB))
    with Peak() as peak:
        read = [n for block in stream.shuffled_blocks(rows, [0, 0, 0], 2048) for n in block["id"]]
    assert sorted(read) == list(range(150)) and read != sorted(read)
    limit = stream.WINDOW_BYTES + 2 * stream.BLOCK_BYTES
    assert stream.WINDOW_BYTES / 2 < peak.bytes < limit
    again = enumerate(large_samples(150, 4 * MIB))
    assert read == [
        n for block in stream.shuffled_blocks(again, [0, 0, 0], 2048) for n in block["id"]
    ]


def test_windows_of_small_pictures_end_at_their_number_of_rows():
    samples = list(enumerate(drawn_samples(150)))
    blocks = list(stream.shuffled_blocks(iter(samples), [7, 1, 2], 100))
    expected = [
        start + n
        for number, start in enumerate((0, 100))
        for n in np.random.default_rng([7, 1, 2, number]).permutation(min(100, 150 - start))
    ]
    assert [n for block in blocks for n in block["id"]] == expected
    assert [len(block["id"]) for block in blocks] == [64, 36, 50]


def test_a_group_of_rows_ends_at_its_number_or_bytes_and_loses_none():
    sizes = [1, 1, 1, 9, 2, 2, 2, 30, 1]
    assert list(in_groups(sizes, 3, 10, int)) == [[1, 1, 1], [9, 2], [2, 2, 30], [1]]


def test_a_worker_requests_fewer_batches_in_advance_if_they_are_large():
    def batch_bytes(row_bytes):
        batch = [feed.Segment(None, 0, 512, row_bytes)] * 4
        return feed.share_of(batch, 0, 512).batch_bytes

    kilobytes = (10, 100, 200, 5000)
    assert [feed.prefetched(batch_bytes(1024 * kib)) for kib in kilobytes] == [8, 5, 2, 1]


def test_a_rank_gets_the_blocks_with_its_rows_alone():
    sizes = (3, 5, 1, 7)
    batch = [feed.Segment(n, 10, 10 + size, 100) for n, size in enumerate(sizes)]
    blocks = [block for block, size in enumerate(sizes) for _ in range(size)]
    for start in range(16):
        for stop in range(start + 1, 17):
            share = feed.share_of(batch, start, stop)
            assert [one.block for one in share.segments] == sorted(set(blocks[start:stop]))
            assert blocks.index(share.segments[0].block) == share.first


def test_a_corpus_in_memory_is_refused_at_the_row_that_exceeds_the_limit(drawn_corpus, monkeypatch):
    read = []

    def samples(part):
        for sample in read_part(part):
            read.append(sample)
            yield sample

    monkeypatch.setattr(without_ray, "read_part", samples)
    monkeypatch.setattr(without_ray, "MAX_BYTES", 2000)
    with pytest.raises(ShardError, match="too many to hold in memory; leave out --no-ray"):
        without_ray.MemoryCorpus(tiny("base", *corpus_settings(drawn_corpus)))
    assert len(read) < 32 and sum(sample.bytes for sample in read[:-1]) <= 2000


# -- readers and writers ---------------------------------------------------------------------------


def test_a_shard_is_written_without_holding_its_pictures(tmp_path):
    with Peak() as peak:
        entry = write_shard(tmp_path, 0, large_samples(40, 4 * MIB))
    assert peak.bytes < 20 * MIB < entry["bytes"] == (tmp_path / "000000.tar").stat().st_size


def test_a_row_group_of_large_pictures_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("glide_ray.data.readers.parquet.BATCH_BYTES", 8 * MIB)
    pictures = [np.random.default_rng(n).bytes(MIB) for n in range(24)]
    table = pyarrow.table({"image": pictures, "caption": ["a photo"] * 24})
    path = tmp_path / "0.parquet"
    pyarrow.parquet.write_table(table, path, use_dictionary=False, write_batch_size=4)
    reads = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    rows = read_parquet(Counted(path), "0.parquet", None)
    assert next(rows).image == pictures[0] and sum(reads) < 16 * MIB
    assert [sample.image for sample in rows] == pictures[1:]
    assert max(reads) <= BUFFER and sum(reads) < 26 * MIB


# -- what a task receives --------------------------------------------------------------------------


def largest_put(monkeypatch, work):
    """Bytes of the largest object that goes to Ray's object store in this process."""
    sizes, put = [], ray.put

    def counted(value, **options):
        sizes.append(len(ray.cloudpickle.dumps(value)))
        return put(value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ray, "put", counted)
        work()
    return max(sizes)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("plan", [None, stream.Plan(0, 0, 16)])
def test_a_reading_task_receives_its_own_parts_only(monkeypatch, plan):
    few, many = (
        largest_put(
            monkeypatch,
            lambda count=count: stream.open_parts(
                [Part(f"corpus/{n:06d}.tar", 5000) for n in range(count)], 16, None, plan
            ),
        )
        for count in (10, 300)
    )
    assert many <= few + 8


@pytest.mark.usefixtures("ray_session")
def test_the_item_of_a_task_reaches_it_unchanged():
    items = [(n, Part(f"{n}.tar", 5000, etags=("a",))) for n in range(20)]
    received = [
        stream.its_own({"item": np.array([row["item"]], object)})
        for row in stream.each_alone(items).take_all()
    ]
    assert received == items


# -- scores of a filter ----------------------------------------------------------------------------


def labelled_scores(count):
    draws = np.random.default_rng(count)
    truth = draws.random(count) < 0.1
    return draws.normal(truth * 1.5 - 1, 1).astype(np.float32), truth


def test_the_counted_scores_of_all_parts_assess_a_filter_as_the_scores_themselves():
    scores, truth = labelled_scores(5000)
    scores[:100] = scores[100:200]  # ties
    counts = ScoreCounts()
    for part in np.array_split(np.random.default_rng(0).permutation(5000), 7):
        counts.add(scores[part], truth[part])
    assert counts.outcomes.tolist() == [
        [(~truth & (scores < 0)).sum(), (~truth & (scores >= 0)).sum()],
        [(truth & (scores < 0)).sum(), (truth & (scores >= 0)).sum()],
    ]
    assert counts.area == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    every, shows, rows = counts.weighted()
    assert rows.sum() == 5000 and rows[shows].sum() == truth.sum()
    assert (every * rows).sum() == pytest.approx(scores.sum(dtype=float), rel=1e-6)


def test_scores_of_many_rows_take_bounded_memory_and_the_area_hardly_changes(monkeypatch):
    monkeypatch.setattr(score_counts, "MAX_DISTINCT", 2**13)
    monkeypatch.setattr(score_counts, "BUFFERED", 2**15)
    scores, truth = labelled_scores(300_000)
    orders = (np.arange(300_000), np.random.default_rng(1).permutation(300_000))
    counted = []
    for order in orders:
        counts = ScoreCounts()
        for part in np.array_split(order, 40):
            counts.add(scores[part], truth[part])
        assert len(counts.weighted()[0]) <= 2 * 2**13
        assert counts.outcomes[1, 0] == (truth & (scores < 0)).sum()
        counted.append(counts)
    first, second = (counts.weighted() for counts in counted)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert counted[0].area == pytest.approx(roc_auc_score(truth, scores), abs=1e-3)


def test_the_errors_shown_of_parts_are_those_of_the_whole_corpus():
    scores, truth = labelled_scores(4000)
    missed, sure = shown_errors(scores, truth)
    assert len(missed) == MISSED_SHOWN and (scores[missed] < 0).all() and truth[missed].all()
    left = np.empty(0, int)
    for part in np.array_split(np.arange(4000), 9):
        own = part[np.sort(np.concatenate(shown_errors(scores[part], truth[part])))]
        left = np.concatenate([left, own])
        left = left[np.sort(np.concatenate(shown_errors(scores[left], truth[left])))]
    assert left.tolist() == sorted([*missed.tolist(), *sure.tolist()])


# -- the driver ------------------------------------------------------------------------------------


def entry(number):
    sha256 = f"{number:064x}"
    return {"name": f"{number:06d}.tar", "count": 9, "bytes": 10**9 + number, "sha256": sha256}


def test_the_driver_of_cleaning_holds_less_than_300_bytes_a_part_with_its_shard():
    count = 8_000
    with Peak() as peak:
        parts = find_parts(f"/corpora/raw/{{000000..{count - 1:06d}}}.tar")
        judged, entries = Judged(count), ShardEntries(count)
        for n in range(count):
            counts = {"too small": 1000}, {"too small": "x"}
            judged.add(PartResult(n, "state", 10_000, 9_000, 0, *counts))
        starts, shards = plan_tasks(judged.kept, 10_000)
        for n in range(count):
            entries.add(entry(n))
    assert len(parts) == len(starts) - 1 == shards[-1] == count
    assert peak.bytes < 300 * count


@pytest.mark.parametrize("numbers", [[], [0], [0, 1, 3]])
def test_an_index_is_written_entry_by_entry_as_json_writes_it_whole(tmp_path, numbers):
    entries = ShardEntries(5)
    for number in reversed(numbers):
        entries.add(entry(number))
    index = finish(tmp_path, entries)
    whole = {"count": 9 * len(numbers), "shards": [entry(number) for number in numbers]}
    assert (tmp_path / "index.json").read_text() == json.dumps(whole, indent=1)
    assert index["count"] == entries.rows == whole["count"]
    assert list(index["shards"]) == whole["shards"] and not (tmp_path / ".work").exists()


def test_the_benchmark_of_photos_compares_both_ways_to_decode_them():
    figures = bench_photos(repeats=1, photos=1)
    assert 0 < figures["photo_ms"] < figures["photo_ms_without_draft"]
    assert figures["photo_ratio"] > 1
