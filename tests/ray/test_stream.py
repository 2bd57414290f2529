"""The corpus through Ray Data: all sources, each row once, bad rows counted, seeded batches."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import ray
import scipy.ndimage
import torch
from helpers import corpora as forms
from helpers.drawings import drawn_samples
from helpers.tiny import tiny

from glide_ray import storage
from glide_ray.cli.main import main
from glide_ray.config.data import DataConfig
from glide_ray.data.images import area_downsample, blur, encode, to_tensor
from glide_ray.data.shards import Sample, ShardError, write_shards
from glide_ray.data.sources import Part, columns, find_parts, read_part
from glide_ray.data.transforms import Collate, held_out_batches
from glide_ray.distributed.curation.corpus import survey
from glide_ray.distributed.stream import Tally, begin_part, end_part, open_corpus
from glide_ray.distributed.training.feed import Epoch, Feeder, micro_batches
from glide_ray.train.batch_split import BatchSplit

pytestmark = pytest.mark.usefixtures("ray_session")


def stream(path, min_size=16):
    tally = Tally.remote()
    rows = open_corpus(str(path), min_size, tally).take_all()
    return rows, ray.get(tally.report.remote())


def as_parquet(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_row_of_tar_shards_is_read_once(drawn_corpus):
    rows, report = stream(drawn_corpus / "train")
    assert (
        sorted(row["key"] for row in rows) == [f"{n:05d}" for n in range(96)] and report.kept == 96
    )
    assert json.loads(min(rows, key=lambda row: row["key"])["captions"]) == ["a red ellipse", "red"]


@pytest.mark.parametrize(
    "image, caption", [("image", "caption"), ("jpg", "TEXT"), ("bytes", "captions")]
)
def test_parquet_with_image_bytes_gives_the_same_rows(tmp_path, image, caption):
    samples = list(drawn_samples(6))
    texts = (
        [list(sample.captions) for sample in samples]
        if caption == "captions"
        else [sample.captions[0] for sample in samples]
    )
    as_parquet(
        tmp_path / "0.parquet", {image: [sample.image for sample in samples], caption: texts}
    )
    rows, report = stream(tmp_path)
    assert [row["image"] for row in rows] == [
        sample.image for sample in samples
    ] and report.kept == 6
    assert json.loads(rows[1]["captions"])[0] == samples[1].captions[0]


def test_parquet_written_by_hugging_face_is_read(tmp_path):
    samples = list(drawn_samples(3))
    as_parquet(
        tmp_path / "0.parquet",
        {
            "image": [{"bytes": sample.image, "path": None} for sample in samples],
            "text": [sample.captions[0] for sample in samples],
        },
    )
    assert [sample.image for sample in read_part(Part(str(tmp_path / "0.parquet")))] == [
        sample.image for sample in samples
    ]


def test_a_corpus_on_s3_is_streamed(s3, drawn_corpus):
    for path in (drawn_corpus / "train").glob("*.tar"):
        storage.put(path, f"{s3}/drawn/train/{path.name}")
    rows, report = stream(f"{s3}/drawn/train")
    assert len(rows) == report.kept == 96


def test_bad_rows_and_shards_are_dropped_counted_and_named_and_the_others_arrive(tmp_path):
    good = list(drawn_samples(8))
    bad = [
        Sample("broken", b"no image", "png", ("x",), {}),
        Sample("small", encode(np.zeros((8, 8, 3), np.uint8)), "png", ("x",), {}),
        Sample("silent", good[0].image, "png", ("",), {}),
    ]
    write_shards(tmp_path, [*good, *bad])
    as_parquet(tmp_path / "other.parquet", {"picture": [b""], "caption": ["x"]})
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "index.json").unlink()
    rows, report = stream(tmp_path)
    assert len(rows) == report.kept == 8
    assert dict(report.dropped) == {
        "with an unreadable image": 1,
        "too small": 1,
        "without a caption": 1,
    }
    assert (
        len(report.faults) == 2
        and "other.parquet has no column named" in str(report)
        and "torn.parquet is not a whole" in str(report)
    )
    assert report.examples["with an unreadable image"] == "broken"


def test_an_empty_corpus_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ShardError, match="is empty.*glide corpus"):
        open_corpus(str(tmp_path), 16)
    with pytest.raises(ShardError, match="There is no corpus .*nowhere"):
        open_corpus(str(tmp_path / "nowhere"), 16)


def test_a_survey_counts_captions_and_truncated_ones(tmp_path):
    picture = next(drawn_samples(1)).image
    write_shards(
        tmp_path,
        [
            Sample("a", picture, "png", ("short", "word " * 2000), {}),
            Sample("b", picture, "png", ("x",), {}),
        ],
    )
    counts = survey(str(tmp_path), 16)
    assert (counts.rows.kept, counts.captions, counts.cut_captions) == (2, 3, 1)


@pytest.mark.parametrize(
    "arguments, status, printed, error",
    [
        (["--caption-column", "prompt"], 0, "5 kept, none dropped; 5 captions", ""),
        ([], 2, "5 without a caption: metadata.csv has file_name, prompt", "No row of in can be"),
    ],
)
def test_a_survey_of_a_relative_path_ends_with_status_2_if_no_row_is_usable(
    tmp_path, monkeypatch, capsys, arguments, status, printed, error
):
    forms.table("metadata.csv", "prompt")(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    command = ["corpus", "--survey", "in", "--min-size", "16", *arguments]
    assert main(command) == status
    shown = capsys.readouterr()
    assert printed in shown.out and error in shown.err


def test_a_part_that_ends_its_process_three_times_is_left_out_by_name():
    tally = Tally.remote()

    @ray.remote(num_cpus=0, max_retries=-1)
    def read(url):
        try:
            begin_part(tally, url)
        except ShardError as error:
            return str(error)
        if url == "deadly":
            os._exit(1)
        end_part(tally, url)
        return "read"

    said = ray.get([read.remote(url) for url in ("deadly", "good", "good")])
    assert said[0].startswith("deadly ended the process that read it 3 times; it is left out")
    assert said[1:] == ["read", "read"]


# -- order, and resumption within an epoch ---------------------------------------------------------


@pytest.fixture(scope="module")
def batches_of():
    """A function that reads the global batches of an epoch, each a list of keys.

    The ranks are threads of this process. A corpus keeps its feeder and tally for the whole file,
    because new actors take longer to start than to read; `tally` asks for a feeder of its own.
    """
    tallies, feeders = {}, {}

    def read(corpus, epoch=0, rows=0, workers=2, batch=12, tally=None, seed=0, window=16):
        corpus = str(corpus)
        if tally is None:
            tally = tallies[corpus] = tallies.get(corpus) or Tally.remote()
        given = corpus, batch, seed, window, tally
        if given not in feeders:
            feeders[given] = Feeder.remote(find_parts(corpus), 16, batch, window, seed, tally)
        feeder, start = feeders[given], Epoch(uuid4().hex, epoch, rows)

        def keys(rank):
            split = BatchSplit(batch, workers, rank, batch // workers)
            return [rows["key"] for rows in micro_batches(feeder, start, split)]

        with ThreadPoolExecutor(workers) as pool:
            by_rank = list(pool.map(keys, range(workers)))
        return [[key for part in parts for key in part] for parts in zip(*by_rank, strict=True)]

    return read


@pytest.fixture(scope="module")
def undivided(batches_of, drawn_corpus):
    """The batches of epoch 0, read by one worker."""
    return batches_of(drawn_corpus / "train", workers=1)


def test_every_row_is_in_one_batch_per_epoch_and_each_epoch_has_another_order(
    batches_of, drawn_corpus, undivided
):
    first, second = undivided, batches_of(drawn_corpus / "train", epoch=1)
    for batches in (first, second):
        assert sorted(key for batch in batches for key in batch) == [f"{n:05d}" for n in range(96)]
    assert first != second and first != batches_of(drawn_corpus / "train", seed=1)
    assert first[0] != sorted(first[0])


@pytest.mark.parametrize("workers", [2, 3, 4, 6])
def test_a_batch_has_the_same_rows_in_the_same_order_for_any_number_of_workers(
    batches_of, drawn_corpus, undivided, workers
):
    assert batches_of(drawn_corpus / "train", workers=workers) == undivided


@pytest.mark.parametrize("done, workers", [(12, 3), (36, 1), (60, 2), (96, 2)])
def test_a_resumed_run_reads_exactly_the_remaining_batches_for_any_number_of_workers(
    batches_of, drawn_corpus, undivided, done, workers
):
    rest = batches_of(drawn_corpus / "train", rows=done, workers=workers)
    assert rest == undivided[done // 12 :]


def test_a_resumed_run_that_has_no_counts_of_rows_skips_those_that_it_has_trained_on(
    batches_of, drawn_corpus, undivided
):
    corpus, done = drawn_corpus / "train", 96
    assert batches_of(corpus, rows=done, tally=Tally.remote()) == undivided[done // 12 :] == []


def test_a_late_request_for_an_earlier_epoch_does_not_begin_it_again(drawn_corpus):
    parts = find_parts(str(drawn_corpus / "train"))
    feeder = Feeder.remote(parts, 16, 12, 16, 0, Tally.remote())

    def take(epoch, first):
        return ray.get(feeder.take.remote(Epoch("one", epoch, 0), first, 2, (0, 12), 2))

    take(0, 0)
    second = take(1, 0)
    assert take(0, 1000) == []
    # the same batches for the other worker, and not those of an epoch begun anew
    assert take(1, 0) == second


def test_a_mixture_is_resumed_with_any_number_of_workers_as_one_corpus_is(batches_of, tmp_path):
    write_shards(tmp_path / "a", drawn_samples(24), per_shard=8)
    write_shards(tmp_path / "b", drawn_samples(96), per_shard=32)
    path = f"{tmp_path}/a:0.5,{tmp_path}/b:0.5"
    whole = batches_of(path, workers=1)
    assert 3 <= len(whole) <= 5 and batches_of(path, rows=24, workers=2) == whole[2:]


def test_fully_consumed_parts_are_not_read_again(batches_of, tmp_path):
    write_shards(tmp_path, drawn_samples(48), per_shard=8)
    for path in tmp_path.glob("index.json"):  # without it part sizes are unknown: one task each
        path.unlink()
    tally = Tally.remote()
    whole = batches_of(tmp_path, tally=tally)
    counts = ray.get(tally.counts.remote(0))
    assert counts == dict.fromkeys(range(6), 8)
    order = np.random.default_rng([0, 0]).permutation(6)
    for number in order[:3]:
        (tmp_path / f"{number:06d}.tar").write_bytes(b"gone")
    known = Tally.remote()
    ray.get(known.restore_counts.remote(0, counts))
    assert (
        batches_of(tmp_path, rows=24, tally=known) == whole[2:]
        and not ray.get(known.report.remote()).faults
    )


def test_an_incomplete_last_batch_of_an_epoch_is_dropped(batches_of, drawn_corpus):
    assert len(batches_of(drawn_corpus / "train", batch=36)) == 2 and not batches_of(
        drawn_corpus / "train", batch=100, workers=4
    )


# -- batches ---------------------------------------------------------------------------------------


def rows_of(samples):
    return columns(enumerate(samples))


def test_a_batch_has_the_shapes_of_its_model():
    base = Collate(tiny().model, DataConfig())(rows_of(list(drawn_samples(4))), epoch=0)
    assert (
        base.image.shape == (4, 3, 16, 16)
        and base.conditioning.low_res is None
        and base.conditioning.tokens.shape == (4, 128)
    )
    pair = Collate(tiny("upsampler").model, DataConfig())(rows_of(list(drawn_samples(4))), epoch=0)
    assert pair.image.shape == (4, 3, 64, 64) and pair.conditioning.low_res.shape == (4, 3, 16, 16)
    assert pair.image.min() >= -1 and pair.image.max() <= 1


def test_the_low_res_image_is_the_box_average_of_the_large_one():
    from helpers.drawings import draw

    pair = Collate(tiny("upsampler").model, DataConfig())(rows_of(list(drawn_samples(1))), epoch=0)
    assert torch.equal(pair.image[0], to_tensor(draw("red", "ellipse")))
    assert torch.equal(
        pair.conditioning.low_res[0], to_tensor(area_downsample(draw("red", "ellipse"), 16))
    )
    assert torch.allclose(
        pair.conditioning.low_res, torch.nn.functional.avg_pool2d(pair.image, 4), atol=1 / 127
    )


def test_a_crop_is_at_the_same_place_in_both_images_of_a_pair():
    collate = Collate(tiny("upsampler").model, DataConfig(crop=16))
    samples = list(drawn_samples(32))
    cropped, whole = (
        collate(rows_of(samples), epoch=3),
        collate(rows_of(samples), epoch=3, augment=False),
    )
    assert cropped.image.shape == (32, 3, 16, 16) and cropped.conditioning.low_res.shape == (
        32,
        3,
        4,
        4,
    )
    assert whole.image.shape == (32, 3, 64, 64)
    assert torch.allclose(
        cropped.conditioning.low_res, torch.nn.functional.avg_pool2d(cropped.image, 4), atol=1 / 127
    )
    assert len({crop.numpy().tobytes() for crop in cropped.image}) > 8


def test_low_res_images_are_blurred_at_the_requested_rate_and_only_in_training():
    samples = list(drawn_samples(64))
    plain, blurred, other = (
        Collate(tiny("upsampler").model, DataConfig(low_res_blur_rate=rate), seed)
        for rate, seed in ((0, 0), (0.5, 0), (0.5, 1))
    )
    sharp, soft, again = (
        plain(rows_of(samples), 0),
        blurred(rows_of(samples), 0),
        other(rows_of(samples), 0),
    )
    changed = (sharp.conditioning.low_res != soft.conditioning.low_res).flatten(1).any(1)
    assert 20 <= changed.sum() <= 44 and torch.equal(sharp.image, soft.image)
    assert not torch.equal(soft.conditioning.low_res, again.conditioning.low_res)
    assert torch.equal(
        blurred(rows_of(samples), 0, augment=False).conditioning.low_res, sharp.conditioning.low_res
    )


def test_images_are_mirrored_at_the_requested_rate_and_only_in_training():
    draws = np.random.default_rng(0)
    samples = [
        replace(sample, image=encode(draws.integers(0, 256, (64, 64, 3)).astype(np.uint8)))
        for sample in drawn_samples(64)
    ]
    for kind in ("base", "upsampler"):
        model = tiny(kind).model
        collate = Collate(model, DataConfig(flip_rate=0.5))
        plain = collate(rows_of(samples), 0, augment=False)
        drawn, again = collate(rows_of(samples), 0), collate(rows_of(samples), 1)
        mirrored = (drawn.image == plain.image.flip(-1)).flatten(1).all(1)
        same = (drawn.image == plain.image).flatten(1).all(1)
        assert (mirrored | same).all() and 16 <= (mirrored & ~same).sum() <= 48
        assert not torch.equal(drawn.image, again.image)  # drawn anew in each epoch
        if kind == "upsampler":
            small = torch.nn.functional.avg_pool2d(drawn.image, 4)
            assert torch.allclose(drawn.conditioning.low_res, small, atol=1 / 127)


def test_low_res_images_get_noise_of_the_given_size_and_only_in_training():
    samples = list(drawn_samples(64))
    model = tiny("upsampler").model
    clean = Collate(model, DataConfig())(rows_of(samples), 0)
    noisy = Collate(model, DataConfig(low_res_noise=8.0))
    given = noisy(rows_of(samples), 0)
    assert torch.equal(given.image, clean.image)
    levels = 127.5 * (given.conditioning.low_res - clean.conditioning.low_res)
    inside = (clean.conditioning.low_res.abs() < 0.75).flatten(1)  # away from the clipping
    deviations = torch.stack(
        [row[kept].std() for row, kept in zip(levels.flatten(1), inside, strict=True)]
    )
    deviations = deviations[deviations.isfinite()]
    # A standard deviation is uniform from 0 to 8 levels: 4 on the average, none far above 8.
    assert 3 < deviations.mean() < 5 and deviations.max() < 9.5 and deviations.min() < 1.5
    plain = noisy(rows_of(samples), 0, augment=False)
    assert torch.equal(plain.conditioning.low_res, clean.conditioning.low_res)


def test_the_blur_agrees_with_scipys_gaussian_of_three_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    expected = np.stack(
        [
            scipy.ndimage.gaussian_filter(
                pixels[..., c].astype(float), 0.5, radius=1, mode="nearest"
            )
            for c in range(3)
        ],
        -1,
    )
    assert np.abs(blur(pixels, 0.5) - expected).max() <= 0.5 + 1e-9


def test_inpainting_masks_depend_on_key_epoch_and_seed_and_not_on_the_batch():
    model = tiny("base", "model.unet.inpaint=true").model
    samples = list(drawn_samples(12))
    whole = Collate(model, DataConfig())(rows_of(samples), epoch=2).conditioning
    part = Collate(model, DataConfig())(rows_of(samples[5:7]), epoch=2).conditioning
    assert torch.equal(whole.known_mask[5:7], part.known_mask) and set(
        whole.known_mask.unique().tolist()
    ) == {0.0, 1.0}
    assert not torch.equal(
        whole.known_mask,
        Collate(model, DataConfig())(rows_of(samples), epoch=3).conditioning.known_mask,
    )


def test_captions_are_drawn_in_each_epoch_and_reproducible_from_the_seed():
    samples = list(drawn_samples(40))
    collate = Collate(tiny().model, DataConfig(empty_caption_rate=0.3), seed=5)
    first, again, next_epoch = (collate(rows_of(samples), epoch) for epoch in (0, 0, 1))
    assert torch.equal(first.conditioning.tokens, again.conditioning.tokens)
    assert not torch.equal(first.conditioning.tokens, next_epoch.conditioning.tokens)
    assert 0 < (~first.conditioning.mask.any(1)).sum() < 40


def test_an_image_that_fails_to_decode_is_counted_and_replaced():
    samples = list(drawn_samples(4))
    rows = rows_of(samples)
    rows["image"][1] = rows["image"][1][:-40]
    collate = Collate(tiny().model, DataConfig())
    batch = collate(rows, epoch=0)
    assert batch.image.shape[0] == 4 and collate.broken == 1
    assert collate(rows_of([Sample("x", b"?", "png", ("x",), {})]), epoch=0) is None


def test_held_out_batches_are_the_same_at_every_call_and_split_among_ranks(drawn_corpus):
    data, model = (
        DataConfig(held_out=str(drawn_corpus / "held_out"), held_out_images=14, min_size=16),
        tiny().model,
    )
    whole = held_out_batches(data, model, 4)
    assert [len(batch.image) for batch in whole] == [4, 4, 4, 2]
    assert torch.equal(whole[2].image, held_out_batches(data, model, 4)[2].image)
    parts = [held_out_batches(data, model, 4, rank, 2) for rank in range(2)]
    assert torch.equal(parts[1][0].image, torch.cat([batch.image for batch in whole])[1::2][:4])
    with pytest.raises(ShardError, match="fewer than the 3 workers"):
        held_out_batches(data.model_copy(update={"held_out_images": 2}), model, 4, 0, 3)
