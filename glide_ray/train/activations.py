"""How much memory the forward and backward pass of a training step takes, followed on the meta device from one moment to the next.

`plan.py` adds what ZeRO keeps beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.models import AnyModelConfig
from ..config.training import Preset
from ..diffusion.schedule import make_schedule
from ..models.clip import NoisedClip
from ..models.cost import example_batch
from ..models.layers import GroupNorm, attend_by_products, trains_in_16_bits
from ..models.unet import GlideUNet
from ..models.weights import build_model
from ..precision import DTYPES
from .objectives import objective_of

# As many images as the pass is followed with: a prime, so that what of a tensor's size is the batch can be told by division.
IMAGES = 10_007
Bytes = tuple[int, int, int]  # coefficients of 1, B and B * B, for B images


@dataclass(frozen=True)
class Moment:
    """What is alive at one point of a forward and backward pass, beside the parameters and their gradients: `saved` for the backward pass,
    and all the `rest`. `gradients`: how many of the parameters have theirs by then."""

    saved: Bytes
    rest: Bytes
    gradients: int


def training_pass(preset: Preset, precision: str, device: str = "cuda") -> tuple[Moment, ...]:
    """The moments of a pass at any of which most may be alive, or saved, whatever the batch and whatever a gradient takes.

    The pass is run on the meta device, with the kernels that a CUDA device or a CPU takes where they save different tensors. Not for two
    threads at once, for it puts those kernels into `torch.nn.functional` for the time.
    """
    key = (
        preset.model,
        preset.data.crop,
        preset.train.activation_checkpointing,
        precision,
        device == "cpu",
    )
    if key not in _PASSES:
        _PASSES[key] = _follow(preset, precision, device == "cpu")
    return _PASSES[key]


_PASSES: dict[tuple, tuple[Moment, ...]] = {}


def meta_model(config: AnyModelConfig, precision: str) -> GlideUNet | NoisedClip:
    """The model in training, without its numbers."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with torch.device("meta"):
            return build_model(config).train()
    finally:
        torch.set_default_dtype(default)


def _follow(preset: Preset, precision: str, on_cpu: bool) -> tuple[Moment, ...]:
    model = meta_model(preset.model, precision)
    model.activation_checkpointing = preset.train.activation_checkpointing
    for module in model.modules():
        if on_cpu and isinstance(
            module, GroupNorm
        ):  # whose kernel for CPUs needs no float32 copies
            module.normalised = partial(nn.GroupNorm.forward, module)
    if on_cpu:
        model.memory_format = torch.contiguous_format  # as `GlideUNet` has it in training there
    schedule = make_schedule(preset.model.diffusion.schedule, preset.model.diffusion.steps).to(
        "meta"
    )
    alive = _Alive(model)
    with alive, _kernels(on_cpu):
        batch = example_batch(preset, IMAGES, "meta")
        i, noise = (
            torch.zeros(IMAGES, dtype=torch.int64, device="meta"),
            torch.empty_like(batch.image),
        )
        with torch.autograd.graph.saved_tensors_hooks(alive.save, lambda tensor: tensor):
            losses = objective_of(preset)(model, schedule, batch, i, noise)
            loss = losses["loss"].mean()
        loss.backward()
    return alive.moments()


class _Alive(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # A storage's power of the batch, its bytes over that, and whether it is saved. The parameters count elsewhere.
        self._storages: dict[int, list] = {
            parameter.untyped_storage()._cdata: [0, 0, False] for parameter in model.parameters()
        }
        self._totals = {True: [0, 0, 0], False: [0, 0, 0]}
        self._gradients = 0
        self._most: list[Moment] = []  # among those with as many gradients
        self._kept: list[Moment] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._take)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        moment = Moment(tuple(self._totals[True]), tuple(self._totals[False]), self._gradients)
        if not any(_covers(other, moment) for other in self._most):
            self._most = [other for other in self._most if not _covers(moment, other)] + [moment]
        return result

    def save(self, tensor: Tensor) -> Tensor:
        """What autograd keeps for the backward pass. Detached, for an output that its own node kept would never be freed."""
        power, size, saved = entry = self._storages.get(
            tensor.untyped_storage()._cdata, [0, 0, True]
        )
        if not saved:
            entry[2] = True
            self._totals[False][power] -= size
            self._totals[True][power] += size
        return tensor.detach()

    def moments(self) -> tuple[Moment, ...]:
        self._close()
        return tuple(self._kept)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        size, power = storage.nbytes(), 0
        while size and size % IMAGES == 0:
            size, power = size // IMAGES, power + 1
        self._storages[storage._cdata] = [power, size, False]
        self._totals[False][power] += size
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        power, size, saved = self._storages.pop(key)
        self._totals[saved][power] -= size

    def _take(self, parameter: nn.Parameter) -> None:
        """Gradients are ZeRO's from here on."""
        self._close()
        self._gradients += parameter.numel()
        parameter.grad = None

    def _close(self) -> None:
        self._kept, self._most = self._kept + self._most, []


def _covers(one: Moment, other: Moment) -> bool:
    """Whether at least as much is saved, and alive in all, at `one` as at `other`, whatever the batch."""
    return all(
        a >= c and a + b >= c + d
        for a, b, c, d in zip(one.saved, one.rest, other.saved, other.rest, strict=True)
    )


@contextmanager
def _kernels(on_cpu: bool) -> Iterator[None]:
    """Attention as the fused kernels of either device have it; dropout that keeps a mask of one byte, as on a GPU; and no other ranks."""

    def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        if on_cpu and trains_in_16_bits(query) and not is_causal:  # `layers.attend`
            return attend_by_products(query, key, value)
        return _FusedAttention.apply(query, key, value)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    with ExitStack() as stack:
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_replaced(torch.distributed, "is_initialized", lambda: False))
        if not on_cpu:
            stack.enter_context(_replaced(F, "dropout", dropout))
        yield


@contextmanager
def _replaced(module: Any, name: str, by: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, before)


class _FusedAttention(torch.autograd.Function):
    """The sizes of flash attention (Dao et al. 2022): for the backward pass it keeps its inputs, its output and a float32 for each query."""

    @staticmethod
    def forward(
        context, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:  # (B, heads, K, D) each
        out = torch.empty_like(
            query.transpose(1, 2), memory_format=torch.contiguous_format
        ).transpose(1, 2)
        context.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32)
        )
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])
