"""Weights files: one safetensors file with the model's config in its metadata.

It can be loaded without any other file, and without unpickling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config.models import AnyModelConfig, ClipModelConfig, ModelConfig, UNetConfig
from ..config.overrides import validate
from ..errors import ConfigError, UserError
from ..storage import atomic_write
from .clip import NoisedClip
from .foreign import mistaken_for_weights
from .layers import Network, channels_last, shapes_only
from .unet import GlideUNet

ADAPTER = "adapter"  # metadata of an adapter's file; see `adapters.py`


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class WeightsError(UserError):
    """A weights file that cannot be used."""


def unchanged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: AnyModelConfig, **metadata: str
) -> None:
    """Write a state dict, its config and further metadata to one file, atomically.

    Tensors keep their dtype.
    """
    with atomic_write(path) as partial:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
            partial,
            metadata={**metadata, "config": config.model_dump_json()},
        )


def load_weights(path: str | Path) -> tuple[AnyModelConfig, dict[str, Tensor]]:
    """Config and state dict of a weights file, on the CPU. Raises WeightsError."""
    config = load_config(path)
    with safe_open(path, "pt") as file:
        return config, {name: file.get_tensor(name) for name in file.keys()}


def load_config(path: str | Path) -> AnyModelConfig:
    """Config of a weights file, without reading the tensors. Raises WeightsError."""
    metadata = load_metadata(path)
    if ADAPTER in metadata:
        raise WeightsError(
            f"{path} is an adapter, which is added to the weights that it was trained on; give it "
            f"with --lora."
        )
    if "config" not in metadata:
        raise WeightsError(
            f"{path} carries no glide_ray config; only weights that glide_ray wrote can be loaded "
            f"as they are."
        )
    try:
        return config_of(json.loads(metadata["config"]))
    except (ConfigError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"{path} carries a config that this version does not read: {error}"
        ) from None


def config_of(tree: dict[str, Any]) -> AnyModelConfig:
    """The config of a model from its JSON. Raises ConfigError."""
    if "clip" in tree:
        return validate(ClipModelConfig, tree)
    return validate(ModelConfig, tree)


def load_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a weights file. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"There is no weights file {path}; train one with `glide train`, or give the path of "
            f"another."
        )
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if mistake := mistaken_for_weights(path):
            raise WeightsError(mistake) from None
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); export or copy it again."
        ) from None


@overload
def build_model(config: ModelConfig) -> GlideUNet: ...
@overload
def build_model(config: ClipModelConfig) -> NoisedClip: ...
@overload
def build_model(config: AnyModelConfig) -> GlideUNet | NoisedClip: ...
def build_model(config: AnyModelConfig) -> GlideUNet | NoisedClip:
    """The model of a config, randomly initialised."""
    if isinstance(config, ModelConfig):
        return GlideUNet(config.unet, config.diffusion)
    return NoisedClip(config.clip)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    change: Change = unchanged,
) -> tuple[GlideUNet | NoisedClip, AnyModelConfig]:
    """The model in eval mode, channels last, frozen, and its config.

    `change`: of the state dict before it is loaded. Raises WeightsError if the weights do not fit
    their config.
    """
    config, state = load_weights(path)
    return _loaded(lambda: build_model(config), change(state), path, dtype, device), config


def load_unet(
    path: str | Path,
    role: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    change: Change = unchanged,
) -> tuple[GlideUNet, ModelConfig]:
    """As `load_model`, for a U-Net of the role "base" or "upsampler".

    Raises WeightsError, also for a model of another role.
    """
    config, state = load_weights(path)
    check_role(config, role, path)
    assert isinstance(config, ModelConfig)
    return _loaded(lambda: build_model(config), change(state), path, dtype, device), config


def load_noised_clip(path: str | Path) -> tuple[NoisedClip, ClipModelConfig]:
    """As `load_model`, for a CLIP, in float32 on the CPU.

    Raises WeightsError, also for a model of another role.
    """
    config, state = load_weights(path)
    check_role(config, "clip", path)
    assert isinstance(config, ClipModelConfig)
    return _loaded(lambda: build_model(config), state, path), config


def _loaded(
    build: Callable[[], Network],
    state: Mapping[str, Tensor],
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Network:
    check_floats(state, str(path))
    with shapes_only():
        model = build()
    check_shapes(
        state, {name: tensor.shape for name, tensor in model.state_dict().items()}, str(path)
    )
    model.load_state_dict(state, assign=True)
    return channels_last(model.to(device, dtype)).eval().requires_grad_(False)


def with_known_channels(state: Mapping[str, Tensor], unet: UNetConfig) -> dict[str, Tensor]:
    """Weights of a model without inpainting -> initial weights of its inpainting variant.

    The input channels for known pixels and mask start at zero (sec. 4.3).
    """
    stem = state.get("stem.weight")
    if stem is None or not unet.inpaint or stem.shape[1] == unet.in_channels * unet.patch**2:
        return dict(state)

    def with_known(weight: Tensor, first: int, width: int) -> Tensor:
        known = weight.new_zeros(len(weight), width, *weight.shape[2:])
        return torch.cat([weight[:, :first], known, weight[:, first:]], dim=1)

    return _with_input_channels(state, unet, with_known)


def without_known_channels(state: Mapping[str, Tensor], unet: UNetConfig) -> dict[str, Tensor]:
    """An inpainting model's weights without the input channels of known pixels, for `unet`.

    `unet`: the same network without inpainting. It computes the same as the inpainting model does
    when no pixel is known.
    """

    def without_known(weight: Tensor, first: int, width: int) -> Tensor:
        return torch.cat([weight[:, :first], weight[:, first + width :]], dim=1)

    return _with_input_channels(state, unet, without_known)


def _with_input_channels(
    state: Mapping[str, Tensor], unet: UNetConfig, change: Callable[[Tensor, int, int], Tensor]
) -> dict[str, Tensor]:
    """The state dict with other input channels of the layers that see known pixels and mask.

    `change` receives a weight, its first channel after those of x, and the number of channels.
    """
    folded = unet.patch**2
    changed = {"stem.weight": change(state["stem.weight"], 3 * folded, 4 * folded)}
    head = "pixel_head.in_conv.weight"
    if head in state:  # after the 3 channels of the prediction
        changed[head] = change(state[head], 6, 4)
    return {**state, **changed}


def check_floats(state: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError for a tensor of integers, as in quantised weights."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise WeightsError(
                f"{source} holds {name} in {str(tensor.dtype).removeprefix('torch.')}: it is "
                f"quantised; give the weights in fp16, bf16 or fp32."
            )


def check_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise WeightsError for the first difference between a state dict and a model's shapes.

    `source` names the state dict in the message.
    """
    for name, shape in expected.items():
        if name not in state:
            raise WeightsError(f"{source} has no tensor {name!r}: it was made by another model.")
        if state[name].shape != shape:
            raise WeightsError(
                f"{source} is a checkpoint of another shape: {name} is {list(state[name].shape)} "
                f"there and {list(shape)} in this model."
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise WeightsError(
            f"{source} has a tensor {extra[0]!r} that this model does not have: it was made by "
            f"another model."
        )


def check_role(config: AnyModelConfig, role: str, path: str | Path) -> None:
    """Raise WeightsError if a model has another role, such as an upsampler given as the base."""
    if config.role != role:
        raise WeightsError(
            f"{path} holds {config.name}, a model of the kind {config.role!r}, where one of the "
            f"kind {role!r} is wanted; were the two exchanged?"
        )


def check_pair(base: ModelConfig, upsampler: ModelConfig | None) -> None:
    """Raise WeightsError if an upsampler's input size is not the base model's output size."""
    if upsampler and upsampler.low_res_size != base.image_size:
        raise WeightsError(
            f"The upsampler {upsampler.name} enlarges {upsampler.low_res_size} pixels and "
            f"{base.name} makes {base.image_size}; give a base model and an upsampler of one size."
        )
