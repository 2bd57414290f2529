"""Reading what people have: each public form is read, or what it lacks is counted by reason."""

import io
import json
import random
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pytest
from helpers import corpora as forms
from helpers.drawings import drawn_samples
from helpers.tiny import tiny
from PIL import Image, ImageOps, PngImagePlugin

from glide_ray import storage
from glide_ray.data import images, patterns, sources
from glide_ray.data.filters import Candidate, Report, first_broken, header_rules
from glide_ray.data.images import centre_crop, decode, decode_crop
from glide_ray.data.readers.parquet import read_parquet
from glide_ray.data.readers.tar import read_shard
from glide_ray.data.sample import Sample, ShardError
from glide_ray.data.shards import write_shards
from glide_ray.data.sources import find_parts, read_part
from glide_ray.data.usable import check_usable
from glide_ray.errors import UserError
from glide_ray.train.without_ray import MemoryCorpus


def survey(path, column=None, min_size=1):
    """(kept samples, report) of a corpus by the rules of training, without Ray."""
    report, kept, rules = Report(), [], header_rules(min_size)
    for part in find_parts(path, column):
        try:
            for sample in read_part(part):
                reason = first_broken(Candidate(sample), rules)
                report.add(sample.key, reason, sample.captions_unread)
                if reason is None:
                    kept.append(sample)
        except UserError as error:
            report.faults.append(str(error))
    return kept, report


@dataclass(frozen=True)
class Case:
    """A form of a corpus, and what comes of it."""

    make: Callable
    kept: int
    captions: int | None = None  # None: one for each row that is kept
    dropped: dict = field(default_factory=dict)  # beginning of the reason -> rows
    faults: tuple = ()  # a part of each
    column: str | None = None


