"""Corpora in the forms in which people have them, and in which they are damaged.

Each function makes one form in a folder and returns the path to read. The forms follow public
reports of users of img2dataset, webdataset, open_clip, Hugging Face datasets and Pillow.
"""

import io
import json
import os
import tarfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

COUNT = 5  # rows of a shard


def picture(n, form="jpeg", side=32, **options):
    coarse = np.random.default_rng(n).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    image.save(buffer, form, **options)
    return buffer.getvalue()


def caption(n):
    return f"a red house, number {n}"


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def tar_bytes(members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members(first=0, name="{n:09d}", image="jpg", text="txt"):
    """Files of `COUNT` rows: an image and a text each."""
    for n in range(first, first + COUNT):
        yield name.format(n=n) + f".{image}", picture(n)
        yield name.format(n=n) + f".{text}", caption(n).encode()


def shard(first=0, **names):
    return tar_bytes(members(first, **names))


def parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


# -- img2dataset -----------------------------------------------------------------------------------


def files_output(folder):
    """output_format=files, whose last shard has only failures: a Parquet file and no images."""
    for number in range(2):
        write_files(folder / f"{number:05d}", dict(members(COUNT * number)))
    for number in range(3):
        parquet(
            folder / f"{number:05d}.parquet",
            {"key": ["0"], "caption": ["x"], "url": ["http://x/1.jpg"], "status": ["failed"]},
        )
    return str(folder)


def url_list(folder):
    write_files(folder, dict(members()))
    parquet(folder / "laion.parquet", {"URL": ["http://x/1.jpg"], "TEXT": ["x"]})
    return str(folder)


def gaps(folder):
    write_files(folder, {f"{n:05d}.tar": shard(n * COUNT) for n in (0, 1, 7)})
    return f"{folder}/{{00000..00299}}.tar"


# -- tars ------------------------------------------------------------------------------------------


def dots_in_keys(folder):
    return write_files(folder, {"0.tar": shard(name="photo.v1.{n:03d}")})


def compound_endings(folder):
    other = [
        file
        for n in range(COUNT)
        for file in ((f"s{n}.input.jpg", picture(n)), (f"s{n}.outputs.txt", caption(n)))
    ]
    return write_files(folder, {"0.tar": shard(), "1.tar": tar_bytes(other)})


def unsorted(folder):
    files = list(members())
    return write_files(folder, {"0.tar": tar_bytes(files[::2] + files[::-2])})


def compressed(folder):
    return write_files(
        folder,
        {
            "0.tar.gz": tar_bytes(members(), "w:gz"),
            "1.tar": tar_bytes(members(COUNT), "w:gz"),
            "2.tar.bz2": tar_bytes(members(2 * COUNT), "w:bz2"),
            "3.tgz": tar_bytes(members(3 * COUNT), "w:gz"),
            "4.tar.xz": tar_bytes(members(4 * COUNT), "w:xz"),
        },
    )


def cut_gzip(folder):
    """The bytes of the first two rows are whole."""
    data, packer = shard(), zlib.compressobj(wbits=31)
    third = data.index(b"000000002.jpg")
    whole = packer.compress(data[:third]) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(data[third:]) + packer.flush()
    return write_files(folder, {"0.tar.gz": whole + rest[:20], "1.tar": shard(COUNT)})


def frames(data, codec="zstd"):
    """Two frames, after one without content, as pzstd writes them."""
    empty = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4) if codec == "zstd" else b""
    halves = (data[: len(data) // 2], data[len(data) // 2 :])
    return empty + b"".join(pyarrow.compress(half, codec, asbytes=True) for half in halves)


def by_pyarrow(folder):
    return write_files(
        folder,
        {
            "0.tar.zst": pyarrow.compress(shard(), "zstd", asbytes=True),
            "1.tzst": frames(shard(COUNT)),
            "2.tar.lz4": frames(shard(2 * COUNT), "lz4"),
            "3.tar": pyarrow.compress(shard(3 * COUNT), "zstd", asbytes=True),
        },
    )


def cut_zstd(folder):
    """Cut before the first block is whole."""
    data = pyarrow.compress(shard(), "zstd", asbytes=True)
    return write_files(folder, {"0.tar.zst": data[:20], "1.tar": shard()})


def joined(folder):
    return write_files(folder, {"0.tar": shard() + shard(COUNT)})


def joined_with_garbage(folder):
    return write_files(folder, {"0.tar": shard() + b"x" * 700})


def nested(folder):
    return write_files(folder, {"all.tar": tar_bytes([("shards/0.tar", shard())])})


def same_keys(folder):
    same = [file for n in range(COUNT) for file in (("a.jpg", picture(n)), ("a.txt", caption(n)))]
    return write_files(folder, {"0.tar": shard(), "1.tar": shard(), "2.tar": tar_bytes(same)})


def same_keys_apart(folder):
    files = [("a.jpg", picture(0)), ("a.jpg", picture(1)), ("a.txt", "b"), ("a.txt", "c")]
    return write_files(folder, {"0.tar": tar_bytes([*files, *members()])})


def endless(folder):
    """One byte of a header is changed, so that tarfile goes back (CVE-2025-8194)."""
    data = bytearray(shard())
    header = data.index(b"000000002.jpg")
    data[header + 124] = ord("-")  # of the size
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return write_files(folder, {"0.tar": bytes(data)})


def endings(folder):
    kinds = {"JPG": "jpeg", "Jpeg": "jpeg", "PNG": "png", "jfif": "jpeg", "gif": "gif"}
    kinds |= {"bmp": "bmp", "tif": "tiff", "avif": "avif", "webp": "webp", "jp2": "jpeg2000"}
    files = [
        file
        for n, (ending, form) in enumerate(kinds.items())
        for file in ((f"{n}.{ending}", picture(n, form)), (f"{n}.txt", caption(n)))
    ]
    other = [("10.heic", b"heic"), ("10.txt", "x")]
    write_files(folder / "folder", dict([*files, *other]))
    return write_files(folder, {"0.tar": tar_bytes([*files, *other])})


# -- folders ---------------------------------------------------------------------------------------


def lines(folder):
    for n in range(COUNT):
        write_files(
            folder, {f"{n}.jpg": picture(n), f"{n}.txt": f"one {n}\r\ntwo {n}\n\nthree {n}\n"}
        )
    return str(folder)


def table(name, field):
    def make(folder):
        rows = [(f"./sub/{n}.jpg" if n % 2 else f"sub\\{n}.jpg", caption(n)) for n in range(COUNT)]
        text = (
            "".join(json.dumps({"file_name": file, field: text}) + "\n" for file, text in rows)
            if name.endswith("jsonl")
            else f"file_name,{field}\n" + "".join(f'{file},"{text}"\n' for file, text in rows)
        )
        return write_files(
            folder, {name: text} | {f"sub/{n}.jpg": picture(n) for n in range(COUNT)}
        )

    return make


def torn_jsonl(folder):
    """The last line is cut, one is no JSON, and one names no file."""
    lines = [json.dumps({"file_name": f"{n}.jpg", "text": caption(n)}) for n in range(COUNT)]
    lines[1:1] = ["# a comment", json.dumps({"text": "no file"}), ""]
    text = "\n".join(lines)[:-12]
    return write_files(
        folder, {"metadata.jsonl": text} | {f"{n}.jpg": picture(n) for n in range(COUNT)}
    )


def torn_csv(folder):
    """Quotation marks without a partner, in the middle and where the file is cut."""
    lines = ["file_name,text,url"]
    lines += [f'{n}.jpg,"{caption(n)}",http://x/{n}' for n in range(COUNT)]
    lines[2] = lines[2].replace('",', ",")
    return write_files(
        folder,
        {"metadata.csv": "\n".join(lines)[:-20]} | {f"{n}.jpg": picture(n) for n in range(COUNT)},
    )


def odd_csv(folder):
    """More and fewer fields than the heading, a comma at the end, other separators of lines."""
    rows = ["0.jpg,a house, a tree", "1.jpg", "2.jpg,a house,", '3.jpg, "a house, a tree"']
    rows += ["4.jpg,a house\u2028with a door\x0b and a roof"]
    text = "\r\n".join(["file_name,text", *rows])
    return write_files(
        folder, {"metadata.csv": text} | {f"{n}.jpg": picture(n) for n in range(COUNT)}
    )


def torn_coco(folder):
    coco(folder)
    path = folder / "annotations" / "captions_train2017.json"
    path.write_bytes(path.read_bytes()[:-9])
    return write_files(folder, {"annotations/captions_val2017.json": '{"info": 1}'})


def other_archives(folder):
    files = dict.fromkeys(("a.zip", "b.tar.lzma", "c.tar.br", "d.tar.gz.zst"), b"x")
    return write_files(folder, dict(members()) | files)


def flickr(folder):
    rows = [f"{n}.jpg,{text}" for n in range(COUNT) for text in (caption(n), "another")]
    text = "image,caption\n" + "".join(f"{row}\n" for row in rows)
    text = text.replace(", number", " number")
    return write_files(
        folder, {"captions.txt": text} | {f"Images/{n}.jpg": picture(n) for n in range(COUNT)}
    )


def listed_without_image(folder):
    table("metadata.csv", "text")(folder)
    (folder / "sub" / "0.jpg").unlink()
    return str(folder)


def coco(folder):
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(COUNT)]
    texts = [{"image_id": n % COUNT, "caption": f"{caption(n)} "} for n in range(3 * COUNT)]
    content = json.dumps({"images": images, "annotations": texts})
    files = {f"train2017/{image['file_name']}": picture(image["id"]) for image in images}
    return write_files(folder, {"annotations/captions_train2017.json": content, **files})


def caption_files(folder):
    return write_files(folder, dict(members(text="caption")))


def apart(folder):
    for name, content in members():
        write_files(folder, {("images/" if name.endswith("jpg") else "texts/") + name: content})
    return str(folder)


def links(folder):
    write_files(folder / "in" / "own", {"0.tar": shard()})
    write_files(folder / "elsewhere", {"0.tar": shard(COUNT)})
    os.symlink(folder / "elsewhere", folder / "in" / "linked")
    os.symlink(folder / "in", folder / "in" / "own" / "loop")
    return f"{folder}/in"


def hidden(folder):
    return write_files(
        folder, dict(members()) | {"._0.jpg": b"x", ".ipynb_checkpoints/0.jpg": b"x"}
    )


def encodings(folder):
    texts = {
        "bom": b"\xef\xbb\xbfa red house",
        "utf16": "a red house".encode("utf-16"),
        "utf32": "a red house".encode("utf-32"),
        "cp1252": "a café".encode("cp1252"),
        "nul": b"a red\0 house\0",
        "marks": "\u200b\u200ea \u202ered house",
        "html": b"<p>a red &amp; blue &lt;house&gt;</p>",
        "none": b"None",
        "nan": b"nan",
        "null": b"null",
        "empty": b" \n\n",
        "script": b"<script>alert(1)</script> & a house",
    }
    return write_files(
        folder,
        {f"{key}.txt": text for key, text in texts.items()}
        | {f"{key}.jpg": picture(n) for n, key in enumerate(texts)},
    )


def json_forms(folder):
    forms = {
        "nan": '{"caption": NaN}',
        "empty_list": '{"captions": []}',
        "objects": '{"captions": [{"id": 1, "caption": "from an object"}]}',
        "text": '{"text": "from text"}',
        "list": '["one", "two"]',
        "languages": '{"caption": {"en": "a house", "de": "ein Haus"}}',
        "broken": '{"caption": ',
        "other": '{"description": "x"}',
    }
    with_text = ("nan", "empty_list")
    files = [
        file
        for n, (key, content) in enumerate(forms.items())
        for file in (
            (f"{key}.jpg", picture(n)),
            (f"{key}.json", content),
            *([(f"{key}.txt", "from the text")] if key in with_text else []),
        )
    ]
    return write_files(folder, {"0.tar": tar_bytes(files)})


# -- Parquet ---------------------------------------------------------------------------------------

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def images(first=0):
    return [picture(n) for n in range(first, first + COUNT)]


def captions(first=0):
    return [caption(n) for n in range(first, first + COUNT)]


def splits(folder):
    for n, name in enumerate(("train", "test")):
        values = [{"bytes": data, "path": None} for data in images(n * COUNT)]
        parquet(
            folder / f"{name}-00000-of-00001.parquet",
            {"image": pyarrow.array(values, STRUCT), "text": captions(n * COUNT)},
        )
    return str(folder)


def image_lists(folder):
    one, *rest = [[{"bytes": data, "path": None}] for data in images()]
    values = pyarrow.array([one + rest[0], *rest], pyarrow.list_(STRUCT))
    parquet(folder / "a.parquet", {"images": values, "text": captions()})
    return str(folder)


def prompts(folder):
    parquet(
        folder / "a.parquet", {"image": images(), "prompt": captions(), "re_caption": ["x"] * 5}
    )
    return str(folder)


def other_forms(folder):
    """Images in base64, as numbers, and as bytes beside a column of names."""
    import base64

    text = [base64.b64encode(data).decode() for data in images()]
    parquet(folder / "a.parquet", {"image": text, "caption": captions()})
    urls = [f"data:image/jpeg;base64,{one}" for one in text]
    parquet(folder / "b.parquet", {"image": urls, "caption": captions()})
    numbers = pyarrow.array([list(data) for data in images()], pyarrow.list_(pyarrow.uint8()))
    parquet(folder / "c.parquet", {"image": numbers, "caption": captions()})
    names = [f"{n}.jpg" for n in range(COUNT)]
    parquet(folder / "d.parquet", {"image": names, "jpg": images(), "caption": captions()})
    return str(folder)


def caption_forms(folder):
    image = images()
    forms = {
        "bytes": pyarrow.array([text.encode() for text in captions()]),
        "languages": [{"en": text, "de": "ein Haus"} for text in captions()],
        "objects": [[{"text": text}] for text in captions()],
        "nan": pyarrow.array([float("nan")] * COUNT),
        "categories": pyarrow.array(captions()).dictionary_encode(),
        "lists": [[text, None, ""] for text in captions()],
    }
    for name, values in forms.items():
        parquet(folder / f"{name}.parquet", {"jpg": image, "caption": values})
    return str(folder)


def damaged_footer(folder):
    columns = {"jpg": images(), "caption": captions()}
    parquet(folder / "1.parquet", columns, store_schema=False)
    data = (folder / "1.parquet").read_bytes().replace(b"caption", b"capt\xccon")
    return write_files(folder, {"0.tar": shard(), "1.parquet": data})


def bad_text(values):
    """A column of text whose third value is not UTF-8."""
    raw = [value.encode() for value in values]
    raw[2] = b"caf\xe9"
    array = pyarrow.array(raw, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), array.buffers())


def not_utf8(folder):
    parquet(folder / "a.parquet", {"jpg": images(), "caption": bad_text(captions())})
    parquet(
        folder / "b.parquet",
        {"jpg": images(), "caption": captions(), "exif": bad_text(captions())},
    )
    encoded = bad_text(captions()).dictionary_encode()
    parquet(folder / "c.parquet", {"jpg": images(), "caption": encoded})
    return str(folder)


def odd_columns(folder):
    dates = pyarrow.array([2**62] * COUNT, pyarrow.int64()).cast(pyarrow.timestamp("us"))
    parquet(folder / "a.parquet", {"jpg": images(), "caption": captions(), "modified": dates})
    return write_files(folder, {"0.tar": shard()})


def damaged_column(folder):
    """A page of a column that is not needed is overwritten."""
    path = folder / "a.parquet"
    values = [f"{n:0500d}" for n in range(COUNT)]
    parquet(path, {"jpg": images(), "caption": captions(), "exif": values}, compression="snappy")
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(2)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    return write_files(folder, {"a.parquet": bytes(data)})
