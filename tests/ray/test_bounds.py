"""Memory that does not grow with the size of pictures, shards, objects or corpora."""

import io
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from helpers.drawings import drawn_samples
from helpers.tiny import corpus_settings, tiny

from glide_ray.data.readers.parquet import BUFFER, read_parquet
from glide_ray.data.sample import in_groups
from glide_ray.data.shards import Sample, ShardError, write_shard
from glide_ray.data.sources import Part, read_part
from glide_ray.distributed import stream
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
    def batch(row_bytes):
        return [feed.Segment(None, 0, 512, row_bytes)] * 4

    kilobytes = (10, 100, 200, 5000)
    assert [feed.prefetched(batch(1024 * kib)) for kib in kilobytes] == [8, 5, 2, 1]


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
