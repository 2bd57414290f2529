"""Odd inputs: each row is kept or counted with a true reason, and one value costs its own row."""

import base64
import io
import json
import math
import os
import stat
import tarfile
from itertools import count

import pyarrow
import pytest
from helpers import corpora as forms
from helpers.corpora import caption, picture, tar_bytes, write_files

from glide_ray import storage
from glide_ray.data.filters import Candidate, Report, first_broken, header_rules
from glide_ray.data.readers.fetch import resolved
from glide_ray.data.sample import ShardError
from glide_ray.data.shards import write_shards
from glide_ray.data.sources import find_parts, named_by_path, read_part
from glide_ray.errors import UserError

N = forms.COUNT


def read(path):
    """(key -> sample of each kept row, report) of a corpus."""
    kept, report, rules = {}, Report(), header_rules(1)
    for part in find_parts(str(path)):
        try:
            for sample in read_part(part):
                reason = first_broken(Candidate(sample), rules)
                report.add(sample.key, reason, sample.captions_unread)
                if reason is None:
                    kept[sample.key] = sample
        except UserError as error:
            report.faults.append(str(error))
    return kept, report


def with_texts(folder, texts, ending="txt"):
    return write_files(
        folder,
        {f"{key}.{ending}": text for key, text in texts.items()}
        | {f"{key}.jpg": picture(n) for n, key in enumerate(texts)},
    )


