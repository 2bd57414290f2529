"""The corpus as a Ray Dataset, and its rows as training batches.

Bytes move through Ray's object store, pixels do not: images are decoded in the worker that trains on them. A row is
{key, image (bytes), captions (a JSON list)}.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow.parquet
import ray
import ray.data

from .. import storage
from ..config import AnyModelConfig, DataConfig, UserError
from ..data.captions import choose
from ..data.filters import Report, reason_to_drop
from ..data.images import ImageError, area_downsample, centre_crop, decode, to_tensor
from ..data.shards import ShardError, captions_of, read_shard
from ..forms import Batch, Conditioning
from ..tokenizer import Tokenizer

SUFFIXES = (".tar", ".parquet")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "TEXT")
ROWS_PER_BLOCK = 64


def corpus_files(path: str) -> list[str]:
    """The shards of a corpus, local or s3://. Raises ShardError where there are none."""
    files = list(storage.list_files(path, SUFFIXES))
    if not files:
        raise ShardError(f"The corpus {path} is empty: no .tar or .parquet file is there; make the default one with "
                         f"`glide corpus`, or give another with --set data.corpus=FOLDER.")
    return files


def open_corpus(path: str, min_size: int, tally=None) -> ray.data.Dataset:
    """Stream a corpus, dropping rows that break a rule. `tally`, a `Tally` actor, is told of each drop."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    files = corpus_files(path)

    def read(batch: dict[str, np.ndarray]) -> Iterator[dict[str, list]]:
        for url in batch["item"]:
            yield from _kept_blocks(str(url), min_size, tally)

    # One task a shard, so that a shard that cannot be read costs itself only.
    return ray.data.from_items(files, override_num_blocks=len(files)).map_batches(read, batch_size=1)


def _kept_blocks(url: str, min_size: int, tally) -> Iterator[dict[str, list]]:
    report, block = Report(), []
    try:
        for row in read_rows(url):
            reason = reason_to_drop(row["image"], json.loads(row["captions"]), min_size)
            report.add(row["key"], reason)
            if reason is None:
                block.append(row)
            if len(block) == ROWS_PER_BLOCK:
                yield _columns(block)
                block = []
    except UserError as error:
        report.add(f"{url}: {error}", "shards that cannot be read")
    if block:
        yield _columns(block)
    if tally is not None:
        ray.get(tally.add.remote(report))


def _columns(rows: Sequence[Mapping]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in ("key", "image", "captions")}


def read_rows(url: str) -> Iterator[dict]:
    """The rows of one tar or Parquet file. Raises ShardError for one that is broken or has no image column."""
    data = storage.read(url) if storage.is_remote(url) else url
    if url.endswith(".tar"):
        for sample in read_shard(data):
            yield {"key": sample.key, "image": sample.image, "captions": json.dumps(sample.captions)}
        return
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data) if isinstance(data, bytes) else data)
    except (pyarrow.ArrowInvalid, OSError):
        raise ShardError(f"{url} is not a whole Parquet file; copy it again.") from None
    image, caption = _column(table, IMAGE_COLUMNS, url), _column(table, CAPTION_COLUMNS, url)
    names = [name for name in dict.fromkeys((image, caption, "key")) if name in table.schema_arrow.names]
    position = 0
    for batch in table.iter_batches(ROWS_PER_BLOCK, columns=names):
        for row in batch.to_pylist():
            content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]   # a dict as Hugging Face writes it
            captions = captions_of(None, {"captions" if isinstance(row[caption], list) else "caption": row[caption]})
            yield {"key": str(row.get("key", f"{url}#{position}")), "image": content or b"", "captions": json.dumps(captions)}
            position += 1


def _column(table: pyarrow.parquet.ParquetFile, names: Sequence[str], url: str) -> str:
    for name in names:
        if name in table.schema_arrow.names:
            return name
    raise ShardError(f"{url} has no column named {' or '.join(names)}; it has: {', '.join(table.schema_arrow.names)}.")


@ray.remote(num_cpus=0)
class Tally:
    """Counts what the filter stage kept and dropped, wherever its tasks run."""

    def __init__(self):
        self._report = Report()

    def add(self, report: Report) -> None:
        self._report.merge(report)

    def report(self) -> Report:
        return self._report


# -- rows to batches --------------------------------------------------------------------------------------------------

class Collate:
    """Rows -> Batch: decode, centre crop (app. A.2), low-res pair by box filter, one caption a row and epoch, tokens.

    The captions drawn depend on the row's key, the epoch and the seed only. Images that turn out broken are counted and
    their places filled with the others of their batch, so that every worker sees equally many batches.
    """

    def __init__(self, model: AnyModelConfig, data: DataConfig, seed: int = 0):
        self.model, self.data, self.seed = model, data, seed
        self.broken = 0
        self._tokenizer = Tokenizer(model.context)

    def __call__(self, rows: Mapping[str, Sequence], epoch: int, augment: bool = True) -> Batch | None:
        """`augment` false takes the first caption, never the empty one: for held-out batches. None if no row is usable."""
        pictures, captions, corners = [], [], []
        for key, image, texts in zip(rows["key"], rows["image"], rows["captions"], strict=True):
            try:
                pictures.append(centre_crop(decode(bytes(image)), self.model.image_size))
            except ImageError:
                self.broken += 1
                continue
            corners.append(self._corner(str(key), epoch) if augment else (0, 0))
            texts = json.loads(str(texts))
            captions.append(choose(texts, str(key), epoch, self.seed, self.data.empty_caption_rate) if augment else texts[0])
        if not pictures:
            return None
        order = [n % len(pictures) for n in range(len(rows["key"]))]
        tokens, mask = self._tokenizer.batch([captions[n] for n in order])
        pairs = [self._pair(pictures[n], corners[n], augment) for n in order]
        low_res = to_tensor(np.stack([small for _, small in pairs])) if self.model.low_res_size else None
        return Batch(to_tensor(np.stack([picture for picture, _ in pairs])), Conditioning(tokens, mask, low_res))

    def _pair(self, picture: np.ndarray, corner: tuple[int, int], augment: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """A picture and its low-res half, both cut to the crop when training on crops."""
        if not self.model.low_res_size:
            return picture, None
        small = area_downsample(picture, self.model.low_res_size)
        if not self.data.crop or not augment:
            return picture, small
        factor, size = self.model.image_size // self.model.low_res_size, self.data.crop
        (top, left), small_size = corner, size // factor
        return (picture[top * factor:top * factor + size, left * factor:left * factor + size],
                small[top:top + small_size, left:left + small_size])

    def _corner(self, key: str, epoch: int) -> tuple[int, int]:
        """Where this epoch's crop begins, in low-res pixels, so that both halves of the pair can be cut there."""
        if not self.data.crop:
            return 0, 0
        room = self.model.low_res_size - self.data.crop * self.model.low_res_size // self.model.image_size + 1
        digest = hashlib.sha256(f"crop/{self.seed}/{epoch}/{key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % room, int.from_bytes(digest[4:8], "big") % room


def held_out_batches(data: DataConfig, model: AnyModelConfig, batch: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """This rank's part of the first `held_out_images` usable held-out rows, in batches; the same at every call."""
    collate, rows = Collate(model, data), []
    for url in corpus_files(data.held_out):
        for row in read_rows(url):
            if reason_to_drop(row["image"], json.loads(row["captions"]), data.min_size) is None:
                rows.append(row)
            if len(rows) == data.held_out_images:
                break
        if len(rows) == data.held_out_images:
            break
    if len(rows) < world:
        raise ShardError(f"The held-out corpus {data.held_out} has {len(rows)} usable rows, fewer than the {world} workers; "
                         f"give another with --set data.held_out=FOLDER.")
    mine = rows[rank:len(rows) // world * world:world]
    batches = [collate(_columns(mine[start:start + batch]), epoch=0, augment=False) for start in range(0, len(mine), batch)]
    return [made for made in batches if made is not None]
