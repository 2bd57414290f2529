"""Presets of the paper: models for all images, filtered images, and noised CLIP.

Every number names its source. "sec." and "app." refer to GLIDE (Nichol et al. 2021). "ADM" is
Dhariwal & Nichol (2021), whose settings apply where GLIDE is silent. "release" is OpenAI's
published configuration.
"""

from __future__ import annotations

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
from .training import Preset, TrainConfig

BASE_STAGES = (1, 2, 3, 4)  # ADM, ImageNet 64x64


UPSAMPLER_STAGES = (1, 1, 2, 2, 4, 4)  # ADM, ImageNet 64 -> 256


STRIDED_27 = "10,10,3,2,2"  # app. B.2: 27 steps in five segments


def paper_base() -> Preset:
    """The paper's base model: 3.55B parameters, 2.24B of them visual (sec. 4.1)."""
    return Preset(
        model=ModelConfig(
            name="paper-base",
            unet=UNetConfig(
                # Sec. 4.1: ADM's network with 512 channels.
                image_size=64,
                channels=512,
                multipliers=BASE_STAGES,
                blocks=3,
                dropout=0.1,  # ADM, ImageNet 64x64
                # Sec. 4.1; 64 channels per attention head.
                text=TextConfig(width=2048, layers=24, heads=32),
            ),
            diffusion=DiffusionConfig(schedule="cosine"),  # release
            # App. B.2; table 1.
            sampling=SamplingConfig(respacing="150", guidance_scale=3.0),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="base",
            # Sec. 4.1; 32 images per GPU.
            steps=2_500_000,
            batch=2048,
            workers=64,
            # ADM, ImageNet 64x64 at batch 2048.
            learning_rate=3e-4,
            ema_rates=(0.9999,),
            # Sec. 4.1.
            precision="fp16",
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def paper_upsampler() -> Preset:
    """The paper's upsampler: 1.54B parameters.

    Sec. 4.1 gives 1.5B parameters and the text width but not the depth: 16 layers fit, 24 make
    1.64B.
    """
    return Preset(
        model=ModelConfig(
            name="paper-upsampler",
            unet=UNetConfig(
                image_size=256,
                low_res_size=64,
                channels=384,
                multipliers=UPSAMPLER_STAGES,
                blocks=2,
                text=TextConfig(width=1024, layers=16, heads=16),
            ),
            diffusion=DiffusionConfig(schedule="linear"),  # release
            # App. B.2; release.
            sampling=SamplingConfig(respacing=STRIDED_27, guidance_scale=1.0, noise_scale=0.997),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out", min_size=256),
        train=TrainConfig(
            objective="upsampler",
            # Sec. 4.1.
            steps=1_600_000,
            batch=512,
            workers=64,
            # ADM, upsampler.
            learning_rate=1e-4,
            ema_rates=(0.9999,),
            precision="fp16",
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def filtered_base() -> Preset:
    """GLIDE (filtered), the published base model: 385M parameters."""
    return Preset(
        # The released configuration.
        model=ModelConfig(
            name="filtered-base",
            unet=UNetConfig(
                image_size=64,
                channels=192,
                multipliers=BASE_STAGES,
                blocks=3,
                dropout=0.1,
                text=TextConfig(width=512, layers=16, heads=8),
            ),
            diffusion=DiffusionConfig(schedule="cosine"),
            sampling=SamplingConfig(respacing="100", guidance_scale=3.0),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="base",
            # App. B.1.
            steps=1_100_000,
            batch=2048,
            workers=16,
            learning_rate=3e-4,
            ema_rates=(0.9999,),
            precision="fp16",
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def filtered_upsampler() -> Preset:
    """The published upsampler: 398M parameters."""
    return Preset(
        model=ModelConfig(
            name="filtered-upsampler",
            unet=UNetConfig(
                # App. B.1.
                image_size=256,
                low_res_size=64,
                channels=192,
                multipliers=UPSAMPLER_STAGES,
                blocks=2,
                text=TextConfig(width=512, layers=16, heads=8),
            ),
            # Release.
            diffusion=DiffusionConfig(schedule="linear"),
            sampling=SamplingConfig(
                # The released notebooks sample this model by DDIM.
                sampler="ddim",
                respacing="fast27",
                guidance_scale=1.0,
                noise_scale=0.997,
            ),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out", min_size=256),
        train=TrainConfig(
            objective="upsampler",
            # App. B.1.
            steps=400_000,
            batch=512,
            workers=16,
            learning_rate=1e-4,
            ema_rates=(0.9999,),
            precision="fp16",
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def noised_clip_l() -> Preset:
    """The paper's ViT-L with patches of 4 pixels.

    The text tower is that of the ViT-L of Radford et al. (2021, table 20).
    """
    return Preset(
        model=ClipModelConfig(
            name="noised-clip-l",
            clip=ClipConfig(
                image_width=1024,
                image_layers=24,
                image_heads=16,
                text_width=768,
                text_layers=12,
                text_heads=12,
                embedding=768,
            ),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="clip",
            # App. B.1.
            steps=390_000,
            batch=32_768,
            workers=256,
            # Radford et al. (2021), tables 18 and 20.
            learning_rate=4e-4,
            warmup_steps=2000,
            weight_decay=0.0125,  # app. B.1
            ema_rates=(0.9999,),
            precision="fp16",
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def noised_clip_b() -> Preset:
    """ViT-B with patches of 4 pixels, as released, but with GPT-2's vocabulary.

    The released model has a vocabulary of its own.
    """
    return Preset(
        model=ClipModelConfig(
            name="noised-clip-b",
            clip=ClipConfig(
                image_width=768,
                image_layers=12,
                image_heads=12,
                text_width=512,
                text_layers=12,
                text_heads=8,
                embedding=512,
            ),
        ),
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="clip",
            # App. B.1.
            steps=390_000,
            batch=32_768,
            workers=128,
            # Radford et al. (2021), tables 18 and 20.
            learning_rate=5e-4,
            warmup_steps=2000,
            weight_decay=0.2,
            ema_rates=(0.9999,),
            precision="fp16",
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )
