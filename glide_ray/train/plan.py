"""`glide plan`: memory, time and price of training, for all combinations of settings.

Memory is estimated in `memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.overrides import override
from ..config.training import Preset
from ..errors import ConfigError
from ..models.cost import launches, operations
from ..precision import BYTES, training_precision
from .batch_split import accumulation
from .hardware import GIGA, HOST_ADAM, PCIE_BYTES_PER_S, TERA, UPLOAD_BYTES_PER_S, Machine
from .memory import (
    Memory,
    choose_micro_batch,
    gb,
    memory,
    offloaded_memory,
    parameter_sizes,
    trained_sizes,
)

# Operations of a backward pass for each of the forward pass (`filtered-base`: 2,420 for 1,692)
BACKWARD = 1.43
# Operations of DeepSpeed's step for each tensor of parameters (3,283 for 783 tensors)
DEEPSPEED = 4.2

# -- time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    The host launches operations while the GPU computes: the longer of the two counts. No overlap
    of communication is assumed, since none has been measured.
    """

    compute: float
    launch: float
    communication: float
    offload: float

    @property
    def total(self) -> float:
        return max(self.compute, self.launch) + self.communication + self.offload


def step_time(
    preset: Preset, world: int, micro_batch: int, precision: str, machine: Machine
) -> StepTime:
    """Estimated time of an optimizer step.

    Compute: 3 times the operations of a forward pass, 4 with activation checkpointing. Launches:
    of a forward pass, BACKWARD times as many for the backward pass, and DeepSpeed's for each tensor
    of parameters.
    Communication, in units of all parameters at `width` bytes each: an all-reduce of gradients
    counts 2, an all-gather of weights or a reduce-scatter of gradients 1. DeepSpeed all-reduces in
    stages 0 and 1 once per step, in stage 2 once per network call; stages 1 and 2 gather weights
    once per step; stage 3 gathers weights twice and reduce-scatters gradients once per call.
    """
    train, stage = preset.train, preset.train.zero_stage
    share, calls = -(-train.batch // world), accumulation(train.batch, world, micro_batch)
    cost, elements, width = operations(preset), sum(parameter_sizes(preset.model)), BYTES[precision]
    flops = machine.single if precision == "fp32" and machine.single else machine.flops
    compute = (4 if train.activation_checkpointing else 3) * cost * share / flops
    times = {0: 2, 1: 3, 2: 1 + 2 * calls, 3: 3 * calls}[stage]
    communication = times * width * elements * (world - 1) / world / machine.link
    shard = elements / world
    offload = (
        (2 * width * shard / PCIE_BYTES_PER_S + shard / HOST_ADAM)
        if train.offload_optimizer and machine.device != "cpu"
        else 0.0
    )
    return StepTime(
        compute, machine.launch * _launches(preset, stage, calls), communication, offload
    )


def _launches(preset: Preset, stage: int, calls: int) -> float:
    """Device operations of an optimizer step of `calls` network calls."""
    forward, tensors = launches(preset.model)
    passes = 1 + BACKWARD + preset.train.activation_checkpointing
    gathers = 3 * tensors if stage == 3 else 0  # two gathers and a reduce-scatter of each
    return calls * (passes * forward + gathers) + DEEPSPEED * tensors


# -- comparison of settings ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Estimates for one combination of settings. If it does not fit, `micro_batch` is 1."""

    preset: Preset
    precision: str
    micro_batch: int
    memory: Memory
    time: StepTime
    fits: bool


def plans(preset: Preset, world: int, precision: str, machine: Machine) -> list[Plan]:
    """Plans for all combinations of ZeRO stage, activation checkpointing and offloading (GPU)."""
    found = []
    for stage in range(4):
        for offload in (False, True) if stage and machine.device != "cpu" else (False,):
            for checkpointing in (False, True):
                # DeepSpeed's stage 0 keeps no float32 masters for 16-bit precisions.
                chosen = "fp32" if stage == 0 else precision
                option = override(
                    preset,
                    [
                        f"zero_stage={stage}",
                        f"offload_optimizer={offload}",
                        f"activation_checkpointing={checkpointing}",
                    ],
                )
                try:
                    images = choose_micro_batch(
                        option, world, chosen, machine.budget, machine.device
                    )
                except ConfigError:
                    images = 1
                needs = memory(option, world, images, chosen, machine.device)
                found.append(
                    Plan(
                        option,
                        chosen,
                        images,
                        needs,
                        step_time(option, world, images, chosen, machine),
                        needs.total <= machine.budget,
                    )
                )
    return found


def best(options: list[Plan], preset: Preset, precision: str) -> Plan | None:
    """The fastest plan that fits; among those within 10% of its time, the simplest.

    Simplest: without offloading, without checkpointing, and closest to the preset. None if no plan
    fits.
    """

    def order(option: Plan) -> tuple:
        train = option.preset.train
        return (
            train.offload_optimizer,
            train.activation_checkpointing,
            option.precision != precision,
            train.zero_stage != preset.train.zero_stage,
            train.zero_stage,
        )

    fitting = [option for option in options if option.fits]
    fastest = min((option.time.total for option in fitting), default=0.0)
    return min(
        (option for option in fitting if option.time.total <= 1.1 * fastest),
        key=order,
        default=None,
    )


def describe(
    preset: Preset, machine: Machine, price: float | None = None
) -> tuple[str, Plan | None]:
    """Text with the table of all plans and details of the best one; and the best, if any fits.

    `price`: of one worker hour, in any currency.
    """
    train, world = preset.train, preset.train.workers
    precision = training_precision(train.precision, machine.device)
    options = plans(preset, world, precision, machine)
    chosen = best(options, preset, precision)
    lines = [
        f"{preset.model.name}, {sum(parameter_sizes(preset.model)) / 1e6:,.2f}M parameters "
        f"in {precision}, on {world} x {machine.name}: batch {train.batch:,}, "
        f"{-(-train.batch // world):,} images a worker; {gb(machine.budget)} GB each to plan with",
        "",
        "GB of a worker at the moment when it holds most",
        HEAD,
        *(_row(option, option is chosen) for option in options),
        "",
    ]
    if chosen is None:
        return "\n".join(lines), None
    seconds, hours = chosen.time.total, train.steps * chosen.time.total / 3600
    lines += [
        "the fastest that fits, for glide train:",
        "  " + " ".join(f"--set {flag}" for flag in _flags(chosen, precision)),
        "",
        _step_line(chosen, machine),
        f"{train.steps:,} steps in "
        f"{f'{hours / 24:,.1f} days' if hours > 48 else f'{hours:,.1f} hours'}: "
        f"{train.batch / seconds:,.{0 if train.batch > 100 * seconds else 1}f} images/s, "
        f"{hours * world:,.1f} worker hours"
        + (f", at {price:g} each {hours * world * price:,.0f}" if price is not None else ""),
        "without held-out losses, and as long as the corpus is read as fast",
        _checkpoint_line(chosen.preset, world),
    ]
    return "\n".join(lines), chosen


def _step_line(chosen: Plan, machine: Machine) -> str:
    """The parts of a step's time, and the rates that they come from."""
    time = chosen.time
    flops = machine.single if chosen.precision == "fp32" and machine.single else machine.flops
    line = (
        f"a step of {time.total:,.3g} s: compute {time.compute:,.3g} s "
        f"at {flops / TERA:,.3g} TFLOP/s a worker ({machine.flops_origin})"
    )
    if machine.launch:
        line += f", or {time.launch:,.3g} s to launch its operations if that is more"
    line += f", communication {time.communication:,.3g} s at {machine.link / GIGA:,.3g} GB/s"
    if time.offload:
        on_host = offloaded_memory(chosen.preset, chosen.micro_batch, chosen.precision)
        line += (
            f", offloaded optimizer {time.offload:,.3g} s and {gb(on_host)} GB of the host for "
            "each worker"
        )
    return line


def _checkpoint_line(preset: Preset, world: int) -> str:
    """Size of a checkpoint: trained weights in float32, two moments, averages."""
    size = 4 * (3 + preset.train.averages) * sum(trained_sizes(preset))
    part = size / (world if preset.train.zero_stage else 1)
    return (
        f"a checkpoint has {gb(size)} GB, {gb(part)} a worker: uploaded beside training in "
        f"{part / UPLOAD_BYTES_PER_S:,.2g} s at {UPLOAD_BYTES_PER_S / GIGA:g} GB/s each (assumed)"
    )


def _flags(option: Plan, precision: str) -> list[str]:
    train, text = option.preset.train, {True: "true", False: "false"}
    return [
        f"workers={train.workers}",
        f"batch={train.batch}",
        f"zero_stage={train.zero_stage}",
        f"micro_batch={option.micro_batch}",
        f"activation_checkpointing={text[train.activation_checkpointing]}",
        f"offload_optimizer={text[train.offload_optimizer]}",
        *([f"precision={option.precision}"] if option.precision != precision else []),
    ]


HEAD = (
    "  ZeRO     checkpointing  offload  images a call  calls  parameters  gradients  optimizer"
    "  averages  activations  workspace     total   step, s"
)


def _row(option: Plan, chosen: bool) -> str:
    train, needs = option.preset.train, option.memory
    stage = f"{train.zero_stage}{' fp32' if train.zero_stage == 0 else ''}"
    sizes = "".join(
        f"{gb(size):>{width}}"
        for size, width in zip(vars(needs).values(), (12, 11, 11, 10, 13, 11), strict=True)
    )
    yes = {True: "yes", False: "-"}
    return (
        f"{'*' if chosen else ' '} {stage:<9}{yes[train.activation_checkpointing]:<15}"
        f"{yes[train.offload_optimizer]:<9}{option.micro_batch:>13}"
        f"{accumulation(train.batch, train.workers, option.micro_batch):>7}"
        f"{sizes}{gb(needs.total):>10}"
        + (f"{option.time.total:>10,.3g}" if option.fits else "  does not fit")
    )
