"""`glide clean`: every rule is counted, near-duplicates are found, kept rows are written unchanged.

No fault in a corpus ends the run.
"""

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
from helpers import corpora as forms
from helpers.api import CascadeBackend, asking
from helpers.drawings import drawn_samples
from helpers.tiny import corpus_settings, tiny
from PIL import Image, ImageDraw

import jobs.filter
from glide_ray import storage
from glide_ray.cli.main import main
from glide_ray.config.data import CleanConfig
from glide_ray.config.overrides import override
from glide_ray.data.card import CARD, read_card, write_card
from glide_ray.data.duplicates import (
    FINGERPRINT_BYTES,
    LUMA,
    MAX_BITS,
    MAX_CHROMA,
    MAX_LUMA,
    find_duplicates,
    fingerprint,
)
from glide_ray.data.filters import NEAR_DUPLICATE, caption_rules, clean_captions, import_rules
from glide_ray.data.images import decode, encode
from glide_ray.data.shards import INDEX, Sample, ShardError, read_shard, write_shards
from glide_ray.data.sources import Part, find_parts, read_part
from glide_ray.distributed import cluster as local
from glide_ray.distributed.curation.clean import clean
from glide_ray.distributed.rows import DROPPED, PAGE, SUMMARY
from glide_ray.distributed.stream import Tally, in_order, open_corpus
from glide_ray.errors import ConfigError, UserError
from glide_ray.sampling.cascade import Cascade
from glide_ray.train.pack import corpus_sources, source_metadata
from glide_ray.train.without_ray import train_alone

pytestmark = pytest.mark.usefixtures("ray_session")


def blobs(n, width=64, height=64):
    """A picture of coloured blobs that differs from that of every other n."""
    coarse = np.random.default_rng(n).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image, form="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def row(n, *captions, image=None, key=None):
    return Sample(
        key or f"row{n}",
        image_bytes(blobs(n)) if image is None else image,
        "png",
        captions or (f"blobs, number {n}",),
        {"number": n},
    )


def settings(*changes):
    return override(CleanConfig(), changes)


def samples_of(path):
    return [sample for part in find_parts(path) for sample in read_part(part)]


def shown(samples):
    """The fields of samples that must survive writing and reading."""
    return [
        (sample.key, sample.image, sample.suffix, sample.captions, sample.meta.get("number"))
        for sample in samples
    ]


def test_a_cleaned_corpus_keeps_its_sources(tmp_path):
    cards = [
        {"about": "blobs", "sources": [{"package": "noto"}, {"package": name}], "rows": 2}
        for name in ("blob", "twemoji")
    ]
    for number, card in enumerate(cards):
        write_shards(tmp_path / f"in{number}", [row(2 * number), row(2 * number + 1, "x")])
        write_card(tmp_path / f"in{number}", card)
    out = str(tmp_path / "out")
    clean(f"{tmp_path}/in{{0,1}}", out, settings())
    assert read_card(out) == {
        "about": "blobs",
        "rows": 2,
        "sources": [{"package": name} for name in ("noto", "blob", "twemoji")],
        "licences": {},
        "without_licence": 2,
        "without_source": 2,
    }


def licensed(n, licence, site="example.org", author="Ann", **more):
    fields = {"license": licence, "url": f"https://www.{site}/{n}.png", "author": author}
    return replace(row(n), meta={**{k: v for k, v in fields.items() if v}, **more})


def test_licences_and_sources_of_the_kept_rows_are_in_card_page_and_output(tmp_path, capsys):
    rows = [licensed(n, "CC-BY-4.0") for n in range(5)] + [licensed(5, "MIT", "b.org", "Bob")]
    rows += [row(6), licensed(7, "", "c.org", ""), replace(licensed(8, "secret"), captions=("x",))]
    write_shards(tmp_path / "in", rows, per_shard=4)
    out = str(tmp_path / "out")
    assert main(["clean", str(tmp_path / "in"), "--out", out, "--set", "per_shard=3"]) == 0
    assert "licences: CC-BY-4.0 5, MIT 1; 2 rows name none" in capsys.readouterr().out
    assert main(["corpus", "--survey", str(tmp_path / "out"), "--min-size", "16"]) == 0
    assert "licences: CC-BY-4.0 5, MIT 1; 2 rows name none" in capsys.readouterr().out
    card = read_card(out)
    assert card == {
        "about": f"Rows of {tmp_path}/in; the json of each row names its source, licence and "
        "author.",
        "rows": 8,
        "licences": {"CC-BY-4.0": 5, "MIT": 1},
        "without_licence": 2,
        "without_source": 1,
        "sources": [
            {"package": "example.org", "licence": "CC-BY-4.0", "author": "Ann", "pictures": 5},
            {"package": "b.org", "licence": "MIT", "author": "Bob", "pictures": 1},
            {"package": "c.org", "licence": "not stated", "pictures": 1},
        ],
    }
    page = storage.read(f"{out}/{PAGE}").decode()
    for text in ("Licences of the kept rows", "no licence named", "CC-BY-4.0", "c.org", "Bob"):
        assert text in page
    assert "secret" not in page
    # Cleaned again without the rows of one licence, by a rule.
    clean(out, str(tmp_path / "again"), settings(), import_rules(["test_clean:is_not_mit"]))
    again = read_card(tmp_path / "again")
    assert (again["rows"], again["licences"]) == (7, {"CC-BY-4.0": 5})
    assert [source["package"] for source in again["sources"]] == ["example.org", "c.org"]
    assert corpus_sources(str(tmp_path / "again"))[0].licence in ("CC-BY-4.0", "not stated")


def is_not_mit(candidate):
    return candidate.meta.get("license") != "MIT"


def test_licences_reach_the_weights_their_model_card_and_the_api(tmp_path, capsys):
    """From rows through cleaning and training without Ray; each credit names site and author."""
    rows = [licensed(n, "CC-BY-4.0") for n in range(8)]
    rows += [licensed(n, "MIT", author="Bob") for n in range(8, 12)] + [row(12)]
    write_shards(tmp_path / "in", rows)
    clean(str(tmp_path / "in"), str(tmp_path / "train"), settings())
    write_shards(tmp_path / "held_out", rows[:2])
    run = [*corpus_settings(tmp_path), "batch=4", "steps=1", "trackers=", "evaluate_every=1"]
    weights = train_alone(tiny("base", *run), tmp_path / "run", progress=False).weights
    exported = tmp_path / "exported.safetensors"
    assert main(["export", str(tmp_path / "run"), "--out", str(exported)]) == 0
    for file in (weights, exported):
        assert main(["card", "--base", str(file)]) == 0
        shown = capsys.readouterr().out
        assert "| 8 | Ann | CC-BY-4.0 | example.org |" in shown
        assert "| 4 | Bob | MIT | example.org |" in shown
        assert "| pictures | author | licence | source |" in shown
    (model,) = asking(CascadeBackend(Cascade.load(weights)))("GET", "/v1/models").json()["data"]
    assert model["licence"] == ["CC-BY-4.0", "MIT"]
    assert model["sources"] == [
        {"package": "example.org", "author": "Ann", "licence": "CC-BY-4.0"},
        {"package": "example.org", "author": "Bob", "licence": "MIT"},
    ]


def test_a_damaged_card_costs_the_sources_but_not_the_weights(tmp_path, caplog):
    preset = tiny("base", f"data.corpus={tmp_path}")
    assert source_metadata(preset) == {}
    write_card(tmp_path, {"sources": [{"style": "flat"}]})
    assert source_metadata(preset) == {}
    assert "do not name the sources of their training pictures: The card of" in caplog.text


def test_a_folder_of_pictures_with_a_table_keeps_licences_and_its_card(tmp_path):
    source, lines = tmp_path / "in", []
    source.mkdir()
    for n in range(4):
        (source / f"{n}.png").write_bytes(image_bytes(blobs(n)))
        line = {"file_name": f"{n}.png", "text": f"blobs {n}", "license": f"L{n % 2}"}
        lines.append(json.dumps({**line, "source": "my photos"}))
    (source / "metadata.jsonl").write_text("\n".join(lines))
    write_card(source, {"about": "mine", "sources": [{"package": "my photos", "licence": "L0"}]})
    clean(str(source), str(tmp_path / "out"), settings())
    card = read_card(tmp_path / "out")
    assert (card["about"], card["licences"]) == ("mine", {"L0": 2, "L1": 2})
    assert [(one["package"], one["licence"], one["pictures"]) for one in card["sources"]] == [
        ("my photos", "L0", 2),
        ("my photos", "L1", 2),
    ]
    licences = [sample.meta["license"] for sample in samples_of(tmp_path / "out")]
    assert licences == ["L0", "L1", "L0", "L1"]


def dropped(out):
    return pyarrow.parquet.read_table(
        pyarrow.BufferReader(storage.read(f"{out}/{DROPPED}"))
    ).to_pylist()


def summary(out):
    return json.loads(storage.read(f"{out}/{SUMMARY}"))


def check_index(out):
    """Check that a corpus index matches the files; returns the number of rows of each shard."""
    index = json.loads(storage.read(f"{out}/{INDEX}"))
    for shard in index["shards"]:
        data = storage.read(f"{out}/{shard['name']}")
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert shard["count"] == len(list(read_shard(data)))
    assert index["count"] == sum(shard["count"] for shard in index["shards"])
    return [shard["count"] for shard in index["shards"]]


# -- rules -----------------------------------------------------------------------------------------

SCRIPT = "<script>alert('x')</script> & a house"
# One row for each rule that drops it, by the name of the rule.
BAD = {
    "without an image": row(10, key="no-image", image=b""),
    "with an unreadable image": row(11, key="no-header", image=b"<html>404 not found</html>"),
    "too small": row(12, key="small", image=image_bytes(blobs(12, 63, 200))),
    "too long and thin": row(13, key="thin", image=image_bytes(blobs(13, 64, 193))),
    "with a broken image": row(14, key="torn", image=image_bytes(blobs(14))[:-60]),
    "without a caption": row(15, "  ", key="silent"),
    "with too short a caption": row(16, "ab", key="short"),
    "with too long a caption": row(17, "word " * 201, key="long"),
    "with a caption in another script": row(18, "красный дом", key="cyrillic"),
    "with boilerplate for a caption": row(
        19, "<marquee>click here</marquee> for more", key="boilerplate"
    ),
    NEAR_DUPLICATE: row(
        20, key="copy", image=image_bytes(blobs(2).resize((65, 65)), "jpeg", quality=80)
    ),
}
GOOD = [
    row(0),
    row(1, SCRIPT),
    row(2, image=image_bytes(blobs(2, 96, 96))),
    row(3, "IMG_0001.jpg", "a third thing", "дом", "ab"),
    row(4, image=image_bytes(blobs(4, 64, 192))),
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory, ray_session):
    """GOOD and BAD in two tar shards and a Parquet file, cleaned.

    Returns (result of `clean`, source folder, output folder, path of the page).
    """
    source, out = tmp_path_factory.mktemp("dirty"), tmp_path_factory.mktemp("clean")
    bad = [sample for name, sample in BAD.items() if name != "without an image"]
    write_shards(source, [*GOOD[:3], *bad[:6], *GOOD[3:], *bad[6:]], per_shard=8)
    (source / INDEX).unlink()
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "key": ["no-image"],
                "image": pyarrow.array([None], pyarrow.binary()),
                "text": ["a house"],
            }
        ),
        source / "999.parquet",
    )
    done = clean(str(source), str(out), settings("per_shard=2"))
    return done, source, out, f"{out}/{PAGE}"


def test_each_rule_drops_its_row_and_is_counted_with_an_example(judged):
    done = judged[0]
    assert (
        dict(done.report.dropped) == dict.fromkeys(BAD, 1)
        and done.report.kept == len(GOOD)
        and not done.report.faults
    )
    assert done.report.examples == {name: sample.key for name, sample in BAD.items()}
    assert all(
        f"1 {name} (such as {sample.key})" in str(done.report) for name, sample in BAD.items()
    )


def test_dropped_rows_are_listed_with_place_reason_and_kept_duplicate(judged):
    _, source, out, _ = judged
    listed = dropped(out)
    assert {line["key"]: line["reason"] for line in listed} == {
        sample.key: name for name, sample in BAD.items()
    }
    assert {line["key"]: line["kept_instead"] for line in listed if line["kept_instead"]} == {
        "copy": "row2"
    }
    for line in listed:
        assert list(line) == ["key", "part", "position", "reason", "kept_instead"]
        assert list(read_part(Part(line["part"])))[line["position"]].key == line["key"]


def test_the_summary_has_the_counts_and_the_settings(judged):
    _, source, out, _ = judged
    counts = summary(out)
    assert (counts["read"], counts["kept"], counts["dropped"], counts["faults"]) == (
        len(GOOD) + len(BAD),
        len(GOOD),
        dict.fromkeys(BAD, 1),
        [],
    )
    assert (
        counts["source"] == str(source)
        and counts["settings"]["per_shard"] == 2
        and CleanConfig(**counts["settings"])
    )
    # Three captions of a row that is kept, and those of four of the five rows that a caption rule
    # drops: an empty text is no caption.
    assert counts["captions_dropped"] == 3 + 4


