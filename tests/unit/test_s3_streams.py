"""Shards in S3 are streamed: bounded memory, broken connections continued, changes noticed."""

import gzip
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import caption, picture, tar_bytes

from glide_ray import storage
from glide_ray.data.readers import tar
from glide_ray.data.shards import Sample, write_shard
from glide_ray.data.sources import Part, find_parts, read_part, state
from glide_ray.s3 import READ, ChangedError
from glide_ray.storage import StorageError

MIB = 2**20


def noise(n, size):
    return np.random.default_rng(n).bytes(size)


def tar_of_noise(count, size):
    rows = range(count)
    files = [(f"{n}.jpg", noise(n, size)) for n in rows] + [(f"{n}.txt", caption(n)) for n in rows]
    return tar_bytes(files)


@pytest.fixture
def path(s3, request):
    return f"{s3}/streams/{request.node.name}"


def test_a_tar_goes_on_where_its_connection_broke_off(path, s3_faults):
    data = tar_of_noise(8, MIB)
    storage.put(data, f"{path}.tar")
    s3_faults.truncate(path.rpartition("/")[2], times=6)
    rows = list(read_part(Part(f"{path}.tar")))
    assert [row.image for row in rows] == [noise(n, MIB) for n in range(8)]
    assert [row.captions for row in rows] == [(caption(n),) for n in range(8)]
    assert s3_faults.asked("GET", ".tar") == 7
    assert s3_faults.bytes_sent(".tar") < len(data) + 7 * READ


def test_an_object_whose_connection_never_gives_a_byte_is_a_named_fault(path, s3_faults):
    storage.put(b"x", path)
    s3_faults.truncate(path.rpartition("/")[2], times=5)
    fault = pytest.raises(StorageError, match="never_gives_a_byte.* cannot be used: after 0 of 1")
    with storage.open_stream(path) as stream, fault:
        stream.read()
    with storage.open_stream(path) as stream:
        assert stream.read() == b"x"


@pytest.mark.parametrize("form", ["tar", "tar.gz"])
def test_a_large_tar_is_read_with_bounded_memory(path, s3_proxy, monkeypatch, form):
    """The proxy, which holds whole objects in this process, is left out."""
    monkeypatch.setattr(tar, "IN_MEMORY", 4 * MIB)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_proxy.upstream}")
    storage.client.cache_clear()
    files = [file for n in range(24) for file in ((f"{n}.jpg", noise(n, MIB)), (f"{n}.txt", "x"))]
    data = tar_bytes(files)
    storage.put(gzip.compress(data, 0) if form == "tar.gz" else data, f"{path}.{form}")
    del files, data
    tracemalloc.start()
    assert sum(len(row.image) for row in read_part(Part(f"{path}.{form}"))) == 24 * MIB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    storage.client.cache_clear()
    assert peak < 16 * MIB


def test_a_shard_that_is_replaced_while_it_is_read_is_a_named_fault(path, s3_faults):
    storage.put(noise(1, 2 * MIB), path)
    s3_faults.truncate(path.rpartition("/")[2])
    with storage.open_stream(path) as stream:
        stream.read(1000)
        storage.put(noise(2, 2 * MIB), path)
        with pytest.raises(ChangedError, match="replaced_while_it_is_read.* has changed since"):
            stream.read()


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_shard_with_another_etag_than_expected_is_not_read(path, form):
    storage.put(noise(1, 100), f"{path}.{form}")
    with pytest.raises(ChangedError):
        next(read_part(Part(f"{path}.{form}"), ["another"]))


def test_a_stream_with_a_wrong_checksum_is_refused(path, s3):
    storage.put(noise(1, MIB), path)
    bucket, key = path.removeprefix("s3://").split("/", 1)
    meta = storage.client().head_object(Bucket=bucket, Key=key)["Metadata"]
    storage.client().put_object(Bucket=bucket, Key=key, Body=noise(2, MIB), Metadata=meta)
    with storage.open_stream(path) as stream, pytest.raises(StorageError, match="is damaged"):
        stream.read()


