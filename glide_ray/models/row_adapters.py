"""Low-rank adapters (LoRA) that differ by row: the samples of one network call share its weights.

The weights stay as they are. Each linear layer and convolution adds alpha / rank * up(down(x)) to
those rows of its output whose samples name the adapter, and computes nothing for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tensors import Conditioning, ModelOutput, TextFeatures, to_device_async
from .lora import DOWN, UP, Adapter
from .unet import GlideUNet


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter's matrices on the device and in the dtype of its model.

    `layers`: for each changed layer, down (rank, in, ...) and up (out, rank, ...). `factor`:
    alpha / rank.
    """

    sha256: str
    factor: float
    layers: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls, adapter: Adapter, sha256: str, device: torch.device, dtype: torch.dtype
    ) -> LoadedAdapter:
        """The adapter without its scale. `sha256`: of its file."""
        names = [name.removesuffix(DOWN) for name in adapter.tensors if name.endswith(DOWN)]
        layers = {
            name: (
                adapter.tensors[name + DOWN].to(device, dtype),
                adapter.tensors[name + UP].to(device, dtype),
            )
            for name in names
        }
        return cls(sha256, adapter.config.alpha / adapter.config.rank, layers)

    @property
    def size(self) -> int:
        """Size of the matrices in bytes."""
        return sum(down.nbytes + up.nbytes for down, up in self.layers.values())


@dataclass(frozen=True, eq=False)
class ScaledAdapter:
    """An adapter and its strength for one sample: 0 leaves the model as it is, 1 is as trained."""

    adapter: LoadedAdapter
    scale: float

    @property
    def key(self) -> tuple[str, float]:
        """Equal for adapters that change the model alike."""
        return self.adapter.sha256, self.scale


@dataclass(frozen=True)
class _Rows:
    """The rows of a call that an adapter changes, and the factors of its change there."""

    adapter: LoadedAdapter
    rows: Tensor | None  # (R,) int64; None: all rows of the call
    factors: Tensor  # (R,)


class AdaptedNetwork:
    """A U-Net with adapters that differ by row. Shares all weights with `model`, left unchanged.

    Calls may overlap in several threads.
    """

    def __init__(self, model: GlideUNet):
        self.model = model.unfused_copy()
        weight = model.stem.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._call = threading.local()  # `rows`: the list of _Rows of this thread's call
        for name, layer in self.model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(partial(self._add_changes, name))

    def __call__(
        self,
        adapters: Sequence[Sequence[ScaledAdapter]],
        x: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        text: TextFeatures,
    ) -> ModelOutput:
        """Output of one network call; `adapters` are those of each of the B rows.

        `text`: by `encode_text` with the same adapters.
        """
        with self._calling(adapters):
            output: ModelOutput = self.model(x, timestep, conditioning, text)
        return output

    def encode_text(
        self, adapters: Sequence[ScaledAdapter], tokens: Tensor, mask: Tensor
    ) -> TextFeatures:
        """Text features of one caption, `tokens` and `mask` (1, K), with these adapters."""
        with self._calling([adapters]):
            return self.model.encode_text(tokens, mask)

    @contextmanager
    def _calling(self, adapters: Sequence[Sequence[ScaledAdapter]]) -> Iterator[None]:
        """Apply these adapters of each row to the layers called in this context and thread."""
        self._call.rows = self._by_adapter(adapters)
        # An adapter's number of rows changes often: for each, cuDNN would time its algorithms anew.
        cudnn, benchmark = torch.backends.cudnn, torch.backends.cudnn.benchmark
        if self._device.type == "cuda":  # where one thread makes all calls
            cudnn.benchmark = False
        try:
            yield
        finally:
            del self._call.rows
            if self._device.type == "cuda":
                cudnn.benchmark = benchmark

    def _by_adapter(self, adapters: Sequence[Sequence[ScaledAdapter]]) -> list[_Rows]:
        """The rows of each adapter, in the order in which the rows name them."""
        scales: dict[LoadedAdapter, dict[int, float]] = {}
        for row, of_row in enumerate(adapters):
            for one in of_row:
                rows = scales.setdefault(one.adapter, {})
                rows[row] = rows.get(row, 0.0) + one.scale
        found = []
        for adapter, rows in scales.items():
            factors = torch.tensor([adapter.factor * scale for scale in rows.values()])
            found.append(
                _Rows(
                    adapter,
                    None
                    if len(rows) == len(adapters)
                    else to_device_async(torch.tensor(list(rows)), self._device),
                    to_device_async(factors.to(self._dtype), self._device),
                )
            )
        return found

    def _add_changes(
        self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """The forward hook of a layer: its output (B, ...) with the changes of its adapters."""
        for one in self._call.rows:
            if name in one.adapter.layers:
                x = inputs[0] if one.rows is None else inputs[0][one.rows]
                down, up = one.adapter.layers[name]
                change = _change(layer, x, down, up, one.factors)
                if one.rows is None:
                    output.add_(change)
                else:  # rows are unique, so the sum is deterministic also on a GPU
                    output.index_add_(0, one.rows, change)
        return output


def _change(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor, factors: Tensor) -> Tensor:
    """The change of a layer's output for x (R, ...): factors (R,) * up(down(x))."""
    if isinstance(layer, nn.Conv2d):
        inner = F.conv2d(x, down, None, layer.stride, layer.padding)
        return F.conv2d(inner * factors[:, None, None, None], up)
    inner = F.linear(x, down)
    return F.linear(inner * factors.view(-1, *[1] * (inner.dim() - 1)), up)
