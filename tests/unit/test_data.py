"""Images, masks, captions, filters and shards."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.colours import display_p3_to_srgb, p3_profile
from helpers.drawings import drawn_samples
from helpers.tiny import tiny
from PIL import Image

from glide_ray.config.data import DataConfig
from glide_ray.data import images, masks
from glide_ray.data.captions import choose, emoji_captions
from glide_ray.data.filters import Candidate, Report, first_broken, header_rules
from glide_ray.data.shards import (
    Sample,
    ShardError,
    captions_of,
    read_index,
    read_shard,
    write_shards,
)
from glide_ray.data.sources import columns, find_parts, folder_name, in_share, share_of
from glide_ray.data.tokenizer import Tokenizer, _gpt2_ranks
from glide_ray.data.transforms import Collate, held_out_batches
from glide_ray.errors import UserError


def as_bytes(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# -- images ----------------------------------------------------------------------------------------


def test_transparent_pictures_are_composited_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    pixels = np.asarray(images.decode(as_bytes(image)))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(as_bytes(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "1", "LA"])
def test_every_image_mode_is_converted_to_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert images.decode(as_bytes(Image.new(mode, (8, 8)), form)).mode == "RGB"


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_is_reduced_to_its_upper_8_bits(order):
    ramp = np.linspace(0, 65535, 64).astype(order).reshape(8, 8)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (8, 8), ramp.tobytes())
    assert np.array_equal(np.asarray(images.decode(as_bytes(image, "TIFF")))[:, :, 1], ramp >> 8)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_outside_the_expected_range_are_refused(mode):
    with pytest.raises(images.ImageError, match="whose white may be any number"):
        images.decode(as_bytes(Image.new(mode, (8, 8)), "TIFF"))


def test_no_other_program_is_run_to_read_an_image():
    with pytest.raises(images.ImageError, match="give a PNG, JPEG or WebP"):
        images.decode(as_bytes(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", as_bytes(Image.new("RGB", (64, 64), (9, 8, 7)))[:60]],
)
def test_bytes_that_are_not_an_image_are_refused(data):
    with pytest.raises(images.ImageError):
        images.decode(data)


def test_a_huge_image_is_refused_before_its_pixels_are_read():
    bomb = as_bytes(Image.new("1", (9000, 9000)))
    assert len(bomb) < 100_000
    with pytest.raises(images.ImageError, match="9000x9000 pixels, more than"):
        images.decode(bomb)


def test_the_centre_crop_is_the_middle_square_resized_by_box_averages():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = [[0], [100], [200], [50]]
    cropped = images.centre_crop(Image.fromarray(pixels), 2)
    assert cropped[:, :, 0].tolist() == [[50, 125], [50, 125]]
    assert images.centre_crop(Image.new("RGB", (1, 1)), 16).shape == (16, 16, 3)


def test_pixels_are_unchanged_by_a_round_trip_through_a_tensor():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = images.to_tensor(pixels)
    assert tensor.shape == (3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(images.to_uint8(tensor), pixels)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_encoding_gives_the_requested_format(form):
    assert (
        images.open_image(images.encode(np.zeros((8, 8, 3), np.uint8), form)).format == form.upper()
    )


# -- masks -----------------------------------------------------------------------------------------


def test_the_transparent_part_of_a_mask_is_painted():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    image.putpixel((1, 2), (0, 0, 0, 0))
    known = masks.mask_of(image)
    assert not known[2, 1] and known.sum() == 15
    assert (
        not masks.centre_crop_mask(known, 2)[1, 0] and masks.centre_crop_mask(known, 2).sum() == 3
    )
    assert masks.centre_crop_mask(known, 8).sum() == 60


def test_a_mask_with_no_pixel_to_paint_or_of_another_size_is_refused():
    for mode in ("RGB", "L", "1", "RGBA"):
        opaque = Image.new("RGB", (4, 4)).convert(mode)
        with pytest.raises(masks.MaskError, match="no transparent and no white .* nothing to pai"):
            masks.mask_of(opaque)
        with pytest.raises(masks.MaskError, match="The image has no transparent pixel"):
            masks.mask_of_transparency(opaque)
    with pytest.raises(masks.MaskError, match="not black and white"):
        masks.mask_of(Image.new("RGB", (4, 4), (200, 30, 30)))
    with pytest.raises(masks.MaskError, match="not black and white"):
        masks.mask_of(Image.linear_gradient("L"))
    with pytest.raises(masks.MaskError, match="inverted mask has no opaque and no black"):
        masks.mask_of(Image.new("LA", (4, 4)), invert=True)
    with pytest.raises(masks.MaskError, match="4x4 pixels and the image 8x4"):
        masks.check_sizes(Image.new("RGB", (8, 4)), Image.new("RGBA", (4, 4)))


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA"])
def test_the_white_part_of_a_black_and_white_mask_is_painted_or_the_black_one_inverted(mode):
    drawing = Image.new("L", (8, 8), 0)
    drawing.paste(255, (2, 1, 6, 4))
    painted = np.zeros((8, 8), bool)
    painted[1:4, 2:6] = True
    mask = drawing.convert(mode)
    assert np.array_equal(masks.mask_of(mask), ~painted)
    assert np.array_equal(masks.mask_of(mask, invert=True), painted)


def test_soft_edges_of_a_mask_are_painted_whichever_way_it_is_read():
    levels = np.full((8, 8), 255, np.uint8)
    levels[2] = [0, 1, 60, 128, 200, 239, 254, 255]
    alpha = Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(levels)])
    assert np.array_equal(masks.mask_of(alpha), levels == 255)
    assert np.array_equal(masks.mask_of(alpha, invert=True), levels == 0)
    assert np.array_equal(masks.mask_of(Image.fromarray(levels)), levels < 16)
    assert np.array_equal(masks.mask_of(Image.fromarray(levels), invert=True), levels > 239)


def test_a_hole_of_one_pixel_in_a_large_mask_stays_a_hole():
    known = np.ones((2400, 2400), bool)
    known[777, 1234] = False
    assert (~masks.centre_crop_mask(known, 64)).sum() == 1


def test_a_hole_outside_of_the_centred_square_is_refused():
    known = np.ones((4, 12), bool)
    known[:, :3] = False
    with pytest.raises(masks.MaskError, match="outside of the centred square.*; crop it"):
        masks.check_in_square(known, "crop it")
    known[2, 4] = False
    masks.check_in_square(known, "crop it")


@pytest.mark.parametrize("size", [8, 16, 32])
def test_colours_under_soft_alpha_are_not_blended_with_white(size):
    """At the same size, half and double: known pixels, and soft ones, keep the image's colour."""
    pixels = np.full((16, 16, 4), (20, 40, 60, 255), np.uint8)
    pixels[4:12, 4:12, 3] = 150
    pixels[6:10, 6:10] = (255, 0, 0, 0)
    image = Image.fromarray(pixels)
    known = masks.mask_of_transparency(image)
    square = images.centre_crop(images.unblended(image, known), size)
    clear = (
        np.asarray(Image.fromarray(pixels[:, :, 3]).resize((size, size), Image.Resampling.BOX)) == 0
    )
    # Pillow weights colours by alpha in 8 bits, so that faint pixels are rounded.
    assert np.abs(square[~clear].astype(int) - (20, 40, 60)).max() <= 2
    assert size > 16 or (square[masks.centre_crop_mask(known, size)] == (20, 40, 60)).all()
    assert clear.any() and (square[clear] == 255).all() == (size <= 16)


