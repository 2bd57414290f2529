"""Work is done once for the same arguments, and again where its result is of no use."""

import json

import pytest

from glide_ray.distributed.job import run_once
from glide_ray.records import cached_result, read_result


@pytest.fixture
def work():
    calls = []

    def result():
        calls.append(None)
        return {"number": len(calls), "names": ("a", "b")}

    return result


def test_work_is_done_once_for_the_same_arguments(tmp_path, work):
    record = str(tmp_path / "folder" / "record.json")
    assert read_result(record) is None
    assert cached_result(record, {"sizes": (64, 256)}, work)[0]["number"] == 1
    again, done_before = cached_result(
        record, {"sizes": [64, 256]}, work
    )  # tuples are lists in JSON
    assert done_before and again == read_result(record) == {"number": 1, "names": ["a", "b"]}


def test_other_arguments_a_broken_record_or_an_invalid_result_repeat_the_work(tmp_path, work):
    record = tmp_path / "record.json"
    cached_result(str(record), "a", work)
    assert cached_result(str(record), "b", work) == ({"number": 2, "names": ("a", "b")}, False)
    record.write_text(record.read_text()[:20])
    assert cached_result(str(record), "b", work)[0]["number"] == 3
    record.write_text(json.dumps(["a"]))
    assert cached_result(str(record), "b", work)[0]["number"] == 4
    assert (
        cached_result(str(record), "b", work, lambda result: result["number"] > 4)[0]["number"] == 5
    )


def test_failed_work_removes_the_earlier_record(tmp_path, work):
    record = str(tmp_path / "record.json")
    cached_result(record, "a", work)
    with pytest.raises(ZeroDivisionError):
        cached_result(record, "b", lambda: 1 / 0)
    assert read_result(record) is None


def test_a_job_whose_result_has_faults_is_done_again(tmp_path):
    results = iter([{"kept": 3, "faults": ["0.tar is broken"]}, {"kept": 4, "faults": []}])
    done = [run_once(str(tmp_path / "record.json"), {}, lambda: next(results)) for _ in range(3)]
    assert [(one["kept"], one["done_before"]) for one in done] == [
        (3, False),
        (4, False),
        (4, True),
    ]
