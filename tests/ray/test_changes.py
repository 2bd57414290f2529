"""Objects replaced while `glide clean` runs are noticed, and read again by the next run."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import caption, tar_bytes
from PIL import Image

from glide_ray import storage
from glide_ray.config.data import CleanConfig
from glide_ray.data.filters import NEAR_DUPLICATE
from glide_ray.data.images import encode
from glide_ray.data.readers.fetch import CHANGED, NO_FILE
from glide_ray.data.sources import find_parts, read_part
from glide_ray.distributed.curation import clean as cleaning
from glide_ray.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_session")
COUNT = 4


def drawn(n):
    coarse = np.random.default_rng(n).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return encode(np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)))


def write_corpus(source, form, first):
    """COUNT rows as single files, or as a tar."""
    rows = range(first, first + COUNT)
    files = [(f"{n - first}.png", drawn(n)) for n in rows]
    files += [(f"{n - first}.txt", caption(n).encode()) for n in rows]
    if form == "tar":
        storage.put(tar_bytes(files), f"{source}/0.tar")
    else:
        for name, content in files:
            storage.put(content, f"{source}/{name}")


def replaced_between(monkeypatch, replace):
    """Call `replace` after the rows are judged and before they are written."""
    search = cleaning.find_near_duplicates

    def search_and_replace(*arguments):
        replace()
        return search(*arguments)

    monkeypatch.setattr(cleaning, "find_near_duplicates", search_and_replace)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["image", "tar"])
def test_a_file_replaced_after_it_was_judged_ends_the_run_and_the_next_run_reads_it_again(
    s3, tmp_path, monkeypatch, form
):
    source, out = f"{s3}/changes/{form}", f"{s3}/changed/{form}"
    write_corpus(source, form, 0)

    def replace():
        if form == "tar":
            write_corpus(source, form, 10)
        else:
            storage.put(drawn(10), f"{source}/2.png")

    with monkeypatch.context() as patch:
        replaced_between(patch, replace)
        with pytest.raises(UserError, match=r"has changed since it was judged; run the same"):
            cleaning.clean(source, out, CleanConfig())
    done = cleaning.clean(source, out, CleanConfig())
    assert done.report.kept == COUNT and not done.report.faults
    expected = [(row.image, row.captions) for part in find_parts(source) for row in read_part(part)]
    written = [(row.image, row.captions) for part in find_parts(out) for row in read_part(part)]
    assert written == expected
    assert json.loads(storage.read(f"{out}/summary.json"))["kept"] == COUNT


def by_path(root):
    """COUNT pictures, and a Parquet file that names them by path, in `root`/rows."""
    for n in range(COUNT):
        storage.put(drawn(n), f"{root}/pictures/{n}.png")
    columns = {"path": [f"../pictures/{n}.png" for n in range(COUNT)], "text": texts()}
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    storage.put(sink.getvalue().to_pybytes(), f"{root}/rows/0.parquet")
    return f"{root}/rows"


def texts():
    return [caption(n) for n in range(COUNT)]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_picture_that_a_parquet_file_names_is_noticed_when_it_is_replaced(
    tmp_path, request, monkeypatch, kind
):
    root = f"{request.getfixturevalue('s3')}/named" if kind == "s3" else str(tmp_path / "in")
    source, out = by_path(root), str(tmp_path / "out")
    with monkeypatch.context() as patch:
        replaced_between(patch, lambda: storage.put(drawn(10), f"{root}/pictures/2.png"))
        with pytest.raises(UserError, match=r"0.parquet has changed since it was judged"):
            cleaning.clean(source, out, CleanConfig())
    with monkeypatch.context() as patch:  # between two runs, while it is judged no more
        replaced_between(patch, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cleaning.clean(source, out, CleanConfig())
    storage.put(drawn(0), f"{root}/pictures/3.png")
    storage.remove(f"{root}/pictures/1.png")
    done = cleaning.clean(source, out, CleanConfig())
    assert dict(done.report.dropped) == {NO_FILE: 1, NEAR_DUPLICATE: 1}
    written = [row.image for part in find_parts(out) for row in read_part(part)]
    assert written == [drawn(0), drawn(10)]


def test_a_file_replaced_since_it_was_listed_costs_its_row_and_is_a_named_fault(s3):
    source = f"{s3}/changes/listed"
    write_corpus(source, "files", 0)
    [part] = find_parts(source)
    storage.put(drawn(10), f"{source}/1.png")
    storage.put(b"another caption", f"{source}/3.txt")
    rows = read_part(part, part.etags)
    found = [next(rows) for _ in range(COUNT)]
    assert [row.no_image for row in found] == ["", CHANGED, "", ""]
    assert [row.no_caption for row in found] == ["", "", "", CHANGED]
    with pytest.raises(UserError, match="2 files of .*listed/1.png has changed since"):
        next(rows)
    assert all(row.image for row in read_part(part))  # as training reads it
