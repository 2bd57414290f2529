"""One interface for local paths and S3. S3 is moto's server in its own process."""

import os
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

from glide_ray import object_cache, storage
from glide_ray.storage import MissingError, StorageError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return (
        str(tmp_path / "root")
        if request.param == "local"
        else f"{request.getfixturevalue('s3')}/{request.node.name}"
    )


def test_a_stored_file_can_be_read_listed_and_fetched(root):
    for name in ("b/1.tar", "a.tar", "a.txt"):
        storage.put(name.encode(), f"{root}/{name}")
    assert list(storage.list_files(root, (".tar",))) == [f"{root}/a.tar", f"{root}/b/1.tar"]
    assert list(storage.list_files(f"{root}/a.tar", (".tar",))) == [f"{root}/a.tar"]
    assert storage.read(f"{root}/b/1.tar") == b"b/1.tar"
    assert storage.fetch(f"{root}/a.txt").read_bytes() == b"a.txt"


def test_a_missing_file_is_named(root):
    for use in (storage.read, storage.fetch):
        with pytest.raises(StorageError, match="nothing.here"):
            use(f"{root}/nothing.here")
    assert list(storage.list_files(f"{root}/nothing", (".tar",))) == []


def test_a_file_is_replaced_completely(root, tmp_path):
    storage.put(b"old", f"{root}/w")
    (tmp_path / "new").write_bytes(b"new" * 1000)
    storage.put(tmp_path / "new", f"{root}/w")
    assert storage.read(f"{root}/w") == b"new" * 1000


def test_a_cached_copy_is_used_until_the_object_changes(s3):
    storage.put(b"one", f"{s3}/cached/w")
    first = storage.fetch(f"{s3}/cached/w")
    written = os.stat(first).st_mtime_ns
    assert storage.fetch(f"{s3}/cached/w") == first and os.stat(first).st_mtime_ns == written
    storage.put(b"two", f"{s3}/cached/w")
    assert storage.fetch(f"{s3}/cached/w").read_bytes() == b"two"


def test_a_damaged_object_is_refused(s3):
    storage.put(b"right", f"{s3}/damaged")
    client = boto3.client("s3")
    meta = client.head_object(Bucket="corpus", Key="damaged")["Metadata"]
    client.put_object(Bucket="corpus", Key="damaged", Body=b"wrong", Metadata=meta)
    with pytest.raises(StorageError, match="damaged"):
        storage.read(f"{s3}/damaged")


def test_an_incomplete_download_is_retried(s3, s3_faults):
    storage.put(b"whole" * 1000, f"{s3}/torn/w")
    s3_faults.truncate("torn/w", times=4)
    assert storage.read(f"{s3}/torn/w") == b"whole" * 1000 and s3_faults.asked("GET", "torn/w") == 5
    s3_faults.reset("torn/w", times=2)
    s3_faults.answer_503("torn/w", times=2)
    assert (
        storage.fetch(f"{s3}/torn/w").read_bytes() == b"whole" * 1000
        and s3_faults.befallen["503"] == 2
    )
    s3_faults.truncate("torn/w", times=5)
    with pytest.raises(StorageError, match="torn/w cannot be used.*2500 bytes read"):
        storage.read(f"{s3}/torn/w")
    s3_faults.truncate("list-type=2")
    assert (
        list(storage.list_files(f"{s3}/torn", ("w",))) == [f"{s3}/torn/w"]
        and s3_faults.befallen["truncate"] == 10
    )


def test_a_missing_file_is_not_retried_and_differs_from_an_unreadable_one(s3, s3_faults, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (f"{s3}/no/such", tmp_path / "such", tmp_path / "file" / "such"):
        with pytest.raises(MissingError, match="such"):
            storage.read(path)
    assert s3_faults.asked("GET", "no/such") == 1
    for path in ("s3://no-such-bucket/w", tmp_path):
        with pytest.raises(StorageError) as refusal:
            storage.read(path)
        assert not isinstance(refusal.value, MissingError)


def test_listing_reads_every_page(s3):
    client = boto3.client("s3")
    for n in range(1005):
        client.put_object(Bucket="corpus", Key=f"many/{n:05d}.tar", Body=b"")
    assert len(list(storage.list_files(f"{s3}/many", (".tar",)))) == 1005


def test_a_probe_of_a_killed_process_is_deleted_by_the_next(tmp_path):
    (tmp_path / ".probe").write_bytes(b"as after a kill")
    storage.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["local", "s3"])
