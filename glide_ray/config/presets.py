"""Complete training presets by name: `get("nano-base")`. Every number names its source.

"sec." and "app." refer to GLIDE (Nichol et al. 2021). "ADM" is Dhariwal & Nichol (2021), whose
settings apply where GLIDE is silent. "release" is OpenAI's published configuration.
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
    """The preset `name`. Raises ConfigError, with the nearest name, for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()


# -- as in the paper ----------------------------------------------------------------------------


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


# -- as released --------------------------------------------------------------------------------


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
            sampling=SamplingConfig(respacing="fast27", guidance_scale=1.0, noise_scale=0.997),
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


# -- noised CLIP --------------------------------------------------------------------------------


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


# -- ours: the emoji corpus on one GPU ----------------------------------------------------------

EMOJI = {
    "corpus": "runs/corpus/{train,tones,scenes}",
    "held_out": "runs/corpus/held_out",
    # Otherwise tones and scenes are two thirds of an epoch, and people, flags and symbols two
    # fifths of the rest.
    "shares": {"tones": 0.1, "scenes": 0.2, "People & Body": 0.3, "Flags": 0.15, "Symbols": 0.4},
}


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
                prediction="x0",
                inpaint=True,
                text=TextConfig(width=128, layers=4, heads=2, context=32),
            ),
            sampling=SamplingConfig(sampler="dpm++", respacing="25", guidance_scale=2.5),
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


# -- ours: tests and the first run --------------------------------------------------------------


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


def plain(preset: Preset) -> Preset:
    """The same CLIP trained on clean images only, to score and search finished images.

    For use where no public CLIP is available.
    """
    clip = preset.model.clip.model_copy(update={"noised": False})
    model = preset.model.model_copy(
        update={"name": preset.model.name.replace("-", "-plain-"), "clip": clip}
    )
    # nano-plain-clip still improves after 600 steps: share of 64 held-out captions that it finds,
    # 0.47 at 600 steps and 0.53 at 1,200.
    steps = 1000 if preset.model.name.startswith("nano") else preset.train.steps
    return preset.model_copy(
        update={"model": model, "train": preset.train.model_copy(update={"steps": steps})}
    )


# -- fine-tuning, as in secs. 4.2 and 4.3 -------------------------------------------------------


def guided(preset: Preset) -> Preset:
    """Fine-tune for classifier-free guidance: 20% empty captions (sec. 4.2).

    The paper does not give the number of steps; a tenth of the training steps is our choice.
    """
    return _fine_tuned(preset, "guided", {}, {"empty_caption_rate": 0.2}, {})


def inpaint(preset: Preset) -> Preset:
    """Fine-tune for inpainting: four more input channels, random erasures (sec. 4.3).

    20% of the captions are empty, as for guidance.
    """
    # Nano models are undertrained, so they need more steps; half the learning rate, so that they
    # keep what they have learnt.
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
# Our models need no fine-tuning for guidance: they train with empty captions from the start. The
# emoji models need none for inpainting either: they train with random erasures.
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