N = forms.COUNT
CASES = {
    "img2dataset's files, last shard failed": Case(
        forms.files_output, 2 * N, dropped={"in Parquet files without images": 1}
    ),
    "a list of URLs beside the images": Case(
        forms.url_list, N, dropped={"in Parquet files without images": 1}
    ),
    "a range with gaps": Case(forms.gaps, 3 * N, faults=("There is no file",) * 297),
    "keys with dots": Case(forms.dots_in_keys, N),
    "compound endings in some shards": Case(
        forms.compound_endings, N, dropped={"with an image and a text of different names": N}
    ),
    "members of a key apart": Case(forms.unsorted, N),
    "compressed tars": Case(forms.compressed, 5 * N),
    "a compressed tar that is cut": Case(forms.cut_gzip, N + 2, faults=("broken or cut",)),
    "tars compressed by zstd and lz4": Case(forms.by_pyarrow, 4 * N),
    "a tar of zstd that is cut": Case(forms.cut_zstd, N, faults=("copy it again",)),
    "tars joined into one": Case(forms.joined, 2 * N),
    "bytes after the end of a tar": Case(forms.joined_with_garbage, N, faults=("broken or cut",)),
    "a tar in a tar": Case(forms.nested, 0, dropped={"in an archive inside a tar": 1}),
    "a key in several shards, and several times": Case(forms.same_keys, 3 * N),
    "a key several times, members apart": Case(
        forms.same_keys_apart, N, dropped={"with a name that is there several times": 1}
    ),
    "a tar that never ends": Case(forms.endless, 2, faults=("broken or cut after 000000001",)),
    "all endings": Case(forms.endings, 20, dropped={"in files of a kind that is not read": 2}),
    "several lines in a text": Case(forms.lines, N, 3 * N),
    "metadata.csv": Case(forms.table("metadata.csv", "text"), N),
    "metadata.csv, other column": Case(
        forms.table("metadata.csv", "prompt"),
        0,
        dropped={"without a caption: metadata.csv has file_name, prompt": N},
    ),
    "metadata.csv, named column": Case(forms.table("metadata.csv", "prompt"), N, column="prompt"),
    "metadata.jsonl, named column": Case(
        forms.table("metadata.jsonl", "prompt"), N, column="prompt"
    ),
    "metadata.jsonl that is cut": Case(
        forms.torn_jsonl,
        N - 1,
        dropped={
            "in lines of a table that are not JSON": 2,
            "in lines of a table that name no file": 1,
            "without a caption": 1,
        },
    ),
    "metadata.csv that is cut": Case(
        forms.torn_csv,
        N - 2,
        dropped={
            "in lines of a table with a quotation mark that is not closed": 2,
            "without a caption": 2,
        },
    ),
    "metadata.csv with odd lines": Case(
        forms.odd_csv,
        N - 2,
        dropped={
            "in lines of a table that have more fields than its heading": 1,
            "in lines of a table that have fewer fields than its heading": 1,
        },
    ),
    "COCO's annotations that are cut": Case(
        forms.torn_coco,
        0,
        dropped={
            "with a json that cannot be read": 1,
            "in annotations of another form": 1,
            "without a caption": N,
        },
    ),
    "archives of other kinds": Case(
        forms.other_archives, N, dropped={"in files of a kind that is not read": 4}
    ),
    "captions.txt of Flickr8k": Case(forms.flickr, N, 2 * N),
    "a table of an image that is missing": Case(
        forms.listed_without_image, N - 1, dropped={"listed in a table of captions without": 1}
    ),
    "COCO as downloaded": Case(forms.coco, N, 3 * N),
    ".caption files": Case(forms.caption_files, N),
    "images and texts apart": Case(forms.apart, N),
    "links to folders, and a loop": Case(forms.links, 2 * N),
    "hidden files": Case(forms.hidden, N),
    "encodings": Case(
        forms.encodings,
        6,
        dropped={
            "with a caption that is not UTF-8": 1,
            "with a damaged caption": 1,
            "without a caption": 4,
        },
    ),
    "forms of JSON": Case(
        forms.json_forms,
        6,
        8,
        dropped={"with a json that cannot be read": 1, "without a caption in its json": 1},
    ),
    "Parquet of Hugging Face, with splits": Case(forms.splits, 2 * N),
    "lists of images": Case(forms.image_lists, N - 1, dropped={"with a list of several images": 1}),
    "Parquet, other column": Case(
        forms.prompts, 0, faults=("it has: image, prompt, re_caption; name one with --cap",)
    ),
    "Parquet, named column": Case(forms.prompts, N, column="prompt"),
    "base64, numbers, bytes beside names": Case(forms.other_forms, 4 * N),
    "captions as bytes, objects, lists, NaN": Case(
        forms.caption_forms, 5 * N, 6 * N, dropped={"without a caption": N}
    ),
    "a damaged footer": Case(forms.damaged_footer, N, faults=("not a whole Parquet file",)),
    "text that is not UTF-8": Case(
        forms.not_utf8, 3 * N - 2, dropped={"with a damaged caption": 2}
    ),
    "a date out of range": Case(forms.odd_columns, 2 * N),
    "a damaged column that is not needed": Case(forms.damaged_column, N),
}


@pytest.mark.parametrize("name", CASES)
def test_each_form_of_a_corpus_is_read_or_counted_by_reason(tmp_path, name):
    case = CASES[name]
    kept, report = survey(case.make(tmp_path), case.column)
    assert report.kept == len(kept) == case.kept, str(report)
    counts = Counter()
    for reason, number in report.dropped.items():
        counts[next((one for one in case.dropped if reason.startswith(one)), reason)] += number
    assert counts == case.dropped
    assert len(report.faults) == len(case.faults), report.faults
    for fault, part in zip(report.faults, case.faults, strict=True):
        assert part in fault
    captions = sum(len(sample.captions) for sample in kept)
    assert captions == (case.kept if case.captions is None else case.captions)
    for sample in kept:
        decode(sample.image)


def test_a_report_of_many_missing_shards_gives_their_number_and_three_names(tmp_path):
    _, report = survey(forms.gaps(tmp_path))
    assert "297 shards are missing, such as" in str(report) and len(str(report)) < 600
    assert str(report).count(".tar") == 3


