"""Optimizer and kernels from a TrainConfig: learning rate, groups, DeepSpeed config."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from ..config.training import TrainConfig
from ..errors import ConfigError
from ..models.unet import GlideUNet
from .batch_split import BatchSplit
from .trained_part import trained_parameters

# Dynamic loss scaling (sec. 4.1: traditional loss scaling): a step whose gradients overflow is
# skipped, and the scale halved.
FP16 = {
    "enabled": True,
    # Initial scale 2^16, deliberately above what most models bear: each halving costs one skipped
    # step, whereas a low scale loses small gradients.
    "initial_scale_power": 16,
    # Steps without overflow before the scale is doubled: costs at most two skipped steps in 1,000.
    "loss_scale_window": 1000,
    # Halve at the second overflow, so that a single unusual batch does not change the scale.
    "hysteresis": 2,
    # `nonfinite.py` stops the run here: if unscaled gradients overflow, the scale is not the cause.
    "min_loss_scale": 1,
}


def deepspeed_config(train: TrainConfig, precision: str, share: BatchSplit) -> dict[str, Any]:
    """DeepSpeed's config. `precision` is resolved: fp32, bf16 or fp16. Raises ConfigError.

    Has no learning rate schedule: the training loop sets the rate (`learning_rate`).
    """
    if train.zero_stage == 0 and precision != "fp32":
        raise ConfigError(
            f"Setting train.zero_stage: 0 keeps no float32 master weights for {precision}; "
            f"use 1, 2 or 3."
        )
    if train.offload_optimizer and train.zero_stage == 0:
        raise ConfigError(
            "Setting train.offload_optimizer: train.zero_stage 0 steps the network's own weights "
            "on its device; use 1, 2 or 3."
        )
    config: dict[str, Any] = {
        # DeepSpeed requires the product of the next two and the world size. With uneven shares it
        # differs from `train.batch`; the weights of `BatchSplit` keep the mean correct.
        "train_batch_size": share.micro_batch * share.calls * share.world,
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.calls,
        "gradient_clipping": train.clip_norm,
        # torch's AdamW, because DeepSpeed's CPU Adam must be compiled on the user's machine.
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "weight_decay": train.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # Off: it synchronises with the device twice per network call; the loop measures images/s.
        "timers": {"throughput": {"enabled": False}},
    }
    if train.offload_optimizer:
        # Pinned memory avoids a second host copy in GPU transfers; it has no effect on a CPU.
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if precision == "fp16":
        config["fp16"] = dict(FP16)
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


FACTOR = "learning_rate_factor"  # key in a parameter group


def learning_rate(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1.

    Linear warm-up, then constant (ADM), then, from step `constant_steps` if that is set, decay as
    1 / sqrt(step) (Karras et al. 2024, EDM2, eq. 67).
    """
    warm = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    fallen = max(1.0, step / train.constant_steps) ** -0.5 if train.constant_steps else 1.0
    return train.learning_rate * warm * fallen


def parameter_groups(model: torch.nn.Module, train: TrainConfig) -> list[dict]:
    """The optimizer's parameter groups: trainable parameters only, and no empty groups.

    Gains and biases have no weight decay (Radford et al. 2021, sec. 2.5). The trainer multiplies
    a group's learning rate by its FACTOR, which the text transformer has if `train.text_rate` is
    not 1.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        decays = not train.weight_decay or parameter.dim() > 1
        own_rate = train.text_rate != 1 and name.startswith("text.")
        groups.setdefault((own_rate, not decays), []).append(parameter)
    return [
        {
            "params": groups[own_rate, still],
            **({"weight_decay": 0.0} if still else {}),
            **({FACTOR: train.text_rate} if own_rate else {}),
        }
        for own_rate, still in sorted(groups)
    ]


def speed_up(model: torch.nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Choose the fastest kernels of a GPU for the model's fixed shapes. Raises ConfigError."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    if train.fused_norms and isinstance(model, GlideUNet):
        if not find_spec("triton"):
            raise ConfigError("train.fused_norms needs Triton, which PyTorch has for Linux only.")
        model.fuse_training()
