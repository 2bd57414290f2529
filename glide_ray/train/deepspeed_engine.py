"""Everything that depends on internals of DeepSpeed (0.19.8): engine, ZeRO optimizers, loss scaler.

A newer DeepSpeed needs changes here only. `masters` are the float32 tensors that an optimizer
steps; see `partition.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .partition import FIRST, SECOND, ParamSlice, put_slice
from .trained_part import trained_parameters

# Smallest fp16 loss scale: a smaller one would shrink the gradients below their true size.
MIN_LOSS_SCALE = 1.0
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def quiet() -> None:
    """Silence DeepSpeed's banners, and disable its shared-memory collective.

    Compiling the collective takes 48 s at first use.
    """
    import deepspeed  # here, because importing it takes seconds

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join_process_group() -> None:
    """Use the existing process group (Ray's), or create one with this process only."""
    quiet()
    if dist.is_initialized():
        return
    # Port 0: the store takes a free port; no other process has to connect to it.
    for name, value in (
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
    ):
        os.environ.setdefault(name, value)
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False
    )


def check_overflow_once(engine) -> None:
    """Disable DeepSpeed's overflow check of single gradients under ZeRO stages 1 and 2.

    It takes a dozen small kernels per gradient, and is redundant: DeepSpeed also checks the norm
    of the gradients, which any inf or NaN on any rank makes non-finite. With an offloaded
    optimizer the check only sets a flag, and stays.
    """
    if engine.zero_optimization_stage() in (1, 2) and not engine.optimizer.cpu_offload:
        engine.optimizer.check_overflow = lambda partition_gradients=True: None


# -- parameters and optimizer state ----------------------------------------------------------------


def masters(engine) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer steps, for any ZeRO stage and precision."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
    ):
        tensors = getattr(engine.optimizer, attribute, None)
        if tensors:
            return list(tensors)
    return list(trained_parameters(engine.module).values())  # stage 0 in float32


def param_slices(engine) -> list[ParamSlice]:
    """This rank's slices of the trained parameters.

    All ranks together cover each once; under stage 0 each rank covers all of them.
    """
    found = []
    place = {id(tensor): number for number, tensor in enumerate(masters(engine))}
    parameter: Any  # with DeepSpeed's attributes
    for name, parameter in trained_parameters(engine.module).items():
        if hasattr(parameter, "ds_id"):  # stage 3: equal slices on every rank, the last padded
            master, offset, length = engine.optimizer.grad_position[
                engine.optimizer.get_param_id(parameter)
            ]
            start = length * torch.distributed.get_rank()
            count = max(0, min(length, parameter.ds_numel - start))
            shape = tuple(parameter.ds_shape)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            # Stages 1 and 2: this rank's range of all parameters laid end to end.
            mapping = parameter._hp_mapping
            master, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            start, count, shape = (
                mapping.lp_fragment_address.start,
                mapping.lp_fragment_address.numel,
                tuple(parameter.shape),
            )
        elif id(parameter) in place:  # stage 0: the whole parameter
            master, offset, start, count, shape = (
                place[id(parameter)],
                0,
                0,
                parameter.numel(),
                tuple(parameter.shape),
            )
        else:  # on another rank
            continue
        if count:
            found.append(ParamSlice(name, shape, start, count, master, offset))
    return found


def moments(engine) -> dict[str, list[Tensor]]:
    """Adam's two moments of `masters`, created as zeros if no step has been taken yet."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for tensor in masters(engine):
        state = optimizer.state[tensor]
        if FIRST not in state:
            # torch's fused AdamW requires the step count on the parameter's device.
            state.update(
                {
                    "step": torch.zeros((), device=tensor.device),
                    FIRST: torch.zeros_like(tensor),
                    SECOND: torch.zeros_like(tensor),
                }
            )
    return {
        kind: [optimizer.state[tensor][kind] for tensor in masters(engine)]
        for kind in (FIRST, SECOND)
    }


def adam_steps(engine) -> float:
    """Number of Adam steps: fewer than the run's steps if fp16's loss scale skipped some."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return float(optimizer.state[masters(engine)[0]]["step"]) if moments(engine) else 0.0


def set_adam_steps(engine, steps: float) -> None:
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for tensor in masters(engine):
        optimizer.state[tensor]["step"].fill_(steps)


def set_masters(engine, slices: Sequence[ParamSlice], weights: Mapping[str, Tensor]) -> None:
    """Load whole parameters by name, exactly into `masters`, and update the network from these."""
    flat = masters(engine)
    for param_slice in slices:
        put_slice(
            flat,
            param_slice,
            weights[param_slice.name].reshape(-1)[
                param_slice.start : param_slice.start + param_slice.count
            ],
        )
    refresh(engine)


def refresh(engine) -> None:
    """Update the network's weights from `masters`."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        # Release small parameters that a forward pass has gathered and kept whole.
        optimizer._partition_all_parameters()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def full_shapes(engine) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, also where ZeRO stage 3 has sharded the parameter."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


# -- steps and the fp16 loss scale -----------------------------------------------------------------


def stepped(engine) -> bool:
    """Whether the last optimizer step changed the weights; if not, the EMA must not be updated.

    Reads a Python bool, so it does not wait for the device.
    """
    return engine.was_step_applied()


def gradient_norm(engine) -> Tensor | None:
    """Norm of the last step's gradients before clipping, over all ranks, not finite if skipped.

    None under ZeRO stage 0, where DeepSpeed computes none. Does not wait for the device.
    """
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return None if norm is None else torch.as_tensor(norm)


def loss_scale(engine) -> float:
    """fp16's loss scale; only in fp16."""
    return float(engine.optimizer.loss_scaler.cur_scale)


def scale_collapsed(engine) -> bool:
    """Whether fp16's loss scale is at its minimum, so that no smaller scale can help.

    Reads a Python float, so it does not wait for the device. DeepSpeed itself would raise a bare
    Exception at the next overflow.
    """
    return loss_scale(engine) <= MIN_LOSS_SCALE


def scale_of_last_step(engine) -> float:
    """fp16's loss scale during the last step; only in fp16.

    If the step was skipped, DeepSpeed has halved the scale since, which is undone here. It does
    not halve after the first overflow (hysteresis): the result is then twice the true scale.
    """
    scaler = engine.optimizer.loss_scaler
    return scaler.cur_scale * (1 if stepped(engine) else scaler.scale_factor)


def scaler_state(engine) -> dict[str, Any]:
    """State of fp16's loss scaler, as saved in checkpoints; only in fp16."""
    scaler = vars(engine.optimizer.loss_scaler)
    return {name: scaler[name] for name in SCALER_STATE if name in scaler}


def set_scaler_state(engine, state: Mapping[str, Any]) -> None:
    vars(engine.optimizer.loss_scaler).update(state)