def test_kept_rows_are_written_in_order_and_complete(judged):
    _, _, out, _ = judged
    kept = [*GOOD[:3], row(3, "a third thing"), GOOD[4]]
    assert shown(samples_of(out)) == shown(kept) and check_index(out) == [2, 1, 2]
    assert {path.name for path in out.iterdir()} == {
        "000000.tar",
        "000001.tar",
        "000002.tar",
        INDEX,
        DROPPED,
        SUMMARY,
        PAGE,
        CARD,
    }


class Page(HTMLParser):
    """The tags, the loaded URLs and the text of an HTML page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.loaded, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [
            value
            for name, value in attributes
            if name in ("src", "srcset", "href", "data", "action", "poster", "background")
        ]

    def handle_data(self, data):
        self.text += data


def test_the_page_names_every_reason_loads_nothing_and_escapes_captions(judged):
    _, _, out, written = judged
    html = (out / PAGE).read_text()
    page = Page(html)
    assert (
        written == f"{out}/{PAGE}"
        and "script" not in page.tags
        and "marquee" not in page.tags
        and "link" not in page.tags
    )
    assert (
        page.loaded
        and all(what.startswith("data:image/") for what in page.loaded)
        and not re.search(r"url\(|@import", html)
    )
    assert (
        all(name in page.text for name in BAD)
        and SCRIPT in page.text
        and "<marquee>click here</marquee>" in page.text
    )
    pictures = [decode(base64.b64decode(what.partition(",")[2])) for what in page.loaded]
    assert all(max(picture.size) <= 112 for picture in pictures)


# -- captions --------------------------------------------------------------------------------------


def why(caption, *changes):
    return clean_captions([caption], caption_rules(settings(*changes)))[1]


def test_each_caption_is_checked_and_a_row_without_good_captions_has_the_first_ones_reason():
    rules = caption_rules(settings())
    assert clean_captions(["ab", "a house", "IMG_1.png", "a tree"], rules) == (
        ("a house", "a tree"),
        None,
    )
    assert clean_captions(["ab", "IMG_1.png"], rules) == ((), "with too short a caption")
    assert clean_captions([], rules) == ((), "without a caption")


@pytest.mark.parametrize(
    "caption",
    [
        "IMG_1234.jpg",
        "DSC00012",
        "dscn0031.JPG",
        "image",
        "Image 12",
        "photo (3).jpeg",
        "Untitled",
        "untitled-1.png",
        "screenshot",
        "Screen Shot",
        "picture.png",
        "figure 3",
        "scan0007",
        "summer-holiday-final2.webp",
        "https://example.org/a",
        "see www.example.org",
        "Click here to buy",
        "Tap here",
        "Click on the image",
        "click to enlarge",
        "Tap to enlarge the image",
        "Hover to enlarge",
        "Image may contain: 1 person, sitting",
        "No image available",
        "stock photo",
        "A man at a desk - Stock Photos",
        "royalty-free vector",
        "Royalty free music",
        "All Rights Reserved.",
        "© 2019 Somebody",
        "Copyright by the author",
        "Copyright 2004",
        "placeholder",
        "Thumbnail",
        "thumbnail image",
        "Lorem ipsum dolor sit amet",
        "default image",
        "Skip to content",
        "Free shipping on all orders",
        "1234",
        "...",
        "(2)",
    ],
)
def test_boilerplate_captions_are_dropped(caption):
    assert why(caption, "min_characters=0") == "with boilerplate for a caption"


@pytest.mark.parametrize(
    "caption",
    [
        "an image of a saint above an altar",
        "a photo of two dogs",
        "a picture frame on a wall",
        "a figure skater",
        "a file cabinet",
        "a scan of a knee",
        "screenshot of a platform game",
        "an untitled painting by Klee",
        "1 dog and 2 cats",
        "7 dwarfs",
        "a click beetle on a leaf",
        "a brass tap on a garden wall",
        "water runs from the tap to the basin",
        "a machine that is used to enlarge photographs",
        "a bruised thumbnail beside a hammer",
        "shelves full of stock",
        "a livestock photographer",
        "copyright, flat icon",
        "a royal, free of worries",
        "a man copying a page by hand",
        "a road sign to the right, reserved for buses",
        "a boat is shipping water",
        "the web page of a spider",
        "a cat in front of a picture of a cat",
        "IMG, a band from Leeds",
        "a jpg logo",
        "no picture on this wall is straight",
    ],
)
def test_captions_that_resemble_boilerplate_are_kept(caption):
    assert why(caption) is None


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("-" * 9000 + "a", None),
        ("_" * 9000 + "\n" + "-" * 9000, "with boilerplate for a caption"),
        ("img" + " " * 9000 + "x", None),
        ("(" * 9000 + "img", "with boilerplate for a caption"),
    ],
)
def test_a_caption_of_thousands_of_punctuation_marks_does_not_end_the_run(caption, reason):
    """A pattern with cubic backtracking would take about an hour for these captions."""
    assert why(caption, "min_characters=0", "max_characters=20000") == reason


def test_captions_are_filtered_by_the_script_of_most_of_their_letters():
    latin, cyrillic, chinese = "a red house", "красный дом", "红色的房子"
    of_another = "with a caption in another script"
    assert [why(text) for text in (latin, cyrillic, chinese)] == [None, of_another, of_another]
    assert [why(text, "scripts=cyrillic") for text in (latin, cyrillic, chinese)] == [
        of_another,
        None,
        of_another,
    ]
    assert [why(text, "scripts=cjk") for text in (latin, cyrillic, chinese)] == [
        of_another,
        of_another,
        None,
    ]
    assert [why(text, "scripts=latin,cjk") for text in (latin, cyrillic, chinese)] == [
        None,
        of_another,
        None,
    ]
    assert [
        why(text, "scripts=") for text in (latin, cyrillic, chinese, "שלום", latin + cyrillic)
    ] == [None] * 5
    assert why("ein größeres Haus, çà et là") is None and why("route 66: 100 km") is None
    # The threshold is four fifths of the letters: 8 of 10 pass, 7 of 9 do not.
    assert why("abcdefgh" + "дб") is None and why("abcdefg" + "дб") == of_another


def test_the_length_limits_of_captions_come_from_the_settings():
    assert (
        why("abc") is None
        and why("ab ") == "with too short a caption"
        and why("ab", "min_characters=2") is None
    )
    assert (
        why("a" * 1000) is None
        and why("a" * 1001) == "with too long a caption"
        and why("a" * 31, "max_characters=30")
    )


# -- user-defined rules ----------------------------------------------------------------------------


@pytest.fixture
def own_rules(tmp_path, monkeypatch):
    """Modules `my_rules` and `torn_rules` in the current folder; yields its parent folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "my_rules.py").write_text(
        "LIMIT = 3\n"
        "def _limit():\n    return LIMIT\n"
        "def is_low(candidate):\n"
        "    return candidate.meta['number'] < _limit() and candidate.picture.width == 64\n"
        "def divides(candidate):\n    return 1 / (candidate.meta['number'] - 1)\n"
        "WORD = 'no function'\n"
    )
    (tmp_path / "here" / "torn_rules.py").write_text("def is_low(candidate)\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rules", None)