def test_bytes_a_path_of_either_kind_and_an_open_file_are_stored_whole(place, tmp_path, s3):
    source, root = tmp_path / "source", s3 if place == "s3" else tmp_path
    source.write_bytes(b"weights")
    with open(source, "rb") as file:
        for number, data in enumerate((b"weights", source, str(source), file)):
            storage.put(data, f"{root}/put-{number}")
            assert storage.read(f"{root}/put-{number}") == b"weights"


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below/w"):
        storage.put(b"x", tmp_path / "file" / "below" / "w")


def test_after_an_error_new_empty_folders_are_removed_and_files_are_kept(tmp_path):
    for name in ("empty", "full"):
        with pytest.raises(ZeroDivisionError), storage.no_empty_folders(tmp_path / "new" / name):
            (tmp_path / "new" / name / "below").mkdir(parents=True)
            if name == "full":
                (tmp_path / "new" / name / "file").touch()
            raise ZeroDivisionError
        left = [path.name for path in sorted(tmp_path.rglob("*"))]
        assert left == ([] if name == "empty" else ["new", "full", "file"])


def test_an_s3_path_without_a_bucket_is_refused():
    with pytest.raises(StorageError, match="names no bucket"):
        storage.read("s3:///key")


def test_storage_works_correctly_while_5_percent_of_all_requests_fail(s3, s3_faults, tmp_path):
    """boto3 retries a truncated listing, which is invalid XML; a large object goes in parts."""
    large = tmp_path / "large"
    large.write_bytes(os.urandom(24 * 2**20))
    s3_faults.at_random(0.05)
    for n in range(60):
        storage.put(f"object {n}".encode(), f"{s3}/one_in_twenty/{n:02d}")
    storage.put(large, f"{s3}/one_in_twenty/large")
    files = list(storage.list_files(f"{s3}/one_in_twenty", ("",)))
    assert [storage.read(file) for file in files[:-1]] == [
        f"object {n}".encode() for n in range(60)
    ]
    assert storage.fetch(files[-1], tmp_path / "cache").read_bytes() == large.read_bytes()
    assert sum(s3_faults.befallen.values()) > 120 and set(s3_faults.befallen) >= {
        "503",
        "reset",
        "truncate",
        "slow",
    }


def test_the_cache_stays_within_its_limit_and_keeps_recently_used_files(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("GLIDE_CACHE_GB", "0.003")
    monkeypatch.setattr(object_cache, "IN_USE_SECONDS", 0)
    copies = []
    for n in range(4):
        storage.put(bytes(10**6), f"{s3}/limited/{n}")
        if n == 3:
            os.utime(copies[1].parent, (1, 1))  # last used long ago
        copies.append(storage.fetch(f"{s3}/limited/{n}", tmp_path))
    assert [copy.exists() for copy in copies] == [True, False, True, True]
    monkeypatch.setattr(object_cache, "IN_USE_SECONDS", 600)
    storage.put(bytes(10**6), f"{s3}/limited/4")
    storage.fetch(f"{s3}/limited/4", tmp_path)
    assert sum(copy.exists() for copy in copies) == 3  # recently used copies are kept
    monkeypatch.setenv("GLIDE_CACHE_GB", "many")
    storage.put(b"5", f"{s3}/limited/5")
    with pytest.raises(StorageError, match="GLIDE_CACHE_GB is 'many'"):
        storage.fetch(f"{s3}/limited/5", tmp_path)


def test_of_several_writers_of_a_new_file_one_wins(root):
    assert storage.put_new(b"first", f"{root}/lock")
    assert not storage.put_new(b"second", f"{root}/lock")
    assert storage.read(f"{root}/lock") == b"first"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.put_new(b"%d" % n, f"{root}/raced"), range(8)))
    assert sum(won) == 1 and storage.read(f"{root}/raced") == b"%d" % won.index(True)


def test_a_new_object_whose_answer_was_lost_belongs_to_its_writer(s3, s3_faults):
    s3_faults.truncate("/lost", times=1)
    assert storage.put_new(b"mine", f"{s3}/lost/lock")


@pytest.mark.parametrize("remote", [False, True])
def test_a_range_of_a_file_is_read_despite_a_broken_connection(tmp_path, request, remote):
    path = f"{request.getfixturevalue('s3')}/range" if remote else str(tmp_path / "range")
    storage.put(bytes(range(200)), path)
    if remote:
        request.getfixturevalue("s3_faults").truncate("/range", times=2)
    assert storage.read_range(path, 50, 150) == bytes(range(50, 150))
    assert storage.read_range(path, 7, 7) == b""
