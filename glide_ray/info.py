"""What a model costs, counted on the meta device: parameters by part, memory, and operations per network call.

A training step's memory is followed there from one moment to the next (`training_pass`); `train/plan.py` adds what ZeRO keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .config import AnyModelConfig, ModelConfig, Preset
from .diffusion.schedule import make_schedule
from .forms import Batch, Conditioning
from .models.clip import NoisedClip
from .models.layers import GroupNorm
from .models.unet import GlideUNet
from .models.weights import build
from .train.objectives import objective_of

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelInfo:
    """`parts`: name -> parameters. `flops`: of one image through the UNet; `text_flops`: of one caption."""

    parts: dict[str, int]
    flops: int
    text_flops: int

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    def weight_bytes(self, precision: str) -> int:
        return self.parameters * BYTES[precision]

    @property
    def training_bytes(self) -> int:
        """Mixed-precision Adam and an EMA, unpartitioned: 2 + 2 (weights, gradients) + 4 + 4 + 4 (master, moments) + 4 (EMA)."""
        return self.parameters * 20


def inspect(config: AnyModelConfig) -> ModelInfo:
    """Count a model without drawing a weight."""
    size = config.image_size
    with torch.device("meta"):
        model = build(config).eval()
        x, timestep = torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.int64)
        if isinstance(model, NoisedClip):
            with FlopCounterMode(display=False) as text_counter:
                model.encode_text(torch.zeros(1, config.context, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
            with FlopCounterMode(display=False) as counter:
                model.encode_image(x, timestep)
        else:
            conditioning = example_conditioning(config, 1)
            with FlopCounterMode(display=False) as text_counter:
                text = model.encode_text(conditioning.tokens, conditioning.mask)
            with FlopCounterMode(display=False) as counter:
                model(x, timestep, conditioning, text)
    return ModelInfo(parts(model), counter.get_total_flops(), text_counter.get_total_flops())


def operations(preset: Preset) -> int:
    """Of a forward pass of one image and its caption, at the size that is trained on."""
    model, crop = preset.model, preset.data.crop
    if isinstance(model, ModelConfig) and crop and crop != model.image_size:
        # Where attention stands goes by the whole image's size.
        unet = model.unet.model_copy(update={
            "image_size": crop, "low_res_size": crop * model.low_res_size // model.image_size,
            "attention_sizes": tuple(size * crop // model.image_size for size in model.unet.attention_sizes)})
        model = model.model_copy(update={"unet": unet})
    return _operations(model)


@lru_cache(maxsize=32)
def _operations(model: AnyModelConfig) -> int:
    counted = inspect(model)
    return counted.flops + counted.text_flops


def parts(model: GlideUNet | NoisedClip) -> dict[str, int]:
    """Parameters by part; the sum is the whole model."""
    def size(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    if isinstance(model, NoisedClip):
        return {"text tower": size(model.text), "image tower": size(model.image), "scale of the logits": 1}
    attention = size(*model.attention_layers())
    unet = (model.time_in, model.time_out, model.stem, model.down, model.middle, model.up, model.out_norm, model.out)
    return {"text transformer": size(model.text), "UNet, convolutions": size(*unet) - attention, "UNet, attention": attention}


def example_conditioning(config: ModelConfig, batch: int, device: str | None = None) -> Conditioning:
    """Conditioning of the right shapes, on `device` or the default one: full captions, grey low-res images."""
    unet, kind = config.unet, {"device": device} if device else {}
    tokens = torch.zeros(batch, unet.text.context, dtype=torch.int64, **kind)
    low_res = torch.zeros(batch, 3, unet.low_res_size, unet.low_res_size, **kind) if unet.low_res_size else None
    return Conditioning(tokens, torch.ones_like(tokens, dtype=torch.bool), low_res)


def example_batch(preset: Preset, images: int, device: str | None = None) -> Batch:
    """A training batch of the shapes that the preset's corpus gives, all zero, on `device` or the default one."""
    model, size = preset.model, preset.data.crop or preset.model.image_size
    zeros = partial(torch.zeros, device=device)
    tokens = zeros(images, model.context, dtype=torch.int64)
    low, known = (size * model.low_res_size // model.image_size if model.low_res_size else None), model.inpaint
    return Batch(zeros(images, 3, size, size), Conditioning(
        tokens, torch.ones_like(tokens, dtype=torch.bool), zeros(images, 3, low, low) if low else None,
        zeros(images, 3, size, size) if known else None, zeros(images, 1, size, size) if known else None))


# -- the memory of a training step ------------------------------------------------------------------------------------

# As many images as the pass is followed with: a prime, so that what of a tensor's size is the batch can be told by division.
IMAGES = 10_007
Bytes = tuple[int, int, int]          # coefficients of 1, B and B * B, for B images


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
    key = (preset.model, preset.data.crop, preset.train.activation_checkpointing, precision, device == "cpu")
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
            return build(config).train()
    finally:
        torch.set_default_dtype(default)


def _follow(preset: Preset, precision: str, on_cpu: bool) -> tuple[Moment, ...]:
    model = meta_model(preset.model, precision)
    model.activation_checkpointing = preset.train.activation_checkpointing
    for module in model.modules():
        if on_cpu and isinstance(module, GroupNorm):        # whose kernel for CPUs needs no float32 copies
            module.forward = partial(nn.GroupNorm.forward, module)
    schedule = make_schedule(preset.model.diffusion.schedule, preset.model.diffusion.steps).to("meta")
    alive = _Alive(model)
    with alive, _kernels(on_cpu):
        batch = example_batch(preset, IMAGES, "meta")
        i, noise = torch.zeros(IMAGES, dtype=torch.int64, device="meta"), torch.empty_like(batch.image)
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
        self._storages: dict[int, list] = {parameter.untyped_storage()._cdata: [0, 0, False] for parameter in model.parameters()}
        self._totals = {True: [0, 0, 0], False: [0, 0, 0]}
        self._gradients = 0
        self._most: list[Moment] = []         # among those with as many gradients
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
        power, size, saved = entry = self._storages.get(tensor.untyped_storage()._cdata, [0, 0, True])
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
    return all(a >= c and a + b >= c + d for a, b, c, d in zip(one.saved, one.rest, other.saved, other.rest, strict=True))


@contextmanager
def _kernels(on_cpu: bool):
    """Attention as the fused kernels of either device have it; dropout that keeps a mask of one byte, as on a GPU; and no other ranks."""
    def attention(query: Tensor, key: Tensor, value: Tensor, **_) -> Tensor:
        return _FusedAttention.apply(query, key, value)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x
    replaced: dict[str, Callable] = {"scaled_dot_product_attention": attention, **({} if on_cpu else {"dropout": dropout})}
    with mock.patch.multiple(F, **replaced), mock.patch.object(torch.distributed, "is_initialized", lambda: False):
        yield


class _FusedAttention(torch.autograd.Function):
    """The sizes of flash attention (Dao et al. 2022): for the backward pass it keeps its inputs, its output and a float32 for each query."""

    @staticmethod
    def forward(context, query: Tensor, key: Tensor, value: Tensor) -> Tensor:                  # (B, heads, K, D) each
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        context.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in context.saved_tensors[:3])


