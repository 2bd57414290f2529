"""Presets and weights of models that run in milliseconds."""

import torch

from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.data.tokenizer import Tokenizer
from glide_ray.models.unet import GlideUNet
from glide_ray.models.weights import save_weights

TINY_BASE = [
    "model.unet.image_size=16",
    "model.unet.channels=16",
    "model.unet.multipliers=1,2",
    "model.unet.attention_sizes=8",
    "model.unet.head_channels=16",
    "model.unet.text.width=16",
    "model.unet.text.layers=1",
    "model.unet.text.heads=1",
]
TINY_UPSAMPLER = [
    *TINY_BASE,
    "model.unet.image_size=64",
    "model.unet.low_res_size=16",
    "model.unet.attention_sizes=",
    "data.crop=none",
    "data.min_size=16",
]


def tiny(kind="base", *settings):
    """A preset whose model runs in milliseconds: 16 pixels, or 16 -> 64 for an upsampler."""
    return override(
        presets.get(f"nano-{kind}"), [*(TINY_BASE if kind == "base" else TINY_UPSAMPLER), *settings]
    )


def corpus_settings(corpus):
    """Settings of a run on the shards of drawings in the folder `corpus`."""
    return [
        f"data.corpus={corpus / 'train'}",
        f"data.held_out={corpus / 'held_out'}",
        "data.min_size=16",
    ]


TINY_CLIP = [
    "model.clip.image_size=16",
    "model.clip.patch_size=4",
    "model.clip.image_width=32",
    "model.clip.image_layers=2",
    "model.clip.image_heads=2",
    "model.clip.text_width=32",
    "model.clip.embedding=16",
    "data.min_size=16",
]


def tiny_clip(*settings):
    """A noised CLIP preset for images of 16 pixels."""
    return override(presets.get("nano-clip"), [*TINY_CLIP, *settings])


def random_model(unet, seed=0):
    """A model with random weights; fresh initialisation would make some of its outputs zero."""
    torch.manual_seed(seed)
    model = GlideUNet(unet).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def with_nan_for(word, config, seed=0):
    """A random model's state dict that gives NaN for captions that begin with this word only."""
    state = random_model(config.unet, seed).state_dict()
    token = Tokenizer(config.context).encode(word).tokens[0]
    state["text.token.weight"][token] = float("nan")
    return state


def overflowing(config):
    """A random model's state dict whose activations are right in fp32 and overflow in fp16."""
    state = random_model(config.unet).state_dict()
    state["down.0.block.out_conv.weight"] *= 2.0**18  # a norm behind it divides by as much
    return state


def serving_weights(folder, seed=0):
    """Weights of a very thin cascade of the sizes in the API, 64 -> 256.

    Returns {"base": path, "upsampler": path}.
    """
    sizes = {
        "base": ["model.unet.image_size=64"],
        "upsampler": [
            "model.unet.image_size=256",
            "model.unet.low_res_size=64",
            "model.unet.multipliers=1,1,1,1,2",
            "model.sampling.respacing=4",
        ],
    }
    paths = {}
    for kind, settings in sizes.items():
        config = tiny(kind, *settings).model
        paths[kind] = str(folder / f"{kind}.safetensors")
        folder.mkdir(exist_ok=True)
        save_weights(paths[kind], random_model(config.unet, seed).state_dict(), config)
    return paths


def picture_options(weights, steps=2):
    """Options of the commands that make pictures: tiny weights and few steps."""
    files = ["--base", str(weights["base"]), "--upsampler", str(weights["upsampler"])]
    return [*files, "--steps", str(steps), "--upsampler-steps", "2"]