def test_known_pixels_of_an_image_with_a_mask_of_its_own_are_shown_on_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    known = np.arange(16).reshape(4, 4) < 8
    assert (images.centre_crop(images.unblended(image, known), 4) == 255).all()


# -- colour profiles -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_display_p3_are_converted_to_srgb(mode):
    """Greys are the same in both, and alpha stays."""
    image = Image.new(mode, (2, 1), (128, 153, 102, 90)[: len(mode)])
    image.putpixel((1, 0), (128, 128, 128, 0)[: len(mode)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=p3_profile())
    opened = images.load(images.open_image(buffer.getvalue()))
    converted = images.to_srgb(opened)
    expected = display_p3_to_srgb((128, 153, 102))
    assert np.abs(np.asarray(converted)[0, 0, :3] - expected).max() <= 1
    assert abs(expected[0] - 128) > 3  # the conversion is visible
    assert np.abs(np.asarray(converted)[0, 1, :3].astype(int) - 128).max() <= 1
    assert converted.mode == mode
    assert mode == "RGB" or list(np.asarray(converted)[0, :, 3]) == [90, 0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "LA"])
def test_a_broken_profile_or_one_of_another_colour_space_is_ignored(mode):
    image = Image.new("RGB", (3, 3), (90, 90, 90)).convert(mode, palette=Image.Palette.ADAPTIVE)
    image.info["icc_profile"] = b"not a profile"
    assert (np.asarray(images.to_srgb(image).convert("RGB")) == 90).all()
    image.info["icc_profile"] = p3_profile()
    assert np.abs(np.asarray(images.to_srgb(image).convert("RGB")).astype(int) - 90).max() <= 1