def tar_with_links(members):
    """A tar of members in order: name -> content, or (type of a link, target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return buffer.getvalue()


# -- captions --------------------------------------------------------------------------------------


def test_entities_of_no_character_and_halves_of_emoji_make_a_caption_damaged(tmp_path):
    with_texts(tmp_path, {"zero": "a house&#0;", "half": "&#xD83D; a house", "whole": "&#128512;"})
    with_texts(tmp_path, {"json": '{"caption": "a \\ud83d house"}'}, "json")
    with_texts(tmp_path, {"pair": '{"caption": "a \\ud83d\\ude00 house"}'}, "json")
    kept, report = read(tmp_path)
    assert {key: sample.captions for key, sample in kept.items()} == {
        "whole": ("😀",),
        "pair": ("a 😀 house",),
    }
    assert report.dropped == {"with a damaged caption (U+FFFD or NUL)": 3}


def test_what_programs_write_for_a_missing_value_is_no_caption(tmp_path):
    with_texts(tmp_path, {"pandas": "<NA>", "sheet": "N/A", "error": "#N/A", "script": "undefined"})
    with_texts(tmp_path, {"infinite": '{"caption": 1e999}', "good": '{"caption": "n/a x"}'}, "json")
    kept, report = read(tmp_path)
    assert list(kept) == ["good"] and report.dropped == {"without a caption": 5}


def test_utf_16_without_a_mark_and_texts_that_are_cut_are_counted(tmp_path):
    with_texts(
        tmp_path,
        {
            "unmarked": "a red house".encode("utf-16-le"),
            "odd": "a red house\na tree".encode("utf-16")[:-1],
            "cut": "a café".encode()[:-1],
            "japanese": "赤い家".encode("shift-jis"),
        },
    )
    kept, report = read(tmp_path)
    assert kept["odd"].captions == ("a red house",) and len(kept) == 1
    assert sum(report.dropped.values()) == 3 and report.captions_unread == 4


def test_the_languages_of_a_map_are_no_captions(tmp_path):
    values = [[("en", caption(n)), ("de", "ein Haus")] for n in range(N)]
    column = pyarrow.array(values, pyarrow.map_(pyarrow.string(), pyarrow.string()))
    forms.parquet(tmp_path / "a.parquet", {"jpg": forms.images(), "caption": column})
    kept, _ = read(tmp_path)
    assert kept["a-000001"].captions == (caption(1), "ein Haus")


# -- folders ---------------------------------------------------------------------------------------


def test_a_picture_with_an_ending_that_is_not_known_is_counted_by_its_text(tmp_path):
    write_files(
        tmp_path,
        dict(forms.members())
        | {"x.jpg_large": picture(1), "x.txt": "x", "y": picture(2), "y.caption": "y"}
        | {"z.jpe": picture(3), "z.txt": "a JPEG all the same", "w_2.txt": "of no picture"},
    )
    kept, report = read(tmp_path)
    assert len(kept) == N + 1 and kept["z"].captions == ("a JPEG all the same",)
    assert report.dropped == {
        "in files with a text beside them, whose ending is not that of a picture": 2,
        "in texts without a picture of their name": 1,
    }


def test_a_folder_of_pictures_with_unknown_endings_is_refused_with_their_number(tmp_path):
    write_files(tmp_path, {"x.photo": picture(1), "x.txt": "x"})
    with pytest.raises(ShardError, match=r"but 1 in files with a text .*\(such as .*x.photo\)"):
        find_parts(str(tmp_path))


def test_notes_beside_shards_are_no_rows(tmp_path):
    write_files(tmp_path, {"0.tar": forms.shard(), "README.txt": "notes"})
    kept, report = read(tmp_path)
    assert len(kept) == N and not report.dropped


def test_links_that_lead_nowhere_are_counted(tmp_path):
    write_files(tmp_path, dict(forms.members()))
    for name in ("x.jpg", "y.tar", "folder"):
        os.symlink(tmp_path / "nowhere" / name, tmp_path / name)
    kept, report = read(tmp_path)
    assert len(kept) == N and report.dropped == {"in links that lead nowhere": 3}


def test_links_of_a_folder_that_lead_in_a_circle_are_counted(tmp_path):
    write_files(tmp_path, dict(forms.members()))
    for name, target in (("x.jpg", "x.jpg"), ("y.jpg", "z.jpg"), ("z.jpg", "y.jpg")):
        os.symlink(tmp_path / target, tmp_path / name)
    kept, report = read(tmp_path)
    assert len(kept) == N and report.dropped == {"in links that lead nowhere": 3}


def test_names_that_are_not_utf_8_are_counted_and_can_be_printed(tmp_path):
    write_files(tmp_path, dict(forms.members()))
    for ending, content in ((b"jpg", picture(9)), (b"txt", b"x"), (b"tar", forms.shard(9))):
        with open(os.fsencode(tmp_path) + b"/caf\xe9." + ending, "wb") as file:
            file.write(content)
    kept, report = read(tmp_path)
    assert len(kept) == N
    assert report.dropped == {"in files whose names are not UTF-8 (rename them)": 2}
    assert b"caf?." in str(report).encode()


def test_a_folder_inside_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write_files(tmp_path, {"0.tar": forms.shard(), "closed/1.tar": forms.shard()})
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(storage.StorageError, match="closed cannot be read: Permission denied"):
        find_parts(str(tmp_path))


def test_an_empty_cell_of_a_table_does_not_hide_a_text(tmp_path):
    table = "file_name,text,license\n0.jpg,from the table,A\n1.jpg,,B\n2.jpg,NaN,\n3.jpg,,\n"
    texts = {f"{n}.txt": f"from a text {n}" for n in range(3)}
    write_files(
        tmp_path, {"metadata.csv": table} | texts | {f"{n}.jpg": picture(n) for n in range(4)}
    )
    kept, report = read(tmp_path)
    assert kept["0"].captions == ("from the table",) and report.dropped == {"without a caption": 1}
    assert kept["1"].captions == ("from a text 1",) and kept["1"].meta == {"license": "B"}
    assert kept["2"].captions == ("from a text 2",)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_table_with_other_separators_is_read(tmp_path, mark):
    rows = [f"{n}.jpg{mark}a house, number {n}" for n in range(N)]
    text = "\n".join([f"file_name{mark}text", *rows])
    write_files(tmp_path, {"metadata.csv": text} | {f"{n}.jpg": picture(n) for n in range(N)})
    kept, report = read(tmp_path)
    assert kept["2"].captions == ("a house, number 2",) and report.kept == N


def test_a_table_that_is_not_read_is_named_where_captions_are_missing(tmp_path):
    pictures = {f"{n}.jpg": picture(n) for n in range(N)}
    write_files(tmp_path, {"labels.csv": "file_name,text\n0.jpg,x\n", "0.txt": "x"} | pictures)
    _, report = read(tmp_path)
    reason = "without a caption: labels.csv is not read (metadata.csv and metadata.jsonl are)"
    assert report.kept == 1 and report.dropped == {reason: N - 1}


def test_texts_named_after_the_whole_name_of_a_picture_are_its_captions(tmp_path):
    names = {"A.jpg": picture(0), "A.jpg.txt": "one", "b.c.JPG": picture(1), "b.c.JPG.json": ""}
    names["b.c.JPG.json"] = json.dumps({"caption": "two"})
    write_files(tmp_path / "folder", names)
    write_files(tmp_path / "tar", {"0.tar": tar_bytes(names.items())})
    for form in ("folder", "tar"):
        kept, report = read(tmp_path / form)
        assert [sample.captions for sample in kept.values()] == [("one",), ("two",)], str(report)


def test_pointers_of_git_lfs_are_named_with_the_remedy(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
    for name in ("0.tar", "1.parquet"):
        write_files(tmp_path / name[:1], {name: pointer})
        _, report = read(tmp_path / name[:1])
        assert f"{name} is a pointer of Git LFS; run `git lfs pull`." in str(report)
    write_files(tmp_path / "2", {"a.jpg": pointer, "a.txt": "x", "b.jpg": picture(0), "b.txt": "x"})
    kept, report = read(tmp_path / "2")
    assert list(kept) == ["b"]
    assert report.dropped == {"in pointers of Git LFS (git lfs pull fetches the files)": 1}


# -- Parquet ---------------------------------------------------------------------------------------


def test_base64_in_each_variant_and_hexadecimal_digits_are_pictures(tmp_path):
    whole = [base64.b64encode(data).decode() for data in forms.images()]
    values = {
        "url-safe": whole[0].replace("+", "-").replace("/", "_"),
        "unpadded": whole[1].rstrip("="),
        "lines": base64.encodebytes(forms.images()[2]).decode(),
        "blanks": f"\n  {whole[3]}\n",
        "charset": f"data:image/jpeg;charset=utf-8;base64,{whole[4]}",
        "octets": f"data:application/octet-stream;base64,{whole[0]}",
        "hexadecimal": forms.images()[1].hex(),
        "PostgreSQL": "\\x" + forms.images()[2].hex(),
    }
    columns = {"key": list(values), "image": list(values.values()), "caption": list(values)}
    forms.parquet(tmp_path / "text.parquet", columns)
    columns["image"] = [value.encode() for value in values.values()]
    forms.parquet(tmp_path / "bytes.parquet", columns | {"key": [f"{one} b" for one in values]})
    kept, report = read(tmp_path)
    assert len(kept) == 2 * len(values), str(report)
    assert {kept[key].image for key in ("octets", "octets b", "url-safe")} == {forms.images()[0]}
    assert not any("image" in sample.meta for sample in kept.values())


def test_text_that_is_neither_base64_nor_a_path_is_named_so_in_few_words(tmp_path):
    columns = {"image": ["x" * 20_000, repr(picture(0)), "a" * 300], "caption": ["x"] * 3}
    forms.parquet(tmp_path / "a.parquet", columns)
    kept, report = read(tmp_path)
    assert not kept and not report.faults and len(str(report)) < 300
    reason = "with an image column that holds neither bytes nor a path"
    assert report.dropped[reason] + report.dropped["without the file that their path names"] == 3


def test_columns_of_numbers_and_objects_are_pictures_or_have_a_true_reason(tmp_path):
    numbers = [[(one + 128) % 256 - 128 for one in data] for data in forms.images()]
    bytes_ = pyarrow.struct([("bytes", pyarrow.list_(pyarrow.uint8()))])
    columns = {
        "signed": pyarrow.array(numbers, pyarrow.list_(pyarrow.int8())),
        "object": pyarrow.array([{"bytes": list(data)} for data in forms.images()], bytes_),
        "pixels": pyarrow.array([[[1, 2], [3, 4]]] * N),
        "floats": pyarrow.array([[0.5, 0.25]] * N),
        "address": [{"src": "http://x/1.jpg", "width": 3}] * N,
    }
    for name, values in columns.items():
        forms.parquet(tmp_path / f"{name}.parquet", {"image": values, "caption": forms.captions()})
    kept, report = read(tmp_path)
    assert {key.split("-")[0] for key in kept} == {"signed", "object"} and len(kept) == 2 * N
    assert report.dropped == {"with an image column that holds neither bytes nor a path": 3 * N}


def test_a_path_of_another_storage_costs_its_own_row(tmp_path):
    write_files(tmp_path, {f"pictures/{n}.jpg": picture(n) for n in range(N)})
    paths = ["pictures/0.jpg", "gs://bucket/1.jpg", "file:///2.jpg", "pictures\\3.jpg", "s3:/x"]
    forms.parquet(tmp_path / "a.parquet", {"image_path": paths, "caption": forms.captions()})
    kept, report = read(tmp_path)
    assert list(kept) == ["a-000000", "a-000003"]
    assert report.dropped == {
        "with a file that the storage could not give": 3,
        "without a caption": 3,  # the pictures that no row names
    }
    assert "3 files of" in report.faults[0] and "gs://, which is not supported" in report.faults[0]


def test_a_column_that_is_there_twice_is_named(tmp_path):
    image, text = pyarrow.array(forms.images()), pyarrow.array(forms.captions())
    table = pyarrow.Table.from_arrays([image, text, text], names=["jpg", "caption", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    _, report = read(tmp_path)
    assert "has several columns named caption; rename all but one" in str(report)


def test_other_names_for_parquet_are_counted(tmp_path):
    write_files(tmp_path, {"0.tar": forms.shard()})
    for name in ("a.pq", "b.parq"):
        forms.parquet(tmp_path / name, {"jpg": forms.images(), "caption": forms.captions()})
    kept, report = read(tmp_path)
    assert len(kept) == N and report.dropped == {"in files of a kind that is not read": 2}


SYMBOLIC, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
LOOPS = {
    "symbolic, to itself": {"x.jpg": (SYMBOLIC, "x.jpg")},
    "symbolic, by another path": {"x.jpg": (SYMBOLIC, "./a/../x.jpg")},
    "two symbolic": {"x.jpg": (SYMBOLIC, "b/y"), "b/y": (SYMBOLIC, "../x.jpg")},
    "symbolic and hard": {"x.jpg": (SYMBOLIC, "y"), "y": (HARD, "x.jpg")},
}
LOST = {
    "symbolic, to nothing": {"x.jpg": (SYMBOLIC, "nothing.jpg")},
    "symbolic, out of the tar": {"x.jpg": (SYMBOLIC, "/photos/0.jpg")},
    "symbolic, to a folder": {"x.jpg": (SYMBOLIC, "b"), "b": (tarfile.DIRTYPE, "")},
    "hard, to itself": {"x.jpg": (HARD, "x.jpg")},
    "hard, to a later member": {"x.jpg": (HARD, "y"), "y": (SYMBOLIC, "000000000.jpg")},
}
LOST_LINK = "with a link to a file that is not in the tar (make it with tar --dereference)"
LOOP = "with a link that leads back to itself (replace it with the file)"


@pytest.mark.parametrize("name", [*LOOPS, *LOST])
def test_a_link_of_a_tar_without_a_file_costs_its_own_row(tmp_path, name):
    links = LOOPS.get(name) or LOST[name]
    members = {"x.txt": b"a house"} | links | dict(forms.members())
    write_files(tmp_path, {"0.tar": tar_with_links(members)})
    kept, report = read(tmp_path)
    assert [*kept] == [f"{n:09d}" for n in range(N)] and not report.faults
    reason = LOOP if name in LOOPS else LOST_LINK
    assert report.dropped[reason] == 1 and report.examples[reason] == "x"


def test_links_of_a_tar_are_followed_to_their_files(tmp_path):
    members = {
        "a/0.jpg": picture(0),
        "0.txt": b"first",
        "1.txt": b"second",
        "2.txt": b"third",
        "b/chain": (SYMBOLIC, "../a/0.jpg"),
        "0.jpg": (HARD, "b/chain"),
        "1.jpg": (SYMBOLIC, "c/../b/chain"),
        "2.jpg": (SYMBOLIC, "2.jpg"),
        "2.png": (SYMBOLIC, "a/0.jpg"),
        "3.jpg": (SYMBOLIC, "a/0.jpg"),
        "3.txt": (SYMBOLIC, "nothing.txt"),
    }
    write_files(tmp_path, {"0.tar": tar_with_links(members)})
    kept, report = read(tmp_path)
    assert {key: (one.image, one.captions) for key, one in kept.items()} == {
        str(n): (picture(0), (text,)) for n, text in enumerate(("first", "second", "third"))
    }
    assert report.examples[LOST_LINK] == "3"


def test_a_link_in_a_tar_that_never_ends_is_followed_among_the_members_before_the_damage(
    tmp_path, monkeypatch
):
    text = b"a house"
    members = {"0.jpg": (SYMBOLIC, "1.jpg"), "0.txt": text, "1.jpg": picture(1), "1.txt": text}
    data = bytearray(tar_with_links(members | {"2.txt": text}))
    header = data.rindex(b"2.txt")
    data[header + 124 : header + 136] = b"-0000003000\0"  # bytes back, to the header of 1.txt
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    write_files(tmp_path, {"0.tar": bytes(data)})
    reads, following = count(), tarfile.TarFile.next

    def read_header(tar):
        assert next(reads) < 100
        return following(tar)

    monkeypatch.setattr(tarfile.TarFile, "next", read_header)
    kept, report = read(tmp_path)
    assert kept["0"].image == kept["1"].image == picture(1)
    assert len(report.faults) == 1 and "broken or cut after 1" in report.faults[0]


BESIDE = {
    "URLs in a column of images": (
        {"image": ["https://x.org/0.jpg", "https://x.org/1.jpg"], "caption": ["a", "b"]},
        {"in Parquet files without images, left aside": 1},
    ),
    "no row": (
        {"image": pyarrow.array([], pyarrow.string()), "caption": []},
        {"in Parquet files without images, left aside": 1},
    ),
    "no captions": (
        {"file_name": ["000000000.jpg", "000000001.jpg"], "score": [0.5, 0.25]},
        {"in Parquet files that name images without captions, left aside": 1},
    ),
    "paths elsewhere": (
        {"path": ["/nowhere/0.jpg", "/nowhere/1.jpg"], "caption": ["a", "b"]},
        {"without the file that their path names": 2},
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_parquet_file_beside_images_hides_none_of_them(tmp_path, name):
    columns, dropped = BESIDE[name]
    write_files(tmp_path, dict(forms.members()))
    forms.parquet(tmp_path / "a.parquet", columns)
    kept, report = read(tmp_path)
    assert {key: one.captions for key, one in kept.items()} == {
        f"{n:09d}": (caption(n),) for n in range(N)
    }
    assert {reason.partition(" (")[0]: rows for reason, rows in report.dropped.items()} == dropped


def test_images_that_a_parquet_file_names_are_read_once_and_the_others_by_their_texts(tmp_path):
    write_files(tmp_path, dict(forms.members(name="images/{n:09d}")))
    names = ["images/000000000.jpg", "images/../images/000000001.jpg"]
    forms.parquet(tmp_path / "metadata.parquet", {"file_name": names, "text": ["first", "second"]})
    kept, report = read(tmp_path)
    captions = [one.captions[0] for one in kept.values()]
    assert captions == ["first", "second", *(caption(n) for n in range(2, N))]
    assert not report.dropped


def test_a_parquet_file_with_other_names_for_its_columns_is_named_with_the_remedy(tmp_path):
    forms.parquet(tmp_path / "a.parquet", {"Photo": forms.images(), "caption": forms.captions()})
    _, report = read(tmp_path)
    [fault] = report.faults
    assert fault.endswith("it has: Photo, caption; rename that of the images to image.")


def test_numbers_that_json_does_not_have_are_written_as_null(tmp_path):
    scores = [math.nan, -math.inf, 0.5, None, 1.0]
    columns = {"jpg": forms.images(), "caption": forms.captions(), "score": scores}
    forms.parquet(tmp_path / "in" / "a.parquet", columns)
    write_shards(tmp_path / "out", read(tmp_path / "in")[0].values())
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        rows = [
            json.loads(tar.extractfile(one).read(), parse_constant=pytest.fail)
            for one in tar
            if one.name.endswith(".json")
        ]
    assert [row.get("score") for row in rows] == [None, None, 0.5, None, 1.0]
    assert [row["caption"] for row in rows] == [caption(n) for n in range(N)]


def test_the_pictures_that_a_parquet_file_names_are_listed_without_reading_them(tmp_path):
    paths = ["../img/0.jpg", "img\\1.jpg", "/img/2.jpg", "http://x/3.jpg", "", None, "gs://b/x"]
    forms.parquet(tmp_path / "sub" / "a.parquet", {"path": paths, "caption": ["x"] * len(paths)})
    forms.parquet(
        tmp_path / "b.parquet", {"jpg": forms.images(), "path": ["x"] * N, "text": ["x"] * N}
    )
    named = [list(named_by_path(part)) for part in find_parts(str(tmp_path))]
    folder = f"{tmp_path}/sub"
    assert named == [[], [f"{folder}/../img/0.jpg", f"{folder}/img/1.jpg", "/img/2.jpg"]]


@pytest.mark.parametrize("path", ["../../a.jpg", "..\\../a.jpg", "./../x/../../a.jpg"])
def test_a_path_leads_out_of_a_folder_on_s3_as_it_does_on_a_disk(path):
    assert resolved("s3://bucket/a//b/c", path) == "s3://bucket/a//a.jpg"


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["s3:/bucket/x", "gs:/x", "HDFS://x", "file:/tmp/x", "hf://x"])
def test_a_mistyped_or_other_scheme_is_no_local_folder(path):
    with pytest.raises(storage.StorageError, match="which is not supported"):
        storage.absolute(path)


def test_a_local_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"a:b/0.tar": forms.shard()})
    assert len(read("a:b")[0]) == N


def test_a_folder_named_as_a_shard_is_read_as_a_folder(tmp_path):
    write_files(tmp_path, {"x.tar/0.jpg": picture(0), "x.tar/0.txt": "x"})
    assert list(read(tmp_path)[0]) == list(read(tmp_path / "x.tar")[0]) == ["0"]


def test_a_device_or_pipe_named_as_a_picture_is_not_opened(tmp_path):
    write_files(tmp_path, dict(forms.members()))
    os.mkfifo(tmp_path / "pipe.jpg")
    assert stat.S_ISFIFO((tmp_path / "pipe.jpg").stat().st_mode)
    assert len(read(tmp_path)[0]) == N


@pytest.mark.parametrize("path", ["", "::"])
def test_an_empty_path_is_refused(path):
    with pytest.raises(ShardError, match="The path of the corpus is empty"):
        find_parts(path)


def test_a_mixture_with_a_weight_that_is_missing_is_explained(tmp_path):
    write_files(tmp_path, {"a/0.tar": forms.shard(), "b/0.tar": forms.shard()})
    with pytest.raises(ShardError, match="a weight for each corpus, as A:0.7,B:0.3"):
        find_parts(f"{tmp_path}/a:0.7,{tmp_path}/b")
