"""Memory of a training worker by part, and the largest micro-batch that fits.

Activation memory is traced on the meta device (`activations.py`). ZeRO's state and temporary
buffers are calculated from the code of DeepSpeed 0.19.8 (`zero/stage_1_and_2.py`,
`zero/stage3.py`), torch's AdamW and `ema.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..config.models import AnyModelConfig, ClipModelConfig
from ..config.overrides import override
from ..config.training import Preset
from ..errors import ConfigError
from ..precision import BYTES
from .activations import Moment, meta_model, trained_model, training_pass
from .batch_split import BatchSplit, accumulation
from .hardware import GIGA
from .optimizer import deepspeed_config
from .trained_part import keeps_weights, trained_parameters

# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters, sub_group_size.
BUCKET, LIVE, SUBGROUP = 5 * 10**8, 10**9, 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker by part, at its memory peak.

    `gradients` include the bucket in which they are reduced; `averages` are the EMAs;
    `activations` are saved for the backward pass; `workspace` is all temporary tensors.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.averages
            + self.activations
            + self.workspace
        )


def memory(
    preset: Preset, world: int, micro_batch: int, precision: str, device: str = "cuda"
) -> Memory:
    """Peak memory on the device of each of `world` workers, for micro-batches of `micro_batch`.

    `precision` is resolved: fp32, bf16 or fp16. Raises ConfigError for settings that DeepSpeed
    does not support.
    """
    state = _ZeroState.of(preset, world, micro_batch, precision, device)
    moments = training_pass(preset, precision, device)
    return max(
        (*state.in_pass(moments, micro_batch), *state.afterwards()), key=lambda moment: moment.total
    )


@dataclass(frozen=True)
class _ZeroState:
    """Inputs to the memory estimate of one worker's device under ZeRO.

    Numbers of elements: `all` trained parameters, the worker's shard of them `shard`, the `largest`
    of them, the reduction `bucket`, and the parameters that the run keeps as they are, `kept`.
    """

    all: int
    kept: int
    shard: int
    largest: int
    world: int
    stage: int
    width: int  # bytes per element of the network
    bucket: int
    fused: bool  # fused AdamW, which needs no temporary tensors
    accumulates: bool  # gradient accumulation: several network calls per step
    on_cpu: bool
    offload: bool
    gathered: int  # width of CLIP's embeddings, which are all-gathered; 0 without a gather
    fixed: Memory  # permanent part: parameters, optimizer and EMAs

    @staticmethod
    def of(preset: Preset, world: int, micro_batch: int, precision: str, device: str) -> _ZeroState:
        train, width, on_cpu = preset.train, BYTES[precision], device == "cpu"
        config = deepspeed_config(train, precision, BatchSplit(train.batch, world, 0, micro_batch))
        sizes, stage = trained_sizes(preset), train.zero_stage
        elements, largest = sum(sizes), max(sizes)
        kept = sum(parameter_sizes(preset.model)) - (0 if train.lora_rank else elements)
        shard = -(-elements // world) if stage else elements
        accumulates = accumulation(train.batch, world, micro_batch) > 1
        # Stage 3 holds its shard, and up to LIVE elements of gathered parameters.
        whole = elements + kept
        parameters = width * (
            whole if stage < 3 else -(-whole // world) + (min(whole, LIVE) if world > 1 else 0)
        )
        # float32 masters and two moments. Stage 0 has no masters: it steps the network's weights.
        optimizer, averages = (12 if stage else 8) * shard, 4 * shard * train.averages
        if train.offload_optimizer and on_cpu:
            # The optimizer stays in the same memory, but DeepSpeed still makes the buffers for
            # copies to the host: float32 gradients and, in stages 1 and 2, new weights, one
            # parameter's gradient twice, and gradients accumulated over calls.
            optimizer += 4 * shard
            optimizer += width * (shard * (1 + accumulates) + 2 * largest) if stage < 3 else 0
        elif train.offload_optimizer:
            optimizer, averages = (width * largest if stage < 3 else 0), 0
        gathered = (
            preset.model.clip.embedding
            if isinstance(preset.model, ClipModelConfig) and world > 1
            else 0
        )
        return _ZeroState(
            elements,
            kept,
            shard,
            largest,
            world,
            stage,
            width,
            int(config["zero_optimization"].get("reduce_bucket_size", BUCKET)),
            config["optimizer"]["params"].get("fused", False),
            accumulates,
            on_cpu,
            train.offload_optimizer,
            gathered,
            Memory(parameters=parameters, optimizer=optimizer, averages=averages),
        )

    def in_pass(self, moments: tuple[Moment, ...], images: int) -> Iterator[Memory]:
        """Memory during forward and backward; with accumulation, in a call after the first."""
        # Quadratic term: CLIP's logits of this rank's images against the captions of all ranks.
        powers = (1, images, images * images * self.world)
        # float32 image and text embeddings of all ranks, as gathered and again concatenated.
        exchanged = 16 * self.world * images * self.gathered
        for moment in moments:
            saved, rest = (
                sum(size * power for size, power in zip(sizes, powers, strict=True))
                for sizes in (moment.saved, moment.rest)
            )
            yield replace(
                self.fixed,
                gradients=self._gradients(moment.gradients),
                activations=saved,
                workspace=rest + exchanged,
            )

    def afterwards(self) -> Iterator[Memory]:
        """Memory while weights are loaded, gradients reduced last, and the optimizer steps."""
        width, elements, part = self.width, self.all, 0 if self._away else self.width * self.shard
        if self.kept and self.on_cpu:  # the weights of `start_from` and the model, in float32
            loaded = 4 * (elements + self.kept)
            yield Memory(parameters=loaded, workspace=loaded)
        flat, bucket = width * min(elements, self.bucket), self._bucket(elements)
        if self.stage == 0:
            # Reduction of a flat copy, then the step.
            yield replace(self.fixed, gradients=4 * elements, workspace=flat)
            yield replace(
                self.fixed, gradients=4 * elements, workspace=self._adam(elements, self.largest)
            )
            return
        if self.stage == 3:
            # In order of the yields: reduce-scatter of a flat copy (gloo makes more copies of it);
            # initialisation, when the whole network is present before it is sharded; step.
            last = width * (
                self.shard + -(-self.kept // self.world) + (self.largest if self.world > 1 else 0)
            )
            copies = 1 + self.on_cpu * (1 + (self.world > 1))
            yield replace(
                self.fixed, parameters=last, gradients=bucket + part, workspace=flat * copies
            )
            present = elements + self.kept + self.shard
            yield Memory(parameters=width * present, gradients=self._bucket(0))
            yield from (
                ()
                if self._away
                else self._step(min(self.shard, SUBGROUP), bucket + part, bucket + part)
            )
            return
        unfilled = width * elements - flat if self.stage == 1 else 0
        held = part if self.stage == 2 and self.accumulates else 0
        yield replace(
            self.fixed,
            gradients=unfilled + bucket + part + held,
            workspace=flat if self.world > 1 else 0,
        )
        yield from () if self._away else self._step(self.shard, part, 0)

    def _step(self, stepped: int, gradients: int, held: int) -> Iterator[Memory]:
        """Memory during AdamW's step over `stepped` elements at once.

        `gradients`: bytes of gradients before the step; `held`: bytes of them kept during it.
        """
        if self.offload:  # on a CPU: the float32 gradients are counted in `optimizer`
            yield replace(self.fixed, gradients=held, workspace=self._adam(stepped, stepped))
            return
        # Flattened gradients, then their cast to float32.
        cast = self.width * stepped + (4 * stepped if self.width < 4 else 0)
        for transient in (8 * min(self.largest, self.shard), cast):  # first: norms in float64
            yield replace(self.fixed, gradients=gradients, workspace=transient)
        yield replace(
            self.fixed, gradients=held + 4 * stepped, workspace=self._adam(stepped, stepped)
        )

    @property
    def _away(self) -> bool:
        """Whether the optimizer and its gradients are in host memory, not on the device."""
        return self.offload and not self.on_cpu

    def _adam(self, stepped: int, tensor: int) -> int:
        """Bytes of temporary tensors in torch's AdamW.

        `stepped`: elements in all; `tensor`: elements of the largest tensor. On a GPU square roots
        for all tensors at once; on a CPU square roots and quotients of one tensor; none if fused.
        """
        return 0 if self.fused else 8 * tensor if self.on_cpu else 4 * stepped

    def _bucket(self, filled: int) -> int:
        """Bytes of the gradient reduction buffer after `filled` elements have been written to it.

        On a CPU unwritten pages take no memory; on a GPU the full buffer counts.
        """
        return self.width * (min(self.bucket, filled) if self.on_cpu else self.bucket)

    def _gradients(self, done: int) -> int:
        """Bytes of gradients in the backward pass, once `done` elements have been computed.

        Assumes that they have been reduced as far as the ZeRO stage does during the pass.
        """
        width, part = self.width, 0 if self._away else self.width * self.shard
        if self.stage == 3:
            return part + self._bucket(self.all)  # both are allocated at the start
        if self.stage == 2:
            reduced = part if done > self.bucket else 0
            return (part if self.accumulates else 0) + reduced + (self._bucket(done) if done else 0)
        unreduced = width * (self.all if self.accumulates else done)
        return unreduced + (self._bucket(0) if self.stage == 1 and done else 0)


def offloaded_memory(preset: Preset, micro_batch: int, precision: str) -> int:
    """Bytes of host memory of each worker's offloaded optimizer."""
    fixed = _ZeroState.of(preset, preset.train.workers, micro_batch, precision, "cpu").fixed
    return fixed.optimizer + fixed.averages


