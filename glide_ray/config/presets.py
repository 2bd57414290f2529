"""Complete training presets by name: `get("nano-base")`.

The models are in `paper_presets.py` and `emoji_presets.py`; here are the variants of each for
guidance, inpainting and clean images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import ConfigError, nearest
from .emoji_presets import (
    emoji_base,
    emoji_clip,
    emoji_upsampler,
    nano_base,
    nano_clip,
    nano_upsampler,
)
from .models import ClipModelConfig, ModelConfig
from .overrides import override
from .paper_presets import (
    filtered_base,
    filtered_upsampler,
    noised_clip_b,
    noised_clip_l,
    paper_base,
    paper_upsampler,
)
from .training import Preset

log = logging.getLogger(__name__)


def get(name: str) -> Preset:
    """The preset `name`. Raises ConfigError, with the nearest name, for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()


def plain(preset: Preset) -> Preset:
    """The same CLIP trained on clean images only, to score and search finished images.

    For use where no public CLIP is available.
    """
    assert isinstance(preset.model, ClipModelConfig)
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
    tuned = _fine_tuned(preset, "inpaint", {"inpaint": True}, {"empty_caption_rate": 0.2}, train)
    model = tuned.model
    if not isinstance(model, ModelConfig) or model.sampling.sampler != "ddim":
        return tuned
    # The released notebooks enlarge by DDIM, but inpaint by ancestral sampling with both models.
    sampling = model.sampling.model_copy(update={"sampler": "ancestral"})
    return tuned.model_copy(update={"model": model.model_copy(update={"sampling": sampling})})


def _task_on(task: Callable[[Preset], Preset], make: Callable[[], Preset]) -> Preset:
    return task(make())


def _fine_tuned(
    preset: Preset, task: str, unet: dict[str, Any], data: dict[str, Any], train: dict[str, Any]
) -> Preset:
    model, steps = preset.model, preset.train.steps // 10
    assert isinstance(model, ModelConfig)
    # Trained weights are lost in the first steps without a warm-up and clipping.
    gentle = {"warmup_steps": min(1000, max(20, steps // 20)), "clip_norm": 1.0}
    weights = f"runs/{model.name}/weights.safetensors"
    return preset.model_copy(
        update={
            "model": model.model_copy(
                update={"name": f"{model.name}-{task}", "unet": model.unet.model_copy(update=unet)}
            ),
            "data": preset.data.model_copy(update=data),
            "train": preset.train.model_copy(
                update={"start_from": weights, "steps": steps, **gentle, **train}
            ),
        }
    )


def with_settings(name: str, settings: Sequence[str]) -> Preset:
    """The preset of this name with `key=value` settings. Raises ConfigError.

    The learning rate of a preset that fine-tunes follows the root of the batch, unless it is set.
    """
    preset = get(name)
    changed = override(preset, settings)
    given = {setting.partition("=")[0].strip().removeprefix("train.") for setting in settings}
    if preset.train.start_from is None or "learning_rate" in given or "batch" not in given:
        return changed
    ratio = changed.train.batch / preset.train.batch
    rate = preset.train.learning_rate * math.sqrt(ratio)
    log.info(
        f"learning rate {rate:.2g} instead of {preset.train.learning_rate:g}, for a batch of "
        f"{changed.train.batch:,} instead of {preset.train.batch:,}; train.learning_rate sets it"
    )
    return override(changed, [f"learning_rate={rate:.6g}"])


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
