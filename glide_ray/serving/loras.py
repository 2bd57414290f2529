"""The adapters (LoRA) that clients load and unload while the server runs.

Each has a record, a small JSON file, in the folder LOADED of the server's folder of adapters. So
all ingress replicas see the same adapters at once, and a restarted server still has them. A replica
of a stage reads the adapter's file when a request first needs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from .. import storage
from ..config.lora import AdapterConfig, Lora, NamedLora
from ..config.models import ModelConfig
from ..config.serving import ServeConfig
from ..errors import UserError, nearest
from ..models.adapters import read_adapter, read_config
from ..models.layers import shapes_only
from ..models.weights import build_model, load_metadata
from ..pretrained.card import credits, licences, sources_in
from ..sampling.recipe import ModelSet
from .errors import ApiError
from .schema import LoraEntry, LoraFile, LoraUse

log = logging.getLogger(__name__)

LOADED = "loaded"  # folder of the records, in the folder of adapters


class LoraFolder:
    """The adapters of one server. All methods read or write files: call them outside event loops.

    Without `lora_folder` in the config there are none, and none can be loaded.
    """

    def __init__(self, config: ServeConfig):
        self._folder = config.lora_folder
        self._most, self._most_bytes = config.max_loras, config.lora_bytes

    def entries(self) -> list[LoraEntry]:
        """The loaded adapters, by name. Raises StorageError.

        A damaged record hides its own adapter only, and the log names it.
        """
        found = []
        for name in self._names():
            try:
                entry = self._read(name)
            except UserError as error:
                log.warning(str(error))
                continue
            if entry is not None:
                found.append(entry)
        return found

    def load(self, file: LoraFile, served: Sequence[ModelSet]) -> LoraEntry:
        """Check an adapter and add it to those that requests can name.

        `served`: the models of this server. Raises ApiError: 404 for a file that is not there, 400
        for one that is not an adapter of these models, 409 for a taken name or too many adapters.
        """
        if self._folder is None:
            raise ApiError(
                404,
                "This server loads no adapters; start it with --set lora_folder=FOLDER.",
                "path",
                "no_lora_folder",
            )
        local = self._local(file.path)
        entry = _entry_of(file, local, served)
        self._check_room(file.name)
        record = entry.model_dump_json(indent=1).encode()
        if not storage.put_new(record, self._record(file.name)):
            raise _taken(file.name)
        return entry

    def unload(self, name: str) -> LoraEntry:
        """Remove an adapter from those that requests can name; requests under way keep it.

        Returns its former record. Raises ApiError 404 for an unknown name.
        """
        entry = self._entry(name, None)
        storage.remove(self._record(name))
        return entry

    def named(self, uses: Sequence[LoraUse], model: str, used: ModelSet) -> tuple[NamedLora, ...]:
        """The adapters that a request to the model of this name and these weights names.

        Raises ApiError: 404 for an unknown adapter, 400 for one of other weights.
        """
        found = []
        for use in uses:
            entry = self._entry(use.name, "loras")
            if not _belongs(entry.role, entry.base_sha256, used):
                raise ApiError(
                    400,
                    f"{use.name} is an adapter of {entry.base} with SHA-256 "
                    f"{entry.base_sha256[:16]}..., and {model} has other weights; name the model "
                    "that it belongs to, or leave it out.",
                    "loras",
                    "lora_of_other_weights",
                )
            found.append(
                NamedLora(
                    name=use.name,
                    path=self._in_folder(entry.path),
                    sha256=entry.sha256,
                    role=entry.role,
                    scale=use.scale,
                )
            )
        return tuple(found)

    # -- records -----------------------------------------------------------------------------------

    def _in_folder(self, path: str) -> str:
        return f"{str(self._folder).rstrip('/')}/{path}"

    def _record(self, name: str) -> str:
        return self._in_folder(f"{LOADED}/{name}.json")

    def _names(self) -> list[str]:
        if self._folder is None:
            return []
        records = storage.list_files(self._in_folder(LOADED), (".json",))
        return sorted(record.rpartition("/")[2].removesuffix(".json") for record in records)

    def _read(self, name: str) -> LoraEntry | None:
        """The record of this name; None without one, also if it is being removed."""
        try:
            return LoraEntry.model_validate_json(storage.read(self._record(name)))
        except (storage.MissingError, FileNotFoundError):
            return None
        except ValidationError:
            raise UserError(
                f"{self._record(name)} is not a record of an adapter; delete it and load the "
                "adapter again."
            ) from None

    def _entry(self, name: str, param: str | None) -> LoraEntry:
        """The record of a loaded adapter; `param`: the field that names it, for the error."""
        known = self._names()
        entry = self._read(name) if name in known else None
        if entry is None:
            hint = nearest(name, known) if known else "none is loaded; load it by POST /v1/loras."
            message = f"There is no adapter {name[:80]!r}; {hint}"
            raise ApiError(404, message, param, "lora_not_found")
        return entry

    def _check_room(self, name: str) -> None:
        known = self._names()
        if name in known:
            raise _taken(name)
        if len(known) >= self._most:
            raise ApiError(
                409,
                f"The server has {len(known)} adapters, at most {self._most} (max_loras); unload "
                "one by DELETE /v1/loras/NAME.",
                code="too_many_loras",
            )

    # -- files -------------------------------------------------------------------------------------

    def _local(self, path: str) -> Path:
        """A local copy of a file in the folder. Raises ApiError."""
        full = self._in_folder(path)
        if not storage.is_remote(full):
            folder = Path(str(self._folder)).resolve()
            if not Path(full).resolve().is_relative_to(folder):
                raise ApiError(
                    400, f"{path} leads out of the server's lora_folder; copy it into it.", "path"
                )
        if not storage.exists(full) or Path(full).is_dir():
            raise ApiError(
                404,
                f"There is no file {path} in the server's lora_folder; copy it there.",
                "path",
                "file_not_found",
            )
        size = storage.size(full)
        if size > self._most_bytes:
            raise ApiError(
                400,
                f"{path} has {size / 2**20:.3g} MiB, and a replica of this server keeps "
                f"{self._most_bytes / 2**20:.3g} MiB of adapters (lora_bytes); train one of a "
                "smaller rank.",
                "path",
                "lora_too_large",
            )
        return storage.fetch(full)


def _taken(name: str) -> ApiError:
    return ApiError(
        409,
        f"The name {name} is taken; choose another, or unload that adapter by DELETE "
        f"/v1/loras/{name}.",
        "name",
        "lora_exists",
    )


def _entry_of(file: LoraFile, local: Path, served: Sequence[ModelSet]) -> LoraEntry:
    """The record of an adapter in a local file. Raises ApiError unless it fits a served model."""
    try:
        config = read_config(local)
        adapter = read_adapter(Lora(path=file.path), config, local)
        sources = sources_in(load_metadata(local), file.path)
    except UserError:
        raise ApiError(
            400,
            f"{file.path} is not a whole adapter in the safetensors format; train one with `glide "
            "tune --lora RANK`, or copy it again.",
            "path",
            "not_an_adapter",
        ) from None
    model = _model_of(config, file.path, served)
    with shapes_only():
        shapes = build_model(model).state_dict()
    if not adapter.fits(shapes):
        raise ApiError(
            400,
            f"{file.path} is damaged: its tensors do not fit the layers of {config.base}; copy it "
            "again, or train it again.",
            "path",
            "not_an_adapter",
        )
    return LoraEntry(
        name=file.name,
        path=file.path,
        sha256=storage.fingerprint(local),
        bytes=local.stat().st_size,
        rank=config.rank,
        base=config.base,
        base_sha256=config.base_sha256,
        role=config.role,
        created=int(time.time()),
        licence=licences(sources),
        sources=credits(sources),
    )


def _model_of(config: AdapterConfig, path: str, served: Sequence[ModelSet]) -> ModelConfig:
    """The config of the served model to which an adapter belongs. Raises ApiError without one."""
    for models in served:
        if _belongs(config.role, config.base_sha256, models):
            found = getattr(models, config.role)
            assert isinstance(found, ModelConfig)
            return found
    kinds = [models.models[config.role] for models in served if config.role in models.models]
    names = ", ".join(f"{one.name} ({one.sha256[:16]}...)" for one in kinds) or "none"
    raise ApiError(
        400,
        f"{path} is an adapter of {config.base} with SHA-256 {config.base_sha256[:16]}..., and the "
        f"served models of the kind {config.role} are: {names}; train it on one of them.",
        "path",
        "lora_of_other_weights",
    )


def _belongs(role: str, base_sha256: str, models: ModelSet) -> bool:
    """Whether an adapter was trained on the base model or the upsampler of these models."""
    return (
        role in ("base", "upsampler")
        and role in models.models
        and models.models[role].sha256 == base_sha256
    )
