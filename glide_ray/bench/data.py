"""`glide bench data` and `glide bench memory`: throughput and memory of the data stream.

Throughput is compared with `webdataset` in a torch DataLoader, on the same shards, in one run.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

from ..config import presets
from ..data.images import centre_crop, decode, decode_crop, open_image
from ..data.shards import Sample, write_shards
from ..data.sources import columns, find_parts, read_corpus
from ..data.transforms import Collate
from ..distributed.actors import Actor
from ..distributed.cluster import connect
from ..distributed.stream import Tally
from ..distributed.training.feed import Epoch, Feeder, micro_batches
from ..errors import UserError
from ..train.batch_split import BatchSplit

PROCESSES, BATCH = 2, 64  # worker processes on each side, images per batch
# Shards of the throughput comparison and of the many-shard epoch; images of the two memory runs
SHARDS, MANY_SHARDS, SMALL_CORPUS, LARGE_CORPUS = 8, 64, 10_000, 100_000


def bench_data(corpus: str, repeats: int = 3, images: int = 3 * SMALL_CORPUS) -> dict[str, Any]:
    """Images per second of the stream and of webdataset, measured alternately `repeats` times.

    Work per image: decode, crop to 64 pixels, tokenise the caption. The shards, in a temporary
    folder, repeat the corpus's 256-pixel WebP pictures under new keys until there are `images`.
    Rates exclude the first and the last tenth of the images. Epochs of 1 shard and of MANY_SHARDS
    are timed whole, in seconds. Also the figures of `bench_photos`. Raises UserError without such
    pictures.
    """
    pictures = _pictures(corpus)
    workers = _workers()
    with tempfile.TemporaryDirectory() as folder:
        shards, one_shard, many_shards = (Path(folder) / name for name in ("shards", "one", "many"))
        for path, per_shard in (
            (shards, images // SHARDS),
            (one_shard, images),
            (many_shards, -(-images // MANY_SHARDS)),
        ):
            write_shards(path, again(pictures, images), per_shard)
        stream(shards, workers)  # warm-up: the first epoch starts Ray's worker processes
        pairs = [
            (steady_rate(stream(shards, workers)[1]), steady_rate(webdataset(shards)))
            for _ in range(repeats)
        ]
        costs = [
            (_seconds(stream(one_shard, workers)), _seconds(stream(many_shards, workers)))
            for _ in range(repeats)
        ]
    ratios = [ours / theirs for ours, theirs in pairs]
    return {
        "images": images,
        "processes": PROCESSES,
        "stream_images_per_s": round(statistics.median(a for a, _ in pairs)),
        "webdataset_images_per_s": round(statistics.median(b for _, b in pairs)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "pairs": repeats,
        "epoch_s_1_shard": round(statistics.median(one_shard for one_shard, _ in costs), 2),
        f"epoch_s_{MANY_SHARDS}_shards": round(
            statistics.median(many_shards for _, many_shards in costs), 2
        ),
        **bench_photos(repeats),
    }


def bench_photos(repeats: int, photos: int = 5) -> dict[str, Any]:
    """Milliseconds to decode a drawn JPEG of 12 megapixels for training at 64 pixels.

    With Pillow's `draft`, which decodes it at an eighth of its sides, and without; measured
    alternately, `repeats` times `photos` photos.
    """
    draws = np.random.default_rng(0)
    encoded = []
    for _ in range(photos):
        coarse = Image.fromarray(draws.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((4000, 3000), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())

    def ms(decode_one: Callable[[bytes], Any]) -> float:
        began = time.perf_counter()
        for photo in encoded:
            decode_one(photo)
        return 1000 * (time.perf_counter() - began) / photos

    pairs = [
        (ms(lambda photo: decode_crop(photo, 64)), ms(lambda photo: centre_crop(decode(photo), 64)))
        for _ in range(repeats)
    ]
    return {
        "photo_ms": round(statistics.median(drafted for drafted, _ in pairs), 1),
        "photo_ms_without_draft": round(statistics.median(whole for _, whole in pairs), 1),
        "photo_ratio": round(statistics.median(whole / drafted for drafted, whole in pairs), 1),
    }


def bench_memory(corpus: str) -> dict[str, Any]:
    """Peak memory in MiB of all processes of the stream, for SMALL_CORPUS and LARGE_CORPUS images.

    Both corpora repeat the same pictures, so a ratio of 1 means that memory does not grow with the
    corpus. Raises UserError without 256-pixel WebP pictures.
    """
    pictures, workers, peaks = _pictures(corpus), _workers(), {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (SMALL_CORPUS, LARGE_CORPUS):
            write_shards(Path(folder) / str(count), again(pictures, count), 1000)
        stream(Path(folder) / str(SMALL_CORPUS), workers)
        for count in (SMALL_CORPUS, LARGE_CORPUS):
            with Peak() as peak:
                stream(Path(folder) / str(count), workers)
            peaks[count] = peak.bytes / 2**20
    return {f"peak_mib_{count}": round(peak) for count, peak in peaks.items()} | {
        "ratio": round(peaks[LARGE_CORPUS] / peaks[SMALL_CORPUS], 3)
    }


def _workers() -> list:
    connect(2 * PROCESSES)
    return [Worker.remote() for _ in range(PROCESSES)]


def _pictures(corpus: str) -> list[Sample]:
    pictures = [
        sample
        for sample in read_corpus(corpus)
        if sample.suffix == "webp" and open_image(sample.image).size == (256, 256)
    ]
    if not pictures:
        raise UserError(
            f"{corpus} has no WebP pictures of 256x256 pixels; make the emoji corpus with "
            "`glide corpus` and give --shards."
        )
    return pictures


def _seconds(epoch: tuple[float, Arrivals]) -> float:
    began, arrivals = epoch
    return arrivals[-1][0] - began


def again(pictures: Sequence[Sample], count: int) -> Iterator[Sample]:
    """`count` samples: the pictures repeated in order, each under a new key."""
    for n, sample in enumerate(islice(cycle(pictures), count)):
        yield replace(sample, key=f"{n:07d}")


# -- the stream ------------------------------------------------------------------------------------

Arrivals = list[tuple[float, int]]  # per batch: (time in seconds, images)


@ray.remote(num_cpus=1)
class Worker(Actor):
    """Data loading of one training worker, without the model."""

    def __init__(self):
        self._collate = _collate()

    def epoch(self, feeder, rank: int, world: int) -> tuple[float, Arrivals]:
        """Start time in seconds and the arrivals of one epoch of worker `rank`."""
        began = time.time()
        batches = micro_batches(
            feeder, Epoch("bench", 0, 0), BatchSplit(BATCH * world, world, rank, BATCH)
        )
        return began, [
            (time.time(), len(batch.image))
            for rows in batches
            if (batch := self._collate(rows, 0)) is not None
        ]


def stream(shards: Path, workers: Sequence) -> tuple[float, Arrivals]:
    """Start time in seconds and all arrivals, sorted by time, of one epoch.

    The epoch is split between the workers as in a training run.
    """
    world = len(workers)
    feeder = Feeder.remote(
        find_parts(shards),
        64,
        BATCH * world,
        presets.get("nano-base").data.shuffle_buffer,
        0,
        Tally.remote(),
    )
    answers = ray.get(
        [worker.epoch.remote(feeder, rank, world) for rank, worker in enumerate(workers)]
    )
    return min(began for began, _ in answers), sorted(
        arrival for _, arrivals in answers for arrival in arrivals
    )


def _collate() -> Collate:
    import torch

    torch.set_num_threads(1)
    preset = presets.get("nano-base")
    return Collate(preset.model, preset.data)


# -- webdataset ------------------------------------------------------------------------------------


def webdataset(shards: Path) -> Arrivals:
    """Arrivals of the same work and shards in a DataLoader with PROCESSES webdataset workers."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([part.url for part in find_parts(shards)]),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.batched(BATCH, collation_fn=list),
        wds.map(_Theirs()),
    )
    loader = DataLoader(pipeline, batch_size=None, num_workers=PROCESSES)
    return [(time.time(), len(batch)) for batch in loader]


class _Theirs:
    """Collates webdataset's samples with the function that the stream's workers use."""

    def __init__(self):
        self._collate = None

    def __call__(self, samples: Sequence[dict]):
        self._collate = self._collate or _collate()
        rows = [
            (n, Sample(sample["__key__"], sample["webp"], "webp", (sample["txt"].decode(),), {}))
            for n, sample in enumerate(samples)
        ]
        batch = self._collate(columns(rows), 0)
        assert batch is not None  # all pictures can be decoded, see `_pictures`
        return batch.image


# -- both ------------------------------------------------------------------------------------------


def steady_rate(arrivals: Arrivals) -> float:
    """Images per second between the first and the last tenth of the images."""
    done = np.cumsum([count for _, count in arrivals])
    first, last = np.searchsorted(done, [0.1 * done[-1], 0.9 * done[-1]])
    return float((done[last] - done[first]) / (arrivals[last][0] - arrivals[first][0]))


class Peak:
    """Peak memory of this process and all its children together, in `bytes`, sampled every 0.5 s.

    Sums their PSS, which divides each shared page among the processes that share it.
    """

    def __enter__(self) -> Peak:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