def test_a_user_rule_is_counted_by_name_and_rows_on_which_it_raises_are_dropped(
    own_rules,
):
    write_shards(own_rules / "in", [row(n) for n in range(6)], per_shard=3)
    done = clean(
        str(own_rules / "in"),
        str(own_rules / "out"),
        settings(),
        import_rules(["my_rules:is_low", "my_rules:divides"]),
    )
    assert dict(done.report.dropped) == {
        "against the rule my_rules:is_low": 3,
        "on which the rule my_rules:divides raised ZeroDivisionError": 1,
    }
    assert (
        done.report.examples["against the rule my_rules:is_low"] == "row3"
        and not done.report.faults
    )
    assert [sample.key for sample in samples_of(own_rules / "out")] == ["row0", "row2"]


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "my_rulez:is_low",
            "--rule my_rulez:is_low: the module cannot be imported from "
            ".*No module named 'my_rulez'",
        ),
        ("my_rules:is_lo", "--rule my_rules:is_lo: my_rules has no function is_lo"),
        ("my_rules", "'my_rules' is not of the form module:function"),
        ("my_rules:WORD", "WORD is not a function"),
        (":is_low", "':is_low' is not of the form"),
        ("my_rules:", "'my_rules:' is not of the form"),
        (
            "torn_rules:is_low",
            "--rule torn_rules:is_low: the module cannot be imported from .*SyntaxError",
        ),
    ],
)
def test_a_missing_user_rule_is_refused_in_one_sentence(own_rules, name, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        import_rules([name])
    assert "\n" not in str(refusal.value)


# -- output ----------------------------------------------------------------------------------------


def test_a_corpus_is_cleaned_from_s3_to_s3_despite_failing_writes(s3, s3_faults):
    rows = [row(n) for n in range(11)]
    for number in range(3):
        storage.put(as_tar(rows[4 * number : 4 * number + 4]), f"{s3}/raw/{number}.tar")
    s3_faults.answer_503("cleaned/000000.tar", times=1)
    s3_faults.reset("cleaned/000001.tar")
    clean(f"{s3}/raw", f"{s3}/cleaned/", settings("per_shard=5"))
    assert shown(samples_of(f"{s3}/cleaned")) == shown(rows)
    assert check_index(f"{s3}/cleaned") == [4, 4, 3]
    assert s3_faults.befallen["503"] == s3_faults.befallen["reset"] == 1
    assert (
        dropped(f"{s3}/cleaned") == []
        and summary(f"{s3}/cleaned")["kept"] == 11
        and b"blobs, number 3" in storage.read(f"{s3}/cleaned/{PAGE}")
    )


def as_tar(samples):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for sample in samples:
            meta = {"key": sample.key, "captions": list(sample.captions), **sample.meta}
            for suffix, content in (
                (sample.suffix, sample.image),
                ("txt", sample.captions[0].encode()),
                ("json", json.dumps(meta).encode()),
            ):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_the_input_corpus_is_never_overwritten(tmp_path, s3, monkeypatch):
    write_shards(tmp_path / "in", [row(0)])
    storage.put(as_tar([row(0)]), f"{s3}/in/0.tar")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    monkeypatch.chdir(tmp_path)
    for source, out in (
        (tmp_path / "in", tmp_path / "in"),
        ("in", f"{tmp_path}/x/../in/"),
        (f"{tmp_path}/in/{{000000..000000}}.tar", "in"),
        ("in/000000.tar", "in"),
        (tmp_path, "in"),
        (f"{s3}/in", f"{s3}/in/"),
        (f"{s3}/in/{{0..3}}.tar", f"{s3}/in"),
        (f"{s3}/in", f"{s3}/in/clean"),  # the next run would read its own output
        ("in", f"{tmp_path}/in/a/clean"),
    ):
        with pytest.raises(ConfigError, match="write to another folder"):
            clean(str(source), str(out), settings())
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["000000.tar", "000007.tar", "mine.tar", "rows.parquet"])
def test_shards_of_others_are_never_overwritten_or_deleted(tmp_path, name):
    write_shards(tmp_path / "in", [row(0)])
    for folder in (tmp_path / "bare", tmp_path / "indexed"):
        write_shards(folder, [row(1)])
        (folder / "000000.tar").rename(folder / name)
        (folder / INDEX).unlink()
    write_shards(tmp_path / "other", [row(2)])
    (tmp_path / "other" / INDEX).rename(tmp_path / "indexed" / INDEX)
    for folder in (tmp_path / "bare", *([tmp_path / "indexed"] if name != "000000.tar" else [])):
        before = contents(folder)
        for write in (
            lambda: clean(str(tmp_path / "in"), str(folder), settings()),  # noqa: B023
            lambda: write_shards(folder, [row(0)]),  # noqa: B023
        ):
            with pytest.raises(ShardError, match=f"shards that no index names, such as {name}"):
                write()
        assert contents(folder) == before


def test_a_shorter_corpus_deletes_only_shards_of_the_earlier_index(tmp_path):
    out = tmp_path / "out"
    write_shards(tmp_path / "in", [row(0)])
    write_shards(out, [row(n) for n in range(4)], per_shard=1)
    (out / "notes.txt").write_text("mine")
    clean(str(tmp_path / "in"), str(out), settings())
    assert set(contents(out)) == {"000000.tar", INDEX, DROPPED, SUMMARY, PAGE, CARD, "notes.txt"}


def test_a_corpus_that_loses_all_rows_is_reported_as_empty(tmp_path):
    write_shards(tmp_path / "in", [row(n, "ab") for n in range(3)])
    done = clean(str(tmp_path / "in"), str(tmp_path / "out"), settings())
    assert (done.report.kept, dict(done.report.dropped), check_index(tmp_path / "out")) == (
        0,
        {"with too short a caption": 3},
        [],
    )
    gone = clean(f"{tmp_path}/nowhere/{{0..2}}.tar", str(tmp_path / "none"), settings())
    assert (
        gone.report.kept == 0
        and len(gone.report.faults) == 3
        and "nowhere/1.tar" in (tmp_path / "none" / PAGE).read_text()
    )


