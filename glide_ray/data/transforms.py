"""Rows to training batches: decode, centre crop (app. A.2), low-res pair, mask, caption, tokens.

Random draws depend only on the row's key, the epoch and the seed, not on the worker or on the other
rows of the batch. Rows are columns: id (int), key, image (bytes), captions (a JSON list).
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..config.data import DataConfig
from ..config.models import AnyModelConfig
from ..config.training import Preset
from ..errors import UserError
from ..tensors import Batch, Conditioning
from .captions import choose
from .filters import Candidate, first_broken, header_rules
from .images import ImageError, area_downsample, blur, decode_crop, to_tensor
from .masks import random_known
from .sample import Sample, ShardError
from .sources import columns, find_parts, read_part, row_id
from .tokenizer import Tokenizer

# range of sigma in low-res pixels, drawn uniformly (Ho et al. 2021, Cascaded Diffusion Models)
BLUR_SIGMAS = (0.4, 0.6)


class Collate:
    """Rows -> Batch.

    Images that cannot be decoded are counted in `broken` and replaced by others of their batch, so
    that every worker has the same number of batches, of the same size.
    """

    def __init__(self, model: AnyModelConfig, data: DataConfig, seed: int = 0):
        self.model, self.data, self.seed = model, data, seed
        self.broken = 0
        # row id -> decoded picture, while `data.cache_gib` has room
        self._decoded: dict[int, np.ndarray] = {}
        self._room = int(data.cache_gib * 2**30)  # bytes
        self._tokenizer = Tokenizer(model.context)

    def __call__(
        self, rows: Mapping[str, Sequence], epoch: int, augment: bool = True
    ) -> Batch | None:
        """The batch of these rows in an epoch, or None if no row is usable.

        `augment` false is for held-out batches: no random crop or blur, and the first caption,
        never the empty one.
        """
        pictures, captions, keys, numbers = [], [], [], []
        for number, key, image, texts in zip(
            rows["id"], rows["key"], rows["image"], rows["captions"], strict=True
        ):
            try:
                pictures.append(self._picture(int(number), image))
            except ImageError:
                self.broken += 1
                continue
            texts = json.loads(str(texts))
            captions.append(
                choose(texts, str(key), epoch, self.seed, self.data.empty_caption_rate)
                if augment
                else texts[0]
            )
            keys.append(str(key))
            numbers.append(int(number))
        if not pictures:
            return None
        order = [n % len(pictures) for n in range(len(rows["key"]))]
        tokens, mask = self._tokenizer.batch([captions[n] for n in order])
        pairs = [self._pair(pictures[n], keys[n], epoch, augment) for n in order]
        image = to_tensor(np.stack([picture for picture, _ in pairs]))
        low_res = (
            to_tensor(np.stack([small for _, small in pairs if small is not None]))
            if self.model.low_res_size
            else None
        )
        known_mask = None
        if self.model.inpaint:
            size = image.shape[-1]
            known_mask = torch.from_numpy(
                np.stack([self._known(size, keys[n], epoch, augment) for n in order])
            )[:, None].float()
        conditioning = Conditioning(
            tokens, mask, low_res, None if known_mask is None else image, known_mask
        )
        # a held-out image counts once: rows that repeat it are numbered -1
        own = [numbers[n] if augment or place == n else -1 for place, n in enumerate(order)]
        return Batch(image, conditioning, torch.tensor(own, dtype=torch.int64))

    def _picture(self, number: int, image) -> np.ndarray:
        """Decoded centre crop, uint8 (H, W, 3) at the model's size. Raises ImageError."""
        if number in self._decoded:
            return self._decoded[number]
        picture = decode_crop(bytes(image), self.model.image_size)
        if picture.nbytes <= self._room:
            self._decoded[number] = picture
            self._room -= picture.nbytes
        return picture

    def _pair(
        self, picture: np.ndarray, key: str, epoch: int, augment: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A picture and its low-res version, both cropped if training uses random crops.

        The low-res version is None for a base model.
        """
        rate = self.data.flip_rate
        if augment and rate and self._draws("flip", key, epoch).random() < rate:
            picture = np.ascontiguousarray(picture[:, ::-1])
        if not self.model.low_res_size:
            return picture, None
        small = area_downsample(picture, self.model.low_res_size)
        draws = self._draws("pair", key, epoch) if augment else None
        if draws is not None and draws.random() < self.data.low_res_blur_rate:
            small = blur(small, draws.uniform(*BLUR_SIGMAS))
        if draws is not None and self.data.low_res_noise:
            deviation = draws.uniform(0, self.data.low_res_noise)
            noisy = small + deviation * draws.standard_normal(small.shape, dtype=np.float32)
            small = noisy.round().clip(0, 255).astype(np.uint8)
        if draws is None or not self.data.crop:
            return picture, small
        # Draw the corner in low-res pixels, so that both crops start at a whole pixel.
        factor = self.model.image_size // self.model.low_res_size
        top, left = draws.integers(self.model.low_res_size - self.data.crop // factor + 1, size=2)
        return _cut(picture, top * factor, left * factor, self.data.crop), _cut(
            small, top, left, self.data.crop // factor
        )

    def _known(self, size: int, key: str, epoch: int, augment: bool) -> np.ndarray:
        """Known pixels of a picture for an inpainting model, (size, size) bool."""
        draws = self._draws("mask", key, epoch)
        known = random_known(size, draws)
        return known & ~(augment and draws.random() < self.data.generate_rate)

    def _draws(self, purpose: str, key: str, epoch: int) -> np.random.Generator:
        digest = hashlib.sha256(f"{purpose}/{self.seed}/{epoch}/{key}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _cut(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return pixels[top : top + size, left : left + size]


def collate_batches(
    micro_batches: Iterator[dict[str, list]], collate: Collate, preset: Preset, epoch: int
) -> Iterator[Batch]:
    """Micro-batches of rows to batches, one for each, so that all ranks have the same number.

    Raises ShardError if none of an epoch's pictures can be decoded.
    """
    last = None
    pending: list[int] = []  # sizes of the batches that have not been yielded yet
    for rows in micro_batches:
        last = collate(rows, epoch) or last
        pending.append(len(rows["id"]))
        # Replace a batch without a usable picture by the last good one, or before that by
        # the first good one. A rank that skipped it would wait for the others at the end of
        # the epoch, while they wait for it in the all-reduce.
        while last is not None and pending:
            size = pending.pop(0)
            yield last if size == len(last.image) else last[torch.arange(size) % len(last.image)]
    if pending:
        raise ShardError(
            f"No picture of the last {len(pending)} batches of the corpus {preset.data.corpus} can "
            f"be decoded; leave those that are broken out with `glide clean`."
        )


def prefetch(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """The same batches, prefetched by a thread while the network computes."""
    ready: queue.Queue = queue.Queue(depth)

    def fill():
        try:
            for batch in batches:
                ready.put(batch)
            ready.put(None)
        except BaseException as error:  # re-raised in the thread that uses the batches
            ready.put(error)

    threading.Thread(target=fill, name="glide-decode", daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def held_out_rows(data: DataConfig) -> list[tuple[int, Sample]]:
    """(row number, sample) of the first `held_out_images` usable held-out rows, always the same."""
    rules, rows = header_rules(data.min_size), []
    for part in find_parts(data.held_out, data.caption_column):
        try:
            for position, sample in enumerate(read_part(part)):
                if first_broken(Candidate(sample), rules) is None:
                    rows.append((row_id(part.url, position), sample))
                if len(rows) == data.held_out_images:
                    break
        except UserError:  # skip the rest of a broken shard
            continue
        if len(rows) == data.held_out_images:
            break
    return rows


def held_out_batches(
    data: DataConfig,
    model: AnyModelConfig,
    batch: int,
    rank: int = 0,
    world: int = 1,
    rows: Sequence[tuple[int, Sample]] | None = None,
) -> list[Batch]:
    """This rank's batches of `rows`, by default of `held_out_rows`.

    `Batch.rows` numbers the rows across all ranks. Every rank gets the same number of rows; those
    that only pad are numbered -1. Raises ShardError if rows or decodable pictures are too few.
    """
    collate, rows = Collate(model, data), held_out_rows(data) if rows is None else rows
    if len(rows) < world:
        raise ShardError(
            f"The held-out corpus {data.held_out} has {len(rows)} usable rows, fewer than the "
            f"{world} workers; give another with --set data.held_out=FOLDER."
        )
    numbered = [(number, sample) for number, (_, sample) in enumerate(rows)]
    numbered += [(-1, rows[0][1])] * (-len(rows) % world)
    rank_rows = numbered[rank::world]
    parts = [rank_rows[start : start + batch] for start in range(0, len(rank_rows), batch)]
    batches = [collate(columns(part), epoch=0, augment=False) for part in parts]
    good = next((collated_batch for collated_batch in batches if collated_batch is not None), None)
    if good is None:
        raise ShardError(
            f"No picture of rank {rank}'s part of the held-out corpus {data.held_out} can be "
            f"decoded; give another with --set data.held_out=FOLDER."
        )
    # Replace a batch without a usable picture by padding: a rank with fewer batches would make
    # fewer collective calls, and the other ranks would wait for it.
    return [
        replace(good[torch.arange(len(part)) % len(good.image)], rows=torch.full((len(part),), -1))
        if collated_batch is None
        else collated_batch
        for part, collated_batch in zip(parts, batches, strict=True)
    ]