@lru_cache(maxsize=32)
def parameter_sizes(model: AnyModelConfig) -> tuple[int, ...]:
    """Number of elements of each parameter."""
    return tuple(parameter.numel() for parameter in meta_model(model, "fp32").parameters())


def trained_sizes(preset: Preset) -> tuple[int, ...]:
    """Number of elements of each parameter that a run trains."""
    if not keeps_weights(preset.train):
        return parameter_sizes(preset.model)
    model = trained_model(preset, "fp32")
    return tuple(parameter.numel() for parameter in trained_parameters(model).values())


def choose_micro_batch(
    preset: Preset, world: int, precision: str, budget: float, device: str = "cuda"
) -> int:
    """Micro-batch size: the preset's if it sets one, else chosen to fit `budget` bytes.

    Finds the largest size that fits, then the smallest that needs no more calls. Raises
    ConfigError, with settings that would help, if not even one image fits.
    """
    share = -(-preset.train.batch // world)
    if preset.train.micro_batch:
        return min(preset.train.micro_batch, share)
    largest = _largest(preset, world, share, precision, budget, device)
    if not largest:
        needs = memory(preset, world, 1, precision, device)
        raise ConfigError(
            f"Training {preset.model.name} on {_counted(world, 'worker')} takes "
            f"{gb(needs.total)} GB each with one image in a call, "
            f"{gb(_greatest(needs)[1])} of them for its {_greatest(needs)[0]}, "
            f"and {gb(budget)} GB are to be had; "
            f"{_remedy(preset, world, precision, budget, device)}."
        )
    return -(-share // -(-share // largest))


def _largest(
    preset: Preset, world: int, share: int, precision: str, budget: float, device: str
) -> int:
    def fits(images: int) -> bool:
        return memory(preset, world, images, precision, device).total <= budget

    # Tried first: one call per step needs no accumulated gradients, so it may take less memory.
    if fits(share):
        return share
    low, high = 0, share  # largest size known to fit, smallest size known not to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _remedy(preset: Preset, world: int, precision: str, budget: float, device: str) -> str:
    """Clause with the smallest change of settings, or the number of workers, to fit one image."""

    def fits(workers: int, settings: tuple[str, ...]) -> bool:
        changed = override(
            preset,
            [
                *settings,
                f"batch={max(preset.train.batch, workers)}",
                "workers=1",
                "min_workers=none",
            ],
        )
        try:
            return memory(changed, workers, 1, precision, device).total <= budget
        except ConfigError:  # stage 0 supports no offloading
            return False

    checkpointing = "activation_checkpointing=true"
    stages = [f"zero_stage={stage}" for stage in range(max(2, preset.train.zero_stage + 1), 4)]
    away = ["offload_optimizer=true"] if device != "cpu" else []
    tries = [
        (checkpointing,),
        *((stage,) for stage in stages),
        *((stage, checkpointing) for stage in stages),
        *((setting, checkpointing) for setting in away),
        *((*away, stage, checkpointing) for stage in stages if away),
    ]
    for settings in tries:
        if fits(world, settings):
            return f"set {' and '.join(f'train.{setting}' for setting in settings)}"
    settings = ("zero_stage=3", checkpointing)
    workers = next(
        (workers for power in range(1, 13) if fits(workers := world * 2**power, settings)), None
    )
    if workers:
        return (
            f"use {workers} workers with {' and '.join(f'train.{setting}' for setting in settings)}"
        )
    return (
        "use a device with more memory, for more workers, another ZeRO stage "
        "and activation_checkpointing would not be enough"
    )


def _greatest(needs: Memory) -> tuple[str, int]:
    return max(((name, size) for name, size in vars(needs).items()), key=lambda part: part[1])


def gb(size: float) -> str:
    """Bytes as text in GB (10^9 bytes), to three significant digits."""
    return f"{size / GIGA:,.{3 if size < GIGA else 2 if size < 10 * GIGA else 1}f}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