AWKWARD = [
    "a.b",
    "dir.v1/x",
    "twice",
    "twice",
    "x/twice",
    "ä ö",
    "L" * 150,
    ".hidden",
    "torn\udcff",
    "once",
    "twice",
]


def test_rows_with_unusual_keys_remain_separate(tmp_path):
    write_shards(tmp_path, [row(n, key=key) for n, key in enumerate(AWKWARD)])
    back = samples_of(tmp_path)
    assert [sample.meta["number"] for sample in back] == list(range(len(AWKWARD)))
    assert [sample.key for sample in back] == [key.replace("\udcff", "?") for key in AWKWARD]
    assert [sample.image for sample in back] == [image_bytes(blobs(n)) for n in range(len(AWKWARD))]


# Name of a tar member -> its bytes, and the captions expected for its row.
ODD = {
    "list.json": (b"[1, 2]", "text"),
    "null.json": (b"null", "text"),
    "number.json": (b'{"caption": 12.5}', "12.5"),
    "torn.json": (b'{"caption": ', "text"),
    "latin.json": ('{"caption": "Größe"}'.encode("latin-1"), "text"),
    "half.json": (b'{"caption": "a smile \\ud83d"}', "text"),  # half an emoji
    "nothing.json": (b'{"captions": [null, "a house", 7.5]}', ("a house", "7.5")),
    "dict.json": (b'{"caption": {"en": "a house"}}', "a house"),
}


