"""Scenes written as shards, beside the corpus that they are composed from."""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import is_remote
from .card import counts_of, read_card, write_card
from .credits import Credits
from .render import in_order, process_pool
from .scenes import compose
from .shards import Sample, begin, finish, write_shard
from .splits import SCENE_SPLITS
from .sprites import Sprites, read_sprites

log = logging.getLogger(__name__)

BYTES_PER_ROW = 16_000  # on disk
ROWS_PER_TASK = 50
ABOUT = "Scenes composed from emoji pictures; each row's json says exactly what is in it."


class SceneError(UserError):
    """Scenes that cannot be composed or written."""


def write_scenes(out: str, count: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compose `count` scenes from `out/train` and write SCENE_SPLITS beside it.

    Returns the index of each split. Raises SceneError if there are too few objects to compose from.
    """
    log.info(f"composing {count:,} scenes")
    with tempfile.TemporaryDirectory() as folder:
        sprites = _enough(read_sprites(f"{out}/train", Path(folder)), out)
        writers = {split: _Writer(f"{out}/{split}") for split in SCENE_SPLITS}
        tasks = (
            (seed, start, min(start + ROWS_PER_TASK, count))
            for start in range(0, count, ROWS_PER_TASK)
        )
        with process_pool(_begin_worker, (sprites,)) as pool:
            for composed in in_order(pool, _compose_some, tasks):
                for split, sample in composed:
                    writers[split].add(sample)
    card = (read_card(f"{out}/train") or {}) | {"about": ABOUT, "scenes": count, "seed": seed}
    return {split: writer.finish({**card, "split": split}) for split, writer in writers.items()}


def check_room(out: str, count: int) -> None:
    """Raise SceneError if `count` scenes do not fit on the disk; s3:// is not checked."""
    if is_remote(out):
        return
    folder = next(part for part in (Path(out), *Path(out).absolute().parents) if part.exists())
    free, needed = shutil.disk_usage(folder).free, count * BYTES_PER_ROW
    if needed > free:
        raise SceneError(
            f"{count:,} scenes take about {needed / 1e9:,.1f} GB and {out} has "
            f"{free / 1e9:,.1f} GB free; ask for at most --scenes {free // BYTES_PER_ROW}, or "
            "write to another disk."
        )


def _enough(sprites: Sprites, out: str) -> Sprites:
    """Keep the styles with at least two objects that can be counted.

    Raises SceneError if there is none.
    """
    styles = {style: of for style, of in sprites.styles.items() if len(sprites.counted[style]) > 1}
    if not styles:
        raise SceneError(
            f"{out}/train has no two objects to compose scenes from; choose more "
            "styles with --styles."
        )
    return Sprites(sprites.path, styles)


class _Writer:
    """Writer of rows as shards of 1000, in order of arrival."""

    def __init__(self, folder: str):
        self._folder = folder
        self._rows: list[Sample] = []
        self._entries: list[dict[str, Any]] = []
        self._kinds: Counter[str] = Counter()
        self._credits = Credits()
        begin(folder)

    def add(self, sample: Sample) -> None:
        self._rows.append(sample)
        self._kinds[sample.meta["scene"]] += 1
        self._credits.add(sample.meta)
        if len(self._rows) == 1000:
            self._write()

    def finish(self, card: Mapping[str, Any]) -> dict[str, Any]:
        """Write the remaining rows, the card and the index. Returns the index."""
        if self._rows:
            self._write()
        kinds = dict(sorted(self._kinds.items()))
        write_card(self._folder, {**card, **counts_of(self._credits), "kinds": kinds})
        return finish(self._folder, self._entries)

    def _write(self) -> None:
        self._entries.append(write_shard(self._folder, len(self._entries), self._rows))
        self._rows = []


_sprites: Sprites | None = None  # set in each worker process


def _begin_worker(sprites: Sprites) -> None:
    global _sprites
    _sprites = sprites


def _compose_some(task: tuple[int, int, int]) -> list[tuple[str, Sample]]:
    assert _sprites is not None
    seed, start, stop = task
    return [scene_row(_sprites, seed, number) for number in range(start, stop)]


def scene_row(sprites: Sprites, seed: int, number: int) -> tuple[str, Sample]:
    """Compose a scene. Returns its split and its row."""
    scene = compose(sprites, seed, number)
    buffer = io.BytesIO()
    # JPEG without chroma subsampling is written and read in 0.5 ms; WebP takes four times as long.
    scene.image.save(buffer, "JPEG", quality=92, subsampling=0)
    key, split = f"scene-{seed}-{number:07d}", SCENE_SPLITS[scene.held_out]
    return split, Sample(key, buffer.getvalue(), "jpg", scene.captions, scene.labels)
