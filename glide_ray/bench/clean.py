"""Speed of `glide clean`, and time and memory of its search for near-duplicates.

Pictures and fingerprints are drawn, so that no corpus is needed.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import ray
from PIL import Image

from ..config.data import CleanConfig
from ..data.duplicates import FINGERPRINT_BYTES, fingerprint
from ..data.filters import NEAR_DUPLICATE
from ..data.shards import Sample, write_shards
from ..distributed.cluster import connect
from ..distributed.curation.clean import clean
from ..distributed.curation.judge import Judged, PartResult, write_judged
from ..distributed.curation.near_duplicates import find_near_duplicates
from ..distributed.curation.search import dropped_copies
from ..distributed.curation.tasks import run_each
from ..distributed.curation.write import plan_tasks

PICTURES, PER_SHARD, SIDE = 16_000, 500, 256
SIZES = 10**5, 10**6, 10**7  # drawn fingerprints
PART_ROWS, COPIES = 10_000, 0.03  # rows of a drawn part, and the share of planted copies
WORDS = FINGERPRINT_BYTES // 8


def bench_clean(repeats: int) -> dict[str, Any]:
    """Images per second of `glide clean`, and as a ratio to a loop over Pillow.

    The loop has as many processes as Ray has CPUs, which may be more than the machine has cores. It
    decodes each picture, makes its fingerprint, and writes it to a tar; it judges nothing
    and compares nothing. `decode_images_per_s` is that of a loop that only decodes. Each repetition
    runs the three in turn.
    """
    connect(2)
    processes = _processes()
    rates: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(f"{folder}/raw", drawn_pictures(PICTURES), PER_SHARD)
        write_shards(f"{folder}/few", drawn_pictures(4 * processes), 2)
        clean(f"{folder}/few", f"{folder}/warm-up", CleanConfig())  # starts Ray's workers
        for number in range(repeats):
            seconds = (
                _seconds_of_clean(f"{folder}/raw", f"{folder}/clean{number}"),
                _seconds_of_loop(f"{folder}/raw", f"{folder}/loop{number}", processes),
                _seconds_of_loop(f"{folder}/raw", None, processes),
            )
            rates += [tuple(PICTURES / one for one in seconds)]
    ratios = [ours / loop for ours, loop, _ in rates]
    return {
        "images": PICTURES,
        "processes": processes,
        "clean_images_per_s": round(statistics.median(rate[0] for rate in rates)),
        "loop_images_per_s": round(statistics.median(rate[1] for rate in rates)),
        "decode_images_per_s": round(statistics.median(rate[2] for rate in rates)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "repeats": repeats,
    }


def _processes() -> int:
    return int(ray.cluster_resources()["CPU"])


def drawn_pictures(count: int, side: int = SIDE) -> Iterator[Sample]:
    """JPEG pictures of blobs of colour, all different, with `side` pixels a side."""
    draws = np.random.default_rng(0)
    for n in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield Sample(f"{n:07d}", buffer.getvalue(), "jpg", (f"blobs, number {n}",), {})


def _seconds_of_clean(source: str, out: str) -> float:
    began = time.monotonic()
    done = clean(source, out, CleanConfig(per_shard=PER_SHARD))
    assert done.report.kept == PICTURES  # the pictures are all different
    return time.monotonic() - began


def _seconds_of_loop(source: str, out: str | None, processes: int) -> float:
    shards = sorted(Path(source).glob("*.tar"))
    if out:
        Path(out).mkdir()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_nothing, range(processes)))  # starts the processes
        began = time.monotonic()
        list(pool.map(_loop, shards, [out] * len(shards)))
        return time.monotonic() - began


def _nothing(_: int) -> None:
    time.sleep(0.5)  # so that each process takes one


def _loop(shard: Path, out: str | None) -> None:
    target = tarfile.open(Path(out) / shard.name, "w") if out else None
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            data = file.read() if file is not None else b""
            if member.name.endswith(".jpg"):
                picture = Image.open(io.BytesIO(data)).convert("RGB")
                if target is not None:
                    fingerprint(picture)
            if target is not None:
                target.addfile(member, io.BytesIO(data))
    if target is not None:
        target.close()


# -- near-duplicates -------------------------------------------------------------------------------


def bench_duplicates() -> dict[str, Any]:
    """Seconds and peak memory of the search for near-duplicates among SIZES drawn fingerprints.

    COPIES of them are planted copies of others, with other pixels within the limits. `peak_mib` is
    that of all processes, Ray's included; `driver_mib` the growth of this one, from before the
    fingerprints are drawn to the plan of the shards.
    """
    connect(2)
    result: dict[str, Any] = {}
    list(run_each(_nothing, [(n,) for n in range(_processes())]))
    for rows in SIZES:
        with tempfile.TemporaryDirectory() as folder, Watch() as watch:
            parts = rows // PART_ROWS
            judged = Judged(parts)
            for part in run_each(_draw_part, ((n, parts, folder) for n in range(parts))):
                judged.add(part)
            began = time.monotonic()
            search = find_near_duplicates(judged, folder, f"{folder}/search")
            seconds = time.monotonic() - began
            plan_tasks(judged.kept, PART_ROWS)
            checked = list(run_each(_check_part, ((search, n, parts) for n in range(parts))))
            found, false = (sum(numbers) for numbers in zip(*checked, strict=True))
        result |= {
            f"seconds_{rows}": round(seconds, 1),
            f"peak_mib_{rows}": round(watch.total / 2**20),
            f"driver_mib_{rows}": round(watch.driver / 2**20),
            f"copies_found_{rows}": round(found / (parts * round(PART_ROWS * COPIES)), 5),
            f"false_alarms_{rows}": false,
        }
        assert judged.dropped[NEAR_DUPLICATE] >= found
    small, large = (result[f"seconds_{rows}"] for rows in SIZES[-2:])
    return result | {"seconds_ratio": round(large / small, 1)}


def _draw_part(number: int, parts: int, folder: str) -> PartResult:
    prints = np.random.PCG64(number).random_raw(PART_ROWS * WORDS).view(np.uint8)
    prints = prints.reshape(PART_ROWS, FINGERPRINT_BYTES).copy()
    pixels = np.full(PART_ROWS, 256)
    draws = np.random.default_rng([1, number])
    for position, source, original in _planted(number, parts):
        copy = _original(source, original)
        if draws.random() < 0.7:
            for bit in draws.choice(64, draws.integers(0, 5), replace=False).tolist():
                copy[bit // 8] ^= 1 << (bit % 8)
            shifted = copy[8:].astype(int) + draws.integers(-3, 4, FINGERPRINT_BYTES - 8)
            copy[8:] = shifted.clip(0, 255)
        prints[position], pixels[position] = copy, 128
    rows = [
        {
            "key": f"{number}-{position}",
            "reason": "",
            "caption": "drawn",
            "width": int(side),
            "height": int(side),
            "fingerprint": one.tobytes(),
        }
        for position, (one, side) in enumerate(zip(prints, pixels, strict=True))
    ]
    result = PartResult(number, "drawn")
    write_judged(rows, result, folder)
    return result


def _planted(number: int, parts: int) -> Iterator[tuple[int, int, int]]:
    """(position, part and position of the original) of the copies in a part: its last rows."""
    copies = round(PART_ROWS * COPIES)
    draws = np.random.default_rng([2, number])
    sources = draws.integers(0, parts, copies).tolist()
    originals = draws.integers(0, PART_ROWS - copies, copies).tolist()
    yield from zip(range(PART_ROWS - copies, PART_ROWS), sources, originals, strict=True)


def _original(part: int, position: int) -> np.ndarray:
    generator = np.random.PCG64(part)
    generator.advance(position * WORDS)
    return generator.random_raw(WORDS).view(np.uint8).copy()


def _check_part(search: Any, number: int, parts: int) -> tuple[int, int]:
    """Numbers of planted copies found for their original, and of other rows reported."""
    planted = {position: original for position, *original in _planted(number, parts)}
    copies: pyarrow.Table = dropped_copies(search, number)
    found = sum(
        planted.get(row["position"]) == [row["kept_part"], row["kept_position"]]
        for row in copies.to_pylist()
    )
    return found, len(copies) - found


class Watch:
    """Growth of this process' peak memory in bytes (`driver`), and the peak of all (`total`).

    The total is the PSS of this process and all its children, as in `data.Peak`.
    """

    def __enter__(self) -> Watch:
        self.total, self.driver, self._stop = 0, 0, threading.Event()
        self._before = psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(0.5):
            self.driver = max(self.driver, this.memory_info().rss - self._before)
            total = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.total = max(self.total, total)
