"""Sharded training state that any number of ranks and any ZeRO stage can load.

DeepSpeed's optimizer steps flat float32 tensors. They contain whole, cut or padded parameters,
depending on the ZeRO stage and the number of ranks. A `ParamSlice` maps a range of one parameter
to its place in these tensors. Checkpoints store the ranges under their parameters' names, so that
reading needs no knowledge of the layout they were written in. The format is safetensors: nothing
is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import storage
from ..config.training import Preset
from ..models.weights import ADAPTER
from ..storage import StorageError, atomic_write, usual_mode
from .checkpoint import (
    COMPLETE,
    CheckpointError,
    Manifest,
    fetch,
    read_base,
    read_preset,
    read_progress,
    verify,
)
from .collectives import from_rank_0
from .trained_part import adapter_config, kept_weights

FILES = "part.*.safetensors"
HEADERS_AT_ONCE = 16  # headers of part files that are read from s3:// at once
MAX_HEADER = 2**27  # bytes; a longer header is damage
# Kinds of state. The rate is appended to the kind of an EMA: "average/0.999".
WEIGHTS, FIRST, SECOND, AVERAGE = "weights", "exp_avg", "exp_avg_sq", "average"
# Kind -> this rank's flat tensors, in the order of `deepspeed_engine.masters`.
State = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class ParamSlice:
    """Range [start, start + count) of the flattened parameter `name`, and its place on this rank.

    It begins at `offset` in flat tensor number `master`. `shape`: shape of the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    master: int
    offset: int


def put_slice(flat: Sequence[Tensor], piece: ParamSlice, values: Tensor) -> None:
    """Write a slice's values to its place in the flat tensors."""
    target = flat[piece.master].detach().reshape(-1)
    target[piece.offset : piece.offset + piece.count] = values.to(target)


# -- files -----------------------------------------------------------------------------------------


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"part.{rank}.safetensors"


def save_part(path: Path, slices: Sequence[ParamSlice], state: State) -> None:
    """Write this rank's slices of every kind of state. Raises StorageError."""
    tensors = {
        f"{kind}|{param_slice.name}": flat[param_slice.master]
        .detach()
        .reshape(-1)[param_slice.offset : param_slice.offset + param_slice.count]
        .cpu()
        .contiguous()
        for kind, flat in state.items()
        for param_slice in slices
    }
    pieces = {
        param_slice.name: [param_slice.shape, param_slice.start, param_slice.count]
        for param_slice in slices
    }
    try:
        with usual_mode(path):
            save_file(tensors, path, metadata={"pieces": json.dumps(pieces)})
    except SafetensorError as error:  # most often a full disk
        raise StorageError(f"{path.name} cannot be written: {error}.") from None


class CheckpointReader:
    """Reader over the shards of all ranks of a checkpoint. Raises CheckpointError.

    `shapes`: parameter name -> shape; `kinds`: kinds of state in the checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder, self._opened = folder, ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, list[tuple[int, int, safe_open]]] = {}
        self.kinds: set[str] = set()
        files = sorted(folder.glob(FILES))
        if not files:
            raise CheckpointError(
                f"{folder} is not a complete glide_ray checkpoint; give the folder of another run."
            )
        for path in files:
            try:
                file = self._opened.enter_context(safe_open(path, "pt"))
                for name, (shape, start, count) in json.loads(file.metadata()["pieces"]).items():
                    self.shapes[name] = tuple(shape)
                    self._where.setdefault(name, []).append((start, count, file))
                self.kinds |= {key.partition("|")[0] for key in file.keys()}
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is damaged ({error}); give an earlier checkpoint."
                ) from None

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()

    def read_slice(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Read range [start, start + count) of a flattened parameter's state."""
        result, end = torch.empty(count), start
        for there, length, file in sorted(self._where[name], key=lambda found: found[:2]):
            low, high = max(start, there), min(start + count, there + length)
            if low < high:
                result[low - start : high - start] = file.get_slice(f"{kind}|{name}")[
                    low - there : high - there
                ]
                end = max(end, high) if low <= end else end
        if end != start + count:
            raise CheckpointError(
                f"{self._folder} lacks the file of a rank: {name} is incomplete; give an earlier "
                "checkpoint."
            )
        return result

    def full(self, kind: str, name: str) -> Tensor:
        """Read a parameter's state in full, in the parameter's shape."""
        return self.read_slice(kind, name, 0, prod(self.shapes[name])).reshape(self.shapes[name])


def fetch_parts(path: str, cache: Path, slices: Sequence[ParamSlice]) -> Path:
    """A local folder with the files of the s3:// checkpoint `path` that hold this rank's slices.

    All ranks call it together. With the layout that wrote the checkpoint, each fetches its own
    file. Raises CheckpointError if a file is damaged, StorageError.
    """
    manifest, pieces = from_rank_0(lambda: _read_pieces(path))
    folder = cache / hashlib.sha256(path.encode()).hexdigest()[:16]
    wanted = [
        name
        for name in manifest
        if name not in pieces or any(_overlap(pieces[name], one) for one in slices)
    ]
    for name in (COMPLETE, *wanted):
        if not (folder / name).exists():
            storage.download(f"{path}/{name}", folder / name)
    verify(folder, names=wanted)
    return folder


def _overlap(pieces: Mapping[str, Sequence], wanted: ParamSlice) -> bool:
    """Whether a file with `pieces` holds a part of the slice."""
    if wanted.name not in pieces:
        return False
    _, start, count = pieces[wanted.name]
    return max(start, wanted.start) < min(start + count, wanted.start + wanted.count)