# -- captions and filters --------------------------------------------------------------------------


def test_an_emoji_has_several_captions_that_name_it():
    captions = emoji_captions("red apple", ["red_apple", "fruit", "mac", "school"], "3D render")
    assert captions[0] == "a red apple, 3D render" and len(captions) == len(set(captions)) == 5
    assert all("red apple" in caption for caption in captions)
    assert emoji_captions("orange", [], "flat icon")[0] == "an orange, flat icon"
    assert (
        emoji_captions("people holding hands", [], "flat icon")[0]
        == "people holding hands, flat icon"
    )


def test_the_chosen_caption_depends_only_on_key_epoch_and_seed():
    captions = ["a", "b", "c"]
    chosen = [choose(captions, f"k{n}", epoch, 0) for n in range(200) for epoch in range(2)]
    assert chosen == [choose(captions, f"k{n}", epoch, 0) for n in range(200) for epoch in range(2)]
    assert {chosen.count(caption) > 90 for caption in captions} == {True}
    assert chosen != [choose(captions, f"k{n}", epoch, 1) for n in range(200) for epoch in range(2)]


def test_captions_are_emptied_at_the_requested_rate():
    empty = sum(choose(["a"], f"k{n}", 0, 0, empty_rate=0.2) == "" for n in range(5000))
    assert abs(empty / 5000 - 0.2) < 0.02  # 3.5 standard deviations


def test_a_caption_of_10000_characters_is_truncated_at_128_tokens_and_marked():
    encoded = Tokenizer().encode("word " * 2000)
    assert encoded.cut and len(encoded.tokens) == 128 and all(encoded.mask)
    assert not Tokenizer().encode("word " * 60).cut
    assert Tokenizer().encode("x" * 2_000_000).cut


def test_the_empty_caption_is_all_padding():
    assert not any(Tokenizer().encode("").mask)


def test_tokens_decode_to_the_original_text():
    text = "a \u00fc\u00df\u043f\u6f22\U0001f600 don't  3.14\t\n<|endoftext|> \x00\u00ad"
    assert Tokenizer().decode(Tokenizer().encode(text).tokens) == text


@pytest.mark.parametrize("content", [None, b"IQ== 0\n"], ids=["missing", "altered"])
def test_a_missing_or_altered_vocabulary_is_refused(tmp_path, monkeypatch, content):
    data = tmp_path / "mbpe" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    if content:
        (data / "gpt2.tiktoken").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="missing or altered; run `pip install"):
        _gpt2_ranks()


def test_each_rule_has_a_name_and_is_counted():
    good = images.encode(np.zeros((64, 64, 3), np.uint8))
    report = Report()
    for key, data, captions in (
        ("a", good, ["x"]),
        ("b", good, [" "]),
        ("c", b"junk", ["x"]),
        ("d", b"", ["x"]),
        ("e", images.encode(np.zeros((9, 80, 3), np.uint8)), ["x"]),
        ("f", b"junk", ["x"]),
    ):
        report.add(
            key,
            first_broken(
                Candidate(Sample(key, data, "png", tuple(captions), {})), header_rules(64)
            ),
        )
    assert (report.kept, dict(report.dropped)) == (
        1,
        {
            "without a caption": 1,
            "with an unreadable image": 2,
            "without an image": 1,
            "too small": 1,
        },
    )
    assert report.examples[
        "with an unreadable image"
    ] == "c" and "2 with an unreadable image (such as c)" in str(report)


