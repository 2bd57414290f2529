"""Presets of the emoji corpus: `emoji` for one GPU, `nano` for a CPU in minutes.

Every number names its source. "sec." and "app." refer to GLIDE (Nichol et al. 2021).
"""

from __future__ import annotations

from typing import Any

from .data import DataConfig
from .models import (
    ClipConfig,
    ClipModelConfig,
    DiffusionConfig,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    UNetConfig,
)
from .paper_presets import STRIDED_27
from .training import Preset, TrainConfig

# Otherwise tones and scenes are two thirds of an epoch, and people, flags and symbols two fifths of
# the rest.
SHARES = {"tones": 0.1, "scenes": 0.2, "People & Body": 0.3, "Flags": 0.15, "Symbols": 0.4}
EMOJI: dict[str, Any] = {
    "corpus": "runs/corpus/{train,tones,scenes}",
    "held_out": "runs/corpus/held_out",
    "shares": SHARES,
}

# From `glide tune-sampler`, on the weights that ship
BASE_GRIDS = (
    "t0,104,251,611,880,995",
    "t0,41,132,310,606,809,938,998",
    "t0,9,29,102,161,284,422,498,638,704,834,892,946,974,998",
)
UPSAMPLER_GRIDS = ("t0,46,405,836",)
BASE_SAMPLING = SamplingConfig(
    sampler="unipc", respacing=BASE_GRIDS[2], tuned_grids=BASE_GRIDS, guidance_scale=2.5
)
UPSAMPLER_SAMPLING = SamplingConfig(
    sampler="unipc",
    respacing=UPSAMPLER_GRIDS[0],
    tuned_grids=UPSAMPLER_GRIDS,
    guidance_scale=1.0,
    noise_scale=0.997,
)


def emoji_base() -> Preset:
    """The shipped base model, for generation and for inpainting.

    Trains in ten minutes on one H100, or in hours on a CPU. Patches of 4 x 4 pixels are folded into
    channels, so a CPU core trains on 45 images/s instead of 2. The network predicts x_0: the noise
    of a patch takes up most of its channels. The loss weight min(SNR + 1, 5) (Hang et al. 2023) and
    a timestep density that favours noisy timesteps teach colour and shape, which are decided there.
    """
    return Preset(
        model=ModelConfig(
            name="emoji-base",
            unet=UNetConfig(
                image_size=64,
                channels=64,
                multipliers=(1, 2, 3, 4),
                blocks=1,
                attention_sizes=(4, 2),
                patch=4,
                pixel_channels=16,
                prediction="x0",
                inpaint=True,
                text=TextConfig(width=128, layers=4, heads=2, context=32),
            ),
            sampling=BASE_SAMPLING,
        ),
        data=DataConfig(
            **EMOJI, empty_caption_rate=0.1, generate_rate=0.8, held_out_images=256, cache_gib=4
        ),
        train=TrainConfig(
            objective="base",
            steps=60_000,
            batch=64,
            learning_rate=1.2e-3,
            warmup_steps=300,
            constant_steps=1500,
            clip_norm=1.0,
            min_snr=5.0,
            timestep_power=1.0,
            ema_rates=(0.9999,),
            precision="auto",
            evaluate_every=500,
            checkpoint_every=500,
            sample_every=500,
        ),
    )


def emoji_upsampler() -> Preset:
    """The shipped upsampler for `emoji-base`.

    Patches of 4 pixels: a step at 256 pixels takes 20 ms on a CPU.
    """
    return Preset(
        model=ModelConfig(
            name="emoji-upsampler",
            unet=UNetConfig(
                image_size=256,
                low_res_size=64,
                channels=64,
                multipliers=(1, 2, 2),
                blocks=1,
                attention_sizes=(),
                patch=4,
                pixel_channels=16,
                prediction="x0",
                inpaint=True,
                text=TextConfig(width=16, layers=1, heads=1, context=32),
            ),
            diffusion=DiffusionConfig(schedule="linear"),
            sampling=UPSAMPLER_SAMPLING,
        ),
        data=DataConfig(
            **EMOJI,
            min_size=256,
            crop=128,
            low_res_blur_rate=0.5,
            low_res_noise=6.0,
            generate_rate=0.75,
            held_out_images=32,
            cache_gib=6,
        ),
        train=TrainConfig(
            objective="upsampler",
            steps=40_000,
            batch=16,
            learning_rate=8e-4,
            warmup_steps=300,
            constant_steps=4000,
            clip_norm=1.0,
            min_snr=5.0,
            ema_rates=(0.9999,),
            precision="auto",
            evaluate_every=1000,
            checkpoint_every=1000,
            sample_every=1000,
        ),
    )


