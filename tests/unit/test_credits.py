"""Licences, sources and authors of rows: read from every form, counted, and carried to cards."""

import json
import math
import random
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow
import pytest
from helpers import corpora as forms

from glide_ray.data.card import derived_card, read_card, write_card
from glide_ray.data.credits import AUTHORS, LISTED, NAMES, Credit, Credits, credit_of
from glide_ray.data.patterns import folders
from glide_ray.data.shards import write_shards
from glide_ray.data.sources import find_parts, read_part
from glide_ray.pretrained.card import Card, Source, describe, render
from glide_ray.train import pack

N = forms.COUNT
CREDIT = Credit("example.org", "CC-BY-4.0", "Ann Example")
FIELDS = {"url": "https://www.example.org/1.jpg", "license": "CC-BY-4.0", "author": "Ann Example"}


def counted(rows):
    credits = Credits()
    for meta in rows:
        credits.add(meta)
    return credits


@pytest.mark.parametrize(
    "meta, credit",
    [
        (FIELDS, CREDIT),
        ({"source": "noto@1.2", "licence": "Apache-2.0"}, Credit("noto@1.2", "Apache-2.0")),
        # YFCC and CommonCatalog; OpenImages
        (
            {"licensename": "Attribution", "downloadurl": "http://flickr.com/x", "username": "ann"},
            Credit("flickr.com", "Attribution", "ann"),
        ),
        (
            {
                "License": "https://x/by/2.0/",
                "OriginalURL": "https://c1.flickr.com/a",
                "Author": "",
            },
            Credit("c1.flickr.com", "https://x/by/2.0/"),
        ),
        # the column of LAION-400M, in which nearly every licence is "?"
        ({"LICENSE": "?", "URL": "HTTP://WWW.Example.org:80/a"}, Credit("example.org")),
        ({"license": float("nan"), "source": None, "author": "None"}, Credit()),
        ({"license": {"name": "CC0", "url": "http://x"}}, Credit(licence="CC0")),
        ({"license": ["CC0", None, "MIT", "MIT"]}, Credit(licence="CC0, MIT")),
        ({"license": b"CC0", "author": b"\x89PNG\0"}, Credit(licence="CC0")),
        ({"license": 4.0}, Credit(licence="4")),
        ({"license": np.array(["CC0"], object)}, Credit(licence="CC0")),
        ({"license": math.inf, "author": "a\n b\0"}, Credit(author="a b")),
        ({"source": "s3://bucket/raw/0.tar"}, Credit("s3://bucket")),
        ({"url": "data:image/png;base64,AAAA", "link": "//x.org/a"}, Credit("x.org")),
        ({"url": "http://[broken"}, Credit("http://[broken")),
        ({"license": "x" * 5000}, Credit(licence="x" * 200)),
        ({"caption": "a house", "width": 3}, Credit()),
    ],
)
def test_the_credit_of_a_row_is_found_under_the_usual_names_and_forms(meta, credit):
    assert credit_of(meta) == credit


# -- reading ---------------------------------------------------------------------------------------


def in_a_tar(folder):
    for n in range(N):
        data = json.dumps({"caption": forms.caption(n), **FIELDS})
        forms.write_files(folder / "raw", {f"{n}.jpg": forms.picture(n), f"{n}.json": data})
    files = sorted((folder / "raw").iterdir())
    data = forms.tar_bytes([(file.name, file.read_bytes()) for file in files])
    return forms.write_files(folder / "tar", {"0.tar": data})


def beside_images(folder):
    in_a_tar(folder)
    return folder / "raw"


def in_a_table(name):
    def make(folder):
        rows = [{"file_name": f"{n}.jpg", "text": forms.caption(n), **FIELDS} for n in range(N)]
        if name.endswith("jsonl"):
            text = "\n".join(map(json.dumps, rows))
        else:
            lines = [rows[0].keys(), *(row.values() for row in rows)]
            text = "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines)
        files = {f"{n}.jpg": forms.picture(n) for n in range(N)}
        return forms.write_files(folder, files | {name: text})

    return make


def in_parquet(**columns):
    def make(folder):
        plain = {name: [value] * N for name, value in FIELDS.items()}
        fields = {**plain, **{name: column() for name, column in columns.items()}}
        forms.parquet(
            folder / "a.parquet", {"jpg": forms.images(), "text": forms.captions(), **fields}
        )
        return folder

    return make