def test_a_held_out_batch_without_usable_pictures_is_padded_and_not_counted(tmp_path):
    """All ranks must make the same number of network calls."""
    samples = [
        replace(sample, image=sample.image[:-40]) if n in (0, 2, 5) else sample
        for n, sample in enumerate(drawn_samples(6))
    ]
    write_shards(tmp_path, samples)
    data, model = DataConfig(held_out=str(tmp_path), min_size=16), tiny().model
    batches = held_out_batches(data, model, 1, rank=0, world=2)
    assert [batch.rows.tolist() for batch in batches] == [[-1], [-1], [4]] and torch.equal(
        batches[0].image, batches[2].image
    )
    assert [batch.rows.tolist() for batch in held_out_batches(data, model, 2, rank=1, world=2)] == [
        [1, 3],
        [-1],
    ]
    write_shards(tmp_path, [replace(sample, image=sample.image[:-40]) for sample in samples])
    with pytest.raises(
        ShardError,
        match="No picture of rank 1's part of the held-out corpus .* can be decoded; "
        "give another with --set data.held_out=FOLDER",
    ):
        held_out_batches(data, model, 2, rank=1, world=2)


# -- shards ----------------------------------------------------------------------------------------


def test_shards_contain_the_written_samples_and_an_index(tmp_path):
    index = write_shards(tmp_path, drawn_samples(10), per_shard=4)
    assert (
        [shard["count"] for shard in index["shards"]] == [4, 4, 2]
        and index["count"] == 10
        and read_index(tmp_path) == index
    )
    back = [sample for path in sorted(tmp_path.glob("*.tar")) for sample in read_shard(path)]
    assert [sample.key for sample in back] == [sample.key for sample in drawn_samples(10)]
    assert back[3].captions == ("a yellow ellipse", "yellow") and back[3].meta["number"] == 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ".json"}


def test_a_folder_without_its_index_or_a_shard_is_incomplete(tmp_path):
    write_shards(tmp_path, drawn_samples(6), per_shard=2)
    (tmp_path / "000001.tar").unlink()
    assert read_index(tmp_path) is None
    assert write_shards(tmp_path, drawn_samples(2), per_shard=2)["count"] == 2
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == ["000000.tar"]


