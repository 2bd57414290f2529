"""Cost of a model, counted on the meta device: parameters by part, memory, FLOPs per call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..config.models import AnyModelConfig, ClipModelConfig, ModelConfig
from ..config.training import Preset
from ..precision import BYTES
from ..tensors import Batch, Conditioning
from .clip import NoisedClip
from .layers import shapes_only
from .unet import GlideUNet
from .weights import build_model


@dataclass(frozen=True)
class ModelInfo:
    """Size and cost of a model.

    `parts`: name -> parameters. `flops`: of one image through the U-Net or image tower;
    `text_flops`: of one caption.
    """

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
        """Bytes of unpartitioned mixed-precision Adam with an EMA: 20 per parameter.

        2 + 2 (weights, gradients) + 4 + 4 + 4 (master weights, moments) + 4 (EMA).
        """
        return self.parameters * 20


def inspect(config: AnyModelConfig) -> ModelInfo:
    """Count parameters and FLOPs of a model, without drawing weights."""
    size = config.image_size
    with shapes_only():
        x, timestep = torch.empty(1, 3, size, size), torch.empty(1, dtype=torch.int64)
        if isinstance(config, ClipModelConfig):
            clip = build_model(config).eval()
            counted = parts(clip)
            with FlopCounterMode(display=False) as text_counter:
                clip.encode_text(
                    torch.zeros(1, config.context, dtype=torch.int64),
                    torch.ones(1, dtype=torch.int64),
                )
            with FlopCounterMode(display=False) as counter:
                clip.encode_image(x, timestep)
        else:
            model = build_model(config).eval()
            counted = parts(model)
            conditioning = example_conditioning(config, 1)
            with FlopCounterMode(display=False) as text_counter:
                text = model.encode_text(conditioning.tokens, conditioning.mask)
            with FlopCounterMode(display=False) as counter:
                model(x, timestep, conditioning, text)
    return ModelInfo(counted, counter.get_total_flops(), text_counter.get_total_flops())


def operations(preset: Preset) -> int:
    """FLOPs of a forward pass of one image and its caption, at the training size."""
    model, crop = preset.model, preset.data.crop
    if isinstance(model, ModelConfig) and model.low_res_size and crop:
        # Attention sizes refer to the whole image: scale them to the crop.
        unet = model.unet.model_copy(
            update={
                "image_size": crop,
                "low_res_size": crop * model.low_res_size // model.image_size,
                "attention_sizes": tuple(
                    size * crop // model.image_size for size in model.unet.attention_sizes
                ),
            }
        )
        model = model.model_copy(update={"unet": unet})
    return _operations(model)


class _DeviceOperations(TorchDispatchMode):
    """Counts the operations that launch work on a device: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in function._schema.returns]
        self.count += not any(alias is not None and not alias.is_write for alias in aliases)
        return function(*args, **(kwargs or {}))


@lru_cache(maxsize=32)
def launches(model: AnyModelConfig) -> tuple[int, int]:
    """Device operations of a forward pass in 16 bits, and the model's tensors of parameters."""
    with shapes_only():
        network = build_model(model).eval().half()
        x = torch.empty(1, 3, model.image_size, model.image_size)
        timestep = torch.empty(1, dtype=torch.int64)
        with torch.no_grad(), _DeviceOperations() as operations:
            if isinstance(model, ClipModelConfig):
                tokens = torch.zeros(1, model.context, dtype=torch.int64)
                network(x, timestep, tokens, torch.ones_like(tokens))
            else:
                network(x, timestep, example_conditioning(model, 1))
    return operations.count, len(list(network.parameters()))


@lru_cache(maxsize=32)
def _operations(model: AnyModelConfig) -> int:
    counted = inspect(model)
    return counted.flops + counted.text_flops


def parts(model: GlideUNet | NoisedClip) -> dict[str, int]:
    """Parameters by part; they add up to the whole model."""

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    if isinstance(model, NoisedClip):
        return {
            "text tower": size(model.text),
            "image tower": size(model.image),
            "scale of the logits": 1,
        }
    attention = size(*model.attention_layers())
    unet = [
        model.time_in,
        model.time_out,
        model.stem,
        model.down,
        model.middle,
        model.up,
        model.out_norm,
        model.out,
        *([model.pixel_head] if model.pixel_head is not None else []),
    ]
    return {
        "text transformer": size(model.text),
        "UNet, convolutions": size(*unet) - attention,
        "UNet, attention": attention,
    }


