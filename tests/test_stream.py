"""The corpus through Ray Data: every source, every row once, bad rows counted, batches from a seed."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
import torch

from conftest import drawn_samples, tiny
from glide_ray import storage
from glide_ray.config import DataConfig
from glide_ray.data.images import area_downsample, encode, to_tensor
from glide_ray.data.shards import Sample, ShardError, write_shards
from glide_ray.distributed.corpus import survey
from glide_ray.distributed.stream import Collate, Tally, held_out_batches, open_corpus, read_rows

pytestmark = pytest.mark.usefixtures("ray_session")


def stream(path, min_size=16):
    tally = Tally.remote()
    rows = open_corpus(str(path), min_size, tally).take_all()
    return rows, ray.get(tally.report.remote())


def as_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_tar_shards_give_every_row_once(drawn_corpus):
    rows, report = stream(drawn_corpus / "train")
    assert sorted(row["key"] for row in rows) == [f"{n:05d}" for n in range(96)] and report.kept == 96
    assert json.loads(min(rows, key=lambda row: row["key"])["captions"]) == ["a red ellipse", "red"]


@pytest.mark.parametrize("image, caption", [("image", "caption"), ("jpg", "TEXT"), ("bytes", "captions")])
def test_parquet_with_image_bytes_gives_the_same_rows(tmp_path, image, caption):
    samples = list(drawn_samples(6))
    texts = [list(sample.captions) for sample in samples] if caption == "captions" else [sample.captions[0] for sample in samples]
    as_parquet(tmp_path / "0.parquet", {image: [sample.image for sample in samples], caption: texts})
    rows, report = stream(tmp_path)
    assert [row["image"] for row in rows] == [sample.image for sample in samples] and report.kept == 6
    assert json.loads(rows[1]["captions"])[0] == samples[1].captions[0]


def test_parquet_as_hugging_face_writes_it_is_read(tmp_path):
    samples = list(drawn_samples(3))
    as_parquet(tmp_path / "0.parquet", {"image": [{"bytes": sample.image, "path": None} for sample in samples],
                                        "text": [sample.captions[0] for sample in samples]})
    assert [row["image"] for row in read_rows(str(tmp_path / "0.parquet"))] == [sample.image for sample in samples]


def test_a_corpus_on_s3_is_streamed(s3, drawn_corpus):
    for path in (drawn_corpus / "train").glob("*.tar"):
        storage.put(path, f"{s3}/drawn/train/{path.name}")
    rows, report = stream(f"{s3}/drawn/train")
    assert len(rows) == report.kept == 96


def test_bad_rows_and_bad_shards_are_dropped_counted_and_named_and_the_rest_arrives(tmp_path):
    good = list(drawn_samples(8))
    bad = [Sample("broken", b"no image", "png", ("x",), {}), Sample("small", encode(np.zeros((8, 8, 3), np.uint8)), "png", ("x",), {}),
           Sample("silent", good[0].image, "png", ("",), {})]
    write_shards(tmp_path, [*good, *bad])
    as_parquet(tmp_path / "other.parquet", {"picture": [b""], "caption": ["x"]})
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    rows, report = stream(tmp_path)
    assert len(rows) == report.kept == 8
    assert dict(report.dropped) == {"with an unreadable image": 1, "smaller than 16 pixels": 1, "without a caption": 1,
                                    "shards that cannot be read": 2}
    assert report.examples["with an unreadable image"] == "broken"


def test_an_empty_corpus_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ShardError, match="is empty.*glide corpus"):
        open_corpus(str(tmp_path), 16)
    with pytest.raises(ShardError, match="nowhere is empty"):
        open_corpus(str(tmp_path / "nowhere"), 16)


def test_a_survey_counts_captions_and_those_that_are_cut(tmp_path):
    picture = next(drawn_samples(1)).image
    write_shards(tmp_path, [Sample("a", picture, "png", ("short", "word " * 2000), {}), Sample("b", picture, "png", ("x",), {})])
    made = survey(str(tmp_path), 16)
    assert (made.rows.kept, made.captions, made.cut_captions) == (2, 3, 1)


# -- batches ----------------------------------------------------------------------------------------------------------

def rows_of(samples):
    return {"key": [sample.key for sample in samples], "image": [sample.image for sample in samples],
            "captions": [json.dumps(sample.captions) for sample in samples]}


def test_a_batch_has_the_shapes_of_its_model():
    base = Collate(tiny().model, DataConfig())(rows_of(list(drawn_samples(4))), epoch=0)
    assert base.image.shape == (4, 3, 16, 16) and base.conditioning.low_res is None and base.conditioning.tokens.shape == (4, 128)
    pair = Collate(tiny("upsampler").model, DataConfig())(rows_of(list(drawn_samples(4))), epoch=0)
    assert pair.image.shape == (4, 3, 64, 64) and pair.conditioning.low_res.shape == (4, 3, 16, 16)
    assert -1 <= pair.image.min() and pair.image.max() <= 1


def test_the_low_res_image_is_the_box_mean_of_the_large_one():
    from conftest import draw
    pair = Collate(tiny("upsampler").model, DataConfig())(rows_of(list(drawn_samples(1))), epoch=0)
    assert torch.equal(pair.image[0], to_tensor(draw("red", "ellipse")))
    assert torch.equal(pair.conditioning.low_res[0], to_tensor(area_downsample(draw("red", "ellipse"), 16)))
    assert torch.allclose(pair.conditioning.low_res, torch.nn.functional.avg_pool2d(pair.image, 4), atol=1 / 127)


def test_a_crop_cuts_both_halves_of_a_pair_at_one_place():
    collate = Collate(tiny("upsampler").model, DataConfig(crop=16))
    samples = list(drawn_samples(32))
    cropped, whole = collate(rows_of(samples), epoch=3), collate(rows_of(samples), epoch=3, augment=False)
    assert cropped.image.shape == (32, 3, 16, 16) and cropped.conditioning.low_res.shape == (32, 3, 4, 4)
    assert whole.image.shape == (32, 3, 64, 64)
    assert torch.allclose(cropped.conditioning.low_res, torch.nn.functional.avg_pool2d(cropped.image, 4), atol=1 / 127)
    assert len({crop.numpy().tobytes() for crop in cropped.image}) > 8


def test_captions_are_drawn_anew_each_epoch_and_the_same_again_from_the_seed():
    samples = list(drawn_samples(40))
    collate = Collate(tiny().model, DataConfig(empty_caption_rate=0.3), seed=5)
    first, again, next_epoch = (collate(rows_of(samples), epoch) for epoch in (0, 0, 1))
    assert torch.equal(first.conditioning.tokens, again.conditioning.tokens)
    assert not torch.equal(first.conditioning.tokens, next_epoch.conditioning.tokens)
    assert 0 < (~first.conditioning.mask.any(1)).sum() < 40


def test_an_image_that_breaks_while_decoding_is_counted_and_its_place_filled():
    samples = list(drawn_samples(4))
    rows = rows_of(samples)
    rows["image"][1] = rows["image"][1][:-40]
    collate = Collate(tiny().model, DataConfig())
    batch = collate(rows, epoch=0)
    assert batch.image.shape[0] == 4 and collate.broken == 1
    assert collate(rows_of([Sample("x", b"?", "png", ("x",), {})]), epoch=0) is None


def test_held_out_batches_are_the_same_at_every_call_and_split_between_ranks(drawn_corpus):
    data, model = DataConfig(held_out=str(drawn_corpus / "held_out"), held_out_images=14, min_size=16), tiny().model
    whole = held_out_batches(data, model, 4)
    assert [len(batch.image) for batch in whole] == [4, 4, 4, 2]
    assert torch.equal(whole[2].image, held_out_batches(data, model, 4)[2].image)
    parts = [held_out_batches(data, model, 4, rank, 2) for rank in range(2)]
    assert torch.equal(parts[1][0].image, torch.cat([batch.image for batch in whole])[1::2][:4])
    with pytest.raises(ShardError, match="fewer than the 3 workers"):
        held_out_batches(data.model_copy(update={"held_out_images": 2}), model, 4, 0, 3)