def describe(preset: Preset) -> str:
    """The table that `glide info` prints."""
    model, train = preset.model, preset.train
    info = inspect(model)
    image = f"{model.low_res_size} -> {model.image_size}" if model.low_res_size else str(model.image_size)
    lines = [
        f"{model.name}: {info.parameters / 1e6:,.2f}M parameters",
        f"  image        {image} pixels, {model.diffusion.schedule} schedule of {model.diffusion.steps} timesteps",
        *_architecture(model), "", "parameters by part"]
    lines += [f"  {name:<20}{number / 1e6:>12,.2f}M  {number / info.parameters:>5.1%}" for name, number in info.parts.items()]
    lines += ["", "memory",
              f"  {'weights, 16 bit':<20}{_gib(info.weight_bytes('bf16')):>12}    32 bit {_gib(info.weight_bytes('fp32'))}",
              f"  {'training state':<20}{_gib(info.training_bytes):>12}    over {train.workers} workers with ZeRO-3 "
              f"{_gib(info.training_bytes / train.workers)} each; activations come on top"]
    step = 3 * (info.flops + info.text_flops) * train.batch
    lines += ["", "operations (a multiplication and an addition are two)",
              f"  {'one network call':<20}{_flop(info.flops):>15}  and {_flop(info.text_flops)} once for each caption",
              *_sampling(model, info),
              f"  {'one training step':<20}{_flop(step):>15}  at batch {train.batch}: forward and twice that backward",
              f"  {'the whole training':<20}{_flop(step * train.steps):>15}  in {train.steps:,} steps"]
    return "\n".join(lines)


def _architecture(model: AnyModelConfig) -> list[str]:
    if not isinstance(model, ModelConfig):
        clip = model.clip
        return [f"  image tower  {clip.image_layers} layers x {clip.image_width}, {clip.image_heads} heads, patches of {clip.patch_size} pixels",
                f"  text tower   {clip.text_layers} layers x {clip.text_width}, {clip.text_heads} heads, {clip.context} tokens"]
    unet, text = model.unet, model.unet.text
    return [f"  UNet         {unet.channels} channels x {unet.multipliers}, {unet.blocks} blocks a level, attention at {unet.attention_sizes}",
            f"  text         {text.layers} layers x {text.width}, {text.heads} heads, {text.context} tokens"]


def _sampling(model: AnyModelConfig, info: ModelInfo) -> list[str]:
    if not isinstance(model, ModelConfig):
        return []
    scale = model.sampling.guidance_scale
    return [f"  {'one sampling step':<20}{_flop((2 if scale != 1 else 1) * info.flops):>15}  at guidance scale {scale:g}"]


def _flop(count: float) -> str:
    power = max(2, min(6, (len(f"{count:.0f}") - 1) // 3))
    return f"{count / 1000**power:,.1f} {' KMGTPE'[power]}FLOP"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
