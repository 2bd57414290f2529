"""Memory of a training step's forward and backward pass, traced on the meta device.

`plan.py` adds the ZeRO state: parameters, gradients, optimizer and EMA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from ..models.layers import GroupNorm, attend_by_products, shapes_only, trains_in_16_bits
from ..models.unet import GlideUNet
from ..models.weights import build_model
from ..precision import DTYPES
from .objectives import objective_of
from .trained_part import choose_trained, keeps_weights, trained_parameters

# Images in the traced batch. A prime: dividing a tensor's size by it shows the power of the batch.
IMAGES = 10_007
Bytes = tuple[int, int, int]  # coefficients of 1, B and B^2, for B images


@dataclass(frozen=True)
class Moment:
    """Live memory at one point of a pass, without the parameters and their gradients.

    `saved`: bytes that autograd saved for the backward pass; `rest`: all other live bytes.
    `gradients`: number of parameter elements whose gradient has been computed by then.
    """

    saved: Bytes
    rest: Bytes
    gradients: int


def training_pass(preset: Preset, precision: str, device: str = "cuda") -> tuple[Moment, ...]:
    """Candidate memory peaks of a pass, valid for any batch size and any gradient memory.

    Runs the pass on the meta device, with stand-ins for the kernels that save different tensors
    on CUDA and on a CPU. Not thread-safe: it patches `torch.nn.functional` meanwhile.
    """
    key = (
        preset.model,
        preset.data.crop,
        preset.train.activation_checkpointing,
        preset.train.lora_rank,
        preset.train.freeze,
        precision,
        device == "cpu",
    )
    if key not in _PASSES:
        _PASSES[key] = _follow(preset, precision, device == "cpu")
    return _PASSES[key]


_PASSES: dict[tuple, tuple[Moment, ...]] = {}


def trained_model(preset: Preset, precision: str) -> GlideUNet | NoisedClip:
    """The model of a run on the meta device, with its frozen weights and its adapters."""
    model = meta_model(preset.model, precision)
    if keeps_weights(preset.train):
        with torch.device("meta"):
            choose_trained(model, preset.train)
    return model


def meta_model(config: AnyModelConfig, precision: str) -> GlideUNet | NoisedClip:
    """The model in training mode on the meta device, without weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with shapes_only():
            return build_model(config).train()
    finally:
        torch.set_default_dtype(default)


def _follow(preset: Preset, precision: str, on_cpu: bool) -> tuple[Moment, ...]:
    model = trained_model(preset, precision)
    model.activation_checkpointing = preset.train.activation_checkpointing
    if on_cpu:
        # `GlideUNet` trains in this format on a CPU.
        model.memory_format = torch.contiguous_format
    schedule = make_schedule(preset.model.diffusion.schedule, preset.model.diffusion.steps).to(
        "meta"
    )
    live = _LiveTensors(model)
    with live, _kernels(on_cpu):
        batch = example_batch(preset, IMAGES, "meta")
        i, noise = (
            torch.zeros(IMAGES, dtype=torch.int64, device="meta"),
            torch.empty_like(batch.image),
        )
        with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor):
            losses = objective_of(preset)(model, schedule, batch, i, noise)
            loss = losses["loss"].mean()
        loss.backward()
    return live.moments()


class _LiveTensors(TorchDispatchMode):
    """Track every storage from the operation that allocates it until it is freed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # Per storage: power of the batch size, bytes divided by that power, saved for backward.
        # Parameters have size 0 here: `plan.py` counts them.
        self._storages: dict[int, list] = {
            parameter.untyped_storage()._cdata: [0, 0, False] for parameter in model.parameters()
        }
        self._totals = {True: [0, 0, 0], False: [0, 0, 0]}
        self._gradients = 0
        # Candidate peaks since the last gradient was computed.
        self._most: list[Moment] = []
        self._kept: list[Moment] = []
        for parameter in trained_parameters(model).values():
            parameter.register_post_accumulate_grad_hook(self._take)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        moment = Moment(self._live(True), self._live(False), self._gradients)
        if not any(_covers(other, moment) for other in self._most):
            self._most = [other for other in self._most if not _covers(moment, other)] + [moment]
        return result

    def save(self, tensor: Tensor) -> Tensor:
        """Mark a tensor as saved for the backward pass.

        Returns it detached: an output saved by its own node would never be freed.
        """
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

    def _live(self, saved: bool) -> Bytes:
        constant, linear, quadratic = self._totals[saved]
        return constant, linear, quadratic

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
        """Count and free a computed gradient: ZeRO's gradient memory is added in `plan.py`."""
        self._close()
        self._gradients += parameter.numel()
        parameter.grad = None

    def _close(self) -> None:
        self._kept, self._most = self._kept + self._most, []


def _covers(one: Moment, other: Moment) -> bool:
    """Whether `one` has at least the saved and the total bytes of `other`, at any batch size."""
    return all(
        a >= c and a + b >= c + d
        for a, b, c, d in zip(one.saved, one.rest, other.saved, other.rest, strict=True)
    )


@contextmanager
def _kernels(on_cpu: bool) -> Iterator[None]:
    """Patch torch to save the tensors that the real device's kernels save.

    Attention as the fused kernel of the device; on a GPU, dropout with a mask of one byte per
    element. torch.distributed looks uninitialised, so that the pass calls no collective.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        if on_cpu and trains_in_16_bits(query) and not is_causal:  # as in `layers.attend`
            return attend_by_products(query, key, value)
        return _FusedAttention.apply(query, key, value)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x

    with ExitStack() as stack:
        stack.enter_context(_replaced(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_replaced(torch.distributed, "is_initialized", lambda: False))
        if on_cpu:
            # The CPU kernel of GroupNorm needs no float32 copies.
            stack.enter_context(_replaced(GroupNorm, "normalised", nn.GroupNorm.forward))
        else:
            stack.enter_context(_replaced(F, "dropout", dropout))
        yield


@contextmanager
def _replaced(owner: Any, name: str, by: Callable) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _FusedAttention(torch.autograd.Function):
    """The memory of flash attention (Dao et al. 2022), without its arithmetic.

    Saves its inputs, its output and one float32 per query for the backward pass.
    """

    @staticmethod
    def forward(context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # All inputs are (B, heads, K, D).
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
