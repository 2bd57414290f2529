"""OpenAI's published state dicts, in and out, strictly: every key and shape is accounted for.

The released names number the modules of nested Sequentials; here they become our names. Linear layers over pixels are
1-wide convolutions there, so their weights gain or lose a last axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import UNetConfig, UserError
from .layers import AttentionBlock, ResBlock
from .text import TextBlock
from .unet import GlideUNet


class ReleasedError(UserError):
    """A state dict that is not the released form of this model. The message names the first keys that differ."""


def from_released(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A released state dict -> ours for `config`. Raises ReleasedError for a missing or unexpected key or shape."""
    names, ours = _names_and_shapes(config)
    _check_keys(set(names.values()), set(state))
    result = {}
    for name, released in names.items():
        tensor = state[released]
        if tensor.dim() == len(ours[name]) + 1 and tensor.shape[-1] == 1 and tensor.dim() == 3:
            tensor = tensor[..., 0]
        if tensor.shape != ours[name]:
            raise ReleasedError(f"{released} has the shape {list(state[released].shape)}, where this model has "
                                f"{list(ours[name])}: it belongs to a model of another size.")
        result[name] = tensor
    return result


def to_released(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Our state dict -> the released names and shapes. Raises ReleasedError for a missing or unexpected key."""
    names, _ = _names_and_shapes(config)
    _check_keys(set(names), set(state))
    return {released: state[name][..., None] if _is_convolution(released) else state[name]
            for name, released in names.items()}


def released_names(config: UNetConfig) -> dict[str, str]:
    """Our parameter name -> the released one, for every parameter of the model."""
    return _names_and_shapes(config)[0]


# --------------------------------------------------------------------------------------------------------------------

RES_BLOCK = {"in_norm": "in_layers.0", "in_conv": "in_layers.2", "embedding": "emb_layers.1", "out_norm": "out_layers.0",
             "out_conv": "out_layers.3", "skip": "skip_connection"}
ATTENTION = {"norm": "norm", "qkv": "qkv", "text_kv": "encoder_kv", "out": "proj_out"}
TEXT_BLOCK = {"attention_norm": "ln_1", "qkv": "attn.c_qkv", "out": "attn.c_proj", "mlp_norm": "ln_2",
              "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
TOP = {"text.token": "token_embedding", "text.norm": "final_ln", "text.pool": "transformer_proj", "time_in": "time_embed.0",
       "time_out": "time_embed.2", "stem": "input_blocks.0.0", "out_norm": "out.0", "out": "out.2"}
TABLES = {"text.position": "positional_embedding", "text.padding": "padding_embedding"}


def _names_and_shapes(config: UNetConfig) -> tuple[dict[str, str], dict[str, torch.Size]]:
    with torch.device("meta"):
        model = GlideUNet(config)
    modules = dict(TOP)
    for index, block in enumerate(model.text.blocks):
        _add(modules, block, f"text.blocks.{index}", f"transformer.resblocks.{index}")
    for index, stage in enumerate(model.down):
        _add_stage(modules, stage, f"down.{index}", f"input_blocks.{index + 1}")
    for index, stage in enumerate(model.up):
        _add_stage(modules, stage, f"up.{index}", f"output_blocks.{index}")
    _add_stage(modules, model.middle[0], "middle.0", "middle_block")
    _add(modules, model.middle[1].block, "middle.1.block", "middle_block.2")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = {}
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        names[name] = TABLES.get(name) or f"{modules[module]}.{leaf}"
    return names, shapes


def _add_stage(modules: dict[str, str], stage, ours: str, released: str) -> None:
    parts = [("block", stage.block), ("attention", stage.attention), ("resample", stage.resample)]
    for position, (part, module) in enumerate((part, module) for part, module in parts if module is not None):
        _add(modules, module, f"{ours}.{part}", f"{released}.{position}")


def _add(modules: dict[str, str], block: nn.Module, ours: str, released: str) -> None:
    table = {ResBlock: RES_BLOCK, AttentionBlock: ATTENTION, TextBlock: TEXT_BLOCK}[type(block)]
    modules.update({f"{ours}.{name}": f"{released}.{other}" for name, other in table.items()})


def _is_convolution(released: str) -> bool:
    return released.endswith((".qkv.weight", ".encoder_kv.weight", ".proj_out.weight"))


def _check_keys(expected: set[str], given: set[str]) -> None:
    for word, keys in (("is missing", expected - given), ("is unexpected", given - expected)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ReleasedError(f"The key {min(keys)!r}{more} {word}: the state dict is not the released form of this model.")
