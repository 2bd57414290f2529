"""The adapters that requests to one model name, loaded at their first use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from safetensors import SafetensorError

from .. import storage
from ..config.lora import NamedLora
from .adapters import read_adapter, read_config
from .row_adapters import LoadedAdapter, ScaledAdapter
from .unet import GlideUNet
from .weights import WeightsError


class AdapterCache:
    """Adapters of a model on its device. Methods may be called from any thread.

    `base_sha256`: SHA-256 of the model's weights file. `most_bytes`: of all matrices together; the
    least recently used adapters leave first. Samples in flight keep those that they use.
    """

    def __init__(self, model: GlideUNet, base_sha256: str, most_bytes: int):
        weight = model.stem.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._state = model.state_dict()
        self._base_sha256, self._most_bytes = base_sha256, most_bytes
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # by SHA-256
        self._lock = threading.Lock()
        self._reading: dict[str, threading.Lock] = {}  # by SHA-256, of files that are being read

    def scaled(self, loras: Sequence[NamedLora]) -> tuple[ScaledAdapter, ...]:
        """Those of these adapters whose scale is not 0; reads files that are not loaded yet.

        Raises WeightsError if a file is missing, damaged, changed or of other weights.
        """
        return tuple(ScaledAdapter(self._get(lora), lora.scale) for lora in loras if lora.scale)

    @property
    def size(self) -> int:
        """Bytes of the loaded adapters."""
        with self._lock:
            return sum(adapter.size for adapter in self._loaded.values())

    def release(self, sha256: str) -> None:
        """Free the memory of an adapter, if it is loaded, once no sample uses it."""
        with self._lock:
            self._loaded.pop(sha256, None)

    def _get(self, lora: NamedLora) -> LoadedAdapter:
        """The adapter, which one of the requests that first name it reads for all of them."""
        with self._lock:
            if (found := self._used(lora)) is not None:
                return found
            reading = self._reading.setdefault(lora.sha256, threading.Lock())
        with reading:  # without the other lock: requests with other adapters do not wait
            with self._lock:
                if (found := self._used(lora)) is not None:
                    return found
            try:
                loaded = self._read(lora)
                self._keep(lora, loaded)
            finally:
                self._reading.pop(lora.sha256, None)
        return loaded

    def _used(self, lora: NamedLora) -> LoadedAdapter | None:
        if (found := self._loaded.get(lora.sha256)) is not None:
            self._loaded.move_to_end(lora.sha256)
        return found

    def _keep(self, lora: NamedLora, loaded: LoadedAdapter) -> None:
        with self._lock:
            self._loaded[lora.sha256] = loaded
            size = sum(adapter.size for adapter in self._loaded.values())
            while size > self._most_bytes and len(self._loaded) > 1:
                size -= self._loaded.popitem(last=False)[1].size

    def _read(self, lora: NamedLora) -> LoadedAdapter:
        try:
            local = storage.fetch(lora.path)
            changed = storage.fingerprint(local) != lora.sha256
            config = None if changed else read_config(local)
            adapter = None if config is None else read_adapter(lora, config, local)
        except (storage.StorageError, WeightsError, SafetensorError, OSError) as error:
            # The cause is for the log of the server: the message may reach a client.
            raise WeightsError(
                f"The file of the adapter {lora.name!r} cannot be read; put it back, or unload the "
                "adapter."
            ) from error
        if adapter is None:
            raise WeightsError(
                f"The file of the adapter {lora.name!r} has changed since the adapter was loaded; "
                "unload it and load it again."
            )
        if adapter.config.base_sha256 != self._base_sha256 or not adapter.fits(self._state):
            raise WeightsError(
                f"The adapter {lora.name!r} belongs to {adapter.config.base} with SHA-256 "
                f"{adapter.config.base_sha256[:16]}..., and these weights have "
                f"{self._base_sha256[:16]}...; train it on these weights."
            )
        return LoadedAdapter.of(adapter, lora.sha256, self._device, self._dtype)
