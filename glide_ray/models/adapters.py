"""Files of low-rank adapters: one safetensors file each, with its AdapterConfig as metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import storage
from ..config.lora import AdapterConfig, Lora, read_lora
from .lora import Adapter, merge
from .weights import ADAPTER, Change, WeightsError, load_metadata


def loras_of(given: Iterable[str | Lora]) -> tuple[Lora, ...]:
    """Adapters given as texts FILE[:SCALE] or as Loras. Raises ConfigError."""
    return tuple(one if isinstance(one, Lora) else read_lora(str(one)) for one in given)


def is_adapter(path: str | Path) -> bool:
    """Whether a local file is an adapter's. Raises WeightsError if it is no weights file."""
    return ADAPTER in load_metadata(path)


def read_config(path: str | Path) -> AdapterConfig:
    """What the adapter in a file was trained on; local or s3://.

    Raises WeightsError, StorageError.
    """
    if not storage.exists(path):
        raise WeightsError(
            f"There is no adapter {path}; train one with `glide tune` or `glide train`, or give "
            "the path of another with --lora."
        )
    metadata = load_metadata(storage.fetch(path))
    if ADAPTER not in metadata:
        raise WeightsError(
            f"{path} is no adapter: its metadata name no base; give whole weights with --base or "
            "--upsampler."
        )
    try:
        return AdapterConfig.model_validate_json(metadata[ADAPTER])
    except ValidationError:
        raise WeightsError(
            f"{path} is an adapter that this version does not read; train it again."
        ) from None


def check_roles(loras: Sequence[Lora], roles: Iterable[str]) -> None:
    """Raise WeightsError for an adapter of a model that is not among those that are loaded."""
    for lora in loras:
        role = read_config(lora.path).role
        if role not in roles:
            raise WeightsError(
                f"{lora.path} is an adapter of an {role}, and none is loaded; give one with "
                f"--{role}, or leave the adapter out."
            )


def read_adapters(loras: Sequence[Lora], role: str, weights: str | Path) -> list[Adapter]:
    """The adapters of the model of this role, whose weights are in the local file `weights`.

    Those of another role are left out. Raises WeightsError for an adapter that was trained on
    other weights, or that is damaged.
    """
    return [
        _read(lora, config, weights)
        for lora in loras
        if (config := read_config(lora.path)).role == role
    ]


def adding(loras: Sequence[Lora], role: str, weights: str | Path) -> Change:
    """A function that adds the adapters of the model in `weights` to its state dict.

    Raises WeightsError as `read_adapters` does.
    """
    return partial(with_adapters, adapters=read_adapters(loras, role, weights))


def _read(lora: Lora, config: AdapterConfig, weights: str | Path) -> Adapter:
    if storage.fingerprint(weights) != config.base_sha256:
        raise WeightsError(
            f"{lora.path} is an adapter of {config.base}, whose SHA-256 begins "
            f"{config.base_sha256[:16]}, and that of {weights} begins "
            f"{storage.fingerprint(weights)[:16]}; give the weights that it was trained on with "
            f"--{config.role}."
        )
    return read_adapter(lora, config, storage.fetch(lora.path))


def read_adapter(lora: Lora, config: AdapterConfig, file: str | Path) -> Adapter:
    """The adapter in a local file, whatever its base. Raises WeightsError if it is damaged."""
    try:
        with safe_open(file, "pt") as tensors:
            return Adapter(
                lora, config, {name: tensors.get_tensor(name) for name in tensors.keys()}
            )
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{lora.path} is damaged ({error}); copy it again.") from None


def with_adapters(state: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """A state dict with adapters added to its weights; changed ones are float32.

    Raises WeightsError for an adapter that does not fit.
    """
    merged = dict(state)
    for adapter in adapters:
        if not adapter.fits(state):
            raise WeightsError(
                f"{adapter.lora.path} is damaged: its tensors do not fit the layers of "
                f"{adapter.config.base}; copy it again, or train it again."
            )
        merged = merge(merged, adapter)
    return merged
