"""What an optimizer step is made with: TrainConfig -> precision, learning rate, parameter groups, DeepSpeed's dictionary."""

from __future__ import annotations

from typing import Any

import torch

from ..config.training import TrainConfig
from ..errors import ConfigError
from ..precision import resolve_precision
from .batch_split import BatchSplit

# Dynamic loss scaling (sec. 4.1: traditional loss scaling): a step whose gradients overflow is skipped, and the scale halved.
FP16 = {
    "enabled": True,
    "initial_scale_power": 16,  # of two: more than most models bear, for too high costs a skipped step each, too low costs small gradients
    "loss_scale_window": 1000,  # steps without overflow, until twice the scale is tried: trying loses two steps in a thousand at most
    "hysteresis": 2,  # the second overflow halves: one odd batch does not move the scale
    "min_loss_scale": 1,  # `nonfinite.py` stops the run here: gradients that overflow unscaled are not the scale's fault
}


def training_precision(precision: str, device: str) -> str:
    """fp32, bf16 or fp16 to train in. Raises ConfigError for fp16 on a CPU, which DeepSpeed refuses."""
    if precision == "fp16" and device != "cuda":
        raise ConfigError(
            "Setting train.precision: fp16 needs a GPU; use bf16, fp32 or auto on a CPU."
        )
    return resolve_precision(precision, device)


def deepspeed_config(train: TrainConfig, precision: str, share: BatchSplit) -> dict[str, Any]:
    """`precision` resolved: fp32, bf16 or fp16. The learning rate's warm-up is the loop's. Raises ConfigError."""
    if train.zero_stage == 0 and precision != "fp32":
        raise ConfigError(
            f"Setting train.zero_stage: 0 keeps no float32 master weights for {precision}; use 1, 2 or 3."
        )
    if train.offload_optimizer and train.zero_stage == 0:
        raise ConfigError(
            "Setting train.offload_optimizer: train.zero_stage 0 steps the network's own weights on its device; use 1, 2 or 3."
        )
    config: dict[str, Any] = {
        # DeepSpeed wants a product. Where shares are uneven that is not `train.batch`; the losses' weights see to the mean.
        "train_batch_size": share.micro_batch * share.calls * share.world,
        "train_micro_batch_size_per_gpu": share.micro_batch,
        "gradient_accumulation_steps": share.calls,
        "gradient_clipping": train.clip_norm,
        # torch's AdamW: DeepSpeed's own CPU Adam would be compiled on the user's machine first.
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
        "timers": {
            "throughput": {"enabled": False}
        },  # which waits for the device twice a network call; the loop has its own
    }
    if train.offload_optimizer:  # pinned, so that copies to and from a GPU need no second one; on a CPU there is nothing to pin
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if precision == "fp16":
        config["fp16"] = dict(FP16)
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


FACTOR = "learning_rate_factor"  # of a group of parameters


def learning_rate(train: TrainConfig, step: int) -> float:
    """Of optimizer step number `step`, counted from 1: a linear warm-up, then constant (ADM), then as 1 / sqrt(step)
    (Karras et al. 2024, EDM2, eq. 67) where `constant_steps` says so."""
    warm = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
    fallen = max(1.0, step / train.constant_steps) ** -0.5 if train.constant_steps else 1.0
    return train.learning_rate * warm * fallen


def parameter_groups(model: torch.nn.Module, train: TrainConfig) -> list[dict]:
    """The optimizer's groups of parameters; none is empty.

    Gains and biases do not decay (Radford et al. 2021, sec. 2.5). The training loop multiplies a
    group's learning rate by its FACTOR, which the text transformer has if `train.text_rate` is
    not 1.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
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
