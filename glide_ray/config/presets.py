"""Complete runs by name: `get("nano-base")`. Each number stands with its source.

"sec." and "app." are GLIDE (Nichol et al. 2021); ADM is Dhariwal & Nichol (2021), whose settings hold where GLIDE is
silent; "release" is what OpenAI's published configuration says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import ConfigError, nearest
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


def get(name: str) -> Preset:
    """The preset of that name. Raises ConfigError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()


# -- as in the paper --------------------------------------------------------------------------------------------------


def paper_base() -> Preset:
    """3.55B parameters, 2.24B of them visual (sec. 4.1)."""
    return Preset(
        model=ModelConfig(
            name="paper-base",
            unet=UNetConfig(
                image_size=64,
                channels=512,
                multipliers=BASE_STAGES,
                blocks=3,  # sec. 4.1: ADM's, 512 wide
                dropout=0.1,  # ADM, ImageNet 64x64
                text=TextConfig(width=2048, layers=24, heads=32),
            ),  # sec. 4.1; 64 channels a head
            diffusion=DiffusionConfig(schedule="cosine"),  # release
            sampling=SamplingConfig(respacing="150", guidance_scale=3.0),
        ),  # app. B.2; table 1
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="base",
            steps=2_500_000,
            batch=2048,
            workers=64,  # sec. 4.1; 32 a GPU
            learning_rate=3e-4,
            ema_rates=(0.9999,),  # ADM, 64x64 at batch 2048
            precision="fp16",
            activation_checkpointing=True,  # sec. 4.1
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def paper_upsampler() -> Preset:
    """1.54B parameters (sec. 4.1 gives 1.5B and the text width, not the depth; 16 layers fit, 24 make 1.64B)."""
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
            sampling=SamplingConfig(respacing=STRIDED_27, guidance_scale=1.0, noise_scale=0.997),
        ),  # app. B.2; release
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out", min_size=256),
        train=TrainConfig(
            objective="upsampler",
            steps=1_600_000,
            batch=512,
            workers=64,  # sec. 4.1
            learning_rate=1e-4,
            ema_rates=(0.9999,),
            precision="fp16",  # ADM, upsampler
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


# -- as released ------------------------------------------------------------------------------------------------------


def filtered_base() -> Preset:
    """385M parameters: GLIDE (filtered), the published base model."""
    return Preset(
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
        ),  # release
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out"),
        train=TrainConfig(
            objective="base",
            steps=1_100_000,
            batch=2048,
            workers=16,  # app. B.1
            learning_rate=3e-4,
            ema_rates=(0.9999,),
            precision="fp16",
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


def filtered_upsampler() -> Preset:
    """398M parameters: the published upsampler."""
    return Preset(
        model=ModelConfig(
            name="filtered-upsampler",
            unet=UNetConfig(
                image_size=256,
                low_res_size=64,
                channels=192,
                multipliers=UPSAMPLER_STAGES,
                blocks=2,
                text=TextConfig(width=512, layers=16, heads=8),
            ),  # app. B.1
            diffusion=DiffusionConfig(schedule="linear"),
            sampling=SamplingConfig(respacing="fast27", guidance_scale=1.0, noise_scale=0.997),
        ),  # release
        data=DataConfig(corpus="s3://bucket/train", held_out="s3://bucket/held_out", min_size=256),
        train=TrainConfig(
            objective="upsampler",
            steps=400_000,
            batch=512,
            workers=16,  # app. B.1
            learning_rate=1e-4,
            ema_rates=(0.9999,),
            precision="fp16",
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


# -- noised CLIP ------------------------------------------------------------------------------------------------------


def noised_clip_l() -> Preset:
    """The paper's ViT-L over patches of 4 pixels, with the text tower of Radford et al.'s (2021, table 20) ViT-L."""
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
            steps=390_000,
            batch=32_768,
            workers=256,  # app. B.1
            learning_rate=4e-4,
            warmup_steps=2000,  # Radford et al., tables 18 and 20
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
    """ViT-B over patches of 4 pixels, as released; the released one has a vocabulary of its own."""
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
            steps=390_000,
            batch=32_768,
            workers=128,  # app. B.1
            learning_rate=5e-4,
            warmup_steps=2000,
            weight_decay=0.2,  # Radford et al., tables 18 and 20
            ema_rates=(0.9999,),
            precision="fp16",
            activation_checkpointing=True,
            log_every=100,
            evaluate_every=5000,
            checkpoint_every=5000,
        ),
    )


# -- ours: the emoji corpus on one GPU --------------------------------------------------------------------------------

EMOJI = {
    "corpus": "runs/corpus/{train,tones,scenes}",
    "held_out": "runs/corpus/held_out",
    # Tones and scenes would else be two thirds of an epoch, and of the rest two fifths people, flags and signs.
    "shares": {"tones": 0.1, "scenes": 0.2, "People & Body": 0.3, "Flags": 0.15, "Symbols": 0.4},
}


def emoji_base() -> Preset:
    """The base model that ships with the package: ten minutes of one H100, or a CPU's hours. It inpaints, and generates
    where nothing is known.

    Squares of 8 pixels are folded into channels: a CPU then sees 80 images a second and core, where it saw 2. Noise of such
    squares does not fit into the channels, so that the network predicts x_0; SNR + 1 as its weight, up to 5 (Hang et al.
    2023), and more of the noisy timesteps teach colour and shape, which are decided there.
    """
    return Preset(
        model=ModelConfig(
            name="emoji-base",
            unet=UNetConfig(
                image_size=64,
                channels=64,
                multipliers=(2, 3, 4),
                blocks=1,
                attention_sizes=(4, 2),
                patch=8,
                prediction="x0",
                inpaint=True,
                text=TextConfig(width=128, layers=2, heads=2, context=32),
            ),
            sampling=SamplingConfig(sampler="dpm++", respacing="25", guidance_scale=3.0),
        ),
        data=DataConfig(
            **EMOJI, empty_caption_rate=0.1, generate_rate=0.8, held_out_images=256, cache_gib=4
        ),
        train=TrainConfig(
            objective="base",
            steps=60_000,
            batch=32,
            learning_rate=1e-3,
            warmup_steps=300,
            constant_steps=4000,
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
    """The upsampler beside `emoji-base`: squares of 4 pixels, so that a step at 256 pixels costs a CPU 20 ms."""
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
                prediction="x0",
                inpaint=True,
                text=TextConfig(width=16, layers=1, heads=1, context=32),
            ),
            diffusion=DiffusionConfig(schedule="linear"),
            sampling=SamplingConfig(respacing=STRIDED_27, guidance_scale=1.0, noise_scale=0.997),
        ),
        data=DataConfig(
            **EMOJI,
            min_size=256,
            crop=128,
            low_res_blur_rate=0.5,
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
    """A noised CLIP beside `emoji-base`."""
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


# -- ours: tests and the first run ------------------------------------------------------------------------------------


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
            precision="fp32",  # at 16 channels bf16 is no faster on a CPU
            evaluate_every=100,
            checkpoint_every=100,
        ),
    )


def nano_upsampler() -> Preset:
    """The smallest upsampler, for the same purpose."""
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
        data=DataConfig(
            min_size=256, held_out_images=32, crop=64
        ),  # 16 times the steps in the same minutes
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
    """The smallest noised CLIP: patches of 8 pixels, so that it learns shades and kinds of emoji in minutes on two CPU cores."""
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


def plain(preset: Preset) -> Preset:
    """A CLIP that never sees noise: to judge and to search finished images with, where no public one is at hand."""
    clip = preset.model.clip.model_copy(update={"noised": False})
    model = preset.model.model_copy(
        update={"name": preset.model.name.replace("-", "-plain-"), "clip": clip}
    )
    # At 600 steps the smallest one still gains: 0.47 of 64 held-out captions found, at 1,200 0.53.
    steps = 1000 if preset.model.name.startswith("nano") else preset.train.steps
    return preset.model_copy(
        update={"model": model, "train": preset.train.model_copy(update={"steps": steps})}
    )


# -- fine-tuning, which the paper does twice --------------------------------------------------------------------------


def guided(preset: Preset) -> Preset:
    """For classifier-free guidance: 20% of the captions empty (sec. 4.2). The paper does not say for how long; a tenth is ours."""
    return _fine_tuned(preset, "guided", {}, {"empty_caption_rate": 0.2}, {})


def inpaint(preset: Preset) -> Preset:
    """For inpainting: four more input channels, random erasures, captions empty as before (sec. 4.3)."""
    # Nano models are far from trained to begin with, at a rate that would shake what they have learnt.
    train = (
        {"steps": 1500, "learning_rate": preset.train.learning_rate / 2}
        if preset.model.name.startswith("nano")
        else {}
    )
    return _fine_tuned(preset, "inpaint", {"inpaint": True}, {"empty_caption_rate": 0.2}, train)


def _task_on(task: Callable[[Preset], Preset], make: Callable[[], Preset]) -> Preset:
    return task(make())


def _fine_tuned(preset: Preset, task: str, unet: dict, data: dict, train: dict) -> Preset:
    model = preset.model
    weights = f"runs/{model.name}/weights.safetensors"
    return preset.model_copy(
        update={
            "model": model.model_copy(
                update={"name": f"{model.name}-{task}", "unet": model.unet.model_copy(update=unet)}
            ),
            "data": preset.data.model_copy(update=data),
            "train": preset.train.model_copy(
                update={"start_from": weights, "steps": preset.train.steps // 10, **train}
            ),
        }
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        paper_base,
        paper_upsampler,
        filtered_base,
        filtered_upsampler,
        emoji_base,
        emoji_upsampler,
        nano_base,
        nano_upsampler,
    )
}
CLIPS = {
    function.__name__.replace("_", "-"): function
    for function in (noised_clip_l, noised_clip_b, emoji_clip, nano_clip)
}
# Ours are trained with empty captions from the start, so that there is nothing to fine-tune for guidance; the emoji
# models with random erasures too.
PRESETS.update(
    {
        f"{name}-{task.__name__}": partial(_task_on, task, make)
        for name, make in list(PRESETS.items())
        for task in (guided, inpaint)
        if not name.startswith("emoji") and (task is inpaint or not name.startswith("nano"))
    }
)
CLIPS.update(
    {
        name.replace("-", "-plain-"): partial(_task_on, plain, make)
        for name, make in list(CLIPS.items())
        if name in ("emoji-clip", "nano-clip")
    }
)
PRESETS.update(CLIPS)