def _read_pieces(path: str) -> tuple[Manifest, dict[str, dict[str, list]]]:
    """The manifest of an s3:// checkpoint, and the pieces of each of its part files."""
    try:
        manifest = json.loads(storage.read(f"{path}/{COMPLETE}"))
    except ValueError as error:
        raise _damaged(f"{path}/{COMPLETE}", error) from None
    parts = [name for name in manifest if fnmatch(name, FILES)]
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        pieces = pool.map(lambda name: _pieces(f"{path}/{name}"), parts)
        return manifest, dict(zip(parts, pieces, strict=True))


def _pieces(path: str) -> dict[str, list]:
    """The pieces of a part file, from its header."""
    try:
        (length,) = struct.unpack("<Q", storage.read_range(path, 0, 8))
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length:,} bytes")
        header = json.loads(storage.read_range(path, 8, 8 + length))
        return json.loads(header["__metadata__"]["pieces"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({error}); give an earlier checkpoint.")


def load_parts(folder: Path, slices: Sequence[ParamSlice], state: State) -> None:
    """Fill this rank's flat tensors from a checkpoint of any layout.

    An average at a rate that the checkpoint does not have starts from its weights. Raises
    CheckpointError if the checkpoint is incomplete or of another model.
    """
    with CheckpointReader(folder) as parts:
        for kind, flat in state.items():
            if kind not in parts.kinds and kind.startswith(AVERAGE):
                kind = WEIGHTS
            if kind not in parts.kinds:
                raise CheckpointError(
                    f"The checkpoint in {folder} has no {kind}; give an earlier checkpoint."
                )
            for param_slice in slices:
                if parts.shapes.get(param_slice.name) != param_slice.shape:
                    raise CheckpointError(
                        f"The checkpoint in {folder} is of another model: {param_slice.name} is "
                        f"{list(parts.shapes.get(param_slice.name, ()))} there and "
                        f"{list(param_slice.shape)} here."
                    )
                put_slice(
                    flat,
                    param_slice,
                    parts.read_slice(kind, param_slice.name, param_slice.start, param_slice.count),
                )


def export(
    folder: Path,
    kind: str,
    target: str | Path,
    metadata: Mapping[str, str],
    order: Sequence[str] | None = None,
    kept: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write one kind of state as a float32 weights file, without a GPU. Raises CheckpointError.

    Writes tensor by tensor, so that it needs memory for the largest tensor only. `order`: names of
    the tensors, by default sorted. `kept`: tensors that are not in the checkpoint.
    """
    with CheckpointReader(folder) as parts:
        if kind not in parts.kinds:
            known = ", ".join(sorted(parts.kinds - {FIRST, SECOND}))
            raise CheckpointError(f"The checkpoint in {folder} holds no {kind}; it has {known}.")
        shapes = {**{name: tuple(one.shape) for name, one in kept.items()}, **parts.shapes}
        shapes = {name: shapes[name] for name in order or sorted(shapes)}

        def tensor_of(name: str) -> Tensor:
            return kept[name].float() if name in kept else parts.full(kind, name)

        with atomic_write(target) as partial:
            write_weights(partial, shapes, tensor_of, metadata)


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write float32 tensors of these shapes to a safetensors file, one at a time."""
    with open(path, "wb") as file:
        file.write(_header(shapes, metadata))
        for name in shapes:
            file.write(tensor_of(name).contiguous().numpy().tobytes())


def export_average(
    folder: Path,
    target: str | Path,
    rate: float | None = None,
    metadata_of: Callable[[Preset], Mapping[str, str]] | None = None,
) -> tuple[Preset, int, float]:
    """Write a checkpoint's EMA as a weights file, or an adapter's. Returns (preset, step, rate).

    `rate`: by default the preset's first EMA rate. `metadata_of`: further metadata for a run of
    this preset. Raises CheckpointError, and WeightsError without the weights that the run keeps.
    """
    preset, base = read_preset(folder), read_base(folder)
    about, kept = "config", kept_weights(preset, base)
    described = preset.model.model_dump_json()
    if base and preset.train.lora_rank:
        about, described = ADAPTER, adapter_config(preset, base).model_dump_json()
    rate, step = (
        preset.train.ema_rates[0] if rate is None else rate,
        read_progress(folder, preset)[0].step,
    )
    export(
        folder,
        f"{AVERAGE}/{rate:g}",
        target,
        {
            about: described,
            "step": str(step),
            "weights": "ema",
            "ema_rate": f"{rate:g}",
            **(metadata_of(preset) if metadata_of else {}),
        },
        kept=kept,
    )
    return preset, step, rate


def export_to(
    checkpoint: str,
    out: str | Path,
    rate: float | None = None,
    metadata_of: Callable[[Preset], Mapping[str, str]] | None = None,
) -> tuple[Preset, int, float]:
    """`export_average` for a checkpoint folder and a target file that are local or s3://.

    Raises CheckpointError, StorageError.
    """
    folder = fetch(checkpoint)
    with local_target(out) as target:
        return export_average(folder, target, rate, metadata_of)


@contextmanager
def local_target(out: str | Path) -> Iterator[Path]:
    """A local file to write: `out`, or a temporary file that is then stored at the s3:// `out`."""
    if not storage.is_remote(out):
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.safetensors"
        yield weights
        storage.put(weights, out)


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> bytes:
    """Header of a safetensors file of float32 tensors in this order.

    Format specification: 8 bytes of length, then JSON.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