# -- Parquet ---------------------------------------------------------------------------------------


def table_of_pictures(target, rows=40, picture_bytes=10_000, others=2 * MIB):
    """A Parquet file in four row groups, with a column of embeddings that no reader needs."""
    embeddings = np.random.default_rng(0).random((rows, others // rows // 8)).tolist()
    columns = {
        "image": [picture(n) + noise(n, picture_bytes) for n in range(rows)],
        "caption": [caption(n) for n in range(rows)],
        "embedding": embeddings,
    }
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=rows // 4)
    storage.put(sink.getvalue().to_pybytes(), target)
    return sink.getvalue().size


def test_only_the_needed_columns_of_a_parquet_object_are_read(path, s3_faults, tmp_path):
    size = table_of_pictures(f"{path}.parquet")
    table_of_pictures(tmp_path / "same.parquet")
    s3_faults.clear()
    s3_faults.truncate(".parquet", times=2)
    rows, local = (list(read_part(Part(f"{one}.parquet"))) for one in (path, tmp_path / "same"))
    assert [(row.image, row.captions) for row in rows] == [
        (row.image, row.captions) for row in local
    ]
    assert s3_faults.bytes_sent(".parquet") < 0.6 * MIB < size / 3
    assert s3_faults.asked("GET", ".parquet") <= 3 + 2 * 4 and not s3_faults.asked("HEAD", "")


def test_a_parquet_object_that_is_replaced_while_it_is_read_is_a_named_fault(path):
    """The second half of its rows is in row groups that are read after the first ones."""
    table_of_pictures(f"{path}.parquet", 160, 3000)
    rows = read_part(Part(f"{path}.parquet"))
    next(rows)
    table_of_pictures(f"{path}.parquet", 160, 3001)
    with pytest.raises(ChangedError, match="parquet has changed since"):
        list(rows)


def test_a_parquet_object_beside_images_is_judged_by_its_footer(path, s3_faults):
    storage.put(picture(0), f"{path}/a.jpg")
    table_of_pictures(f"{path}/others.parquet")
    s3_faults.clear()
    assert {part.url for part in find_parts(path)} == {f"{path}/others.parquet", f"{path}#0"}
    assert s3_faults.bytes_sent("others.parquet") == 2**16


def test_an_empty_object_is_no_parquet_file(path):
    storage.put(b"", f"{path}.parquet")
    with pytest.raises(StorageError.__base__, match="is not a whole Parquet file"):
        next(read_part(Part(f"{path}.parquet")))


def test_a_shard_is_stored_in_one_request_without_a_copy_in_memory(s3, path, s3_faults):
    samples = (Sample(f"{n}", noise(n, MIB), "jpg", ("x",), {}) for n in range(12))
    entry = write_shard(path, 0, samples)
    assert storage.size(f"{path}/000000.tar") == entry["bytes"] > 12 * MIB
    assert s3_faults.asked("PUT", "000000.tar") == 1 and not s3_faults.asked("POST", "000000.tar")
    assert len(list(read_part(Part(f"{path}/000000.tar")))) == 12


# -- listing ---------------------------------------------------------------------------------------


def test_the_shards_of_a_range_are_listed_once_per_folder(path, s3_faults):
    for n in range(12):
        storage.put(b"x", f"{path}/{'ab'[n % 2]}/{n:06d}.tar")
    s3_faults.clear()
    corpus = f"{path}/{{a,b}}/{{000000..000299}}.tar"
    parts = find_parts(corpus)
    assert len(parts) == 600 and len(s3_faults.requests) == 2  # whether a folder is unfinished
    before = state(corpus, parts)
    assert s3_faults.asked("GET", "list-type=2") == 2 and len(s3_faults.requests) == 4
    storage.put(b"y", f"{path}/a/000000.tar")
    assert state(corpus, parts) != before