def test_captions_stay_with_their_images_whatever_the_order_of_the_members(tmp_path):
    for make in (forms.unsorted, forms.dots_in_keys, forms.joined, forms.same_keys):
        kept, _ = survey(make(tmp_path / make.__name__))
        for sample in kept:
            [text] = sample.captions
            assert sample.image == forms.picture(int(text.rpartition(" ")[2]))


def test_captions_are_freed_of_marks_tags_and_entities(tmp_path):
    kept, _ = survey(forms.encodings(tmp_path))
    assert {sample.key: sample.captions[0] for sample in kept} == {
        "bom": "a red house",
        "utf16": "a red house",
        "utf32": "a red house",
        "marks": "a red house",
        "html": "a red & blue <house>",
        "script": "<script>alert(1)</script> & a house",
    }


def test_captions_of_a_json_are_found_in_their_forms(tmp_path):
    kept, _ = survey(forms.json_forms(tmp_path))
    assert {sample.key: sample.captions for sample in kept} == {
        "nan": ("from the text",),
        "empty_list": ("from the text",),
        "objects": ("from an object",),
        "text": ("from text",),
        "list": ("one", "two"),
        "languages": ("a house", "ein Haus"),
    }
    json.dumps([sample.meta for sample in kept], allow_nan=False)


def test_a_damaged_line_of_a_table_is_named_by_its_number_and_the_others_are_read(tmp_path):
    kept, report = survey(forms.torn_jsonl(tmp_path / "jsonl"))
    example = report.examples["in lines of a table that are not JSON"]
    assert example == f"{tmp_path}/jsonl/metadata.jsonl:2"
    assert [sample.captions for sample in kept] == [(forms.caption(n),) for n in range(N - 1)]
    kept, report = survey(forms.torn_csv(tmp_path / "csv"))
    example = report.examples["in lines of a table with a quotation mark that is not closed"]
    assert example == f"{tmp_path}/csv/metadata.csv:3"
    assert [sample.captions for sample in kept] == [(forms.caption(n),) for n in (0, 2, 3)]


def test_a_caption_of_a_table_is_whole_or_absent(tmp_path):
    kept, _ = survey(forms.odd_csv(tmp_path))
    assert {sample.key: sample.captions for sample in kept} == {
        "2": ("a house",),
        "3": ("a house, a tree",),
        "4": ("a house\u2028with a door\x0b and a roof",),
    }