def emoji_clip() -> Preset:
    """A noised CLIP for `emoji-base`."""
    return Preset(
        model=ClipModelConfig(
            name="emoji-clip",
            clip=ClipConfig(
                image_width=256,
                image_layers=6,
                image_heads=4,
                text_width=256,
                text_layers=4,
                text_heads=4,
                embedding=128,
            ),
        ),
        data=DataConfig(),
        train=TrainConfig(
            objective="clip",
            steps=10_000,
            batch=512,
            learning_rate=5e-4,
            weight_decay=0.1,
            ema_rates=(0.999,),
            warmup_steps=500,
            clip_norm=1.0,
            evaluate_every=500,
            checkpoint_every=500,
        ),
    )


def nano_base() -> Preset:
    """The smallest base model that makes a picture, trained in minutes on two CPU cores."""
    return Preset(
        model=ModelConfig(
            name="nano-base",
            unet=UNetConfig(
                image_size=64,
                channels=16,
                multipliers=(1, 2, 4, 8),
                blocks=1,
                attention_sizes=(8,),
                head_channels=32,
                groups=8,
                text=TextConfig(width=64, layers=2, heads=2),
            ),
            sampling=SamplingConfig(respacing="50", guidance_scale=2.0),
        ),
        data=DataConfig(empty_caption_rate=0.2, held_out_images=128),
        train=TrainConfig(
            objective="base",
            steps=500,
            batch=16,
            workers=2,
            learning_rate=2e-3,
            ema_rates=(0.99,),
            warmup_steps=20,
            clip_norm=1.0,
            precision="fp32",  # bf16 is no faster on a CPU at 16 channels
            evaluate_every=100,
            checkpoint_every=100,
        ),
    )


def nano_upsampler() -> Preset:
    """The smallest upsampler, trained in minutes on two CPU cores."""
    return Preset(
        model=ModelConfig(
            name="nano-upsampler",
            unet=UNetConfig(
                image_size=256,
                low_res_size=64,
                channels=16,
                multipliers=(1, 2, 2, 4),
                blocks=1,
                attention_sizes=(),
                head_channels=32,
                groups=8,
                text=TextConfig(width=32, layers=1, heads=1),
            ),
            diffusion=DiffusionConfig(schedule="linear"),
            sampling=SamplingConfig(respacing=STRIDED_27, guidance_scale=1.0, noise_scale=0.997),
        ),
        # Crops of 64 pixels: 16 times as many steps in the same time.
        data=DataConfig(min_size=256, held_out_images=32, crop=64),
        train=TrainConfig(
            objective="upsampler",
            steps=600,
            batch=8,
            workers=2,
            learning_rate=3e-3,
            ema_rates=(0.99,),
            warmup_steps=20,
            clip_norm=1.0,
            precision="fp32",
            evaluate_every=200,
            checkpoint_every=200,
        ),
    )


def nano_clip() -> Preset:
    """The smallest noised CLIP.

    With patches of 8 pixels it learns the shades and kinds of emoji in minutes on two CPU cores.
    """
    return Preset(
        model=ClipModelConfig(
            name="nano-clip",
            clip=ClipConfig(
                patch_size=8,
                image_width=128,
                image_layers=3,
                image_heads=4,
                text_width=64,
                text_layers=2,
                text_heads=2,
                embedding=64,
            ),
        ),
        data=DataConfig(held_out_images=256),
        train=TrainConfig(
            objective="clip",
            steps=600,
            batch=128,
            workers=2,
            learning_rate=1e-3,
            weight_decay=0.1,
            ema_rates=(0.99,),
            warmup_steps=50,
            clip_norm=1.0,
            precision="fp32",
            evaluate_every=100,
            checkpoint_every=100,
        ),
    )
