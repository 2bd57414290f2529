"""State dicts of OpenAI's published checkpoints, to our names and back.

Strict: every key and shape is checked. The released names number the
modules of nested Sequentials; they are mapped to our names. The release uses convolutions of width
1 for linear layers over pixels, so those weights gain or lose a last axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config.models import ClipConfig, UNetConfig
from .checkpoint_file import ReleasedError
from .clip import NoisedClip
from .layers import AttentionBlock, ResBlock, shapes_only
from .text import TextBlock
from .unet import GlideUNet, Stage


def from_released(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Convert a released state dict to this project's names, for `config`.

    Raises ReleasedError for a missing or unexpected key, or another shape.
    """
    names, ours = names_and_shapes(config)
    _check_keys(set(names.values()), set(state))
    result = {}
    for name, released in names.items():
        tensor = state[released]
        if tensor.dim() == len(ours[name]) + 1 and tensor.shape[-1] == 1 and tensor.dim() == 3:
            tensor = tensor[..., 0]
        if tensor.shape != ours[name]:
            raise ReleasedError(
                f"{released} has the shape {list(state[released].shape)}, where this model has "
                f"{list(ours[name])}: it belongs to a model of another size."
            )
        result[name] = tensor
    return result


def to_released(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Our state dict -> the released names and shapes.

    Raises ReleasedError for a missing or unexpected key, and for a model that the released code
    cannot run.
    """
    if config.patch > 1 or config.pixel_channels or config.prediction != "eps":
        raise ReleasedError(
            "The released code runs models that predict eps for every pixel; this one works on "
            "patches or predicts v or x_0, so there is no released form of it."
        )
    names, _ = names_and_shapes(config)
    _check_keys(set(names), set(state))
    return {
        released: state[name][..., None] if _is_convolution(released) else state[name]
        for name, released in names.items()
    }


def clip_from_released(
    image: Mapping[str, Tensor], text: Mapping[str, Tensor], config: ClipConfig
) -> dict[str, Tensor]:
    """The released state dicts of both CLIP encoders -> that of our `NoisedClip`.

    The scale comes from the config, because the release keeps it in a settings file. Raises
    ReleasedError.
    """
    with shapes_only():
        ours = NoisedClip(config).state_dict()
    result = {"log_scale": torch.tensor([config.scale]).log()}
    for tower, state in (("image", image), ("text", text)):
        names = clip_names(config)[tower]
        _check_keys(set(names.values()), set(state))
        for name, released in names.items():
            if state[released].shape != ours[name].shape:
                raise ReleasedError(
                    f"{released} of the {tower} encoder has the shape "
                    f"{list(state[released].shape)}, where this model has "
                    f"{list(ours[name].shape)}: it belongs to a model of another size."
                )
            result[name] = state[released]
    return result


def clip_to_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our `NoisedClip` -> the released state dicts of the image and the text encoder."""

    def encoder(tower: str) -> dict[str, Tensor]:
        return {
            _clip_name(name.removeprefix(f"{tower}.")): tensor
            for name, tensor in state.items()
            if name.startswith(f"{tower}.")
        }

    return encoder("image"), encoder("text")


# ----------------------------------------------------------------------------------------------

RES_BLOCK = {
    "in_norm": "in_layers.0",
    "in_conv": "in_layers.2",
    "embedding": "emb_layers.1",
    "out_norm": "out_layers.0",
    "out_conv": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "text_kv": "encoder_kv", "out": "proj_out"}
TEXT_BLOCK = {
    "attention_norm": "ln_1",
    "qkv": "attn.c_qkv",
    "out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
TOP = {
    "text.token": "token_embedding",
    "text.norm": "final_ln",
    "text.pool": "transformer_proj",
    "time_in": "time_embed.0",
    "time_out": "time_embed.2",
    "stem": "input_blocks.0.0",
    "out_norm": "out.0",
    "out": "out.2",
}
TABLES = {"text.position": "positional_embedding", "text.padding": "padding_embedding"}


CLIP = {
    "timestep.weight": "input.w_t",
    "patch.weight": "input.patch_proj",
    "token.weight": "input.w_voc",
    "position": "input.w_pos",
    "norm_in": "input.ln",
    "norm_out": "output.ln",
    "project": "output.f",
}
CLIP_BLOCK = {
    "attention_norm": "f_attn.ln",
    "query": "f_attn.f_q",
    "key": "f_attn.f_k",
    "value": "f_attn.f_v",
    "out": "f_attn.f_c",
    "mlp_norm": "f_mlp.ln",
    "mlp_in": "f_mlp.f_1",
    "mlp_out": "f_mlp.f_2",
}


def clip_names(config: ClipConfig) -> dict[str, dict[str, str]]:
    """For each tower, image and text: our name -> the released name in that encoder's file."""
    with shapes_only():
        ours = list(NoisedClip(config).state_dict())
    return {
        tower: {
            name: _clip_name(name.removeprefix(f"{tower}."))
            for name in ours
            if name.startswith(f"{tower}.")
        }
        for tower in ("image", "text")
    }


def _clip_name(name: str) -> str:
    """A tower's parameter name -> the released name."""
    if name in CLIP:
        return f"blocks.{CLIP[name]}"
    module, _, leaf = name.rpartition(".")
    norm = "norm" in module
    leaf = {"weight": "g" if norm else "w", "bias": "b"}[leaf]
    if module.startswith("blocks."):
        _, index, part = module.split(".")
        return f"blocks.block_{index}.{CLIP_BLOCK[part]}.{leaf}"
    return f"blocks.{CLIP[module]}.{leaf}"


def names_and_shapes(config: UNetConfig) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Our name -> the released name of each tensor, and our name -> our shape."""
    with shapes_only():
        model = GlideUNet(config)
    modules = dict(TOP)
    for index, block in enumerate(model.text.blocks):
        _add(modules, block, f"text.blocks.{index}", f"transformer.resblocks.{index}")
    for index, stage in enumerate(model.down):
        _add_stage(modules, stage, f"down.{index}", f"input_blocks.{index + 1}")
    for index, stage in enumerate(model.up):
        _add_stage(modules, stage, f"up.{index}", f"output_blocks.{index}")
    _add_stage(modules, model.middle[0], "middle.0", "middle_block")
    last = model.middle[1]
    assert isinstance(last, Stage)
    _add(modules, last.block, "middle.1.block", "middle_block.2")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names = {}
    for name in shapes:
        module, _, leaf = name.rpartition(".")
        names[name] = TABLES.get(name) or f"{modules[module]}.{leaf}"
    return names, shapes


def _add_stage(modules: dict[str, str], stage, ours: str, released: str) -> None:
    parts = [("block", stage.block), ("attention", stage.attention), ("resample", stage.resample)]
    for position, (part, module) in enumerate(
        (part, module) for part, module in parts if module is not None
    ):
        _add(modules, module, f"{ours}.{part}", f"{released}.{position}")


def _add(modules: dict[str, str], block: nn.Module, ours: str, released: str) -> None:
    table = {ResBlock: RES_BLOCK, AttentionBlock: ATTENTION, TextBlock: TEXT_BLOCK}[type(block)]
    modules.update({f"{ours}.{name}": f"{released}.{other}" for name, other in table.items()})


def _is_convolution(released: str) -> bool:
    return released.endswith((".qkv.weight", ".encoder_kv.weight", ".proj_out.weight"))


def _check_keys(expected: set[str], found: set[str]) -> None:
    for word, keys in (("is missing", expected - found), ("is unexpected", found - expected)):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ReleasedError(
                f"The key {min(keys)!r}{more} {word}: the state dict is not the released form of "
                f"this model."
            )