def test_malformed_metadata_does_not_end_the_run(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for n, (name, (content, _)) in enumerate(ODD.items()):
            for member, data in (
                (f"{name[:-5]}.png", image_bytes(blobs(n))),
                (f"{name[:-5]}.txt", b"text"),
                (name, content),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    done = clean(str(tmp_path / "in"), str(tmp_path / "out"), settings("min_characters=0"))
    assert done.report.kept == len(ODD) and not done.report.faults
    assert [sample.captions for sample in samples_of(tmp_path / "out")] == [
        said if isinstance(said, tuple) else (said,) for _, said in ODD.values()
    ]


# -- near-duplicates -------------------------------------------------------------------------------


def fingerprints(images):
    return np.stack([np.frombuffer(fingerprint(image), np.uint8) for image in images])


def arrow(flip=False):
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).polygon(
        [(10, 48), (50, 12), (50, 36), (86, 36), (86, 60), (50, 60), (50, 84)], fill=(180, 40, 30)
    )
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def test_a_resized_picture_is_a_duplicate_and_a_mirrored_one_is_not():
    images = [
        arrow(),
        arrow(flip=True),
        arrow().resize((192, 192)),
        arrow(flip=True).resize((70, 70)),
    ]
    pixels = np.array([image.width * image.height for image in images])
    assert find_duplicates(fingerprints(images), pixels).tolist() == [2, -1, -1, 1]


def test_the_largest_of_several_copies_is_kept_or_the_first_of_equals():
    prints = fingerprints([blobs(0)] * 5)
    assert find_duplicates(prints, np.array([4, 9, 9, 1, 9])).tolist() == [1, -1, 1, 1, 1]
    assert (
        find_duplicates(prints[:1], np.array([4])).tolist() == [-1]
        and len(find_duplicates(prints[:0], np.array([]))) == 0
    )


def test_a_picture_repeated_20000_times_is_kept_once():
    prints = np.concatenate(
        [np.repeat(fingerprints([blobs(0)]), 20_000, 0), fingerprints([blobs(1)])]
    )
    found = find_duplicates(prints, np.ones(len(prints)))
    assert found[0] == found[-1] == -1 and (found[1:-1] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_equal_those_found_by_comparing_every_pair(seed):
    """Random fingerprints in families around random centres.

    Hashes in a family differ by up to 4 bits, or by far more than MAX_BITS.
    """
    draws = np.random.default_rng(seed)
    centres = draws.integers(20, 236, (60, FINGERPRINT_BYTES), dtype=np.uint8)
    prints = centres[draws.integers(0, 60, 500)]
    for vector in prints:
        for bit in draws.choice(64, 2 if draws.random() < 0.8 else 24, replace=False):
            vector[bit // 8] ^= 1 << (bit % 8)
        of_luma, of_chroma = (
            draws.choice([1, MAX_LUMA // 2, MAX_LUMA]),
            draws.choice([1, MAX_CHROMA // 2, MAX_CHROMA]),
        )
        vector[8 : 8 + LUMA**2] = vector[8 : 8 + LUMA**2] + draws.integers(0, of_luma + 1, LUMA**2)
        vector[8 + LUMA**2 :] = vector[8 + LUMA**2 :] + draws.integers(
            0, of_chroma + 1, FINGERPRINT_BYTES - 8 - LUMA**2
        )
        # Change one byte, by enough to move some fingerprints out of their family.
        vector[draws.integers(8, FINGERPRINT_BYTES)] += draws.choice([0, 3, 6])
    pixels = draws.integers(1, 6, 500)
    bits = np.unpackbits(prints[:, None, :8] ^ prints[None, :, :8], axis=-1).sum(-1)
    differences = np.abs(prints[:, None, 8:].astype(int) - prints[None, :, 8:])
    near = (differences[..., : LUMA**2].max(-1) <= MAX_LUMA) & (
        differences[..., LUMA**2 :].max(-1) <= MAX_CHROMA
    )
    # The search by bands may miss pairs in this range, so there must be none.
    assert not (near & (bits > 5) & (bits <= MAX_BITS)).any()
    is_duplicate = near & (bits <= MAX_BITS)
    expected, stays = np.full(500, -1), []
    for n in sorted(range(500), key=lambda n: (-pixels[n], n)):
        expected[n] = next((better for better in stays if is_duplicate[n, better]), -1)
        stays += [n] if expected[n] == -1 else []
    assert (
        np.array_equal(find_duplicates(prints, pixels), expected)
        and 50 < (expected >= 0).sum() < 450
    )


def copied(image, draws):
    """The picture resized by a factor of 0.5 to 2 (at least 64 pixels) and compressed again.

    Returns (encoded image, suffix).
    """
    width, height = (
        max(64, round(side * scale))
        for side, scale in zip(image.size, [2 ** draws.uniform(-1, 1)] * 2, strict=True)
    )
    filters = [
        Image.Resampling.BILINEAR,
        Image.Resampling.BICUBIC,
        Image.Resampling.LANCZOS,
        *[Image.Resampling.BOX] * (width < image.width),
    ]
    image = image.resize((width, height), draws.choice(filters))
    return (
        (image_bytes(image, "jpeg", quality=int(draws.integers(60, 96))), "jpg")
        if draws.random() < 0.5
        else (image_bytes(image, "webp", quality=int(draws.integers(50, 96))), "webp")
    )


def test_exactly_the_planted_copies_of_emoji_are_found(emoji_corpus, tmp_path):
    copies, draws = 180, np.random.default_rng(0)
    emoji = samples_of(emoji_corpus[0] / "train")
    write_shards(
        tmp_path / "emoji",
        [emoji[n] for n in sorted(draws.choice(len(emoji), 800, replace=False))],
        per_shard=500,
    )
    clean(str(tmp_path / "emoji"), str(tmp_path / "originals"), settings("scripts="))
    originals = samples_of(tmp_path / "originals")
    shards = [
        [(n, sample) for n, sample in enumerate(originals) if n % 8 == shard] for shard in range(8)
    ]
    planted = draws.choice(len(originals), copies)  # with replacement, so some originals repeat
    for number, n in enumerate(planted):
        image, suffix = copied(decode(originals[n].image), draws)
        shards[(n + 1 + draws.integers(7)) % 8].append(
            (n, Sample(f"copy{number}", image, suffix, (f"number {number} of other pictures",), {}))
        )
    family = {sample.key: n for shard in shards for n, sample in shard}
    write_shards(
        tmp_path / "planted",
        [sample for shard in shards for _, sample in shard],
        per_shard=-(-(len(originals) + copies) // 8),
    )
    done = clean(str(tmp_path / "planted"), str(tmp_path / "out"), settings("scripts="))

    assert len(originals) >= 700 and len(family) == len(
        originals
    ) + copies == done.report.kept + len(dropped(tmp_path / "out"))
    lines = dropped(tmp_path / "out")
    assert {line["reason"] for line in lines} == {NEAR_DUPLICATE}
    found = sum(family[line["key"]] == family[line["kept_instead"]] for line in lines)
    print(
        f"{len(originals)} originals, {found} of {copies} copies found, "
        f"{len(lines) - found} false alarms"
    )
    assert found >= 0.99 * copies and len(lines) - found < 0.001 * len(originals)
    pixels = {
        sample.key: np.prod(decode(sample.image).size) for shard in shards for _, sample in shard
    }
    assert all(pixels[line["kept_instead"]] >= pixels[line["key"]] for line in lines)


# -- faults ----------------------------------------------------------------------------------------

SHARDS, EACH = 12, 16
# Shard numbers, by the fault of the shard.
GARBAGE, CUT, GONE, SLOW, TORN, LOST = 3, 5, 8, 1, 6, 9


@pytest.fixture(scope="module")
def faulty(s3):
    """A corpus on S3 with an index and faulty shards.

    Returns (the readable rows of each shard, URL of the corpus).
    """
    rows = [[row(100 * shard + n) for n in range(EACH)] for shard in range(SHARDS)]
    rows[0][3] = row(3, image=b"\xff\xd8\xff and no more of it")
    rows[11][0] = row(1100, image=b"?")
    rows[11][15] = row(1115, image=rows[11][15].image[:-100])
    entries, readable = [], list(rows)
    for number, samples in enumerate(rows):
        data = as_tar(samples)
        entries.append(
            {
                "name": f"{number:06d}.tar",
                "count": EACH,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        members = tarfile.open(fileobj=io.BytesIO(data)).getmembers()
        if number == GARBAGE:  # 3000 random bytes, from the header of the eighth row on
            start, readable[number] = members[3 * 7].offset, samples[:7]
            data = data[:start] + np.random.default_rng(0).bytes(3000) + data[start + 3000 :]
        if number == CUT:  # truncated inside the image of the tenth row
            data, readable[number] = data[: members[3 * 9].offset_data + 100], samples[:9]
        if number != GONE:
            storage.put(data, f"{s3}/faulty/{number:06d}.tar")
    readable[GONE] = []
    storage.put(
        json.dumps({"count": SHARDS * EACH, "shards": entries}).encode(), f"{s3}/faulty/{INDEX}"
    )
    return readable, f"{s3}/faulty"


def add_s3_faults(s3_faults):
    s3_faults.answer_503(seconds=2)
    s3_faults.answer_503(f"faulty/{SLOW:06d}.tar", times=2)
    s3_faults.truncate(f"faulty/{TORN:06d}.tar")
    s3_faults.reset(f"faulty/{LOST:06d}.tar")


def check_faults(report, path, readable, unreadable):
    assert sorted(re.search(r"/(\d{6})\.tar", fault).group(1) for fault in report.faults) == [
        f"{number:06d}" for number in (GARBAGE, CUT, GONE)
    ]
    assert all(f"{path}/" in fault for fault in report.faults)
    assert dict(report.dropped) == unreadable and report.kept == sum(map(len, readable)) - sum(
        unreadable.values()
    )


def test_cleaning_finishes_on_a_corpus_with_every_fault_and_counts_and_names_each(
    faulty, s3, s3_faults, tmp_path
):
    readable, path = faulty
    add_s3_faults(s3_faults)
    done = clean(path, str(tmp_path), settings("per_shard=40"))
    page = tmp_path / PAGE
    check_faults(
        done.report, path, readable, {"with an unreadable image": 2, "with a broken image": 1}
    )
    bad = {line["key"] for line in dropped(tmp_path)}
    assert bad == {"row3", "row1100", "row1115"} and sum(check_index(tmp_path)) == done.report.kept
    assert shown(samples_of(tmp_path)) == shown(
        sample for shard in readable for sample in shard if sample.key not in bad
    )
    assert (
        s3_faults.befallen["503"] >= 3
        and s3_faults.befallen["truncate"] == s3_faults.befallen["reset"] == 1
    )
    html = storage.read(page).decode()
    assert (
        all(f"{path}/{number:06d}.tar" in html for number in (GARBAGE, CUT, GONE))
        and len(summary(tmp_path)["faults"]) == 3
    )
    assert 1 <= s3_faults.asked("GET", "list-type=2") <= 6  # one listing and its retries


def test_a_training_stream_counts_and_names_the_same_faults(faulty, s3_faults):
    readable, path = faulty
    add_s3_faults(s3_faults)
    tally = Tally.remote()
    rows = open_corpus(path, 64, tally).take_all()
    assert (
        s3_faults.befallen["503"] >= 3
        and s3_faults.befallen["truncate"] == s3_faults.befallen["reset"] == 1
    )
    check_faults(ray.get(tally.report.remote()), path, readable, {"with an unreadable image": 2})
    assert sorted(row["key"] for row in rows) == sorted(
        sample.key
        for shard in readable
        for sample in shard
        if sample.key not in ("row3", "row1100")
    )


def test_an_unreadable_index_is_an_error_and_not_ignored(faulty, s3_faults):
    s3_faults.truncate(INDEX, times=99)
    with pytest.raises(storage.StorageError, match=INDEX):
        find_parts(faulty[1])


def test_a_corrupt_parquet_file_is_named_and_does_not_end_the_run(tmp_path):
    rows = [row(n) for n in range(200)]
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "key": [sample.key for sample in rows],
                "image": [sample.image for sample in rows],
                "text": [sample.captions[0] for sample in rows],
            }
        ),
        tmp_path / "0.parquet",
        row_group_size=50,
    )
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    place = (
        pyarrow.parquet.ParquetFile(tmp_path / "0.parquet")
        .metadata.row_group(2)
        .column(1)
        .data_page_offset
    )
    data[place : place + 4000] = np.random.default_rng(0).bytes(4000)
    (tmp_path / "0.parquet").write_bytes(data)
    read = []
    with pytest.raises(ShardError, match="0.parquet") as fault:
        read.extend(sample.key for sample in read_part(Part(str(tmp_path / "0.parquet"))))
    assert (
        50 < len(read) <= 100
        and read == [f"row{n}" for n in range(len(read))]
        and f"after its first {len(read)} rows" in str(fault.value)
    )


# -- reading ---------------------------------------------------------------------------------------


def test_parquet_with_paths_of_image_files_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    for n in range(3):
        (tmp_path / "images" / f"{n}.png").write_bytes(image_bytes(blobs(n)))
    paths = [
        "images/0.png",
        str(tmp_path / "images" / "1.png"),
        "images/gone.png",
        "https://example.org/x.png",
        None,
    ]
    for name, column in (
        ("path", paths),
        ("file_name", paths),
        ("image", paths),
        ("jpg", [{"bytes": None, "path": path} for path in paths]),
    ):
        pyarrow.parquet.write_table(
            pyarrow.table({name: column, "caption": [f"number {n}" for n in range(5)]}),
            tmp_path / "rows.parquet",
        )
        rows = list(read_part(Part(str(tmp_path / "rows.parquet"))))
        assert [sample.image for sample in rows] == [
            image_bytes(blobs(0)),
            image_bytes(blobs(1)),
            b"",
            b"",
            b"",
        ], name
        assert [sample.captions for sample in rows] == [(f"number {n}",) for n in range(5)]


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_of_images_is_read_with_captions_in_text_files_or_a_list(
    tmp_path, request, remote
):
    root = f"{request.getfixturevalue('s3')}/folder" if remote else str(tmp_path)
    listed = [
        {"file_name": "listed.png", "text": "from the list"},
        {"file_name": "several.png", "captions": ["one", "another"]},
        {"file_name": "empty.png", "text": None},
    ]
    for name, content in (
        ("a.b.c.png", image_bytes(blobs(0))),
        ("a.b.c.txt", b"from a text\n"),
        ("described.jpg", image_bytes(blobs(1), "jpeg")),
        ("described.json", b'{"caption": "from a json", "number": 5}'),
        ("silent.webp", image_bytes(blobs(2), "webp")),
        ("CAPITALS.JPG", image_bytes(blobs(3), "jpeg")),
        ("CAPITALS.txt", b"in capitals"),
        *((f"sub/{line['file_name']}", image_bytes(blobs(4 + n))) for n, line in enumerate(listed)),
        ("sub/metadata.jsonl", "\n".join(map(json.dumps, listed)).encode() + b"\n{torn"),
    ):
        storage.put(content, f"{root}/{name}")
    part, aside = find_parts(root)
    assert aside.aside == (
        (f"{root}/sub/metadata.jsonl:4", "in lines of a table that are not JSON"),
    )
    rows = {sample.key: sample for sample in read_part(part)}
    assert {key: sample.captions for key, sample in rows.items()} == {
        "a.b.c": ("from a text",),
        "described": ("from a json",),
        "silent": (),
        "CAPITALS": ("in capitals",),
        "listed": ("from the list",),
        "several": ("one", "another"),
        "empty": (),
    }
    assert rows["described"].meta["number"] == 5 and all(
        decode(sample.image).size == (64, 64) for sample in rows.values()
    )


def test_a_range_of_shards_is_not_listed_and_a_folder_with_an_index_once(s3, s3_faults):
    for number in range(4):
        storage.put(as_tar([row(number)]), f"{s3}/ranged/{number:04d}.tar")
    storage.put(
        json.dumps(
            {"shards": [{"name": f"{number:04d}.tar", "count": 1} for number in range(3)]}
        ).encode(),
        f"{s3}/ranged/{INDEX}",
    )

    def keys(path):
        return sorted(row["key"] for row in open_corpus(path, 64).take_all())

    assert (
        keys(f"{s3}/ranged/{{0001..0003}}.tar") == ["row1", "row2", "row3"]
        and s3_faults.asked("GET", INDEX) == s3_faults.asked("GET", "list-type=2") == 0
    )
    assert keys(f"{s3}/ranged") == ["row0", "row1", "row2"]
    assert s3_faults.asked("GET", "list-type=2") == 1  # for shards beside the index
    assert s3_faults.asked("HEAD", "") == 0
    storage.put(b'{"of": "another program"}', f"{s3}/ranged/{INDEX}")
    assert (
        keys(f"{s3}/ranged") == ["row0", "row1", "row2", "row3"]
        and s3_faults.asked("GET", "list-type=2") == 2
    )
    with pytest.raises(ShardError, match="0003..0000"):
        find_parts(f"{s3}/ranged/{{0003..0000}}.tar")


def test_the_metadata_of_img2dataset_beside_a_shard_is_not_read_as_data(tmp_path):
    (tmp_path / "00000.tar").write_bytes(as_tar([row(0)]))
    for name in ("00000", "00001"):
        pyarrow.parquet.write_table(
            pyarrow.table({"url": ["http://x/y.jpg"], "caption": ["z"], "key": ["000"]}),
            tmp_path / f"{name}.parquet",
        )
    (tmp_path / "00000_stats.json").write_text("{}")
    shard, aside = find_parts(tmp_path)
    assert shard.url == str(tmp_path / "00000.tar")
    assert [file for file, _ in aside.aside] == [str(tmp_path / "00001.parquet")]


def test_the_metadata_of_img2dataset_beside_a_folder_of_images_is_not_read_as_data(tmp_path):
    (tmp_path / "00000").mkdir()
    for sample in drawn_samples(3):
        (tmp_path / "00000" / f"{sample.key}.jpg").write_bytes(
            encode(np.asarray(decode(sample.image)), "jpeg")
        )
        (tmp_path / "00000" / f"{sample.key}.json").write_text(
            json.dumps({"caption": sample.captions[0], "url": "http://example.org/1.jpg"})
        )
    pyarrow.parquet.write_table(
        pyarrow.table({"url": ["http://example.org/1.jpg"] * 3, "caption": ["a"] * 3}),
        tmp_path / "00000.parquet",
    )
    found = [sample for part in find_parts(tmp_path) for sample in read_part(part)]
    assert [sample.captions for sample in found] == [
        sample.captions[:1] for sample in drawn_samples(3)
    ] and all(sample.image for sample in found)


@pytest.mark.usefixtures("ray_session")
def test_an_unwritable_destination_is_reported_before_anything_is_read(tmp_path, caplog):
    caplog.set_level("INFO", "glide_ray")
    write_shards(tmp_path / "raw", drawn_samples(4))
    with pytest.raises(UserError, match="Nothing can be written to /proc/corpus"):
        clean(str(tmp_path / "raw"), "/proc/corpus", CleanConfig())
    assert not [record for record in caplog.records if record.name.startswith("glide_ray")]


def test_tables_of_tasks_are_sorted_into_the_order_of_the_corpus():
    tables = [
        pyarrow.table({"part": [part] * 2, "position": [first, first + 1], "n": [first, first + 1]})
        for part, first in ((1, 0), (0, 2), (0, 0))
    ]
    assert in_order([tables[0][:0], *tables])["n"].to_pylist() == [0, 1, 2, 3, 0, 1] and not len(
        in_order([tables[0][:0]])
    )


@pytest.mark.usefixtures("ray_session")
def test_a_job_repeats_its_work_if_the_source_changed_or_the_result_was_overwritten(
    tmp_path, capsys, monkeypatch
):
    def job():
        monkeypatch.setattr(
            sys, "argv", ["filter.py", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
        )
        assert jobs.filter.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    write_shards(tmp_path / "raw", drawn_samples(4))
    assert not job()["done_before"] and job()["done_before"]
    write_shards(tmp_path / "raw", drawn_samples(7))
    assert not (grown := job())["done_before"] and job() == {**grown, "done_before": True}
    write_shards(tmp_path / "other", drawn_samples(2))
    clean(str(tmp_path / "other"), str(tmp_path / "out"), CleanConfig())
    assert job() == grown


def test_the_address_for_jobs_is_refused_as_the_address_of_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr(local.ray, "is_initialized", lambda: False)
    with pytest.raises(
        UserError, match="RAY_ADDRESS=http://127.0.0.1:8265 is not where a driver joins a cluster"
    ):
        local.connect(1)


def test_a_tar_of_a_folder_is_read(tmp_path):
    """`tar -cf x.tar .` writes ./KEY.jpg, and macOS adds ._KEY.jpg."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (
            ("./._00.JPG", b"resource fork"),
            ("./00.JPG", image_bytes(blobs(0), "jpeg")),
            ("./00.txt", b"zero"),
            ("./\udcff.png", image_bytes(blobs(2))),
            ("./sub.v2/01.png", image_bytes(blobs(1))),
            ("./sub.v2/01.txt", b"one"),
            ("./02.txt", b"no picture"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = list(read_shard(tmp_path / "x.tar"))
    assert [(sample.key, sample.captions) for sample in rows] == [
        ("00", ("zero",)),
        ("?", ()),
        ("sub.v2/01", ("one",)),
        ("02", ("no picture",)),
    ]
    assert (
        all(decode(sample.image).size == (64, 64) for sample in rows[:3]) and rows[3].image == b""
    )


# -- command line ----------------------------------------------------------------------------------


def test_the_command_prints_counts_and_writes_to_the_current_folder_wherever_ray_started(
    tmp_path, monkeypatch, capsys
):
    write_shards(
        tmp_path / "in", [*drawn_samples(8), BAD["with too short a caption"], *drawn_samples(1)]
    )
    monkeypatch.chdir(tmp_path)
    assert main(["clean", "in", "--out", "out", "--set", "per_shard=5"]) == 0
    printed = capsys.readouterr().out
    assert (
        "8 kept; dropped: 1 with too short a caption (such as short), "
        "1 near-duplicates of another (such as 00000)" in printed
    )
    assert (
        "8 rows in shards of at most 5" in printed
        and f"out/{PAGE}" in printed
        and check_index(tmp_path / "out") == [5, 3]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["in", "--out", "out", "--set", "min_sise=3"],
            "There is no setting 'min_sise'; did you mean 'min_size'?",
        ),
        (["in", "--out", "out", "--set", "per_shard=0"], "per_shard"),
        (["in", "--out", "out", "--set", "min_size"], "not of the form key=value"),
        (["in", "--out", "in/"], "write to another folder"),
        (["nowhere", "--out", "out"], "There is no corpus"),
        (["in", "--out", "out", "--rule", "nothing:there"], "cannot be imported"),
        (["s3://", "--out", "out"], "names no bucket"),
    ],
)
def test_invalid_requests_are_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, arguments, message
):
    write_shards(tmp_path / "in", [row(0)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["clean", *arguments]) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("glide: ")
        and printed.err.count("\n") == 1
        and message in printed.err
        and not printed.out
    )
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_which_no_row_is_kept_ends_with_status_2_and_the_reasons(tmp_path, capsys):
    forms.table("metadata.csv", "prompt")(tmp_path / "in")
    out = str(tmp_path / "out")
    assert main(["clean", str(tmp_path / "in"), "--out", out, "--set", "min_size=16"]) == 2
    shown = capsys.readouterr()
    assert "5 without a caption: metadata.csv has file_name, prompt" in shown.out
    assert "No row of" in shown.err and "is kept" in shown.err


def test_an_unknown_script_is_refused_and_case_does_not_matter():
    assert override(CleanConfig(), ["scripts=Latin,CJK"]).scripts == ("latin", "cjk")
    with pytest.raises(ConfigError, match="no letters are named 'latn' by Unicode; it has arabic"):
        override(CleanConfig(), ["scripts=latn"])


def test_the_index_of_an_earlier_corpus_is_removed_before_another_is_written(s3, tmp_path):
    from glide_ray.data.shards import begin

    for folder in (tmp_path / "c", f"{s3}/begun"):
        write_shards(folder, drawn_samples(2))
        begin(folder)
        with pytest.raises(storage.MissingError):
            storage.read(f"{folder}/index.json")
        begin(folder)
