"""Low-rank adapters (LoRA, Hu et al. 2021) of linear layers and convolutions.

The change of a layer's weight W (out, in, k, k) is alpha / rank * up @ down, with down
(rank, in * k * k) and up (out, rank). `up` starts at zero, so an untrained adapter changes nothing.
In training the layers add the change to their outputs (`add_adapters`); for sampling it is added to
the weights once (`merge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.lora import AdapterConfig, Lora

DOWN, UP = ".lora.down.weight", ".lora.up.weight"


class LowRank(nn.Module):
    """The change of a layer's output: alpha / rank * up(down(x)).

    The rank is at most the layer's number of outputs and of inputs to each.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        weight = layer.weight
        self.factor = alpha / rank
        rank = min(rank, len(weight), weight[0].numel())
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                layer.in_channels,
                rank,
                layer.kernel_size,  # type: ignore[arg-type]  # always a pair
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                bias=False,
            )
            self.up: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(weight.device, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.up(self.down(x))


def add_adapters(
    model: nn.Module, rank: int, alpha: float, chosen: Callable[[str], bool] = lambda name: True
) -> None:
    """Give every linear layer and convolution with a `chosen` name an adapter.

    The layer's own parameters keep their names; those of its adapter end in DOWN and UP.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and chosen(name)
    ]
    for layer in layers:
        layer.add_module("lora", LowRank(layer, rank, alpha))
        layer.register_forward_hook(_add_change)


def _add_change(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    change: Tensor = layer.get_submodule("lora")(inputs[0])
    return output + change


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by name, what it was trained on, and its strength."""

    lora: Lora
    config: AdapterConfig
    tensors: Mapping[str, Tensor]

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether every tensor belongs to a layer of a state dict and has its shape."""
        layers = {name.removesuffix(DOWN) for name in self.tensors if name.endswith(DOWN)}
        if self.tensors.keys() != {name + end for name in layers for end in (DOWN, UP)}:
            return False
        for name in layers:
            down, up = self.tensors[name + DOWN], self.tensors[name + UP]
            weight = state.get(f"{name}.weight")
            if weight is None or weight.dim() != down.dim() or down.dim() != up.dim():
                return False
            if (len(up), *down.shape[1:]) != tuple(weight.shape) or up[0].numel() != len(down):
                return False
        return True

    def change(self, layer: str) -> Tensor:
        """The change of a layer's weight, in float32 and the weight's shape."""
        down, up = self.tensors[layer + DOWN].float(), self.tensors[layer + UP].float()
        factor = self.lora.scale * self.config.alpha / self.config.rank
        return factor * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@torch.no_grad()
def merge(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of the model with an adapter that fits; changed weights are float32."""
    merged = dict(state)
    for name in adapter.tensors:
        if name.endswith(DOWN) and adapter.lora.scale:
            layer = name.removesuffix(DOWN)
            merged[f"{layer}.weight"] = state[f"{layer}.weight"].float() + adapter.change(layer)
    return merged