def in_coco(folder):
    forms.coco(folder)
    path = folder / "annotations" / "captions_train2017.json"
    content = json.loads(path.read_text())
    content["licenses"] = [{"id": 4, "name": "CC-BY-4.0", "url": "http://x/by"}]
    for image in content["images"]:
        image |= {"license": 4, "flickr_url": FIELDS["url"], "author": "Ann Example"}
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(in_a_tar, id="tar"),
        pytest.param(beside_images, id="json beside images"),
        pytest.param(in_a_table("metadata.jsonl"), id="metadata.jsonl"),
        pytest.param(in_a_table("metadata.csv"), id="metadata.csv"),
        pytest.param(in_coco, id="COCO"),
        pytest.param(in_parquet(), id="Parquet"),
        pytest.param(
            in_parquet(
                license=lambda: [["CC-BY-4.0"]] * N,
                author=lambda: [b"Ann Example"] * N,
                url=lambda: pyarrow.array([FIELDS["url"]] * N).dictionary_encode(),
            ),
            id="Parquet, lists, bytes and categories",
        ),
        pytest.param(
            in_parquet(license=lambda: [{"name": "CC-BY-4.0", "url": "http://x"}] * N),
            id="Parquet, objects",
        ),
    ],
)
def test_licence_source_and_author_are_read_from_every_form_and_survive_writing(tmp_path, make):
    rows = [row for part in find_parts(make(tmp_path / "in")) for row in read_part(part)]
    assert [credit_of(row.meta) for row in rows] == [CREDIT] * N
    write_shards(tmp_path / "out", rows)
    [part] = find_parts(tmp_path / "out")
    assert [credit_of(row.meta) for row in read_part(part)] == [CREDIT] * N


def test_a_column_of_pictures_named_source_is_no_credit(tmp_path):
    make = in_parquet(source=forms.images)
    [part] = find_parts(make(tmp_path))
    assert {credit_of(row.meta) for row in read_part(part)} == {CREDIT}


# -- counting --------------------------------------------------------------------------------------


def test_rows_are_counted_by_licence_source_and_author():
    rows = (
        [FIELDS] * 3 + [{**FIELDS, "author": "Bob"}] + [{"license": "MIT"}, {"url": "http://x/1"}]
    )
    credits = counted([*rows, {}])
    assert credits.licences() == {"CC-BY-4.0": 4, "MIT": 1}
    assert (credits.rows, credits.without_licence, credits.without_source) == (7, 2, 2)
    source = {"package": "example.org", "licence": "CC-BY-4.0", "author": "Ann Example, Bob"}
    assert credits.sources() == [
        {**source, "pictures": 4},
        {"package": "not stated", "licence": "MIT", "pictures": 1},
        {"package": "x", "licence": "not stated", "pictures": 1},
    ]


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_counts_of_parts_add_up_to_those_of_all_rows(parts):
    draws = random.Random(0)
    rows = [
        {"url": f"http://{draws.randrange(9)}.org/", "license": f"L{draws.randrange(3)}"}
        for _ in range(500)
    ]
    whole = Credits()
    for start in range(parts):
        whole.merge(json.loads(json.dumps(counted(rows[start::parts]).as_json())))
    assert whole.sources() == counted(rows).sources()
    expected = Counter((credit_of(row).source, credit_of(row).licence) for row in rows)
    found = {(one["package"], one["licence"]): one["pictures"] for one in whole.sources()}
    assert found == expected and whole.licences() == Counter(row["license"] for row in rows)


def test_memory_does_not_grow_with_the_number_of_names():
    tracemalloc.start()
    rows = ({"url": f"http://{n}.org", "license": f"L{n}", "author": f"{n}"} for n in range(9000))
    assert counted(rows).rows == 9000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # 4.8 MB if all are kept


