"""Weights files: one safetensors file that carries its model's config, so that it can be loaded by itself and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config.models import AnyModelConfig, ClipModelConfig, ModelConfig, UNetConfig
from ..config.overrides import validate
from ..errors import ConfigError, UserError
from ..storage import whole
from .clip import NoisedClip
from .unet import GlideUNet


class WeightsError(UserError):
    """A weights file that cannot be used."""


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: AnyModelConfig, **metadata: str
) -> None:
    """Write the state dict and its config to one file, whole or not at all. Tensors are stored as they are."""
    with whole(path) as partial:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()},
            partial,
            metadata={**metadata, "config": config.model_dump_json()},
        )


def load_weights(path: str | Path) -> tuple[AnyModelConfig, dict[str, Tensor]]:
    """The config and the state dict of a weights file, on the CPU. Raises WeightsError."""
    config = load_config(path)
    with safe_open(path, "pt") as file:
        return config, {name: file.get_tensor(name) for name in file.keys()}


def load_config(path: str | Path) -> AnyModelConfig:
    """The config alone, without reading the tensors. Raises WeightsError."""
    metadata = load_metadata(path)
    if "config" not in metadata:
        raise WeightsError(
            f"{path} carries no glide_ray config; only weights that glide_ray wrote can be loaded as they are."
        )
    try:
        tree = json.loads(metadata["config"])
        return validate(ClipModelConfig if "clip" in tree else ModelConfig, tree)
    except (ConfigError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"{path} carries a config that this version does not read: {error}"
        ) from None


def load_metadata(path: str | Path) -> dict[str, str]:
    """What a weights file says of itself. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"There is no weights file {path}; train one with `glide train`, or give the path of another."
        )
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}); export or copy it again."
        ) from None


def build_model(config: AnyModelConfig) -> GlideUNet | NoisedClip:
    """The model of a config, drawn at random."""
    return (
        GlideUNet(config.unet, config.diffusion)
        if isinstance(config, ModelConfig)
        else NoisedClip(config.clip)
    )


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[GlideUNet | NoisedClip, AnyModelConfig]:
    """The model in eval mode, channels last, frozen. Raises WeightsError where the weights do not fit their config."""
    config, state = load_weights(path)
    with torch.device("meta"):
        model = build_model(config)
    check_shapes(
        state, {name: tensor.shape for name, tensor in model.state_dict().items()}, str(path)
    )
    model.load_state_dict(state, assign=True)
    return model.to(device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(
        False
    ), config


def with_known_channels(state: Mapping[str, Tensor], unet: UNetConfig) -> dict[str, Tensor]:
    """A model's weights as its inpainting form begins with them: the input channels of the known pixels weigh nothing (sec. 4.3)."""
    stem = state.get("stem.weight")
    folded = unet.patch**2
    if stem is None or not unet.inpaint or stem.shape[1] == unet.in_channels * folded:
        return dict(state)
    image, beside = stem[:, : 3 * folded], stem[:, 3 * folded :]
    known = stem.new_zeros(len(stem), 4 * folded, *stem.shape[2:])
    return {**state, "stem.weight": torch.cat([image, known, beside], dim=1)}


def without_known_channels(state: Mapping[str, Tensor], unet: UNetConfig) -> dict[str, Tensor]:
    """An inpainting model's weights for `unet`, the same network without the input channels of
    known pixels: it computes what the inpainting model does where nothing is known."""
    stem, folded = state["stem.weight"], unet.patch**2
    return {
        **state,
        "stem.weight": torch.cat([stem[:, : 3 * folded], stem[:, 7 * folded :]], dim=1),
    }


def check_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: str
) -> None:
    """Raise WeightsError naming the first difference between a state dict and the shapes that a model expects."""
    for name, shape in expected.items():
        if name not in state:
            raise WeightsError(f"{source} has no tensor {name!r}: it was made by another model.")
        if state[name].shape != shape:
            raise WeightsError(
                f"{source} is a checkpoint of another shape: {name} is {list(state[name].shape)} there and "
                f"{list(shape)} in this model."
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise WeightsError(
            f"{source} has a tensor {extra[0]!r} that this model does not have: it was made by another model."
        )


def check_role(config: AnyModelConfig, role: str, path: str | Path) -> None:
    """Raises WeightsError where an upsampler is given as the base model, or the like."""
    if config.role != role:
        raise WeightsError(
            f"{path} holds {config.name}, a model of the kind {config.role!r}, where one of the kind {role!r} is "
            f"wanted; were the two exchanged?"
        )


def check_pair(base: ModelConfig, upsampler: ModelConfig | None) -> None:
    """Raises WeightsError where an upsampler does not enlarge what the base model makes."""
    if upsampler and upsampler.low_res_size != base.image_size:
        raise WeightsError(
            f"The upsampler {upsampler.name} enlarges {upsampler.low_res_size} pixels and {base.name} makes "
            f"{base.image_size}; give a base model and an upsampler of one size."
        )