def test_a_tar_of_zstd_without_pyarrow_is_a_fault_with_the_remedy(tmp_path, monkeypatch):
    forms.by_pyarrow(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    kept, report = survey(tmp_path / "0.tar.zst")
    assert not kept
    assert report.faults == [
        f"{tmp_path}/0.tar.zst is compressed by zstd, which needs pyarrow; run `pip install "
        "pyarrow`, or unpack it to a .tar."
    ]


def test_tars_of_zstd_and_lz4_are_read_from_s3(tmp_path, s3):
    forms.by_pyarrow(tmp_path)
    for file in tmp_path.iterdir():
        storage.put(file.read_bytes(), f"{s3}/packed/{file.name}")
    kept, report = survey(f"{s3}/packed")
    assert len(kept) == 4 * N and not report.faults and not report.dropped


def test_a_tar_in_a_tar_is_counted_by_name_with_the_remedy(tmp_path):
    _, report = survey(forms.nested(tmp_path))
    assert "1 in an archive inside a tar (unpack it) (such as shards/0.tar)" in str(report)


def test_damaged_captions_of_rows_that_are_kept_are_counted(tmp_path):
    forms.write_files(tmp_path, {"0.jpg": forms.picture(0), "0.txt": b"a house\ncaf\xe9\nx\0y\n"})
    [sample], report = survey(tmp_path)
    assert sample.captions == ("a house",) and report.captions_unread == 2
    assert "1 kept, none dropped; 2 damaged captions" in str(report)


@pytest.fixture(params=["local", "s3"])
def indexed(request, tmp_path):
    """A folder, local or on S3, with a shard of 4 rows and its index."""
    if request.param == "local":
        root = str(tmp_path / "indexed")
    else:
        root = f"{request.getfixturevalue('s3')}/indexed"
        storage.remove_folder(root)
    write_shards(root, drawn_samples(4))
    return root


def test_shards_and_images_that_our_index_does_not_name_are_counted(indexed):
    for name in ("000001.tar", "more.tar.gz", "rows.parquet"):
        storage.put(forms.shard(), f"{indexed}/{name}")
    for name in ("dropped.parquet", "report.html", "inside/0.tar", "photo.JPG"):
        storage.put(b"x", f"{indexed}/{name}")
    kept, report = survey(indexed)
    assert len(kept) == 4
    shards, images = (
        "in shards that are not in the index of their folder",
        "in images beside the shards that the index of their folder names",
    )
    assert dict(report.dropped) == {shards: 3, images: 1}
    assert report.examples == {shards: f"{indexed}/000001.tar", images: f"{indexed}/photo.JPG"}


def test_a_corpus_on_s3_that_may_be_read_but_not_listed_is_read_by_its_index(s3, s3_faults, caplog):
    write_shards(f"{s3}/unlisted", drawn_samples(4))
    s3_faults.deny("list-type=2")
    kept, report = survey(f"{s3}/unlisted")
    assert len(kept) == 4 and not report.dropped
    assert "unlisted is read by its index alone, because it may not be listed" in caplog.text


def test_a_corpus_with_splits_is_read_whole_with_a_warning(tmp_path, caplog):
    survey(forms.splits(tmp_path))
    assert "has files of test, train: they are read as one corpus" in caplog.text
    kept, _ = survey(f"{tmp_path}/train-*")
    assert len(kept) == N


# -- patterns --------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def several(request, tmp_path):
    """A folder, local or on S3, with the shards 0 to 2 of cc3m and of cc12m."""
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/several"
    for number, name in enumerate(("cc3m", "cc12m")):
        for n in range(3):
            storage.put(forms.shard(100 * number + 10 * n), f"{root}/{name}/{n:05d}.tar")
    storage.put(forms.shard(300), f"{root}/[odd]/x.tar")
    return root


@pytest.mark.parametrize(
    "pattern, shards",
    [
        ("{root}/cc3m/{{00000..00001}}.tar", 2),
        ("{root}/cc3m/{{00000..00002}}.tar::{root}/cc12m/{{00000..00000}}.tar", 4),
        ("{root}/{{cc3m,cc12m}}/{{00000..00001}}.tar", 4),
        ("{root}/cc{{3,12}}m/0000{{0..1}}.tar", 4),
        ("{root}/cc3m::{root}/cc12m", 6),
        ("{root}/*/0000[01].tar", 4),
        ("{root}/**/*2.tar", 2),
        ("{root}/cc*", 6),
        ("{root}/cc3m/00000.tar", 1),
        ("{root}/cc3m::{root}/cc3m", 3),
        ("{root}/[odd]", 1),
    ],
)
def test_patterns_name_several_shards_and_corpora(several, pattern, shards):
    kept, report = survey(pattern.format(root=several))
    assert len(kept) == shards * N and not report.faults and not report.dropped


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("{root}/x*.tar", "Nothing matches .*x.*tar"),
        ("{root}/{{3..1}}.tar", "its range ends before it begins"),
        ("gs://bucket/x", "begins with gs://, which is not supported"),
        ("https://example.org/x.tar", "begins with https://"),
        ("{root}/picture.png", "is a picture; give the folder"),
        ("{root}/notes.txt", "no corpus; give a .tar"),
        ("{root}/only", "2 in files of a kind that is not read"),
        ("{root}/a:0,{root}/b:0", "weights of .* are all 0"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, path, sentence):
    forms.write_files(tmp_path, {"picture.png": forms.picture(0, "png"), "notes.txt": "x"})
    forms.write_files(tmp_path / "only", {"a.heic": b"x", "b.psd": b"x"})
    with pytest.raises(UserError, match=sentence):
        find_parts(path.format(root=tmp_path))


def test_output_to_storage_of_another_kind_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for action in (storage.check_writable, storage.absolute, lambda path: storage.put(b"", path)):
        with pytest.raises(storage.StorageError, match="gs://, which is not supported"):
            action("gs://bucket/clean")
    assert not list(tmp_path.iterdir())


def test_relative_paths_in_patterns_hold_in_other_folders(tmp_path, monkeypatch):
    forms.write_files(tmp_path, {"a/0.tar": forms.shard(), "b/0.tar": forms.shard(10)})
    monkeypatch.chdir(tmp_path)
    for path in ("a::b", "{a,b}"):
        parts = find_parts(path)
        assert [part.url for part in parts] == [f"{tmp_path}/a/0.tar", f"{tmp_path}/b/0.tar"]
    assert patterns.absolute("a:0.5,b:0.5") == f"{tmp_path}/a:0.5,{tmp_path}/b:0.5"


def test_the_state_of_a_pattern_changes_with_its_shards(several):
    path = f"{several}/cc3m/{{00000..00001}}.tar::{several}/cc12m"
    before = sources.state(path, find_parts(path))
    assert before == sources.state(path, find_parts(path))
    storage.put(forms.shard(500), f"{several}/cc3m/00002.tar")  # not named by the pattern
    assert before == sources.state(path, find_parts(path))
    storage.put(forms.shard(501), f"{several}/cc3m/00001.tar")
    assert before != sources.state(path, find_parts(path))


# -- storage that fails ----------------------------------------------------------------------------


def test_an_object_that_storage_refuses_is_a_named_fault_and_no_missing_caption(s3, s3_faults):
    for name, content in forms.members():
        storage.put(content, f"{s3}/refused/{name}")
    s3_faults.truncate("000000001.txt", times=99)
    s3_faults.truncate("000000003.jpg", times=99)
    kept, report = survey(f"{s3}/refused")
    assert [sample.key for sample in kept] == ["000000000", "000000002", "000000004"]
    assert dict(report.dropped) == {"with a file that the storage could not give": 2}
    [fault] = report.faults
    assert "2 files of s3://corpus/refused" in fault and "000000001.txt" in fault


def test_a_folder_on_s3_is_read_without_asking_for_files_that_are_not_there(s3, s3_faults):
    for name, content in forms.members():
        storage.put(content, f"{s3}/asked/{name}")
    s3_faults.clear()
    kept, _ = survey(f"{s3}/asked")
    assert len(kept) == N and s3_faults.asked("GET", "/asked/") == 2 * N + 1  # and the index


# -- images ----------------------------------------------------------------------------------------


def test_damaged_exif_and_long_text_do_not_make_a_picture_unusable():
    # Two tags: orientation 6, and a resolution of -1/0.
    tags = struct.pack("<HHHIHHHHIIIii", 2, 0x112, 3, 1, 6, 0, 0x11A, 10, 1, 38, 0, -1, 0)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(buffer))
    assert decode(buffer.getvalue()).size == (10, 20)
    text = PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 3_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(buffer, "PNG", pnginfo=text)
    assert decode(buffer.getvalue()).size == (20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_gives_what_pillow_gives(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(expected))


def test_a_picture_of_too_many_pixels_is_named_so():
    huge = bytearray(forms.picture(0, "png"))
    huge[16:24] = struct.pack(">II", 9000, 8000)  # width and height in the header
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    sample = Sample("x", bytes(huge), "png", ("x",), {})
    assert first_broken(Candidate(sample), header_rules(1)) == "with more than 64 million pixels"


@pytest.mark.parametrize("form", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_decoded_small_to_nearly_the_same_pixels(form):
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC).convert(form)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    whole = centre_crop(decode(buffer.getvalue()), 64).astype(int)
    small = decode_crop(buffer.getvalue(), 64).astype(int)
    assert small.shape == (64, 64, 3) and np.abs(small - whole).mean() < 2
    assert np.array_equal(
        decode_crop(buffer.getvalue(), 400), centre_crop(decode(buffer.getvalue()), 400)
    )


def test_a_photo_of_12_megapixels_is_decoded_for_training_at_an_eighth_of_its_sides(monkeypatch):
    buffer, sizes, load = io.BytesIO(), [], images.load
    Image.new("RGB", (4000, 3000), "red").save(buffer, "JPEG")
    monkeypatch.setattr(images, "load", lambda image: sizes.append(image.size) or load(image))
    decode_crop(buffer.getvalue(), 64)
    assert sizes == [(500, 375)]


# -- damage at random ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "gzip", "parquet"])
def test_a_shard_with_any_bytes_changed_gives_rows_or_a_fault_and_always_ends(tmp_path, kind):
    if kind == "parquet":
        forms.splits(tmp_path)
        whole = (tmp_path / "test-00000-of-00001.parquet").read_bytes()
    else:
        whole = forms.tar_bytes(forms.members(), "w" if kind == "tar" else "w:gz")
    draw = random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            # The beginning of a tar has a header, the end of a Parquet file its footer.
            place = draw.randrange(700)
            data[place if kind != "parquet" else -1 - place] = draw.choice((0, 45, 255))
        if kind == "tar":  # tarfile would refuse any other sum
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
        rows = (
            read_parquet(io.BytesIO(data), "x.parquet", lambda path: (b"", ""))
            if kind == "parquet"
            else read_shard(bytes(data))
        )
        try:
            assert len(list(islice(rows, 100))) < 100
        except ShardError as error:
            assert "x.parquet" in str(error) or "a shard" in str(error)


# -- mixtures --------------------------------------------------------------------------------------


def test_a_mixture_reads_each_corpus_by_its_weight_and_no_row_twice(tmp_path):
    write_shards(tmp_path / "a", drawn_samples(50, 8))
    write_shards(tmp_path / "b", drawn_samples(200, 8))
    parts = find_parts(f"{tmp_path}/a:0.5,{tmp_path}/b:0.5")
    shares = {sources.folder_name(part): part.share for part in parts}
    assert shares == {"a": 1.0, "b": 0.25}
    [three] = {
        part.share for part in find_parts(f"{tmp_path}/a:3,{tmp_path}/b:1") if "/a/" in part.url
    }
    assert three == 1.0


def test_a_mixture_of_shards_that_no_index_counts_is_refused(tmp_path):
    forms.write_files(tmp_path, {"a/0.tar": forms.shard(), "b/0.tar": forms.shard(10)})
    with pytest.raises(ShardError, match="is in no index; write one with `glide clean`"):
        find_parts(f"{tmp_path}/a:0.7,{tmp_path}/b:0.3")


def test_a_mixture_draws_other_rows_in_each_epoch_and_the_same_ones_again(tmp_path):
    write_shards(tmp_path / "a", drawn_samples(16))
    write_shards(tmp_path / "b", drawn_samples(96))
    settings = tiny(
        "base", f"data.corpus={tmp_path}/a:0.5,{tmp_path}/b:0.5", "data.min_size=16", "batch=8"
    )
    first, second = MemoryCorpus(settings), MemoryCorpus(settings)
    epochs = [first._order(epoch).tolist() for epoch in range(30)]
    assert epochs == [second._order(epoch).tolist() for epoch in range(30)]
    of_a = {n for n, (_, part, _) in enumerate(first.rows) if part.share == 1}
    assert len(of_a) == 16 and all(of_a < set(epoch) for epoch in epochs)
    assert np.mean([len(epoch) - 16 for epoch in epochs]) == pytest.approx(16, abs=2.5)
    assert len(set().union(*epochs)) == 112


# -- before training -------------------------------------------------------------------------------


def test_training_on_a_corpus_without_usable_rows_says_why_before_it_starts(tmp_path):
    path = forms.table("metadata.csv", "prompt")(tmp_path)
    with pytest.raises(ShardError) as refusal:
        check_usable(path, find_parts(path), 16, 4)
    assert "0 usable rows, fewer than one batch of 4" in str(refusal.value)
    assert "5 without a caption: metadata.csv has file_name, prompt" in str(refusal.value)
    check_usable(path, find_parts(path, "prompt"), 16, 4)
    with pytest.raises(ShardError, match="5 usable rows, fewer than one batch of 6"):
        check_usable(path, find_parts(path, "prompt"), 16, 6)