@pytest.mark.parametrize(
    "index", ['{"version": 2, "shards": [{"raw_data": {"basename": "0.mds"}}]}', "[]", "notes"]
)
def test_the_index_of_another_program_is_never_overwritten(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(ShardError, match=r"holds an index.json of another program; write to an"):
        write_shards(tmp_path, drawn_samples(2))
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert (tmp_path / "index.json").read_text() == index


@pytest.mark.parametrize("name", ["report.html", "summary.json", "card.json", ".work/notes"])
def test_reports_that_no_corpus_of_ours_wrote_are_never_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of someone else")
    with pytest.raises(ShardError, match=r"without a corpus; write to an empty folder"):
        write_shards(tmp_path, drawn_samples(2))
    assert (tmp_path / name).read_text() == "of someone else"
    assert not list(tmp_path.glob("*.tar"))


def test_a_truncated_tar_gives_the_samples_before_its_end(tmp_path):
    write_shards(tmp_path, drawn_samples(8))
    whole = (tmp_path / "000000.tar").read_bytes()
    back, read = [], read_shard(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match="broken or cut after 0000"):
        while True:
            back.append(next(read))
    assert 1 < len(back) < 8
    for sample, original in zip(back[:-1], drawn_samples(8), strict=False):
        assert sample.image == original.image


def test_the_row_numbers_of_a_batch_are_those_of_its_intact_pictures():
    collate = Collate(tiny().model, tiny("base", "data.min_size=16").data)
    samples = list(drawn_samples(4))
    rows = columns(
        zip(
            (10, 11, 12, 13),
            [replace(samples[0], image=samples[0].image[:80]), *samples[1:]],
            strict=True,
        )
    )
    trained, held_out = collate(rows, epoch=0), collate(rows, epoch=0, augment=False)
    assert trained.rows.tolist() == [11, 12, 13, 11] and torch.equal(
        trained.image[0], trained.image[3]
    )
    assert held_out.rows.tolist() == [11, 12, 13, -1] and collate.broken == 2


def test_shards_written_by_img2dataset_are_read():
    buffer = io.BytesIO()
    picture = images.encode(np.zeros((8, 8, 3), np.uint8), "jpeg")
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (
            ("000000000.jpg", picture),
            ("000000000.json", json.dumps({"caption": "a cat", "url": "u"}).encode()),
            ("000000000.txt", b"a cat"),
            ("000000001.jpg", picture),
            ("000000001.txt", b" a dog\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert [(sample.key, sample.captions) for sample in read_shard(buffer.getvalue())] == [
        ("000000000", ("a cat",)),
        ("000000001", ("a dog",)),
    ]


def test_captions_are_read_from_text_files_and_metadata():
    assert captions_of("text", {"captions": ["a", "b"]}) == ("a", "b")
    assert captions_of("text", {"caption": "c"}) == ("c",)
    assert captions_of(None, {"captions": [" a\u2028", " "]}) == ("a",)
    assert captions_of(" text ", {}) == ("text",) and captions_of(None, {}) == ()


def test_conditioning_can_be_concatenated_indexed_and_converted():
    from glide_ray.tensors import Conditioning

    tokens, mask = Tokenizer(8).batch(["a cat", "a dog", ""])
    rows = Conditioning(tokens, mask, low_res=torch.rand(3, 3, 4, 4))
    assert torch.equal(Conditioning.join([rows[:1], rows[1:]]).low_res, rows.low_res)
    assert (
        rows[torch.tensor([2])].mask.sum() == 0
        and rows.floats_to(torch.bfloat16).low_res.dtype == torch.bfloat16
    )
    with pytest.raises(ValueError, match="with and without"):
        Conditioning.join([rows, Conditioning(tokens, mask)])


def test_braces_name_several_corpora(tmp_path):
    for name in ("train", "scenes", "left"):
        write_shards(tmp_path / name, drawn_samples(4), per_shard=2)
    parts = find_parts(f"{tmp_path}/{{train,scenes}}")
    assert [folder_name(part) for part in parts] == ["train", "train", "scenes", "scenes"]
    assert (
        find_parts(f"{tmp_path}/{{train,scenes}}/{{000000..000001}}.tar")[3].url
        == f"{tmp_path}/scenes/000001.tar"
    )
    with pytest.raises(ShardError, match="There is no corpus .*other"):
        find_parts(f"{tmp_path}/{{train,other}}")


def test_the_share_of_rows_in_an_epoch_depends_only_on_key_epoch_and_seed():
    drawn = [in_share(f"key-{n}", 3, 0, 0.25) for n in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.03)
    assert drawn == [in_share(f"key-{n}", 3, 0, 0.25) for n in range(4000)]
    assert drawn != [in_share(f"key-{n}", 4, 0, 0.25) for n in range(4000)]
    sample = replace(next(drawn_samples(1)), meta={"group": "Flags"})
    assert share_of({"Flags": 0.5, "tones": 0.1}, "tones", sample) == pytest.approx(0.05)
    assert share_of({"Flags": 0.5}, "train", replace(sample, meta={})) == 1


def test_decoded_pictures_are_cached_up_to_the_limit():
    samples = list(drawn_samples(8))
    rows = columns(enumerate(samples))
    kept = Collate(tiny().model, DataConfig(cache_gib=5 * 16 * 16 * 3 / 2**30))
    first = kept(rows, epoch=0)
    broken = {**rows, "image": [b"no image"] * 8}  # cached pictures are not decoded again
    again = kept(broken, epoch=0)
    assert kept.broken == 3 and torch.equal(again.image[:5], first.image[:5])


def test_pictures_of_an_inpainting_model_are_fully_erased_at_the_requested_rate():
    model, samples = tiny("base", "model.unet.inpaint=true").model, list(drawn_samples(64))
    erased = Collate(model, DataConfig(generate_rate=0.75))(
        columns(enumerate(samples)), epoch=0
    ).conditioning.known_mask
    held_out = Collate(model, DataConfig(generate_rate=1.0))(
        columns(enumerate(samples)), epoch=0, augment=False
    )
    share = (erased.flatten(1).sum(1) == 0).double().mean().item()
    assert share == pytest.approx(0.75 + 0.25 * 0.1, abs=0.12)
    assert held_out.conditioning.known_mask.flatten(1).any(1).double().mean() > 0.7