def test_of_very_many_sources_the_frequent_ones_are_counted_and_the_rest_by_licence():
    often = [{"url": f"http://often{n}.org/", "license": "CC0", "author": "Ann"} for n in range(9)]
    total = Credits()
    for part in range(10):
        rows = [
            {"url": f"http://{part}-{n}.org", "license": f"L{n % 5}", "author": f"{part}/{n}"}
            for n in range(2000)
        ]
        counts = counted([*rows[:1000], *often * 20, *rows[1000:]]).as_json()
        assert len(counts["groups"]) <= NAMES + 7 and len(json.dumps(counts)) < 40_000
        total.merge(counts)
    assert total.rows == 10 * 2180
    assert total.licences() == {"CC0": 1800} | {f"L{n}": 4000 for n in range(5)}
    sources = total.sources()
    assert len(sources) <= LISTED + 6 and sum(one["pictures"] for one in sources) == total.rows
    assert {one["package"]: one["pictures"] for one in sources[:9]} == {
        f"often{n}.org": 200 for n in range(9)
    }
    rest = [one for one in sources if one["package"] == "others"]
    assert {one["licence"] for one in rest} == {f"L{n}" for n in range(5)}


def test_of_very_many_licences_and_authors_the_frequent_ones_are_named():
    rows = [{"license": f"licence {n}", "url": "http://x"} for n in range(3000)]
    credits = counted([FIELDS] * 5 + rows)
    licences = credits.licences()
    assert len(licences) == LISTED + 1 and next(iter(licences)) == "CC-BY-4.0"
    assert list(licences)[-1] == "others" and sum(licences.values()) == 3005
    assert sum(one["pictures"] for one in credits.sources()) == 3005
    rows = [{**FIELDS, "author": f"author {n}"} for n in range(1000)]
    [source] = counted([*[FIELDS] * 5, *rows]).sources()
    assert source["author"].startswith("Ann Example, author ")
    assert source["author"].endswith(" and others") and source["author"].count(",") == AUTHORS - 1


# -- cards -----------------------------------------------------------------------------------------

NOTO = {"package": "noto", "version": "1.2", "style": "Noto", "licence": "Apache-2.0", "url": "u"}
OWN = {"package": "my photos", "licence": "mine", "pictures": 9}


def test_a_card_keeps_what_people_wrote_of_a_source_and_counts_its_rows():
    card = {"about": "emoji", "sources": [{**NOTO, "pictures": 7}], "licences": {"Apache-2.0": 7}}
    rows = counted([{"source": "noto@1.2", "licence": "Apache-2.0"}] * 3)
    derived = derived_card([card], rows, "x")
    assert derived["about"] == "emoji" and derived["sources"] == [{**NOTO, "pictures": 3}]
    assert derived["licences"] == {"Apache-2.0": 3} and derived["rows"] == 3


def test_a_source_without_a_row_left_is_named_only_if_rows_may_be_of_it():
    card = {"sources": [OWN]}
    of_others, unnamed = counted([FIELDS]), counted([FIELDS, {}])
    assert [one["package"] for one in derived_card([card], of_others, "")["sources"]] == [
        "example.org"
    ]
    first = derived_card([card], unnamed, "")
    assert [one["package"] for one in first["sources"]] == ["my photos", "example.org"]
    # its number is unknown now; a second cleaning drops what was counted from rows
    assert "pictures" not in first["sources"][0]
    second = derived_card([first], counted([{}]), "")
    assert second["sources"] == [{"package": "my photos", "licence": "mine"}]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst", ".parquet", ".TAR"])
def test_the_card_of_a_shard_is_that_of_its_folder(ending):
    assert folders(f"data/{{00000..00002}}{ending}") == ["data"]


def test_a_damaged_card_is_reported(tmp_path, caplog):
    (tmp_path / "card.json").write_text('{"sources": [')
    assert read_card(tmp_path) is None
    assert f"{tmp_path}/card.json cannot be read" in caplog.text
    (tmp_path / "card.json").write_text('{"sources": "of another program"}')
    card = derived_card([read_card(tmp_path)], counted([FIELDS]), "x")
    assert [one["package"] for one in card["sources"]] == ["example.org"]


def test_counts_by_licence_reach_the_model_card(tmp_path, tiny_weights):
    card = derived_card([], counted([*[FIELDS] * 1200, {"url": "http://x.org"}]), "photos")
    write_card(tmp_path, card)
    sources = pack.corpus_sources(str(tmp_path))
    assert [(one.name, one.licence, one.pictures) for one in sources] == [
        ("example.org", "CC-BY-4.0", 1200),
        ("x.org", "not stated", 1),
    ]
    assert all(isinstance(one, Source) for one in sources)
    files = (describe(tiny_weights["base"], {}),)
    page = render(Card(name="mine", files=files, sources=sources))
    assert "| 1,200 | Ann Example | CC-BY-4.0 | example.org |" in page
