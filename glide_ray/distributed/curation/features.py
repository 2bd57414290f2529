"""Features of the rows that `glide clean` judges, in a file per part beside the judged rows.

A row has a feature if no rule but one of the baseline drops it: what share of the rows a CLIP score
keeps does not depend on the other rules of an intersection.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import ray
from PIL import Image

from ... import storage
from ...config.data import CleanConfig
from ...data.baselines import CLUSTERED, check_language, needs_features, needs_scores
from ...data.shards import ShardError
from ...data.sources import Part, find_parts
from ...errors import ConfigError
from ..rows import INLINE_IMAGES
from .tables import load, save
from .tasks import TRIES, run_on

if TYPE_CHECKING:  # PyTorch takes a worker 2 s to import; only those with a network do
    from ...evaluation.picture_features import PictureFeatures

ROWS_PER_BATCH = 64  # rows that a network sees at once
SCHEMA = pyarrow.schema([("position", pyarrow.int32()), ("feature", pyarrow.binary())])


def features_file(folder: str, number: int) -> str:
    return f"{folder}/features/{number:06d}.parquet"


def load_features(folder: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N,) and features (N, E) float16 of a part; none for one that killed its worker."""
    try:
        table = load(features_file(folder, number))
    except (storage.MissingError, FileNotFoundError):
        table = SCHEMA.empty_table()
    return table["position"].to_numpy(), matrix_of(table["feature"])


def save_features(folder: str, number: int, position: np.ndarray, features: np.ndarray) -> None:
    """Write positions (N,) and features (N, E) of a part, whole or not at all."""
    save(
        pyarrow.table(
            {"position": position.astype(np.int32), "feature": column_of(features)}, SCHEMA
        ),
        features_file(folder, number),
    )


def column_of(features: np.ndarray) -> pyarrow.Array:
    """A binary column of features (N, E), as float16."""
    return pyarrow.array([row.tobytes() for row in features.astype(np.float16)], pyarrow.binary())


def matrix_of(column: pyarrow.ChunkedArray) -> np.ndarray:
    """The features (N, E) float16 in a column of `column_of`; (0, 0) of an empty one."""
    content = b"".join(chunk for chunk in column.to_pylist())
    return np.frombuffer(content, np.float16).reshape(len(column), -1 if len(column) else 0)


class PartFeatures:
    """Features and CLIP scores of the rows of one part, computed in batches."""

    def __init__(self, network: PictureFeatures, scored: bool):
        self._network, self._scored = network, scored
        self._waiting: list[tuple[dict[str, Any], np.ndarray, Sequence[str]]] = []
        self._positions: list[int] = []
        self._found: list[np.ndarray] = []

    def add(
        self, position: int, row: dict[str, Any], picture: Image.Image, captions: Sequence[str]
    ) -> None:
        """Add a row. Its `score` is set later, to that of its best caption."""
        self._positions.append(position)
        self._waiting.append((row, self._network.square(picture), captions))
        if len(self._waiting) == ROWS_PER_BATCH:
            self._compute()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (N,) and features (N, E) of all rows."""
        self._compute()
        return np.array(self._positions, np.int32), np.concatenate(
            [np.empty((0, self._network.width), np.float16), *self._found]
        )

    def _compute(self) -> None:
        features = self._network.of([square for _, square, _ in self._waiting])
        self._found.append(features.astype(np.float16))
        if self._scored:
            texts = [caption for *_, captions in self._waiting for caption in captions]
            words = iter(self._network.of_captions(texts))
            for (row, _, captions), feature in zip(self._waiting, features, strict=True):
                row["score"] = max(float(feature @ next(words)) for _ in captions)
        self._waiting = []


def check_settings(config: CleanConfig) -> list[str]:
    """Check what features, scores and the baseline need. Returns hashes of the files to read.

    Raises ConfigError, WeightsError, MissingNetworkError, and UserError for a missing package.
    """
    if needs_scores(config) and config.clip is None:
        raise ConfigError(
            f"baseline={config.baseline} compares images with captions; add --set clip=PATH, a "
            "weights file of glide_ray or the folder of a public CLIP."
        )
    if config.baseline in CLUSTERED and config.reference is None:
        raise ConfigError(
            f"baseline={config.baseline} compares with reference images; add "
            "--set reference=FOLDER, such as ImageNet's training images."
        )
    check_language(config)
    if not needs_features(config) and not needs_scores(config):
        return []
    from ...evaluation.picture_features import PictureFeatures
    from ...models.clip_scorer import fetch_clip
    from ...models.weights import WeightsError

    digests = [repr(part) for part in reference_parts(config)]
    if config.clip is None:
        PictureFeatures()
        return digests
    if not storage.is_remote(config.clip) and not os.path.exists(config.clip):
        raise ConfigError(
            f"There is no CLIP {config.clip}; --set clip=PATH takes a weights file of glide_ray or "
            "the folder of a public CLIP."
        )
    try:
        PictureFeatures(config.clip)
    except WeightsError as error:
        raise ConfigError(f"--set clip: {error}") from None
    return [*digests, storage.fingerprint(fetch_clip(config.clip))]


def reference_parts(config: CleanConfig) -> list[Part]:
    """The parts of the reference images; none for a baseline without them. Raises ConfigError."""
    if config.baseline not in CLUSTERED or config.reference is None:
        return []
    try:
        return find_parts(config.reference)
    except ShardError as error:
        raise ConfigError(f"--set reference: {error}") from None


def run_with_network(
    create: type,
    settings: Sequence[Any],
    parts: Sequence[Part],
    arguments: Iterable[tuple[Any, ...]],
    died: Callable[..., Any],
) -> Iterator[Any]:
    """Like `run_each`, with the method `judge` of actors `create(*settings)`.

    Few images are judged in this process, since starting actors takes some 10 s.
    """
    counts = [part.count or len(part.files) for part in parts]
    if all(counts) and sum(counts) <= INLINE_IMAGES:
        here = create(*settings)
        yield from (here.judge(*some) for some in arguments)
        return
    gpus = int(ray.cluster_resources().get("GPU", 0))
    cpus = int(ray.cluster_resources().get("CPU", 1))
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
    actor = ray.remote(create).options(max_restarts=-1, max_task_retries=TRIES - 1, **options)
    actors = [actor.remote(*settings) for _ in range(min(len(parts), gpus or cpus))]
    yield from run_on([one.judge for one in actors], arguments, died)


def limit_threads() -> None:
    """Let an actor without a GPU use one core: there are as many actors as cores."""
    import torch

    if not torch.cuda.is_available() and ray.get_runtime_context().get_actor_id():
        torch.set_num_threads(1)