def example_conditioning(
    config: ModelConfig, batch: int, device: str | None = None
) -> Conditioning:
    """Conditioning of the right shapes: full captions, grey low-res images.

    On `device`, or on the default device.
    """
    unet = config.unet
    tokens = torch.zeros(batch, unet.text.context, dtype=torch.int64, device=device)
    low_res = (
        torch.zeros(batch, 3, unet.low_res_size, unet.low_res_size, device=device)
        if unet.low_res_size
        else None
    )
    return Conditioning(tokens, torch.ones_like(tokens, dtype=torch.bool), low_res)


def example_batch(preset: Preset, images: int, device: str | None = None) -> Batch:
    """A training batch of zeros, with the shapes of the preset's data.

    On `device`, or on the default device.
    """
    model, size = preset.model, preset.data.crop or preset.model.image_size
    zeros = partial(torch.zeros, device=device)
    tokens = zeros(images, model.context, dtype=torch.int64)
    low, known = (
        (size * model.low_res_size // model.image_size if model.low_res_size else None),
        model.inpaint,
    )
    return Batch(
        zeros(images, 3, size, size),
        Conditioning(
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            zeros(images, 3, low, low) if low else None,
            zeros(images, 3, size, size) if known else None,
            zeros(images, 1, size, size) if known else None,
        ),
    )


def describe(preset: Preset) -> str:
    """The table that `glide info` prints."""
    model, train = preset.model, preset.train
    info = inspect(model)
    image = (
        f"{model.low_res_size} -> {model.image_size}"
        if model.low_res_size
        else str(model.image_size)
    )
    lines = [
        f"{model.name}: {info.parameters / 1e6:,.2f}M parameters",
        f"  image        {image} pixels, {model.diffusion.schedule} schedule of "
        f"{model.diffusion.steps} timesteps",
        *architecture(model),
        "",
        "parameters by part",
    ]
    lines += [
        f"  {name:<20}{number / 1e6:>12,.2f}M  {number / info.parameters:>5.1%}"
        for name, number in info.parts.items()
    ]
    lines += [
        "",
        "memory",
        f"  {'weights, 16 bit':<20}{_gib(info.weight_bytes('bf16')):>12}    "
        f"32 bit {_gib(info.weight_bytes('fp32'))}",
        f"  {'training state':<20}{_gib(info.training_bytes):>12}    "
        f"over {train.workers} workers with ZeRO-3 "
        f"{_gib(info.training_bytes / train.workers)} each; activations come on top",
    ]
    step = 3 * (info.flops + info.text_flops) * train.batch
    lines += [
        "",
        "operations (a multiplication and an addition are two)",
        f"  {'one network call':<20}{_flop(info.flops):>15}  "
        f"and {_flop(info.text_flops)} once for each caption",
        *_sampling(model, info),
        f"  {'one training step':<20}{_flop(step):>15}  "
        f"at batch {train.batch}: forward and twice that backward",
        f"  {'the whole training':<20}{_flop(step * train.steps):>15}  in {train.steps:,} steps",
    ]
    return "\n".join(lines)


def architecture(model: AnyModelConfig) -> list[str]:
    """Lines with the widths and depths of a network: two spaces, a name, its value."""
    if not isinstance(model, ModelConfig):
        clip = model.clip
        return [
            f"  image tower  {clip.image_layers} layers x {clip.image_width}, "
            f"{clip.image_heads} heads, patches of {clip.patch_size} pixels",
            f"  text tower   {clip.text_layers} layers x {clip.text_width}, "
            f"{clip.text_heads} heads, {clip.context} tokens",
        ]
    unet, text = model.unet, model.unet.text
    return [
        f"  UNet         {unet.channels} channels x {unet.multipliers}, {unet.blocks} blocks a "
        f"level, attention at {unet.attention_sizes}",
        f"  text         {text.layers} layers x {text.width}, {text.heads} heads, "
        f"{text.context} tokens",
    ]


def _sampling(model: AnyModelConfig, info: ModelInfo) -> list[str]:
    if not isinstance(model, ModelConfig):
        return []
    scale = model.sampling.guidance_scale
    return [
        f"  {'one sampling step':<20}{_flop((2 if scale != 1 else 1) * info.flops):>15}  "
        f"at guidance scale {scale:g}"
    ]


def _flop(count: float) -> str:
    power = max(2, min(6, (len(f"{count:.0f}") - 1) // 3))
    return f"{count / 1000**power:,.1f} {' KMGTPE'[power]}FLOP"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
