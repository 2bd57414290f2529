"""What a run trains: all weights, parts of them, or an adapter; the rest is in `start_from`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config.lora import AdapterConfig
from ..config.training import Preset, TrainConfig
from ..models.layers import shapes_only
from ..models.lora import add_adapters
from ..models.unet import GlideUNet
from ..models.weights import (
    build_model,
    check_shapes,
    load_config,
    load_weights,
    with_known_channels,
)
from ..pretrained import shipped
from ..storage import fingerprint
from .checkpoint import Base, CheckpointError


def keeps_weights(train: TrainConfig) -> bool:
    """Whether some weights stay as they are in `start_from`, and are in no checkpoint."""
    return bool(train.lora_rank or train.freeze)


def part_of(name: str) -> str:
    """The part of the model that a parameter or a layer belongs to: one of PARTS."""
    if name.startswith("text."):
        return "text"
    return "attention" if ".attention." in name else "convolutions"


def prepare(model: nn.Module, preset: Preset) -> Base | None:
    """Load the weights that the run keeps, freeze them, and add the adapters to train.

    None, and the model is unchanged, if the run trains all weights. Raises WeightsError.
    """
    train = preset.train
    if not keeps_weights(train):
        return None
    model.load_state_dict(starting_state(preset, model))
    if train.lora_rank:
        torch.manual_seed(train.seed)  # the same adapters on every rank and at every start
    choose_trained(model, train)
    return _base_of(preset)


def choose_trained(model: nn.Module, train: TrainConfig) -> None:
    """Freeze the weights that a run keeps, and add the adapters that it trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not train.lora_rank and part_of(name) not in train.freeze)
    if train.lora_rank:
        add_adapters(
            model,
            train.lora_rank,
            train.lora_alpha,
            lambda name: part_of(name) not in train.freeze,
        )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run trains, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def starting_state(
    preset: Preset, model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """State dict of `start_from`, for a model with these shapes, by default its own.

    Weights of a model without inpainting get its input channels. Raises WeightsError.
    """
    path = preset.train.start_from
    assert path is not None
    _, state = load_weights(shipped.fetch(path, preset.model.role))
    if isinstance(model, GlideUNet) and not preset.train.lora_rank:
        state = with_known_channels(state, model.config)
    check_shapes(
        state,
        shapes or {name: tuple(one.shape) for name, one in model.state_dict().items()},
        path,
    )
    return state


def _base_of(preset: Preset) -> Base:
    assert preset.train.start_from is not None
    path = shipped.fetch(preset.train.start_from, preset.model.role)
    return {"name": load_config(path).name, "sha256": fingerprint(path)}


def check_base(base: Base | None, saved: Base | None, preset: Preset) -> None:
    """Raise CheckpointError if a checkpoint was `saved` with other weights than the run has now."""
    if base and saved and saved["sha256"] != base["sha256"]:
        raise CheckpointError(
            f"The weights {preset.train.start_from} have changed since the run began: their "
            f"SHA-256 begins {base['sha256'][:16]}, and began {saved['sha256'][:16]}; bring the "
            "old file back, or use another output folder."
        )


def adapter_config(preset: Preset, base: Base) -> AdapterConfig:
    """What the file of a run's adapter says of itself."""
    assert preset.train.lora_rank
    return AdapterConfig(
        base=base["name"],
        base_sha256=base["sha256"],
        role=preset.model.role,
        rank=preset.train.lora_rank,
        alpha=preset.train.lora_alpha,
    )


def kept_weights(preset: Preset, base: Base | None) -> dict[str, Tensor]:
    """The parts of `start_from` that belong into the weights of a run and are in no checkpoint.

    `base`: as the checkpoint names it. Raises WeightsError, CheckpointError.
    """
    if base is None or preset.train.lora_rank:
        return {}
    check_base(_base_of(preset), base, preset)
    with shapes_only():
        model = build_model(preset.model)
    state = starting_state(preset, model)
    return {name: one for name, one in state.items() if part_of(name) in preset.train.freeze}
